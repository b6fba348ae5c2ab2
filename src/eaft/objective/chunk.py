"""
The interface of both backends of the fused loss: score a chunk of tokens, and differentiate it.

A chunk's projection is `hidden @ weight.T + bias`, `[n, V]`. `LogitTransform` makes logits of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from eaft.objective.registry import Anchor
from eaft.objective.statistics import TokenStatistics
from eaft.objective.vocabulary import WHOLE, Vocabulary


@dataclass(frozen=True)
class LogitTransform:
    """
    How a projection x becomes logits: softcap * tanh(logit_scale * x / softcap), or logit_scale * x
    without a softcap.
    """

    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Head:
    """
    The LM head: hidden @ weight.T + bias, and how that becomes logits. Of a sharded vocabulary it
    has this rank's rows.
    """

    weight: Tensor  # (vocab_size, hidden_size)
    bias: Tensor | None = None  # (vocab_size,)
    transform: LogitTransform = LogitTransform()
    vocabulary: Vocabulary = WHOLE

    def logits(self, hidden: Tensor) -> Tensor:
        """
        Return the logits `[n, V]` of hidden states `[n, H]`, all at once and with their gradient,
        in at least float32.
        """
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        projection = F.linear(hidden, self.weight.to(hidden.dtype), bias)
        logits = projection.to(torch.promote_types(projection.dtype, torch.float32))
        if self.transform.logit_scale != 1.0:
            logits = self.transform.logit_scale * logits
        if (cap := self.transform.softcap) is not None:
            logits = cap * (logits / cap).tanh()
        return logits


class Scores(Protocol):
    """
    The result of `score`: the statistics, and what the backend needs for `diverge` and `gradient_`.
    """

    @property
    def statistics(self) -> TokenStatistics:
        """The statistics of each token, with fields `[n]`."""


class Divergence(Protocol):
    """
    The result of `diverge`: the divergence, and what the backend needs for `gradient_`.
    """

    @property
    def kl(self) -> Tensor:
        """The divergence between policy and reference at each token, `[n]`, in nats."""


class Backend(Protocol):
    """How a chunk is scored and differentiated; see `torch_backend` and `triton_backend`."""

    def block_rows(self, projection: Tensor) -> int:
        """Return how many rows of a projection the other methods take at a time."""

    def score(
        self,
        projection: Tensor,
        labels: Tensor,
        top_k: int,
        transform: LogitTransform,
        ranked: bool = False,
    ) -> Any:
        """
        Return the `Scores` of a projection `[n, V]` with labels `[n]`, each in `[0, V)`. The
        projection is not changed.

        With `ranked` the statistics include the first choice, its probability and the label's rank,
        without another read of main memory.
        """

    def diverge(
        self,
        projection: Tensor,
        reference_projection: Tensor,
        labels: Tensor,
        scores: Any,
        anchor: Anchor,
        transform: LogitTransform,
    ) -> Any:
        """Return the `Divergence` from the reference's projection `[n, V]`, with labels `[n]`."""

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
        Overwrite the projection with the gradient of sum_t weights_t nll_t + kl_coef KL_t by the
        projection, and return it.
        """
