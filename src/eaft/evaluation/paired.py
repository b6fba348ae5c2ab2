"""
Two models on the same items: what changed, how sure that is, what was lost and what was gained.

All scores are per item, in [0, 1]; `base` and `tuned` are in the same order. An average hides
losses that gains cancel, so both are counted; two models that saw the same items are compared item
by item, since most of an item's difficulty is shared.

Whether a change is shown is decided by p, adjusted for the number of tasks (`holm`); an interval
says how large it may be. Every interval's coverage is simulated in
`tests/evaluation/test_paired.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from scipy import stats

from eaft.evaluation.results import Change, Estimate

Z = float(stats.norm.ppf(0.975))
# How many standard errors from 0 a change must be, to be shown four times in five
DETECTABLE = Z + float(stats.norm.ppf(0.8))
RESAMPLES = 9999
ALPHA = 0.05  # a change is shown if p, adjusted for the number of tasks, is below
# With fewer, simulated intervals cover less than 92% also in ordinary cases
FEWEST_ITEMS = 20
FEWEST_PROMPTS = 32


def few_items(items: Mapping[str, int]) -> str | None:
    """
    Return a warning of intervals that rest on too few items; None if all have enough.

    Args:
        items: the number of items by task.
    """
    few = [task for task, number in items.items() if number < FEWEST_ITEMS]
    if not few:
        return None
    return (
        f"Fewer than {FEWEST_ITEMS} items, so that the interval is not to be relied on:"
        f" {', '.join(few)}."
    )


def few_prompts(number: int, what: str = "prompts") -> str | None:
    """
    Return the warning of an interval by a bootstrap of prompts; None if there are enough.

    Args:
        what: is drawn: prompts, or rows.
    """
    if number >= FEWEST_PROMPTS:
        return None
    return f"Fewer than {FEWEST_PROMPTS} {what}: the interval is not to be relied on."


def paired_change(
    base: np.ndarray, tuned: np.ndarray, num_choices: np.ndarray | None = None
) -> Change:
    """
    Compare two models on one task.

    The test is McNemar's, exact, for scores that are 0 or 1, and for others a sign-flip test
    (scipy's, seeded).

    The interval is Bonett and Price's (2012, "Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data"): one lost and one gained item are added, so that no
    change in few items is not taken for certainty. For other scores the two added are as large as
    the largest difference seen. It covers 93 to 98% from 20 items on, more where few items differ;
    and 87 to 93% where it depends on a few large differences, which a sample may miss (a bootstrap,
    plain, BCa or studentised, covers 30 to 90% there).

    Args:
        base, tuned: scores `[n]` of the same items, in the same order.
        num_choices: `[n]`, where the task is multiple choice: how many choices each item has.

    Raises:
        ValueError: there are no items, or a score is not finite.
    """
    base, tuned = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    n = len(base)
    if n == 0 or len(tuned) != n or not np.isfinite([base, tuned]).all():
        raise ValueError(f"Expected finite scores of the same items, got {n} and {len(tuned)}.")
    difference = tuned - base
    lost, gained = int((difference < 0).sum()), int((difference > 0).sum())
    if is_binary(base) and is_binary(tuned):
        p_value = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    else:
        p_value = swap_test(base, tuned)
    largest = float(np.abs(difference).max()) or 1.0
    centre, error = mean_of_more(difference, [largest, -largest])
    return Change(
        n=n,
        before=float(base.mean()),
        after=float(tuned.mean()),
        change=float(difference.mean()),
        low=max(centre - Z * error, -1.0),
        high=min(centre + Z * error, 1.0),
        p_value=float(p_value),
        lost=lost,
        gained=gained,
        lost_beyond_chance=None if num_choices is None else beyond_chance(base, tuned, num_choices),
        gained_beyond_chance=None
        if num_choices is None
        else beyond_chance(tuned, base, num_choices),
        smallest_drop=smallest_drop(
            float(np.append(difference, [largest, -largest]).var() + centre**2), n
        ),
    )


def mean_of_more(values: np.ndarray, more: list[float]) -> tuple[float, float]:
    """
    Return the mean of values `[n]` and a few more, and its standard error, for an adjusted Wald
    interval.
    """
    values = np.append(values, more)
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def mean_interval(scores: np.ndarray) -> tuple[float, float]:
    """
    Return the 95% interval of a mean score.

    Wilson's where all scores are 0 or 1; else Agresti and Coull's (1998), which adds two items
    right and two wrong, and covers 94 to 99% of graded scores from 10 items on.
    """
    if is_binary(scores):
        interval = stats.binomtest(int(scores.sum()), len(scores)).proportion_ci(0.95, "wilson")
        return float(interval.low), float(interval.high)
    centre, error = mean_of_more(scores, [0, 0, 1, 1])
    return max(centre - Z * error, 0.0), min(centre + Z * error, 1.0)


def bootstrap_interval(
    sums: np.ndarray, counts: np.ndarray | None = None, level: float = 0.95
) -> tuple[float, float]:
    """
    Return the interval of a mean over all that the items hold, by a studentised bootstrap of the
    items.

    The mean is sum(sums) / sum(counts), a ratio whose two parts are drawn together; a point where
    all items have the same mean. Its purpose is drift: items are prompts, positive and skewed, each
    with its own number of tokens.

    Simulated with per-prompt drifts as skewed as we measured (their logarithms have a standard
    deviation of 0.36 to 0.67), one or four answers each pooled in their prompt, it covers 93 to 95%
    with 128 prompts, and 94 to 96% with 32; with heavier tails (log-normal of 1.0, Pareto of index
    3, one prompt in twenty six times as large) 91 to 94% with 128, 88 to 92% with 32. BCa, which it
    replaced, covers 1 to 4 points less; the same on the logarithms, no more.

    Args:
        sums: `[n]`, each item's sum.
        counts: `[n]`, how many (tokens, say) each sum is of; None: one each, so that the mean is
            over items.
        level: of the interval; each end alone is a bound of level 1 - (1 - level) / 2.
    """
    mean, error, t = studentised(sums, counts)
    if error == 0:
        return mean, mean
    tail = (1 - level) / 2
    below, above = np.quantile(t, [tail, 1 - tail], method="weibull")
    low = float(mean - above * error)
    return max(low, 0.0) if (np.asarray(sums) >= 0).all() else low, float(mean - below * error)


def bootstrap_test(sums: np.ndarray, counts: np.ndarray | None, value: float) -> float:
    """
    Return the two-sided p of the hypothesis that the mean of `bootstrap_interval` is `value`: its
    inversion.
    """
    mean, error, t = studentised(sums, counts)
    if error == 0:
        return 1.0  # a single item, say: nothing to judge by
    above = (1 + (t >= (mean - value) / error).sum()) / (1 + len(t))
    below = (1 + (t <= (mean - value) / error).sum()) / (1 + len(t))
    return float(min(2 * min(above, below), 1.0))


def studentised(sums: np.ndarray, counts: np.ndarray | None) -> tuple[float, float, np.ndarray]:
    """
    Return a ratio's mean; its standard error (linearised; 0 if all items have the same mean); and
    the distance of each resample's mean from it, in that resample's standard errors.

    Resamples are seeded. A resample whose items have the same mean is left out.
    """
    s = np.asarray(sums, dtype=float)
    c = np.ones(len(s)) if counts is None else np.asarray(counts, dtype=float)
    n, mean = len(s), float(s.sum() / c.sum())
    if np.ptp(s / c) <= 1e-12 * abs(mean):
        return mean, 0.0, np.empty(0)
    s = s - mean * c  # so that means below are differences from the mean
    columns = np.stack([c, s, s**2, s * c, c**2], axis=1)

    def mean_and_error(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        total, of_s, of_s2, of_sc, of_c2 = (drawn @ columns).T
        means = of_s / total
        squares = of_s2 - 2 * means * of_sc + means**2 * of_c2  # of sum((s - mean * c)^2)
        return means, np.sqrt(np.maximum(squares, 0) * n / (n - 1)) / total

    error = float(mean_and_error(np.ones((1, n)))[1][0])
    deviations = []
    for drawn in resamples(n, RESAMPLES):
        means, errors = mean_and_error(drawn)
        spread = errors > 1e-6 * error
        deviations.append(means[spread] / errors[spread])
    return mean, error, np.concatenate(deviations)


def resamples(n: int, number: int) -> Iterable[np.ndarray]:
    """
    Return how often each of `n` items is in each of so many resamples (seeded), as float64
    `[some, n]` at a time; few items' counts are kept for the next call.
    """
    return kept_resamples(n, number) if n * number <= 2**21 else draw_resamples(n, number)


@functools.lru_cache(maxsize=4)
def kept_resamples(n: int, number: int) -> list[np.ndarray]:
    """Return `draw_resamples` as a list."""
    return list(draw_resamples(n, number))


def draw_resamples(n: int, number: int) -> Iterator[np.ndarray]:
    """Yield the counts of `resamples`, as many at a time as fit 8 MiB."""
    rng, batch = np.random.default_rng(0), max(1, 2**20 // n)
    for start in range(0, number, batch):
        size = min(batch, number - start)
        rows = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(rows.ravel(), minlength=size * n).reshape(size, n)
        yield counts.astype(float)


def mean_change(tasks: list[Change], scores: list[tuple[np.ndarray, np.ndarray]]) -> Change:
    """
    Compare two models on the unweighted mean over several tasks, as the paper's averages are.

    The test swaps the models' scores on each item, within all tasks at once.

    Args:
        tasks: each task's own comparison.
        scores: each task's `base` and `tuned`, `[n]`.
    """
    k = len(tasks)
    change = mover([Estimate(task.change, task.low, task.high) for task in tasks])
    weighted = [
        np.concatenate([x / (k * len(x)) for x in side]) for side in zip(*scores, strict=True)
    ]
    lost = [task.lost_beyond_chance for task in tasks if task.lost_beyond_chance is not None]
    gained = [task.gained_beyond_chance for task in tasks if task.gained_beyond_chance is not None]
    return Change(
        n=sum(task.n for task in tasks),
        before=sum(task.before for task in tasks) / k,
        after=sum(task.after for task in tasks) / k,
        change=change.estimate / k,
        low=max(change.low / k, -1.0),
        high=min(change.high / k, 1.0),
        p_value=tasks[0].p_value if k == 1 else swap_test(*weighted),
        lost=sum(task.lost for task in tasks),
        gained=sum(task.gained for task in tasks),
        lost_beyond_chance=mover(lost) if len(lost) == k else None,
        gained_beyond_chance=mover(gained) if len(gained) == k else None,
        smallest_drop=min(math.sqrt(sum(task.smallest_drop**2 for task in tasks)) / k, 1.0),
    )


def mover(parts: list[Estimate]) -> Estimate:
    """
    Return the sum of independent estimates, with its 95% interval put together from theirs.

    MOVER: Zou and Donner 2008, "Construction of confidence limits about effect measures: a general
    approach".
    """
    total = sum(part.estimate for part in parts)
    below = math.hypot(*(part.estimate - part.low for part in parts))
    above = math.hypot(*(part.high - part.estimate for part in parts))
    return Estimate(total, total - below, total + above)


def swap_test(base: np.ndarray, tuned: np.ndarray) -> float:
    """
    Return the p-value of the sum of differences when each item's two scores are swapped at random.
    """
    differs = base != tuned
    if differs.sum() < 2:  # swapped or not, a single difference is as far from 0
        return 1.0
    result = stats.permutation_test(
        (tuned[differs], base[differs]),
        lambda x, y, axis: (x - y).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=100,
        rng=0,
    )
    return float(result.pvalue)


def drop_test(change: Change, drop: float) -> float:
    """
    Return the two-sided p of the hypothesis that a task's true drop is `drop`.

    For `drop` 0 it is the task's own `p_value`. Beyond 0 the interval that is shown is inverted: p
    < 0.05 if and only if `-drop` lies outside of it. Simulated at a drop of 1 to 10 points, n from
    20 to 5,000, a larger drop is shown by mistake in at most 2.6% of trials at 0.05 two-sided, in
    most settings far fewer. (Tango's score test is nearer to 2.5% at that level, but at 0.001,
    where Holm's method may look, errs up to three times too often.) What is not significant as a
    change is not significant beyond a budget either, hence the larger of the two.

    Args:
        change: a task's, not a mean's.
        drop: in [0, 1].
    """
    if drop == 0:
        return change.p_value
    centre, error = interval_of(change)
    return max(float(2 * stats.norm.sf(abs(centre + drop) / error)), change.p_value)


def interval_of(change: Change) -> tuple[float, float]:
    """
    Return the centre of a task's interval, and its standard error (see `paired_change`).
    """
    centre = change.change * change.n / (change.n + 2)  # the two added items cancel out
    return centre, (change.high - centre if change.high < 1 else centre - change.low) / Z


def holm(p_values: list[float]) -> list[float]:
    """
    Return p-values adjusted for their number: if nothing has changed, the chance that any of them
    is below 0.05 is at most 5%.

    Holm 1979, "A simple sequentially rejective multiple test procedure": the smallest of m is
    multiplied by m, the next by m - 1 and so on, none is below the one before it, and none above 1.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted.tolist()


def smallest_drop(variance: float, n: int) -> float:
    """
    Return the true drop that a two-sided test at 0.05 finds with probability 0.8 (normal
    approximation).

    Args:
        variance: of one item's difference, about zero.
        n: items. A drop needs as much disagreement as itself, hence the second term (Connor 1987).
    """
    return min(max(DETECTABLE * math.sqrt(variance / n), DETECTABLE**2 / n), 1.0)


def items_needed(change: Change, drop: float) -> int:
    """
    Return how many items would make `drop` the smallest that is shown: the inverse of
    `smallest_drop`.
    """
    centre, error = interval_of(change)
    variance = error**2 * (change.n + 2) + centre**2
    return math.ceil(max(DETECTABLE**2 * variance / drop**2, DETECTABLE**2 / drop))


def beyond_chance(right: np.ndarray, wrong: np.ndarray, num_choices: np.ndarray) -> Estimate:
    """
    Estimate how many items one model knows and the other does not, from the items that `right`
    answers correctly and `wrong` does not.

    The response model is from "Mapping Post-Training Forgetting in Language Models at Scale"
    (arXiv:2510.17776): an item is known, or one of its c choices is guessed, anew by each model. A
    guess at an item that neither knows is wrong twice with probability ((c-1)/c)^2, and right then
    wrong with (c-1)/c^2, so each item missed by both stands for 1/(c-1) items lost by luck; and a
    lost item escapes notice with probability 1/c:

        known and lost = (lost - sum over items missed by both of 1/(c-1)) * c/(c-1)

    Without bias under that model, so below 0 about as often as above where nothing was lost. Two
    models that are much alike guess alike: they miss items together more often, and lose fewer by
    luck, than two that guess anew; then the estimate is a lower bound.

    The interval is Wald's with one lost item and one missed by both added, as Bonett and Price do
    for proportions. It covers 94 to 99% from 20 items on, 2 to 5 choices (a bootstrap of the items:
    40 to 98%, since often no item at all was lost, or missed by both).
    """
    c = np.asarray(num_choices, dtype=float)
    if (c < 2).any():
        raise ValueError("An item of a multiple-choice task has fewer than two choices.")
    per_lost, per_missed = c / (c - 1), -c / (c - 1) ** 2
    values = np.maximum(right - wrong, 0) * per_lost + (1 - right) * (1 - wrong) * per_missed
    centre, error = mean_of_more(values, [per_lost.mean(), per_missed.mean()])
    n = len(values)
    return Estimate(float(values.sum()), n * (centre - Z * error), n * (centre + Z * error))


def is_binary(scores: np.ndarray) -> bool:
    """Return whether every score is 0 or 1."""
    return bool(np.isin(scores, (0, 1)).all())
