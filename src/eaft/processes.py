"""
A lock that lets one process at a time write to an output folder, and an environment without the
launcher's variables.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from eaft.errors import ConfigurationError

LOCK_FILE = "_lock"  # `push_to_hub` does not upload names with an underscore
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
    Check that a folder can be made and written to, without making it.

    Args:
        field: the flag or key that names the folder.

    Raises:
        ConfigurationError: the folder or one of its parents is a file, or is not writable.
    """
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except (OSError, ValueError) as error:  # the name is too long or has a character of no path
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
    Make a folder and lock it while the block runs. The lock of a killed process is released.

    Args:
        begins_with: files and folders that a command writes first and can make again at no cost.
            They are deleted if the block ends with a `ConfigurationError`, the folder was empty
            before, and it holds nothing else.

    Raises:
        ConfigurationError: another process holds the lock.
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
        written = {path.name for path in folder.iterdir()} - {LOCK_FILE}
        if not held and written <= set(begins_with):
            for name in written:
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    finally:
        lock.release()


def without_launcher() -> dict[str, str]:
    """
    Return this process's environment without the launcher's variables.

    A process started with it runs alone and does not join this process's launch.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)}
