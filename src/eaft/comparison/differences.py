"""
Two objectives trained with the same seeds and measured on the same items: how they differ, and how
sure that is.

Seeds and items both count, and are crossed: every seed's model is asked the same items (questions,
prompts, held-out examples). A difference d[s, i] = mean + seed_s + item_i + rest_si, so that the
variance of its mean over S seeds and n items is var(seed)/S + var(item)/n + var(rest)/(S n). The
first and the last are in the variance between the seeds' own means; the middle one is the
covariance, over items, of two different seeds.

The critical value is Cochran and Cox's (1957, "Experimental designs", section 4.14): Student's t of
the seeds (S - 1 degrees of freedom) and of the items, weighted by their shares of the variance.
With 2 seeds a t of 12.7 is called for where seeds are all that varies, and a bootstrap of the
seeds, or Satterthwaite's approximation, covers too rarely; this covers 94 to 98% with 2 seeds and
94 to 97% with 3 or more (simulated in `tests/comparison/test_differences.py`). With one seed the
interval holds the items' variance only: nothing is known about another seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats

from eaft.comparison.results import Difference
from eaft.evaluation.paired import bootstrap_interval, bootstrap_test


def over_seeds(per_seed: np.ndarray, covariance: np.ndarray, items: int) -> Difference:
    """
    Put together each seed's own difference; `p_holm` is p itself, for `collect.adjust` to set.

    Args:
        per_seed: `[S]`.
        covariance: `[S, S]`, of `per_seed` when other items are drawn, the same for all seeds.
        items: how many there are, for the degrees of freedom.
    """
    per_seed, covariance = np.asarray(per_seed, dtype=float), np.asarray(covariance, dtype=float)
    change, error, critical = float(per_seed.mean()), *spread(per_seed, covariance, items)
    half = critical(0.05) * error
    p = p_value(abs(change), error, critical)
    return Difference(
        change=change,
        low=change - half,
        high=change + half,
        p_value=p,
        p_holm=p,
        items=items,
        seeds=len(per_seed),
        per_seed=per_seed.tolist(),
    )


def spread(per_seed: np.ndarray, covariance: np.ndarray, items: int) -> tuple[float, Critical]:
    """
    Return the standard error of the mean of `per_seed`, and its critical values; see `over_seeds`.
    """
    count = len(per_seed)
    if count == 1:
        return math.sqrt(max(covariance[0, 0], 0.0)), Critical(1.0, max(items - 1, 1), 0.0, 1)
    by_seed = float(per_seed.var(ddof=1)) / count
    by_item = max(float(covariance.sum() - np.trace(covariance)) / (count * (count - 1)), 0.0)
    return math.sqrt(by_seed + by_item), Critical(by_item, max(items - 1, 1), by_seed, count - 1)


@dataclass(frozen=True)
class Critical:
    """
    Cochran and Cox's critical value of a mean whose variance has two parts, with degrees of freedom
    of their own.
    """

    by_item: float
    items: int
    by_seed: float
    seeds: int

    def __call__(self, level: float) -> float:
        """Return it for a two-sided test at a level."""
        total = self.by_item + self.by_seed
        if total == 0:
            return 0.0
        quantiles = stats.t.ppf(1 - level / 2, [self.items, self.seeds])
        return float(self.by_item * quantiles[0] + self.by_seed * quantiles[1]) / total


def p_value(distance: float, error: float, critical: Critical) -> float:
    """Return the level at which an interval's end lies at 0, `distance` from its middle."""
    if distance == 0:
        return 1.0
    if error == 0:
        return 0.0
    smallest = 1e-15
    if critical(smallest) * error <= distance:
        return smallest
    return float(optimize.brentq(lambda level: critical(level) * error - distance, smallest, 1.0))


def ratio_difference(first: np.ndarray, second: np.ndarray, counts: np.ndarray) -> Difference:
    """
    Return the difference of two means over all tokens: drift, or held-out nll.

    With one seed it is `eaft.evaluation.paired`'s bootstrap of the items.

    Args:
        first, second: `[S, n]`, each seed's sums by prompt (or example).
        counts: `[n]`, the tokens of each.
    """
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    per_seed = difference.sum(axis=1) / counts.sum()
    if len(per_seed) == 1:
        low, high = bootstrap_interval(difference[0], counts)
        p = bootstrap_test(difference[0], counts, 0.0) if difference.any() else 1.0
        return Difference(
            change=float(per_seed[0]),
            low=low,
            high=high,
            p_value=p,
            p_holm=p,
            items=len(counts),
            seeds=1,
            per_seed=per_seed.tolist(),
        )
    influence = (difference - per_seed[:, None] * counts) / counts.mean()
    return over_seeds(per_seed, covariance_of_mean(influence), len(counts))


def score_difference(tasks: list[tuple[np.ndarray, np.ndarray]]) -> Difference:
    """
    Return the difference of two unweighted means over tasks (or of one task) of scores in [0, 1].

    Each task is given one item lost and one gained by every seed, as large as the largest change
    seen, for the interval and the test only, so that no change in few items is not taken for
    certainty (as Bonett and Price 2012 do for two proportions).

    Args:
        tasks: each task's scores of the first and of the second objective, `[S, n]`.
    """
    seeds = len(tasks[0][0])
    per_seed, adjusted, covariance = np.zeros(seeds), np.zeros(seeds), np.zeros((seeds, seeds))
    for first, second in tasks:
        difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
        largest = float(np.abs(difference).max()) or 1.0
        ends = np.tile([-largest, largest], (len(difference), 1))
        widened = np.concatenate([difference, ends], axis=1)
        per_seed = per_seed + difference.mean(axis=1) / len(tasks)
        adjusted = adjusted + widened.mean(axis=1) / len(tasks)
        covariance = covariance + covariance_of_mean(widened) / len(tasks) ** 2
    items = sum(first.shape[1] for first, _ in tasks)
    widened_difference = over_seeds(adjusted, covariance, items)
    return replace(
        widened_difference,
        change=float(per_seed.mean()),
        low=max(widened_difference.low, -1.0),
        high=min(widened_difference.high, 1.0),
        per_seed=per_seed.tolist(),
    )


def covariance_of_mean(values: np.ndarray) -> np.ndarray:
    """
    Return the covariance `[S, S]` of the means of `[S, n]` values, when other items are drawn.
    """
    return np.atleast_2d(np.cov(values)) / values.shape[1]
