"""
Draw every gate's weight over the entropy-probability plane: writes docs/gates.png.

    .venv/bin/python docs/draw_gates.py

Each point is a distribution over 20 tokens: the label with probability p, the rest falling off
geometrically, faster or slower for another entropy. Where nothing is drawn, no distribution has
that entropy and probability.
"""

from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from eaft import token_statistics
from eaft.objective.gates import normalized_entropy
from eaft.objective.registry import GATES, gate_weights

# What is measured on data otherwise
GIVEN = {
    "masked": {"entropy_threshold": 0.17},
    "conflict-mask": {"entropy_threshold": 0.17, "prob_threshold": 0.17},
    "talr": {"tau": 2.0},
    "flow": {"tau": 2.0},
}
PANELS = [*((name, GIVEN.get(name, {})) for name in GATES), ("eaft", {"alpha": 3.0})]


def main() -> None:
    """Compute the statistics of the grid, and draw a panel for each gate."""
    prob = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
    fall = torch.logspace(-3, 1.5, 200, dtype=torch.float64)
    others = torch.softmax(-fall.unsqueeze(-1) * torch.arange(19), -1)  # [fall, 19]
    label = prob.expand(len(fall), -1).unsqueeze(-1)  # [fall, prob, 1]
    logits = torch.cat([label, (1 - label) * others.unsqueeze(1)], -1).log()
    stats = token_statistics(logits, torch.zeros(logits.shape[:-1], dtype=torch.int64), ranked=True)
    stats = replace(
        stats, example_nll=stats.nll, old_log_prob=torch.full_like(stats.nll, 0.5).log()
    )
    base = replace(stats, old_log_prob=stats.log_prob)  # the tokens under the base model itself
    g = normalized_entropy(stats)

    figure, axes = plt.subplots(
        4, 5, figsize=(14.5, 11), sharex=True, sharey=True, layout="constrained"
    )
    for axis in axes.flat[len(PANELS) :]:
        axis.axis("off")
    for axis, (name, params) in zip(axes.flat, PANELS, strict=False):
        weights = gate_weights(name, base if name == "stm" else stats, **params)
        most = max(1.0, weights.max().item())
        mesh = axis.pcolormesh(
            g, stats.prob, weights / most, vmin=0, vmax=1, cmap="viridis", shading="gouraud"
        )
        notes = [f"{key.removesuffix('_threshold')} {value:g}" for key, value in params.items()] + (
            ["+ KL"] if GATES[name].anchor else []
        )
        notes += [f"divided by {most:.2g}"] if most > 1.001 else []
        axis.set_title(name + (f"  ({', '.join(notes)})" if notes else ""), fontsize=9)
    axes[0, 0].annotate(
        "confident\nconflicts",
        (0.08, 0.06),
        (0.3, 0.6),
        color="black",
        fontsize=9,
        arrowprops={"arrowstyle": "->"},
    )
    for axis in axes[-1]:
        axis.set_xlabel("g, entropy / ln 20")
    for axis in axes[:, 0]:
        axis.set_ylabel("P(label)")
    figure.colorbar(mesh, ax=axes, label="weight of the token's nll", shrink=0.6)
    figure.savefig(Path(__file__).with_name("gates.png"), dpi=110)


if __name__ == "__main__":
    main()
