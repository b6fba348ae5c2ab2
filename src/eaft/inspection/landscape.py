"""
The plane of entropy and probability: the edges of its bins, and sums over them.

The report's figures and the viewer share it. Figure 1b of arXiv:2601.02151 draws both axes linear,
so the confident conflicts (H < 0.5 nats, p < 0.1) are a fiftieth of the plane. Here both axes are
at the square root: bins have equal widths in sqrt(H) and sqrt(p), and the conflicts' corner is a
twelfth of the plane or more. The corner's borders and H = 2 nats (high entropy) are edges of bins.

- entropy: 0.5 (i / 20)^2 nats, i = 0, 1, ... up to the data's largest; 0.5 is edge 20, 2.0 edge 40
- probability: 0.1 (j / 25)^2, j = 0 ... 78; 0.1 is edge 25, and the last bin ends at 1

A bin includes its lower edge. The last bin also includes its upper edge.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from eaft.objective.statistics import CONFLICT_MAX_ENTROPY, CONFLICT_MAX_PROB

CONFLICT_ENTROPY_BINS, CONFLICT_PROB_BINS = 20, 25  # bins of the conflicts' corner
MIN_ENTROPY = 3.0  # nats; the plane reaches at least this far
ENTROPY_TICKS = (0, 0.1, 0.5, 1, 2, 3, 4, 6, 8, 10, 12)  # labels of the axis, nats
PROB_TICKS = (0, 0.01, 0.1, 0.25, 0.5, 0.75, 1)

Floats = NDArray[np.floating]
Indices = NDArray[np.intp]


def entropy_edges(maximum: float) -> NDArray[np.float64]:
    """Return the edges of the entropy's bins in nats, from 0 to the first at or above `maximum`."""
    last = math.ceil(
        CONFLICT_ENTROPY_BINS * math.sqrt(max(maximum, MIN_ENTROPY) / CONFLICT_MAX_ENTROPY)
    )
    return CONFLICT_MAX_ENTROPY * (np.arange(last + 1) / CONFLICT_ENTROPY_BINS) ** 2


def prob_edges() -> NDArray[np.float64]:
    """Return the edges of the probability's 79 bins, from 0 to 1."""
    last = math.floor(CONFLICT_PROB_BINS / math.sqrt(CONFLICT_MAX_PROB))
    edges = CONFLICT_MAX_PROB * (np.arange(last + 1) / CONFLICT_PROB_BINS) ** 2
    edges[-1] = 1.0
    return edges


def bin_indices(values: Floats, edges: NDArray[np.float64]) -> Indices:
    """Return the bin of each of `values` `[n]`; a value outside the edges is in the nearest bin."""
    return np.searchsorted(edges[1:-1], values, side="right")


def bin_sums(
    entropy_bins: Indices, prob_bins: Indices, shape: tuple[int, int], weights: Floats | None = None
) -> NDArray[np.float64]:
    """
    Return the sum of `weights` in every bin, `[entropies, probabilities]`.

    Args:
        entropy_bins: `[n]`, from `bin_indices`.
        prob_bins: `[n]`.
        shape: the numbers of bins.
        weights: `[n]`, summed in float64; None: 1 each.
    """
    flat = np.bincount(entropy_bins * shape[1] + prob_bins, weights, minlength=shape[0] * shape[1])
    return flat.astype(np.float64).reshape(shape)
