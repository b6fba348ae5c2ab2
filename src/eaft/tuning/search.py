"""
Screening: which members of the family to measure, and which of them to confirm.

Along the share, drift rises from 0, nearly as a power of it. So the largest share within the budget
takes a few measurements, each placed by a line through two others in logarithms.

The screening data choose the candidates, so they prove nothing about them: `eaft.tuning.confirm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy import stats

from eaft.evaluation.paired import ALPHA, Z, bootstrap_interval
from eaft.tuning.points import Member, Point

CANDIDATES = 3  # at most
# Drift over the share has about this power in what we measured (1.7 to 2): the first guess
POWER = 1.8
CLOSE = 0.9  # a drift of at least this part of its limit is near enough
TRIES = 3  # measurements for one limit of drift, at most
MOST_TRIES = 8  # as long as none is within it
LOWER = 0.75  # of a share: a smaller one that may have a lower nll, where training went on too long
LOWER_TRIES = 2
# Standard errors between the budget and what the three candidates aim at: they pass with about 50%,
# 84% and 99%
MARGINS = (0.0, 1.0, 2.5)
PARTS = (1.0, 0.5, 0.25)  # of the drift at the lowest nll, where any drift is allowed
SAFEST = 0.6  # of the budget: the last candidate aims no higher, in case all was estimated badly
# A bound has this part of its share of errors from so many prompts on, and less with fewer: far out
# the bootstrap leaves out more than it should, up to a third with 128 prompts whose drifts are as
# skewed as we measured, and twice as much with 32 (simulated, benchmarks/guarantee.py)
TAIL, TAIL_PROMPTS = 0.75, 128
Measure = Callable[[Member], Point]


def bound_error(prompts: int, candidates: int = CANDIDATES) -> float:
    """Return the nominal error of the one-sided bound on one of several candidates' drifts."""
    return TAIL * min(1.0, prompts / TAIL_PROMPTS) * ALPHA / candidates


def z_bound(prompts: int) -> float:
    """Return how many standard errors a bound lies above the estimate, with all candidates."""
    return float(stats.norm.ppf(1 - bound_error(prompts)))


class Search:
    """
    The points of a run's family that screening measured.

    Args:
        measure: returns a member's point on the screening data.
        base_nll: the base model's, on the same rows (nats per token).
    """

    def __init__(self, measure: Measure, base_nll: float) -> None:
        self.measure, self.base_nll = measure, base_nll
        self.points: list[Point] = []

    def at(self, step: int, share: float) -> Point:
        """Measure a member, once."""
        member = Member(step, share)
        known = next((point for point in self.points if point.member == member), None)
        if known is None:
            known = self.measure(member)
            self.points.append(known)
        return known

    def best(self, limit: float) -> Point | None:
        """
        Return the point of the lowest nll with a drift of at most `limit`; None if none learned
        anything within it.
        """
        within = [
            point
            for point in self.points
            if point.drift.mean <= limit and point.nll.mean < self.base_nll
        ]
        return min(within, key=lambda point: (point.nll.mean, point.member), default=None)

    def run(self, steps: list[int], budget: float) -> None:
        """
        Measure every checkpoint, and the largest share within the budget of each that may win.

        Args:
            steps: of the checkpoints.
            budget: the largest drift (nats per token).
        """
        for step in sorted(steps, reverse=True):  # the last has learned most
            self.at(step, 1.0)
            self.approach(step, budget)
        for _ in range(LOWER_TRIES):
            before = self.best(budget)
            if before is None:
                break
            self.at(before.member.step, round(before.member.share * LOWER, 3))
            if self.best(budget) is before:
                break

    def approach(self, step: int, limit: float) -> None:
        """
        Measure shares of one checkpoint until the largest with a drift of at most `limit` is known,
        or it cannot have the lowest nll.
        """
        for tried in range(MOST_TRIES):
            own = sorted(
                (p for p in self.points if p.member.step == step), key=lambda p: p.member.share
            )
            within = [point for point in own if point.drift.mean <= limit]
            over = [point for point in own if point.drift.mean > limit]
            if not over or (within and within[-1].drift.mean >= CLOSE * limit):
                return
            if within and tried >= TRIES:
                return
            best = self.best(limit)
            # A smaller share of this checkpoint learns less than one that is over the limit already
            if best is not None and over[0].nll.mean >= best.nll.mean:
                return
            share = next_share(within, over, limit)
            if not share or any(point.member.share == share for point in own):
                return
            self.at(step, share)


def usually_measured(checkpoints: int) -> int:
    """Return about how many members are measured: an interpolation of each checkpoint, and more."""
    return 2 * checkpoints + CANDIDATES


def next_share(within: list[Point], over: list[Point], limit: float) -> float:
    """
    Return the share whose drift should be a little below a limit.

    Drift is taken for a power of the share, which two points tell.

    Args:
        within: a checkpoint's points that are within the limit, by share.
        over: the same checkpoint's points that are over it, by share; one or more.
    """
    aim, first = math.sqrt(CLOSE) * limit, over[0]
    low = within[-1].member.share if within else 0.0
    other, power = (within[-1:] or over[1:2] or [first])[0], POWER
    if other is not first and other.drift.mean > 0 and other.member.share > 0:
        ratio = first.member.share / other.member.share
        power = math.log(first.drift.mean / other.drift.mean) / math.log(ratio)
    share = first.member.share * (aim / first.drift.mean) ** (1 / max(power, 0.1))
    edge = 0.05 * (first.member.share - low)  # so that each measurement narrows it down
    return round(min(max(share, low + edge), first.member.share - edge), 3)


def choose_candidates(
    search: Search, budget: float, strict: bool, confirmation_prompts: int
) -> list[Point]:
    """
    Return the members to confirm, from the one that learned most to the safest.

    Each has the lowest nll within a limit. Without a budget the limits are parts of what the lowest
    nll has drifted. Else the first limit is the budget (with `strict`, what is
    likely to be shown within it); the others lie below by what chance does to a drift, which is
    estimated from the screening prompts.

    Args:
        budget: the largest drift (nats per token); infinite if any is allowed.
        strict: whether a bound on the drift must be within the budget, not only its estimate.
        confirmation_prompts: how many there will be.
    """
    first = search.best(budget)
    if first is None:
        return []
    drift = first.drift
    low, high = bootstrap_interval(drift.sums, drift.counts)
    here = (high - low) / (2 * Z) / drift.mean if drift.mean > 0 else 0.0  # relative
    there = here * math.sqrt(len(drift.sums) / confirmation_prompts)
    bound = z_bound(confirmation_prompts) * there if strict else 0.0
    limits = [part * drift.mean for part in PARTS]
    if budget < math.inf:
        limits = [budget / (1 + bound + margin * math.hypot(here, there)) for margin in MARGINS]
        limits[-1] = min(limits[-1], SAFEST * budget / (1 + bound))
    for limit in limits:
        search.approach((search.best(limit) or first).member.step, limit)
    chosen: list[Point] = []
    for limit in limits:
        best = search.best(limit)
        if best is not None and best.member not in [point.member for point in chosen]:
            chosen.append(best)
    return chosen
