"""
Makes the content of summary.json from the tables.

It takes two passes over the base model's tokens and one over each other model's. Memory holds sums
by token id, source and origin, and a few bytes for each example. Sums are in float64.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from eaft.inspection.example_columns import ExampleColumns
from eaft.inspection.find.advice import Conflicts, advise
from eaft.inspection.find.checks import check
from eaft.inspection.find.effects import Effects, ParameterMeasurement
from eaft.inspection.find.words import Words
from eaft.inspection.folder import BASE, Inspection
from eaft.inspection.interval import LEVEL, share_interval
from eaft.inspection.labelled import (
    Labelled,
    labelled_pairs,
    labelled_tokens,
    weighed_gates,
)
from eaft.inspection.removed import QUANTITIES, share
from eaft.inspection.score import stopping
from eaft.inspection.summary import (
    DATA,
    ORIGINS,
    ROLLOUTS,
    ByOrigin,
    GroupNll,
    Shares,
    Summary,
    TopKRow,
)
from eaft.inspection.vocabulary import Vocabulary
from eaft.objective.statistics import HIGH_ENTROPY, LOW_ENTROPY, TokenStatistics


class OriginSums:
    """One model's sums over the tokens of one origin."""

    def __init__(self) -> None:
        self.totals = dict.fromkeys(QUANTITIES, 0.0)
        self.conflicts = dict.fromkeys(QUANTITIES, 0.0)
        # The sum of the nll, and the number of tokens
        self.nll = {name: np.zeros(2) for name in ("all", "high_entropy", "low_entropy")}
        self.entropy = np.zeros(2)  # the sum, and the number of tokens

    def add(
        self, tokens: Labelled, base_entropy: NDArray[np.float32], here: NDArray[np.bool_]
    ) -> None:
        """
        Add tokens.

        Args:
            tokens: `n` tokens, with their statistics under this model.
            base_entropy: `[n]`, under the base model, nats.
            here: `[n]`, which tokens are of this origin.
        """
        conflict = tokens.stats.is_conflict.numpy()
        for name, values in tokens.quantities.items():
            self.totals[name] += float(values[here].sum())
            self.conflicts[name] += float(values[here & conflict].sum())
        for name, in_group in (
            ("all", here),
            ("high_entropy", here & (base_entropy >= HIGH_ENTROPY)),
            ("low_entropy", here & (base_entropy <= LOW_ENTROPY)),
        ):
            self.nll[name] += tokens.quantities["nll"][in_group].sum(), in_group.sum()
        entropy = tokens.stats.entropy.double().numpy()
        self.entropy += entropy[here].sum(), here.sum()

    def conflict_shares(self) -> Shares:
        """Return the shares in confident conflicts."""
        return Shares(
            **{name: share(part, self.totals[name]) for name, part in self.conflicts.items()}
        )

    def mean_nll(self) -> GroupNll:
        """Return the mean nll of each group."""
        return GroupNll(**{name: mean(*sums) for name, sums in self.nll.items()})

    def mean_entropy(self) -> float | None:
        """
        Return the mean entropy, nats.

        For the model's own answers it says how sure of itself the model is.
        """
        return mean(*self.entropy)


def mean(total: float, n: float) -> float | None:
    """Return a mean; None for no values."""
    return float(total / n) if n else None


