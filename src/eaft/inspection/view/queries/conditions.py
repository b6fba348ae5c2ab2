"""SQL conditions with the values bound to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eaft.inspection.view.selection import Range, one_of
from eaft.objective.statistics import HIGH_ENTROPY, LOW_ENTROPY


@dataclass(frozen=True)
class Condition:
    """An SQL condition, and one value for each of its question marks."""

    sql: str
    values: tuple[Any, ...] = ()


# Groups of tokens that a question may name
GROUPS = {
    "conflict": Condition("conflict"),
    "high_entropy": Condition(f"entropy >= {HIGH_ENTROPY}"),
    "low_entropy": Condition(f"entropy <= {LOW_ENTROPY}"),
}
ALWAYS, NEVER = Condition("true"), Condition("false")


def all_of(*conditions: Condition) -> Condition:
    """Return the condition that all of these hold."""
    sql = " AND ".join(condition.sql for condition in conditions)
    values: tuple[Any, ...] = ()
    for condition in conditions:
        values += condition.values
    return Condition(sql or ALWAYS.sql, values)


def among(column: str, values: Sequence[Any], if_empty: Condition) -> Condition:
    """Return the condition that a column has one of these values; `if_empty` if there are none."""
    if not values:
        return if_empty
    return Condition(f"{column} IN ({', '.join('?' * len(values))})", tuple(values))


def within(column: str, limits: Range) -> Condition:
    """Return the condition that a column lies between two limits, both included."""
    low, high = limits
    conditions = []
    if low is not None:
        conditions.append(Condition(f"{column} >= ?", (low,)))
    if high is not None:
        conditions.append(Condition(f"{column} <= ?", (high,)))
    return all_of(*conditions)


def in_group(group: str | None) -> Condition:
    """
    Return the condition that a token is in a group of `GROUPS`; every token is in the group None.

    Raises:
        RequestError: there is no such group.
    """
    return ALWAYS if group is None else GROUPS[one_of("group", group, GROUPS)]
