"""
One process at a time in an output folder; a process of its own, though a launcher started this one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from eaft.errors import ConfigurationError

LOCK_FILE = "_lock"  # with an underscore: `push_to_hub` leaves such files out
# What torchrun and accelerate set for the processes they start
LAUNCHER = (
    "ACCELERATE_",
    "FSDP_",
    "GROUP_",
    "LOCAL_",
    "MASTER_",
    "RANK",
    "ROLE_",
    "TORCHELASTIC_",
    "WORLD_SIZE",
)


def check_place(folder: Path, field: str) -> None:
    """
    Check that a folder can be made and written to; nothing is made.

    Args:
        field: that the user named it by.

    Raises:
        ConfigurationError: a file is in its place, or above it, or the user may not write there.
    """
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except (OSError, ValueError) as error:  # a name that is too long, or holds what no path may
        raise ConfigurationError(
            f"{field}={str(folder)!r} cannot be a folder's name. ({error})"
        ) from error
    if not there.is_dir():
        raise ConfigurationError(
            f"{field}={str(folder)!r}: {str(there)!r} is a file: choose another folder."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"{field}={str(folder)!r}: {str(there)!r} cannot be written to: choose another folder."
        )


@contextlib.contextmanager
def locked(folder: Path, begins_with: tuple[str, ...] = ()) -> Iterator[None]:
    """
    Make a folder, and hold it while the block runs; a killed process holds nothing.

    Args:
        begins_with: files and folders that a command writes first, and can make again at no cost.
            If the block ends with a `ConfigurationError`, and a folder that was empty holds nothing
            else, they are deleted.

    Raises:
        ConfigurationError: another process has it.
    """
    check_place(folder, "output folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigurationError(
            f"{str(folder)!r} is in use: another eaft process writes there. Wait for it, or choose"
            " another folder."
        ) from error
    held = {path.name for path in folder.iterdir()} - {LOCK_FILE}
    try:
        yield
    except ConfigurationError:
        found = {path.name for path in folder.iterdir()} - {LOCK_FILE}
        if not held and found <= set(begins_with):
            for name in found:
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    finally:
        lock.release()


def without_launcher() -> dict[str, str]:
    """
    Return this process's environment for one that is to run by itself, outside the launch that this
    one is of.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)}
