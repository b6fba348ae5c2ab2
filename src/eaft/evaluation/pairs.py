"""The items of the base and the tuned model side by side, and the worst regressions among them."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from eaft.errors import ConfigurationError
from eaft.evaluation.results import Item, Regression, Response

WORST = 20  # regressions shown
SAME = ("task", "doc_id", "prompt_hash", "target_hash", "doc_hash")  # fields that identify an item


def pair(name: str, base: list[Item], tuned: list[Item]) -> list[tuple[Item, Item]]:
    """
    Return the items of two models side by side.

    Args:
        name: the task or group, for the message.

    Raises:
        ConfigurationError: they are not answers to the same prompts.
    """
    asked = [[[getattr(item, key) for key in SAME] for item in items] for items in (base, tuned)]
    if asked[0] != asked[1]:
        raise ConfigurationError(
            f"{name}: the two models were not asked the same; their items cannot be compared."
        )
    return list(zip(base, tuned, strict=True))


def worst_regressions(
    base: dict[str, list[Item]], tuned: dict[str, list[Item]]
) -> list[Regression]:
    """
    Return the worst regressions: one of each task in turn, so that a large task does not hide the
    others.

    The worst has the largest fall of the score. Among equal falls of a multiple-choice task it has
    the largest fall of `margin`.

    Raises:
        ConfigurationError: the items of a task are not answers to the same prompts.
    """
    ranked = []
    for name in tuned:
        lost = [(b, t) for b, t in pair(name, base[name], tuned[name]) if t.score < b.score]
        lost.sort(key=lambda items: (items[1].score - items[0].score, margin_change(*items)))
        ranked.append([regression(name, *items) for items in lost[:WORST]])
    return [item for rank in zip_longest(*ranked) for item in rank if item is not None][:WORST]


def regression(benchmark: str, base: Item, tuned: Item) -> Regression:
    """Return an item that was lost, with both answers."""
    return Regression(
        benchmark=benchmark,
        task=base.task,
        doc_id=base.doc_id,
        prompt=base.prompt,
        target=base.target,
        before=Response(response=base.response, score=base.score),
        after=Response(response=tuned.response, score=tuned.score),
    )


def margin_change(base: Item, tuned: Item) -> float:
    """Return the change of `margin` (nats)."""
    return margin(tuned) - margin(base)


def margin(item: Item) -> float:
    """
    Return by how many nats the right choice leads the likeliest wrong choice; 0 without choices.
    """
    choices, target = item.choices, item.target
    if not choices or not isinstance(target, int) or len(choices) < 2:
        return 0.0
    return choices[target] - max(choice for i, choice in enumerate(choices) if i != target)


def one(values: dict[str, Any]) -> Any:
    """Return the value that all tasks of a group share, else the value of each task."""
    first, *others = values.values()
    return values if any(other != first for other in others) else first
