"""How sure the share of the nll in confident conflicts is, by the rows that were scored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eaft.inspection.example_columns import ExampleColumns
from eaft.inspection.summary import DATA, Interval

# Below these the interval covers clearly less than 95% (tests/inspection/test_interval.py)
MIN_CONFLICTS, MIN_ROWS = 10, 10
CLUSTERS = 1000  # at most; more rows are put together at random, which changes no variance


def share_interval(examples: ExampleColumns, conflicts: int) -> Interval | None:
    """
    Return the 95% interval of the share of the data's nll in confident conflicts.

    Rows are the clusters, since a row's tokens resemble each other.

    Args:
        examples: of the inspection.
        conflicts: the number of tokens of the data in confident conflict.

    Returns:
        None for fewer than `MIN_CONFLICTS` tokens in conflict, or `MIN_ROWS` rows with nll.
    """
    data = examples.is_from(DATA) & ~np.isnan(examples.conflict_nll_share)
    nll = examples.nll[data] * examples.labelled[data]
    if conflicts < MIN_CONFLICTS or len(nll) < MIN_ROWS:
        return None
    return interval_of(nll * examples.conflict_nll_share[data], nll)


def interval_of(part: NDArray[np.float64], whole: NDArray[np.float64]) -> Interval:
    """Return the 95% interval of sum(part) / sum(whole), `[rows]` each, by cluster bootstrap."""
    from eaft.evaluation.paired import bootstrap_interval  # needs the extra `inspect`

    cluster = np.random.default_rng(0).permutation(len(whole)) % CLUSTERS
    size = min(CLUSTERS, len(whole))
    low, high = bootstrap_interval(
        np.bincount(cluster, part, size), np.bincount(cluster, whole, size)
    )
    return Interval(low, min(high, 1.0))
