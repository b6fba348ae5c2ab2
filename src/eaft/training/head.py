"""
The gated LM head: the loss inside the model's forward, on labelled positions only, without full
logits.

TRL gives the model a fused head (`trl.trainer.utils.add_fused_lm_head`): `model(...,
fused_lm_head=True)` returns the log-probability of each token. TRL's head has no top-K entropy, so
we replace it by ours, with the same call and the same output. It runs inside the forward, so that
DDP, FSDP2 and ZeRO-3 see it and reduce its gradients. This module does not import TRL, because
other trainers (`patch_model`) may have another version of TRL, or none.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Shard
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput

from eaft.errors import ConfigurationError
from eaft.evaluation.drift import TopProbs
from eaft.objective.chunk import Head, LogitTransform
from eaft.objective.fused import (
    Reference,
    TokenLosses,
    fused_loss,
    linear_token_statistics,
)
from eaft.objective.gate_spec import BoundGate, bind_gate
from eaft.objective.registry import GateLike
from eaft.objective.statistics import TokenContext, TokenStatistics
from eaft.objective.vocabulary import shard_vocabulary
from eaft.training.logits_check import compare_logits
from eaft.training.replay_kl import HeldTokens, hold_tokens


def first_field(owner: Any, *names: str) -> Any:
    """Return the first of these attributes that exists and is not None; else None."""
    return next(
        (value for name in names if (value := getattr(owner, name, None)) is not None), None
    )


def logit_scale(text_config: Any) -> float:
    """
    Return the factor of the architecture's logits; each model family has its own name for it.
    """
    scale = first_field(text_config, "logit_scale", "output_multiplier", "lm_head_multiplier")
    if scale is not None:
        return scale
    # Granite and MiniCPM3 divide by the first, Inkling by the second; HyperCLOVA X multiplies
    scaling = first_field(text_config, "logits_scaling", "logits_mup_width_multiplier")
    if scaling is None:
        return 1.0
    return scaling if text_config.model_type == "hyperclovax" else 1 / scaling


def softcap(text_config: Any) -> float | None:
    """
    Return c of the architecture's c * tanh(logits / c), as in Gemma, RecurrentGemma and xLSTM; None
    if it has no cap.
    """
    return first_field(
        text_config, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"
    )


def full_parameter(parameter: Any) -> Any:
    """
    Gather a parameter that FSDP2 or tensor parallelism has sharded.

    Data-parallel ranks have different gradients, which FSDP2 averages. Tensor-parallel ranks have
    the same gradient. Averaging over the mesh is right for both.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def tensor_parallel_group(weight: Any) -> Any:
    """
    Return the process group over whose ranks tensor parallelism shards the rows of a head's weight;
    None if it does not. FSDP2 shards rows too, but its ranks have different hidden states.
    """
    if not isinstance(weight, DTensor) or weight.placements != (Shard(0),):
        return None
    mesh = weight.device_mesh
    return mesh.get_group() if mesh.mesh_dim_names == ("tp",) else None


def check_head(lm_head: Any) -> None:
    """
    Refuse a head with a PEFT adapter, unless the adapter is merged or switched off.
    """
    if not (getattr(lm_head, "merged", True) or lm_head.disable_adapters):  # of PEFT's layers
        raise ConfigurationError(
            f"The head has an adapter ({type(lm_head).__module__}.{type(lm_head).__name__}), which"
            " the fused loss would ignore and not train: it reads the head's weight alone. Take the"
            " head out of target_modules, or train it whole (modules_to_save=['lm_head'])."
        )


