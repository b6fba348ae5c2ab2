"""What a gate's weights remove: shares of tokens, nll and gradient, and the tokens muted most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eaft.inspection.summary import Shares

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

QUANTITIES = ("tokens", "nll", "gradient")  # as in `Labelled.quantities` and `Shares`
MUTED = 0.5  # a token counts as muted if its weight is below this
# Sources that have a row of their own. A column `source` may hold an address in every example
MOST_SOURCES = 20


@dataclass(frozen=True)
class LostNll:
    """What a token id loses."""

    token_id: int
    count: int  # of its occurrences with a weight below `MUTED`
    nll: float  # nats removed


def share(part: float, whole: float) -> float | None:
    """Return part / whole; None if the whole is 0, or either is NaN because it was not measured."""
    return float(part / whole) if whole and not np.isnan(part + whole) else None


class Removed:
    """
    Sums over tokens of what a gate's weights remove, by source and by token id.

    Args:
        sources: the number of sources.
        size: token ids are below this.
    """

    def __init__(self, sources: int, size: int) -> None:
        self.totals = {name: np.zeros(sources) for name in QUANTITIES}
        self.removed = {name: np.zeros(sources) for name in QUANTITIES}
        self.muted, self.lost_nll = np.zeros(size, dtype=np.int64), np.zeros(size)

    def add(
        self, weights: Floats, quantities: Mapping[str, Floats], source: Ints, token_id: Ints
    ) -> None:
        """
        Add tokens.

        Args:
            weights: `[n]`.
            quantities: `[n]` for each of `QUANTITIES`.
            source: `[n]`, numbers of sources.
            token_id: `[n]`.
        """
        removed, sources, size = 1 - weights, len(self.totals["tokens"]), len(self.muted)
        for name, values in quantities.items():
            self.totals[name] += np.bincount(source, values, sources)
            self.removed[name] += np.bincount(source, removed * values, sources)
        self.muted += np.bincount(token_id[weights < MUTED], minlength=size)
        self.lost_nll += np.bincount(token_id, removed * quantities["nll"], size)

    @property
    def largest(self) -> list[int]:
        """The numbers of the sources with most tokens, at most `MOST_SOURCES`, ascending."""
        most = np.argsort(-self.totals["tokens"], kind="stable")[:MOST_SOURCES]
        return sorted(int(source) for source in most if self.totals["tokens"][source])

    def shares(self, source: int | None = None) -> Shares:
        """Return the shares that are removed, of all tokens or of one source's."""
        part = slice(None) if source is None else slice(source, source + 1)
        shares: dict[str, float | None] = {}
        for name in QUANTITIES:
            removed, total = self.removed[name][part].sum(), self.totals[name][part].sum()
            shares[name] = share(removed, total)
        return Shares(**shares)

    def most_muted(self, n: int) -> list[LostNll]:
        """Return the `n` token ids that lose most nll, without ids that lose none."""
        most = np.argsort(-self.lost_nll, kind="stable")[:n].tolist()
        return [
            LostNll(i, int(self.muted[i]), float(self.lost_nll[i]))
            for i in most
            if self.lost_nll[i] > 0
        ]
