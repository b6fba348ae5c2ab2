"""Paired statistics against hand counts, peers' tests, and simulation: coverage, error rate, power."""

import math

import numpy as np
import pytest
from scipy import stats

from eaft.evaluation.paired import (
    beyond_chance,
    bootstrap_interval,
    combine,
    mean_change,
    mean_interval,
    paired_change,
    smallest_drop,
)


def scores(both, lost, gained, neither):
    """Items right for both, before only, after only, for neither."""
    before = [1] * both + [1] * lost + [0] * gained + [0] * neither
    after = [1] * both + [0] * lost + [1] * gained + [0] * neither
    return np.array(before), np.array(after)


def test_counts_and_exact_mcnemar_by_hand():
    change = paired_change(*scores(20, 9, 2, 9))
    assert (change.n, change.lost, change.gained) == (40, 9, 2)
    assert change.before == 29 / 40
    assert change.after == 22 / 40
    assert change.change == pytest.approx(-7 / 40)
    # Of 11 items that differ, 2 or fewer on one side, twice: sum of binomial coefficients over 2^11
    assert change.p_value == pytest.approx(2 * sum(math.comb(11, k) for k in range(3)) / 2**11)
    # Bonett and Price: one item added to each kind of disagreement
    p12, p21 = 10 / 42, 3 / 42
    half = stats.norm.ppf(0.975) * math.sqrt((p12 + p21 - (p21 - p12) ** 2) / 42)
    assert (change.low, change.high) == pytest.approx((p21 - p12 - half, p21 - p12 + half))


def test_a_model_beside_itself_has_not_changed():
    for values in (np.array([1, 0, 1, 1, 0]), np.array([0.5, 0.25, 1.0, 0.0])):
        change = paired_change(values, values, np.full(len(values), 4))
        assert change.change == 0
        assert change.p_value == 1
        assert change.low <= 0 <= change.high
        assert change.lost == change.gained == change.lost_beyond_chance == change.gained_beyond_chance == 0
        mean = mean_change([change, change], [(values, values)] * 2)
        assert (mean.change, mean.p_value) == (0, 1)


def test_unpaired_or_missing_scores_are_refused():
    for before, after in (([], []), ([1], [1, 0]), ([math.nan], [1])):
        with pytest.raises(ValueError, match="finite scores of the same items"):
            paired_change(np.array(before), np.array(after))


def simulate(rng, n, p_lost, p_gained):
    kind = rng.choice(3, size=n, p=[p_lost, p_gained, 1 - p_lost - p_gained])
    before = np.where(kind == 0, 1, np.where(kind == 1, 0, rng.integers(0, 2, n)))
    return before, np.where(kind == 0, 0, np.where(kind == 1, 1, before))


@pytest.mark.parametrize(("n", "p_lost", "p_gained"), [(30, 0.1, 0.05), (100, 0.2, 0.2), (300, 0.02, 0.0)])
def test_interval_covers_the_true_change(n, p_lost, p_gained):
    """Of 2,000 simulated comparisons about 95% of the intervals hold the truth (three standard errors: 1.5%)."""
    rng = np.random.default_rng(1)
    changes = [paired_change(*simulate(rng, n, p_lost, p_gained)) for _ in range(2000)]
    covered = np.mean([c.low <= p_gained - p_lost <= c.high for c in changes])
    assert 0.935 <= covered <= 0.985


def test_interval_of_graded_scores_covers_the_true_change():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        before = rng.beta(2, 2, size=60)
        after = np.clip(before + rng.normal(-0.05, 0.1, size=60), -10, 10)
        change = paired_change(before, after)
        covered += change.low <= -0.05 <= change.high
    assert 0.90 <= covered / 200 <= 0.99  # three standard errors of 200 trials: 4.6%


def test_interval_of_a_mean_over_tasks_covers_the_true_change():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(1000):
        pairs = [simulate(rng, n, p, 0.05) for n, p in ((40, 0.15), (120, 0.1), (300, 0.05))]
        _, low, high = combine([paired_change(*pair) for pair in pairs])
        covered += low <= -(0.10 + 0.05 + 0.0) / 3 <= high
    assert 0.93 <= covered / 1000 <= 0.985


def test_swapping_finds_what_mcnemar_finds():
    """On scores of 0 and 1 the test by swapping is McNemar's; ours must agree where both apply."""
    before, after = scores(20, 13, 4, 30)
    exact = paired_change(before, after).p_value
    graded = paired_change(before * 0.5, after * 0.5)  # the same differences, halved
    assert graded.p_value == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 9999) + 2e-4)
    assert graded.change == pytest.approx(-9 / 67 / 2)


def test_mean_weighs_tasks_alike_whatever_their_size():
    small, large = scores(5, 5, 0, 0), scores(50, 0, 40, 10)
    mean = mean_change([paired_change(*small), paired_change(*large)], [small, large])
    assert mean.change == pytest.approx((-0.5 + 0.4) / 2)
    assert mean.before == pytest.approx((1.0 + 0.5) / 2)
    assert (mean.n, mean.lost, mean.gained) == (110, 5, 40)
    assert mean.p_value > 0.05
    alone = mean_change([paired_change(*small)], [small])
    assert (alone.low, alone.high, alone.p_value) == pytest.approx(
        (paired_change(*small).low, paired_change(*small).high, paired_change(*small).p_value)
    )


