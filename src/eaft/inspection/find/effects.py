"""
What each gate would do to this data: the shares that it removes, and the tokens that it mutes most.

A gate with the weights w removes the share 1 - sum(w x) / sum(x) of a quantity x, over the labelled
tokens of the data. The weights are computed under the base model, as in the first step of
training. A gate's KL term is no weight, so it does not show.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eaft.inspection.example_columns import ExampleColumns
from eaft.inspection.labelled import Labelled, with_examples
from eaft.inspection.removed import Removed
from eaft.inspection.summary import DATA, GateEffect, MeasuredParameters, TokenNll
from eaft.inspection.vocabulary import Vocabulary
from eaft.objective.gates import normalized_entropy
from eaft.objective.registry import GATES, gate_weights, is_of_data
from eaft.training.gate_measurements import MEASURED_PARAMETERS, Histogram

MOST_MUTED = 12  # tokens named for each gate
KL_NOTE = "Its KL term is no weight on a token and does not show here."
TALR_NOTE = "In training tau is the median of each batch; here it is the median of all examples."


class ParameterMeasurement:
    """
    Measures the parameters of gates that depend on the data.

    It measures as training does (`eaft.training.gate_measurements`).
    """

    def __init__(self, examples: ExampleColumns) -> None:
        self.examples = examples
        self.entropy, self.prob = Histogram(), Histogram()

    def add(self, tokens: Labelled) -> None:
        """Count tokens of the data."""
        self.entropy.add(normalized_entropy(tokens.stats))
        self.prob.add(tokens.stats.prob)

    def result(self) -> MeasuredParameters:
        """Return the parameters; at least one token must have been added."""
        defaults = GATES["conflict-mask"].params
        nll = self.examples.nll[self.examples.is_from(DATA)]
        median = float(np.median(nll[~np.isnan(nll)]))
        return MeasuredParameters(
            entropy_threshold=self.entropy.percentile(defaults["entropy_percentile"]),
            prob_threshold=self.prob.percentile(defaults["prob_percentile"]),
            tau=max(median, float(np.finfo(np.float32).tiny)),
        )


class DataGate:
    """A gate with all its parameters: defaults, and the parameters measured on the data."""

    def __init__(self, name: str, measured: MeasuredParameters) -> None:
        self.name = name
        self.params = dict(GATES[name].params)
        for param in MEASURED_PARAMETERS:
            if is_of_data(self.params.get(param)):
                self.params[param] = getattr(measured, param)

    def weights(self, tokens: Labelled, example_nll: NDArray[np.float64]) -> NDArray[np.float64]:
        """
        Return the gate's weights.

        Args:
            tokens: `n` tokens.
            example_nll: `[examples]`, each example's mean nll under the base model.

        Returns:
            `[n]`.
        """
        stats = with_examples(tokens.stats, tokens.example, example_nll)
        return gate_weights(self.name, stats, **self.params).double().numpy()


class Effects:
    """Sums over the data of what each gate removes, by source."""

    def __init__(
        self,
        examples: ExampleColumns,
        vocabulary: Vocabulary,
        measured: MeasuredParameters,
        gates: list[str],
    ) -> None:
        self.examples, self.vocabulary = examples, vocabulary
        self.gates = [DataGate(name, measured) for name in gates]
        self.removed = {
            gate.name: Removed(len(examples.sources), vocabulary.size) for gate in self.gates
        }

    def add(self, tokens: Labelled) -> None:
        """Add tokens of the data."""
        source = self.examples.source[tokens.example]
        for gate in self.gates:
            weights = gate.weights(tokens, self.examples.nll)
            self.removed[gate.name].add(weights, tokens.quantities, source, tokens.token_id)

    def result(self) -> list[GateEffect]:
        """
        Return what each gate does to all sources.

        If there are several sources, what it does to each large source follows.
        """
        effects = []
        for gate in self.gates:
            removed = self.removed[gate.name]
            effects.append(self.effect(gate, None))
            if np.count_nonzero(removed.totals["tokens"]) > 1:
                effects += [self.effect(gate, source) for source in removed.largest]
        return effects

    def effect(self, gate: DataGate, source: int | None) -> GateEffect:
        """Return what a gate does to one source, or to all of them with its muted tokens."""
        removed = self.removed[gate.name]
        return GateEffect(
            **vars(removed.shares(source)),
            gate=gate.name,
            params=gate.params,
            note=note(gate.name),
            source=None if source is None else self.examples.sources[source],
            muted=self.muted(removed) if source is None else [],
        )

    def muted(self, removed: Removed) -> list[TokenNll]:
        """Return the tokens that lose most nll."""
        return [
            TokenNll(
                **vars(self.vocabulary.named(token.token_id)), count=token.count, nll=token.nll
            )
            for token in removed.most_muted(MOST_MUTED)
        ]


def note(gate: str) -> str | None:
    """Return what the shares of a gate do not show."""
    if GATES[gate].anchor:
        return KL_NOTE
    return TALR_NOTE if gate == "talr" else None
