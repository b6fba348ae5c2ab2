"""The sentences of a comparison: what to choose and why, and where fronts can be told apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eaft.comparison.collect import LEVEL, NLL
from eaft.comparison.fronts import relative
from eaft.comparison.results import Choice, Comparison, FrontDifference, PairResult, PairVerdict
from eaft.comparison.wording import listed, nats, points, shown, up_to, views_of

# The sentence


def headline(results: Comparison) -> str:
    """Return what to do, why, and how sure that is."""
    if not results.pairs:
        return (
            "Nothing was compared: there is no `sft` and no `pairs` in the recipe, or one of each"
            " pair failed."
        )
    preferred = dict.fromkeys(v.prefer for v in results.verdicts if v.prefer is not None)
    beaten = {v.second if v.prefer == v.first else v.first for v in results.verdicts if v.prefer}
    best = [name for name in preferred if name not in beaten]
    if len(best) == 1:
        advice = f"**Choose {best[0]}.**"
    elif best:
        advice = f"**Choose one of {', '.join(best)}**: none is shown to be better than another."
    elif any(v.better for v in results.verdicts):
        advice = "**Choose by what you need: what is gained is paid for.**"
    else:
        advice = "**No objective is shown to be better than another: take the simplest.**"
    compared = dict.fromkeys(name for pair in results.pairs for name in (pair.first, pair.second))
    names = best or list(compared)
    text = [advice]
    text += beside_base(results.choices, names) if results.groups else learned(results, names)
    text += [clause(pair, v) for pair, v in zip(results.pairs, results.verdicts, strict=True)]
    if any(len(pair.seeds) == 1 for pair in results.pairs):
        text.append(
            "One seed: the intervals hold no seed-to-seed variance, and another seed may turn this"
            " round."
        )
    if results.failed:
        text.append("What failed (below) is not judged.")
    return " ".join(text)


def beside_base(choices: list[Choice], names: list[str]) -> list[str]:
    """
    Return what objectives gained and lost beside the base model, and whether that speaks against
    shipping them.
    """
    sentences = []
    for name in names:
        views = [choice.own_changes for choice in choices if choice.objective == name]
        if not views:
            continue
        change = {
            kind: np.mean([view.means[kind].change for view in views]) for kind in views[0].means
        }
        numbers = ", ".join(f"{kind} {100 * value:+.1f}" for kind, value in change.items())
        lost = [
            task
            for task in views[0].tasks
            if any(v.tasks[task].change < 0 and v.tasks[task].p_holm < LEVEL for v in views)
        ]
        said = (
            f"**do not ship it as it is, a loss is shown on {listed(lost)}**"
            if lost
            else "no loss is shown"
        )
        sentences.append(f"Beside the base model {name} has {numbers} points: {said}.")
    return sentences


def learned(results: Comparison, names: list[str]) -> list[str]:
    """Return what objectives learned and how far they drifted, of a recipe without tasks."""
    sentences = []
    for name in names:
        if (objective := results.objectives.get(name)) is None:
            continue
        at = objective.at(views_of(results)[0])
        assert at.nll is not None
        assert results.base.nll is not None
        sentences.append(
            f"{name} has a held-out nll of {at.nll.mean:.3f} (the base model"
            f" {results.base.nll:.3f}) and a drift of {at.drift_general.mean:.4f} nats per token;"
            " no tasks were asked."
        )
    return sentences


def clause(pair: PairResult, verdict: PairVerdict) -> str:
    """Return one pair's verdict, with the numbers it rests on."""
    first, second = pair.first, pair.second
    view = pair.own_choice
    if verdict.better and verdict.worse:
        said = (
            f"{first} is better than {second} in {listed(verdict.better)} and worse in"
            f" {listed(verdict.worse)}"
        )
    elif verdict.better:
        said = (
            f"{first} is better than {second} in {listed(verdict.better)}, and not shown to be"
            " worse in anything"
        )
    elif verdict.worse:
        said = (
            f"{first} is worse than {second} in {listed(verdict.worse)}, and not shown to be"
            " better in anything"
        )
    else:
        said = f"{first} and {second} cannot be told apart"
    numbers = [f"{name} {points(mean)}" for name, mean in view.means.items()]
    fronts = [(name, front.mean) for name, front in pair.fronts.items() if front is not None]
    numbers += [f"drift at equal {name} {nats(mean)}" for name, mean in fronts]
    lower = {NLL: view.nll} if fronts else {"drift": view.drift["general"], NLL: view.nll}
    numbers += [f"{name} {nats(d)}" for name, d in lower.items() if d is not None]
    of_tasks = [
        n for n in (*verdict.better, *verdict.worse) if n in view.tasks and n not in view.means
    ]
    numbers += [f"{name} {points(view.tasks[name])}" for name in of_tasks]
    return f"{said} ({first} minus {second}: {'; '.join(numbers)})."


