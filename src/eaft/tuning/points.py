"""A member of a run's family, and what was measured of it: held-out nll and drift, item by item."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, order=True)
class Member:
    """
    A model of the family: base + share * (checkpoint - base).

    Attributes:
        step: of the checkpoint.
        share: in [0, 1]; 1 is the checkpoint as it is.
    """

    step: int
    share: float


@dataclass(frozen=True)
class Sums:
    """
    A quantity summed over the tokens of each item (row or prompt), in nats.

    Attributes:
        sums: float64 `[items]`.
        counts: tokens `[items]`.
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def mean(self) -> float:
        """Nats per token, over all tokens."""
        return float(self.sums.sum() / self.counts.sum())


@dataclass(frozen=True)
class Point:
    """
    What was measured of one model.

    Attributes:
        nll: of held-out rows.
        drift: KL(base || model) on the base model's answers.
    """

    member: Member
    nll: Sums
    drift: Sums
