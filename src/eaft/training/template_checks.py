"""Render rows before a model is loaded: errors by row, and the findings."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from tqdm.auto import tqdm
from trl import ModelConfig

from eaft.errors import ConfigurationError, first_line
from eaft.evaluation.model_settings import end_tokens, generation_config
from eaft.training.config import EAFTConfig
from eaft.training.template_findings import Finding, Findings
from eaft.training.templates import (
    COLUMNS,
    Row,
    conversational,
    find_template_tokenizer,
    render,
    row_messages,
    split_text,
    template_kwargs,
    tool_calls,
    training_template,
    without_nulls,
)

STREAM_ROWS = 1000  # how many rows of a stream are rendered beforehand
TOKENISED_ROWS = 1000  # tokens are checked in so many rows, spread over the data set


def filled_columns(rows: Any) -> set[str]:
    """
    Return which of `messages` and `tools` are typed columns, where missing keys are filled with
    null.
    """
    columns = {name: str(kind) for name, kind in (getattr(rows, "features", None) or {}).items()}
    filled = set()
    if any("'arguments': {" in columns.get(name, "") for name in COLUMNS):
        filled.add("messages")
    if "{" in columns.get("tools", ""):
        filled.add("tools")
    return filled


def end_texts(model: str, tokenizer: Any, args: EAFTConfig, revision: str | None) -> set[str]:
    """Return the tokens at which the tuned model will stop."""
    ends = {tokenizer.eos_token, args.eos_token}
    if Path(model).suffix != ".gguf":
        source = {"revision": revision, "trust_remote_code": args.trust_remote_code}
        try:
            ids = end_tokens(
                generation_config(
                    str(Path(model).expanduser()) if Path(model).is_dir() else model, source
                )
            )
        except (OSError, ValueError):  # loading the model will say why
            ids = []
        ends |= set(tokenizer.convert_ids_to_tokens(ids))
    return {token for token in ends if token}


def check_templates(
    rows: dict[str, Iterable[Row] | None],
    args: EAFTConfig,
    model_args: ModelConfig,
    numbers: Sequence[int] | None = None,
) -> dict[str, list[Finding]]:
    """
    Render every conversational row, as training will, before a model is loaded or converted.

    Args:
        rows: flag that names the data -> its rows. Only the first 1000 rows of a stream are
            rendered.
        args: the flags of training.
        model_args: the flags of the model.
        numbers: of the rows of the first flag in the data that they were chosen from; None: 0, 1,
            2, ...

    Returns:
        flag -> findings, for data with messages, or with prompts and completions.

    Raises:
        ConfigurationError: the template cannot be used, or raises on a row.
    """
    model, revision = str(model_args.model_name_or_path), model_args.model_revision
    checked = {
        flag: data
        for flag, data in rows.items()
        if data is not None and (conversational(data) or split_text(data))
    }
    tokenizer = find_template_tokenizer(model, args, revision) if checked else None
    if tokenizer is None:
        return {}
    ends = end_texts(model, tokenizer, args, revision)
    first = next(iter(rows))
    return {
        flag: check_rows(tokenizer, data, args, flag, ends, numbers if flag == first else None)
        for flag, data in checked.items()
    }


def told(findings: dict[str, list[Finding]]) -> str:
    """Return the findings of `check_templates` as lines, with the first rows of each."""
    lines = []
    for where, of_data in findings.items():
        for finding in of_data:
            first = ", ".join(map(str, finding.rows[:5]))
            if finding.count:
                lines.append(
                    f"{where}: {finding.title}: {finding.count} (row {first}). {finding.text}\n"
                )
    return "".join(lines)


def check_rows(
    tokenizer: Any,
    rows: Iterable[Row],
    args: EAFTConfig,
    where: str,
    ends: Iterable[str] = (),
    numbers: Sequence[int] | None = None,
) -> list[Finding]:
    """
    Render rows, and return the findings.

    Args:
        tokenizer: with the chat template of the training.
        rows: all of the same form.
        args: the flags of training.
        where: names the data; begins the message.
        ends: the tokens at which the model will stop; without any, ends are not checked.
        numbers: of the rows in the data that they were chosen from; None: 0, 1, 2, ...

    Raises:
        ConfigurationError: the template cannot be used, or raises on a row.
    """
    plain = split_text(rows)
    if tokenizer.chat_template is None and not plain:
        raise ConfigurationError(
            f"{where}: the model has no chat template, which rows of messages need: give one with "
            "--chat_template_path (a .jinja file, or a model that has one), or rows of text."
        )
    template, marked = (None, False) if plain else training_template(tokenizer, args)
    number_of_rows = len(rows) if isinstance(rows, Sized) else None  # of a stream it is not known
    stride = max(1, math.ceil((number_of_rows or 0) / TOKENISED_ROWS))
    masked = marked and args.assistant_only_loss
    findings = Findings(
        tokenizer, set(ends), template, masked, filled_columns(rows), stride, numbers
    )
    read = enumerate(itertools.islice(rows, STREAM_ROWS if number_of_rows is None else None))
    checked: Iterable[tuple[int, Row]] = read
    if plain:  # nothing is rendered: rows between are skipped
        checked = itertools.islice(read, 0, None, stride)
    quiet = None if args.process_index == 0 else True  # None: a bar on a terminal only
    for number, row in tqdm(checked, desc=f"Checking {where}", delay=5, disable=quiet):
        try:
            check_messages(row, plain)
            whole, prompt = (None, None) if plain else render(tokenizer, row, template)
        except ConfigurationError as error:
            raise ConfigurationError(f"{where}, row {findings.named(number)}: {error}") from error
        except TemplateSyntaxError as error:
            raise ConfigurationError(
                f"The chat template is not valid Jinja (line {error.lineno}: {first_line(error)}):"
                " give another with --chat_template_path."
            ) from error
        except Exception as error:  # a template's expressions can raise anything
            raise ConfigurationError(
                f"{where}, row {findings.named(number)}: the chat template does not take this row"
                f" ({type(error).__name__}: {first_line(error)})."
                f" {way_out(tokenizer, row, template)}"
            ) from error
        findings.add(number, row, whole, prompt)
    return findings.summary()


def check_messages(row: Row, plain: bool) -> None:
    """
    Check the form of a row.

    Raises:
        ConfigurationError: it has another form than the first row, or its messages are no messages.
    """
    if plain:
        if not split_text([row]):
            raise ConfigurationError("prompt and completion must be text, as in the first row.")
        return
    columns = [column for column in COLUMNS if row.get(column) is not None]
    if columns not in (["messages"], ["prompt", "completion"]) or not all(
        isinstance(row[c], list) for c in columns
    ):
        raise ConfigurationError(
            "messages, or prompt and completion, must be lists of messages, as in the first row."
        )
    messages: list[Any] = [*row_messages(row)] or [None]
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ConfigurationError(
                f"{str(message)[:40]} is no message: write {{'role': 'user', 'content': '...'}}, at"
                " least one in a row."
            )


def way_out(tokenizer: Any, row: Row, template: str | None) -> str:
    """Return a change of the row after which the template no longer raises, as advice."""
    try:
        template_kwargs(row)
    except (TypeError, ValueError):
        return "Its tools are text that is not JSON, or its chat_template_kwargs no map."
    for change, advice in CHANGES:
        try:
            changed = {**row, **{c: change(copy.deepcopy(row[c])) for c in COLUMNS if row.get(c)}}
            render(tokenizer, changed, template)
        except Exception:  # the change does not help
            continue
        return advice
    return "Change the row or leave it out, or give another template with --chat_template_path."


def with_arguments(change: Callable[[Any], Any]) -> Callable[[list[Row]], list[Row]]:
    """Return a function that changes the arguments of each tool call in messages."""

    def changed(messages: list[Row]) -> list[Row]:
        for call in tool_calls(messages):
            call["arguments"] = change(call["arguments"])
        return messages

    return changed


CHANGES: list[tuple[Callable[[list[Row]], list[Row]], str]] = [
    (
        with_arguments(lambda value: json.loads(value) if isinstance(value, str) else value),
        (
            "Its tool arguments are JSON text, and this template takes a map: write "
            '"arguments": {"city": "Paris"}, not "arguments": "{\\"city\\": \\"Paris\\"}".'
        ),
    ),
    (
        with_arguments(lambda value: value if isinstance(value, str) else json.dumps(value)),
        (
            "Its tool arguments are a map, and this template takes JSON text: write "
            '"arguments": "{\\"city\\": \\"Paris\\"}", not "arguments": {"city": "Paris"}.'
        ),
    ),
    (without_nulls, "Leave out the keys of its messages that are null."),
    (
        lambda messages: [{"content": "", **without_nulls(m)} for m in messages],
        'Give each message a "content", if only "".',
    ),
    (
        lambda messages: [m for m in messages if m.get("role") not in ("system", "developer")],
        "It takes no system message: put that text at the beginning of the first user message.",
    ),
    (
        lambda messages: [m for m in messages if m.get("role") != "tool"],
        (
            "It takes no message of the role tool: leave such rows out, or give another with"
            " --chat_template_path."
        ),
    ),
]
