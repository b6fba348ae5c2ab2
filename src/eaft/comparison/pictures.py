"""The pictures of a comparison: target against drift, training curves, and fronts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt

from eaft.comparison.collect import NLL
from eaft.comparison.results import CheckpointResult, Comparison
from eaft.comparison.sentences import fronts_of, interpolated_fronts
from eaft.comparison.wording import VIEWS, views_of
from eaft.evaluation.report import save
from eaft.training.run_folder import METRICS_FILE

# The pictures


def colors(results: Comparison) -> dict[str, tuple[float, float, float, float]]:
    """Return one colour (RGBA) for each objective, the same in every picture."""
    names = list(results.objectives)
    # tab20 has pairs of colours that are hard to tell apart
    palette = plt.get_cmap("tab10" if len(names) <= 10 else "tab20")
    return {name: palette(i % palette.N) for i, name in enumerate(names)}


@dataclass(frozen=True)
class Axis:
    """
    A quantity on an axis of a picture.

    Attributes:
        name: a field of `Means` and `Spreads`.
        scale: the factor on the axis.
        label: what it is; the arrow says where it is better.
        falls: whether less is better; then the axis is turned round.
    """

    name: str
    scale: float
    label: str
    falls: bool


TARGET = Axis("target", 100, "target (%)  →  better", False)
LEARNED = Axis("nll", 1, "held-out nll, nats per token  →  better", True)
GENERAL = Axis("general", 100, "general ability (%)  →  better", False)
DRIFT = Axis("drift_general", 1, "drift, KL(base ‖ tuned), nats per token  →  better", True)


def draw_pareto(results: Comparison, path: Path) -> None:
    """
    Draw the target (without target tasks, the held-out nll) against general ability and against
    drift: every seed a dot, the mean with its spread on top.
    """
    up = TARGET if "target" in results.groups else LEARNED
    across = [GENERAL, DRIFT] if "general" in results.groups else [DRIFT]
    figure, axes = plt.subplots(
        1,
        len(across),
        figsize=(5 * len(across), 4.2),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    view = views_of(results)[0]
    base = results.base
    for axis, along in zip(axes[0], across, strict=True):
        axis.scatter(
            along.scale * getattr(base, along.name),
            up.scale * getattr(base, up.name),
            marker="*",
            s=160,
            color="black",
            label="base",
            zorder=3,
        )
        for name, color in colors(results).items():
            seeds = [c.numbers[view] for c in results.choices if c.objective == name]
            axis.scatter(
                [along.scale * getattr(s, along.name) for s in seeds],
                [up.scale * getattr(s, up.name) for s in seeds],
                s=16,
                alpha=0.5,
                color=color,
            )
            at = results.objectives[name].at(view)
            x, y = getattr(at, along.name), getattr(at, up.name)
            axis.errorbar(
                along.scale * x.mean,
                up.scale * y.mean,
                up.scale * (y.std or 0),
                along.scale * (x.std or 0),
                fmt="o",
                markersize=8,
                capsize=3,
                color=color,
                label=name,
            )
        axis.set_xlabel(along.label)
        axis.grid(alpha=0.3)
        if along.falls:
            axis.invert_xaxis()  # so that up and right is better in all
    if up.falls:
        axes[0, 0].invert_yaxis()
    axes[0, 0].set_ylabel(up.label)
    axes[0, 0].legend()
    figure.suptitle(VIEWS[view], fontsize=10)
    save(figure, path)


def draw_curves(results: Comparison, folder: Path) -> None:
    """
    Draw the plain nll of training and held-out tokens, and the mean gate, over the steps of the
    chosen runs.
    """
    runs = [run for run in results.runs if run.chosen]
    logs = []
    for run in runs:
        lines = (folder / run.folder / METRICS_FILE).read_text().splitlines()
        log = [json.loads(line) for line in lines]
        logs.append(
            log + [{"step": p.step, NLL: p.nll.mean} for p in run.points if p.nll is not None]
        )
    titles = {
        "nll": "training nll (nats)",
        "eval_nll": "evaluation nll (nats)",
        NLL: "held-out nll (nats)",
        "mean_gate": "mean gate, training",
    }
    panels = {
        m: title for m, title in titles.items() if any(m in line for log in logs for line in log)
    }
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3.8), layout="constrained", squeeze=False
    )
    palette, labelled = colors(results), set()
    for run, log in zip(runs, logs, strict=True):
        for axis, metric in zip(axes[0], panels, strict=True):
            drawn = [(line["step"], line[metric]) for line in log if metric in line]
            label = None if run.objective in labelled else run.objective
            if drawn:
                axis.plot(
                    *zip(*drawn, strict=True),
                    color=palette[run.objective],
                    alpha=0.8,
                    label=label,
                )
        labelled.add(run.objective)
    for axis, (metric, title) in zip(axes[0], panels.items(), strict=True):
        axis.set(
            xlabel="step",
            title=title,
            **({"ylim": (0, None)} if metric == "mean_gate" else {"yscale": "log"}),
        )
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    save(figure, folder / "curves.png")


def draw_fronts(results: Comparison, path: Path) -> None:
    """
    Draw, for each pair and target, both fronts over all checkpoints (and interpolations, if there
    are some), and their difference with its band.
    """
    all_fronts = [fronts for pair in results.pairs for fronts in fronts_of(pair)]
    drawn = [f for f in (*all_fronts, *interpolated_fronts(results)) if f.front is not None]
    rows = max(len(drawn), 1)
    figure, axes = plt.subplots(
        rows, 2, figsize=(10, 3.6 * rows), layout="constrained", squeeze=False
    )
    palette = colors(results)
    for (left, right), fronts in zip(axes, drawn, strict=False):
        pair, target, front = fronts.pair, fronts.target, fronts.front
        assert front is not None
        x = [t if target == NLL else 100 * (1 - t) for t in front.targets]
        for side, between in zip(("first", "second"), fronts.interpolated, strict=True):
            name = getattr(pair, side)
            left.plot(x, getattr(front, side), color=palette[name], label=getattr(fronts, side))
            points = [p for run in results.runs if run.objective == name for p in run.points]
            at = [measured(point, target) for point in points]
            at += [
                (one.nll.mean, one.drift["general"].mean)
                for point in points
                if between
                for one in point.interpolations or []
            ]
            left.scatter(*zip(*at, strict=True), color=palette[name], s=12, alpha=0.5)
        right.plot(x, front.difference, color="black")
        right.fill_between(
            x, front.low, front.high, color="black", alpha=0.15, label="95%, whole curve"
        )
        right.axhline(0, color="black", linewidth=0.8)
        left.set(ylabel="drift, nats per token", title="The least drift at a target so good")
        right.set(ylabel="drift, nats per token", title=f"{fronts.first} minus {fronts.second}")
        for axis in (left, right):
            axis.set_xlabel(f"{target} (nats)" if target == NLL else f"{target} (%)")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
            if target == NLL:
                axis.invert_xaxis()  # so that right is better, whatever the target
    if not drawn:
        for axis in axes[0]:
            axis.set_axis_off()
        axes[0, 0].set_title("No two fronts could be compared")
    save(figure, path)


def measured(point: CheckpointResult, target: str) -> tuple[float, float]:
    """Return a point's target, as it is drawn, and its drift."""
    if target == NLL:
        assert point.nll is not None
        return point.nll.mean, point.drift["general"].mean
    return 100 * point.tasks[target].mean, point.drift["general"].mean
