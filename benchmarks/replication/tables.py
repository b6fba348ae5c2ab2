"""The replication's results: tables and picture of what `replicate.py` has measured."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from tabulate import tabulate

from eaft.comparison.report import colors
from eaft.evaluation.paired import bootstrap_interval, paired_change
from eaft.evaluation.report import save
from eaft.provenance import write_json

RESULTS = Path(__file__).parent / "results"

Numbers = dict[str, Any]


def read_runs(recipe: Numbers, folder: Path) -> list[Numbers]:
    """Return what has been measured, in the recipe's order."""
    runs = [json.loads(file.read_text()) for file in folder.glob("*/measured.json")]
    order = list(recipe["objectives"])
    return sorted(runs, key=lambda run: (run["seed"], order.index(run["objective"]), run["learning_rate"]))


def report(name: str, recipe: Numbers, folder: Path) -> str:
    """Write the results of all runs measured so far as JSON, Markdown and a picture; return the Markdown."""
    runs = read_runs(recipe, folder)
    base = json.loads((folder / "base.json").read_text())
    file = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    write_json(file, {"recipe": recipe, "base": base, "runs": runs})
    text = tables(runs, base)
    file.with_suffix(".md").write_text(text)
    draw(runs, base, file.with_suffix(".png"))
    return text


def best(points: list[Numbers]) -> Numbers:
    """Return the epoch with the lowest held-out nll."""
    return min(points, key=lambda p: p["nll"])


def tables(runs: list[Numbers], base: Numbers) -> str:
    """Return all measurements, and each objective beside the base model and beside SFT, as Markdown."""
    tasks, epochs = list(base["items"]), sorted({p["epoch"] for run in runs for p in run["points"]})
    key, scored = ["objective", "seed", "lr"], fully_scored(runs, base)
    scores = [*key, "epochs", "held-out nll", "drift", *(f"{task} % ({len(base['items'][task])})" for task in tasks)]
    sections = {
        "At the best epoch": (
            scores,
            [["base", "", "", 0, *numbers(base, base)]]
            + [[*about(run), best(run["points"])["epoch"], *numbers(best(run["points"]), base)] for run in scored],
        ),
        "After the last epoch": (
            scores,
            [[*about(run), run["points"][-1]["epoch"], *numbers(run["points"][-1], base)] for run in scored],
        ),
        "Beside SFT at matched target": (
            ["objective", "seed", "matched on", "both reach", "drift", "SFT's drift", "difference"],
            [row for by in ("nll", "target") for row, _ in matched(runs, base, by).values()],
        ),
        "Drift less SFT's, at equal settings": (
            [*key, *(f"epoch {epoch}" for epoch in epochs)],
            [
                [
                    *about(run),
                    *(difference(drift(p) - drift(q)) for p, q in zip(run["points"], sft["points"], strict=True)),
                ]
                for run in runs
                for sft in runs
                if run["objective"] != "sft" == sft["objective"] and about(run)[1:] == about(sft)[1:]
            ],
        ),
        "Every measurement: held-out nll, drift": (
            [*key, *(f"epoch {epoch}" for epoch in epochs)],
            [["base", "", "", f"0: {base['nll']:.3f}, 0"]]
            + [[*about(run), *(f"{p['nll']:.3f}, {p['drift']:.4f}" for p in run["points"])] for run in runs],
        ),
    }
    return (
        "In brackets 95% intervals, over items or prompts. Each objective at the learning rate whose best epoch has "
        "the lowest held-out nll. Tasks: score, and change from the base model in points. Drift is the mean over "
        "tokens; where two are compared, over prompts.\n\n"
    ) + "\n".join(
        f"## {title}\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n"
        for title, (headers, rows) in sections.items()
    )


def about(run: Numbers) -> list[Any]:
    """Return what tells runs apart."""
    return [run["objective"], run["seed"], f"{run['learning_rate']:g}"]


def drift(point: Numbers) -> np.ndarray:
    """Return a measurement's drift, prompt by prompt."""
    return np.array(point["drift_per_prompt"])


def numbers(p: Numbers, base: Numbers) -> list[str]:
    """Return a measurement's cells; tasks that were not run stay empty."""
    low, high = p["drift_95"]
    cells = [f"{p['nll']:.3f}", f"{p['drift']:.4f} ({low:.4f} to {high:.4f})"]
    for task, scores in base["items"].items():
        if task not in p.get("items", {}):
            cells.append("")
        elif p is base:
            cells.append(f"{100 * np.mean(scores):.1f}")
        else:
            c = paired_change(np.array(scores), np.array(p["items"][task]))
            cells.append(f"{100 * c.after:.1f}, {100 * c.change:+.1f} ({100 * c.low:+.1f} to {100 * c.high:+.1f})")
    return cells


def fully_scored(runs: list[Numbers], base: Numbers) -> list[Numbers]:
    """Return the runs, one for each objective and seed, on whose last checkpoint all tasks were run."""
    return [run for run in runs if run["points"][-1]["items"].keys() == base["items"].keys()]


