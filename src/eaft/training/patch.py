"""
The gated loss for any trainer or loop that asks the model for its loss, without full logits.

`patch_model` makes the model return the gated loss. `GateCallback` does the same in a trainer that
takes callbacks of transformers.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import accelerate.utils
import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, TrainerCallback
from transformers.modeling_outputs import CausalLMOutputWithPast

from eaft.errors import ConfigurationError
from eaft.objective.gate_spec import BoundGate, GateSpec, bind_gate, refuse_base_model
from eaft.objective.registry import GateLike
from eaft.training.head import GatedLMHead
from eaft.training.logits_check import check_logits


def patch_model(
    model: Any, gate: GateLike | BoundGate = "eaft", top_k: int = 20, **params: Any
) -> GatedLMHead:
    """
    Make a causal model return the gated loss, for trainers other than `EAFTTrainer`.

        patch_model(model, gate="eaft")
        Trainer(model, ...).train()

    In training mode `model(..., labels=labels)` returns the gated cross-entropy (arXiv:2601.02151)
    as `loss`, divided by `num_items_in_batch` if that is given, else by the number of labelled
    tokens. It returns no logits, because they never exist as a whole. In evaluation mode the
    forward is the model's own, with the plain nll and logits, so that `eval_loss` can be compared
    across gates. On the first batch, the loss of a few tokens is compared with the loss from the
    model's own logits. Each row counts as one example (`talr`), also a row of packed sequences.

    Args:
        model: a causal language model, or a `PeftModel` around one. It is changed in place. Call
            this before the model is wrapped (DDP, FSDP).
        gate: name of a registered gate, or a function of `TokenStatistics`; or a `BoundGate`, which
            brings its own K and parameters.
        top_k: K of the top-K entropy.
        params: what the gate takes, e.g. `alpha=2.0` for `eaft`.

    Returns:
        The new head. Its `losses` are the `TokenLosses` of the labelled tokens of the last batch.

    Raises:
        ConfigurationError: unknown gate or parameter, a gate that needs the base model beside the
            trained one, or a model that is patched already. In training: labels cut to
            `logits_to_keep`. In the first forward, on every rank: the model's logits differ from
            the logits that the head computes.
    """
    bound = refuse_base_model(bind_gate(gate, params, top_k))
    base: Any = model.get_base_model() if is_peft_model(model) else model
    if hasattr(base.forward, "gate"):
        raise ConfigurationError(
            f"gate={bound.label}: the model is patched already, with gate={base.forward.gate}."
        )
    head = GatedLMHead(base, bound)
    with_head, checked = base.forward.__func__, False
    names = list(inspect.signature(type(base).forward).parameters)[1:]

    @functools.wraps(type(base).forward)  # trainers look at its signature
    def forward(
        base: PreTrainedModel, *args: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        nonlocal checked
        kwargs |= zip(names, args, strict=False)
        if kwargs.get("labels") is None or not base.training:
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return with_head(base, **kwargs)
        kwargs.pop("return_dict", None)  # the outputs are read by name
        kept = kwargs.pop("logits_to_keep", None)
        if isinstance(kept, torch.Tensor) or kept:  # 0 means all
            raise ConfigurationError(
                "logits_to_keep: labels cut to some logits do not go with a loss that keeps none:"
                " switch it off (in ms-swift: --use_logits_to_keep false)."
            )
        if not checked:
            gather = accelerate.utils.gather if several_processes() else torch.clone
            inner = functools.partial(with_head, base, check_logits=True)
            check_logits(base, kwargs, gather, forward=inner)
            checked = True
        output = with_head(
            base, fused_lm_head=True, num_items_in_batch=num_items_in_batch, **kwargs
        )
        return CausalLMOutputWithPast(loss=output.loss)

    forward.gate = bound.label  # type: ignore[attr-defined]
    base.forward = types.MethodType(forward, base)
    return head


def several_processes() -> bool:
    """Return whether this is one process of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class GateCallback(TrainerCallback):
    """
    `patch_model` as a callback, for any trainer built on transformers' `Trainer` (LLaMA-Factory,
    ms-swift, ...).

    The model is patched at the end of the trainer's constructor, before it is wrapped.

    Args:
        gate: as the flag of `eaft train`, and so are the others; or a function of
            `TokenStatistics`.
        gate_alpha: exponent of the `eaft` gate.
        gate_entropy: `top-k` or `exact`.
        gate_top_k: K of the top-K entropy.
        gate_kwargs: the other parameters of the gate.

    Raises:
        ConfigurationError: as in `patch_model`; with Liger's fused loss or nn.DataParallel, which
            bypass our loss; if the callback is added, or the model is made, after the trainer's
            constructor; and after the first step, if the trainer did not ask the model for its loss
            but computed a loss of its own.
    """

    head: GatedLMHead | None = None
    base: Any = None

    def __init__(
        self,
        gate: GateLike = "eaft",
        gate_alpha: float = 1.0,
        gate_entropy: str = "top-k",
        gate_top_k: int = 20,
        gate_kwargs: dict[str, Any] | None = None,
    ) -> None:
        spec = GateSpec(gate, gate_alpha, gate_entropy, gate_top_k, gate_kwargs or {})
        # Checked now: trainers make callbacks before they load a model
        self.gate = spec.bind_alone()

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """
        Patch the model. Refuse set-ups in which another forward would replace ours later.
        """
        liger = getattr(args, "use_liger_kernel", False)
        if liger and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
            raise ConfigurationError(
                "use_liger_kernel puts Liger's plain cross-entropy in the model's place when"
                " training begins: set liger_kernel_config={'fused_linear_cross_entropy': False}."
            )
        if getattr(args, "n_gpu", 1) > 1:
            raise ConfigurationError(
                "Several GPUs in one process (nn.DataParallel): start one process a GPU, by"
                " torchrun."
            )
        self.head = patch_model(model, self.gate)
        self.base = model.get_base_model() if is_peft_model(model) else model

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Check that the model that will be trained is the model that was patched."""
        if self.head is None:
            raise ConfigurationError(
                "GateCallback came too late: give it to the trainer's constructor."
            )
        if not any(module is self.base for module in model.modules()):
            raise ConfigurationError(
                "GateCallback: the model was made after the trainer (model_init): give it a model."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the trainer used our loss."""
        if not hasattr(self.head, "losses"):  # annotated only, until the first batch
            raise ConfigurationError(
                f"gate={self.gate.label} had no effect: the trainer computes a loss of its own and"
                " does not ask the model for it. Switch that off (compute_loss_func,"
                " label_smoothing_factor, loss_type, use_dft_loss, ...)."
            )
