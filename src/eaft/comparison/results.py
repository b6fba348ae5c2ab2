"""
What a comparison found, as numbers: `results.json` (`results.schema.json`) holds all that the
report says.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from eaft.comparison.differences import Difference, ratio_difference, score_difference
from eaft.comparison.fronts import Path, compare_fronts
from eaft.comparison.measure import Measure, Point
from eaft.comparison.recipe import Recipe, Run, described
from eaft.comparison.runs import finished
from eaft.comparison.study import Study
from eaft.errors import EAFTError
from eaft.evaluation.changes import compare_items
from eaft.evaluation.paired import holm, mean_change, paired_change
from eaft.evaluation.results import as_json
from eaft.evaluation.scores import asked
from eaft.evaluation.suite import Suite
from eaft.provenance import environment

Numbers = dict[str, Any]
NLL = "held-out nll"
LEVEL = 0.05


def collect(
    recipe: Recipe,
    measure: Measure,
    studies: dict[tuple[str, int], Study],
    groups: list[Suite],
    failed: list[Numbers],
) -> Numbers:
    """
    Return what `results.json` holds, but for the report's sentence.

    Raises:
        EAFTError: no task of a group could be run on the base model.
    """
    names = {
        group.name: [n for n in group.benchmarks if n in measure.benchmarks] for group in groups
    }
    for group, tasks in names.items():
        if not tasks:
            raise EAFTError(
                f"None of the {group} tasks could be run on the base model: {measure.failed}"
            )
    base = measure.base
    views = ["chosen", "last"] if measure.rows else ["last"]
    models = {"base": [base]}
    for (objective, _), study in studies.items():
        models.setdefault(objective, []).append(study.views[views[0]])
    found: Numbers = {
        "recipe": described(recipe),
        "environment": environment(),
        "protocol": {**asdict(measure.protocol), "limit": recipe.evaluate.limit},
        "asked": {name: how_asked(name, models, measure) for name in measure.benchmarks},
        "kept": {"models": measure.kept},
        "groups": names,
        "prompts": {
            kind: {"tokens": tokens.tolist()} for kind, tokens in measure.prompt_tokens.items()
        },
        "held_out": {"tokens": measure.held_out_tokens.tolist()} if measure.rows else None,
        "base": {**numbers(base, measure, names), "point": describe(base, measure)},
        "runs": [
            about(run, path, measure, study)
            for study in studies.values()
            for run, path in study.paths.items()
        ],
        "choices": [
            {
                "objective": objective,
                "seed": seed,
                "learning_rate": study.run.learning_rate,
                "steps": {view: point.step for view, point in study.views.items()},
                "numbers": {
                    view: numbers(point, measure, names) for view, point in study.views.items()
                },
                "changes": {
                    view: as_json(
                        compare_items(
                            {n: base.items[n] for n in measure.benchmarks},
                            {n: point.items[n] for n in measure.benchmarks},
                            [Suite(name, tasks) for name, tasks in names.items()],
                        )
                    )
                    for view, point in study.views.items()
                },
            }
            for (objective, seed), study in studies.items()
        ],
        "objectives": {},
        "pairs": [],
        "failed": failed,
    }
    for objective in recipe.objectives:
        of_it = [study for (name, _), study in studies.items() if name == objective]
        if of_it:
            found["objectives"][objective] = {
                view: spread([numbers(study.views[view], measure, names) for study in of_it])
                for view in views
            }
            trained = [finished(study.run) or {} for study in of_it]
            found["objectives"][objective]["training"] = {
                name: mean_and_std([run["result"][name] for run in trained])
                for name in ("tokens_per_s", "peak_memory_gib", "train_runtime_s")
            }
    for first, second in recipe.compared:
        seeds = [seed for seed in recipe.seeds if {(first, seed), (second, seed)} <= studies.keys()]
        if seeds:
            sides = tuple([studies[name, seed] for seed in seeds] for name in (first, second))
            found["pairs"].append(
                {
                    "first": first,
                    "second": second,
                    "seeds": seeds,
                    **compare_pair(sides, measure, names, views),
                }
            )
    adjust(found["pairs"], views)
    return found


def compare_pair(
    sides: tuple[list[Study], ...], measure: Measure, groups: dict[str, list[str]], views: list[str]
) -> Numbers:
    """Return two objectives' differences, first less second, by view, and their fronts."""
    found: Numbers = {"views": {}, "fronts": {}}
    for view in views:
        first, second = ([study.views[view] for study in side] for side in sides)
        scores = {
            name: [np.array([p.scores(name) for p in side]) for side in (first, second)]
            for name in measure.benchmarks
        }
        found["views"][view] = {
            "tasks": {name: asdict(compare_scores([pair])) for name, pair in scores.items()},
            "means": {
                group: asdict(compare_scores([scores[n] for n in tasks]))
                for group, tasks in groups.items()
            },
            "drift": {
                kind: asdict(
                    ratio_difference(
                        np.array([p.drift[kind] for p in first]),
                        np.array([p.drift[kind] for p in second]),
                        tokens,
                    )
                )
                for kind, tokens in measure.prompt_tokens.items()
            },
            "nll": None,
        }
        if measure.rows:
            ours, theirs = (np.array([p.nll for p in side]) for side in (first, second))
            found["views"][view]["nll"] = asdict(
                ratio_difference(ours, theirs, measure.held_out_tokens)
            )
    shortfalls: dict[str, tuple[Callable[[Point], np.ndarray], np.ndarray]] = {}
    if measure.rows:
        shortfalls[NLL] = (lambda p: p.nll), measure.held_out_tokens
    for task in measure.config.every_checkpoint_tasks:
        if task in measure.benchmarks:
            count = len(measure.base.items[task])
            shortfalls[task] = (lambda p, task=task: 1 - p.scores(task)), np.ones(count)  # type: ignore[misc]
    for target, (shortfall, tokens) in shortfalls.items():
        paths = [
            [
                [
                    Path(
                        np.array([p.drift["general"] for p in (measure.base, *path)]),
                        np.array([shortfall(p) for p in (measure.base, *path)]),
                    )
                    for path in study.paths.values()
                ]
                for study in side
            ]
            for side in sides
        ]
        found["fronts"][target] = compare_fronts(
            paths[0], paths[1], measure.prompt_tokens["general"], tokens
        )
    return found


