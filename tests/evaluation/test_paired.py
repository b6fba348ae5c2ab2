"""
Paired statistics against hand counts, peers' tests, and simulation: coverage, error rate, power.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from eaft.evaluation import paired
from eaft.evaluation.paired import (
    beyond_chance,
    bootstrap_interval,
    bootstrap_test,
    drop_test,
    holm,
    items_needed,
    mean_change,
    mean_interval,
    paired_change,
    smallest_drop,
)


@pytest.fixture
def few_resamples(monkeypatch):
    """
    For simulations of intervals: the intervals differ little, and the tests beside them are not
    looked at.
    """
    monkeypatch.setattr(paired, "RESAMPLES", 399)


@pytest.fixture
def no_tests(monkeypatch):
    """For simulations of the intervals of scores: the tests beside them take most of the time."""
    monkeypatch.setattr(paired, "swap_test", lambda base, tuned: 1.0)
    monkeypatch.setattr(paired.stats, "binomtest", lambda *args: SimpleNamespace(pvalue=1.0))


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
        assert change.lost == change.gained == 0
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


@pytest.mark.parametrize(
    ("n", "p_lost", "p_gained"), [(20, 0.1, 0.1), (30, 0.1, 0.05), (100, 0.2, 0.2), (300, 0.02, 0)]
)
def test_interval_covers_the_true_change(n, p_lost, p_gained, no_tests):
    """
    Of 2,000 simulated comparisons about 95% of the intervals hold the truth (three standard errors:
    1.5%).
    """
    rng = np.random.default_rng(1)
    changes = [paired_change(*simulate(rng, n, p_lost, p_gained)) for _ in range(2000)]
    covered = np.mean([c.low <= p_gained - p_lost <= c.high for c in changes])
    assert 0.935 <= covered <= 0.985


# Differences of graded scores: their values, and how likely each is where a score changes at all.
# Of the last, a sample may hold none of the large ones, which no interval can know of
GRADED = {
    "both ways": ([-1, -2 / 3, -1 / 3, 1 / 3, 2 / 3, 1], [0.10, 0.15, 0.35, 0.25, 0.10, 0.05]),
    "losses only": ([-1, -1 / 2, -1 / 4], [0.2, 0.3, 0.5]),
    "small losses, few large gains": (
        [-0.02, -0.05, -0.1, -0.3, 0.5, 1],
        [0.3, 0.3, 0.2, 0.1, 0.07, 0.03],
    ),
}


@pytest.mark.parametrize(("law", "least"), zip(GRADED, (0.93, 0.93, 0.87), strict=True))
def test_interval_of_graded_scores_covers_the_true_change(law, least, no_tests):
    """
    With many scores that do not change, as graded scores have; 1,000 trials each, three standard
    errors: 2.1%.
    """
    values, chances = GRADED[law]
    rng = np.random.default_rng(2)
    for n, changed in ((20, 0.5), (20, 1), (100, 0.1), (1000, 0.03)):
        difference = rng.choice(
            [0, *values], p=[1 - changed, *(changed * np.array(chances))], size=(1000, n)
        )
        truth = changed * np.dot(values, chances)
        found = [paired_change(np.maximum(-d, 0), np.maximum(d, 0)) for d in difference]
        covered = np.mean([c.low <= truth <= c.high for c in found])
        assert least <= covered <= 0.997, (n, changed)


def test_interval_of_a_mean_over_tasks_covers_the_true_change(no_tests):
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(600):
        pairs = [simulate(rng, n, p, 0.05) for n, p in ((40, 0.15), (120, 0.1), (300, 0.05))]
        mean = mean_change([paired_change(*pair) for pair in pairs], pairs)
        covered += mean.low <= -(0.10 + 0.05 + 0.0) / 3 <= mean.high
    assert 0.93 <= covered / 600 <= 0.985


def test_swapping_finds_what_mcnemar_finds():
    """On scores of 0 and 1 the test by swapping is McNemar's; ours must agree where both apply."""
    before, after = scores(20, 13, 4, 30)
    exact = paired_change(before, after).p_value
    graded = paired_change(before * 0.5, after * 0.5)  # the same differences, halved
    assert graded.p_value == pytest.approx(
        exact, abs=4 * math.sqrt(exact * (1 - exact) / 9999) + 2e-4
    )
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


