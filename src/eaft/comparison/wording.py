"""Names, differences and targets as the sentences and tables of a comparison write them."""

from __future__ import annotations

from eaft.comparison.collect import NLL
from eaft.comparison.results import Comparison, Difference

VIEWS = {
    "chosen": "At each objective's own choice (lowest held-out nll)",
    "last": "After the last step",
}


def listed(names: list[str]) -> str:
    """Return names as a sentence has them."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def points(d: Difference) -> str:
    """Return a difference of scores in percentage points, with interval and adjusted p."""
    return f"{100 * d.change:+.1f} points (95%: {100 * d.low:+.1f} to {100 * d.high:+.1f}; {p(d)})"


def nats(d: Difference) -> str:
    """Return a difference of drift or nll in nats per token, with interval and adjusted p."""
    return f"{d.change:+.4f} (95%: {d.low:+.4f} to {d.high:+.4f}; {p(d)})"


def p(d: Difference) -> str:
    """Return an adjusted p."""
    return f"p {d.p_holm:.2g}" if d.p_holm >= 1e-4 else "p < 0.0001"


def up_to(low: str, high: str) -> str:
    """Return a range in words, or its only value."""
    return low if low == high else f"{low} to {high}"


def shown(target: str, shortfall: float) -> str:
    """Return a target as users read it: the nll as it is, a score in %."""
    return f"{shortfall:.3f}" if target == NLL else f"{100 * (1 - shortfall):.1f}%"


def views_of(results: Comparison) -> list[str]:
    """Return the views that there are; `chosen` takes held-out rows."""
    chosen = any(objective.chosen is not None for objective in results.objectives.values())
    return ["chosen", "last"] if chosen else ["last"]
