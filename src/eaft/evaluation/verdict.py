"""
Is a loss shown that is beyond the budget, could one be there unseen, and a sentence that says so.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from eaft.evaluation.paired import (
    ALPHA,
    FEWEST_ITEMS,
    FEWEST_PROMPTS,
    FOUND,
    Change,
    Z,
    bootstrap_test,
    drop_test,
    holm,
    items_needed,
)
from eaft.text import markdown_strings

LOSS, NO_LOSS, TOO_FEW = "loss", "no loss shown", "too few items"
SHOWN = 3  # tasks named in the sentence; the table has them all


def judge(
    results: dict[str, Any], max_drop: float | None = None, max_drift: float | None = None
) -> dict[str, Any]:
    """
    Return what an evaluation against a base model shows, for machines and as a sentence.

    A loss is shown where the hypothesis that a task's drop is `max_drop` (that drift is
    `max_drift`) has p < 0.05, adjusted by Holm's method over all tasks (and drift, if it has a
    budget), and the drop is larger than that. The tests are two-sided, so that with no budget it is
    the p of the table that decides. Where no loss is shown, items are too few if this many would
    not show a drop of the budget's size four times in five, and the interval does not rule it out
    either; or too few for the interval to be relied on.

    Args:
        results: `tasks` and `filters` (mappings of `Change`), `drift` and `failed` of `eaft eval`'s
            results.
        max_drop: percentage points that each task may lose; None: 0, any loss counts.
        max_drift: nats per token; None: drift is told, and not judged.

    Returns:
        `status`: "loss", "no loss shown" or "too few items"; `sentence` (Markdown); `max_drop`,
        `max_drift` as given; `over_budget`: whether a loss is shown beyond a budget that was given;
        and `tests`, for each task (and drift, if it has a budget): `name`, `kind` ("task" or
        "drift"), `budget`, `loss` and its interval `low`, `high` (the drop in percentage points, or
        the drift in nats per token), `p_value`, `p_holm`, `shown`, `smallest` (the drop, or the
        drift beyond the budget, that would be shown four times in five), `too_few`, `n` and
        `n_needed` (items or prompts; None where there are enough).
    """
    tests = [
        task_test(name, change_of(task), max_drop or 0.0) for name, task in results["tasks"].items()
    ]
    if max_drift is not None and results["drift"] is not None:
        tests.append(drift_test(results["drift"], max_drift))
    for test, p in zip(tests, holm([test["p_value"] for test in tests]), strict=True):
        test["p_holm"] = p
        test["shown"] = p < ALPHA and test["loss"] > test["budget"]
        fewest = (
            FEWEST_ITEMS if test["kind"] == "task" else FEWEST_PROMPTS
        )  # for an interval that can be relied on
        unseen = test["n"] < fewest or test["high"] > test["budget"] < test["smallest"]
        test["too_few"] = test["budget"] > 0 and not test["shown"] and unseen
        test["n_needed"] = max(test["n_needed"], fewest) if test["too_few"] else None
    given = {"task": max_drop is not None, "drift": max_drift is not None}
    verdict: dict[str, Any] = {
        "status": status(tests),
        "over_budget": any(test["shown"] and given[test["kind"]] for test in tests),
        "max_drop": max_drop,
        "max_drift": max_drift,
        "tests": tests,
    }
    told = {name: results[name] for name in ("tasks", "filters", "failed", "drift")}
    return {**verdict, "sentence": sentence(markdown_strings(verdict), markdown_strings(told))}


def change_of(mapping: dict[str, Any]) -> Change:
    """Return a `Change` from how it is stored."""
    return Change(**{field: mapping[field] for field in Change.__dataclass_fields__})


def task_test(name: str, change: Change, max_drop: float) -> dict[str, Any]:
    """Return a task's test against its budget (percentage points)."""
    return {
        "name": name,
        "kind": "task",
        "budget": max_drop,
        "loss": -100 * change.change,
        "low": -100 * change.high,
        "high": -100 * change.low,
        "p_value": drop_test(change, max_drop / 100),
        "smallest": 100 * change.smallest_drop,
        "n": change.n,
        "n_needed": items_needed(change, max_drop / 100) if max_drop > 0 else None,
    }


def drift_test(drift: dict[str, Any], max_drift: float) -> dict[str, Any]:
    """Return drift's test against its budget (nats per token)."""
    counts = np.array(drift["tokens_per_prompt"])
    smallest = FOUND * (drift["high"] - drift["low"]) / (2 * Z)
    return {
        "name": "drift",
        "kind": "drift",
        "budget": max_drift,
        "loss": drift["mean"],
        "low": drift["low"],
        "high": drift["high"],
        "p_value": bootstrap_test(np.array(drift["per_prompt"]) * counts, counts, max_drift),
        "smallest": smallest,
        "n": len(counts),
        "n_needed": math.ceil(len(counts) * (smallest / max_drift) ** 2) if max_drift > 0 else None,
    }


def status(tests: list[dict[str, Any]]) -> str:
    """Return what the tests show together."""
    if any(test["shown"] for test in tests):
        return LOSS
    return TOO_FEW if not tests or any(test["too_few"] for test in tests) else NO_LOSS


