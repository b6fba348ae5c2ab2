"""
The folder of a training run: `run.json`, `metrics.jsonl`, and the checkpoint to resume from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, with_config
from transformers import TrainerCallback
from typing_extensions import TypedDict

from eaft.errors import ConfigurationError
from eaft.evaluation.launch import shared
from eaft.files import read_json
from eaft.models import noted_date, template_date, template_today
from eaft.provenance import Environment
from eaft.training.config import EAFTConfig

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
TUNED_RUN = Path("work") / "run"  # the run, in the folder of `eaft tune`
DELETE = "delete the folder, or choose another output_dir."
# Settings that a resumed run cannot change. The checkpoint's optimizer and schedule keep the first
# of them, whatever the flags say (findings/trainer_resume_settings.sh); `run.json` has one of each
STAYS = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("gate", "gate_alpha", "gate_entropy", "gate_top_k", "gate_kwargs"),
    *("seed", "data_seed", "replay", "replay_loss", "max_length", "packing"),
)


@with_config(ConfigDict(extra="allow"))
class RunRecord(TypedDict):
    """The part of `run.json` that eaft reads; `result` is there once the run is finished."""

    finished: bool
    environment: NotRequired[Environment]
    dataset: NotRequired[str | list[dict[str, Any]] | None]
    dataset_flags: NotRequired[dict[str, Any]]
    config: NotRequired[dict[str, Any]]
    result: NotRequired[dict[str, Any]]


@contextlib.contextmanager
def run_date(args: EAFTConfig, run_file: Path | None) -> Iterator[None]:
    """
    Let chat templates write one date for a whole run, and note it in its arguments.

    Args:
        run_file: `run.json` of a resumed run, which keeps its date.

    Raises:
        ConfigurationError: `template_date` is no date.
    """
    noted = shared(
        lambda: (
            (noted_date(run_file, "config") if run_file is not None else None) or template_today()
        )
    )
    args.template_date = args.template_date or noted
    with template_date(args.template_date):
        yield


def finished(args: EAFTConfig) -> str | None:
    """
    Return a message if the run to resume has already ended, so that nothing is left to do.

    It goes on if the flags ask for more steps or epochs than before, or for one of its earlier
    checkpoints.
    """
    folder, resume = Path(args.output_dir), str(args.resume_from_checkpoint or "false")
    file = folder / RUN_FILE
    if resume.lower() == "false" or not file.is_file() or not list(folder.glob("*.safetensors")):
        return None
    run = read_json(file, RunRecord, DELETE)
    if not run["finished"]:
        return None
    last = last_complete_checkpoint(folder)
    if resume.lower() != "true":
        own = Path(resume).resolve().parent == folder.resolve()
        if own and last is not None and Path(resume).resolve() != Path(last).resolve():
            return None
    before = [
        run["config"].get(name, getattr(EAFTConfig, name))
        for name in ("max_steps", "num_train_epochs")
    ]
    if (args.max_steps, args.num_train_epochs) != tuple(before):
        more_steps = args.max_steps > run["result"]["steps"]
        more_epochs = args.max_steps < 1 and (before[0] > 0 or args.num_train_epochs > before[1])
        if more_steps or more_epochs:
            return None
    return (
        f"output_dir={args.output_dir!r} holds this run, finished after {run['result']['steps']}"
        " steps; nothing was changed. To train further, raise max_steps or num_train_epochs; to"
        " train anew, choose another output_dir or delete this one."
    )


def find_checkpoint(args: EAFTConfig) -> str | None:
    """
    Return the checkpoint to resume from, or None for a fresh start in a folder that holds no other
    run.

    With `resume_from_checkpoint` true, a run that was killed before its first checkpoint, or never
    began, starts afresh: the same command can be repeated until it ends.

    Raises:
        ConfigurationError: the folder holds another run, there is nothing to resume from, or the
            run had other settings.
    """
    folder, resume = Path(args.output_dir), str(args.resume_from_checkpoint or "false")
    if resume.lower() not in ("true", "false"):
        if not is_complete(Path(resume)):
            raise ConfigurationError(
                f"resume_from_checkpoint={resume!r} is no complete checkpoint."
            )
        check_settings(args, Path(resume).parent)
        return resume
    if resume.lower() == "true":
        if checkpoint := last_complete_checkpoint(folder):
            check_settings(args, folder)
            return checkpoint
        run = folder / RUN_FILE
        if run.is_file() and not read_json(run, RunRecord, DELETE)["finished"]:
            return None
    patterns = [RUN_FILE, METRICS_FILE, "config.json", "adapter_config.json", "checkpoint-*"]
    if present := [path.name for pattern in patterns for path in folder.glob(pattern)]:
        way = "has no complete checkpoint" if resume.lower() == "true" else "holds another run"
        raise ConfigurationError(
            f"output_dir={args.output_dir!r} {way} ({present[0]}): choose another folder, delete"
            " this one, or go on with a run that was stopped by --resume_from_checkpoint true."
        )
    return None


def check_settings(args: EAFTConfig, folder: Path) -> None:
    """
    Check that a resumed run keeps the settings that it began with (`STAYS`).

    Args:
        folder: of the resumed run. Without a `run.json` that has a `config`, nothing is refused.

    Raises:
        ConfigurationError: one of them has changed.
    """
    file = folder / RUN_FILE
    if not file.is_file():
        return
    before = read_json(file, RunRecord, DELETE).get("config")
    if before is None:
        return
    after = changed_arguments(args)
    for name in STAYS:
        default = getattr(EAFTConfig, name, None)
        old, new = (settings.get(name, default) for settings in (before, after))
        if old != new:
            raise ConfigurationError(
                f"{name}={new!r}: the run that is resumed ({str(folder)!r}) was begun with {old!r},"
                f" and a run has one {name}. Give {old!r} again, or begin another run in another"
                " output_dir (it may take a checkpoint of this one as its model_name_or_path)."
            )


def last_complete_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that was written whole."""
    complete = [path for path in folder.glob("checkpoint-*") if is_complete(path)]
    return (
        str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None
    )


