"""The pictures of an inspection: figures 1b, 3, 4, 6 and 7 of arXiv:2601.02151, and what each gate removes."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.font_manager import findfont
from matplotlib.patches import Rectangle
from wordcloud import WordCloud

from eaft.inspection.advice import percent, shown
from eaft.inspection.effects import weights
from eaft.inspection.folder import BASE, DATA, ROLLOUTS, Inspection
from eaft.inspection.labelled import ORIGINS, Examples, labelled_tokens
from eaft.inspection.landscape import ENTROPY_TICKS, PROB_TICKS, bin_indices, bin_sums, entropy_edges, prob_edges
from eaft.objective.statistics import CONFLICT_MAX_ENTROPY, CONFLICT_MAX_PROB

Numbers = dict[str, Any]
TITLES = {DATA: "Your data", ROLLOUTS: "The model's own answers"}
GROUP_NAMES = {"high_entropy": "high entropy (H ≥ 2)", "low_entropy": "low entropy (H ≤ 0.5)", "conflict": "conflicts"}
GATE = "eaft"  # beside SFT in figure 3
SEA = ListedColormap(plt.get_cmap("YlGnBu")(np.linspace(0.25, 1, 256)))  # no colour that is lost on white
DARK = ListedColormap(SEA(np.linspace(0.45, 1, 256)))  # for words
BLUE, ORANGE, RED = "#0072B2", "#E69F00", "#D55E00"  # Okabe and Ito's, which the colour-blind can tell apart
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "eaft", "text.parse_math": False, "font.size": 10}


@dataclass
class Planes:
    """Sums over the bins of the entropy-probability plane under the base model."""

    entropy_edges: NDArray[np.float64]
    prob_edges: NDArray[np.float64]
    counts: dict[str, NDArray[np.float64]] = field(default_factory=dict)  # tokens, by origin
    gradient: dict[str, NDArray[np.float64]] = field(default_factory=dict)  # of the data's tokens, by gate


def planes(inspection: Inspection, gate: str) -> Planes:
    """Return the tokens of each origin, and the gradient of the data's without a gate and with one, in every bin."""
    summary, examples = inspection.summary, Examples(inspection)
    edges = entropy_edges(summary["entropy_max"]), prob_edges()
    shape = len(edges[0]) - 1, len(edges[1]) - 1
    found = Planes(*edges)
    params = next((row["params"] for row in summary["gates"] if row["gate"] == gate), None)
    found.counts = {origin: np.zeros(shape) for origin in examples.origins}
    found.gradient = {name: np.zeros(shape) for name in ("sft", gate)}
    for tokens in labelled_tokens(inspection):
        bins = bin_indices(tokens.stats.entropy.numpy(), edges[0]), bin_indices(tokens.stats.prob.numpy(), edges[1])
        for origin in examples.origins:
            here = examples.of(origin)[tokens.example]
            found.counts[origin] += bin_sums(bins[0][here], bins[1][here], shape)
        if params is not None:
            gradient = tokens.quantities["gradient"] * examples.of(DATA)[tokens.example]
            found.gradient["sft"] += bin_sums(*bins, shape, gradient)
            gated = gradient * weights(gate, params, tokens, examples.nll)
            found.gradient[gate] += bin_sums(*bins, shape, gated)
    return found


def figures(inspection: Inspection) -> dict[str, Any]:
    """Return the figures that there is something to draw of, by name, in the order of the report."""
    summary = inspection.summary
    with plt.rc_context(STYLE):
        drawn = {}
        if summary["gates"]:
            plane = planes(inspection, GATE)
            drawn["landscape"] = landscape(plane, summary["conflicts"][BASE])
            drawn["gates"] = gates(summary["gates"])
            drawn["words"] = words(summary["tokens"])
            drawn["gradients"] = gradients(plane, GATE)
        if any(model.step is not None for model in inspection.models):
            drawn["groups"] = groups(inspection)
        if summary["top_k"]:
            drawn["top_k"] = top_k(summary["top_k"], inspection.top_k)
        return drawn


def draw_plane(axis: Any, plane: Planes, values: NDArray[np.float64], norm: LogNorm, label_y: bool) -> Any:
    """Draw sums over the plane, with the conflicts' corner framed."""
    shown_values = np.ma.masked_less_equal(values.T, 0)
    mesh = axis.pcolormesh(plane.entropy_edges, plane.prob_edges, shown_values, norm=norm, cmap=SEA, rasterized=True)
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axis.set_yscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axis.set_xticks([t for t in ENTROPY_TICKS if t <= plane.entropy_edges[-1]])
    axis.set_xticklabels([f"{t:g}" for t in ENTROPY_TICKS if t <= plane.entropy_edges[-1]])
    axis.set_yticks(PROB_TICKS, [f"{t:g}" for t in PROB_TICKS])
    axis.minorticks_off()
    axis.add_patch(
        Rectangle((0, 0), CONFLICT_MAX_ENTROPY, CONFLICT_MAX_PROB, fill=False, edgecolor=RED, linewidth=2.5, zorder=4)
    )
    axis.set_xlabel("entropy (nats)\n← the model is sure  ·  unsure →")
    if label_y:
        axis.set_ylabel("probability of the label\n← surprised  ·  expected →")
    return mesh


def landscape(plane: Planes, conflicts: Numbers) -> Any:
    """Draw figure 1b: where the data's tokens lie, beside those of the model's own answers."""
    origins = [origin for origin in ORIGINS if origin in plane.counts and plane.counts[origin].sum()]
    figure, axes = plt.subplots(
        1, len(origins), figsize=(1.2 + 4.8 * len(origins), 4.6), layout="constrained", squeeze=False
    )
    shares = {origin: 100 * plane.counts[origin] / plane.counts[origin].sum() for origin in origins}
    norm = LogNorm(min(s[s > 0].min() for s in shares.values()), max(s.max() for s in shares.values()))
    for i, (axis, origin) in enumerate(zip(axes[0], origins, strict=True)):
        mesh = draw_plane(axis, plane, shares[origin], norm, i == 0)
        share = conflicts[origin]
        axis.set_title(TITLES[origin], fontweight="bold")
        axis.annotate(
            f"confident conflicts:\n{percent(share['tokens'])} of tokens,\n{percent(share['nll'] or 0)} of the loss",
            (CONFLICT_MAX_ENTROPY, CONFLICT_MAX_PROB),
            xytext=(0.97, 0.8),
            textcoords="axes fraction",
            ha="right",
            color=RED,
            fontweight="bold",
            bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": RED, "boxstyle": "round"},
            arrowprops={"arrowstyle": "->", "color": RED, "linewidth": 1.5},
            zorder=5,
        )
    figure.colorbar(mesh, ax=axes[0].tolist(), label="% of the tokens, by bin", pad=0.01, format="{x:g}")
    return figure


def gradients(plane: Planes, gate: str) -> Any:
    """Draw figure 3: where the gradient comes from, with SFT beside a gate."""
    figure, axes = plt.subplots(1, 2, figsize=(10.8, 4.6), layout="constrained")
    total = plane.gradient["sft"].sum()
    norm = LogNorm(*(100 * np.quantile(plane.gradient["sft"][plane.gradient["sft"] > 0], q) / total for q in (0.01, 1)))
    corner = np.ix_(plane.entropy_edges[:-1] < CONFLICT_MAX_ENTROPY, plane.prob_edges[:-1] < CONFLICT_MAX_PROB)
    for i, (axis, name) in enumerate(zip(axes, ("sft", gate), strict=True)):
        values = plane.gradient[name]
        mesh = draw_plane(axis, plane, 100 * values / total, norm, i == 0)
        axis.set_title(f"{name.upper()}: {percent(values[corner].sum() / total)} in conflicts", fontweight="bold")
    label = "gradient, % of SFT's, by bin:\nw · √(Σp² - 2p_y + 1), the norm of the\nloss's gradient by the logits"
    figure.colorbar(mesh, ax=axes.tolist(), label=label, pad=0.01, extend="min", format="{x:g}")
    return figure


