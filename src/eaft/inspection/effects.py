"""
What each gate would do to this data: the shares of tokens, nll and gradient it removes, and the tokens it mutes most.

A gate removes 1 - sum(w x) / sum(x) of x, over the labelled tokens of the data, w its weight under the base model: that
is what the first step of training would see. A KL term of a gate is no weight, and does not show.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eaft.inspection.folder import DATA
from eaft.inspection.labelled import Examples, Labelled, Vocabulary
from eaft.objective.gates import GATES, gate_weights, normalized_entropy
from eaft.training.measure import MEASURED, Histogram

Numbers = dict[str, Any]
MUTED = 0.5  # a token whose weight is below is counted as muted
MOST_MUTED = 12  # tokens named for each gate
MOST_SOURCES = 20  # the largest, which have a row: a column `source` may be an address that no two examples share
KL_NOTE = "Its KL term is no weight on a token and does not show here."
TALR_NOTE = "In training tau is the median of each batch; here it is the median of all examples."


class Measured:
    """The parameters that gates must measure, as training measures them (`eaft.training.measure`) on the same data."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        self.g, self.prob = Histogram(), Histogram()

    def add(self, tokens: Labelled) -> None:
        """Count tokens of the data."""
        self.g.add(normalized_entropy(tokens.stats))
        self.prob.add(tokens.stats.prob)

    def result(self) -> dict[str, float]:
        """Return `entropy_threshold` (in units of g), `prob_threshold` and `tau` (nats)."""
        defaults = GATES["conflict-mask"].params
        nll = self.examples.nll[self.examples.of(DATA)]
        return {
            "entropy_threshold": self.g.percentile(defaults["entropy_percentile"]),
            "prob_threshold": self.prob.percentile(defaults["prob_percentile"]),
            "tau": max(float(np.median(nll[~np.isnan(nll)])), float(np.finfo(np.float32).tiny)),
        }


def complete(gate: str, measured: dict[str, float]) -> Numbers:
    """Return all parameters of a gate: its defaults, and what was measured; a `batch`'s tau is that of the data."""
    defaults = GATES[gate].params
    return {**defaults, **{name: measured[name] for name in MEASURED if name in defaults}}


def weights(gate: str, params: Numbers, tokens: Labelled, example_nll: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a gate's weight on each token `[n]`, given every example's mean nll under the base model."""
    stats = replace(
        tokens.stats,
        example_ids=torch.from_numpy(tokens.example.astype(np.int64)),
        example_nll=torch.from_numpy(example_nll[tokens.example].astype(np.float32)),
    )
    return gate_weights(gate, stats, **params).double().numpy()


class Effects:
    """Sums over the data of what each registered gate removes, by source."""

    def __init__(self, examples: Examples, vocabulary: Vocabulary, measured: dict[str, float]) -> None:
        self.examples, self.vocabulary = examples, vocabulary
        self.params = {gate: complete(gate, measured) for gate in GATES}
        sources = len(examples.sources)
        self.totals = {name: np.zeros(sources) for name in ("tokens", "nll", "gradient")}
        self.removed = {gate: {name: np.zeros(sources) for name in self.totals} for gate in GATES}
        self.muted = {gate: np.zeros(vocabulary.size, dtype=np.int64) for gate in GATES}
        self.muted_nll = {gate: np.zeros(vocabulary.size) for gate in GATES}

    def add(self, tokens: Labelled) -> None:
        """Add tokens of the data."""
        source, size = self.examples.source[tokens.example], self.vocabulary.size
        for name, values in tokens.quantities.items():
            self.totals[name] += np.bincount(source, values, len(self.examples.sources))
        for gate, params in self.params.items():
            removed = 1 - weights(gate, params, tokens, self.examples.nll)
            for name, values in tokens.quantities.items():
                self.removed[gate][name] += np.bincount(source, removed * values, len(self.examples.sources))
            self.muted[gate] += np.bincount(tokens.token_id[removed > 1 - MUTED], minlength=size)
            self.muted_nll[gate] += np.bincount(tokens.token_id, removed * tokens.quantities["nll"], size)

    def result(self) -> list[Numbers]:
        """Return a row for each gate, and with several sources one for each gate and large source after it."""
        rows = []
        present = np.flatnonzero(self.totals["tokens"])
        largest = present[np.argsort(-self.totals["tokens"][present], kind="stable")[:MOST_SOURCES]]
        for gate, params in self.params.items():
            most = np.argsort(-self.muted_nll[gate], kind="stable")[:MOST_MUTED]
            muted = [
                {
                    **self.vocabulary.named(token),
                    "count": int(self.muted[gate][token]),  # of weight below MUTED
                    "nll": float(self.muted_nll[gate][token]),  # removed, nats
                }
                for token in most
                if self.muted_nll[gate][token] > 0
            ]
            note = KL_NOTE if GATES[gate].anchor else TALR_NOTE if gate == "talr" else None
            row = {"gate": gate, "params": params, "note": note}
            rows.append({**row, "source": None, **self.shares(gate, slice(None)), "muted": muted})
            if len(present) > 1:
                rows += [
                    {**row, "source": self.examples.sources[s], **self.shares(gate, slice(s, s + 1)), "muted": []}
                    for s in np.sort(largest)
                ]
        return rows

    def shares(self, gate: str, sources: slice) -> dict[str, float | None]:
        """Return the shares that a gate removes over some of the sources; None of what there is nothing of."""
        totals = {name: total[sources].sum() for name, total in self.totals.items()}
        removed = self.removed[gate]
        return {name: float(removed[name][sources].sum() / total) if total else None for name, total in totals.items()}