@dataclass
class Stretch:
    """
    A stretch of targets where two fronts can be told apart.

    Attributes:
        sign: of the difference, 1 or -1.
        start, end: its first and last target, from hard to easy.
        differences: at each of its targets, nats per token.
    """

    sign: int
    start: float
    end: float
    differences: list[float]


def told_apart(front: FrontDifference) -> list[Stretch]:
    """Return the stretches of targets where the band excludes 0."""
    stretches: list[Stretch] = []
    last = 0
    for target, difference, low, high in zip(
        front.targets, front.difference, front.low, front.high, strict=True
    ):
        sign = 1 if low > 0 else -1 if high < 0 else 0
        if sign and sign == last:
            stretches[-1].end = target
            stretches[-1].differences.append(difference)
        elif sign:
            stretches.append(Stretch(sign, target, target, [difference]))
        last = sign
    return stretches


@dataclass(frozen=True)
class Fronts:
    """
    Two fronts and their difference, as they are named and drawn.

    Attributes:
        first, second: their names.
        target: the held-out nll, or a task.
        interpolated: whether the first's points, and the second's, include interpolations.
    """

    pair: PairResult
    first: str
    second: str
    target: str
    front: FrontDifference | None
    interpolated: tuple[bool, bool] = (False, False)


def fronts_of(pair: PairResult) -> list[Fronts]:
    """Return a pair's fronts over checkpoints."""
    return [
        Fronts(pair, pair.first, pair.second, target, front)
        for target, front in pair.fronts.items()
    ]


def interpolated_fronts(results: Comparison) -> list[Fronts]:
    """Return all fronts with interpolations; none where none were measured."""
    if not results.recipe["evaluate"].get("interpolations"):
        return []
    found = []
    for pair in results.pairs:
        first, second = (f"{name} with interpolation" for name in (pair.first, pair.second))
        alone = f"{pair.first} without interpolation"
        found += [
            Fronts(pair, first, second, NLL, pair.interpolated, (True, True)),
            Fronts(pair, alone, second, NLL, pair.against_interpolated, (False, True)),
        ]
    return found


def where(fronts: Fronts) -> str:
    """Say at which targets two fronts can be told apart."""
    front, first, second, target = fronts.front, fronts.first, fronts.second, fronts.target
    if front is None:
        return (
            f"{first} and {second}: there is no {target} that both reach, with every seed, past"
            " their first checkpoint. Save checkpoints earlier, or more of them."
        )
    span = f"{shown(target, front.targets[0])} to {shown(target, front.targets[-1])}"
    on_average = f"(on average {nats(front.mean)}, {100 * relative(front):+.0f}% of {second}'s)"
    stretches = told_apart(front)
    if not stretches:
        return (
            f"{first} and {second} cannot be told apart at any {target} from {span} {on_average}."
        )
    said = []
    for stretch in stretches:
        sizes = sorted(abs(d) for d in stretch.differences)
        at = up_to(shown(target, stretch.start), shown(target, stretch.end))
        word = "more" if stretch.sign > 0 else "less"
        said.append(
            f"at {target} {at} {first} drifts {word}, by"
            f" {up_to(f'{sizes[0]:.4f}', f'{sizes[-1]:.4f}')}"
        )
    whole = len(stretches) == 1 and len(stretches[0].differences) == len(front.targets)
    rest = "" if whole else f"; elsewhere from {span} they cannot be told apart"
    return f"{first} and {second}: {', '.join(said)}{rest} {on_average}."
