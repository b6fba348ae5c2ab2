"""The gated cross-entropy, L = sum_t g_t * nll_t / N: the readable reference every faster path must equal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eaft.gates import Gate, check_gate, gate_weights
from eaft.statistics import token_statistics


def gated_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    gate: str | Gate = "eaft",
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    top_k: int = 20,
    **gate_params: float,
) -> Tensor:
    """
    Cross-entropy in which each token counts by its gate (arXiv:2601.02151).

    Args:
        logits: `[N, V]` (or `[..., V]`), any floating dtype; computed in at least float32.
        labels: `[N]` (or `[...]`) int64, already shifted; positions equal to `ignore_index` do not count.
        gate: name of a registered gate, or a function of `TokenStatistics`.
        num_items: what to divide the weighted sum by, for accumulated batches. Default: the number of labelled tokens
            (not the sum of the gates).
        ignore_index: label of positions without a loss.
        top_k: K of the top-K entropy.
        gate_params: what the gate takes, e.g. `alpha=2.0` for `eaft`.

    Returns:
        Scalar in nats per token, float32 (float64 for float64 logits). Without a labelled token it is a zero that is
        connected to the graph, with zero gradients.

    Raises:
        ConfigurationError: unknown gate, or a parameter it does not take.
    """
    labelled = labels != ignore_index
    stats = token_statistics(logits[labelled], labels[labelled], top_k)
    loss = (gate_weights(gate, stats, **gate_params) * stats.nll).sum()
    num_items = labelled.sum() if num_items is None else torch.as_tensor(num_items, device=loss.device)
    return loss / num_items.clamp(min=1)


@dataclass
class GatedLoss:
    """
    The gated cross-entropy as the `compute_loss_func` of transformers' `Trainer`, for those who do not use TRL.

        Trainer(..., compute_loss_func=GatedLoss("eaft"))

    It shifts the labels, honours `num_items_in_batch`, and is the plain nll when no gradient is asked for, so that
    `eval_loss` can be compared across gates. It needs the full logits; `EAFTTrainer` does not.

    Args:
        gate: name of a registered gate, or a function of `TokenStatistics`.
        top_k: K of the top-K entropy.
        params: what the gate takes, e.g. `{"alpha": 2.0}`.
    """

    gate: str | Gate = "eaft"
    top_k: int = 20
    params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_gate(self.gate, self.params)

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        """Return the loss of a causal model's `outputs.logits` `[B, S, V]` on unshifted `labels` `[B, S]`."""
        logits, labels = outputs.logits[..., :-1, :], labels[..., 1:].to(outputs.logits.device)
        if not logits.requires_grad:
            return gated_cross_entropy(logits, labels, "sft", num_items_in_batch, top_k=self.top_k)
        return gated_cross_entropy(logits, labels, self.gate, num_items_in_batch, top_k=self.top_k, **self.params)
