"""
torchtitan: the gated loss as a config's `loss`, on one chunk of logits at a time.

    config.loss = ChunkedLossWrapper.Config(loss_fn=GatedCrossEntropy.Config(gate="eaft"))

Labels come already shifted, and a loss is divided by the valid tokens of the whole step. The
validator takes no gradients, and gets the plain nll, so that runs can be compared across gates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss
from torchtitan.distributed.spmd_types import spmd_mesh_size

from eaft.errors import ConfigurationError
from eaft.objective.gate_flags import gate_of_flags
from eaft.objective.loss import gated_cross_entropy
from eaft.objective.registry import is_per_token


class GatedCrossEntropy(BaseLoss):
    """
    The gated cross-entropy (`eaft.gated_cross_entropy`) of logits `[B, S, V]`, alone or in a
    `ChunkedLossWrapper`.

    It is not compiled, and takes the whole vocabulary: with tensor parallelism each rank has a part
    of it.

    Raises:
        ConfigurationError: unknown gate or parameter; a gate that needs the base model, or whose
            weights depend on other tokens, of which a chunk has some only; logits of a part of the
            vocabulary.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """The gate, by the flags of `eaft train`."""

        gate: str = "eaft"
        """A gate's name, or module:function."""

        gate_alpha: float = 1.0
        """Exponent of the eaft gate."""

        gate_entropy: str = "top-k"
        """top-k or exact."""

        gate_top_k: int = 20
        """K of the top-K entropy."""

        gate_kwargs: dict[str, Any] = field(default_factory=dict)
        """The other parameters of the gate."""

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.gate, self.params = gate_of_flags(
            config.gate,
            config.gate_alpha,
            config.gate_entropy,
            config.gate_top_k,
            config.gate_kwargs,
        )
        self.top_k = config.gate_top_k
        if not is_per_token(self.gate, self.params):
            raise ConfigurationError(
                f"gate={config.gate!r} weighs tokens by others, and a chunk has some only: take"
                " another."
            )
        self.fn = self.sum_of_terms

    def sum_of_terms(self, pred: Tensor, labels: Tensor) -> Tensor:
        """Return the sum over labelled tokens, which the host divides."""
        if isinstance(pred, DTensor) or spmd_mesh_size("tp") > 1:
            raise ConfigurationError(
                "GatedCrossEntropy needs logits of the whole vocabulary: no tensor parallelism (its"
                " degree: 1)."
            )
        training = torch.is_grad_enabled()
        return gated_cross_entropy(
            pred,
            labels,
            gate=self.gate if training else "sft",
            num_items=1,
            ignore_index=IGNORE_INDEX,
            top_k=self.top_k,
            **(self.params if training else {}),
        )
