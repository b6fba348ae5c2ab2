"""
torchtitan: the gated loss as the `loss` of a config, for one chunk of logits at a time.

    config.loss = ChunkedLossWrapper.Config(loss_fn=GatedCrossEntropy.Config(gate="eaft"))

Labels are shifted already, and the host divides a loss by the valid tokens of the whole step. In
validation, without gradients, the loss is the plain nll, so that runs can be compared across gates.
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
from eaft.objective.gate_spec import spec_of
from eaft.objective.loss import gated_cross_entropy
from eaft.training.gate_fields import GateFields


class GatedCrossEntropy(BaseLoss):
    """
    The gated cross-entropy (`eaft.gated_cross_entropy`) of logits `[B, S, V]`, alone or in a
    `ChunkedLossWrapper`.

    It is not compiled. It needs the whole vocabulary; with tensor parallelism each rank has only a
    part.

    Raises:
        ConfigurationError: unknown gate or parameter; a gate that needs the base model; a gate
            whose weights depend on other tokens, because a chunk does not have them all; logits of
            a part of the vocabulary.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(GateFields, BaseLoss.Config):
        """The gate, by the flags of `eaft train`; see `GateFields`."""

        gate_kwargs: dict[str, Any] = field(default_factory=dict)  # as the host's flags can be

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.gate = spec_of(config).bind_alone()
        self.plain = self.gate.plain()
        if not self.gate.per_token:
            raise ConfigurationError(
                f"gate={self.gate.label} weighs tokens by others, and a chunk has only some:"
                " take another gate."
            )
        self.fn = self.sum_of_terms

    def sum_of_terms(self, pred: Tensor, labels: Tensor) -> Tensor:
        """Return the sum over labelled tokens, which the host divides."""
        if isinstance(pred, DTensor) or spmd_mesh_size("tp") > 1:
            raise ConfigurationError(
                "GatedCrossEntropy needs logits of the whole vocabulary: no tensor parallelism (its"
                " degree: 1)."
            )
        return gated_cross_entropy(
            pred,
            labels,
            gate=self.gate if torch.is_grad_enabled() else self.plain,
            num_items=1,
            ignore_index=IGNORE_INDEX,
        )
