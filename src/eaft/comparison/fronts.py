"""
Two objectives at a matched target: how far has each drifted where both have learned as much?

A run's trajectory goes from the base model through every checkpoint, and is linear in between, in
the target's shortfall (the held-out nll, or 1 - a task's score) and in drift. An objective's front
is, for every target, the least drift with which any of its runs (one a learning rate) gets at least
so far: so each objective is read at its own best learning rate and epoch, at every target, and not
at one point. Fronts are taken seed by seed and their differences averaged.

The intervals carry the uncertainty of both axes: prompts (drift) and held-out examples or items
(the target) are drawn anew, together, for all seeds and both objectives, and all fronts are taken
again. How hard the examples drawn are for all checkpoints alike is taken out, since both objectives
are matched on the same examples: a target means the nll of these examples, and what is uncertain is
how far apart on them two objectives are. What that gives and the spread over seeds are put together
as in `eaft.comparison.differences`. The band is simultaneous: in about 95% of comparisons the whole
true curve lies within (simulated: 95 to 98%; with two seeds that differ much, 90%; with
interpolations 93 to 97%), so that it may be read wherever it excludes 0. The one number that is
tested is the mean difference over all targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eaft.comparison.differences import over_seeds
from eaft.comparison.results import FrontDifference

TARGETS = 41  # at which fronts are read
RESAMPLES = 1000


@dataclass(frozen=True)
class Trajectory:
    """
    One run's way from the base model through its checkpoints.

    Attributes:
        drift: `[checkpoints + 1, prompts]`, summed KL of each prompt's answer (nats).
        shortfall: `[checkpoints + 1, examples]`, summed nll (nats), or 1 - score of each item.
    """

    drift: np.ndarray
    shortfall: np.ndarray


@dataclass(frozen=True)
class Weights:
    """
    How much each prompt and each example counts, `[resamples, prompts]` and `[resamples,
    examples]`.
    """

    prompts: np.ndarray
    examples: np.ndarray


def compare_fronts(
    first: list[list[Trajectory]],
    second: list[list[Trajectory]],
    prompt_tokens: np.ndarray,
    example_tokens: np.ndarray,
) -> FrontDifference | None:
    """
    Compare two objectives' fronts at every target that both reach with every seed; see `reach`.

    Args:
        first, second: each seed's runs, one a learning rate; the same seeds.
        prompt_tokens, example_tokens: how many each sum is of (1 each, for items).

    Returns:
        the difference at `TARGETS` targets; None if there is no target that both reach.
    """
    tokens = (prompt_tokens, example_tokens)
    once = Weights(*(np.ones((1, len(counts))) for counts in tokens))
    rng = np.random.default_rng(0)
    drawn = Weights(
        *(rng.multinomial(len(n), np.full(len(n), 1 / len(n)), RESAMPLES) for n in tokens)
    )
    measured, redrawn = (
        [
            [[read(run, weights, *tokens) for run in runs] for runs in side]
            for side in (first, second)
        ]
        for weights in (once, drawn)
    )
    moved = level(redrawn) - level(measured)
    redrawn = [
        [[(s - moved[:, None], drift) for s, drift in runs] for runs in side] for side in redrawn
    ]
    hardest, easiest = reach([runs for side in redrawn for runs in side])
    if hardest >= easiest:
        return None
    targets = np.linspace(hardest, easiest, TARGETS)
    fronts = np.array(
        [[front(runs, targets)[0] for runs in side] for side in measured]
    )  # [2, S, targets]
    resampled = np.array(
        [[front(runs, targets) for runs in side] for side in redrawn]
    )  # [2, S, resamples, targets]
    difference, resampled = fronts[0] - fronts[1], resampled[0] - resampled[1]
    items = min(len(counts) for counts in tokens)
    mean = over_seeds(difference.mean(axis=1), np.atleast_2d(np.cov(resampled.mean(axis=2))), items)
    at_each = [
        over_seeds(difference[:, i], np.atleast_2d(np.cov(resampled[:, :, i])), items)
        for i in range(TARGETS)
    ]
    middle, half = (
        np.array([pick(d) for d in at_each])
        for pick in (lambda d: d.change, lambda d: d.high - d.change)
    )
    half = half * simultaneous(resampled.mean(axis=0))
    return FrontDifference(
        targets=targets.tolist(),
        first=fronts[0].mean(axis=0).tolist(),
        second=fronts[1].mean(axis=0).tolist(),
        difference=middle.tolist(),
        low=(middle - half).tolist(),
        high=(middle + half).tolist(),
        mean=mean,
    )


def relative(front: FrontDifference) -> float:
    """Return the mean difference over all targets, as a share of the second's mean drift."""
    return front.mean.change / float(np.mean(front.second))


