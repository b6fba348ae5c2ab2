"""From items to numbers: a model's score, and the change between base and tuned model."""

from __future__ import annotations

import numpy as np

from eaft.evaluation.paired import holm, mean_change, mean_interval, paired_change
from eaft.evaluation.pairs import pair
from eaft.evaluation.results import Change, Changes, Item, TaskChange, TaskScore
from eaft.evaluation.suite import Suite


def compare_items(
    base: dict[str, list[Item]], tuned: dict[str, list[Item]], suites: list[Suite]
) -> Changes:
    """
    Compare two models on the same tasks.

    A task's `p_holm` is adjusted for the number of tasks. Filters are a task's other ways to read
    the same answers (GSM8K: strict and flexible); they count in no mean and no adjustment.

    Args:
        base, tuned: items by task.
        suites: the suites to report a mean of; all their tasks are among the items.

    Raises:
        ConfigurationError: the items of a task are not answers to the same prompts.
    """
    scores: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    by_task: dict[str, Change] = {}
    filters: dict[str, dict[str, Change]] = {}
    for name, items in tuned.items():
        pairs = pair(name, base[name], items)
        scores[name] = np.array([b.score for b, _ in pairs]), np.array([t.score for _, t in pairs])
        choices = np.array([len(item.choices or []) for item in items])
        by_task[name] = paired_change(*scores[name], choices if choices.min() > 1 else None)
        own_filter = items[0].metric.partition(",")[2]
        for other in items[0].scores or {}:
            if other != own_filter:
                filters.setdefault(name, {})[other] = paired_change(
                    np.array([b.scores[other] for b, _ in pairs if b.scores]),
                    np.array([t.scores[other] for _, t in pairs if t.scores]),
                )
    adjusted = holm([change.p_value for change in by_task.values()])
    return Changes(
        tasks={
            name: TaskChange(**vars(change), metric=tuned[name][0].metric, p_holm=p)
            for (name, change), p in zip(by_task.items(), adjusted, strict=True)
        },
        filters=filters,
        means={
            suite.name: mean_change(
                [by_task[name] for name in suite.benchmarks],
                [scores[name] for name in suite.benchmarks],
            )
            for suite in suites
        },
    )


def score_task(items: list[Item]) -> TaskScore:
    """Return one model's score on one task, with its 95% interval."""
    scores = np.array([item.score for item in items])
    low, high = mean_interval(scores)
    return TaskScore(
        metric=items[0].metric, n=len(scores), score=float(scores.mean()), low=low, high=high
    )
