"""
Chat templates: errors by row before a model is loaded, and which tokens are the assistant's.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from trl import ModelConfig, is_conversational

from eaft.errors import ConfigurationError, first_line
from eaft.evaluation.scores import end_tokens, generation_config, load_tokenizer
from eaft.gguf_model import load_gguf_tokenizer
from eaft.training.config import EAFTConfig
from eaft.training.trl_internals import (
    get_training_chat_template,
    global_then_local_main_first,
    has_generation_markers,
)

Row = dict[str, Any]
COLUMNS = ("messages", "prompt", "completion")  # the columns that hold messages
STREAM_ROWS = 1000  # how many rows of a stream are rendered beforehand
TOKENISED_ROWS = 1000  # of how many rows, spread over a data set, tokens are looked at beforehand
OTHER_FORM = (
    'Split the row into {"prompt": [...], "completion": [...]}, one for each turn of the assistant:'
    " of these the completion is trained on."
)


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
            tokenizer = load_gguf_tokenizer(path)
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


FINDINGS = {
    "no_end": (
        "Answers without an end token",
        "The model does not learn to stop.",
    ),
    "filled_nulls": (
        "Nulls filled into tool arguments",
        (
            "A typed file (Parquet) fills a key that a row lacks, and another row has, with null,"
            " and the model learns to write it. Give JSON Lines, or write the arguments as JSON"
            " text before the file is made."
        ),
    ),
    "dropped_calls": (
        "Tool calls or results that the chat template drops",
        (
            "They are not in the text that is trained on. Give a template that writes them, with"
            " --chat_template_path."
        ),
    ),
    "no_prefix": (
        "Prompts that do not begin their row",
        (
            "The template writes the prompt alone otherwise, or a token spans its end. What differs"
            " is trained on, and the model is asked in another context than it was trained in."
        ),
    ),
}
NAMED_ROWS = 10
SENTINEL = "called_a8f3e2b1"


@dataclass(frozen=True)
class Finding:
    """One of `FINDINGS` in the rows of a data set."""

    name: str
    title: str
    count: int  # rows
    rows: list[int]  # the first NAMED_ROWS of them, by number
    text: str  # what it means, and advice


class Findings:
    """Looks at what a chat template makes of rows, and counts the rows of each of `FINDINGS`."""

    def __init__(
        self,
        tokenizer: Any,
        ends: set[str],
        template: str | None,
        masked: bool,
        filled: set[str],
        stride: int,
    ) -> None:
        self.tokenizer, self.template, self.masked, self.filled = (
            tokenizer,
            template,
            masked,
            filled,
        )
        self.ends = tuple(sorted(ends))
        self.rows: dict[str, list[int]] = {name: [] for name in FINDINGS}
        self.details: dict[str, str] = {}
        self.number, self.stride, self.tokenised = 0, stride, 0

    def add(self, number: int, row: Row, whole: str | None, prompt: str | None) -> None:
        """
        Look at a row; at its tokens in every `stride`th row only.

        Args:
            number, row: its index in the data, and the row.
            whole, prompt: its text and its prompt's text, from `render`; None for a row of plain
                text.
        """
        self.number = number
        self.tokenised += not number % self.stride
        messages = row_messages(row) if whole is not None else []
        if whole is None:
            whole, prompt = row["prompt"] + row["completion"], row["prompt"]
        elif self.ends and messages[-1]["role"] == "assistant":
            learned = (
                self.learned(row) if self.masked and not number % self.stride else whole.rstrip()
            )
            if not learned.endswith(self.ends):
                self.count("no_end", self.how_it_ends(learned))
        if prompt is not None and not self.is_prefix(prompt, whole, special=not messages):
            self.count("no_prefix")
        if (
            "messages" in self.filled
            and any(holds_null(call.get("arguments")) for call in tool_calls(messages))
        ) or ("tools" in self.filled and holds_null(row.get("tools"))):
            self.count("filled_nulls")
        if any(
            message.get("tool_calls") or message.get("role") == "tool" for message in messages
        ) and self.drops(row):
            self.count("dropped_calls")

    def learned(self, row: Row) -> str:
        """Return the text of the tokens that the template marks as the assistant's."""
        encoded = self.tokenizer.apply_chat_template(
            row_messages(row),
            chat_template=self.template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **template_kwargs(row),
        )
        marked = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        return str(self.tokenizer.decode([token for token, mask in marked if mask])).rstrip()

    def count(self, name: str, detail: str = "") -> None:
        """Count this row under a name of `FINDINGS`."""
        self.rows[name].append(self.number)
        self.details.setdefault(name, detail)

    def how_it_ends(self, text: str) -> str:
        """Return how a text without an end token ends, and what to do."""
        added = [token for token in self.tokenizer.get_added_vocab() if text.endswith(token)]
        last = (added or [text[-20:]])[0]
        stops = (
            f"What is learned of row {self.number} ends with {last!r}, and generation stops at"
            f" {self.ends}."
        )
        if added:
            return f"{stops} Set --eos_token '{added[0]}'."
        return f"{stops} Give a template that ends the assistant's turn, with --chat_template_path."

    def is_prefix(self, prompt: str, whole: str, special: bool) -> bool:
        """
        Return whether a prompt begins its row, as text, and in every `stride`th row as tokens.
        """
        if not whole.startswith(prompt):
            return False
        if self.number % self.stride:
            return True
        first, all_ = (
            self.tokenizer(text, add_special_tokens=special)["input_ids"]
            for text in (prompt, whole)
        )
        return all_[: len(first)] == first

    def drops(self, row: Row) -> bool:
        """
        Return whether the template leaves out the name of a tool call, or the answer of a tool.
        """
        expected = 0
        changed = {**row, **{c: copy.deepcopy(row[c]) for c in COLUMNS if row.get(c)}}
        for message in row_messages(changed):
            for call in tool_calls([message]):
                call["name"], expected = SENTINEL, expected + 1
            if message.get("role") == "tool" and isinstance(message.get("content"), str):
                message["content"], expected = SENTINEL, expected + 1
        try:
            return render(self.tokenizer, changed, self.template)[0].count(SENTINEL) < expected
        except Exception:  # the template looks the name up
            return False

    def looked_at(self, name: str) -> str:
        """Return of how many rows the tokens were looked at, where it was not all."""
        if self.stride == 1 or not (name == "no_prefix" or (name == "no_end" and self.masked)):
            return ""
        return f" Tokens were looked at in {self.tokenised} rows, 1 in {self.stride}."

    def summary(self) -> list[Finding]:
        """Return a `Finding` for each of `FINDINGS`, also for those without a row."""
        return [
            Finding(
                name,
                title,
                count=len(self.rows[name]),
                rows=self.rows[name][:NAMED_ROWS],
                text=f"{text} {self.details.get(name, '')}".strip() + self.looked_at(name),
            )
            for name, (title, text) in FINDINGS.items()
        ]


