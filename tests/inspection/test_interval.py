"""The interval of the conflicts' share of the nll covers what it should, on simulated rows."""

import numpy as np
import pytest

from eaft.evaluation import paired
from eaft.inspection import interval
from eaft.inspection.interval import interval_of

TRIALS = 250


def draw(rng, rows, per_row):
    """
    Sums of nll in conflicts and of all nll, `[rows]` each: rows differ in length and temper, and a
    token in conflict has at least 2.3 nats.
    """
    length = rng.lognormal(np.log(60), 0.5, rows)
    count = rng.poisson(rng.gamma(1, per_row, rows) * length / 68)
    part = np.array([(2.3 + rng.exponential(2, n)).sum() for n in count])
    return part, part + length * rng.gamma(4, 0.25, rows), count.sum()


@pytest.mark.parametrize(("rows", "per_row"), [(20, 1.0), (100, 0.2), (100, 2.0)])
def test_coverage(rows, per_row, monkeypatch):
    monkeypatch.setattr(paired, "RESAMPLES", 499)
    rng = np.random.default_rng(1)
    part, whole, _ = draw(rng, 100_000, per_row)
    truth, held = part.sum() / whole.sum(), []
    for _ in range(TRIALS):
        part, whole, count = draw(rng, rows, per_row)
        if count >= interval.MIN_CONFLICTS:
            found = interval_of(part, whole)
            held.append(found.low <= truth <= found.high)
    assert len(held) > TRIALS / 2
    assert np.mean(held) > 0.9


def test_many_rows_are_put_together_and_the_interval_stays(monkeypatch):
    part, whole, _ = draw(np.random.default_rng(0), 3000, 0.5)
    found = []
    for clusters in (3000, 1000):
        monkeypatch.setattr(interval, "CLUSTERS", clusters)
        found.append(interval_of(part, whole))
    every, together = found
    assert together.high - together.low == pytest.approx(every.high - every.low, rel=0.15)