def is_complete(checkpoint: Path) -> bool:
    """
    Return whether a checkpoint was written whole: the trainer writes `trainer_state.json` last.

    Raises:
        ConfigurationError: that file is whole, and not a trainer's.
    """
    file = checkpoint / "trainer_state.json"
    try:
        state = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        raise ConfigurationError(
            f"{file} has no global_step, so it is no trainer's state: delete this checkpoint."
        )
    return True


def changed_arguments(args: EAFTConfig) -> dict[str, Any]:
    """Return the training arguments that differ from their defaults, as JSON values."""
    values, changed = args.to_dict(), {}
    for name in ("eos_token", "pad_token"):  # transformers masks every name that ends in _token
        values[name] = getattr(args, name)
    for field in dataclasses.fields(args):
        default = (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        if field.name in values and values[field.name] != default:
            changed[field.name] = values[field.name]
    return json.loads(json.dumps(changed, default=str))


class MetricsFile(TrainerCallback):
    """
    Appends every log of the trainer to a JSON Lines file; a resumed run drops the lines after its
    checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.first_step = path, 0
        self.loss: float | None = None  # of a run that had ended before

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lines up to the step training starts at."""
        self.first_step = state.global_step
        if state.is_world_process_zero:
            lines = self.path.read_text().split("\n") if self.path.exists() else []
            # The last piece is empty, or a line that a killed run did not finish
            logs = {line: json.loads(line) for line in lines[:-1]}
            self.loss = next(
                (log["train_loss"] for log in logs.values() if "train_loss" in log), None
            )
            # The final summary is written again
            kept = [
                line
                for line, log in logs.items()
                if log["step"] <= state.global_step and "train_loss" not in log
            ]
            staging = self.path.with_suffix(".tmp")
            staging.write_text("".join(line + "\n" for line in kept))
            os.replace(staging, self.path)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Append one line; if no step was trained, its summary has the loss of the run before."""
        if logs is not None and "train_loss" in logs and state.global_step == self.first_step:
            del logs["train_loss"]
            logs |= {} if self.loss is None else {"train_loss": self.loss}
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")
