"""
Turn the name of a model (Hub id, folder, GGUF file) into a name that `from_pretrained` loads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.utils import chat_template_utils

from eaft.errors import ConfigurationError, EAFTError, disk_full, first_line
from eaft.files import read_json

# The version of our GGUF conversion. Folders of older versions are not used
CONVERSION = 4


@contextlib.contextmanager
def loading(message: str) -> Iterator[None]:
    """
    Turn any error inside `from_pretrained` into a one-line `ConfigurationError`.

    `from_pretrained` has no error class for this: each kind of file raises its own errors.

    Args:
        message: the field and its value. The error is added to it.

    Raises:
        ConfigurationError: an error was raised inside a library's `from_pretrained`. Other errors
            are raised unchanged.
    """
    try:
        yield
    except EAFTError:
        raise
    except Exception as error:
        if "from_pretrained" not in {
            frame.name for frame in traceback.extract_tb(error.__traceback__)
        }:
            raise
        raise ConfigurationError(
            f"{message} ({type(error).__name__}: {first_line(error)})"
        ) from error


def check_vocabulary(model: str, tokenizer: Any, rows: int) -> None:
    """
    Check that a model's embedding has a row for each token that its tokenizer produces from text,
    and for the end and padding tokens.

    Added tokens may lie beyond: Gemma 3's tokenizer has an image token that its text models lack.

    Args:
        model: the user's name of the model.
        rows: the number of rows of the embedding.

    Raises:
        ConfigurationError: a token has no row.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    own = {token: i for token, i in vocabulary.items() if token not in added}
    used = {tokenizer.eos_token_id, tokenizer.pad_token_id, *own.values()} - {None}
    if (largest := max(used, default=0)) >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ConfigurationError(
            f"{model} has an embedding of {rows} tokens, and its tokenizer makes one of id"
            f" {largest} ({token!r}): give the tokenizer that belongs to it."
        )


def check_finite(model: Any, name: str) -> None:
    """
    Check that no weight is NaN or infinite.

    Args:
        model: a torch module. Parameters on torch's meta device are skipped.
        name: the user's name of the model.

    Raises:
        ConfigurationError: a weight is NaN or infinite. The message names its parameter.
    """
    for parameter, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.is_meta and not weight.isfinite().all():
            raise ConfigurationError(
                f"{name} has weights that are NaN or infinite ({parameter}): take another"
                " checkpoint of it."
            )


def resolve_model(model: str, trust_remote_code: bool = False) -> str:
    """
    Return `model` if it is a folder or a Hub id with a readable config.

    A GGUF file is converted, and the folder of the converted model is returned.

    Raises:
        ConfigurationError: there is no such model, or it cannot be read.
    """
    if not model.strip() or "\0" in model:
        raise ConfigurationError(
            f"model_name_or_path={model!r}: give a Hub id, a folder or a .gguf file."
        )
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigurationError(f"model_name_or_path={model!r}: there is no such file.")
        return str(convert_gguf(path))
    if not path.is_dir() and (
        path.is_absolute() or model.startswith(("./", "../", "~")) or model.count("/") > 1
    ):
        raise ConfigurationError(f"model_name_or_path={model!r}: there is no such folder.")
    model = str(path) if path.is_dir() else model
    with loading(
        f"model_name_or_path={model!r} is not a readable model. Give a Hub id, a folder written by"
        " save_pretrained, or a .gguf file."
    ):
        AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):  # reads the header, and compares the file's length with it
                pass
        except SafetensorError as error:
            raise ConfigurationError(
                f"{file} is truncated or no safetensors ({error}): copy it again."
            ) from error
    return model


@dataclass(frozen=True)
class Adapter:
    """
    A saved PEFT adapter.

    Attributes:
        base_model: the folder or Hub id of the model that it changes.
        revision: the revision of the base model; None: none was recorded.
        config: everything in `adapter_config.json`.
    """

    base_model: str
    revision: str | None
    config: dict[str, Any]


def adapter_of(model: str) -> Adapter | None:
    """
    Return the PEFT adapter in a folder; None for any other folder or name.

    Raises:
        ConfigurationError: the configuration cannot be read, or does not name the base model.
    """
    file = Path(model, "adapter_config.json")
    if not file.is_file():
        return None
    config = read_json(file, dict[str, Any], "copy the adapter's folder again.")
    if not isinstance(config.get("base_model_name_or_path"), str):
        raise ConfigurationError(
            f"{file}: base_model_name_or_path is missing: write the base model's folder or Hub id."
        )
    return Adapter(config["base_model_name_or_path"], config.get("revision"), config)


