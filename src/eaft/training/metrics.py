"""
The metrics that training logs beside TRL's: named sums over labelled tokens, and their means.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from eaft.objective.fused import TokenLosses
from eaft.objective.statistics import HIGH_ENTROPY, LOW_ENTROPY


@dataclass(frozen=True)
class TokenSums:
    """Sums over labelled tokens of one or several batches; each a scalar, float32, on a device."""

    tokens: Tensor  # how many there are
    nll: Tensor  # nats
    conflicts: Tensor  # how many are confident conflicts
    conflict_nll: Tensor  # nats, of the confident conflicts
    weights: Tensor  # of the gate
    kl: Tensor  # nats, from the reference; 0 without one
    high_tokens: Tensor  # how many have an entropy of at least HIGH_ENTROPY
    high_nll: Tensor  # nats, of these
    low_tokens: Tensor  # how many have an entropy of at most LOW_ENTROPY
    low_nll: Tensor  # nats, of these
    replayed: Tensor  # how many more, replayed, were held by the base's distribution
    replay_kl: Tensor  # nats, of these

    @classmethod
    def of(cls, losses: TokenLosses, replay_kl: Tensor | None = None) -> TokenSums:
        """
        Return the sums over the tokens of one batch.

        Args:
            losses: of the tokens with a nll.
            replay_kl: of replayed tokens with a KL to the base in its place, `[n]`, nats.
        """
        stats = losses.statistics
        nll, conflict = stats.nll, stats.is_conflict
        high, low = stats.entropy >= HIGH_ENTROPY, stats.entropy <= LOW_ENTROPY
        terms = {
            "tokens": torch.ones_like(nll),
            "nll": nll,
            "conflicts": conflict,
            "conflict_nll": nll * conflict,
            "weights": losses.weights,
            "kl": torch.zeros_like(nll) if losses.kl is None else losses.kl,
            "high_tokens": high,
            "high_nll": nll * high,
            "low_tokens": low,
            "low_nll": nll * low,
            "replayed": nll.new_zeros(0) if replay_kl is None else torch.ones_like(replay_kl),
            "replay_kl": nll.new_zeros(0) if replay_kl is None else replay_kl,
        }
        return cls(**{name: term.float().sum() for name, term in terms.items()})

    def __add__(self, other: TokenSums) -> TokenSums:
        """Return the sums over the tokens of both."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return TokenSums(*(a + b for a, b in pairs))

    def means(self, accelerator: Any) -> TokenMeans:
        """Return the means over the tokens of all ranks; every rank must call it."""
        reduced = accelerator.reduce(torch.stack(astuple(self)), "sum").tolist()
        total = dict(zip((field.name for field in fields(self)), reduced, strict=True))
        tokens = max(total["tokens"], 1)
        high, low = total["high_tokens"], total["low_tokens"]
        return TokenMeans(
            tokens=int(total["tokens"]),
            nll=total["nll"] / tokens,
            conflict_share=total["conflicts"] / tokens,
            conflict_nll_share=total["conflict_nll"] / total["nll"] if total["nll"] > 0 else 0.0,
            nll_high_entropy=total["high_nll"] / high if high else None,
            nll_low_entropy=total["low_nll"] / low if low else None,
            mean_gate=total["weights"] / tokens,
            kl=total["kl"] / tokens,
            replay_kl=total["replay_kl"] / total["replayed"] if total["replayed"] else None,
        )


@dataclass(frozen=True)
class TokenMeans:
    """Means over labelled tokens, by the names under which they are logged; 0 without a token."""

    tokens: int  # how many there are; not logged
    nll: float  # nats
    conflict_share: float  # of the tokens
    conflict_nll_share: float  # of the nll
    nll_high_entropy: float | None  # nats; None without such a token
    nll_low_entropy: float | None  # nats; None without such a token
    mean_gate: float
    kl: float  # nats
    replay_kl: float | None  # nats a replayed token; None without such a token

    def logged(self, *extra: str) -> dict[str, float]:
        """Return what is logged in training and evaluation alike, and the means named `extra`."""
        names = ("nll", "conflict_share", "conflict_nll_share", *extra)
        groups = ("nll_high_entropy", "nll_low_entropy", "replay_kl")
        values = {name: getattr(self, name) for name in (*names, *groups)}
        return {name: value for name, value in values.items() if value is not None}