def compare_scores(tasks: list[list[np.ndarray]]) -> Difference:
    """
    Return the difference of the mean over tasks, each two objectives' scores `[S, n]`.

    With one seed these are two models on the same items, tested as `eaft eval` tests them.
    """
    if len(tasks[0][0]) > 1:
        return score_difference([(first, second) for first, second in tasks])
    pairs = [(second[0], first[0]) for first, second in tasks]  # before and after
    each = [paired_change(*pair) for pair in pairs]
    change = each[0] if len(each) == 1 else mean_change(each, pairs)
    return Difference(
        change.change, change.low, change.high, change.p_value, change.n, 1, [change.change]
    )


def adjust(pairs: list[Numbers], views: list[str]) -> None:
    """
    Add `p_holm` to every difference: p adjusted for the number of differences of its kind, of all
    pairs.

    The kinds, in each view: single tasks; means, drift and nll; and the fronts' means.
    """
    families: list[list[Numbers]] = []
    for view in views:
        of_view = [pair["views"][view] for pair in pairs]
        families.append([d for v in of_view for d in v["tasks"].values()])
        families.append(
            [
                d
                for v in of_view
                for d in (*v["means"].values(), *v["drift"].values(), v["nll"])
                if d is not None
            ]
        )
    families.append(
        [front["mean"] for pair in pairs for front in pair["fronts"].values() if front is not None]
    )
    for family in families:
        for difference, p in zip(family, holm([d["p_value"] for d in family]), strict=True):
            difference["p_holm"] = p


def verdict(pair: Numbers, groups: dict[str, list[str]]) -> Numbers:
    """
    Return in what the first of a pair is shown to be better and worse than the second: `better`,
    `worse`, `prefer`.

    Shown is what is significant at 0.05, Holm-adjusted, at each objective's own choice: target and
    general score; each task of several, since a mean hides losses that gains cancel; held-out nll,
    since to learn less is a price; and drift at a matched target. Where no fronts could be
    compared, drift at its own choice stands in for the last.

    Args:
        groups: the tasks of each mean.
    """
    view = pair["views"].get("chosen") or pair["views"]["last"]
    fronts = {
        f"drift at equal {name}": front["mean"]
        for name, front in pair["fronts"].items()
        if front is not None
    }
    lower = fronts or {"drift": view["drift"]["general"]}
    lower = {**lower, **({NLL: view["nll"]} if view["nll"] is not None else {})}
    tasks = {
        name: view["tasks"][name] for names in groups.values() if len(names) > 1 for name in names
    }
    higher = {**view["means"], **tasks}
    signs = {
        **{name: (d, 1) for name, d in higher.items()},
        **{name: (d, -1) for name, d in lower.items()},
    }
    shown = {name: sign * d["change"] for name, (d, sign) in signs.items() if d["p_holm"] < LEVEL}
    better, worse = (
        [n for n, gain in shown.items() if gain > 0],
        [n for n, gain in shown.items() if gain < 0],
    )
    prefer = (
        pair["first"] if better and not worse else pair["second"] if worse and not better else None
    )
    return {"better": better, "worse": worse, "prefer": prefer}


