"""
NVIDIA NeMo AutoModel: the gated loss as its recipes' `loss_fn`, by YAML.

    loss_fn:
      _target_: eaft.integrations.nemo_automodel.GatedCrossEntropy
      gate: eaft

Labels come already shifted, and a loss is divided by `num_label_tokens`, those of the whole step.
In validation the recipe takes no gradients, and both classes return the plain nll, so that
`val_loss` can be compared across gates.
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
    What both losses take.

    Args:
        gate: as the flag of `eaft train`.
        fields: `gate_alpha`, `gate_entropy`, `gate_top_k` and `gate_kwargs`, as the flags too
            (`eaft.training.gate_fields.GateFields`).

    Raises:
        ConfigurationError: unknown gate or parameter, or a gate that needs the base model.
    """

    of_host: ClassVar[dict[str, Any]] = {}  # what the host's class is made with

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

    The recipe gives hidden states to a `LinearCrossEntropy`. Where a model cannot return them, it
    quietly puts plain cross-entropy in the place of most such losses, but stops with a message for
    `ChunkedCrossEntropy`, which this is therefore made of. It also checks the head, and gathers it
    where FSDP has sharded it.
    """

    of_host: ClassVar = {"compile": False}
    logit_scale = 1.0
    softcap: float | None = None

    def validate_lm_head(self, lm_head: Any, *, model_config: Any = None) -> Any:
        """
        Have the head checked, and note what the model does to its logits, which the host's loss
        refuses.
        """
        if model_config is not None:
            text_config = model_config.get_text_config()
            self.logit_scale, self.softcap = logit_scale(text_config), softcap(text_config)
        try:
            return super().validate_lm_head(lm_head)
        except (
            ValueError
        ) as error:  # it names a class that the user did not, and a plain loss as the way out
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
        Return the loss of hidden states `[B, S, H]` (`[1, N, H]` for packed labels `[N]`); a sum
        without a count.
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

    It is a `MaskedCrossEntropy`, because in the place of others the recipe may put a plain one.
    """

    def forward(
        self, logits: Tensor, labels: Tensor, num_label_tokens: int | None = None
    ) -> Tensor:
        """Return the loss of logits `[B, S, V]`; a sum without a count."""
        if isinstance(logits, DTensor):  # as the host's own does under tensor parallelism
            logits = logits.full_tensor()
        return gated_cross_entropy(
            logits.reshape(*labels.shape, -1),
            labels.to(logits.device),
            gate=self.current_gate(),
            num_items=1 if num_label_tokens is None else num_label_tokens,
            ignore_index=self.ignore_index,
        )
