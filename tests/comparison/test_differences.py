"""
Differences over seeds and items: by hand, against t-tests where only one of the two varies, and by
simulation.
"""

import numpy as np
import pytest
from scipy import stats

from eaft.comparison import differences
from eaft.comparison.differences import over_seeds, ratio_difference, score_difference


def simulate(rng, seeds, items, share, rest):
    """
    Each seed's sums of differences by prompt, true mean 0, and the prompts' tokens.

    Of the variance of the mean, `share` is the seeds' and the remainder the prompts' (skewed, as
    drift is), and beside both, `rest` is of each prompt under each seed.
    """
    tokens = rng.integers(20, 65, items)
    by_seed = rng.normal(size=(seeds, 1)) * np.sqrt(share * seeds)
    by_prompt = (rng.exponential(size=items) - 1) * np.sqrt((1 - share) * items)
    noise = rng.normal(size=(seeds, items)) * rest * np.sqrt(items)
    return (by_seed + by_prompt + noise) * tokens, tokens


@pytest.mark.parametrize(("seeds", "most"), [(2, 0.985), (3, 0.98), (5, 0.975)])
def test_interval_covers_with_few_seeds(seeds, most, monkeypatch):
    """
    Whatever part of the variance is the seeds': of 500 intervals 95% hold the truth (three standard
    errors: 2.9%).

    With two seeds some are wider than they need be; a percentile bootstrap of two seeds would cover
    half of the time where the seeds are all that varies: its interval goes from one to the other.
    """
    monkeypatch.setattr(differences, "p_value", lambda *args: 1.0)  # it takes most of the time
    rng = np.random.default_rng(seeds)
    for share, rest in ((0.0, 0.0), (0.0, 0.7), (0.3, 0.3), (0.7, 0.3), (0.95, 0.0), (1.0, 0.0)):
        found = []
        for _ in range(500):
            sums, tokens = simulate(rng, seeds, 96, share, rest)
            found.append(ratio_difference(sums, np.zeros_like(sums), tokens))
        covered = np.mean([d.low <= 0 <= d.high for d in found])
        assert 0.92 <= covered <= most + 0.01, (share, rest, covered)


def test_the_test_and_the_interval_are_one_rule():
    rng, shown = np.random.default_rng(6), 0
    for _ in range(200):
        sums, tokens = simulate(rng, 3, 96, 0.3, 0.3)
        found = ratio_difference(sums + tokens, np.zeros_like(sums), tokens)
        assert (found.p_value < 0.05) == (found.low > 0 or found.high < 0)
        shown += found.p_value < 0.05
    assert 20 < shown < 180


def test_seeds_alone_are_a_t_test_of_the_seeds():
    rng = np.random.default_rng(0)
    per_seed = rng.normal(size=4) + 1
    found = over_seeds(per_seed, np.zeros((4, 4)), 50)
    peer = stats.ttest_1samp(per_seed, 0)
    interval = peer.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p_value == pytest.approx(peer.pvalue)


def test_items_alone_are_a_t_test_of_the_items():
    """Every seed gives the same: then more seeds add nothing."""
    difference = np.random.default_rng(1).normal(size=30) + 0.3
    found = ratio_difference(np.tile(difference, (3, 1)), np.zeros((3, 30)), np.ones(30))
    peer = stats.ttest_1samp(difference, 0)
    interval = peer.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p_value == pytest.approx(peer.pvalue, rel=1e-6)
    assert (found.items, found.seeds) == (30, 3)


def test_variances_by_hand():
    """
    Two seeds, three items; Cochran and Cox's t weighs 12.706 (one degree of freedom) and 4.303
    (two).
    """
    difference = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 3.0]])
    found = ratio_difference(difference, np.zeros((2, 3)), np.ones(3))
    by_seed = (2 - 2.5) ** 2 + (3 - 2.5) ** 2  # sample variance of the seeds' means
    by_item = (-1 * -1 + 0 * 1 + 1 * 0) / 2  # covariance of the two seeds over items
    variances = np.array([by_seed / 2, by_item / 3])
    critical = variances @ [12.7062, 4.30265] / variances.sum()
    assert found.change == pytest.approx(2.5)
    assert found.high - found.change == pytest.approx(critical * np.sqrt(variances.sum()), rel=1e-5)


def test_an_objective_beside_itself():
    scores = np.random.default_rng(2).integers(0, 2, (2, 40)).astype(float)
    found = score_difference([(scores, scores)])
    assert (found.change, found.p_value) == (0, 1)
    assert found.low == -found.high < 0  # 40 items that do not change are not all items
    drift = ratio_difference(scores, scores, np.full(40, 7))
    assert (drift.change, drift.low, drift.high, drift.p_value) == (0, 0, 0, 1)


def test_scores_cover_and_tasks_weigh_alike():
    """
    Two tasks of different size; each seed moves both, items are lost and gained: 400 intervals, as
    above.
    """
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(400):
        seed_effect = rng.normal(size=(3, 1)) * 0.03
        tasks = []
        for n, drop in ((60, 0.1), (200, 0.02)):
            ability = rng.beta(2, 1, size=n)
            first = (rng.random((3, n)) < np.clip(ability - drop + seed_effect, 0, 1)).astype(float)
            second = (rng.random((3, n)) < ability).astype(float)
            tasks.append((first, second))
        found = score_difference(tasks)
        each = [(first - second).mean() for first, second in tasks]
        assert found.change == pytest.approx(np.mean(each))
        covered.append(found.low <= -0.06 <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.99


def test_one_seed_is_the_evaluations_own_interval():
    from eaft.evaluation.paired import bootstrap_interval

    sums, tokens = simulate(np.random.default_rng(4), 1, 40, 0.0, 0.5)
    found = ratio_difference(sums, np.zeros_like(sums), tokens)
    assert (found.low, found.high) == bootstrap_interval(sums[0], tokens)
    assert found.seeds == 1


def test_one_item_is_no_error_and_says_next_to_nothing():
    """As a trial run with one item of each task has it (`limit: 1`), with several seeds."""
    ones, zeros = np.ones((2, 1)), np.zeros((2, 1))
    for first, second in ((ones, zeros), (ones, ones), (ones, np.array([[0.0], [1.0]]))):
        found = score_difference([(first, second)])
        assert (found.low, found.high) == (-1, 1)
        assert found.p_value > 0.5
