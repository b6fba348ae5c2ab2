"""Which models `--compare` names: a model, an adapter, or the checkpoints of a training run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from eaft.errors import ConfigurationError
from eaft.evaluation.scores import load_tokenizer
from eaft.inspection.folder import BASE
from eaft.inspection.run_file import ScoredModel
from eaft.models import adapter_of, find_model, text_config
from eaft.training.run_folder import is_complete


def find_compared(
    others: list[str], base: str, tokenizer: Any, model_args: dict[str, Any]
) -> list[ScoredModel]:
    """
    Return the models that `--compare` names, in order, each with a name of its own that is a
    folder's.

    Of a training run's folder these are its complete checkpoints, each with its step, and its final
    model if there is one and no checkpoint of the same step.

    Args:
        others: Hub ids, folders (also of adapters or runs), GGUF files.
        base: the model they are compared with, as it is loaded.
        tokenizer: the base model's.
        model_args: `trust_remote_code`.

    Raises:
        ConfigurationError: there is no such model, or it has another vocabulary.
    """
    found: list[ScoredModel] = []
    names = {BASE}
    for other in others:
        for name, model, step in expand(other):
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"
            unique, n = name, 1
            while unique.lower() in names:
                n += 1
                unique = f"{name}-{n}"
            names.add(unique.lower())  # some file systems do not tell a from A
            model = find_model(model, model_args)
            check_vocabulary(model, base, tokenizer, model_args)
            found.append(ScoredModel(unique, model, step))
    return found


def expand(other: str) -> list[tuple[str, str, int | None]]:
    """Return the name, the place and the step of each model that one `--compare` means."""
    folder = Path(other).expanduser()
    name = (
        folder.stem
        if folder.suffix == ".gguf"
        else folder.resolve().name
        if folder.is_dir()
        else folder.name
    )
    checkpoints = {step_of(path): path for path in folder.glob("checkpoint-*") if is_complete(path)}
    if not checkpoints:
        return [(name, other, step_of(folder) if is_complete(folder) else None)]
    found: list[tuple[str, str, int | None]]
    found = [
        (f"{name}-checkpoint-{step}", str(path), step) for step, path in sorted(checkpoints.items())
    ]
    last = final_step(folder, max(checkpoints))
    if last not in checkpoints and ((folder / "config.json").is_file() or adapter_of(str(folder))):
        found.append((name, str(folder), last))
    return found


def step_of(checkpoint: Path) -> int:
    """Return the step of a complete checkpoint."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])


def final_step(folder: Path, otherwise: int) -> int:
    """Return the step that a run ended at, as `eaft train` notes it."""
    try:
        return int(json.loads((folder / "run.json").read_text())["result"]["steps"])
    except (OSError, ValueError, KeyError):
        return otherwise


def check_vocabulary(model: str, base: str, tokenizer: Any, model_args: dict[str, Any]) -> None:
    """Refuse a model whose tokens are not those of the base model's tokenizer."""
    try:
        same = load_tokenizer(model, model_args).get_vocab() == tokenizer.get_vocab()
    except ConfigurationError:  # saved without one: its size must do
        same = text_config(model, model_args).vocab_size == text_config(base, model_args).vocab_size
    if not same:
        raise ConfigurationError(
            f"compare={model!r} has another vocabulary than {base!r}: their tokens cannot be"
            " compared. Inspect it by itself, into another --output_dir."
        )
