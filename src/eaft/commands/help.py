"""
What the commands' help has in common: the list of gates, and flags that are a dataclass's fields.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import eaft
from eaft.text import summary

GATES_FILE = Path(eaft.__file__).parent / "objective" / "gates.py"
Formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34)


class Flag(NamedTuple):
    """A flag of TRL or transformers that the short help explains."""

    name: str
    metavar: str | None  # None: a switch
    default: Any  # None: not shown
    help: str


def gates_help() -> str:
    """
    Return each gate's name and meaning, as `Gate.help` has it.

    This reads the file of the formulas and does not import it, because it imports torch.
    """
    lines, indent = [], " " * 16
    for function in ast.parse(GATES_FILE.read_text()).body:
        for decorator in getattr(function, "decorator_list", []):
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "register":
                name = ast.literal_eval(decorator.args[0])
                meaning = summary(ast.get_docstring(function))  # type: ignore[arg-type]
                lines.append(textwrap.fill(f"  {name:14}{meaning}", 100, subsequent_indent=indent))
    return "\n".join(lines)


def add_flags(parser: argparse.ArgumentParser, title: str, flags: list[Flag]) -> None:
    """Add a group of flags, to be shown and not to be parsed."""
    group = parser.add_argument_group(title)
    for flag in flags:
        default = "" if flag.default in (None, False) else f" (default: {flag.default})"
        settings: dict[str, Any] = {"help": flag.help.replace("%", "%%") + default}
        if flag.metavar is None:
            settings["action"] = "store_true"
        else:
            settings["metavar"] = flag.metavar
        group.add_argument(f"--{flag.name}", **settings)


def flags_of(kind: type, *names: str) -> list[Flag]:
    """Return the fields of a dataclass as flags: all, or the named ones."""
    flags = []
    for field in dataclasses.fields(kind):
        if not names or field.name in names:
            text, default = field.metadata["help"].rstrip("."), field.default
            shown = type(default) in (int, float, str) and "default:" not in text
            if isinstance(default, str) and Path(default).is_absolute():  # a file of ours
                shown = False
            metavar = None if default is False else field.name.rpartition("_")[2].upper()
            flags.append(Flag(field.name, metavar, default if shown else None, text))
    return flags
