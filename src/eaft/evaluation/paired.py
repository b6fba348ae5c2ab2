"""
Two models on the same items: what changed, how sure that is, what was lost and what was gained.

All scores are per item, in [0, 1]; `before` and `after` are in the same order. An average hides losses that gains
cancel, so both are counted; two models that saw the same items are compared item by item, since most of an item's
difficulty is shared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

Z = float(stats.norm.ppf(0.975))
POWER = 0.8  # with which the smallest drop would be found
RESAMPLES = 9999


@dataclass(frozen=True)
class Change:
    """
    A paired comparison of two models on one task, or on the mean of several.

    Attributes:
        n: items.
        before, after, change: mean scores and their difference, in [0, 1] and [-1, 1].
        low, high: 95% interval of the change.
        p_value: of the hypothesis that swapping the two models changes nothing, two-sided.
        lost, gained: items whose score fell, or rose.
        lost_beyond_chance, gained_beyond_chance: the same less what guessing explains; None without choices.
        smallest_drop: the drop that this many items would show as significant (p < 0.05) four times in five.
    """

    n: int
    before: float
    after: float
    change: float
    low: float
    high: float
    p_value: float
    lost: int
    gained: int
    lost_beyond_chance: float | None
    gained_beyond_chance: float | None
    smallest_drop: float


def paired_change(before: np.ndarray, after: np.ndarray, num_choices: np.ndarray | None = None) -> Change:
    """
    Compare two models on one task.

    Scores that are 0 or 1 have the exact McNemar test and Bonett and Price's interval (2012, "Adjusted Wald confidence
    interval for a difference of binomial proportions based on paired data"); others a sign-flip test and a bootstrap of
    the pairs (both scipy's, seeded).

    Args:
        before, after: scores `[n]` of the same items, in the same order.
        num_choices: `[n]`, where the task is multiple choice: how many choices each item has.

    Raises:
        ValueError: there are no items, or a score is not finite.
    """
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    n = len(before)
    if n == 0 or len(after) != n or not np.isfinite([before, after]).all():
        raise ValueError(f"Expected finite scores of the same items, got {n} and {len(after)}.")
    difference = after - before
    lost, gained = int((difference < 0).sum()), int((difference > 0).sum())
    if is_binary(before) and is_binary(after):
        p_value = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
        # One lost and one gained item are added, so that no change in few items is not taken for certainty
        p_lost, p_gained = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
        half = Z * math.sqrt((p_lost + p_gained - (p_gained - p_lost) ** 2) / (n + 2))
        low, high = p_gained - p_lost - half, p_gained - p_lost + half
        variance = p_lost + p_gained
    else:
        p_value = swap_test(before, after)
        low, high = bootstrap_interval(difference)
        if np.ptp(difference) < 1e-12:  # nothing to draw from: as for scores of 0 and 1
            half = Z * math.sqrt(2) / (n + 2)
            low, high = low - half, high + half
        variance = float(difference.var())
    return Change(
        n=n,
        before=float(before.mean()),
        after=float(after.mean()),
        change=float(difference.mean()),
        low=max(low, -1.0),
        high=min(high, 1.0),
        p_value=float(p_value),
        lost=lost,
        gained=gained,
        lost_beyond_chance=None if num_choices is None else beyond_chance(before, after, num_choices),
        gained_beyond_chance=None if num_choices is None else beyond_chance(after, before, num_choices),
        smallest_drop=smallest_drop(variance, n),
    )


def mean_interval(scores: np.ndarray) -> tuple[float, float]:
    """Return the 95% interval of a mean score: Wilson's where all are 0 or 1, else a bootstrap of the items."""
    if is_binary(scores):
        interval = stats.binomtest(int(scores.sum()), len(scores)).proportion_ci(0.95, "wilson")
        return float(interval.low), float(interval.high)
    return bootstrap_interval(scores)


def bootstrap_interval(sums: np.ndarray, counts: np.ndarray | None = None) -> tuple[float, float]:
    """
    Return the 95% interval of a mean over all that the items hold, by a bootstrap of the items (scipy's BCa).

    The mean is sum(sums) / sum(counts), a ratio whose two parts are drawn together; a point where all items have the
    same mean.

    Args:
        sums: `[n]`, each item's sum.
        counts: `[n]`, how many (tokens, say) each sum is of; None: one each, so that the mean is over items.
    """
    counts = np.ones(len(sums)) if counts is None else counts
    means = sums / counts
    if np.ptp(means) == 0:
        return float(means[0]), float(means[0])
    interval = stats.bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis=axis) / counts.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=100,
        rng=0,
    ).confidence_interval
    return float(interval.low), float(interval.high)