def level(sides: list[list[list[tuple[np.ndarray, np.ndarray]]]]) -> np.ndarray:
    """
    Return the mean shortfall of all checkpoints, both objectives weighing alike, `[resamples]`.
    """
    return np.mean(
        [
            np.mean([s[:, 1:].mean(axis=1) for runs in side for s, _ in runs], axis=0)
            for side in sides
        ],
        axis=0,
    )


def simultaneous(resampled: np.ndarray) -> float:
    """
    Return by how much pointwise 95% intervals must be widened for 95% of whole curves to lie
    within.

    From the largest deviation, in standard errors, of each resampled curve `[resamples, targets]`
    (sup-t: Montiel Olea and Plagborg-Moller 2019, "Simultaneous confidence bands").
    """
    deviation = np.abs(resampled - resampled.mean(axis=0))
    largest = (deviation / np.maximum(resampled.std(axis=0), 1e-300)).max(axis=1)
    return max(float(np.quantile(largest, 0.95)) / 1.96, 1.0)


def read(
    trajectory: Trajectory, weights: Weights, prompt_tokens: np.ndarray, example_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return a run's shortfall and drift, `[resamples, checkpoints + 1]` each."""
    examples, prompts = weights.examples @ example_tokens, weights.prompts @ prompt_tokens
    shortfall = (weights.examples @ trajectory.shortfall.T) / examples[:, None]
    drift = (weights.prompts @ trajectory.drift.T) / prompts[:, None]
    return shortfall, drift


def reach(sides: list[list[tuple[np.ndarray, np.ndarray]]]) -> tuple[float, float]:
    """
    Return the hardest and the easiest target to compare at.

    The best that every objective reached with every seed, and the first checkpoint of its slowest
    run; both by a standard error to the inside (in five of six resamples), since the best of many
    is better than it would be on other examples.

    Args:
        sides: each objective's and seed's runs: shortfall and drift, `[resamples, checkpoints +
            1]`.
    """
    best = [np.min([shortfall.min(axis=1) for shortfall, _ in runs], axis=0) for runs in sides]
    start = [
        np.max([shortfall[:, :2].min(axis=1) for shortfall, _ in runs], axis=0) for runs in sides
    ]
    return max(float(np.quantile(b, 0.84)) for b in best), min(
        float(np.quantile(s, 0.16)) for s in start
    )


def front(runs: list[tuple[np.ndarray, np.ndarray]], targets: np.ndarray) -> np.ndarray:
    """
    Return the least drift at a shortfall of at most each target, `[resamples, targets]`.

    A target that no run reaches (in some resamples) is read where they come nearest to it.

    Args:
        runs: shortfall and drift of each, `[resamples, checkpoints + 1]`, linear in between.
    """
    nearest = np.min([shortfall.min(axis=1) for shortfall, _ in runs], axis=0)
    levels = np.maximum(targets[None, :], nearest[:, None])  # [resamples, targets]
    least = np.full(levels.shape, np.inf)
    for shortfall, drift in runs:
        for k in range(shortfall.shape[1]):
            least = np.where(shortfall[:, [k]] <= levels, np.minimum(least, drift[:, [k]]), least)
            if k == 0:
                continue
            last, this = shortfall[:, [k - 1]], shortfall[:, [k]]
            crosses = (last - levels) * (this - levels) < 0
            share = (last - levels) / np.where(last == this, 1.0, last - this)
            crossing = (1 - share) * drift[:, [k - 1]] + share * drift[:, [k]]
            least = np.where(crosses, np.minimum(least, crossing), least)
    return least