def answers(rng, state, choices, alike=0.0):
    """Scores before and after of items known to both (0), forgotten (1), learned (2) or never known
    (3), else guessed;
    `alike`: the share of never-known items that both models guess alike."""
    before, after = (
        np.where(np.isin(state, known), 1.0, rng.random(state.shape) < 1 / choices)
        for known in ([0, 1], [0, 2])
    )
    return before, np.where((state == 3) & (rng.random(state.shape) < alike), before, after)


def test_chance_is_taken_out():
    """
    Items known with certainty or guessed: the corrected counts find how many were known and lost
    (or learned).
    """
    rng = np.random.default_rng(4)
    n = 40000
    choices = rng.integers(2, 6, size=n)
    state = rng.choice(4, size=n, p=[0.5, 0.1, 0.04, 0.36])
    change = paired_change(*answers(rng, state, choices), choices)
    # The standard error of the corrected counts is about 120 items
    assert change.lost > 0.13 * n
    assert change.lost_beyond_chance.estimate == pytest.approx(0.1 * n, abs=400)
    assert change.gained_beyond_chance.estimate == pytest.approx(0.04 * n, abs=400)


@pytest.mark.parametrize(("n", "c"), [(50, 2), (50, 3), (50, 5), (200, 4), (1000, 2), (1000, 5)])
def test_interval_beyond_chance_covers_and_the_estimate_has_no_bias(n, c):
    """
    2,000 simulated tasks each: standard error of a coverage 0.5%, of a mean that of the estimates /
    45.
    """
    rng = np.random.default_rng(8)
    for forgotten, never in ((0, 0.1), (0, 0.5), (0.02, 0.3), (0.1, 0.05), (0.3, 0.5)):
        state = rng.choice([0, 1, 3], size=(2000, n), p=[1 - forgotten - never, forgotten, never])
        found = [
            beyond_chance(b, a, np.full(n, c))
            for b, a in zip(*answers(rng, state, np.array(c)), strict=True)
        ]
        covered = np.mean([e.low <= forgotten * n <= e.high for e in found])
        assert covered >= 0.935, (forgotten, never)
        estimates = np.array([e.estimate for e in found])
        assert abs(estimates.mean() - forgotten * n) < 4 * estimates.std() / math.sqrt(2000)
        if forgotten == 0:  # cut at 0, it would find something lost where nothing was
            assert np.maximum(estimates, 0).mean() > 4 * estimates.std() / math.sqrt(2000)


def test_models_that_guess_alike_are_told_a_lower_bound():
    rng = np.random.default_rng(9)
    n, choices = 40000, np.array(4)
    state = rng.choice([0, 1, 3], size=n, p=[0.5, 0.1, 0.4])
    found = [
        beyond_chance(*answers(rng, state, choices, alike), np.full(n, 4)) for alike in (0, 0.5, 1)
    ]
    assert found[0].estimate > found[1].estimate > found[2].estimate
    assert found[1].high < 0.1 * n


def test_chance_by_hand_and_refusal():
    before, after = scores(1, 4, 0, 3)
    lost, gained = (
        beyond_chance(*sides, np.full(8, 4)) for sides in ((before, after), (after, before))
    )
    assert lost.estimate == pytest.approx((4 - 3 / 3) * 4 / 3)
    assert gained.estimate == pytest.approx((0 - 3 / 3) * 4 / 3)  # not cut at 0
    # One lost (4/3) and one missed by both (-4/9) added, of then 5 and 4 in 10 items
    mean = (5 * 4 / 3 - 4 * 4 / 9) / 10
    half = (
        stats.norm.ppf(0.975)
        * math.sqrt((5 * (4 / 3) ** 2 + 4 * (4 / 9) ** 2) / 10 - mean**2)
        / math.sqrt(10)
    )
    assert (lost.low, lost.high) == pytest.approx((8 * (mean - half), 8 * (mean + half)))
    with pytest.raises(ValueError, match="fewer than two choices"):
        beyond_chance(before, after, np.ones(8))


@pytest.mark.parametrize("n", [100, 400, 1500])
def test_smallest_drop_is_found_four_times_in_five(n):
    """
    With as much disagreement as was seen, a true drop of that size is significant in about 80% of
    simulations.
    """
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
    low, high = mean_interval(np.array([0.5, 0.5]))  # two items alike are no certainty
    assert 0.1 < low < 0.3 < 0.7 < high < 0.9


