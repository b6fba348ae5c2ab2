"""
Runs `eaft train` in a separate process, so that its peak memory is measured alone, and lists the
checkpoints that it left.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from eaft.errors import STARTED
from eaft.files import read_json
from eaft.processes import without_launcher
from eaft.training.arguments import parse
from eaft.training.run_folder import RUN_FILE, RunRecord

# With another version of one of them, a run is another run
TRAINS = ("eaft", "torch", "transformers", "trl", "accelerate", "peft", "datasets")
# Flags that may name a file
LOCAL = (
    "dataset_name",
    "exclude_examples",
    "replay_prompts",
    "chat_template_path",
    "deepspeed",
    "fsdp_config",
)
LIBC = ctypes.CDLL(None)  # loaded here, since little is safe between fork and exec


@dataclass(frozen=True)
class Checkpoint:
    """
    One point of a run's path.

    Attributes:
        step, epoch: after how much training.
        folder: where the model is, if it has not been deleted.
    """

    step: int
    epoch: float
    folder: Path


def parse_flags(flags: dict[str, Any]) -> list[Any]:
    """
    Return the four arguments of `eaft.training.train.train` that flags stand for.

    Raises:
        ConfigurationError: an unknown flag, or a value of the wrong type.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(flags, file)
        file.flush()
        (*configs, _), _, _ = parse(["--config", file.name])
    return configs


def local_files(flags: dict[str, Any]) -> dict[str, Path]:
    """
    Return the file or folder that each flag names and training reads; for `gate`, the module of a
    gate in a user's own code.
    """
    files = {
        name: Path(flags[name]).expanduser() for name in LOCAL if isinstance(flags.get(name), str)
    }
    if (
        ":" in str(flags.get("gate", ""))
        and (spec := find_spec(flags["gate"].partition(":")[0]))
        and spec.origin
    ):
        files["gate"] = Path(spec.origin)
    return {name: path for name, path in files.items() if path.exists()}


def file_digest(path: Path, known: dict[Path, str]) -> str:
    """
    Return a digest of a file, or of all files of a folder. Each path is read once: `known` keeps
    its digest.
    """
    if path not in known:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        sha = hashlib.sha256()
        for file in files:
            sha.update(file.read_bytes())
        known[path] = sha.hexdigest()
    return known[path]


def train_apart(config: Path) -> int:
    """Run `eaft train` with a YAML file in a run's folder; see `run_train`."""
    return run_train(["--config", str(config)], config.parent)


def run_train(arguments: list[str], folder: Path) -> int:
    """
    Run `eaft train` in a process that is part of no launch, and return its exit code.

    Args:
        folder: the run's; trackers name the run by it.
    """
    command = [sys.executable, "-m", "eaft", "train", *arguments]
    return subprocess.run(
        command, env=tracker_environment(folder), preexec_fn=end_with_parent
    ).returncode


def tracker_environment(folder: Path) -> dict[str, str]:
    """
    Return the environment variables of the training process.

    Weights & Biases groups runs by the folder above, TensorBoard names a run by its folder, and a
    full disk has an exit code of its own (`STARTED`).
    """
    variables = without_launcher()
    variables.setdefault("WANDB_RUN_GROUP", folder.resolve().parent.name)
    # TensorBoard draws runs that share a folder as one curve
    boards = variables.get("TENSORBOARD_LOGGING_DIR", folder.parent)
    variables[STARTED] = "1"
    return {**variables, "TENSORBOARD_LOGGING_DIR": str(Path(boards) / folder.name)}


def end_with_parent() -> None:
    """Have Linux end this process when its parent is killed, so that no training goes on unseen."""
    if sys.platform == "linux":
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def finished(folder: Path) -> RunRecord | None:
    """Return a run's `run.json` if it has been trained to its end."""
    file = folder / RUN_FILE
    if not file.is_file():
        return None
    record: RunRecord = read_json(
        file, RunRecord, "delete this run's folder, and it is trained again."
    )
    return record if record["finished"] else None


def checkpoints(folder: Path) -> list[Checkpoint]:
    """
    Return the checkpoints of a finished run that still exist, in order of steps; the last is the
    run's final model.
    """
    trained = finished(folder)
    assert trained is not None
    last = trained["result"]["steps"]
    by_step = {}
    for file in folder.glob("checkpoint-*/trainer_state.json"):
        state = json.loads(file.read_text())
        step = state["global_step"]
        by_step[step] = Checkpoint(step, state["epoch"], file.parent)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epoch = max(line.get("epoch", 0) for line in logged)
    epoch = by_step[last].epoch if last in by_step else epoch
    by_step[last] = Checkpoint(last, epoch, folder)
    return [by_step[step] for step in sorted(by_step)]