class ModelSums:
    """One model's conflicts, nll and entropy, by origin."""

    def __init__(self, examples: ExampleColumns) -> None:
        self.examples = examples
        self.by_origin = {origin: OriginSums() for origin in ORIGINS}
        self.entropy_max = 0.0

    def add(self, tokens: Labelled, stats: TokenStatistics) -> None:
        """Add the base model's tokens, with their statistics under this model."""
        of_model = replace(tokens, stats=stats)
        base_entropy = tokens.stats.entropy.numpy()
        for origin in self.examples.origins:
            here = self.examples.is_from(origin)[tokens.example]
            self.by_origin[origin].add(of_model, base_entropy, here)
        if len(stats.entropy):
            self.entropy_max = max(self.entropy_max, float(stats.entropy.max()))

    @property
    def data(self) -> OriginSums:
        """The sums over the data."""
        return self.by_origin[DATA]

    @property
    def rollouts(self) -> OriginSums | None:
        """The sums over the model's own answers; None if there are none."""
        return self.by_origin[ROLLOUTS] if ROLLOUTS in self.examples.origins else None

    def conflict_shares(self) -> ByOrigin[Shares]:
        """Return the shares in confident conflicts."""
        rollouts = self.rollouts
        return ByOrigin(
            self.data.conflict_shares(), None if rollouts is None else rollouts.conflict_shares()
        )

    def mean_nll(self) -> ByOrigin[GroupNll]:
        """Return the mean nll of each group."""
        rollouts = self.rollouts
        return ByOrigin(self.data.mean_nll(), None if rollouts is None else rollouts.mean_nll())

    def mean_entropy(self) -> ByOrigin[float | None]:
        """Return the mean entropy, nats."""
        rollouts = self.rollouts
        return ByOrigin(
            self.data.mean_entropy(), None if rollouts is None else rollouts.mean_entropy()
        )


def find(inspection: Inspection, top_k_curve: list[TopKRow] | None) -> Summary:
    """
    Return the summary of an inspection.

    Args:
        inspection: scored; its summary.json need not exist.
        top_k_curve: of `eaft.inspection.score.curve.top_k_curve`, if it was measured.
    """
    examples, vocabulary = ExampleColumns(inspection), Vocabulary(inspection)
    sums = {BASE: ModelSums(examples)}
    measurement, words = ParameterMeasurement(examples), Words(vocabulary)
    conflicts = Conflicts(vocabulary)
    for tokens in labelled_tokens(inspection):
        sums[BASE].add(tokens, tokens.stats)
        of_data = select(tokens, examples.is_from(DATA)[tokens.example])
        measurement.add(of_data)
        words.add(of_data)
        conflicts.add(of_data)
    any_labelled = sums[BASE].data.totals["tokens"] > 0
    measured = measurement.result() if any_labelled else None
    effects = None
    if measured is not None:
        gates = list(weighed_gates(inspection.whole_vocabulary))
        effects = Effects(examples, vocabulary, measured, gates)
    words.choose()
    for tokens in labelled_tokens(inspection):
        of_data = select(tokens, examples.is_from(DATA)[tokens.example])
        words.add_wanted(of_data)
        if effects is not None:
            effects.add(of_data)
    for model in inspection.models[1:]:
        sums[model.name] = ModelSums(examples)
        for tokens, stats in labelled_pairs(inspection, model.name):
            sums[model.name].add(tokens, stats)
    shares = {name: of_model.conflict_shares() for name, of_model in sums.items()}
    level = LEVEL if inspection.run.sample is None else stopping.LEVEL
    return Summary(
        counts=examples.counts(),
        conflicts=shares,
        nll={name: of_model.mean_nll() for name, of_model in sums.items()},
        entropy={name: of_model.mean_entropy() for name, of_model in sums.items()},
        entropy_max=max(of_model.entropy_max for of_model in sums.values()),
        measured=measured,
        gates=[] if effects is None else effects.result(),
        tokens=words.result(),
        top_k=top_k_curve,
        checks=check(inspection),
        advice=advise(
            shares[BASE],
            conflicts,
            share_interval(*examples.nll_sums(), int(conflicts.counts.sum()), level),
        ),
    )


def select(tokens: Labelled, keep: NDArray[np.bool_]) -> Labelled:
    """Return some of the tokens; `keep` is `[n]`."""
    if keep.all():
        return tokens
    mask = torch.from_numpy(keep)
    columns = {
        name: column[mask]
        for name, column in vars(tokens.stats).items()
        if isinstance(column, torch.Tensor)
    }
    return Labelled(
        replace(tokens.stats, **columns),  # type: ignore[arg-type]
        tokens.example[keep],
        tokens.token_id[keep],
        tokens.first_choice[keep],
    )
