"""
The gated LM head: the loss inside the model's forward, on labelled positions only, without full logits.

TRL gives the model a fused head (`trl.trainer.utils.add_fused_lm_head`): `model(..., fused_lm_head=True)` returns
per-token log-probabilities. We put ours in its place, with the same call and the same output, because TRL's knows no
top-K entropy. It runs inside the forward so that DDP, FSDP2 and ZeRO-3 see it and reduce its gradients.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from eaft.gates import gate_weights
from eaft.statistics import TokenStatistics, token_statistics

# Logits alive at a time, in elements: 128 MiB of them in float32, and a few temporaries of that size
LOGITS_PER_CHUNK = 2**25


def logit_scale(text_config: Any) -> float:
    """Return what the architecture multiplies its logits by: each family has its own name for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (scale := getattr(text_config, name, None)) is not None:
            return scale
    scaling = getattr(text_config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
    return scaling if text_config.model_type == "hyperclovax" else 1 / scaling


def full_parameter(parameter: Tensor | None) -> Tensor | None:
    """
    Gather a parameter that FSDP2 or tensor parallelism left sharded.

    Data-parallel ranks hold different gradients of it, which FSDP2 averages; tensor-parallel ranks hold the same one.
    Averaging over the mesh is right for both.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


class GatedLMHead:
    """
    Patches `model` so that `model(..., labels=labels, fused_lm_head=True)` returns the gated log-probabilities.

    The output is TRL's `FusedCausalLMOutput`, 1-D over the labelled tokens. In training mode its `log_probs` are
    g_t * ln p_t, the terms of the loss; in evaluation mode they are plain ln p_t, so that `eval_loss` is the nll
    whatever the gate. Calls without `fused_lm_head=True` go to the model's own forward.

    Args:
        model: a causal language model, not wrapped by PEFT (pass `peft_model.get_base_model()`).
        gate: name of a registered gate.
        top_k: K of the top-K entropy.
        params: what the gate takes, e.g. `{"alpha": 1.0}`.

    Attributes:
        statistics: `TokenStatistics` of the last call's labelled tokens, detached.
        weights: their gate weights, also in evaluation mode, where the gate is not applied.
    """

    statistics: TokenStatistics
    weights: Tensor

    def __init__(self, model: PreTrainedModel, gate: str, top_k: int, params: dict[str, float]) -> None:
        self.gate, self.top_k, self.params = gate, top_k, params
        text_config = model.config.get_text_config()
        self.text_config = text_config
        self.logit_scale = logit_scale(text_config)
        self.softcap: float | None = getattr(text_config, "final_logit_softcapping", None)
        original_forward = model.forward

        # `generate` validates its keyword arguments against the model's own signature
        @functools.wraps(type(model).forward)
        def forward(model: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            return self(model, *args, **kwargs) if fused_lm_head else original_forward(*args, **kwargs)

        model.forward = types.MethodType(forward, model)

    def __call__(
        self,
        model: PreTrainedModel,
        *args: Any,
        labels: Any = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> FusedCausalLMOutput:
        """Run the backbone and score the labels `[B, S]`, or `shift_labels` (context parallelism) as they stand."""
        kwargs["use_cache"] = False
        if getattr(self.text_config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        # Looked up on each call: FSDP and PEFT replace the backbone and the head after patching
        backbone = model.base_model(*args, **kwargs)
        lm_head = model.get_output_embeddings()
        hidden = backbone.last_hidden_state
        if shift_labels is None:
            hidden, labels = hidden[:, :-1], labels[:, 1:]
        else:
            labels = shift_labels
        # With `device_map`, the backbone can end on another device than the head
        hidden, labels = hidden.to(lm_head.weight.device), labels.to(lm_head.weight.device)
        labelled = labels != -100
        stats = self.score(hidden[labelled], labels[labelled], lm_head)

        self.statistics = stats.detach()
        self.weights = gate_weights(self.gate, stats, **self.params)
        log_probs = self.weights * stats.log_prob if model.training else stats.log_prob
        num_items = labelled.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = -log_probs.sum() / num_items.clamp(min=1)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            config = self.text_config
            aux_loss = load_balancing_loss_func(
                backbone.router_logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask")
            )
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(
            loss=loss,
            log_probs=log_probs,
            entropy=stats.entropy,
            is_top1=stats.is_top1,
            label_mask=labelled,
            aux_loss=aux_loss,
        )

    def score(self, hidden: Tensor, labels: Tensor, lm_head: Any) -> TokenStatistics:
        """Return the statistics of `labels` `[N]` from `hidden` `[N, H]`; backward recomputes each chunk's logits."""
        weight, bias = full_parameter(lm_head.weight), full_parameter(lm_head.bias)

        def score_chunk(hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> TokenStatistics:
            # Entered again in the recomputation, when ZeRO-3 has partitioned the weight anew
            with maybe_gather_lm_head_ctx(weight, bias):
                logits = nn.functional.linear(hidden, weight.to(hidden.dtype), bias)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.logit_scale
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            return token_statistics(logits, labels, self.top_k)

        chunk = max(1, LOGITS_PER_CHUNK // self.text_config.vocab_size)
        with maybe_gather_lm_head_ctx(weight, bias):
            return TokenStatistics.cat(
                [
                    checkpoint(score_chunk, *tokens, weight, bias, use_reentrant=False, preserve_rng_state=False)
                    # `split` gives one empty chunk for no tokens: a zero still connected to the head
                    for tokens in zip(hidden.split(chunk), labels.split(chunk), strict=True)
                ]
            )