def keep_differentiable(model: Any) -> None:
    """
    Keep 4-bit weights in the layout that has a gradient.

    On some CPUs, after a forward in evaluation mode, bitsandbytes repacks them for good, for a
    product without a backward pass. Then an evaluation, or the forward of a reference model, would
    freeze the adapters.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                module.state_dict()  # unpacks them in place


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """
    Return a copy of `model` that is not trained. Calling it returns the last hidden states `[B, S,
    H]`.
    """
    # A patched forward is bound to the original model
    forward = model.__dict__.pop("forward", None)
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    if forward is not None:
        model.forward = forward
    # Logits are made in chunks elsewhere. The whole copy is called, so that FSDP gathers it
    frozen.forward = types.MethodType(
        lambda frozen, *args, **kwargs: (
            GatedLMHead.backbone(frozen)(*args, **kwargs).last_hidden_state
        ),
        frozen,
    )
    return frozen


def reshard(reference: Any) -> None:
    """
    Free the parameters of a frozen model that FSDP2 has gathered. accelerate frees the last group
    only in a backward pass, and there is none.
    """
    for module in reference.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_partitioned(*parameters: Any) -> contextlib.AbstractContextManager[Any]:
    """
    Return a context in which parameters that ZeRO-3 has partitioned are whole.
    """
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    # Deduplicate by identity: a tied head appears twice, and so does a head that the reference
    # shares with the policy
    partitioned = {
        id(p): p for p in parameters if p is not None and p.ds_status != ZeroParamStatus.AVAILABLE
    }
    return (
        GatheredParameters(list(partitioned.values())) if partitioned else contextlib.nullcontext()
    )


@dataclass
class GatedOutput(ModelOutput):
    """
    The output of a fused head that TRL reads (`trl.trainer.utils.FusedCausalLMOutput`), over the
    labelled tokens.

    Attributes:
        loss: scalar, nats per token; in training mode with the auxiliary loss of a mixture of
            experts.
        log_probs: `[1]`, a sum, because TRL only uses their sum. In training mode it is the sum of
            -(g_t nll_t + coef KL_t), and of -KL_t for replayed tokens that are held by the base's
            distribution. In evaluation mode it is the sum of ln p_t, so that `eval_loss` is the
            plain nll with every gate.
        entropy, is_top1: `[N]`, for each labelled token.
        label_mask: `[B, S]`, which positions are labelled.
        aux_loss: scalar, the auxiliary loss of a mixture of experts.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


