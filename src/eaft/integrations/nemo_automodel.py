"""
NVIDIA NeMo AutoModel: the gated loss as its recipes' `loss_fn`, by YAML.

    loss_fn:
      _target_: eaft.integrations.nemo_automodel.GatedCrossEntropy
      gate: eaft

Labels are shifted already, and a loss is divided by `num_label_tokens`, the labels of the whole
step. In validation, without gradients, both classes return the plain nll, so that `val_loss` can be
compared across gates.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from nemo_automodel.components.loss.chunked_ce import ChunkedCrossEntropy
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from torch import Tensor
from torch.distributed.tensor import DTensor

from eaft.errors import ConfigurationError
from eaft.objective.fused import linear_gated_cross_entropy
from eaft.objective.gate_spec import BoundGate
from eaft.objective.loss import gated_cross_entropy
from eaft.training.gate_fields import GateFields
from eaft.training.head import logit_scale, softcap


class Gated:
    """
    The gate of both losses.

    Args:
        gate: as the flag of `eaft train`.
        fields: `gate_alpha`, `gate_entropy`, `gate_top_k` and `gate_kwargs`, as the flags too
            (`eaft.training.gate_fields.GateFields`).

    Raises:
        ConfigurationError: unknown gate or parameter, or a gate that needs the base model.
    """

    of_host: ClassVar[dict[str, Any]] = {}  # arguments of the host's class

    def __init__(self, gate: str = "eaft", **fields: Any) -> None:
        super().__init__(**self.of_host)
        self.gate = GateFields(gate, **fields).gate_spec.bind_alone()
        self.plain = self.gate.plain()

    def current_gate(self) -> BoundGate:
        """Return the gate in training, and the plain one in validation."""
        return self.gate if torch.is_grad_enabled() else self.plain


class GatedCrossEntropy(Gated, ChunkedCrossEntropy):
    """
    The loss from hidden states and the head's weight, without logits
    (`eaft.linear_gated_cross_entropy`).

    The recipe gives hidden states to a `LinearCrossEntropy`. If a model cannot return them, the
    recipe silently replaces most such losses by plain cross-entropy. It stops with a message for a
    `ChunkedCrossEntropy`, so this class is a subclass of that. The host's class also checks the
    head, and gathers it if FSDP has sharded it.
    """

    of_host: ClassVar = {"compile": False}
    logit_scale = 1.0
    softcap: float | None = None

    def validate_lm_head(self, lm_head: Any, *, model_config: Any = None) -> Any:
        """
        Check the head, and keep the scale and cap of the model's logits, which the host's loss
        would refuse.
        """
        if model_config is not None:
            text_config = model_config.get_text_config()
            self.logit_scale, self.softcap = logit_scale(text_config), softcap(text_config)
        try:
            return super().validate_lm_head(lm_head)
        # The host's message names a class that the user did not, and advises a plain loss
        except ValueError as error:
            raise ConfigurationError(
                "loss_fn: GatedCrossEntropy needs a plain head, without bias or LoRA"
                f" ({type(lm_head).__name__}): take"
                " eaft.integrations.nemo_automodel.GatedCrossEntropyFromLogits."
            ) from error

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        lm_weight: Tensor,
        num_label_tokens: int | None = None,
        grad_reduce_group: Any = None,
        *,
        logits_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """
        Return the loss from hidden states `[B, S, H]` (`[1, N, H]` for packed labels `[N]`).
        Without `num_label_tokens` it is a sum.
        """
        weight = self.materialize_lm_weight(lm_weight, grad_reduce_group=grad_reduce_group)
        return linear_gated_cross_entropy(
            hidden_states.reshape(*labels.shape, -1).to(weight.dtype),
            weight,
            labels.to(hidden_states.device),
            gate=self.current_gate(),
            num_items=1 if num_label_tokens is None else num_label_tokens,
            ignore_index=self.ignore_index,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
        )


class GatedCrossEntropyFromLogits(Gated, MaskedCrossEntropy):
    """
    The loss from logits (`eaft.gated_cross_entropy`), for models and layouts that
    `GatedCrossEntropy` refuses.

    It is a `MaskedCrossEntropy`, because the recipe may replace other losses by a plain one.
    """

    def forward(
        self, logits: Tensor, labels: Tensor, num_label_tokens: int | None = None
    ) -> Tensor:
        """Return the loss from logits `[B, S, V]`. Without `num_label_tokens` it is a sum."""
        if isinstance(logits, DTensor):  # under tensor parallelism, as in the host's own loss
            logits = logits.full_tensor()
        return gated_cross_entropy(
            logits.reshape(*labels.shape, -1),
            labels.to(logits.device),
            gate=self.current_gate(),
            num_items=1 if num_label_tokens is None else num_label_tokens,
            ignore_index=self.ignore_index,
        )