def shortfall(point: Numbers, by: str) -> float:
    """Return what training lowers: the held-out nll, or by how much the target task's score falls short of 1."""
    return point["nll"] if by == "nll" else 1 - float(np.mean(point["items"][by]))


def matched(runs: list[Numbers], base: Numbers, by: str) -> dict[tuple[str, int], tuple[list[Any], np.ndarray]]:
    """
    Return each objective beside SFT where both have learned as much: a table's row, and the paired differences of
    their drift by prompt.

    Learned by the held-out nll, or by the `target` task's score where that was taken at every epoch. Both sides are
    read at the best value that both reach, each at the learning rate (of those that both were run with) that reaches
    it with the least drift, interpolated between epochs.
    """
    groups: dict[tuple[str, int], dict[float, list[Numbers]]] = defaultdict(dict)
    for run in runs:
        if by == "nll" or all(by in p["items"] for p in run["points"]):
            groups[run["objective"], run["seed"]][run["learning_rate"]] = [base, *run["points"]]
    found = {}
    for (objective, seed), group in groups.items():
        both = [rate for rate in group if rate in groups.get(("sft", seed), {})]
        if objective == "sft" or not both:
            continue
        curves, sft = [group[rate] for rate in both], [groups["sft", seed][rate] for rate in both]
        level = max(min(shortfall(p, by) for points in side for p in points) for side in (curves, sft))
        ours, theirs = drift_at(level, curves, by), drift_at(level, sft, by)
        where = ["held-out nll", f"{level:.3f}"] if by == "nll" else ["target score", f"{100 * (1 - level):.1f}%"]
        cells = [*where, f"{ours.mean():.4f}", f"{theirs.mean():.4f}", difference(ours - theirs)]
        found[objective, seed] = ([objective, seed, *cells], ours - theirs)
    return found


def drift_at(level: float, curves: list[list[Numbers]], by: str) -> np.ndarray:
    """Return the least drift, prompt by prompt, with which one of the curves first gets down to a shortfall."""
    reached = []
    for points in curves:
        if shortfall(points[0], by) <= level:
            reached.append(drift(points[0]))
            continue
        for p, q in pairwise(points):
            if shortfall(q, by) <= level:
                share = (shortfall(p, by) - level) / (shortfall(p, by) - shortfall(q, by))
                reached.append((1 - share) * drift(p) + share * drift(q))
                break
    return min(reached, key=np.mean)


def difference(values: np.ndarray) -> str:
    """Return the mean of paired differences, with its interval."""
    low, high = bootstrap_interval(values)
    return f"{values.mean():+.4f} ({low:+.4f} to {high:+.4f})"


def draw(runs: list[Numbers], base: Numbers, path: Path) -> None:
    """Draw held-out nll against drift, drift beside SFT's at matched target, and what the tasks gained and lost."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    names = list(dict.fromkeys(run["objective"] for run in runs))
    palette = colors(names)
    scored = fully_scored(runs, base)
    for run in scored:
        points = [base, *run["points"]]
        first = run is next(r for r in scored if r["objective"] == run["objective"])
        axes[0].plot(
            [p["drift"] for p in points],
            [p["nll"] for p in points],
            marker=".",
            color=palette[run["objective"]],
            label=run["objective"] if first else None,
        )
    axes[0].set(xlabel="drift, KL(base ‖ tuned), nats per token", ylabel="nll of held-out answers (nats)")
    axes[0].set_title("Epoch by epoch, at the best learning rate", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=8)
    by = "target" if matched(runs, base, "target") else "nll"
    seeds = {run["seed"] for run in runs}

    def title(objective: str, seed: int) -> str:
        return objective if len(seeds) == 1 else f"{objective}, seed {seed}"

    rows = [(title(name, seed), values) for (name, seed), (_, values) in matched(runs, base, by).items()][::-1]
    bars(axes[1], [(name, values.mean(), *bootstrap_interval(values)) for name, values in rows])
    what = {"target": "highest target score", "nll": "lowest held-out nll"}[by]
    axes[1].set(xlabel="drift less SFT's, nats per token", title=f"At the {what} that both reach")
    target, general = list(base["items"])[:2]
    for task, shift in ((target, 0.15), (general, -0.15)):
        changes = []
        for run in scored[::-1]:
            c = paired_change(np.array(base["items"][task]), np.array(run["points"][-1]["items"][task]))
            changes.append((title(run["objective"], run["seed"]), 100 * c.change, 100 * c.low, 100 * c.high))
        bars(axes[2], changes, shift, task)
    axes[2].set(xlabel="change from the base model, points", title="After the last epoch")
    axes[2].legend(fontsize=8)
    axes[1].locator_params(axis="x", nbins=6)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.title.set_fontsize(10)
    save(figure, path)


def bars(axis: Any, rows: list[tuple[str, float, float, float]], shift: float = 0, label: str | None = None) -> None:
    """Draw values with their intervals, one below the other, beside zero."""
    values, low, high = (np.array([row[i] for row in rows]) for i in (1, 2, 3))
    places = np.arange(len(rows)) + shift
    axis.errorbar(values, places, xerr=[values - low, high - values], fmt="o", capsize=3, label=label)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [row[0] for row in rows])
