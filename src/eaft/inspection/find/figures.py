"""The pictures of the report: Figures 1b, 3, 4, 6 and 7 of arXiv:2601.02151, and one of gates."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from eaft.inspection.example_columns import ExampleColumns
from eaft.inspection.find.effects import DataGate
from eaft.inspection.find.wording import percent, shown
from eaft.inspection.folder import BASE, Inspection
from eaft.inspection.labelled import labelled_tokens
from eaft.inspection.landscape import (
    ENTROPY_TICKS,
    PROB_TICKS,
    bin_indices,
    bin_sums,
    entropy_edges,
    prob_edges,
)
from eaft.inspection.summary import DATA, ROLLOUTS, Shares, Summary, TopKRow
from eaft.objective.statistics import CONFLICT_MAX_ENTROPY, CONFLICT_MAX_PROB

Plane = NDArray[np.float64]

CAPTIONS = {
    "landscape": (
        "Where the tokens lie. Higher up, the model is less sure of the next token. Further right,"
        " it finds the label likelier. In the outlined corner are the confident conflicts: the"
        " model is sure of another token."
    ),
    "gates": "What each gate would remove from training on this data, at the first step.",
    "gradient": (
        "Where the gradient comes from, under SFT and under a gate: the norm of the loss's gradient"
        " by the logits, summed over the tokens of a bin. The gate is that of --gate, or EAFT, with"
        " default parameters."
    ),
    "words": (
        "The tokens where the model is unsure, where it is sure, and where it is sure of another"
        " token."
    ),
    "training": (
        "What training does to the tokens where the base model was unsure, and where it was sure."
    ),
    "top_k": (
        "The entropy of the K likeliest tokens beside the exact entropy, on a sample of this data."
    ),
}
TITLES = {DATA: "the data", ROLLOUTS: "the model's own answers"}
ORANGE, BLUE, GREY = "#d95f02", "#3b6fb6", "#888888"  # differ for the colour-blind, and in grey
COLOURS = ListedColormap(matplotlib.colormaps["BuPu"](np.linspace(0.25, 1, 256)))
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
GRADIENT = "sum of w √(Σp² - 2p + 1): norm of d loss / d logits"


def draw(inspection: Inspection, summary: Summary, gate: str = "eaft") -> dict[str, Figure]:
    """
    Return the figures by the names of `CAPTIONS`, without empty ones.

    Args:
        inspection: scored.
        summary: of the inspection.
        gate: shown beside SFT in the gradient's figure.
    """
    figures: dict[str, Figure] = {}
    with plt.rc_context(STYLE):
        if summary.measured is not None:
            planes = Planes(inspection, summary.entropy_max, DataGate(gate, summary.measured))
            figures["landscape"] = draw_landscape(planes, summary)
            if inspection.whole_vocabulary:
                figures["gradient"] = draw_gradient(planes, gate)
            figures["gates"] = draw_gates(summary)
            figures["words"] = draw_words(summary)
        if any(model.step is not None for model in inspection.models):
            figures["training"] = draw_training(inspection, summary)
        if summary.top_k:
            figures["top_k"] = draw_top_k(summary.top_k, inspection.top_k)
    return figures


class Planes:
    """
    Sums over the bins of the plane, `[entropies, probabilities]` each.

    Attributes:
        tokens: the number of tokens, by origin.
        gradient: the gradient's norms of the data's tokens under SFT; NaN in a run of vLLM.
        gated: the same norms under the gate.
    """

    def __init__(self, inspection: Inspection, entropy_max: float, gate: DataGate) -> None:
        self.entropy_edges, self.prob_edges = entropy_edges(entropy_max), prob_edges()
        self.entropy_label = f"{inspection.run.entropy_name}, nats\n(sure … unsure)"
        shape = (len(self.entropy_edges) - 1, len(self.prob_edges) - 1)
        examples = ExampleColumns(inspection)
        self.tokens = {origin: np.zeros(shape) for origin in examples.origins}
        self.gradient, self.gated = np.zeros(shape), np.zeros(shape)
        for tokens in labelled_tokens(inspection):
            entropy = bin_indices(tokens.stats.entropy.numpy(), self.entropy_edges)
            prob = bin_indices(tokens.stats.prob.numpy(), self.prob_edges)
            for origin, total in self.tokens.items():
                here = examples.is_from(origin)[tokens.example]
                total += bin_sums(entropy[here], prob[here], shape)
            data = examples.is_from(DATA)[tokens.example]
            gradient = np.where(data, tokens.quantities["gradient"], 0)
            self.gradient += bin_sums(entropy, prob, shape, gradient)
            gated = gradient * gate.weights(tokens, examples.nll)
            self.gated += bin_sums(entropy, prob, shape, gated)

    def draw(self, axis: Axes, values: Plane, norm: LogNorm) -> Any:
        """Draw a plane with both axes at the square root, and outline the conflicts' corner."""
        seen = np.where(values > 0, values, np.nan)
        mesh = axis.pcolormesh(
            self.prob_edges, self.entropy_edges, seen, norm=norm, cmap=COLOURS, rasterized=True
        )
        square_root = (lambda x: np.sqrt(np.maximum(x, 0)), np.square)
        axis.set_xscale("function", functions=square_root)
        axis.set_yscale("function", functions=square_root)
        for ticks, edges, dimension in (
            (PROB_TICKS, self.prob_edges, axis.xaxis),
            (ENTROPY_TICKS, self.entropy_edges, axis.yaxis),
        ):
            dimension.set_major_locator(FixedLocator([tick for tick in ticks if tick <= edges[-1]]))
            dimension.set_minor_locator(NullLocator())
            dimension.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_xlim(0, 1)
        axis.set_ylim(0, self.entropy_edges[-1])
        corner = ([CONFLICT_MAX_PROB] * 2 + [0], [0, *[CONFLICT_MAX_ENTROPY] * 2])
        axis.plot(*corner, color=ORANGE, linewidth=1.8, clip_on=False)
        axis.set_xlabel("probability of the label")
        return mesh


def draw_landscape(planes: Planes, summary: Summary) -> Figure:
    """Draw Figure 1b: where the tokens of the data and of the model's own answers lie."""
    totals = {origin: plane.sum() for origin, plane in planes.tokens.items()}
    shares = {
        origin: plane / totals[origin] for origin, plane in planes.tokens.items() if totals[origin]
    }
    size = (2.2 + 3.9 * len(shares), 4.2)
    figure, axes = plt.subplots(
        1, len(shares), figsize=size, sharey=True, layout="constrained", squeeze=False
    )
    norm = shared_norm([*shares.values()])
    for axis, (origin, plane) in zip(axes[0], shares.items(), strict=True):
        mesh = planes.draw(axis, plane, norm)
        conflicts = summary.conflicts[BASE].of(origin) or Shares(None, None, None)
        axis.set_title(f"{TITLES[origin]} ({int(totals[origin]):,} tokens)")
        label = ",\n".join(
            f"{percent(share or 0)} of the {name}"
            for name, share in vars(conflicts).items()
            if name != "gradient" or share is not None
        )
        axis.annotate(
            label,
            (CONFLICT_MAX_PROB, CONFLICT_MAX_ENTROPY / 2),
            (0.22, CONFLICT_MAX_ENTROPY / 2),
            color=ORANGE,
            fontweight="bold",
            va="center",
            arrowprops={"arrowstyle": "-", "color": ORANGE},
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2},
        )
    axes[0][0].set_ylabel(planes.entropy_label)
    percentages = FuncFormatter(lambda x, _: f"{100 * x:.3g}%")
    bar = figure.colorbar(
        mesh, ax=axes, label="share of the tokens", shrink=0.8, format=percentages
    )
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return figure


def shared_norm(planes: list[Plane]) -> LogNorm:
    """Return one logarithmic scale for several planes, from the smallest positive value."""
    values = np.concatenate([plane[plane > 0] for plane in planes])
    low, high = (values.min(), values.max()) if len(values) else (0.1, 1.0)
    return LogNorm(low, max(high, low * 10))


def draw_gradient(planes: Planes, gate: str) -> Figure:
    """Draw Figure 3: where the data's gradient comes from, under SFT and under a gate."""
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 4.2), sharex=True, sharey=True, layout="constrained"
    )
    most = max(float(planes.gradient.max()), 1e-9)
    least = most / 1e4  # smaller values get the same colour
    norm = LogNorm(least, most)
    for axis, (name, plane) in zip(
        axes, (("sft", planes.gradient), (gate, planes.gated)), strict=True
    ):
        mesh = planes.draw(axis, np.where(plane > 0, np.maximum(plane, least), 0), norm)
        of_sft = plane.sum() / planes.gradient.sum() if planes.gradient.sum() else 1.0
        axis.set_title(name if name == "sft" else f"{name}: {percent(of_sft)} of sft's gradient")
    axes[0].set_ylabel(planes.entropy_label)
    plain = FuncFormatter(lambda x, _: f"{x:.3g}")
    bar = figure.colorbar(mesh, ax=axes, label=GRADIENT, shrink=0.9, extend="min", format=plain)
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return figure


