"""
What has been measured is kept, under a digest of everything it depends on: nothing is measured
twice, nothing is stale.

`eaft eval`, `eaft compare` and training share one folder; `eaft cache` says what it holds, and
clears it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from eaft.errors import ConfigurationError
from eaft.evaluation.identity import digest
from eaft.files import read_json
from eaft.models import converted_models
from eaft.provenance import write_json

ABOUT_FILE = "about.json"
STAGING = "writing-"  # begins the name of a folder that is not whole yet


@with_config(ConfigDict(extra="allow"))
class About(TypedDict):
    """The part of `about.json` that is read."""

    model: str


class Store:
    """
    A folder with one subfolder for each measurement, named by the digest of its identity.

    Args:
        folder: by default `$EAFT_CACHE`, or `measured` in eaft's cache.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(
            os.environ.get("EAFT_CACHE") or Path(HF_HOME) / "eaft" / "measured"
        )

    def find(self, identity: dict[str, Any]) -> Path | None:
        """Return the folder of a measurement, or None if there is none of this identity."""
        folder = self.folder / digest(identity)
        return folder if folder.is_dir() else None

    @contextlib.contextmanager
    def write(self, identity: dict[str, Any], model: str) -> Iterator[Path]:
        """
        Give a folder to write a measurement into; it is kept as a whole when the block ends without
        an exception.

        Args:
            model: what the user calls it, for `eaft cache`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=self.folder))
        try:
            yield staging
            write_json(staging / ABOUT_FILE, {"model": model, "identity": identity})
            # Another process may have been first; both measured the same
            with contextlib.suppress(OSError):
                os.replace(staging, self.folder / digest(identity))
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def entries(self) -> list[Path]:
        """
        Return the folders of measurements, also unfinished ones of killed processes. The user may
        keep other folders beside them.
        """
        names = re.compile(rf"[0-9a-f]{{64}}|{STAGING}.+")
        return [folder for folder in sorted(self.folder.glob("*/")) if names.fullmatch(folder.name)]

    def sizes(self) -> dict[str, int]:
        """
        Return how many bytes are kept for each model; `unfinished` counts the folders of killed
        processes.
        """
        sizes: dict[str, int] = defaultdict(int)
        for folder in self.entries():
            about = folder / ABOUT_FILE
            name = "unfinished"
            if about.is_file():
                try:
                    name = read_json(about, About, "")["model"]
                except ConfigurationError:
                    name = "unreadable"
            sizes[name] += size_of(folder)
        return sizes

    def clear(self) -> None:
        """Delete all measurements, and the folder if that leaves it empty."""
        for folder in self.entries():
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def list_kept(clear: bool = False) -> str:
    """
    Return a line for each model with kept measurements and each converted model: its size and name.

    Args:
        clear: delete them all.
    """
    store = Store()
    measured = store.sizes()
    folders = converted_models()
    converted = {f"{folder.name} (converted from GGUF)": size_of(folder) for folder in folders}
    if clear:
        store.clear()
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    verb, lines = "deleted " if clear else "", []
    for what, sizes, place in (
        ("measurements", measured, store.folder),
        ("converted models", converted, Path(HF_HOME) / "eaft"),
    ):
        for name, size in sorted(sizes.items(), key=lambda entry: -entry[1]):
            lines.append(f"{size / 2**20:10.1f} MiB  {name}")
        lines.append(f"{verb}{sum(sizes.values()) / 2**20:.1f} MiB of {what} in {place}")
    return "\n".join(lines)


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
