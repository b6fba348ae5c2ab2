"""
What is found of a chunk of tokens, whichever backend finds it.

`torch_backend` and `triton_backend` have the same three doors, on a chunk's projection (`hidden @ weight.T + bias`):

    score(projection, labels, top_k, transform) -> Scores
    diverge(projection, reference_projection, scores, direction, transform) -> Divergence
    gradient_(projection, labels, weights, scores, transform, divergence, kl_coef) -> its gradient, in its memory
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from eaft.objective.statistics import TokenStatistics


@dataclass(frozen=True)
class LogitTransform:
    """What makes logits of a projection: softcap * tanh(logit_scale * x / softcap); without the tanh for None."""

    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Scores:
    """What one read of a chunk's logits `[n, V]` tells; ln P(v) = logit_v - top - log_total."""

    statistics: TokenStatistics  # fields `[n]`
    top: Tensor  # [n] float32 (float64 of float64 logits): the largest logit
    log_total: Tensor  # [n] the same dtype: ln sum_v exp(logit_v - top)


@dataclass(frozen=True)
class Divergence:
    """The divergence between policy and reference at each token of a chunk, and what its gradient needs."""

    kl: Tensor  # [n], nats
    reference_projection: Tensor  # [n, V]
    reference_top: Tensor  # [n]
    reference_log_total: Tensor  # [n]
    direction: str  # "forward": KL(reference || policy); "reverse": KL(policy || reference)