def holds_null(value: Any) -> bool:
    """Return whether a value of JSON is null or holds one."""
    if isinstance(value, dict):
        return any(item is None or holds_null(item) for item in value.values())
    return isinstance(value, list) and any(item is None or holds_null(item) for item in value)


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
    rows: dict[str, Iterable[Row] | None], args: EAFTConfig, model_args: ModelConfig
) -> dict[str, list[Finding]]:
    """
    Render every conversational row, as training will, before a model is loaded or converted.

    Args:
        rows: flag that names the data -> its rows. Only the first 1000 rows of a stream are
            rendered.
        args: the flags of training.
        model_args: the flags of the model.

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
    return {flag: check_rows(tokenizer, data, args, flag, ends) for flag, data in checked.items()}


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


def check_rows(
    tokenizer: Any, rows: Iterable[Row], args: EAFTConfig, where: str, ends: Iterable[str] = ()
) -> list[Finding]:
    """
    Render rows, and return the findings.

    Args:
        tokenizer: with the chat template of the training.
        rows: all of the same form.
        args: the flags of training.
        where: names the data; begins the message.
        ends: the tokens at which the model will stop; without any, ends are not checked.

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
    findings = Findings(tokenizer, set(ends), template, masked, filled_columns(rows), stride)
    looked_at = enumerate(itertools.islice(rows, STREAM_ROWS if number_of_rows is None else None))
    checked: Iterable[tuple[int, Row]] = looked_at
    if plain:  # nothing is rendered: the rows between are left out
        checked = itertools.islice(looked_at, 0, None, stride)
    quiet = None if args.process_index == 0 else True  # None: a bar on a terminal only
    for number, row in tqdm(checked, desc=f"Checking {where}", delay=5, disable=quiet):
        try:
            check_messages(row, plain)
            whole, prompt = (None, None) if plain else render(tokenizer, row, template)
        except ConfigurationError as error:
            raise ConfigurationError(f"{where}, row {number}: {error}") from error
        except TemplateSyntaxError as error:
            raise ConfigurationError(
                f"The chat template is not valid Jinja (line {error.lineno}: {first_line(error)}):"
                " give another with --chat_template_path."
            ) from error
        except Exception as error:  # a template's expressions can raise anything
            raise ConfigurationError(
                f"{where}, row {number}: the chat template does not take this row"
                f" ({type(error).__name__}: {first_line(error)})."
                f" {way_out(tokenizer, row, template)}"
            ) from error
        findings.add(number, row, whole, prompt)
    return findings.summary()


