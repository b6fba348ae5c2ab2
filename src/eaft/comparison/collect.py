"""From measured models to a `Comparison`: means, differences, fronts and verdicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from eaft.comparison.differences import ratio_difference, score_difference
from eaft.comparison.fronts import Trajectory, compare_fronts
from eaft.comparison.measurer import Between, Measurer, Point
from eaft.comparison.recipe import Recipe, Run, described
from eaft.comparison.results import (
    BaseResult,
    CheckpointResult,
    Choice,
    Comparison,
    Difference,
    Failure,
    FrontDifference,
    InterpolationResult,
    KeptModels,
    Means,
    ObjectiveResult,
    PairResult,
    PairVerdict,
    PairView,
    RunResult,
    Spread,
    Spreads,
    Sums,
    TaskScores,
    TokenCounts,
)
from eaft.comparison.study import Study
from eaft.errors import EAFTError
from eaft.evaluation.changes import compare_items
from eaft.evaluation.comparable import differing
from eaft.evaluation.paired import holm, mean_change, paired_change
from eaft.evaluation.results import Item, RecordedProtocol
from eaft.evaluation.scores import asked
from eaft.evaluation.suite import Suite
from eaft.provenance import environment
from eaft.training.apart import finished

NLL = "held-out nll"
LEVEL = 0.05
TRAINING = ("tokens_per_s", "peak_memory_gib", "train_runtime_s")  # of a run's `run.json`


def collect(
    recipe: Recipe,
    measurer: Measurer,
    studies: dict[tuple[str, int], Study],
    groups: list[Suite],
    failed: list[Failure],
) -> Comparison:
    """
    Return the results, without the report's sentence.

    Args:
        studies: by objective and seed.

    Raises:
        EAFTError: no task of a group could be run on the base model.
    """
    benchmarks = measurer.benchmarks
    groups = [Suite(g.name, [n for n in g.benchmarks if n in benchmarks]) for g in groups]
    for group in groups:
        if not group.benchmarks:
            raise EAFTError(
                f"None of the {group.name} tasks could be run on the base model: {measurer.failed}"
            )
    base = measurer.base
    views = ["chosen", "last"] if measurer.rows else ["last"]
    points = {"base": [base]}
    for (objective, _), study in studies.items():
        points.setdefault(objective, []).append(study.views[views[0]])
    pairs = [
        compare_pair(first, second, seeds, studies, measurer, groups, views)
        for first, second in recipe.compared
        if (seeds := [s for s in recipe.seeds if {(first, s), (second, s)} <= studies.keys()])
    ]
    adjust(pairs, views)
    return Comparison(
        sentence="",
        verdicts=[verdict(pair, groups) for pair in pairs],
        recipe=asdict(described(recipe)),
        environment=environment(),
        protocol=RecordedProtocol(**asdict(measurer.protocol), limit=recipe.evaluate.limit),
        asked={
            name: asked(
                benchmark,
                measurer.protocol,
                {model: items_of(name, of_model) for model, of_model in points.items()},
            )
            for name, benchmark in benchmarks.items()
        },
        kept=KeptModels(models=measurer.kept),
        groups={group.name: group.benchmarks for group in groups},
        prompts={
            kind: TokenCounts(tokens=tokens.tolist())
            for kind, tokens in measurer.prompt_tokens.items()
        },
        held_out=TokenCounts(tokens=measurer.held_out_tokens.tolist()) if measurer.rows else None,
        base=BaseResult(
            **vars(means(base, measurer, groups)), point=checkpoint_result(base, measurer)
        ),
        runs=[
            run_result(run, trajectory, measurer, chosen=run is study.run)
            for study in studies.values()
            for run, trajectory in study.points.items()
        ],
        choices=[
            Choice(
                objective=objective,
                seed=seed,
                learning_rate=study.run.learning_rate,
                steps={view: point.step for view, point in study.views.items()},
                numbers={v: means(point, measurer, groups) for v, point in study.views.items()},
                changes={
                    view: compare_items(
                        {name: base.items[name] for name in benchmarks},
                        {name: point.items[name] for name in benchmarks},
                        groups,
                    )
                    for view, point in study.views.items()
                },
            )
            for (objective, seed), study in studies.items()
        ],
        objectives={
            objective: objective_result(of_objective, measurer, groups)
            for objective in recipe.objectives
            if (of_objective := [s for (name, _), s in studies.items() if name == objective])
        },
        pairs=pairs,
        failed=failed,
    )


def compare_pair(
    first: str,
    second: str,
    seeds: list[int],
    studies: dict[tuple[str, int], Study],
    measurer: Measurer,
    groups: list[Suite],
    views: list[str],
) -> PairResult:
    """Return how two objectives differ, by view and in their fronts, over the seeds of both."""
    sides = [[studies[name, seed] for seed in seeds] for name in (first, second)]
    at_views = {}
    for view in views:
        points = [[study.views[view] for study in side] for side in sides]
        at_views[view] = compare_points(points[0], points[1], measurer, groups)
    return PairResult(
        first=first,
        second=second,
        seeds=seeds,
        views=at_views,
        fronts=compare_trajectories(sides[0], sides[1], measurer),
        interpolated=compare_interpolated(sides[0], sides[1], measurer, both=True),
        against_interpolated=compare_interpolated(sides[0], sides[1], measurer, both=False),
    )


def compare_points(
    first: list[Point], second: list[Point], measurer: Measurer, groups: list[Suite]
) -> PairView:
    """Return how two objectives' points differ, one point a seed."""
    scores = {
        name: (
            np.array([point.scores(name) for point in first]),
            np.array([point.scores(name) for point in second]),
        )
        for name in measurer.benchmarks
    }
    nll = None
    if measurer.rows:
        sums = [np.array([point.nll for point in side]) for side in (first, second)]
        nll = ratio_difference(sums[0], sums[1], measurer.held_out_tokens)
    return PairView(
        tasks={name: compare_scores([pair]) for name, pair in scores.items()},
        means={g.name: compare_scores([scores[name] for name in g.benchmarks]) for g in groups},
        drift={
            kind: ratio_difference(
                np.array([point.drift[kind] for point in first]),
                np.array([point.drift[kind] for point in second]),
                tokens,
            )
            for kind, tokens in measurer.prompt_tokens.items()
        },
        nll=nll,
    )