def mean_change(tasks: list[Change], scores: list[tuple[np.ndarray, np.ndarray]]) -> Change:
    """
    Compare two models on the unweighted mean over several tasks, as the paper's averages are.

    The test swaps the models' scores on each item, within all tasks at once.

    Args:
        tasks: each task's own comparison.
        scores: each task's `before` and `after`, `[n]`.
    """
    k = len(tasks)
    change, low, high = combine(tasks)
    weighted = [np.concatenate([x / (k * len(x)) for x in side]) for side in zip(*scores, strict=True)]
    beyond = [
        [v for task in tasks if (v := getattr(task, name)) is not None]
        for name in ("lost_beyond_chance", "gained_beyond_chance")
    ]
    return Change(
        n=sum(task.n for task in tasks),
        before=sum(task.before for task in tasks) / k,
        after=sum(task.after for task in tasks) / k,
        change=change,
        low=low,
        high=high,
        p_value=tasks[0].p_value if k == 1 else swap_test(*weighted),
        lost=sum(task.lost for task in tasks),
        gained=sum(task.gained for task in tasks),
        lost_beyond_chance=sum(beyond[0]) if len(beyond[0]) == k else None,
        gained_beyond_chance=sum(beyond[1]) if len(beyond[1]) == k else None,
        smallest_drop=min(math.sqrt(sum(task.smallest_drop**2 for task in tasks)) / k, 1.0),
    )


def combine(tasks: list[Change]) -> tuple[float, float, float]:
    """
    Return the mean change over tasks, and its 95% interval put together from theirs.

    MOVER: Zou and Donner 2008, "Construction of confidence limits about effect measures: a general approach".
    """
    k = len(tasks)
    change = sum(task.change for task in tasks) / k
    below = math.sqrt(sum((task.change - task.low) ** 2 for task in tasks)) / k
    above = math.sqrt(sum((task.high - task.change) ** 2 for task in tasks)) / k
    return change, max(change - below, -1.0), min(change + above, 1.0)


def swap_test(before: np.ndarray, after: np.ndarray) -> float:
    """Return the p-value of the sum of differences when each item's two scores are swapped at random."""
    differs = before != after
    if differs.sum() < 2:  # swapped or not, a single difference is as far from 0
        return 1.0
    result = stats.permutation_test(
        (after[differs], before[differs]),
        lambda x, y, axis: (x - y).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=100,
        rng=0,
    )
    return float(result.pvalue)


def smallest_drop(variance: float, n: int) -> float:
    """
    Return the true drop that a two-sided test at 0.05 finds with probability 0.8 (normal approximation).

    Args:
        variance: of one item's difference, about zero.
        n: items. A drop needs as much disagreement as itself, hence the second term (Connor 1987).
    """
    z = Z + float(stats.norm.ppf(POWER))
    return min(max(z * math.sqrt(variance / n), z**2 / n), 1.0)


def beyond_chance(right: np.ndarray, wrong: np.ndarray, num_choices: np.ndarray) -> float:
    """
    Return how many items one model knew and the other did not, of those where `right` has it and `wrong` has not.

    The response model is that of "Mapping Post-Training Forgetting in Language Models at Scale" (arXiv:2510.17776):
    an item is known, or one of its c choices is guessed, anew by each model. A guess at an item that neither knows is
    wrong twice with probability ((c-1)/c)^2, and right then wrong with (c-1)/c^2, so each item missed by both stands
    for 1/(c-1) items lost by luck; and a lost item escapes notice with probability 1/c:

        known and lost = (lost - sum over items missed by both of 1/(c-1)) * c/(c-1)

    Two models that are much alike guess alike, so this is a lower bound; it is never below 0.
    """
    c = np.asarray(num_choices, dtype=float)
    if (c < 2).any():
        raise ValueError("An item of a multiple-choice task has fewer than two choices.")
    lost = np.maximum(right - wrong, 0)
    missed_by_both = (1 - right) * (1 - wrong)
    return max(float(((lost - missed_by_both / (c - 1)) * c / (c - 1)).sum()), 0.0)


def is_binary(scores: np.ndarray) -> bool:
    """Return whether every score is 0 or 1."""
    return bool(np.isin(scores, (0, 1)).all())
