"""Writes run.json at the beginning, and refuses a folder that holds another run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from eaft.errors import ConfigurationError
from eaft.files import read_json
from eaft.inspection.run_file import RUN_FILE, Identity, InspectedRun, read_run, write_run
from eaft.inspection.score.model import Settings


def numbers(settings: Settings, is_sample: bool) -> dict[str, str | int]:
    """Return the flags that change what is computed; `is_sample`: not all rows are scored."""
    model_args = settings.model_args
    flags = {
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        "load_in_4bit": model_args.load_in_4bit,
        "load_in_8bit": model_args.load_in_8bit,
        "autocast": settings.autocast,
        "model_init_kwargs": settings.args.model_init_kwargs,
    }
    found: dict[str, str | int] = {name: str(value) for name, value in flags.items()}
    found["top_k"] = settings.args.gate_top_k
    return found | ({"all": "False"} if is_sample else {})


def begin(folder: Path, run: InspectedRun) -> None:
    """
    Write run.json, or add models to the run.json of the same run.

    Raises:
        ConfigurationError: the folder holds another run.
    """
    if (folder / RUN_FILE).is_file():
        run = continued(folder, run)
    write_run(folder, run)


def continued(folder: Path, run: InspectedRun) -> InspectedRun:
    """
    Return the run that a folder holds, with the models of a new command.

    Raises:
        ConfigurationError: the folder holds another run than the new command's.
    """
    way = "Choose another --output_dir, or delete this one."
    content = read_json(folder / RUN_FILE, dict[str, Any], way)
    if not isinstance(content.get("identity"), dict) or "compared" not in content["identity"]:
        raise ConfigurationError(
            f"output_dir={str(folder)!r} holds another run, none of eaft inspect. {way}"
        )
    before = read_run(folder, way)
    old, new = before.identity, run.identity
    assert old is not None
    assert new is not None
    changed = differences(old, new)
    if before.backend != run.backend:
        changed.append("another backend")
    if changed:
        raise ConfigurationError(
            f"output_dir={str(folder)!r} is an inspection of {' and '.join(changed)}. {way}"
        )
    models = {model.name: model for model in [*before.models, *run.models]}
    return replace(
        run,
        models=list(models.values()),
        top_k_curve=before.top_k_curve,
        sample=before.sample,
        identity=replace(new, compared=old.compared | new.compared),
    )


def differences(old: Identity, new: Identity) -> list[str]:
    """Return in words how a run's identity differs from the identity of the folder's run."""
    if (is_sample := "all" in old.numbers) != ("all" in new.numbers):
        return ["rows in random order, without --all" if is_sample else "every row, with --all"]
    same_rows = old.data[1:] == new.data[1:]
    changed = []
    for name, words in (
        ("model", "another model"),
        ("data", "the same rows, tokenized or labelled otherwise" if same_rows else "other data"),
        ("rollouts", "other rollouts"),
        ("numbers", "other flags"),
    ):
        if getattr(old, name) != getattr(new, name):
            changed.append(words)
    for name in sorted(old.compared.keys() & new.compared.keys()):
        if old.compared[name] != new.compared[name]:
            changed.append(f"another model as {name!r}")
    return changed