def compare_trajectories(
    first: list[Study], second: list[Study], measurer: Measurer
) -> dict[str, FrontDifference | None]:
    """Return how the fronts of two objectives differ, by target; the same seeds in both."""
    shortfalls: dict[str, tuple[Callable[[Point], np.ndarray], np.ndarray]] = {}
    if measurer.rows:
        shortfalls[NLL] = (lambda point: point.nll), measurer.held_out_tokens
    for task in measurer.config.every_checkpoint_tasks:
        if task in measurer.benchmarks:
            one_each = np.ones(len(measurer.base.items[task]))
            shortfalls[task] = (lambda point, task=task: 1 - point.scores(task)), one_each  # type: ignore[misc]
    fronts = {}
    for target, (shortfall, tokens) in shortfalls.items():
        sides = [
            [
                [trajectory(points, measurer.base, shortfall) for points in study.points.values()]
                for study in side
            ]
            for side in (first, second)
        ]
        fronts[target] = compare_fronts(
            sides[0], sides[1], measurer.prompt_tokens["general"], tokens
        )
    return fronts


def compare_interpolated(
    first: list[Study], second: list[Study], measurer: Measurer, both: bool
) -> FrontDifference | None:
    """
    Return how the fronts over checkpoints and interpolations differ, at equal held-out nll.

    Args:
        both: whether the first objective's front has its interpolations, or its checkpoints alone.
    """
    if not measurer.config.interpolations:
        return None
    sides = []
    for side, between in ((first, both), (second, True)):
        ways = [
            [way for points in study.points.values() for way in ways_of(points, measurer, between)]
            for study in side
        ]
        sides.append(ways)
    tokens = measurer.prompt_tokens["general"], measurer.held_out_tokens
    return compare_fronts(sides[0], sides[1], *tokens)