@pytest.mark.parametrize("n", [20, 1000])
def test_interval_of_a_mean_covers_it(n):
    """
    Scores of 0 and 1 (Wilson), and graded ones; 2,000 trials each, three standard errors: 1.5%.
    """
    rng = np.random.default_rng(10)
    laws = {
        "right or wrong": (rng.random((2000, n)) < 0.3, 0.3),
        "spread": (rng.random((2000, n)), 0.5),
        "half of them 0": (np.where(rng.random((2000, n)) < 0.5, 0, rng.random((2000, n))), 0.25),
        "nearly all 1": (
            np.where(rng.random((2000, n)) < 0.05, rng.choice([0, 0.5], (2000, n)), 1),
            0.9625,
        ),
        "thirds": (rng.choice([0, 1 / 3, 2 / 3, 1], p=[0.7, 0.1, 0.1, 0.1], size=(2000, n)), 0.2),
    }
    for name, (sample, truth) in laws.items():
        intervals = [mean_interval(scores) for scores in sample]
        assert 0.93 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.99, name


def test_interval_of_graded_scores_takes_no_side():
    """
    Where all that changed went from 0 to 1, the interval is the mirror of that where it went from 1
    to 0.
    """
    before = np.array([0.0] * 3 + [0.5] * 17)
    after = np.array([1.0] * 3 + [0.5] * 17)
    gain, loss = paired_change(before, after), paired_change(after, before)
    assert (gain.low, gain.high) == pytest.approx((-loss.high, -loss.low))
    assert gain.low < 0.15 < gain.high
    same = paired_change(before, before)
    assert (same.change, same.p_value) == (0, 1)
    assert -same.low == same.high == pytest.approx(stats.norm.ppf(0.975) * math.sqrt(2) / 22)


def test_interval_of_a_ratio_of_sums():
    """
    By the textbook's standard error of a ratio (linearised), where items are many; sums go with
    their counts.
    """
    rng = np.random.default_rng(7)
    counts = rng.integers(4, 400, size=400)
    sums = counts * rng.lognormal(0, 0.2, size=400)
    ratio = sums.sum() / counts.sum()
    error = math.sqrt(((sums - ratio * counts) ** 2).sum()) / counts.sum()
    low, high = bootstrap_interval(sums, counts)
    assert (high - low) / 2 == pytest.approx(stats.norm.ppf(0.975) * error, rel=0.05)
    assert (low + high) / 2 == pytest.approx(ratio, abs=0.2 * error)
    assert bootstrap_interval(3.0 * counts, counts) == (3, 3)
    low, high = bootstrap_interval(0.1 * counts, counts)  # alike but for rounding
    assert low == high == pytest.approx(0.1)
    assert bootstrap_interval(sums[:1], counts[:1]) == (sums[0] / counts[0], sums[0] / counts[0])


@pytest.mark.parametrize(
    ("n", "spread", "answers_each", "least"),
    [
        (128, 0.36, 1, 0.93),
        (128, 0.67, 1, 0.92),
        (128, 0.67, 4, 0.92),
        (32, 0.5, 1, 0.93),
        (128, 1.0, 1, 0.91),
    ],
)
def test_interval_of_drift_covers_it(n, spread, answers_each, least, few_resamples):
    """
    Per-prompt drifts like those of benchmarks/replication: log-normal, the logarithm's standard
    deviation 0.36 to 0.67 (median 0.51), the answers' lengths very different and cut at 128, drift
    smaller in longer answers; then one far heavier (1.0). 1,000 trials each: three standard errors
    2.1% (10,000 find 93 to 95%, and 93% for the heavy one).
    """
    rng = np.random.default_rng(11)
    # Less what answers differ within a prompt (trigamma(16)), and by their length
    between = math.sqrt(spread**2 - 0.0645 - 0.02)

    def draw(size):
        tokens = np.minimum(np.ceil(rng.lognormal(4.2, 0.9, (*size, answers_each))), 128)
        drift = (
            rng.lognormal(0, between, (*size, 1))
            * rng.gamma(16, 1 / 16, tokens.shape)
            * (tokens / 60) ** -0.2
        )
        return (drift * tokens).sum(-1), tokens.sum(-1)

    sums, counts = draw((100_000,))
    truth = sums.sum() / counts.sum()
    intervals = [bootstrap_interval(s, c) for s, c in zip(*draw((1000, n)), strict=True)]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert least <= covered <= 0.97


