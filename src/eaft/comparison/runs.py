"""
Runs on disk: trained in separate processes, resumed, and marked so that none is taken for another.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from eaft.comparison.recipe import Run
from eaft.errors import ConfigurationError
from eaft.evaluation.launch import processes, shared
from eaft.files import read_json
from eaft.processes import LOCK_FILE, locked
from eaft.provenance import write_json
from eaft.text import visible
from eaft.training.apart import checkpoints, finished, train_apart
from eaft.training.run_folder import last_complete_checkpoint

MARK = "compare.json"  # in every folder that compare made
WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "model.safetensors.index.json")
POLL = 0.5  # seconds


def check_folder(folder: Path, identity: Any) -> None:
    """
    Refuse a folder that compare did not make, or made for something else.

    Raises:
        ConfigurationError: it is such a folder; the message names what changed.
    """
    if not folder.exists():
        return
    mark = folder / MARK
    if not mark.is_file():
        made_here = {LOCK_FILE, f"{MARK}.tmp"}
        if not folder.is_dir() or any(path.name not in made_here for path in folder.iterdir()):
            raise ConfigurationError(
                f"output_dir: {str(folder)!r} was not made by eaft compare, which neither takes it"
                " over nor deletes it: choose another output_dir, or move it away."
            )
        return
    old = read_json(mark, dict[str, Any], "delete this folder, or choose another output_dir.")
    if old != identity:
        parts = [(part, old.get(part), identity.get(part)) for part in {**old, **identity}]
        changed = [
            name
            for part, before, after in parts
            for name in (
                [key for key in {**before, **after} if before.get(key) != after.get(key)]
                if isinstance(before, dict) and isinstance(after, dict)
                else [part] * (before != after)
            )
        ]
        raise ConfigurationError(
            f"output_dir: {str(folder)!r} holds another run: {', '.join(changed)} changed since."
            " Choose another output_dir, or delete this folder."
        )


def claim(folder: Path, identity: Any) -> None:
    """Make a folder and mark it as compare's; see `check_folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    check_folder(folder, identity)
    write_json(folder / MARK, identity)


def train_run(run: Run) -> str | None:
    """
    Train in a separate process, so that its peak memory is measured alone; reuse a finished run,
    resume an interrupted one.

    Returns:
        None, or what went wrong, also where the folder cannot be used: other processes wait for an
        answer.
    """
    if finished(run.folder):
        print(visible(f"{run.folder}: already trained"))
        return None
    try:
        config = prepare(run)
    except ConfigurationError as error:
        return str(error)
    code = train_apart(config)
    if code == errno.ENOSPC:
        return (
            f"{os.strerror(code)}: free some space (`eaft cache` says what is kept), and give the"
            " same command again to go on."
        )
    return f"training ended with exit code {code}; its message is in the output" if code else None


def prepare(run: Run) -> Path:
    """
    Make a run's folder ready to be trained in, and return the configuration it is trained with.

    Raises:
        ConfigurationError: the folder is in use, or not ours.
    """
    with locked(run.folder):  # a process that outlived its parent may still train here
        claim(run.folder, run.identity)
        flags = {**tracker_flags(run.folder), **run.flags}
        # A checkpoint without the optimizer's state does not go on where it stopped
        checkpoint = None if flags.get("save_only_model") else last_complete_checkpoint(run.folder)
        if checkpoint is not None:
            flags["resume_from_checkpoint"] = checkpoint
        else:
            empty(run.folder)
        config = run.folder / "train.yaml"
        config.write_text(yaml.safe_dump(flags, sort_keys=False))
    print(
        visible(f"{run.folder}: training" + (f" from {checkpoint}" if checkpoint else "")),
        flush=True,
    )
    return config


def tracker_flags(folder: Path) -> dict[str, str]:
    """
    Return the flags by which trackers name a run as its folder; trackio's groups are projects.
    """
    return {
        "run_name": os.environ.get("WANDB_NAME", folder.name),
        "project": folder.resolve().parent.name,
    }


def empty(folder: Path) -> None:
    """Delete the content of a folder of ours, except its mark and its lock."""
    for path in folder.iterdir():
        if path.name not in (MARK, LOCK_FILE):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


class FirstAlone:
    """
    Lets the first process of a launch work alone for hours. The others wait for a file, because a
    collective call would time out.

    Args:
        folder: all processes can read it.
    """

    def __init__(self, folder: Path) -> None:
        self.prefix = (  # of this launch, not of one before
            f"_done-{shared(lambda: uuid.uuid4().hex)}"
        )
        self.folder, self.count, self.state = folder, 0, processes()

    def __call__(self, work: Callable[[], Any]) -> Any:
        """Return on every process what the first one's work returns; it must be JSON."""
        self.count += 1
        file = self.folder / f"{self.prefix}-{self.count}.json"
        if self.state.is_main_process:
            done = work()
            if self.state.num_processes > 1:
                write_json(file, done)
            return done
        while not file.is_file():
            time.sleep(POLL)
        return json.loads(file.read_text())

    def close(self) -> None:
        """Delete the files, once all have read them."""
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            for file in self.folder.glob("_done-*"):
                file.unlink()


def delete_models(run: Run, keep: set[int]) -> None:
    """
    Delete a finished run's checkpoints except after the steps in `keep`. The model of the last step
    is the run's own.
    """
    last = checkpoints(run.folder)[-1].step
    for folder in run.folder.glob("checkpoint-*"):
        step = int(folder.name.rpartition("-")[2])
        if step not in keep or step == last:
            folder.replace(
                run.folder / f"_deleted-{step}"
            )  # first out of the way, whole: this may be killed
    if last not in keep:
        for pattern in WEIGHTS:
            for weights in run.folder.glob(pattern):
                weights.unlink()
    for folder in run.folder.glob("_deleted-*"):
        shutil.rmtree(folder)