def ways_of(points: list[Point], measurer: Measurer, between: bool) -> list[Trajectory]:
    """
    Return one run's way through its checkpoints and, if asked for, the way from the base model to
    each of them through its interpolations.
    """
    base = measurer.base
    ways: list[list[Point | Between]] = [[base, *points]]
    if between:
        ways += [[base, *point.between, point] for point in points]
    return [
        Trajectory(
            np.array([point.drift["general"] for point in way]),
            np.array([point.nll for point in way]),
        )
        for way in ways
    ]


def trajectory(
    points: list[Point], base: Point, shortfall: Callable[[Point], np.ndarray]
) -> Trajectory:
    """Return one run's path from the base model through its checkpoints."""
    way = [base, *points]
    return Trajectory(
        np.array([point.drift["general"] for point in way]),
        np.array([shortfall(point) for point in way]),
    )


def compare_scores(tasks: list[tuple[np.ndarray, np.ndarray]]) -> Difference:
    """
    Return the difference of the mean over tasks, each two objectives' scores `[S, n]`.

    With one seed these are two models on the same items, tested as `eaft eval` tests them.
    """
    if len(tasks[0][0]) > 1:
        return score_difference(tasks)
    pairs = [(second[0], first[0]) for first, second in tasks]  # the second stands for the base
    each = [paired_change(*pair) for pair in pairs]
    change = each[0] if len(each) == 1 else mean_change(each, pairs)
    return Difference(
        change=change.change,
        low=change.low,
        high=change.high,
        p_value=change.p_value,
        p_holm=change.p_value,
        items=change.n,
        seeds=1,
        per_seed=[change.change],
    )


def adjust(pairs: list[PairResult], views: list[str]) -> None:
    """
    Set `p_holm` of every difference: p adjusted for the number of differences of its kind, of all
    pairs.

    The kinds, in each view: single tasks; means, drift and nll; and the fronts' means.
    """
    families: list[list[Difference]] = []
    for view in views:
        of_view = [pair.views[view] for pair in pairs]
        families.append([d for v in of_view for d in v.tasks.values()])
        others = [d for v in of_view for d in (*v.means.values(), *v.drift.values(), v.nll)]
        families.append([d for d in others if d is not None])
    families.append(
        [front.mean for pair in pairs for front in pair.fronts.values() if front is not None]
    )
    interpolated = [f for pair in pairs for f in (pair.interpolated, pair.against_interpolated)]
    families.append([front.mean for front in interpolated if front is not None])
    for family in families:
        for difference, p in zip(family, holm([d.p_value for d in family]), strict=True):
            difference.p_holm = p


def verdict(pair: PairResult, groups: list[Suite]) -> PairVerdict:
    """
    Return in what the first of a pair is shown to be better and worse than the second.

    A difference is shown if it is significant at 0.05, Holm-adjusted, at each objective's own
    choice. It counts in: target and general score; each task of several, since a mean hides losses
    that gains cancel; held-out nll, since to learn less is a price; and drift at a matched target.
    If no fronts could be compared, drift at each objective's own choice counts in their place.
    """
    view = pair.own_choice
    lower = {
        f"drift at equal {name}": front.mean
        for name, front in pair.fronts.items()
        if front is not None
    } or {"drift": view.drift["general"]}
    if view.nll is not None:
        lower[NLL] = view.nll
    several = [group for group in groups if len(group.benchmarks) > 1]
    tasks = {name: view.tasks[name] for group in several for name in group.benchmarks}
    gains = {name: (d, d.change) for name, d in {**view.means, **tasks}.items()}
    gains |= {name: (d, -d.change) for name, d in lower.items()}
    shown = {name: gain for name, (d, gain) in gains.items() if d.p_holm < LEVEL}
    better = [name for name, gain in shown.items() if gain > 0]
    worse = [name for name, gain in shown.items() if gain < 0]
    prefer = None
    if bool(better) != bool(worse):
        prefer = pair.first if better else pair.second
    return PairVerdict(
        first=pair.first, second=pair.second, better=better, worse=worse, prefer=prefer
    )


def items_of(task: str, points: list[Point]) -> list[Item]:
    """Return the items of one task, of all points."""
    return [item for point in points for item in point.items[task]]