@pytest.mark.parametrize(("n", "least"), [(32, 0.9), (128, 0.925)])
def test_interval_of_a_change_of_nll_covers_it(n, least, few_resamples):
    """
    Rows of very different lengths whose nll fell by 0.4 on average, most of them about so much and
    a few much more or less (Student's t of 4 degrees of freedom). 500 trials: three standard errors
    are 3%.
    """
    rng, mean = np.random.default_rng(13), -0.4

    def draw(size):
        tokens = np.ceil(rng.lognormal(4, 0.8, size))
        return tokens * (mean + 0.4 * rng.standard_t(4, size) / np.sqrt(2)), tokens

    sums, counts = draw((500, n))
    intervals = [bootstrap_interval(s, c) for s, c in zip(sums, counts, strict=True)]
    covered = np.mean([low <= mean <= high for low, high in intervals])
    assert least <= covered <= 0.97


def test_drift_is_tested_as_its_interval_says():
    rng = np.random.default_rng(12)
    counts = rng.integers(4, 129, size=128)
    sums = counts * rng.lognormal(0, 0.6, size=128)
    low, high = bootstrap_interval(sums, counts)
    assert bootstrap_test(sums, counts, low) == pytest.approx(0.05, abs=0.001)
    assert bootstrap_test(sums, counts, high) == pytest.approx(0.05, abs=0.001)
    assert (
        bootstrap_test(sums, counts, low - 1e-3) < 0.05 < bootstrap_test(sums, counts, low + 1e-3)
    )
    assert bootstrap_test(sums, counts, sums.sum() / counts.sum()) > 0.8
    assert bootstrap_test(sums[:1], counts[:1], 0.0) == 1.0  # one prompt is no evidence


def test_holm_by_hand():
    # In order: 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1, which is not below the one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_a_drop_beyond_a_margin_is_tested_as_the_interval_says():
    changes = [
        paired_change(*scores(200, 40, 10, 50)),
        paired_change(np.linspace(0.3, 1, 50), np.linspace(0, 0.9, 50)),
    ]
    for change in changes:
        assert drop_test(change, 0) == change.p_value
        assert drop_test(change, -change.high) == pytest.approx(0.05)
        assert (
            drop_test(change, -change.high - 1e-3) < 0.05 < drop_test(change, -change.high + 1e-3)
        )
    # Not significant as a change (9 lost, 2 gained), whatever a test about a small margin may find
    change = paired_change(*scores(20, 9, 2, 9))
    assert drop_test(change, 1e-9) >= change.p_value > 0.05


@pytest.mark.parametrize(("n", "gained"), [(50, 0.2), (200, 0.0), (200, 0.2), (1000, 0.05)])
def test_a_drop_of_the_margin_is_found_too_large_in_less_than_2_5_percent(n, gained):
    """And one well beyond is found. 4,000 trials: three standard errors of 2.5% are 0.7%."""
    rng = np.random.default_rng(13)
    for margin in (0.01, 0.05):

        def found(drop, margin=margin):
            counts = rng.multinomial(n, [gained + drop, gained, 1 - 2 * gained - drop], size=4000)
            kinds, times = np.unique(counts, axis=0, return_counts=True)
            changes = [paired_change(*scores(0, *kind)) for kind in kinds]
            return (
                times @ [drop_test(c, margin) < 0.05 and c.change < -margin for c in changes] / 4000
            )

        assert found(margin) <= 0.032
        assert found(margin + 3.5 * math.sqrt((2 * gained + 0.15) / n) + 0.02) > 0.8


def test_items_needed_is_the_inverse_of_the_smallest_drop():
    for change in (paired_change(*scores(200, 40, 10, 50)), paired_change(*scores(60, 0, 0, 40))):
        assert items_needed(change, change.smallest_drop) == pytest.approx(change.n, abs=1)
        assert items_needed(change, change.smallest_drop / 3) > 2.9 * change.n


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