def told_apart(front: Numbers) -> list[Numbers]:
    """
    Return the stretches of targets where the band excludes 0: `sign`, `from`, `to` and all
    `differences` of each.
    """
    found: list[Numbers] = []
    before = 0
    for target, difference, low, high in zip(
        front["targets"], front["difference"], front["low"], front["high"], strict=True
    ):
        sign = 1 if low > 0 else -1 if high < 0 else 0
        if sign and sign == before:
            found[-1].update(to=target, differences=[*found[-1]["differences"], difference])
        elif sign:
            found.append({"sign": sign, "from": target, "to": target, "differences": [difference]})
        before = sign
    return found


def how_asked(name: str, models: dict[str, list[Point]], measure: Measure) -> Numbers:
    """
    Return what a benchmark asked, and of how many items what was cut, by objective (over all its
    seeds).
    """
    items = {
        model: [item for point in points for item in point.items[name]]
        for model, points in models.items()
    }
    return as_json(asked(measure.benchmarks[name], measure.protocol, items))


def numbers(point: Point, measure: Measure, groups: dict[str, list[str]]) -> Numbers:
    """
    Return a point's means: of each group and task, drift (nats per token) by kind, and held-out
    nll.
    """
    tasks = {name: float(point.scores(name).mean()) for name in measure.benchmarks}
    return {
        **{
            group: statistics.mean(tasks[name] for name in names) for group, names in groups.items()
        },
        **{
            f"drift_{kind}": mean_of(point.drift[kind], tokens)
            for kind, tokens in measure.prompt_tokens.items()
        },
        **({"nll": mean_of(point.nll, measure.held_out_tokens)} if measure.rows else {}),
        "tasks": tasks,
    }


def mean_of(sums: np.ndarray, tokens: np.ndarray) -> float:
    """Return a mean over all tokens."""
    return float(sums.sum() / tokens.sum())


def describe(point: Point, measure: Measure) -> Numbers:
    """
    Return everything that was measured of a point: also by prompt, by held-out example and by item.
    """
    return {
        "step": point.step,
        "epoch": point.epoch,
        "drift": {
            kind: {"mean": mean_of(sums, measure.prompt_tokens[kind]), "sums": sums.tolist()}
            for kind, sums in point.drift.items()
        },
        "nll": {"mean": mean_of(point.nll, measure.held_out_tokens), "sums": point.nll.tolist()}
        if measure.rows
        else None,
        "tasks": {
            name: {"mean": float(point.scores(name).mean()), "scores": point.scores(name).tolist()}
            for name in point.items
            if name in measure.benchmarks
        },
    }


def about(run: Run, path: list[Point], measure: Measure, study: Study) -> Numbers:
    """Return one run: what it is of, how training went, and every point of its path."""
    trained = finished(run)
    assert trained is not None
    return {
        "objective": run.objective,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "folder": run.name,
        "chosen": run is study.run,
        "commit": trained["environment"]["commit"],
        **{
            name: trained["result"][name]
            for name in ("tokens_per_s", "peak_memory_gib", "train_runtime_s")
        },
        "points": [describe(point, measure) for point in path],
    }


def spread(seeds: list[Numbers]) -> Numbers:
    """Return mean and sample standard deviation over seeds (None for one) of each number."""
    found: Numbers = {n: mean_and_std([s[n] for s in seeds]) for n in seeds[0] if n != "tasks"}
    found["tasks"] = {
        name: mean_and_std([s["tasks"][name] for s in seeds]) for name in seeds[0]["tasks"]
    }
    return found


def mean_and_std(values: list[float]) -> dict[str, float | None]:
    """Return a mean and a sample standard deviation, None for a single value."""
    assert all(math.isfinite(value) for value in values)
    return {
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }
