"""The report of `eaft tune`: its sentence, report.html and front.png."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import matplotlib.pyplot as plt

from eaft.evaluation.loops import loops_told
from eaft.evaluation.paired import few_prompts
from eaft.evaluation.report import save
from eaft.text import fill_page
from eaft.tuning.results import Confirmation, Screened, TuneResults

REPORT, FRONT = "report.html", "front.png"
UNUSED = 0.5  # of the budget: with a lower drift of the best model of all, most of it was not used


def write_report(results: TuneResults, folder: Path) -> None:
    """Write front.png and report.html, which has the picture in it."""
    draw_front(results, folder / FRONT)
    picture = base64.b64encode((folder / FRONT).read_bytes()).decode()
    template = Path(__file__).with_name("report.html")
    text = fill_page(template, r=results, picture=picture, allowed=budgets(results))
    staging = folder / f"{REPORT}.tmp"
    staging.write_text(text, errors="replace")
    os.replace(staging, folder / REPORT)


def sentence(results: TuneResults) -> str:
    """Return what was learned, what was lost, how sure that is, and what the budget cost."""
    chosen, best = results.chosen, results.unconstrained
    free = (
        f"the lowest held-out nll of the run is {best.nll:.3f} (step {best.step},"
        f" {best.share:.0%}), at a drift of {best.drift:.3f}"
    )
    if chosen is None:
        return f"No model within the budget ({budgets(results)}): {why_none(results)}. Else {free}."
    text = (
        f"Held-out nll went from {results.base_nll:.3f} to {chosen.nll:.3f} nats per token"
        f" (change {chosen.nll_change:+.3f}, 95% interval {chosen.nll_low:+.3f} to"
        f" {chosen.nll_high:+.3f}; {chosen.rows} rows)."
    )
    if warning := few_prompts(chosen.rows, "rows"):
        text += f" {warning}"
    text += (
        f" Drift is {chosen.drift:.4f} nats per token, and at most {chosen.bound:.4f} with 95%"
        f" confidence ({chosen.prompts} prompts)."
    )
    for task in chosen.tasks:
        text += (
            f" {task.task} changed by {-task.drop:+.1f} points; it lost at most"
            f" {max(task.bound, 0):.1f} with 95% confidence ({task.items} items)."
        )
    if chosen.shown:
        text += f" So the budget ({budgets(results)}) was kept."
    else:
        text += f" The estimates are within the budget ({budgets(results)}); it is not shown that"
        text += " it was kept."
        needed = [] if chosen.prompts_needed is None else [f"{chosen.prompts_needed} prompts"]
        needed += [f"{t.items_needed} items of {t.task}" for t in chosen.tasks if t.items_needed]
        if needed:
            text += f" About {' and '.join(needed)} would show it."
    if loops := loops_told(results.answers):
        text += f" {loops}"
    way = f"taken {chosen.share:.1%} of the way from the base model"
    text += f" The model is the checkpoint of step {chosen.step}, "
    text += "as it is." if chosen.share == 1 else f"{way}."
    if refused := len(results.candidates) - 1:
        candidates = "candidate" if refused == 1 else "candidates"
        text += f" {refused} {candidates} that learned more did not pass the confirmation."
    if best.cost is not None and best.cost > 0:
        text += f" On the rows that chose it, the budget cost {best.cost:.3f} nats: {free}."
    elif results.budget.max_drift and chosen.drift < UNUSED * results.budget.max_drift:
        text += " Most of the budget was not used: more epochs or a higher learning rate may learn"
        text += " more."
    return text


def budgets(results: TuneResults) -> str:
    """Return what was allowed, in words."""
    parts = []
    if results.budget.max_drift is not None:
        parts.append(f"a drift of {results.budget.max_drift:g} nats per token")
    if results.budget.max_drop is not None:
        parts.append(f"a drop of {results.budget.max_drop:g} points of each task")
    return " and ".join(parts)


def why_none(results: TuneResults) -> str:
    """Return why no candidate passed."""
    if not results.candidates:
        limit = results.budget.max_drift
        if limit is not None and all(point.drift > limit for point in results.screened):
            return "every model that was measured has drifted more"
        return "no model of this run learned anything within it"
    last = results.candidates[-1]
    name = "the safest candidate"
    if last.tasks:
        worst = max(last.tasks, key=lambda task: task.bound if results.budget.strict else task.drop)
        return (
            f"{name} lost {worst.drop:.1f} points of {worst.task}, and up to {worst.bound:.1f}"
            " cannot be ruled out"
        )
    return f"{name} has a drift of {last.drift:.4f}, and up to {last.bound:.4f} cannot be ruled out"


def draw_front(results: TuneResults, path: Path) -> None:
    """Draw held-out nll against drift: what was screened, the budget, and what was confirmed."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axis.scatter(
        0,
        results.base_nll_screening,
        marker="*",
        s=140,
        color="black",
        label="base model",
        zorder=3,
    )
    steps = sorted({point.step for point in results.screened})
    for i, step in enumerate(steps):
        own = sorted((p for p in results.screened if p.step == step), key=lambda p: p.share)
        color = plt.get_cmap("viridis")(0.1 + 0.8 * i / max(len(steps) - 1, 1))
        x, y = [0.0, *(p.drift for p in own)], [results.base_nll_screening, *(p.nll for p in own)]
        axis.plot(x, y, "-", color=color, linewidth=1, alpha=0.6)
        axis.scatter(x[1:], y[1:], s=14, color=color)
        whole = [p for p in own if p.share == 1]
        axis.scatter(
            [p.drift for p in whole],
            [p.nll for p in whole],
            s=60,
            marker="s",
            color=color,
            label=f"checkpoint of step {step}",
        )
    budget = results.budget.max_drift
    if budget is not None:
        label = f"budget {budget:g}"
        axis.axvline(budget, color="tab:red", linestyle="--", linewidth=1, label=label)
    chosen = results.chosen
    refused = [screened_of(one, results) for one in results.candidates if one != chosen]
    if refused:
        axis.scatter(
            [point.drift for point in refused],
            [point.nll for point in refused],
            s=60,
            marker="x",
            color="tab:red",
            label="did not pass the confirmation",
            zorder=4,
        )
    if chosen is not None:
        point = screened_of(chosen, results)
        axis.scatter(
            point.drift,
            point.nll,
            s=220,
            facecolors="none",
            edgecolors="tab:red",
            linewidths=2,
            label="chosen",
            zorder=4,
        )
    axis.set(
        xlabel="drift, KL(base ‖ model), nats per token",
        ylabel="held-out nll, nats per token",
        title="Lines: interpolations toward the base (screening data)",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path)


def screened_of(candidate: Confirmation, results: TuneResults) -> Screened:
    """Return what screening measured of a candidate."""
    return next(
        point
        for point in results.screened
        if (point.step, point.share) == (candidate.step, candidate.share)
    )