def draw_gates(summary: Summary) -> Figure:
    """Draw what each gate removes of the data's tokens, nll and gradient, in per cent."""
    rows = [row for row in summary.gates if row.source is None and row.gate != "sft"]
    figure, axis = plt.subplots(figsize=(9, 0.6 + 0.42 * len(rows)), layout="constrained")
    kinds = [("tokens", GREY), ("nll", BLUE), ("gradient", ORANGE)]
    if all(row.gradient is None for row in rows):  # a run of vLLM
        kinds.pop()
    for i, (name, colour) in enumerate(kinds):
        places = np.arange(len(rows)) + 0.26 * (i - 1)
        widths = [100 * (getattr(row, name) or 0) for row in rows]
        axis.barh(places, widths, 0.24, color=colour, label=name)
    axis.set_yticks(
        range(len(rows)),
        [row.gate + (" (KL not shown)" if row.note and "KL" in row.note else "") for row in rows],
    )
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    # Without a limit, a gate that adds much would leave no room for the others
    axis.set_xlim(left=max(axis.get_xlim()[0], -100))
    axis.set_xlabel("removed, per cent (below 0: added)")
    axis.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def draw_words(summary: Summary) -> Figure:
    """Draw Figure 7: the tokens of high entropy, of low entropy and in conflict, by count."""
    from wordcloud import WordCloud

    names = {
        "high_entropy": "unsure (H ≥ 2 nats)",
        "low_entropy": "sure (H ≤ 0.5)",
        "conflict": "sure of another token",
    }
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    colours = {"high_entropy": BLUE, "low_entropy": GREY, "conflict": ORANGE}
    for axis, (group, title) in zip(axes, names.items(), strict=True):
        axis.set_axis_off()
        axis.set_title(title)
        counts: dict[str, int] = {}
        for token in summary.tokens.of(group):
            text = shown(token.text)
            counts[text] = counts.get(text, 0) + token.count
        if counts:
            colour = colours[group]
            cloud = WordCloud(
                font_path=findfont("DejaVu Sans"),
                width=560,
                height=440,
                background_color="white",
                color_func=lambda *_, colour=colour, **__: colour,
                prefer_horizontal=1.0,
                relative_scaling=0.5,
                random_state=0,
                max_words=60,
            )
            axis.imshow(cloud.generate_from_frequencies(counts).to_array(), rasterized=True)
        else:
            axis.text(0.5, 0.5, "none", ha="center", color=GREY)
    return figure


def draw_training(inspection: Inspection, summary: Summary) -> Figure:
    """
    Draw Figure 4: the nll of the data's tokens over training, in two groups.

    The base model's entropy says which tokens are in a group.
    """
    runs: dict[Path, list[tuple[int, str]]] = {}
    for model in inspection.models:
        if model.step is not None:
            folder = Path(model.model)
            run = folder.parent if folder.name.startswith("checkpoint-") else folder
            runs.setdefault(run, []).append((model.step, model.name))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    titles = {
        "high_entropy": "the base model was unsure (H ≥ 2 nats)",
        "low_entropy": "it was sure (H ≤ 0.5 nats)",
    }
    for axis, (group, title) in zip(axes, titles.items(), strict=True):
        for run, models in runs.items():
            points = [(0, BASE), *sorted(models)]
            nll = [getattr(summary.nll[name].data, group) for _, name in points]
            if None not in nll:
                axis.plot(
                    [step for step, _ in points], nll, marker="o", markersize=4, label=run.name
                )
        axis.set_title(title)
        axis.set_xlabel("training step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("mean nll of the tokens, nats")
    axes[0].legend(frameon=False)
    return figure


def draw_top_k(rows: list[TopKRow], used: int) -> Figure:
    """
    Draw Figure 6: the correlation of the top-K entropy with the exact one, and its cost, by K.

    Args:
        rows: a point for each K.
        used: the K of this inspection.
    """
    k = [row.k for row in rows]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharex=True, layout="constrained")
    for name, marker, colour in (("pearson", "o", BLUE), ("spearman", "s", ORANGE)):
        values = [getattr(row, name) for row in rows]
        values = [np.nan if value is None else value for value in values]
        axes[0].plot(k, values, marker=marker, markersize=4, color=colour, label=name.capitalize())
    axes[0].set_title("correlation with the exact entropy")
    axes[0].legend(frameon=False, loc="lower right")
    for axis, name, title in (
        (axes[1], "seconds", "seconds, 1000 tokens"),
        (axes[2], "mib", "MiB, 256 tokens"),
    ):
        axis.plot(k, [getattr(row, name) for row in rows], marker="o", markersize=4, color=BLUE)
        axis.set_yscale("log")
        axis.set_title(title)
    for axis in axes:
        axis.set_xscale("log")
        axis.axvline(used, color=GREY, linewidth=0.8, linestyle=":")
        axis.set_xlabel(f"K (dotted: {used}; the last is all)")
    return figure


def svg(figure: Figure, name: str) -> str:
    """
    Return a figure as an `<svg>` element for an HTML page.

    It is as wide as its container, names no address, and shares no id with another figure.

    Args:
        figure: to draw.
        name: of `CAPTIONS`; the ids begin with it.
    """
    file = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", dpi=110)
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # within HTML an <svg> needs none
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    label = html.escape(CAPTIONS[name])
    return re.sub(
        r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{label}">',
        text,
    )
