"""
What a gate's weights take away from training: shares of tokens, nll and gradient, and the tokens it
mutes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = dict[str, Any]
Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

QUANTITIES = ("tokens", "nll", "gradient")  # as `Labelled.quantities`
MUTED = 0.5  # a token whose weight is below is counted as muted
# the largest, which have a row: a column `source` may be an address that no two examples share
MOST_SOURCES = 20


class Removed:
    """
    Sums over tokens of what a gate's weights take away, by source and by token id.

    Args:
        sources: how many there are.
        size: of the vocabulary; ids are below it.
    """

    def __init__(self, sources: int, size: int) -> None:
        self.totals = {name: np.zeros(sources) for name in QUANTITIES}
        self.removed = {name: np.zeros(sources) for name in QUANTITIES}
        self.muted, self.muted_nll = np.zeros(size, dtype=np.int64), np.zeros(size)

    def add(
        self, weights: Floats, quantities: Mapping[str, Floats], source: Ints, token_id: Ints
    ) -> None:
        """Add tokens, `[n]` each: their weights, `QUANTITIES`, sources (numbers) and ids."""
        removed, sources, size = 1 - weights, len(self.totals["tokens"]), len(self.muted)
        for name, values in quantities.items():
            self.totals[name] += np.bincount(source, values, sources)
            self.removed[name] += np.bincount(source, removed * values, sources)
        self.muted += np.bincount(token_id[weights < MUTED], minlength=size)
        self.muted_nll += np.bincount(token_id, removed * quantities["nll"], size)

    @property
    def largest(self) -> list[int]:
        """The sources that have most tokens, at most `MOST_SOURCES`, in order of their numbers."""
        most = np.argsort(-self.totals["tokens"], kind="stable")[:MOST_SOURCES]
        return sorted(int(source) for source in most if self.totals["tokens"][source])

    def shares(self, source: int | None = None) -> dict[str, float | None]:
        """
        Return the shares that are removed, of all or of one source; None of what there is nothing
        of.
        """
        of = slice(None) if source is None else slice(source, source + 1)
        sums = {
            name: (self.removed[name][of].sum(), self.totals[name][of].sum()) for name in QUANTITIES
        }
        return {
            name: float(part / total) if total else None for name, (part, total) in sums.items()
        }

    def most_muted(self, n: int) -> list[Numbers]:
        """
        Return the tokens that lose most nll: token_id, count (of a weight below `MUTED`) and nll
        (nats, removed).
        """
        most = np.argsort(-self.muted_nll, kind="stable")[:n].tolist()
        return [
            {"token_id": i, "count": int(self.muted[i]), "nll": float(self.muted_nll[i])}
            for i in most
            if self.muted_nll[i] > 0
        ]