def gates(rows: list[Numbers]) -> Any:
    """Draw what each gate removes of the data's tokens, nll and gradient."""
    rows = [row for row in rows if row["source"] is None and row["gate"] != "sft"]
    figure, axis = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.4), layout="constrained")
    at = np.arange(len(rows))
    for i, (name, label, color) in enumerate(
        (("tokens", "weight", "#999999"), ("nll", "loss (nll)", BLUE), ("gradient", "gradient", ORANGE))
    ):
        axis.barh(at + 0.27 * (i - 1), [100 * (row[name] or 0) for row in rows], 0.25, label=label, color=color)
    axis.set_yticks(at, [row["gate"] for row in rows])
    axis.invert_yaxis()
    axis.set(xlabel="% removed, of what plain SFT has", title="What each gate would take from this data")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="best")
    return figure


def groups(inspection: Inspection) -> Any:
    """Draw figure 4: the nll of tokens that the base model was unsure and sure of, over training."""
    points = sorted((model.step or 0, model.name) for model in inspection.models if model.step is not None)
    points = [(0, BASE), *((step, name) for step, name in points if name != BASE)]
    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    for group, color in (("high_entropy", BLUE), ("low_entropy", ORANGE)):
        values = [inspection.summary["nll"][name][DATA][group] for _, name in points]
        drawn = [(step, value) for (step, _), value in zip(points, values, strict=True) if value is not None]
        if drawn:
            axis.plot(*zip(*drawn, strict=True), marker="o", color=color, label=GROUP_NAMES[group])
    axis.set(
        xlabel="step (0: base model)", ylabel="mean nll (nats)", title="What training learns: tokens by base entropy"
    )
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def top_k(rows: list[Numbers], k: int) -> Any:
    """Draw figure 6: how well the top-K entropy stands for the exact one, and its cost."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    ks = [row["k"] for row in rows]
    for name, color in (("pearson", BLUE), ("spearman", ORANGE)):
        drawn = [(row["k"], row[name]) for row in rows if row[name] is not None]
        if drawn:
            axes[0].plot(*zip(*drawn, strict=True), marker="o", color=color, label=name.capitalize())
    axes[0].set(title="Correlation with the exact entropy")
    axes[0].legend()
    axes[1].plot(ks, [1000 * row["seconds"] for row in rows], marker="o", color=BLUE)
    axes[1].set(title="Time (ms)", ylim=(0, None))
    axes[2].plot(ks, [row["mib"] for row in rows], marker="o", color=BLUE)
    axes[2].set(title="Memory (MiB)", yscale="log")
    axes[2].yaxis.set_major_formatter("{x:g}")
    for axis in axes:
        axis.set(xscale="log", xlabel="K")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.axvline(k, color="black", linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.3)
    return figure


def words(tokens: Numbers) -> Any:
    """Draw figure 7: the most frequent tokens of each group as word clouds."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    for axis, (group, title) in zip(axes, GROUP_NAMES.items(), strict=True):
        counts: dict[str, int] = {}
        for row in tokens[group]:
            counts[shown(row["text"])] = counts.get(shown(row["text"]), 0) + row["count"]
        axis.set_axis_off()
        axis.set_title(title)
        if counts:
            font = findfont("DejaVu Sans")  # comes with matplotlib, and has more scripts than the package's own
            cloud = WordCloud(font, 600, 400, background_color="white", colormap=DARK, random_state=0)
            axis.imshow(cloud.generate_from_frequencies(counts).to_array(), interpolation="bilinear")
        else:
            axis.text(0.5, 0.5, "none", ha="center", va="center", color="grey")
    return figure


def svg(figure: Any, title: str) -> str:
    """Return a figure as an `<svg>` for a page: no declarations, no addresses, as wide as its place."""
    buffer = io.StringIO()
    with plt.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    width = figure.get_figwidth()
    opening = f'<svg viewBox="\\1" role="img" aria-label="{title}" style="max-width: {6.5 * width:.0f}rem">'
    return re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', opening, text)
