"""From what a user calls a model (Hub id, folder, GGUF file) to something `from_pretrained` loads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from datetime import date, datetime, time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from transformers import AutoConfig
from transformers.utils import chat_template_utils

from eaft.errors import ConfigurationError, EAFTError, first_line

CONVERSION = 3  # counts the ways in which GGUF files were converted: the folders of older ones are not used


def resolve_model(model: str, trust_remote_code: bool = False) -> str:
    """
    Return `model` if it is a folder or Hub id with a readable config, or the folder a GGUF file is converted to.

    Raises:
        ConfigurationError: there is no such model, or it cannot be read.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigurationError(f"model_name_or_path={model!r}: there is no such file.")
        return str(convert_gguf(path))
    if not path.is_dir() and (path.is_absolute() or model.startswith(("./", "../", "~")) or model.count("/") > 1):
        raise ConfigurationError(f"model_name_or_path={model!r}: there is no such folder.")
    model = str(path) if path.is_dir() else model
    try:
        AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"model_name_or_path={model!r} is not a readable model. Give a Hub id, a folder written by "
            f"save_pretrained, or a .gguf file. ({first_line(error)})"
        ) from error
    return model


def convert_gguf(path: Path) -> Path:
    """
    Dequantise a GGUF file into a float32 folder in the cache (`$HF_HOME/eaft`), once per content of the file.

    Every library can load a folder; a model loaded from GGUF keeps quantization marks that prevent saving it again.

    Raises:
        ConfigurationError: the file cannot be read, or not whole (`eaft.gguf_model`); or gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise ConfigurationError(f"Reading {path} needs the gguf package: pip install 'eaft[gguf]'.")
    from eaft.gguf_model import load_gguf

    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    folder = Path(HF_HOME) / "eaft" / f"{path.stem}-{digest.hexdigest()[:12]}-{CONVERSION}"
    if folder.is_dir():
        return folder
    try:
        model, tokenizer = load_gguf(path)
    except EAFTError:
        raise
    except Exception as error:  # the reader has no error of its own: a damaged file fails in many ways
        raise ConfigurationError(
            f"model_name_or_path={str(path)!r} is not a readable GGUF file. ({first_line(error)})"
        ) from error
    staging = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        try:
            os.replace(staging, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def vocabulary_size(tokenizer: Any) -> int:
    """Return how many rows a head needs for a tokenizer's ids, which may have gaps: `len(tokenizer)` counts tokens."""
    return int(max(tokenizer.get_vocab().values())) + 1


def template_today() -> str:
    """Return the date that chat templates write now, as 2026-11-29."""
    return chat_template_utils.datetime.now().date().isoformat()


def noted_date(file: Path, *keys: str) -> str | None:
    """Return the `template_date` that a file of a run notes under these keys; None if it notes none."""
    try:
        found = json.loads(file.read_text())
        for key in keys:
            found = found[key]
        return found["template_date"]
    except (OSError, ValueError, KeyError, TypeError):  # who goes on with the run says what is wrong with its file
        return None


@contextlib.contextmanager
def template_date(day: str) -> Iterator[None]:
    """
    Let chat templates write this date, at midnight, as if it were now: transformers' `strftime_now` reads the clock.

    Raises:
        ConfigurationError: no date, as 2026-11-29.
    """
    now = datetime.combine(read_date(day), time())

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return now

    before = chat_template_utils.datetime
    chat_template_utils.datetime = Fixed
    try:
        yield
    finally:
        chat_template_utils.datetime = before


def read_date(day: str) -> date:
    """
    Return a date of its text.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        return date.fromisoformat(day)
    except ValueError as error:
        raise ConfigurationError(f"template_date={day!r}: expected a date, as 2026-11-29.") from error
