"""The table of gates as `--help` shows it."""

from __future__ import annotations

import inspect
import textwrap

from eaft.objective.registry import GATES


def gates_help() -> str:
    """Return the table of gates: name, meaning, parameters with defaults; at most 100 columns."""
    lines = []
    indent = " " * 16
    for name, gate in GATES.items():
        lines.append(textwrap.fill(f"  {name:14}{gate.help}", 100, subsequent_indent=indent))
        params = {
            k: "measured" if v is inspect.Parameter.empty else v for k, v in gate.params.items()
        }
        if params:
            text = f"{indent}({', '.join(f'{k}: {v}' for k, v in params.items())})"
            lines.append(textwrap.fill(text, 100, subsequent_indent=indent))
    return "\n".join(lines) + "\n"
