"""
When enough rows are scored: rows are read in random order until the interval is narrow.

The interval is of the share of the nll in confident conflicts. It is looked at after `FIRST` rows
and each time the rows have grown by a quarter. Stopping by what is seen costs coverage, for two
reasons, and each has its remedy:

- Scoring stops at the look where the interval happens to be narrow. So the level of the bootstrap
  is `LEVEL`, for an interval that covers 95% or nearly so.
- Where the nll in conflicts is in few rows, early rows may hold too few of them, and the interval
  is then low and narrow. So these rows must be worth `MIN_EFFECTIVE_ROWS` equal ones.

Simulated in `benchmarks/stopping.py` and `tests/inspection/test_stopping.py`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eaft.inspection.interval import MIN_CONFLICTS, share_at_most, share_interval
from eaft.inspection.run_file import FEW_CONFLICTS, MOST_ROWS, NARROW, ScoredRows

# Rows: at the first look, at most in all, and of a shard; the looks are at ends of shards
FIRST, MOST, SHARD_ROWS = 128, 4096, 32
WHOLE = 256  # of data with so many rows all are scored, and checked: fewer would save little
GROWTH = 1.25  # of the rows from one look to the next
HALF_WIDTH = 0.02  # of the interval; it is narrow from here on
LEVEL = 0.97
MIN_EFFECTIVE_ROWS = 20


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
    interval = share_interval(part, whole, conflicts, LEVEL)
    if (
        interval is not None
        and interval.high - interval.low <= 2 * HALF_WIDTH
        and effective_rows(part) >= MIN_EFFECTIVE_ROWS
    ):
        return NARROW
    return MOST_ROWS if is_last else None


def effective_rows(part: NDArray[np.float64]) -> float:
    """Return how many rows of equal nll in conflicts would vary as much (Kish); `part` is not 0."""
    return float(part.sum() ** 2 / (part**2).sum())


def scored_rows(sample: ScoredRows | None) -> str | None:
    """Return how many rows were scored, and why no more; None if all were."""
    if sample is None or sample.rows == sample.of:
        return None
    why = {
        NARROW: (
            "the 95% interval of the conflicts' share of the nll is then at most"
            f" {200 * HALF_WIDTH:.0f} percentage points wide"
        ),
        FEW_CONFLICTS: (
            f"even {MIN_CONFLICTS} tokens in conflict would be at most {100 * HALF_WIDTH:.0f}% of"
            " their nll"
        ),
        MOST_ROWS: "no more are scored without --all",
    }[sample.reason]
    return (
        f"Scored {sample.rows:,} of {sample.of:,} rows, in random order: {why}. The checks of the"
        " data are of these rows too. --all scores every row."
    )
