"""Text of others (data, models, tasks, file names) stays text: on the terminal, and in Markdown."""

from __future__ import annotations

import logging
import re
import traceback
import unicodedata
from dataclasses import fields, is_dataclass, replace
from typing import Any

HIDDEN = {
    "Cc",
    "Cf",
    "Cs",
    "Zl",
    "Zp",
}  # Unicode's control, format, surrogate and line-separator characters
KEPT = "\t\u200c\u200d"  # the two joiners spell words and emoji
# What Markdown (CommonMark and GitHub's) reads as markup in the middle of a line, and at its
# beginning or end
INLINE = re.compile(
    r"[\\`*\[\]<&~$]|(?<![^\W_])_|_(?![^\W_])|(?<=\w):(?=//)|(?<=\bwww)\.|(?<=\w)@(?=\w)"
)
EDGES = re.compile(r"^(?=[#=>:]|-[-\s]|[+-](\s|$))|^\d+(?=[.)](\s|$))|(?=#+$)")
PIPE = re.compile(r"(\\*)\|")


def visible(text: Any, lines: bool = True) -> str:
    """
    Return text with control and invisible characters written as escapes (`\\x1b`, `\\u202e`).

    A terminal then obeys none of them, and no line is shown in another order than it has.

    Args:
        lines: keep line ends.
    """
    text = str(text)
    if text.isprintable():
        return text
    kept = KEPT + "\n" if lines else KEPT
    return "".join(
        c
        if c in kept or unicodedata.category(c) not in HIDDEN
        else c.encode("unicode_escape").decode()
        for c in text
    )


def summary(docstring: str | None) -> str:
    """Return the first paragraph of a docstring as one line, without a source in parentheses."""
    paragraph = (docstring or "").strip().partition("\n\n")[0]
    return re.sub(r" \([^()]*arXiv[^()]*\)", "", " ".join(paragraph.split()))


def markdown(text: Any) -> str:
    """
    Return text as one line of Markdown that shows it as it is. `code` is for code, `table` escapes
    pipes.
    """
    line = visible(text, lines=False).strip()
    return EDGES.sub(lambda m: m[0] + "\\", INLINE.sub(lambda m: "\\" + m[0], line))


def markdown_strings(value: Any) -> Any:
    """
    Return JSON, or a dataclass of it, with all strings as `markdown` has them, keys included.

    Common names are unchanged by that.
    """
    if is_dataclass(value) and not isinstance(value, type):
        safe = {f.name: markdown_strings(getattr(value, f.name)) for f in fields(value)}
        return replace(value, **safe)
    if isinstance(value, dict):
        return {markdown_strings(key): markdown_strings(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [markdown_strings(inner) for inner in value]
    return markdown(value) if isinstance(value, str) else value


def code(text: Any) -> str:
    """Return text as one line of Markdown code."""
    text = visible(text, lines=False)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if not text.strip() or {text[0], text[-1]} & {" ", "`"} else ""
    return f"{fence}{space}{text}{space}{fence}"


def block(text: Any) -> str:
    """Return text as an indented block of Markdown code."""
    return "\n".join("    " + line for line in visible(str(text).replace("\r\n", "\n")).split("\n"))


def table(rows: list[list[Any]], headers: list[str]) -> str:
    """Return a Markdown table of cells that are Markdown, each in one line."""
    from tabulate import tabulate  # comes with the extras

    cells = [[cell(value) for value in row] for row in rows]
    return str(
        tabulate(cells, [cell(name) for name in headers], tablefmt="github", disable_numparse=True)
    )


def cell(value: Any) -> str:
    """Return a table's cell, whose pipes do not end it."""
    return PIPE.sub(
        lambda m: m[1] + ("\\" if len(m[1]) % 2 else "") + "\\|", visible(value, lines=False)
    )


class VisibleRecord(logging.LogRecord):
    """
    A log message in which control characters are shown, also in the exception that comes with it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0]:
            self.exc_text = visible(
                "".join(traceback.format_exception(*self.exc_info)).rstrip("\n")
            )

    def getMessage(self) -> str:
        """Return the message."""
        return visible(super().getMessage())
