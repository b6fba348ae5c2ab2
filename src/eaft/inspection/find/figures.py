"""
The pictures of an inspection: of arXiv:2601.02151 the Figures 1b, 3, 4, 6 and 7, and what each gate
removes.
"""

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
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from eaft.inspection.find.advice import percent, shown
from eaft.inspection.find.effects import complete, weights
from eaft.inspection.folder import BASE, DATA, ROLLOUTS, Inspection
from eaft.inspection.labelled import Examples, labelled_tokens
from eaft.inspection.landscape import (
    ENTROPY_TICKS,
    PROB_TICKS,
    bin_indices,
    bin_sums,
    entropy_edges,
    prob_edges,
)
from eaft.objective.statistics import CONFLICT_MAX_ENTROPY, CONFLICT_MAX_PROB

Numbers = dict[str, Any]
Plane = NDArray[np.float64]

CAPTIONS = {
    "landscape": (
        "Where the tokens lie. Higher up the model is less sure of what comes next, further right"
        " it finds the label likelier. In the outlined corner it is sure of something else: the"
        " confident conflicts."
    ),
    "gates": "What each gate would remove from training on this data, at the first step.",
    "gradient": (
        "Where the gradient comes from, under SFT and under a gate (that of --gate, else EAFT's;"
        " its default parameters): the norm of the loss's gradient by the logits, summed over the"
        " tokens of a bin."
    ),
    "words": (
        "The tokens that the model is unsure of, those that it is sure of, and those where it is"
        " sure of something else."
    ),
    "training": (
        "What training does to the tokens that the base model was unsure of, and to those that it"
        " was sure of."
    ),
    "top_k": (
        "The entropy of the K likeliest tokens beside the exact one, on a sample of this data."
    ),
}
TITLES = {DATA: "the data", ROLLOUTS: "the model's own answers"}
ORANGE, BLUE, GREY = "#d95f02", "#3b6fb6", "#888888"  # told apart by the colour-blind, and in grey
COLOURS = ListedColormap(matplotlib.colormaps["BuPu"](np.linspace(0.25, 1, 256)))
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
GRADIENT = "sum of w √(Σp² - 2p + 1): norm of d loss / d logits"


def draw(inspection: Inspection, summary: Numbers, gate: str = "eaft") -> dict[str, Figure]:
    """
    Return the figures that there is something to draw in, by the names of `CAPTIONS`.

    Args:
        inspection: scored.
        summary: of `eaft.inspection.find.findings.find`.
        gate: shown beside SFT in the gradient's figure.
    """
    figures: dict[str, Figure] = {}
    with plt.rc_context(STYLE):
        if summary["measured"] is not None:
            planes = Planes(inspection, summary, gate)
            figures["landscape"] = landscape(planes, summary)
            figures["gradient"] = gradient(planes, gate)
            figures["gates"] = gates(summary)
            figures["words"] = words(summary)
        if any(model.step is not None for model in inspection.models):
            figures["training"] = training(inspection, summary)
        if summary["top_k"]:
            figures["top_k"] = top_k(summary, inspection.top_k)
    return figures


class Planes:
    """
    Sums over the plane's bins, entropies by probabilities: of tokens by origin; of the data's
    gradient, by gate.
    """

    def __init__(self, inspection: Inspection, summary: Numbers, gate: str) -> None:
        self.entropy_edges, self.prob_edges = entropy_edges(summary["entropy_max"]), prob_edges()
        shape = (len(self.entropy_edges) - 1, len(self.prob_edges) - 1)
        examples, params = Examples(inspection), complete(gate, summary["measured"])
        self.tokens = {origin: np.zeros(shape) for origin in examples.origins}
        self.gradient, self.gated = np.zeros(shape), np.zeros(shape)
        for tokens in labelled_tokens(inspection):
            entropy = bin_indices(tokens.stats.entropy.numpy(), self.entropy_edges)
            prob = bin_indices(tokens.stats.prob.numpy(), self.prob_edges)
            for origin, total in self.tokens.items():
                here = examples.of(origin)[tokens.example]
                total += bin_sums(entropy[here], prob[here], shape)
            data = examples.of(DATA)[tokens.example]
            gradient = np.where(data, tokens.quantities["gradient"], 0)
            self.gradient += bin_sums(entropy, prob, shape, gradient)
            self.gated += bin_sums(
                entropy, prob, shape, gradient * weights(gate, params, tokens, examples.nll)
            )

    def draw(self, axis: Axes, values: Plane, norm: LogNorm) -> Any:
        """Draw a plane with both axes at the square root, the conflicts' corner outlined."""
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


def landscape(planes: Planes, summary: Numbers) -> Figure:
    """Figure 1b: where the tokens lie, the data's beside those of the model's own answers."""
    totals = {origin: plane.sum() for origin, plane in planes.tokens.items()}
    shares = {
        origin: plane / totals[origin] for origin, plane in planes.tokens.items() if totals[origin]
    }
    size = (1.2 + 3.9 * len(shares), 4.2)
    figure, axes = plt.subplots(
        1, len(shares), figsize=size, sharey=True, layout="constrained", squeeze=False
    )
    norm = shared_norm([*shares.values()])
    for axis, (origin, plane) in zip(axes[0], shares.items(), strict=True):
        mesh = planes.draw(axis, plane, norm)
        conflicts = summary["conflicts"][BASE][origin]
        axis.set_title(f"{TITLES[origin]} ({int(totals[origin]):,} tokens)")
        tokens, nll, grad = (
            percent(conflicts[name] or 0) for name in ("tokens", "nll", "gradient")
        )
        said = f"{tokens} of the tokens,\n{nll} of the nll,\n{grad} of the gradient"
        axis.annotate(
            said,
            (CONFLICT_MAX_PROB, CONFLICT_MAX_ENTROPY / 2),
            (0.22, CONFLICT_MAX_ENTROPY / 2),
            color=ORANGE,
            fontweight="bold",
            va="center",
            arrowprops={"arrowstyle": "-", "color": ORANGE},
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2},
        )
    axes[0][0].set_ylabel("entropy, nats\n(sure … unsure)")
    figure.colorbar(mesh, ax=axes, label="share of the tokens", shrink=0.8)
    return figure


def shared_norm(planes: list[Plane]) -> LogNorm:
    """
    Return one logarithmic scale for several planes: its lower end is the smallest value there is.
    """
    values = np.concatenate([plane[plane > 0] for plane in planes])
    low, high = (values.min(), values.max()) if len(values) else (0.1, 1.0)
    return LogNorm(low, max(high, low * 10))


def gradient(planes: Planes, gate: str) -> Figure:
    """Figure 3: where the data's gradient comes from, under SFT and under a gate."""
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 4.2), sharex=True, sharey=True, layout="constrained"
    )
    most = max(float(planes.gradient.max()), 1e-9)
    least = most / 1e4  # below it all is drawn alike
    norm = LogNorm(least, most)
    for axis, (name, plane) in zip(
        axes, (("sft", planes.gradient), (gate, planes.gated)), strict=True
    ):
        mesh = planes.draw(axis, np.where(plane > 0, np.maximum(plane, least), 0), norm)
        of_sft = plane.sum() / planes.gradient.sum() if planes.gradient.sum() else 1.0
        axis.set_title(name if name == "sft" else f"{name}: {percent(of_sft)} of sft's gradient")
    axes[0].set_ylabel("entropy, nats\n(sure … unsure)")
    figure.colorbar(mesh, ax=axes, label=GRADIENT, shrink=0.9, extend="min")
    return figure


def gates(summary: Numbers) -> Figure:
    """What each gate removes of the data's tokens, nll and gradient, in per cent."""
    rows = [row for row in summary["gates"] if row["source"] is None and row["gate"] != "sft"]
    figure, axis = plt.subplots(figsize=(9, 0.6 + 0.42 * len(rows)), layout="constrained")
    kinds = (("tokens", GREY), ("nll", BLUE), ("gradient", ORANGE))
    for i, (name, colour) in enumerate(kinds):
        places = np.arange(len(rows)) + 0.26 * (i - 1)
        axis.barh(places, [100 * (row[name] or 0) for row in rows], 0.24, color=colour, label=name)
    axis.set_yticks(
        range(len(rows)),
        [
            row["gate"] + (" (KL not shown)" if row["note"] and "KL" in row["note"] else "")
            for row in rows
        ],
    )
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlim(
        left=max(axis.get_xlim()[0], -100)
    )  # a gate that adds much would leave the others no room
    axis.set_xlabel("removed, per cent (below 0: added)")
    axis.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def words(summary: Numbers) -> Figure:
    """Figure 7: the tokens of high entropy, of low entropy and in conflict, by their number."""
    from wordcloud import WordCloud

    names = {
        "high_entropy": "unsure (H ≥ 2 nats)",
        "low_entropy": "sure (H ≤ 0.5)",
        "conflict": "sure of something else",
    }
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    colours = {"high_entropy": BLUE, "low_entropy": GREY, "conflict": ORANGE}
    for axis, (group, title) in zip(axes, names.items(), strict=True):
        axis.set_axis_off()
        axis.set_title(title)
        counts: dict[str, int] = {}
        for token in summary["tokens"][group]:
            text = shown(token["text"])
            counts[text] = counts.get(text, 0) + token["count"]
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


def training(inspection: Inspection, summary: Numbers) -> Figure:
    """
    Figure 4: nll of the data's tokens over training, in groups that are fixed under the base model.
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
            nll = [summary["nll"][name][DATA][group] for _, name in points]
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


def top_k(summary: Numbers, used: int) -> Figure:
    """
    Figure 6: correlation of the top-K entropy with the exact one, and what it costs, against K.
    """
    rows = summary["top_k"]
    k = [row["k"] for row in rows]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharex=True, layout="constrained")
    for name, marker, colour in (("pearson", "o", BLUE), ("spearman", "s", ORANGE)):
        values = [np.nan if row[name] is None else row[name] for row in rows]
        axes[0].plot(k, values, marker=marker, markersize=4, color=colour, label=name.capitalize())
    axes[0].set_title("correlation with the exact entropy")
    axes[0].legend(frameon=False, loc="lower right")
    for axis, name, title in (
        (axes[1], "seconds", "seconds, 1000 tokens"),
        (axes[2], "mib", "MiB, 256 tokens"),
    ):
        axis.plot(k, [row[name] for row in rows], marker="o", markersize=4, color=BLUE)
        axis.set_yscale("log")
        axis.set_title(title)
    for axis in axes:
        axis.set_xscale("log")
        axis.axvline(used, color=GREY, linewidth=0.8, linestyle=":")
        axis.set_xlabel(f"K (dotted: {used}; the last is all)")
    return figure


def svg(figure: Figure, name: str) -> str:
    """
    Return a figure as an `<svg>` element for an HTML page: as wide as its place, with no address in
    it, and no id that another one has.

    Args:
        name: of `CAPTIONS`; its ids begin with it.
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
