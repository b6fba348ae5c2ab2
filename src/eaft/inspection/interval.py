"""How sure the share of the nll in confident conflicts is, by the rows that were scored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eaft.inspection.summary import Interval

# Below these the interval covers clearly less than 95% (tests/inspection/test_interval.py)
MIN_CONFLICTS, MIN_ROWS = 10, 10
LEVEL = 0.95
CLUSTERS = 1000  # at most; more rows are put together at random, which changes no variance
USUAL_NLL = 5.0  # nats of a token in conflict, where the data has none


def share_interval(
    part: NDArray[np.float64],
    whole: NDArray[np.float64],
    conflicts: int,
    level: float = LEVEL,
) -> Interval | None:
    """
    Return the 95% interval of the share of the nll in confident conflicts.

    Rows are the clusters, since a row's tokens resemble each other.

    Args:
        part: `[rows]`, the nll in conflicts of each row with nll.
        whole: `[rows]`, their nll.
        conflicts: the number of tokens in confident conflict.
        level: of the bootstrap. Where scoring stopped by the interval, `stopping.LEVEL`.

    Returns:
        None for fewer than `MIN_CONFLICTS` tokens in conflict, or `MIN_ROWS` rows.
    """
    if conflicts < MIN_CONFLICTS or len(whole) < MIN_ROWS:
        return None
    return interval_of(part, whole, level)


def interval_of(
    part: NDArray[np.float64], whole: NDArray[np.float64], level: float = LEVEL
) -> Interval:
    """Return the interval of sum(part) / sum(whole), `[rows]` each, by cluster bootstrap."""
    from eaft.evaluation.paired import bootstrap_interval  # needs the extra `inspect`

    cluster = np.random.default_rng(0).permutation(len(whole)) % CLUSTERS
    size = min(CLUSTERS, len(whole))
    low, high = bootstrap_interval(
        np.bincount(cluster, part, size), np.bincount(cluster, whole, size), level
    )
    return Interval(low, min(high, 1.0))


def share_at_most(conflicts: int, share: float, nll: float) -> float:
    """
    Return the share of the nll that `MIN_CONFLICTS` tokens in conflict would be.

    Args:
        conflicts: the tokens in conflict that there are, fewer than `MIN_CONFLICTS`.
        share: of the nll that is in them.
        nll: of all tokens, nats.
    """
    return MIN_CONFLICTS / conflicts * share if conflicts else MIN_CONFLICTS * USUAL_NLL / nll
