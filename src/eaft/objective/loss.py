"""
The gated cross-entropy, L = sum_t g_t * nll_t / N: the readable specification of every faster path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eaft.errors import ConfigurationError
from eaft.objective.gate_spec import BoundGate, bind_gate
from eaft.objective.registry import Anchor, GateLike
from eaft.objective.statistics import TokenContext, TokenStatistics, token_statistics


def gated_nll(nll: Tensor, weights: Tensor) -> Tensor:
    """Return each token's g_t * nll_t."""
    # A weight of 0 also removes a label with probability 0, whose nll is infinite. A NaN stays
    return torch.where((weights == 0) & ~nll.isnan(), 0.0, weights * nll)


def loss_terms(
    stats: TokenStatistics, weights: Tensor, kl: Tensor | None = None, anchor: Anchor | None = None
) -> Tensor:
    """Return each token's term of the loss, g_t * nll_t (+ coef * KL_t), in nats."""
    terms = gated_nll(stats.nll, weights)
    return terms if kl is None or anchor is None else terms + anchor.coef * kl


def example_ids_by_row(labels: Tensor) -> Tensor:
    """
    Return the default example of each token: its row for labels `[B, S]`, one example for `[N]`.
    """
    rows = (
        torch.arange(len(labels), device=labels.device) if labels.ndim > 1 else labels.new_zeros(1)
    )
    return rows.reshape(-1, *[1] * (labels.ndim - 1)).expand(labels.shape)


def gated_cross_entropy(
    logits: Tensor,  # (..., vocab_size), any floating dtype
    labels: Tensor,  # (...), int64, already shifted
    gate: GateLike | BoundGate = "eaft",
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    top_k: int = 20,
    *,
    example_ids: Tensor | None = None,  # (...), int64
    example_nll: Tensor | None = None,  # (...), nats
    old_log_prob: Tensor | None = None,  # (...), nats
    reference_logits: Tensor | None = None,  # (..., vocab_size)
    **params: Any,
) -> Tensor:
    """
    Cross-entropy with a gate on each token (arXiv:2601.02151).

    Args:
        logits: computed in at least float32.
        labels: positions equal to `ignore_index` do not count.
        gate: name of a registered gate, or a function of `TokenStatistics`; or a `BoundGate`, which
            brings its own K and parameters.
        num_items: the divisor of the weighted sum, for accumulated batches. Default: the number of
            labelled tokens (not the sum of the gates).
        ignore_index: label of positions without a loss.
        top_k: K of the top-K entropy.
        example_ids: which example each token is from (`talr`). Default: the row of `[B, S]` labels;
            one example for `[N]`.
        example_nll: the base model's mean nll of each token's example (`flow`).
        old_log_prob: the base model's ln P(label) (`psft`, `stm`).
        reference_logits: the base model's logits, without gradient (`sft-kl`, `asft`,
            `tmkl`).
        params: what the gate takes, e.g. `alpha=2.0` for `eaft`.

    Returns:
        Scalar in nats per token, float32 (float64 for float64 logits). Without a labelled token it
        is 0 and still connected to the graph, with zero gradients.

    Raises:
        ConfigurationError: the gate is unknown, does not take or refuses a parameter, or needs an
            argument that is missing.
    """
    bound = bind_gate(gate, params, top_k)
    anchor = bound.anchor
    labelled = labels != ignore_index
    if example_ids is None:
        example_ids = example_ids_by_row(labels)
    # Cast once, so that the gradients of both terms are added in float32
    logits = logits[labelled].to(torch.promote_types(logits.dtype, torch.float32))
    stats = token_statistics(logits, labels[labelled], bound.top_k, ranked=bound.needs_rank)
    context = TokenContext(example_ids, example_nll, old_log_prob)
    stats = context.select(lambda x: x[labelled]).add_to(stats)
    kl = None
    if anchor is not None:
        if reference_logits is None:
            raise ConfigurationError(
                f"gate={bound.label} needs reference_logits, the base model's."
            )
        reference = reference_logits[labelled].detach().to(logits.dtype)
        kl = anchor.kl(
            anchor.compared(logits, labels[labelled]).log_softmax(-1),
            anchor.compared(reference, labels[labelled]).log_softmax(-1),
        )
    loss = loss_terms(stats, bound.weights(stats), kl, anchor).sum()
    num_items = (
        labelled.sum() if num_items is None else torch.as_tensor(num_items, device=loss.device)
    )
    return loss / num_items.clamp(min=1)
