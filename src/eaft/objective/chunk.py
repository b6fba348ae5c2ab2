"""
What is found of a chunk of tokens, and the doors by which both backends of the fused loss find it.

A chunk's projection is `hidden @ weight.T + bias`, `[n, V]`; its logits are what `LogitTransform`
makes of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from eaft.objective.registry import Anchor
from eaft.objective.statistics import TokenStatistics


@dataclass(frozen=True)
class LogitTransform:
    """
    What makes logits of a projection: softcap * tanh(logit_scale * x / softcap); without the tanh
    for None.
    """

    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Head:
    """The LM head: hidden states @ weight.T + bias, and what makes logits of that."""

    weight: Tensor  # (vocab_size, hidden_size)
    bias: Tensor | None = None  # (vocab_size,)
    transform: LogitTransform = LogitTransform()


class Scores(Protocol):
    """
    What `score` returns: the statistics, and whatever the same backend's other doors need of the
    logits.
    """

    @property
    def statistics(self) -> TokenStatistics:
        """Each token's, with fields `[n]`."""


class Divergence(Protocol):
    """
    What `diverge` returns: the divergence, and whatever the same backend's `gradient_` needs of it.
    """

    @property
    def kl(self) -> Tensor:
        """The divergence between policy and reference at each token, `[n]`, in nats."""


class Backend(Protocol):
    """How a chunk is scored and differentiated; see `torch_backend` and `triton_backend`."""

    def block_rows(self, projection: Tensor) -> int:
        """Return how many rows of a projection the other doors take at a time."""

    def score(
        self,
        projection: Tensor,
        labels: Tensor,
        top_k: int,
        transform: LogitTransform,
        ranked: bool = False,
    ) -> Any:
        """
        Return the `Scores` of a projection `[n, V]` with labels `[n]`, all in `[0, V)`; it stays as
        it is.

        With `ranked` also the first choice, its probability and the label's rank, at no further
        read of main memory.
        """

    def diverge(
        self,
        projection: Tensor,
        reference_projection: Tensor,
        scores: Any,
        anchor: Anchor,
        transform: LogitTransform,
    ) -> Any:
        """Return the `Divergence` from the reference's projection `[n, V]`."""

    def gradient_(
        self,
        projection: Tensor,
        labels: Tensor,
        weights: Tensor,
        scores: Any,
        transform: LogitTransform,
        divergence: Any = None,
        kl_coef: float = 0.0,
    ) -> Tensor:
        """
        Return the gradient of sum_t weights_t nll_t + kl_coef KL_t by the projection, in the
        projection's memory.
        """
