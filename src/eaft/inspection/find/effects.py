"""
What each gate would do to this data: the shares of tokens, nll and gradient it removes, and the
tokens it mutes most.

A gate removes 1 - sum(w x) / sum(x) of x, over the labelled tokens of the data, w its weight under
the base model: that is what the first step of training would see. A KL term of a gate is no weight,
and does not show.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft.inspection.folder import DATA
from eaft.inspection.labelled import Examples, Labelled, Vocabulary, weighed_gates, with_examples
from eaft.inspection.removed import Removed
from eaft.objective.gates import normalized_entropy
from eaft.objective.registry import GATES, gate_weights, is_of_data
from eaft.training.gate_measurements import MEASURED_PARAMETERS, Histogram

Numbers = dict[str, Any]

MOST_MUTED = 12  # tokens named for each gate
KL_NOTE = "Its KL term is no weight on a token and does not show here."
TALR_NOTE = "In training tau is the median of each batch; here it is the median of all examples."


class Measured:
    """
    The parameters that gates must measure, as training measures them on the same data
    (`eaft.training.gate_measurements`).
    """

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
    """Return all parameters of a gate: its defaults, and what is of the data."""
    defaults = GATES[gate].params
    return {
        **defaults,
        **{name: measured[name] for name in MEASURED_PARAMETERS if is_of_data(defaults.get(name))},
    }


def weights(
    gate: str, params: Numbers, tokens: Labelled, example_nll: NDArray[np.float64]
) -> NDArray[np.float64]:
    """
    Return a gate's weight on each token `[n]`, given every example's mean nll under the base model.
    """
    stats = with_examples(tokens.stats, tokens.example, example_nll)
    return gate_weights(gate, stats, **params).double().numpy()


class Effects:
    """Sums over the data of what each gate removes, by source."""

    def __init__(
        self, examples: Examples, vocabulary: Vocabulary, measured: dict[str, float]
    ) -> None:
        self.examples, self.vocabulary = examples, vocabulary
        self.params = {gate: complete(gate, measured) for gate in weighed_gates()}
        self.removed = {
            gate: Removed(len(examples.sources), vocabulary.size) for gate in self.params
        }

    def add(self, tokens: Labelled) -> None:
        """Add tokens of the data."""
        source = self.examples.source[tokens.example]
        for gate, params in self.params.items():
            found = weights(gate, params, tokens, self.examples.nll)
            self.removed[gate].add(found, tokens.quantities, source, tokens.token_id)

    def result(self) -> list[Numbers]:
        """
        Return a row for each gate, and with several sources one for each gate and large source
        after it.
        """
        rows = []
        for gate, params in self.params.items():
            removed = self.removed[gate]
            muted = [
                {**self.vocabulary.named(token.token_id), **vars(token)}
                for token in removed.most_muted(MOST_MUTED)
            ]
            note = KL_NOTE if GATES[gate].anchor else TALR_NOTE if gate == "talr" else None
            row = {"gate": gate, "params": params, "note": note}
            rows.append({**row, "source": None, **vars(removed.shares()), "muted": muted})
            if np.count_nonzero(removed.totals["tokens"]) > 1:
                rows += [
                    {
                        **row,
                        "source": self.examples.sources[s],
                        **vars(removed.shares(s)),
                        "muted": [],
                    }
                    for s in removed.largest
                ]
        return rows
