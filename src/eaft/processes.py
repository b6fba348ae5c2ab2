"""One process at a time in an output folder; a process of its own, though a launcher started this one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from eaft.errors import ConfigurationError

LOCK_FILE = "_lock"  # with an underscore: `push_to_hub` leaves such files out
# What torchrun and accelerate set for the processes they start
LAUNCHER = ("ACCELERATE_", "FSDP_", "GROUP_", "LOCAL_", "MASTER_", "RANK", "ROLE_", "TORCHELASTIC_", "WORLD_SIZE")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Make a folder, and hold it while the block runs; a killed process holds nothing.

    Raises:
        ConfigurationError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigurationError(
            f"{str(folder)!r} is in use: another eaft process writes there. Wait for it, or choose another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def without_launcher() -> dict[str, str]:
    """Return this process's environment for one that is to run by itself, outside the launch that this one is of."""
    return {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)}
