"""Tables and pictures of a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from tabulate import tabulate

from eaft.evaluation.report import save
from eaft.training.train import METRICS_FILE

Numbers = dict[str, Any]


def cell(numbers: Numbers, name: str, scale: float = 1, digits: int = 1, minus: float | None = None) -> str:
    """Return a mean, or its difference from `minus`, with its spread over seeds if there is one."""
    mean, std = numbers[name]["mean"], numbers[name]["std"]
    assert mean is not None
    text = f"{scale * mean:.{digits}f}" if minus is None else f"{scale * (mean - minus):+.{digits}f}"
    return text if std is None else f"{text} ± {scale * std:.{digits}f}"


def table_1(results: dict[str, Any]) -> str:
    """Return the comparison laid out as the paper's Table 1: every benchmark, the averages, and their change."""
    base, groups = results["base"], results["groups"]
    headers = ["method"]
    rows = [["base"], *([name] for name in results["objectives"])]
    for group in ("general", "target"):
        headers += [*groups[group], f"{group} avg.", "change"]
        rows[0] += [*(f"{100 * base['tasks'][name]:.1f}" for name in groups[group]), f"{100 * base[group]:.1f}", ""]
        for row, numbers in zip(rows[1:], results["objectives"].values(), strict=True):
            row += [cell(numbers["tasks"], name, 100) for name in groups[group]]
            row += [cell(numbers, group, 100), cell(numbers, group, 100, minus=base[group])]
    note = "All in %, laid out as Table 1 of arXiv:2601.02151; tests of each run against the base: results.json."
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True) + "\n\n" + note


def table(results: dict[str, Any]) -> str:
    """Return the comparison as a Markdown table: one row an objective, mean ± standard deviation over the seeds."""
    base = results["base"]

    rows = [["base", f"{100 * base['target']:.1f}", "", f"{100 * base['general']:.1f}", "", "0", "0", "", ""]]
    for name, numbers in results["objectives"].items():
        on_target = "drift_target" in numbers
        rows.append(
            [
                name,
                cell(numbers, "target", 100),
                cell(numbers, "target", 100, minus=base["target"]),
                cell(numbers, "general", 100),
                cell(numbers, "general", 100, minus=base["general"]),
                cell(numbers, "drift_general", digits=4),
                cell(numbers, "drift_target", digits=4) if on_target else "",
                cell(numbers, "tokens_per_s", digits=0),
                cell(numbers, "peak_memory_gib", digits=2),
            ]
        )
    headers = ["objective", "target %", "change", "general %", "change"]
    headers += ["drift, general", "drift, target", "tokens/s", "peak GiB"]
    seeds = results["recipe"]["seeds"]
    note = f"Seeds: {', '.join(map(str, seeds))}" + ("; mean ± standard deviation" if len(seeds) > 1 else "")
    note += ". Drift: mean KL(base ‖ tuned), nats per token, over the base model's own answers."
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True) + "\n\n" + note


def colors(names: list[str]) -> dict[str, Any]:
    """Return one colour for each objective, the same in every picture."""
    return {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}


def draw_pareto(results: dict[str, Any], path: Path) -> None:
    """Draw target against general ability and against drift: every seed a dot, the mean with its spread on top."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, quantity, scale, label in (
        (axes[0], "general", 100, "general ability (%)  →  better"),
        (axes[1], "drift_general", 1, "drift, KL(base ‖ tuned), nats per token  →  better"),
    ):
        base = results["base"]
        axis.scatter(
            scale * base[quantity], 100 * base["target"], marker="*", s=160, color="black", label="base", zorder=3
        )
        for name, color in colors(list(results["objectives"])).items():
            runs = [run for run in results["runs"] if run["objective"] == name]
            axis.scatter(
                [scale * r[quantity] for r in runs], [100 * r["target"] for r in runs], s=16, alpha=0.5, color=color
            )
            x, y = results["objectives"][name][quantity], results["objectives"][name]["target"]
            xerr, yerr = scale * (x["std"] or 0), 100 * (y["std"] or 0)
            axis.errorbar(
                scale * x["mean"],
                100 * y["mean"],
                yerr,
                xerr,
                fmt="o",
                markersize=8,
                capsize=3,
                color=color,
                label=name,
            )
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[1].invert_xaxis()  # so that up and right is better in both
    axes[0].set_ylabel("target (%)  →  better")
    axes[0].legend()
    save(figure, path)


def draw_curves(runs: dict[tuple[str, int], Path], path: Path) -> None:
    """Draw the plain nll of training and held-out tokens, and the mean gate, over the steps of every run."""
    logs = {run: [json.loads(line) for line in (f / METRICS_FILE).read_text().splitlines()] for run, f in runs.items()}
    titles = {"nll": "training nll (nats)", "eval_nll": "held-out nll (nats)", "mean_gate": "mean gate, training"}
    panels = {m: title for m, title in titles.items() if any(m in log for lines in logs.values() for log in lines)}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.8), layout="constrained", squeeze=False)
    palette = colors(list(dict.fromkeys(name for name, _ in runs)))
    for (name, seed), lines in logs.items():
        for axis, metric in zip(axes[0], panels, strict=True):
            points = [(log["step"], log[metric]) for log in lines if metric in log]
            first = seed == next(s for n, s in runs if n == name)
            axis.plot(
                *zip(*points, strict=True), color=palette[name], alpha=0.8, label=name if first else None
            ) if points else None
    for axis, (metric, title) in zip(axes[0], panels.items(), strict=True):
        axis.set(xlabel="step", title=title, **({"ylim": (0, None)} if metric == "mean_gate" else {"yscale": "log"}))
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    save(figure, path)