def test_chance_is_taken_out():
    """Items known with certainty or guessed: the corrected counts find how many were known and lost (or learned)."""
    rng = np.random.default_rng(4)
    n = 40000
    choices = rng.integers(2, 6, size=n)
    state = rng.choice(4, size=n, p=[0.5, 0.1, 0.04, 0.36])  # known to both, forgotten, learned, never known

    def answer(known):
        return np.where(known, 1, rng.random(n) < 1 / choices).astype(float)

    before, after = answer((state == 0) | (state == 1)), answer((state == 0) | (state == 2))
    change = paired_change(before, after, choices)
    # The standard error of the corrected counts is about 120 items
    assert change.lost > 0.13 * n
    assert change.lost_beyond_chance == pytest.approx(0.1 * n, abs=400)
    assert change.gained_beyond_chance == pytest.approx(0.04 * n, abs=400)


def test_chance_by_hand_and_refusal():
    before, after = scores(1, 4, 0, 3)
    assert beyond_chance(before, after, np.full(8, 4)) == pytest.approx((4 - 3 / 3) * 4 / 3)
    assert beyond_chance(after, before, np.full(8, 4)) == 0
    with pytest.raises(ValueError, match="fewer than two choices"):
        beyond_chance(before, after, np.ones(8))


@pytest.mark.parametrize("n", [100, 400, 1500])
def test_smallest_drop_is_found_four_times_in_five(n):
    """With as much disagreement as was seen, a true drop of that size is significant in about 80% of simulations."""
    seen = paired_change(*simulate(np.random.default_rng(5), n, 0.1, 0.1))
    drop = seen.smallest_drop
    disagreement = (seen.lost + seen.gained) / n
    rng = np.random.default_rng(6)
    p_lost = (disagreement + drop) / 2
    found = [paired_change(*simulate(rng, n, p_lost, max(p_lost - drop, 0.0))) for _ in range(1000)]
    power = np.mean([c.p_value < 0.05 and c.change < 0 for c in found])
    assert 0.70 <= power <= 0.88  # the exact test is a little conservative in small samples
    assert smallest_drop(0.0, n) == pytest.approx((1.959964 + 0.841621) ** 2 / n, rel=1e-5)


def test_interval_of_a_mean():
    low, high = mean_interval(np.array([1] * 8 + [0] * 2))
    # Wilson's by its own formula
    z, n, p = stats.norm.ppf(0.975), 10, 0.8
    centre, half = (
        (p + z**2 / (2 * n)) / (1 + z**2 / n),
        z / (1 + z**2 / n) * math.sqrt(p * 0.2 / n + z**2 / (4 * n**2)),
    )
    assert (low, high) == pytest.approx((centre - half, centre + half))
    assert mean_interval(np.array([0.5, 0.5])) == (0.5, 0.5)


def test_interval_of_graded_scores_takes_no_side():
    """Where all that changed went from 0 to 1, the interval is the mirror of that where it went from 1 to 0."""
    before = np.array([0.0] * 3 + [0.5] * 17)
    after = np.array([1.0] * 3 + [0.5] * 17)
    gain, loss = paired_change(before, after), paired_change(after, before)
    assert (gain.low, gain.high) == pytest.approx((-loss.high, -loss.low))
    assert 0 < gain.low < 0.15 < gain.high
    same = paired_change(before, before)
    assert (same.change, same.p_value) == (0, 1)
    assert -same.low == same.high == pytest.approx(stats.norm.ppf(0.975) * math.sqrt(2) / 22)


def test_interval_of_a_ratio_of_sums():
    """By the textbook's standard error of a ratio (linearised), where items are many; sums go with their counts."""
    rng = np.random.default_rng(7)
    counts = rng.integers(4, 400, size=400)
    sums = counts * rng.lognormal(0, 0.2, size=400)
    ratio = sums.sum() / counts.sum()
    error = math.sqrt(((sums - ratio * counts) ** 2).sum()) / counts.sum()
    low, high = bootstrap_interval(sums, counts)
    assert (high - low) / 2 == pytest.approx(stats.norm.ppf(0.975) * error, rel=0.05)
    assert (low + high) / 2 == pytest.approx(ratio, abs=0.2 * error)
    assert bootstrap_interval(3.0 * counts, counts) == (3, 3)
    assert bootstrap_interval(sums[:1], counts[:1]) == (sums[0] / counts[0], sums[0] / counts[0])


def test_a_single_item_that_differs_is_no_evidence():
    before, after = np.full(50, 0.5), np.full(50, 0.5)
    after[-1] = 0.4
    found = paired_change(before, after)
    assert found.p_value == 1.0  # of two swaps both are as far from 0
    assert found.low < found.change < found.high


def test_items_that_all_change_alike_are_no_certainty():
    found = paired_change(np.full(3, 0.5), np.full(3, 0.1))
    assert found.p_value == pytest.approx(2 / 2**3)  # two of the eight sign patterns
    assert found.low < found.change < found.high