class GatedLMHead:
    """
    Patches `model` so that `model(..., labels=labels, fused_lm_head=True)` returns the gated loss,
    as `GatedOutput`.

    `model(..., check_logits=True)` is `eaft.training.logits_check.compare_logits`; other calls go
    to the model's own forward.

    Args:
        model: a causal language model, not wrapped by PEFT (pass `peft_model.get_base_model()`).
        gate: a `BoundGate`, or what `bind_gate` makes one of. If parameters are still missing,
            `gate` must be completed before the first training step.
        reference: for a gate with a KL term: the result of `frozen_copy`, or the `PeftModel` around
            `model`, whose adapters are switched off for the reference's pass.

    Attributes:
        gate: the `BoundGate`.
        plain: the gate in evaluation mode.
        transform: what the architecture does to its logits.
        example_nll: for a gate that needs it, the base model's mean nll of each example, float32
            `[examples]`.
        old_log_prob: for a gate that needs it, the base model's ln P of each token of the data,
            float32 `[tokens]`.
        replay_probs: for `replay_loss='kl'`, the base model's distribution at each label of the
            replayed rows.
        losses: `TokenLosses` of the labelled tokens in the last call (in evaluation mode the
            weights are 1), without the tokens in `held`.
        held: the replayed tokens whose loss was the KL to `replay_probs`, without its gradient;
            None if there were none.
    """

    losses: TokenLosses
    held: HeldTokens | None

    def __init__(
        self,
        model: PreTrainedModel,
        gate: GateLike | BoundGate,
        reference: Any = None,
    ) -> None:
        self.gate = bind_gate(gate)
        self.plain, self.reference = self.gate.plain(), reference
        self.example_nll: Tensor | None = None
        self.old_log_prob: Tensor | None = None
        self.replay_probs: TopProbs | None = None
        text_config = model.config.get_text_config()
        self.text_config = text_config
        self.transform = LogitTransform(logit_scale(text_config), softcap(text_config))
        # Inkling's logits end before the rows that pad its head
        self.vocab_size: int | None = getattr(text_config, "unpadded_vocab_size", None)
        self.original_forward = model.forward
        check_head(model.get_output_embeddings())
        keep_differentiable(model)

        # `generate` checks its keyword arguments against the model's own signature
        @functools.wraps(type(model).forward)
        def forward(
            model: PreTrainedModel,
            *args: Any,
            fused_lm_head: bool = False,
            check_logits: bool = False,
            **kwargs: Any,
        ) -> Any:
            if check_logits:
                return compare_logits(self, model, *args, **kwargs)
            return (
                self(model, *args, **kwargs)
                if fused_lm_head
                else self.own_forward(model, *args, **kwargs)
            )

        model.forward = types.MethodType(forward, model)

    def own_forward(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """
        Call the forward that the model had before. It also works for a deep copy of the model,
        whose methods are bound to the copy.
        """
        function = getattr(self.original_forward, "__func__", None)
        return (
            self.original_forward(*args, **kwargs)
            if function is None
            else function(model, *args, **kwargs)
        )

    def __call__(
        self,
        model: PreTrainedModel,
        *args: Any,
        labels: Any = None,
        shift_labels: Tensor | None = None,
        example_ids: Tensor | None = None,
        token_numbers: Tensor | None = None,
        replay_numbers: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> GatedOutput:
        """
        Run the backbone and score the labels `[B, S]`, or `shift_labels`, which are shifted already
        (context parallelism).

        For gates that need them, `example_ids` `[B, S]` are the examples of the labels, and
        `token_numbers` `[B, S]` are their numbers in the data. `replay_numbers` `[B, S]` are their
        places in `replay_probs`, and -1 outside of replayed rows.
        """
        kwargs["use_cache"] = False
        use_reference = self.gate.anchor is not None and model.training
        reference = self.run_reference(model, *args, **kwargs) if use_reference else None
        if getattr(self.text_config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        # Looked up on each call: FSDP and PEFT replace the backbone and the head after patching
        backbone = self.backbone(model)(*args, **kwargs)
        lm_head = model.get_output_embeddings()
        hidden = backbone.last_hidden_state
        if shift_labels is None:  # labels are moved, not hidden states, which would be copied
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
            example_ids = None if example_ids is None else F.pad(example_ids[:, 1:], (0, 1))
            token_numbers = None if token_numbers is None else F.pad(token_numbers[:, 1:], (0, 1))
            replay_numbers = (
                None if replay_numbers is None else F.pad(replay_numbers[:, 1:], (0, 1))
            )
        # With `device_map`, the backbone can end on another device than the head
        device = lm_head.weight.device
        labels = shift_labels.to(device)
        labelled = labels != -100
        context = self.context(model, labelled, example_ids, token_numbers)
        gated_labels = labels
        if replay_numbers is not None and self.replay_probs is not None and model.training:
            replay_numbers = replay_numbers.to(device).where(labelled, -1)
            gated_labels = labels.masked_fill(replay_numbers >= 0, -100)
        else:
            replay_numbers = None
        reference_head = () if reference is None else (reference.weight, reference.bias)
        # A KL compares whole distributions
        sharded = reference is None and replay_numbers is None
        with self.gathered(lm_head, *reference_head, sharded=sharded) as head:
            if reference is not None:
                reference = Reference(
                    reference.hidden.to(device),
                    self.unpadded(reference.weight),
                    self.unpadded(reference.bias),
                )
            gate = self.gate if model.training else self.plain
            total, self.losses = fused_loss(
                hidden.to(device), head, gated_labels, gate, context, reference, num_items=1
            )
            held = self.hold(hidden.to(device), head, labels, replay_numbers)
        if use_reference and isinstance(self.reference, PreTrainedModel):
            reshard(self.reference)
        entropy, is_top1 = self.losses.statistics.entropy, self.losses.statistics.is_top1
        self.held = None
        if held is not None:
            total = total + held.kl.sum()
            entropy = torch.cat([entropy, held.entropy])
            is_top1 = torch.cat([is_top1, held.is_top1])
            self.held = replace(held, kl=held.kl.detach())
        num_items = (
            labelled.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        )
        loss = total / num_items.clamp(min=1)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            aux_loss = self.aux_loss(model, backbone, kwargs.get("attention_mask")).to(loss.device)
            if model.training:
                loss = loss + getattr(self.text_config, "router_aux_loss_coef", 0.0) * aux_loss
        return GatedOutput(
            loss=loss,
            log_probs=-total.unsqueeze(0),
            entropy=entropy,
            is_top1=is_top1,
            label_mask=labelled,
            aux_loss=aux_loss,
        )

    def hold(
        self,
        hidden: Tensor,  # (batch, positions, hidden_size)
        head: Head,
        labels: Tensor,  # (batch, positions), int64
        replay_numbers: Tensor | None,  # (batch, positions), int64; -1 for the data's own tokens
    ) -> HeldTokens | None:
        """Return the replayed tokens, whose loss is the KL to the base model, if there are any."""
        if replay_numbers is None or self.replay_probs is None:
            return None
        replayed = replay_numbers >= 0
        base = self.replay_probs.select(replay_numbers[replayed].cpu())
        if len(base.ids) == 0:
            return None
        return hold_tokens(hidden[replayed], head, labels[replayed], base)

    def context(
        self,
        model: PreTrainedModel,
        labelled: Tensor,  # (batch, positions), bool
        example_ids: Tensor | None,  # (batch, positions), int64
        token_numbers: Tensor | None,  # (batch, positions), int64
    ) -> TokenContext:
        """Return what the gate needs of each position, looked up by its example and its number."""
        device, example_nll, old_log_prob = labelled.device, None, None
        if example_ids is not None:
            example_ids = example_ids.to(device)
            if self.example_nll is not None:
                example_nll = self.example_nll.to(device)[example_ids.where(labelled, 0)]
        # Outside of training the numbers count the tokens of another data set
        if token_numbers is not None and self.old_log_prob is not None and model.training:
            numbers = token_numbers.to(device).where(labelled, 0)
            old_log_prob = self.old_log_prob.to(device)[numbers]
        return TokenContext(example_ids, example_nll, old_log_prob)

    @torch.no_grad()
    def statistics(self, model: PreTrainedModel, labels: Tensor, **inputs: Any) -> TokenStatistics:
        """
        Return the statistics of the labelled tokens of `labels` `[B, S]`, row by row, with ranks.

        Args:
            model: the model that was patched.
            labels: as for training: the id of a labelled token at its own position, else -100. The
                first position of a row is never a label.
            inputs: the other arguments of the backbone.
        """
        labelled = F.pad(labels[:, 1:], (0, 1), value=-100)
        hidden, lm_head = (
            self.hidden_states(model, labelled != -100, **inputs),
            model.get_output_embeddings(),
        )
        labels = labelled[labelled != -100].to(hidden.device)
        with self.gathered(lm_head, sharded=True) as head:
            return linear_token_statistics(hidden, head, labels, self.gate.top_k)

    @torch.no_grad()
    def logits(self, model: PreTrainedModel, chosen: Tensor, **inputs: Any) -> Tensor:
        """
        Return the logits `[n, V]` (float32) at the positions that are true in `chosen` `[B, S]`.
        """
        hidden = self.hidden_states(model, chosen, **inputs)
        with self.gathered(model.get_output_embeddings()) as head:
            return head.logits(hidden)

    def hidden_states(self, model: PreTrainedModel, chosen: Tensor, **inputs: Any) -> Tensor:
        """
        Return the last hidden states `[n, H]` at the positions that are true in `chosen`, on the
        head's device.
        """
        hidden = self.backbone(model)(**inputs, use_cache=False).last_hidden_state
        # With `device_map`, the backbone can end on another device than the head
        return hidden[chosen.to(hidden.device)].to(model.get_output_embeddings().weight.device)

    @staticmethod
    def backbone(model: PreTrainedModel) -> Any:
        """Return the part of a model that ends in hidden states."""
        # A text model with the prefix of a larger model, as Llama 4's, names itself as its base
        return model.model if model.base_model is model else model.base_model

    def aux_loss(
        self, model: PreTrainedModel, backbone: Any, attention_mask: Tensor | None
    ) -> Tensor:
        """
        Return the load-balancing loss of a mixture of experts (arXiv:2101.03961), as the model's
        own forward computes it.
        """
        if not backbone.router_logits:  # some sizes of a family with experts have none
            return backbone.last_hidden_state.new_zeros(())
        top_k = first_field(model, "num_experts_per_tok") or self.text_config.num_experts_per_tok
        # Families name the number of experts differently; it is the width of the router
        num_experts = backbone.router_logits[0].shape[-1]
        return load_balancing_loss_func(backbone.router_logits, num_experts, top_k, attention_mask)

    @contextlib.contextmanager
    def gathered(
        self, lm_head: Any, *others: Tensor | None, sharded: bool = False
    ) -> Iterator[Head]:
        """
        Give the whole head, however it is sharded; ZeRO-3 gathers `others` too. With `sharded`, the
        rows that tensor parallelism gives this rank stay where they are.
        """
        check_head(lm_head)
        group = tensor_parallel_group(lm_head.weight) if sharded else None
        if group is not None and self.vocab_size is None:
            weight = lm_head.weight.to_local()
            bias = None if lm_head.bias is None else lm_head.bias.to_local()
            vocabulary = shard_vocabulary(group, len(weight), weight.device)
            yield Head(weight, bias, self.transform, vocabulary)
            return
        weight, bias = full_parameter(lm_head.weight), full_parameter(lm_head.bias)
        with gather_partitioned(weight, bias, *others):
            yield Head(self.unpadded(weight), self.unpadded(bias), self.transform)

    def unpadded(self, parameter: Any) -> Any:
        """Return the rows of the head's weight or bias that have logits."""
        return (
            parameter
            if parameter is None or self.vocab_size is None
            else parameter[: self.vocab_size]
        )

    @torch.no_grad()
    def run_reference(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Reference:
        """Return the reference's hidden states `[B, S, H]` and its head."""
        if isinstance(self.reference, PreTrainedModel):
            hidden, lm_head = (
                self.reference(*args, **kwargs),
                self.reference.get_output_embeddings(),
            )
            return Reference(hidden, full_parameter(lm_head.weight), full_parameter(lm_head.bias))
        model.eval()  # the reference has no dropout
        try:
            with self.reference.disable_adapter():
                hidden, lm_head = (
                    self.backbone(model)(*args, **kwargs).last_hidden_state,
                    model.get_output_embeddings(),
                )
                return Reference(
                    hidden, full_parameter(lm_head.weight), full_parameter(lm_head.bias)
                )
        finally:
            model.train()
