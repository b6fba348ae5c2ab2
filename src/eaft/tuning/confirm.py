"""
Confirmation: what holds of a candidate, on prompts and rows that screening never saw.

The candidates and their order are fixed before the confirmation data are looked at. They are
measured one after the other, and the first that passes is returned. Every statement is made at
1 - ALPHA / (number of candidates), so that all of them hold together with 95% (Bonferroni), and so
does the one about the model that is returned, however it was chosen. The simulation of the whole
procedure is `tests/tuning/test_procedure.py`.
"""

from __future__ import annotations

import math

from eaft.evaluation.paired import ALPHA, FEWEST_PROMPTS, bootstrap_interval
from eaft.tuning.points import Member, Point, Sums
from eaft.tuning.results import Confirmation
from eaft.tuning.search import Z_BOUND, Measure


def judge(point: Point, base_nll: Sums, budget: float, candidates: int) -> Confirmation:
    """
    Return what the confirmation data say of one of so many candidates.

    Args:
        base_nll: the base model's, of the same rows.
        budget: the largest drift (nats per token).
    """
    drift, nll = point.drift, point.nll
    # The upper end of a two-sided interval that leaves out ALPHA / candidates on each side
    _, bound = bootstrap_interval(drift.sums, drift.counts, 1 - 2 * ALPHA / candidates)
    change = Sums(nll.sums - base_nll.sums, nll.counts)
    low, high = bootstrap_interval(change.sums, change.counts, 1 - ALPHA / candidates)
    within, enough = drift.mean <= budget, len(drift.sums) >= FEWEST_PROMPTS
    shown = bound <= budget and enough
    needed = None
    if within and not shown and drift.mean < budget:
        # The bound's distance from the estimate shrinks as 1 / sqrt(prompts)
        ratio = (bound - drift.mean) / (budget - drift.mean)
        needed = max(math.ceil(len(drift.sums) * ratio**2), FEWEST_PROMPTS)
    return Confirmation(
        step=point.member.step,
        share=point.member.share,
        drift=drift.mean,
        bound=bound,
        within=within,
        shown=shown,
        prompts=len(drift.sums),
        prompts_needed=needed,
        nll=nll.mean,
        nll_change=change.mean,
        nll_low=low,
        nll_high=high,
        rows=len(nll.sums),
    )


def confirm(
    candidates: list[Member], measure: Measure, base_nll: Sums, budget: float, strict: bool
) -> tuple[Confirmation | None, list[Confirmation]]:
    """
    Return the first candidate that passes (None if none does), and all that were measured.

    Args:
        candidates: in the order in which they are measured.
        measure: returns a member's point on the confirmation data.
        strict: a candidate passes if its bound is within the budget; else, if its estimate is.
    """
    measured: list[Confirmation] = []
    for member in candidates:
        measured.append(judge(measure(member), base_nll, budget, len(candidates)))
        if measured[-1].shown if strict else measured[-1].within:
            return measured[-1], measured
    return None, measured


def typical_margin(prompts: int) -> float:
    """
    Return by which part a bound lies above the estimate, with so many prompts and three candidates,
    where prompts are as unlike as we measured: their logarithms have a standard deviation of 0.5.
    """
    return Z_BOUND * math.sqrt(math.expm1(0.5**2) / prompts)
