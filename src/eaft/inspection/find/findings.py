"""
What an inspection finds: the content of summary.json.

Two passes over the base model's tokens and one over each other model's. Nothing is kept but sums,
by token id, source and origin, and a few bytes an example; sums are in float64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eaft.inspection.find.advice import Conflicts, advise
from eaft.inspection.find.checks import check
from eaft.inspection.find.effects import Effects, Measured
from eaft.inspection.find.words import Words
from eaft.inspection.folder import BASE, DATA, ROLLOUTS, Inspection
from eaft.inspection.labelled import (
    ORIGINS,
    Examples,
    Labelled,
    Vocabulary,
    labelled_pairs,
    labelled_tokens,
)
from eaft.objective.statistics import HIGH_ENTROPY, LOW_ENTROPY, TokenStatistics

Numbers = dict[str, Any]


class Shares:
    """One model's conflicts, nll and entropy, by origin."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        self.totals = {
            origin: dict.fromkeys(("tokens", "nll", "gradient"), 0.0) for origin in ORIGINS
        }
        self.conflicts = {
            origin: dict.fromkeys(("tokens", "nll", "gradient"), 0.0) for origin in ORIGINS
        }
        # Sum and number of the nll in groups that are fixed under the base model
        groups = ("all", "high_entropy", "low_entropy")
        self.groups = {origin: {name: np.zeros(2) for name in groups} for origin in ORIGINS}
        self.entropy = {origin: np.zeros(2) for origin in ORIGINS}  # sum and number
        self.entropy_max = 0.0

    def add(self, tokens: Labelled, stats: TokenStatistics) -> None:
        """Add tokens, with their statistics under this model."""
        of_model = Labelled(stats, tokens.example, tokens.token_id, tokens.first_choice)
        conflict, entropy, base_entropy = (
            stats.is_conflict.numpy(),
            stats.entropy.double().numpy(),
            tokens.stats.entropy.numpy(),
        )
        for origin in self.examples.origins:
            here = self.examples.of(origin)[tokens.example]
            for name, values in of_model.quantities.items():
                self.totals[origin][name] += float(values[here].sum())
                self.conflicts[origin][name] += float(values[here & conflict].sum())
            high, low = base_entropy >= HIGH_ENTROPY, base_entropy <= LOW_ENTROPY
            for name, group in (
                ("all", here),
                ("high_entropy", here & high),
                ("low_entropy", here & low),
            ):
                self.groups[origin][name] += of_model.quantities["nll"][group].sum(), group.sum()
            self.entropy[origin] += entropy[here].sum(), here.sum()
        self.entropy_max = max(
            self.entropy_max, float(stats.entropy.max()) if len(stats.entropy) else 0.0
        )

    def conflict_shares(self) -> Numbers:
        """Return the shares in confident conflicts, by origin."""
        return {origin: self.per_origin(origin, self.ratios) for origin in ORIGINS}

    def mean_nll(self) -> Numbers:
        """Return the mean nll of each group, by origin; None for a group without tokens."""
        return {origin: self.per_origin(origin, self.means) for origin in ORIGINS}

    def mean_entropy(self) -> Numbers:
        """
        Return the mean exact entropy (nats), by origin: of its own answers, how sure of itself a
        model is.
        """
        return {origin: self.per_origin(origin, self.mean_of_entropy) for origin in ORIGINS}

    def per_origin(self, origin: str, compute: Any) -> Numbers | None:
        """Return what is computed of an origin, or None where there is none."""
        return compute(origin) if origin in self.examples.origins else None

    def ratios(self, origin: str) -> Numbers:
        """Return an origin's shares in conflicts."""
        totals = self.totals[origin]
        return {
            name: part / totals[name] if totals[name] else None
            for name, part in self.conflicts[origin].items()
        }

    def means(self, origin: str) -> Numbers:
        """Return an origin's mean nll, by group."""
        return {
            name: float(nll / n) if n else None for name, (nll, n) in self.groups[origin].items()
        }

    def mean_of_entropy(self, origin: str) -> float | None:
        """Return an origin's mean entropy."""
        total, n = self.entropy[origin]
        return float(total / n) if n else None


def find(inspection: Inspection, top_k_curve: list[Numbers] | None) -> Numbers:
    """
    Return the summary of an inspection.

    Args:
        inspection: scored; its summary.json need not exist.
        top_k_curve: of `eaft.inspection.score.curve.top_k_curve`, if it was measured.
    """
    examples, vocabulary = Examples(inspection), Vocabulary(inspection)
    shares = {BASE: Shares(examples)}
    measured, words, conflicts = Measured(examples), Words(vocabulary), Conflicts(vocabulary)
    for tokens in labelled_tokens(inspection):
        shares[BASE].add(tokens, tokens.stats)
        of_data = select(tokens, examples.of(DATA)[tokens.example])
        for part in (measured, words, conflicts):
            part.add(of_data)
    any_labelled = shares[BASE].totals[DATA]["tokens"] > 0
    parameters = measured.result() if any_labelled else None
    effects = Effects(examples, vocabulary, parameters) if parameters else None
    words.choose()
    for tokens in labelled_tokens(inspection):
        of_data = select(tokens, examples.of(DATA)[tokens.example])
        words.add_wanted(of_data)
        if effects is not None:
            effects.add(of_data)
    for model in inspection.models[1:]:
        shares[model.name] = Shares(examples)
        for tokens, stats in labelled_pairs(inspection, model.name):
            shares[model.name].add(tokens, stats)
    conflict_shares = {name: of_model.conflict_shares() for name, of_model in shares.items()}
    return {
        "counts": {origin: examples.counts(origin) for origin in ORIGINS},
        "conflicts": conflict_shares,
        "nll": {name: of_model.mean_nll() for name, of_model in shares.items()},
        "entropy": {name: of_model.mean_entropy() for name, of_model in shares.items()},
        "entropy_max": max(of_model.entropy_max for of_model in shares.values()),
        "measured": parameters,
        "gates": effects.result() if effects is not None else [],
        "tokens": words.result(),
        "top_k": top_k_curve,
        "checks": check(inspection),
        "advice": advise(conflict_shares[BASE][DATA], conflict_shares[BASE][ROLLOUTS], conflicts),
    }


def select(tokens: Labelled, keep: NDArray[np.bool_]) -> Labelled:
    """Return some of the tokens."""
    if keep.all():
        return tokens
    stats, kept = tokens.stats, torch.from_numpy(keep)
    columns: Numbers = {
        name: value[kept] for name, value in vars(stats).items() if isinstance(value, torch.Tensor)
    }
    return Labelled(
        replace(stats, **columns),
        tokens.example[keep],
        tokens.token_id[keep],
        tokens.first_choice[keep],
    )
