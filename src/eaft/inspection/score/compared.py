"""The models that `--compare` names: a model, an adapter, or a training run's checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from eaft.errors import ConfigurationError
from eaft.evaluation.model_settings import load_tokenizer
from eaft.inspection.folder import BASE
from eaft.inspection.run_file import ScoredModel
from eaft.models import adapter_of, find_model, text_config
from eaft.training.run_folder import is_complete


def find_compared(
    others: list[str], base: str, tokenizer: Any, model_args: dict[str, Any]
) -> list[ScoredModel]:
    """
    Return the models that `--compare` names, in order, each with a unique name.

    A training run's folder stands for its complete checkpoints, each with its step. Its final model
    follows if there is one and no checkpoint has the same step.

    Args:
        others: Hub ids, folders (also of adapters or runs), GGUF files.
        base: the base model, as it is loaded.
        tokenizer: of the base model.
        model_args: `trust_remote_code`.

    Raises:
        ConfigurationError: there is no such model, or its vocabulary differs.
    """
    models: list[ScoredModel] = []
    names = {BASE}
    for other in others:
        for candidate in expand(other):
            name = unique_name(candidate.name, names)
            names.add(name.lower())
            model = find_model(candidate.model, model_args)
            check_vocabulary(model, base, tokenizer, model_args)
            models.append(ScoredModel(name, model, candidate.step))
    return models


def unique_name(name: str, taken: set[str]) -> str:
    """
    Return a name that can be a folder and differs from the names that are taken.

    Args:
        name: of a model.
        taken: names in lower case, since some file systems do not distinguish capitals.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"
    unique, n = name, 1
    while unique.lower() in taken:
        n += 1
        unique = f"{name}-{n}"
    return unique


def expand(other: str) -> list[ScoredModel]:
    """Return the models that one value of `--compare` means."""
    folder = Path(other).expanduser()
    name = folder.name
    if folder.suffix == ".gguf":
        name = folder.stem
    elif folder.is_dir():
        name = folder.resolve().name
    checkpoints = {step_of(path): path for path in folder.glob("checkpoint-*") if is_complete(path)}
    if not checkpoints:
        return [ScoredModel(name, other, step_of(folder) if is_complete(folder) else None)]
    models = [
        ScoredModel(f"{name}-checkpoint-{step}", str(path), step)
        for step, path in sorted(checkpoints.items())
    ]
    last = final_step(folder, max(checkpoints))
    if last not in checkpoints and ((folder / "config.json").is_file() or adapter_of(str(folder))):
        models.append(ScoredModel(name, str(folder), last))
    return models


def step_of(checkpoint: Path) -> int:
    """Return the step of a complete checkpoint."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])


def final_step(folder: Path, otherwise: int) -> int:
    """Return the step at which a run ended, from its run.json; `otherwise` without run.json."""
    try:
        return int(json.loads((folder / "run.json").read_text())["result"]["steps"])
    except (OSError, ValueError, KeyError):
        return otherwise


def check_vocabulary(model: str, base: str, tokenizer: Any, model_args: dict[str, Any]) -> None:
    """Refuse a model whose vocabulary differs from the base model's."""
    try:
        same = load_tokenizer(model, model_args).get_vocab() == tokenizer.get_vocab()
    except ConfigurationError:  # saved without a tokenizer: compare the sizes
        same = text_config(model, model_args).vocab_size == text_config(base, model_args).vocab_size
    if not same:
        raise ConfigurationError(
            f"compare={model!r} has another vocabulary than {base!r}, so their tokens cannot be"
            " compared. Inspect it without --compare, with another --output_dir."
        )
