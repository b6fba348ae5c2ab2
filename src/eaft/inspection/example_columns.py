"""The columns of examples.parquet that the findings need, a few bytes for each example."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from eaft.inspection.folder import Inspection
from eaft.inspection.summary import DATA, ORIGINS, ROLLOUTS, ByOrigin, Counts


class ExampleColumns:
    """
    Columns of examples.parquet.

    Attributes:
        is_rollout: bool `[examples]`, whether the example is the model's own answer.
        sources: the names of the sources.
        source: `[examples]`, an index of `sources`.
        nll: `[examples]`, mean nll under the base model, nats; NaN if no token is labelled.
        tokens: `[examples]`, the number of tokens.
        labelled: `[examples]`, the number of labelled tokens.
        conflict_nll_share: `[examples]`, the share of its nll in confident conflicts; NaN if its
            nll is 0 or no token is labelled.
    """

    def __init__(self, inspection: Inspection) -> None:
        table = inspection.examples(
            ["origin", "source", "nll", "tokens", "labelled", "conflict_nll_share"]
        )
        self.is_rollout: NDArray[np.bool_] = pc.equal(table["origin"], ROLLOUTS).to_numpy()
        encoded = table["source"].combine_chunks().dictionary_encode()
        self.sources: list[str] = encoded.dictionary.to_pylist()
        self.source: NDArray[np.int32] = encoded.indices.to_numpy()
        self.nll: NDArray[np.float64] = table["nll"].to_numpy()
        self.tokens: NDArray[np.int32] = table["tokens"].to_numpy()
        self.labelled: NDArray[np.int32] = table["labelled"].to_numpy()
        self.conflict_nll_share: NDArray[np.float64] = table["conflict_nll_share"].to_numpy()

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins that the folder has."""
        return ORIGINS if self.is_rollout.any() else (DATA,)

    def is_from(self, origin: str) -> NDArray[np.bool_]:
        """Return which examples are from an origin, `[examples]`."""
        return self.is_rollout if origin == ROLLOUTS else ~self.is_rollout

    def nll_sums(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the nll in conflicts and the whole nll of each row of the data with nll, nats."""
        data = self.is_from(DATA) & ~np.isnan(self.conflict_nll_share)
        whole = self.nll[data] * self.labelled[data]
        return whole * self.conflict_nll_share[data], whole

    def counts(self) -> ByOrigin[Counts]:
        """Return how many examples, tokens and labelled tokens each origin has."""
        rollouts = self.counts_of(ROLLOUTS) if ROLLOUTS in self.origins else None
        return ByOrigin(self.counts_of(DATA), rollouts)

    def counts_of(self, origin: str) -> Counts:
        """Return how many examples, tokens and labelled tokens an origin has."""
        is_from = self.is_from(origin)
        return Counts(
            examples=int(is_from.sum()),
            tokens=int(self.tokens[is_from].sum(dtype=np.int64)),
            labelled=int(self.labelled[is_from].sum(dtype=np.int64)),
        )