def means(point: Point, measurer: Measurer, groups: list[Suite]) -> Means:
    """Return the means of one model."""
    tasks = {name: float(point.scores(name).mean()) for name in measurer.benchmarks}
    by_group = {g.name: statistics.mean(tasks[name] for name in g.benchmarks) for g in groups}
    drift = {
        kind: mean_of(point.drift[kind], tokens) for kind, tokens in measurer.prompt_tokens.items()
    }
    return Means(
        target=by_group.get("target"),
        general=by_group.get("general"),
        drift_general=drift["general"],
        drift_target=drift.get("target"),
        nll=mean_of(point.nll, measurer.held_out_tokens) if measurer.rows else None,
        tasks=tasks,
    )


def mean_of(sums: np.ndarray, tokens: np.ndarray) -> float:
    """Return a mean over all tokens."""
    return float(sums.sum() / tokens.sum())


def sums_of(sums: np.ndarray, tokens: np.ndarray) -> Sums:
    """Return sums (nats) with their mean over all tokens."""
    return Sums(mean=mean_of(sums, tokens), sums=sums.tolist())


def checkpoint_result(point: Point, measurer: Measurer) -> CheckpointResult:
    """Return all measurements of a point, also by prompt, by held-out example and by item."""
    scores = {name: point.scores(name) for name in point.items if name in measurer.benchmarks}
    return CheckpointResult(
        step=point.step,
        epoch=point.epoch,
        drift={
            kind: sums_of(sums, measurer.prompt_tokens[kind]) for kind, sums in point.drift.items()
        },
        nll=sums_of(point.nll, measurer.held_out_tokens) if measurer.rows else None,
        tasks={
            name: TaskScores(mean=float(values.mean()), scores=values.tolist())
            for name, values in scores.items()
        },
        interpolations=[
            InterpolationResult(
                share=between.share,
                drift={
                    kind: sums_of(sums, measurer.prompt_tokens[kind])
                    for kind, sums in between.drift.items()
                },
                nll=sums_of(between.nll, measurer.held_out_tokens),
            )
            for between in point.between
        ]
        or None,
    )


def run_result(run: Run, points: list[Point], measurer: Measurer, chosen: bool) -> RunResult:
    """Return one run: how training went, and all its checkpoints."""
    trained = finished(run.folder)
    assert trained is not None
    return RunResult(
        objective=run.objective,
        seed=run.seed,
        learning_rate=run.learning_rate,
        folder=run.name,
        chosen=chosen,
        commit=trained["environment"].commit,
        **{name: trained["result"][name] for name in TRAINING},
        differs=differing(measurer.base_path, str(run.folder), measurer.config.protocol.model_args),
        points=[checkpoint_result(point, measurer) for point in points],
    )


def objective_result(
    studies: list[Study], measurer: Measurer, groups: list[Suite]
) -> ObjectiveResult:
    """Return one objective over its seeds."""
    spreads = {
        view: spread([means(study.views[view], measurer, groups) for study in studies])
        for view in studies[0].views
    }
    results = [trained["result"] for study in studies if (trained := finished(study.run.folder))]
    return ObjectiveResult(
        chosen=spreads.get("chosen"),
        last=spreads["last"],
        training={name: mean_and_std([result[name] for result in results]) for name in TRAINING},
    )


def spread(seeds: list[Means]) -> Spreads:
    """Return each mean's spread over seeds."""
    first = seeds[0]
    return Spreads(
        target=spread_of_known([seed.target for seed in seeds]),
        general=spread_of_known([seed.general for seed in seeds]),
        drift_general=mean_and_std([seed.drift_general for seed in seeds]),
        drift_target=spread_of_known([seed.drift_target for seed in seeds]),
        nll=spread_of_known([seed.nll for seed in seeds]),
        tasks={name: mean_and_std([seed.tasks[name] for seed in seeds]) for name in first.tasks},
    )


def spread_of_known(values: list[float | None]) -> Spread | None:
    """Return the spread of values that all seeds have, or none has."""
    known = [value for value in values if value is not None]
    return mean_and_std(known) if known else None


def mean_and_std(values: list[float]) -> Spread:
    """Return a mean and a sample standard deviation, None for a single value."""
    assert all(math.isfinite(value) for value in values)
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.mean(values), std=std)
