"""
What each gate would do to this data: the shares of tokens, nll and gradient it removes, and the tokens it mutes most.

A gate removes 1 - sum(w x) / sum(x) of x, over the labelled tokens of the data, w its weight under the base model: that
is what the first step of training would see. A KL term of a gate is no weight, and does not show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft.inspection.folder import DATA
from eaft.inspection.labelled import Examples, Labelled, Vocabulary, with_examples
from eaft.objective.gates import GATES, gate_weights, normalized_entropy
from eaft.training.measure import MEASURED, Histogram

Numbers = dict[str, Any]
Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

QUANTITIES = ("tokens", "nll", "gradient")  # as `Labelled.quantities`
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


def weights(gate: str, params: Numbers, tokens: Labelled, example_nll: Floats) -> NDArray[np.float64]:
    """Return a gate's weight on each token `[n]`, given every example's mean nll under the base model."""
    stats = with_examples(tokens.stats, tokens.example, example_nll)
    return gate_weights(gate, stats, **params).double().numpy()


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

    def add(self, weights: Floats, quantities: Mapping[str, Floats], source: Ints, token_id: Ints) -> None:
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
        """Return the shares that are removed, of all or of one source; None of what there is nothing of."""
        of = slice(None) if source is None else slice(source, source + 1)
        sums = {name: (self.removed[name][of].sum(), self.totals[name][of].sum()) for name in QUANTITIES}
        return {name: float(part / total) if total else None for name, (part, total) in sums.items()}

    def most_muted(self, n: int) -> list[Numbers]:
        """Return the tokens that lose most nll: token_id, count (of a weight below `MUTED`) and nll (nats, removed)."""
        most = np.argsort(-self.muted_nll, kind="stable")[:n].tolist()
        return [
            {"token_id": i, "count": int(self.muted[i]), "nll": float(self.muted_nll[i])}
            for i in most
            if self.muted_nll[i] > 0
        ]


class Effects:
    """Sums over the data of what each registered gate removes, by source."""

    def __init__(self, examples: Examples, vocabulary: Vocabulary, measured: dict[str, float]) -> None:
        self.examples, self.vocabulary = examples, vocabulary
        self.params = {gate: complete(gate, measured) for gate in GATES}
        self.removed = {gate: Removed(len(examples.sources), vocabulary.size) for gate in GATES}

    def add(self, tokens: Labelled) -> None:
        """Add tokens of the data."""
        source = self.examples.source[tokens.example]
        for gate, params in self.params.items():
            found = weights(gate, params, tokens, self.examples.nll)
            self.removed[gate].add(found, tokens.quantities, source, tokens.token_id)

    def result(self) -> list[Numbers]:
        """Return a row for each gate, and with several sources one for each gate and large source after it."""
        rows = []
        for gate, params in self.params.items():
            removed = self.removed[gate]
            muted = [{**self.vocabulary.named(m["token_id"]), **m} for m in removed.most_muted(MOST_MUTED)]
            note = KL_NOTE if GATES[gate].anchor else TALR_NOTE if gate == "talr" else None
            row = {"gate": gate, "params": params, "note": note}
            rows.append({**row, "source": None, **removed.shares(), "muted": muted})
            if np.count_nonzero(removed.totals["tokens"]) > 1:
                rows += [
                    {**row, "source": self.examples.sources[s], **removed.shares(s), "muted": []}
                    for s in removed.largest
                ]
        return rows
