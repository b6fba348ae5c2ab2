"""
What has been measured is kept, under a digest of everything it depends on: nothing is measured
twice, nothing is stale.

`eaft eval`, `eaft compare` and training share one folder; `eaft cache` says what it holds, and
clears it.
"""

from __future__ import annotations

import argparse
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
from eaft.text import visible

DESCRIPTION = """
What `eaft eval`, `eaft compare` and training have measured is kept, so that it is measured once:
items, answers and probabilities, under a digest of weights, tokenizer, task, data, protocol and
versions. So are the models that GGUF files were converted to. This lists both, or deletes them.

  eaft cache            what is kept, by model, with its size
  eaft cache --clear    delete it all (what is deleted is measured, or converted, again when it is needed)

The folder of measurements is $EAFT_CACHE, by default $HF_HOME/eaft/measured; of models
$HF_HOME/eaft.
"""  # noqa: E501
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
        Lend a folder to write a measurement into; it is kept, whole, when the block ends without an
        exception.

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
        Return the measurements' folders, and those that a killed process left: the user may keep
        more beside.
        """
        names = re.compile(rf"[0-9a-f]{{64}}|{STAGING}.+")
        return [folder for folder in sorted(self.folder.glob("*/")) if names.fullmatch(folder.name)]

    def sizes(self) -> dict[str, int]:
        """
        Return how many bytes are kept of each model, and as `unfinished` of what a killed process
        left.
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


def main(argv: list[str]) -> None:
    """List what is kept, or delete it."""
    parser = argparse.ArgumentParser(
        prog="eaft cache",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clear", action="store_true", help="delete everything that is kept")
    clear = parser.parse_args(argv).clear
    store = Store()
    sizes, converted = store.sizes(), {folder: size_of(folder) for folder in converted_models()}
    if clear:
        store.clear()
        for folder in converted:
            shutil.rmtree(folder, ignore_errors=True)
    verb = "deleted " if clear else ""
    models = {f"{folder.name} (converted from GGUF)": size for folder, size in converted.items()}
    for what, found, place in (
        ("measurements", sizes, store.folder),
        ("converted models", models, Path(HF_HOME) / "eaft"),
    ):
        for name, size in sorted(found.items(), key=lambda entry: -entry[1]):
            print(visible(f"{size / 2**20:10.1f} MiB  {name}"))
        print(f"{verb}{sum(found.values()) / 2**20:.1f} MiB of {what} in {place}")


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
