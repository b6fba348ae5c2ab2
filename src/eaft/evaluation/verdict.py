"""The verdict: whether a loss beyond the budget is shown, or could be there unseen; in words."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

import numpy as np

from eaft.evaluation.loops import loops_told
from eaft.evaluation.paired import (
    ALPHA,
    DETECTABLE,
    FEWEST_ITEMS,
    FEWEST_PROMPTS,
    Z,
    bootstrap_test,
    drop_test,
    holm,
    items_needed,
)
from eaft.evaluation.results import (
    Change,
    Changes,
    DriftSummary,
    HeldOut,
    LossTest,
    Verdict,
)
from eaft.text import markdown, markdown_strings

SHOWN = 3  # tasks named in the sentence; the table has them all


def judge(
    changes: Changes,
    drift: DriftSummary | None = None,
    failed: Collection[str] = (),
    max_drop: float | None = None,
    max_drift: float | None = None,
    held_out: HeldOut | None = None,
) -> Verdict:
    """
    Return what an evaluation of a tuned model beside its base shows.

    A loss is shown where the hypothesis that a task's drop is `max_drop` (that drift is
    `max_drift`) has p < 0.05, adjusted by Holm's method over all tasks (and drift, if it has a
    budget), and the drop is larger than the budget. The tests are two-sided, so that without a
    budget the p of the table decides. Where no loss is shown, there are too few items in two cases.
    Either they would not show a drop of the budget's size four times in five, and the interval does
    not rule out such a drop. Or they are too few for a reliable interval.

    Args:
        changes: by task, filter and suite.
        drift: None: not measured.
        failed: the tasks that could not be run.
        max_drop: percentage points that each task may lose; None: 0, any loss counts.
        max_drift: nats per token; None: drift is told, and not judged.
        held_out: told, and not judged: it says what was learned, not what was forgotten.
    """
    tests = [task_test(name, task, max_drop or 0.0) for name, task in changes.tasks.items()]
    if max_drift is not None and drift is not None:
        tests.append(drift_test(drift, max_drift))
    for test, p in zip(tests, holm([test.p_value for test in tests]), strict=True):
        test.p_holm = p
        test.shown = p < ALPHA and test.loss > test.budget
        reliable = FEWEST_ITEMS if test.kind == "task" else FEWEST_PROMPTS
        unseen = test.n < reliable or test.high > test.budget < test.smallest
        test.too_few = test.budget > 0 and not test.shown and unseen
        test.n_needed = max(test.n_needed or 0, reliable) if test.too_few else None
    has_budget = {"task": max_drop is not None, "drift": max_drift is not None}
    verdict = Verdict(
        status=status(tests, bool(changes.tasks or failed) or held_out is None),
        over_budget=any(test.shown and has_budget[test.kind] for test in tests),
        max_drop=max_drop,
        max_drift=max_drift,
        tests=tests,
        sentence="",
    )
    names = [markdown(name) for name in failed]
    verdict.sentence = sentence(
        markdown_strings(verdict), markdown_strings(changes), drift, names, held_out
    )
    return verdict


def task_test(name: str, change: Change, max_drop: float) -> LossTest:
    """
    Return a task's test against its budget (percentage points), before it is adjusted by `judge`.
    """
    p_value = drop_test(change, max_drop / 100)
    return LossTest(
        name=name,
        kind="task",
        budget=max_drop,
        loss=-100 * change.change,
        low=-100 * change.high,
        high=-100 * change.low,
        p_value=p_value,
        p_holm=p_value,
        shown=False,
        smallest=100 * change.smallest_drop,
        too_few=False,
        n=change.n,
        n_needed=items_needed(change, max_drop / 100) if max_drop > 0 else None,
    )


def drift_test(drift: DriftSummary, max_drift: float) -> LossTest:
    """Return drift's test against its budget (nats per token), before it is adjusted by `judge`."""
    counts = np.array(drift.tokens_per_prompt)
    smallest = DETECTABLE * (drift.high - drift.low) / (2 * Z)
    p_value = bootstrap_test(np.array(drift.per_prompt) * counts, counts, max_drift)
    return LossTest(
        name="drift",
        kind="drift",
        budget=max_drift,
        loss=drift.mean,
        low=drift.low,
        high=drift.high,
        p_value=p_value,
        p_holm=p_value,
        shown=False,
        smallest=smallest,
        too_few=False,
        n=len(counts),
        n_needed=math.ceil(len(counts) * (smallest / max_drift) ** 2) if max_drift > 0 else None,
    )


def status(
    tests: list[LossTest], wanted: bool
) -> Literal["loss", "no loss shown", "too few items", "nothing to judge"]:
    """
    Return what the tests show together.

    Args:
        wanted: whether tasks were asked for; then, without a test, no task could be run.
    """
    if not tests and not wanted:
        return "nothing to judge"
    if any(test.shown for test in tests):
        return "loss"
    return "too few items" if not tests or any(t.too_few for t in tests) else "no loss shown"


