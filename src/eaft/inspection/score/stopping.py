"""
When enough rows are scored: rows are read in random order until the interval is narrow.

The interval is of the share of the nll in confident conflicts. It is looked at after `FIRST` rows
and each time the rows have grown by a quarter. Looking more than once costs coverage: see
`tests/inspection/test_stopping.py`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eaft.inspection.interval import MIN_CONFLICTS, share_at_most, share_interval
from eaft.inspection.run_file import FEW_CONFLICTS, MOST_ROWS, NARROW

# Rows: at the first look, at most in all, and of a shard; the looks are at ends of shards
FIRST, MOST, SHARD_ROWS = 128, 4096, 32
GROWTH = 1.25  # of the rows from one look to the next
HALF_WIDTH = 0.02  # of the 95% interval; it is narrow from here on


def looks(rows: int) -> list[int]:
    """Return the numbers of rows after which the interval is looked at; the last is `rows`."""
    numbers, number = [], FIRST
    while number < rows:
        numbers.append(number)
        number = -(-int(number * GROWTH) // SHARD_ROWS) * SHARD_ROWS
    return [*numbers, rows]


def reason_to_stop(
    part: NDArray[np.float64], whole: NDArray[np.float64], conflicts: int, is_last: bool
) -> str | None:
    """
    Return why no more rows are needed; None if more are.

    Args:
        part: `[rows]`, the nll in conflicts of each row with nll.
        whole: `[rows]`, their nll.
        conflicts: the number of tokens in confident conflict.
        is_last: whether there are no more rows to score.
    """
    if conflicts < MIN_CONFLICTS and len(whole):
        share = float(part.sum() / whole.sum())
        if share_at_most(conflicts, share, float(whole.sum())) <= HALF_WIDTH:
            return FEW_CONFLICTS
    interval = share_interval(part, whole, conflicts)
    if interval is not None and interval.high - interval.low <= 2 * HALF_WIDTH:
        return NARROW
    return MOST_ROWS if is_last else None
