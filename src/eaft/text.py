"""
Show text from data, models, tasks and file names as text: on the terminal, in Markdown and in HTML.
"""

from __future__ import annotations

import logging
import re
import traceback
import unicodedata
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

# Unicode's control, format, surrogate and line-separator characters
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
KEPT = "\t\u200c\u200d"  # words and emoji are spelt with the two joiners
# Characters that Markdown (CommonMark and GitHub's) reads as markup: inside a line, and at its
# beginning or end
INLINE = re.compile(
    r"[\\`*\[\]<&~$]|(?<![^\W_])_|_(?![^\W_])|(?<=\w):(?=//)|(?<=\bwww)\.|(?<=\w)@(?=\w)"
)
EDGES = re.compile(r"^(?=[#=>:]|-[-\s]|[+-](\s|$))|^\d+(?=[.)](\s|$))|(?=#+$)")
PIPE = re.compile(r"(\\*)\|")


def visible(text: Any, lines: bool = True) -> str:
    """
    Return text with control and invisible characters written as escapes (`\\x1b`, `\\u202e`).

    The terminal then does not execute them and does not reorder the line.

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
    Return text as one line of Markdown that shows the text unchanged.

    Use `code` for code. `table` escapes pipes.
    """
    line = visible(text, lines=False).strip()
    return EDGES.sub(lambda m: m[0] + "\\", INLINE.sub(lambda m: "\\" + m[0], line))


def markdown_strings(value: Any) -> Any:
    """
    Return JSON, or a dataclass of JSON values, with `markdown` applied to all strings and keys.

    Plain names stay unchanged.
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


def as_html(text: str) -> Any:
    """Return Markdown as HTML. HTML within it is shown as text, and a table can be scrolled."""
    from markdown_it import MarkdownIt  # an extra's packages
    from markupsafe import Markup

    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    html = html.replace("<table>", '<div class="scroll"><table>')
    return Markup(html.replace("</table>", "</table></div>"))


def fill_page(
    template: Path, filters: dict[str, Callable[..., Any]] | None = None, **values: Any
) -> str:
    """
    Return a template of HTML with values filled in, as text unless they are `Markup`.

    Args:
        template: a file that extends `page.html`, which has the head and the style of all reports.
        filters: the template's own filters.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: (
            visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    return environment.get_template(template.name).render(values)


def table(rows: list[list[Any]], headers: list[str]) -> str:
    """Return a Markdown table. Each cell is one line of Markdown."""
    from tabulate import tabulate  # an extra's package

    cells = [[cell(value) for value in row] for row in rows]
    return str(
        tabulate(cells, [cell(name) for name in headers], tablefmt="github", disable_numparse=True)
    )


def cell(value: Any) -> str:
    """Return a table's cell with escaped pipes, which would end it."""
    return PIPE.sub(
        lambda m: m[1] + ("\\" if len(m[1]) % 2 else "") + "\\|", visible(value, lines=False)
    )


class VisibleRecord(logging.LogRecord):
    """
    A log message with visible control characters, also in its exception.
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