def find_model(model: str, model_args: dict[str, Any]) -> str:
    """
    Return a PEFT adapter's folder unchanged, and any other model as `resolve_model` returns it.

    Raises:
        ConfigurationError: there is no such model, or PEFT is needed and not installed.
    """
    adapter, trusted = adapter_of(model), bool(model_args.get("trust_remote_code"))
    if adapter is None:
        return resolve_model(model, trusted)
    if find_spec("peft") is None:
        raise ConfigurationError(f"{model} holds a PEFT adapter: pip install 'eaft[peft]'.")
    from peft import PeftConfig

    with loading(f"{model}: adapter_config.json cannot be used."):
        PeftConfig.from_pretrained(model)
    try:
        resolve_model(adapter.base_model, trusted)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{model} is an adapter, and its base model is missing: {error}"
        ) from error
    return model


def source(model_args: dict[str, Any] | None) -> dict[str, Any]:
    """
    Return the part of lm-eval's `model_args` that `from_pretrained` needs too: where a model, its
    config and its tokenizer come from.
    """
    names = ("revision", "trust_remote_code", "subfolder")
    return {name: value for name, value in (model_args or {}).items() if name in names}


def context_length(model: str, model_args: dict[str, Any]) -> int:
    """
    Return the number of tokens in a model's context: as `model_args` or its configuration says,
    else lm-eval's default of 2048.
    """
    if "max_length" in model_args:
        return int(model_args["max_length"])
    config = text_config(model, model_args)
    lengths = [
        getattr(config, field, None)
        for field in ("n_positions", "max_position_embeddings", "n_ctx")
    ]
    return next((length for length in lengths if length), 2048)


def text_config(model: str, model_args: dict[str, Any]) -> Any:
    """Return the configuration of a model's language part; an adapter's is its base model's."""
    adapter = adapter_of(model)
    name = adapter.base_model if adapter else model
    return AutoConfig.from_pretrained(name, **source(model_args)).get_text_config()


def convert_gguf(path: Path) -> Path:
    """
    Dequantise a GGUF file into a float32 folder in the cache (`$HF_HOME/eaft`), once per content of
    the file.

    Every library can load a folder; a model loaded from GGUF keeps quantization marks that prevent
    saving it again.

    Raises:
        ConfigurationError: gguf is not installed, the file cannot be read, or the file has a part
            that we do not read (`eaft.gguf_model`).
    """
    if find_spec("gguf") is None:
        raise ConfigurationError(
            f"Reading {path} needs the gguf package: pip install 'eaft[gguf]'."
        )
    from eaft.gguf_model import load_gguf

    folder = conversion_folder(path)
    if folder.is_dir():
        return folder
    try:
        model, tokenizer = load_gguf(path)
    except EAFTError:
        raise
    except Exception as error:  # a damaged file raises many kinds of errors
        if disk_full(error) is not None:
            raise
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
            if not folder.is_dir():  # else another process converted it first
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def conversion_folder(path: Path) -> Path:
    """Return the folder in the cache for a GGUF file's content; it may not exist yet."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return Path(HF_HOME) / "eaft" / f"{path.stem}-{digest.hexdigest()[:12]}-{CONVERSION}"


def converted_models() -> list[Path]:
    """
    Return the folders of converted GGUF files, and unfinished folders of killed processes.
    """
    names = re.compile(r".+-[0-9a-f]{12}(-\d+)?(\.tmp\d+)?")
    return [
        folder
        for folder in sorted((Path(HF_HOME) / "eaft").glob("*/"))
        if names.fullmatch(folder.name)
    ]


def vocabulary_size(tokenizer: Any) -> int:
    """
    Return how many rows a head needs for a tokenizer's ids.

    The ids may have gaps, so this is not `len(tokenizer)`, which counts the tokens.
    """
    return int(max(tokenizer.get_vocab().values())) + 1


def template_today() -> str:
    """Return the date that chat templates write at this moment, as 2026-11-29."""
    return chat_template_utils.datetime.now().date().isoformat()


def noted_date(file: Path, *keys: str) -> str | None:
    """
    Return the `template_date` under these keys of a run's file; None if there is none.

    A file that cannot be read gives None too: the code that resumes the run reports it.
    """
    try:
        content = json.loads(file.read_text())
        for key in keys:
            content = content[key]
        return content["template_date"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def template_date(day: str) -> Iterator[None]:
    """
    Let chat templates write this date, at midnight, in place of the present time.

    The clock that transformers' `strftime_now` reads is replaced while the block runs.

    Raises:
        ConfigurationError: the text is not a date, as 2026-11-29.
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
    Return the date that a text such as 2026-11-29 names.

    Raises:
        ConfigurationError: the text is not a date.
    """
    try:
        return date.fromisoformat(day)
    except ValueError as error:
        raise ConfigurationError(
            f"template_date={day!r}: expected a date, as 2026-11-29."
        ) from error