def check_messages(row: Row, plain: bool) -> None:
    """
    Check the form of a row.

    Raises:
        ConfigurationError: its form is not the form of the first row, or its messages are no
            messages.
    """
    if plain:
        if not split_text([row]):
            raise ConfigurationError(
                "prompt and completion must be text, as those of the first row are."
            )
        return
    columns = [column for column in COLUMNS if row.get(column) is not None]
    if columns not in (["messages"], ["prompt", "completion"]) or not all(
        isinstance(row[c], list) for c in columns
    ):
        raise ConfigurationError(
            "messages, or prompt and completion, must be lists of messages, as the first row's are."
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


def label_turns(dataset: Any, tokenizer: Any, args: EAFTConfig) -> Any:
    """
    Return conversational rows as `input_ids` and `labels`, the assistant's tokens labelled (int64,
    -100: no label).

    This is for a template without `{% generation %}` marks. The row is rendered up to each turn of
    the assistant. The turn is the text that follows, with its end token, like the completion of a
    row of `prompt` and `completion`.

    Raises:
        ConfigurationError: a turn cannot be located, for example if a template changes earlier
            turns.
    """
    settings: Row = {"remove_columns": list(next(iter(dataset)))}
    settings["fn_kwargs"] = {
        "tokenizer": tokenizer,
        "completion_only": args.completion_only_loss is not False,
    }
    if hasattr(dataset, "__len__"):  # a stream's `map` takes neither
        settings |= {"desc": "Labelling turns", "num_proc": args.dataset_num_proc}
    with global_then_local_main_first():  # like TRL's preparation: the others read the cache
        return dataset.map(labelled_turns, with_indices=True, **settings)


def labelled_turns(
    row: Row, number: int, tokenizer: Any, completion_only: bool
) -> dict[str, list[int]]:
    """Return the tokens and labels of one row."""
    messages, settings = row_messages(row), {"tokenize": False, **template_kwargs(row)}
    text = tokenizer.apply_chat_template(messages, **settings)
    prompt = len(row["prompt"]) if "prompt" in row and completion_only else 0
    turns = [i for i, m in enumerate(messages) if i >= prompt and m["role"] == "assistant"]
    spans = []
    for turn in turns:
        span = find_turn(tokenizer, messages, turn, text, settings)
        if span is None:
            raise ConfigurationError(
                f"Row {number}: the chat template has no {{% generation %}} marks, and it renders"
                f" message {turn} otherwise once others follow, so that the assistant's tokens"
                f" cannot be found. {OTHER_FORM}"
            )
        spans.append(span)
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise ConfigurationError(
            "The tokenizer does not say where its tokens lie, so that the assistant's cannot be"
            f" found. {OTHER_FORM}"
        ) from error
    labels = [
        token if any(start < high and max(end, start + 1) > low for low, high in spans) else -100
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def find_turn(
    tokenizer: Any, messages: list[Row], turn: int, text: str, settings: Row
) -> tuple[int, int] | None:
    """
    Return where a turn of the assistant begins and ends in a row's text, or None if it cannot be
    located.
    """
    through = tokenizer.apply_chat_template(messages[: turn + 1], **settings)
    # Some templates write the end token once, at the end of the row
    if not text.startswith(through) and tokenizer.eos_token:
        through = through.removesuffix(tokenizer.eos_token)
    if not text.startswith(through):
        return None
    if turn == 0:  # many templates cannot render an empty list of messages
        start = text.find(str(messages[0].get("content") or "").strip())
        return (start, len(through)) if start >= 0 else None
    before = tokenizer.apply_chat_template(messages[:turn], **settings).removesuffix(
        tokenizer.eos_token or ""
    )
    asked = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, **settings)
    start = next(
        (i for i, (a, b) in enumerate(zip(asked, through, strict=False)) if a != b), len(asked)
    )
    return (start, len(through)) if len(before) <= start < len(through) else None


def mark_assistant(
    args: EAFTConfig, model: Any, tokenizer: Any, train_dataset: Any
) -> tuple[EAFTConfig, bool]:
    """
    Return the arguments for TRL, and whether `label_turns` must label the assistant's tokens.

    `assistant_only_loss` stays on if the template marks these tokens, or TRL knows a version of it
    that does. `completion_only_loss` with `messages`, which TRL ignores, means the same.
    """
    first: Row = next(iter(train_dataset), {}) if train_dataset is not None else {}
    wanted = args.assistant_only_loss or (args.completion_only_loss and "messages" in first)
    if not wanted or not conversational([first]) or {"image", "images"} & first.keys():
        return args, False
    args = copy.copy(args)
    args.assistant_only_loss = True
    if tokenizer is not None:
        tokenizer = with_template(tokenizer, args)
    else:
        revision = (args.model_init_kwargs or {}).get("revision")
        tokenizer = find_template_tokenizer(
            model if isinstance(model, str) else getattr(model, "name_or_path", ""), args, revision
        )
    if tokenizer is not None and tokenizer.chat_template is not None:
        _, args.assistant_only_loss = training_template(tokenizer, args)
    return args, not args.assistant_only_loss
