"""
Rows of messages and the chat template that renders them, as TRL does.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from trl import is_conversational

from eaft.errors import ConfigurationError, first_line
from eaft.evaluation.model_settings import load_tokenizer
from eaft.gguf_model import load_gguf_tokenizer
from eaft.models import conversion_folder
from eaft.training.config import EAFTConfig
from eaft.training.trl_internals import get_training_chat_template, has_generation_markers

Row = dict[str, Any]

COLUMNS = ("messages", "prompt", "completion")  # the columns that hold messages


def row_messages(row: Row) -> list[Row]:
    """Return all messages of a conversational row, in order."""
    return [message for column in COLUMNS for message in row.get(column) or []]


def template_kwargs(row: Row) -> Row:
    """Return the keyword arguments that TRL gives to the chat template, beside the messages."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}


def render(tokenizer: Any, row: Row, template: str | None = None) -> tuple[str, str | None]:
    """
    Return the text of a conversational row, as TRL renders it, and the text of its prompt, if it
    has one.
    """
    settings = {"tokenize": False, "chat_template": template, **template_kwargs(row)}
    whole = tokenizer.apply_chat_template(row_messages(row), **settings)
    if "prompt" not in row:
        return whole, None
    return whole, tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, **settings
    )


def training_template(tokenizer: Any, args: EAFTConfig) -> tuple[str | None, bool]:
    """
    Return the template that TRL trains with (None: the tokenizer's own), and whether it marks the
    assistant's tokens.

    With `assistant_only_loss`, TRL replaces a template without `{% generation %}` marks by its own,
    if it knows the template.
    """
    if has_generation_markers(tokenizer.chat_template):
        return None, True
    if not args.assistant_only_loss:
        return None, False
    try:
        return get_training_chat_template(tokenizer), True
    # TRL does not know this template, or the template raises on the messages that TRL tries
    except Exception:
        return None, False


def find_template_tokenizer(model: str, args: EAFTConfig, revision: str | None) -> Any:
    """
    Return the tokenizer with the chat template of the training, without converting a GGUF file.

    Return None if it cannot be loaded: loading the model will say why.
    """
    path = Path(model).expanduser()
    source = {"revision": revision, "trust_remote_code": args.trust_remote_code}
    try:
        if path.suffix == ".gguf":
            folder = conversion_folder(path)  # if it exists, it spares ten seconds of parsing
            tokenizer = (
                load_tokenizer(str(folder), source)
                if folder.is_dir()
                else load_gguf_tokenizer(path)
            )
        else:
            tokenizer = load_tokenizer(str(path) if path.is_dir() else model, source)
    except Exception:  # transformers raises anything for a damaged file
        return None
    return with_template(tokenizer, args)


def with_template(tokenizer: Any, args: EAFTConfig) -> Any:
    """
    Return the tokenizer, or a copy with the template of `chat_template_path`, as TRL will set it.

    Raises:
        ConfigurationError: `chat_template_path` cannot be read.
    """
    if (path := args.chat_template_path) is None:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    try:
        if Path(path).is_file() and path.endswith((".jinja", ".j2")):
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        else:
            tokenizer.chat_template = AutoTokenizer.from_pretrained(path).chat_template
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"chat_template_path={path!r} cannot be read ({first_line(error)}): give a .jinja file,"
            " or the folder or Hub id of a model."
        ) from error
    return tokenizer


def conversational(rows: Iterable[Row]) -> bool:
    """Return whether the first row has messages and is not tokenized yet."""
    first = next(iter(rows), {})
    return "input_ids" not in first and any(
        isinstance(first.get(column), list) and is_conversational({column: first[column]})
        for column in COLUMNS
    )


def split_text(rows: Iterable[Row]) -> bool:
    """Return whether the first row has a prompt and a completion of plain text."""
    first = next(iter(rows), {})
    return "input_ids" not in first and all(
        isinstance(first.get(name), str) for name in ("prompt", "completion")
    )


def tool_calls(messages: Iterable[Row]) -> Iterator[Row]:
    """Yield the name and arguments of each tool call."""
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else []:
            if isinstance(call, dict) and isinstance(function := call.get("function", call), dict):
                yield function


def without_nulls(value: Any) -> Any:
    """
    Return a value of JSON without the keys whose value is null: a table sets keys that a row lacks
    to null.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
