"""
Confirmation: what holds of a candidate, on prompts, rows and tasks that screening never saw.

The candidates and their order are fixed before the confirmation data are looked at. They are
measured one after the other, and the first that passes is returned. The errors of all statements of
a kind add up to ALPHA at most (Bonferroni, over candidates and tasks). So all of them hold together
with 95%, and the statement about the returned model holds, however it was chosen. The simulation of
the whole procedure is `tests/tuning/test_procedure.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from scipy import stats

from eaft.evaluation.paired import (
    ALPHA,
    FEWEST_ITEMS,
    FEWEST_PROMPTS,
    bootstrap_interval,
    interval_of,
)
from eaft.evaluation.results import Change
from eaft.tuning.points import Member, Point, Sums
from eaft.tuning.results import Confirmation, TaskLoss
from eaft.tuning.search import TAIL, Measure, bound_error, z_bound


def judge(point: Point, base_nll: Sums, budget: float, candidates: int) -> Confirmation:
    """
    Return what the confirmation data say about one of several candidates.

    Args:
        base_nll: the base model's, of the same rows.
        budget: the largest drift (nats per token).
    """
    drift, nll = point.drift, point.nll
    # The upper end of a two-sided interval that leaves out as much on each side
    error = bound_error(len(drift.sums), candidates)
    _, bound = bootstrap_interval(drift.sums, drift.counts, 1 - 2 * error)
    change = Sums(nll.sums - base_nll.sums, nll.counts)
    level = 1 - TAIL * ALPHA / candidates
    low, high = bootstrap_interval(change.sums, change.counts, level)
    within, enough = drift.mean <= budget, len(drift.sums) >= FEWEST_PROMPTS
    shown = budget == math.inf or (bound <= budget and enough)
    needed = None
    if not shown and drift.mean < budget:
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
        tasks=[],
        nll=nll.mean,
        nll_change=change.mean,
        nll_low=low,
        nll_high=high,
        rows=len(nll.sums),
    )


def judge_task(name: str, change: Change, max_drop: float, statements: int) -> TaskLoss:
    """
    Return what a task's items say of one candidate.

    Args:
        change: from the base model to the candidate; its interval is Bonett and Price's.
        max_drop: percentage points.
        statements: how many statements share the errors: candidates times tasks.
    """
    centre, error = interval_of(change)
    bound = 100 * (float(stats.norm.ppf(1 - ALPHA / statements)) * error - centre)
    drop, enough = -100 * change.change, change.n >= FEWEST_ITEMS
    shown = bound <= max_drop and enough
    needed = None
    if not shown and drop < max_drop:
        ratio = (bound - drop) / (max_drop - drop)
        needed = max(math.ceil(change.n * ratio**2), FEWEST_ITEMS)
    return TaskLoss(
        task=name,
        items=change.n,
        base=change.before,
        tuned=change.after,
        drop=drop,
        bound=bound,
        within=drop <= max_drop,
        shown=shown,
        items_needed=needed,
    )


def confirm(
    candidates: list[Member],
    measure: Measure,
    base_nll: Sums,
    budget: float,
    strict: bool,
    losses: Callable[[Member], list[TaskLoss]] = lambda member: [],
) -> tuple[Confirmation | None, list[Confirmation]]:
    """
    Return the first candidate that passes (None if none does), and all that were measured.

    Args:
        candidates: in the order in which they are measured.
        measure: returns a member's point on the confirmation data.
        budget: the largest drift (nats per token); infinite if any is allowed.
        strict: a candidate passes if its bounds are within the budgets; else, if its estimates are.
        losses: returns what the tasks say of a member; asked if its drift passes.
    """
    measured: list[Confirmation] = []
    for member in candidates:
        judged = judge(measure(member), base_nll, budget, len(candidates))
        if judged.shown if strict else judged.within:
            tasks = losses(member)
            judged = replace(
                judged,
                tasks=tasks,
                within=judged.within and all(task.within for task in tasks),
                shown=judged.shown and all(task.shown for task in tasks),
            )
        measured.append(judged)
        if judged.shown if strict else judged.within:
            return judged, measured
    return None, measured


def typical_margin(prompts: int) -> float:
    """
    Return by which share a bound usually lies above the estimate, with three candidates.

    Prompts are taken to differ as we measured: their logarithms have a standard deviation of 0.5.
    """
    return z_bound(prompts) * math.sqrt(math.expm1(0.5**2) / prompts)