def sentence(
    verdict: Verdict,
    changes: Changes,
    drift: DriftSummary | None,
    failed: list[str],
    held_out: HeldOut | None = None,
) -> str:
    """
    Return the verdict in words: ship or not, why, how sure, and what else to know.

    Args:
        verdict, changes, failed: with names that are Markdown already.
    """
    tests = verdict.tests
    judged = [test for test in tests if test.kind == "task"]
    beyond = f" beyond the budget of {verdict.max_drop:g} points" if verdict.max_drop else ""
    on_tasks = " on 1 task" if len(judged) == 1 else f" on {len(judged)} tasks" if judged else ""
    if verdict.status == "nothing to judge":
        parts = []
    elif not tests:
        parts = ["**Nothing was compared.**"]
    elif verdict.status == "loss":
        parts = [
            "**Do not ship as it is:**"
            f" {listed([fallen(test, len(tests)) for test in tests if test.shown])}."
        ]
        if verdict.max_drop is None and any(test.shown for test in judged):
            parts.append("No budget was given (--max_drop), so that any loss counts.")
    elif verdict.status == "too few items":
        few = listed([coarse(test) for test in tests if test.too_few])
        parts = [f"**Not decided, too few items:** no loss{beyond} was shown{on_tasks}, but {few}."]
    elif not beyond:
        unseen = [
            f"one of less than {t.smallest:.1f} points on {t.name} ({t.n:,} items)"
            for t in sorted(judged, key=lambda test: -test.smallest)
        ]
        parts = [
            f"**No loss was shown**{on_tasks}"
            + (f", but {listed(unseen)} could be there unseen." if unseen else ".")
        ]
    else:
        widest = max(judged, key=lambda test: test.high, default=None)
        within = all(test.high <= test.budget for test in tests) and not failed
        parts = [
            ("**Ship:** no loss" if within else "**No loss")
            + f"{beyond} was shown{'' if within else '**'}{on_tasks}"
            + (
                f"; the largest drop that an interval leaves open is {max(widest.high, 0):.1f}"
                f" points ({widest.name}, 95%)."
                if widest
                else "."
            )
        ]
    if failed:
        parts.append(f"No result of {listed(failed)}: not judged.")
    parts += held_out_told(held_out) + drift_told(verdict, drift)
    gains = [
        f"{name} rose by {100 * t.change:.1f} points (95%: {100 * t.low:.1f} to {100 * t.high:.1f})"
        for name, t in changes.tasks.items()
        if t.change > 0 and t.p_holm < ALPHA
    ]
    if gains:
        parts.append(f"Gained: {listed(gains)}.")
    return " ".join([*parts, *only_form(changes)])


def fallen(test: LossTest, family: int) -> str:
    """Return a loss that was shown, in words."""
    p = f"{'Holm-adjusted ' if family > 1 else ''}p {p_text(test.p_holm)}"
    if test.kind == "drift":
        size = (
            f"drift is {test.loss:.3g} nats per token (95%: {test.low:.3g} to {test.high:.3g}; {p})"
        )
    else:
        size = (
            f"{test.name} fell by {test.loss:.1f} points (95%: {test.low:.1f} to"
            f" {test.high:.1f}; {p})"
        )
    return size + (f", beyond the budget of {test.budget:g}" if test.budget > 0 else "")


def coarse(test: LossTest) -> str:
    """Return in words that a test has too few items."""
    if test.kind == "drift":
        return (
            f"drift over {test.n} prompts is too uncertain (about {test.n_needed:,} prompts"
            " would do)"
        )
    return (
        f"{test.name} ({test.n:,} items) would show only drops of {test.smallest:.1f}"
        f" points or more (one of {test.budget:g} takes about {test.n_needed:,} items)"
    )


def held_out_told(held_out: HeldOut | None) -> list[str]:
    """Return the change of the held-out nll in words, and how many answers end in a loop."""
    if held_out is None:
        return []
    size = (
        f"from {held_out.before:.3f} to {held_out.after:.3f} nats per token (change"
        f" {held_out.change:+.3f}, 95%: {held_out.low:+.3f} to {held_out.high:+.3f}; p"
        f" {p_text(held_out.p_value)}; {held_out.rows:,} rows)"
    )
    if held_out.p_value >= ALPHA:
        told = f"**No change of the held-out nll is shown:** it went {size}."
    else:
        told = f"**The held-out nll {'fell' if held_out.change < 0 else 'rose'}** {size}."
    loops = loops_told(held_out.answers)
    return [told, f"**{loops}**"] if loops else [told]


def drift_told(verdict: Verdict, drift: DriftSummary | None) -> list[str]:
    """Return the drift in words, unless it is among the losses already told."""
    test = next((test for test in verdict.tests if test.kind == "drift"), None)
    if drift is None or (test is not None and test.shown):
        return []
    text = f"Drift is {drift.mean:.3g} nats per token (95%: {drift.low:.3g} to {drift.high:.3g})"
    if test is not None:
        text += ", within" if drift.high <= test.budget else ", not shown to be beyond"
        text += f" the budget of {test.budget:g}"
    return [f"{text}."]


def only_form(changes: Changes) -> list[str]:
    """
    Return a sentence for each task whose loss may be the form of the answers alone.

    There the task's score fell, and another filter reads the same answers without a significant
    loss; the interval of its change rules out the loss of the first filter.
    """
    sentences = []
    for name, filters in changes.filters.items():
        task = changes.tasks[name]
        if task.change >= 0 or task.p_holm >= ALPHA:
            continue
        read = task.metric.partition(",")[2]
        sentences += [
            f"On {name} the {read} score fell more than the {other} score ({100 * c.change:+.1f}"
            f" points, 95%: {100 * c.low:+.1f} to {100 * c.high:+.1f}), whose loss is not shown: at"
            " least part of what was lost is the form of the answers."
            for other, c in filters.items()
            if (c.p_value >= ALPHA or c.change >= 0) and c.low > task.change
        ]
    return sentences


def listed(names: list[str]) -> str:
    """Return names as a sentence lists them, the first few of many."""
    if len(names) > SHOWN:
        names = [*names[:SHOWN], f"{len(names) - SHOWN} more"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def p_text(p: float) -> str:
    """Return a p-value as text: 0.03, 3e-7."""
    return f"{p:.2g}".replace("e-0", "e-")
