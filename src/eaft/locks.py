"""One process at a time in an output folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from eaft.errors import ConfigurationError

LOCK_FILE = "_lock"  # with an underscore: `push_to_hub` leaves such files out


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
