"""What a chat template makes of rows: which problems there are, and in how many rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eaft.training.templates import COLUMNS, Row, render, row_messages, template_kwargs, tool_calls

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
            "They are not in the text that is trained on. Set --chat_template_path to a template"
            " that writes them."
        ),
    ),
    "no_prefix": (
        "Prompts that do not begin their row",
        (
            "The template writes a prompt that stands alone differently, or a token spans its end."
            " The tokens that differ are trained on, and the model is asked in another context than"
            " it was trained in."
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
        numbers: Sequence[int] | None = None,
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
        self.numbers = numbers

    def named(self, number: int) -> int:
        """Return the number of a row in the data that the rows were chosen from."""
        return number if self.numbers is None else int(self.numbers[number])

    def add(self, number: int, row: Row, whole: str | None, prompt: str | None) -> None:
        """
        Look at a row; at its tokens in every `stride`th row only.

        Args:
            number, row: its index, and the row.
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
        self.rows[name].append(self.named(self.number))
        self.details.setdefault(name, detail)

    def how_it_ends(self, text: str) -> str:
        """Return how a text without an end token ends, and what to do."""
        added = [token for token in self.tokenizer.get_added_vocab() if text.endswith(token)]
        last = (added or [text[-20:]])[0]
        stops = (
            f"The learned text of row {self.named(self.number)} ends with {last!r}, and generation"
            f" stops at {self.ends}."
        )
        if added:
            return f"{stops} Set --eos_token '{added[0]}'."
        return f"{stops} Set --chat_template_path to a template that ends the assistant's turn."

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

    def checked(self, name: str) -> str:
        """Return in how many rows tokens were checked, if not in all."""
        if self.stride == 1 or not (name == "no_prefix" or (name == "no_end" and self.masked)):
            return ""
        return f" Tokens were checked in {self.tokenised} rows, 1 in {self.stride}."

    def summary(self) -> list[Finding]:
        """Return a `Finding` for each of `FINDINGS`, also if it has no row."""
        return [
            Finding(
                name,
                title,
                count=len(self.rows[name]),
                rows=self.rows[name][:NAMED_ROWS],
                text=f"{text} {self.details.get(name, '')}".strip() + self.checked(name),
            )
            for name, (title, text) in FINDINGS.items()
        ]


def holds_null(value: Any) -> bool:
    """Return whether a value of JSON is null or holds one."""
    if isinstance(value, dict):
        return any(item is None or holds_null(item) for item in value.values())
    return isinstance(value, list) and any(item is None or holds_null(item) for item in value)