def sentence(verdict: dict[str, Any], results: dict[str, Any]) -> str:
    """
    Return what was found, in the words of who must decide: ship or not, why, how sure, and what
    else to know.
    """
    tests = verdict["tests"]
    judged = [test for test in tests if test["kind"] == "task"]
    beyond = f" beyond the budget of {verdict['max_drop']:g} points" if verdict["max_drop"] else ""
    tasks = "1 task" if len(judged) == 1 else f"{len(judged)} tasks"
    if not tests:
        parts = ["**Nothing was compared.**"]
    elif verdict["status"] == LOSS:
        parts = [
            "**Do not ship as it is:**"
            f" {listed([fallen(test, len(tests)) for test in tests if test['shown']])}."
        ]
        if verdict["max_drop"] is None and any(test["shown"] for test in judged):
            parts.append("No budget was given (--max_drop), so that any loss counts.")
    elif verdict["status"] == TOO_FEW:
        few = listed([coarse(test) for test in tests if test["too_few"]])
        parts = [
            f"**Not decided, too few items:** no loss{beyond} was shown on {tasks}, but {few}."
        ]
    elif not beyond:
        unseen = sorted(judged, key=lambda test: -test["smallest"])
        few = listed(
            [
                f"one of less than {t['smallest']:.1f} points on {t['name']} ({t['n']:,} items)"
                for t in unseen
            ]
        )
        parts = [
            f"**No loss was shown** on {tasks}"
            + (f", but {few} could be there unseen." if unseen else ".")
        ]
    else:
        widest = max(judged, key=lambda test: test["high"], default=None)
        within = all(test["high"] <= test["budget"] for test in tests) and not results["failed"]
        parts = [
            ("**Ship:** no loss" if within else "**No loss")
            + f"{beyond} was shown{'' if within else '**'} on {tasks}"
            + (
                f"; the largest drop that an interval leaves open is {max(widest['high'], 0):.1f}"
                f" points ({widest['name']}, 95%)."
                if widest
                else "."
            )
        ]
    if results["failed"]:
        parts.append(f"{listed(list(results['failed']))} could not be measured: not judged.")
    parts += drift_told(verdict, results["drift"])
    gains = [
        f"{name} rose by {100 * t['change']:.1f} points (95%: {100 * t['low']:.1f} to"
        f" {100 * t['high']:.1f})"
        for name, t in results["tasks"].items()
        if t["change"] > 0 and t["p_holm"] < ALPHA
    ]
    if gains:
        parts.append(f"Gained: {listed(gains)}.")
    return " ".join([*parts, *only_form(results)])


def fallen(test: dict[str, Any], family: int) -> str:
    """Return a loss that was shown, in words."""
    p = f"{'Holm-adjusted ' if family > 1 else ''}p {p_text(test['p_holm'])}"
    if test["kind"] == "drift":
        size = (
            f"drift is {test['loss']:.3g} nats per token (95%: {test['low']:.3g} to"
            f" {test['high']:.3g}; {p})"
        )
    else:
        size = (
            f"{test['name']} fell by {test['loss']:.1f} points (95%: {test['low']:.1f} to"
            f" {test['high']:.1f}; {p})"
        )
    return size + (f", beyond the budget of {test['budget']:g}" if test["budget"] > 0 else "")


def coarse(test: dict[str, Any]) -> str:
    """Return in words that a test has too few items."""
    if test["kind"] == "drift":
        return (
            f"drift over {test['n']} prompts is too uncertain (about {test['n_needed']:,} prompts"
            " would do)"
        )
    return (
        f"{test['name']} ({test['n']:,} items) would show only drops of {test['smallest']:.1f}"
        f" points or more (one of {test['budget']:g} takes about {test['n_needed']:,} items)"
    )


def drift_told(verdict: dict[str, Any], drift: dict[str, Any] | None) -> list[str]:
    """Return the drift in words, unless it is among the losses already told."""
    test = next((test for test in verdict["tests"] if test["kind"] == "drift"), None)
    if drift is None or (test is not None and test["shown"]):
        return []
    text = (
        f"Drift is {drift['mean']:.3g} nats per token (95%: {drift['low']:.3g} to"
        f" {drift['high']:.3g})"
    )
    if test is not None:
        text += ", within" if drift["high"] <= test["budget"] else ", not shown to be beyond"
        text += f" the budget of {test['budget']:g}"
    return [f"{text}."]


def only_form(results: dict[str, Any]) -> list[str]:
    """
    Return where a task's score fell and another reading of the same answers (filter) less, if at
    all, in words.

    That is where the other's change is not significant, and its interval rules out what the first
    lost.
    """
    found = []
    for name, filters in results["filters"].items():
        task = results["tasks"][name]
        if task["change"] >= 0 or task["p_holm"] >= ALPHA:
            continue
        read = task["metric"].partition(",")[2]
        found += [
            f"On {name} the {read} score fell more than the {other} score ({100 * c['change']:+.1f}"
            f" points, 95%: {100 * c['low']:+.1f} to {100 * c['high']:+.1f}), of which no loss is"
            " shown: at least part of what was lost is the form of the answers."
            for other, c in filters.items()
            if (c["p_value"] >= ALPHA or c["change"] >= 0) and c["low"] > task["change"]
        ]
    return found


def listed(names: list[str]) -> str:
    """Return names as a sentence lists them, the first few of many."""
    if len(names) > SHOWN:
        names = [*names[:SHOWN], f"{len(names) - SHOWN} more"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def p_text(p: float) -> str:
    """Return a p-value as text: 0.03, 3e-7."""
    return f"{p:.2g}".replace("e-0", "e-")
