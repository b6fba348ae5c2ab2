"""The table of gates as `--help` shows it."""

from __future__ import annotations

import inspect

from eaft.objective.registry import GATES


def gates_help() -> str:
    """Return the table of gates as text: name, one-line meaning, parameters with their defaults."""
    lines = []
    for name, gate in GATES.items():
        lines.append(f"  {name:14}{gate.help}")
        params = {
            k: "measured" if v is inspect.Parameter.empty else v for k, v in gate.params.items()
        }
        if params:
            lines.append(f"{'':16}({', '.join(f'{k}: {v}' for k, v in params.items())})")
    return "\n".join(lines) + "\n"
