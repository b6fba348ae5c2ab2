"""
The folder of a training run: `run.json`, `metrics.jsonl`, checkpoints, and where a run goes on.
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
from eaft.training.config import EAFTConfig

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
TUNED_RUN = Path("work") / "run"  # the run, in the folder of `eaft tune`
DELETE = "delete the folder, or choose another output_dir."
# What stays the same when a run goes on: the checkpoint's optimizer and schedule keep the first of
# them whatever is given (findings/trainer_resume_settings.sh), and `run.json` has one value of each
STAYS = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("gate", "gate_alpha", "gate_entropy", "gate_top_k", "gate_kwargs"),
    *("seed", "data_seed", "replay", "replay_loss", "max_length", "packing"),
)


@with_config(ConfigDict(extra="allow"))
class RunRecord(TypedDict):
    """What is read again of `run.json`; `result` is there once the run is finished."""

    finished: bool
    environment: NotRequired[dict[str, Any]]
    dataset: NotRequired[str | list[dict[str, Any]] | None]
    dataset_flags: NotRequired[dict[str, Any]]
    config: NotRequired[dict[str, Any]]
    result: NotRequired[dict[str, Any]]


@contextlib.contextmanager
def run_date(args: EAFTConfig, run_file: Path | None) -> Iterator[None]:
    """
    Let chat templates write one date for a whole run, and note it in its arguments.

    Args:
        run_file: `run.json` of a run that is gone on with, whose date stays.

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
    Return what to say of a run that is to be resumed and is at its end already, so that nothing is
    to be done.

    It goes on if more steps or epochs are asked for than before, or an earlier checkpoint of its
    own.
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

    With `resume_from_checkpoint` true a run that was killed before its first checkpoint, or was
    never begun, starts
    afresh: the same command can be given again until it ends.

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
    held = [RUN_FILE, METRICS_FILE, "config.json", "adapter_config.json", "checkpoint-*"]
    if found := [path.name for pattern in held for path in folder.glob(pattern)]:
        way = "has no complete checkpoint" if resume.lower() == "true" else "holds another run"
        raise ConfigurationError(
            f"output_dir={args.output_dir!r} {way} ({found[0]}): choose another folder, delete this"
            " one, or go on with a run that was stopped by --resume_from_checkpoint true."
        )
    return None


def check_settings(args: EAFTConfig, folder: Path) -> None:
    """
    Check that a run goes on with the settings that it was begun with (`STAYS`).

    Args:
        folder: of the run that is resumed. Without a `run.json` that has its `config`, nothing is
            known of its settings, and nothing is refused.

    Raises:
        ConfigurationError: one of them is another now.
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
    Appends every log of the trainer to a JSON Lines file; a resumed run drops what lies after its
    checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.first_step = path, 0
        self.loss: float | None = None  # of a run that had come to its end before

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lines up to the step training starts at."""
        self.first_step = state.global_step
        if state.is_world_process_zero:
            lines = self.path.read_text().split("\n") if self.path.exists() else []
            # What follows the last line's end is empty, or what a killed run did not get written
            logs = {line: json.loads(line) for line in lines[:-1]}
            self.loss = next(
                (log["train_loss"] for log in logs.values() if "train_loss" in log), None
            )
            # The end's summary is written again
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
        """Append one line; a summary of no steps has the loss of those before, if it was logged."""
        if logs is not None and "train_loss" in logs and state.global_step == self.first_step:
            del logs["train_loss"]
            logs |= {} if self.loss is None else {"train_loss": self.loss}
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")
