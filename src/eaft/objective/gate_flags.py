"""
The flags of a gate (`gate`, `gate_alpha`, `gate_entropy`, `gate_top_k`, `gate_kwargs`): help,
parameters, checks.
"""

from __future__ import annotations

import inspect
from typing import Any

from eaft.errors import ConfigurationError
from eaft.objective.registry import GATES, Gate, GateLike, check_gate_by_itself, get_gate


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


def params_of_flags(
    gate: GateLike, alpha: float, entropy: str, others: dict[str, Any] | None
) -> dict[str, Any]:
    """
    Return a gate's parameters from `gate_alpha`, `gate_entropy` and `gate_kwargs`, or by default;
    not the missing ones.

    Raises:
        ConfigurationError: `gate_kwargs` has what has a flag of its own.
    """
    params = {k: v for k, v in get_gate(gate).params.items() if v is not inspect.Parameter.empty}
    given = dict(others or {})
    for name, value, default in (("alpha", alpha, 1.0), ("entropy", entropy, "top-k")):
        if name in given:
            raise ConfigurationError(f"gate_kwargs: set {name} by gate_{name}.")
        if name in params or value != default:
            given[name] = value
    return {**params, **given}


def gate_of_flags(
    gate: GateLike, alpha: float, entropy: str, top_k: int, others: dict[str, Any] | None
) -> tuple[Gate, dict[str, Any]]:
    """
    Return the gate of `gate`, `gate_alpha`, ..., and its parameters, for a loss without a base
    model beside it.
    """
    check_top_k(top_k)
    params = params_of_flags(gate, alpha, entropy, others)
    return check_gate_by_itself(gate, params), params


def check_top_k(top_k: int) -> None:
    """Raise `ConfigurationError` for a K whose entropy is always 0."""
    if top_k < 2:
        raise ConfigurationError(f"gate_top_k must be at least 2, got {top_k}; the paper uses 20.")
