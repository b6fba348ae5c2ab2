"""The rule: its line and interval against a peer, and how often the interval holds one more run."""

import numpy as np
import pytest
from scipy import stats

from eaft.inspection.find.rule import Rule


def test_the_line_is_the_least_squares_line():
    doses, changes = [0.1, 0.25, 0.3, 0.6, 0.75], [0.03, -0.02, -0.1, -0.15, -0.3]
    peer = stats.linregress(doses, changes)
    rule = Rule.fit(doses, changes)
    assert (rule.slope, rule.intercept) == pytest.approx((peer.slope, peer.intercept))
    # The interval for one more is that of the mean, and the spread around the line
    at = 0.5
    residuals = np.array(changes) - peer.intercept - peer.slope * np.array(doses)
    variance = (residuals**2).sum() / 3
    x = np.stack([np.ones(5), doses], axis=1)
    leverage = np.array([1, at]) @ np.linalg.inv(x.T @ x) @ np.array([1, at])
    half = stats.t.ppf(0.975, 3) * np.sqrt(variance * (1 + leverage))
    found = rule.expect(at)
    assert found.change == pytest.approx(peer.intercept + peer.slope * at)
    assert (found.low, found.high) == pytest.approx((found.change - half, found.change + half))


def test_beyond_what_was_measured_it_is_the_nearest_measured():
    rule = Rule.fit([0.2, 0.4, 0.6], [0.0, -0.11, -0.2])
    assert rule.expect(0.9) == rule.expect(0.6)
    assert rule.expect(0.0) == rule.expect(0.2)


def test_95_of_100_intervals_hold_one_more_run():
    rng = np.random.default_rng(0)
    doses = np.array([0.02, 0.2, 0.3, 0.45, 0.6, 0.75])
    held = 0
    for _ in range(4000):
        rule = Rule.fit(list(doses), list(-0.3 * doses + rng.normal(0, 0.05, len(doses))))
        found = rule.expect(0.5)
        held += found.low <= -0.15 + rng.normal(0, 0.05) <= found.high
    assert held / 4000 == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors
