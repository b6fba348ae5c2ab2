"""
Before the first step: compare our nll with the nll from the model's own logits, on a few tokens.

Our head multiplies hidden states by a weight, and applies the scale and cap that the config of a
known architecture has (`eaft.training.head`). Some architectures do something else to their logits,
and a quantised head is more than its weight. Without this check such a model would silently be
trained on a wrong loss.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from eaft.errors import ConfigurationError
from eaft.objective.fused import fused_loss

TOKENS = 4  # how many tokens of a batch are compared
REASON = (
    "The architecture does something to its logits that eaft does not know of, or its head is"
    " quantised, and the loss would be wrong. Load the head unquantised, or train another model;"
    " and tell us of this one."
)


def check_logits(
    model: Any,
    inputs: dict[str, Any],
    gather: Callable[[Tensor], Tensor],
    forward: Callable[..., Tensor] | None = None,
) -> None:
    """
    Compare our nll with the nll from the model's own logits on a few tokens of a batch; all ranks
    must call this.

    The forward runs in the model's current mode, because some layers change their weights when they
    leave training mode (bitsandbytes' 4-bit layers on a CPU, adapters that merge). Modes, buffers
    and random number generators are afterwards as they were before.

    Args:
        model: a model that `GatedLMHead` has patched, as it is wrapped for training.
        inputs: a batch: the keyword arguments of the model.
        gather: concatenates the tensors of all ranks, on every rank.
        forward: called with the batch. Default: the model with `check_logits=True`.

    Raises:
        ConfigurationError: on every rank, if on any rank the two differ by more than rounding.
    """
    with torch.no_grad():
        compare = functools.partial(model, check_logits=True) if forward is None else forward
        compared = gather(compare(**inputs))
    # If both are NaN, the check for finite losses reports it
    excess = ((compared[:, 0] - compared[:, 1]).abs() / compared[:, 2]).nan_to_num(
        0.0, posinf=math.inf
    )
    worst = int(excess.argmax())
    if excess[worst] <= 1:
        return
    ours, own, allowed = compared[worst].tolist()
    what = "router's auxiliary loss" if worst % (3 * TOKENS + 1) == 3 * TOKENS else "nll of a token"
    raise ConfigurationError(
        f"model_type={model_type(model)!r}: the {what} is {own:.6g} by the model's own forward and"
        f" {ours:.6g} by ours, where rounding explains a difference of {allowed:.2g}. {REASON}"
    )


def model_type(model: Any) -> str:
    """Return the architecture's name, also of a model that is wrapped."""
    return next(
        module.config.model_type
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    )


@torch.compiler.disable
def compare_logits(
    head: Any,
    model: PreTrainedModel,
    *args: Any,
    labels: Any = None,
    shift_labels: Any = None,
    **kwargs: Any,
) -> Tensor:
    """
    Return our nll, the nll from the model's own logits, and the allowed difference, float32 `[3 *
    TOKENS + 1, 3]`.

    Each token gives three rows: for its label, and for the most and the least likely token by the
    model's logits, because a cap or a mask moves these most. The last row is the auxiliary loss of
    a mixture of experts; it is 0 if the model's forward returns none.
    """
    kwargs["use_cache"] = False
    for name in ("example_ids", "token_numbers", "replay_numbers"):
        kwargs.pop(name, None)
    if shift_labels is None:
        shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    labelled = shift_labels != -100
    tokens = (labelled if labelled.any() else torch.ones_like(labelled)).nonzero().cpu()
    rows, columns = tokens[torch.linspace(0, len(tokens) - 1, TOKENS).long()].unbind(-1)

    own, backbone = run_own_forward(head, model, rows, columns, shift_labels.shape, *args, **kwargs)
    lm_head = model.get_output_embeddings()
    device = lm_head.weight.device
    logits, hidden = own.logits.to(device), backbone.last_hidden_state[rows, columns].to(device)
    label = shift_labels[rows, columns].to(device).clamp(min=0)
    candidates = torch.stack([label, logits.argmax(-1), logits.argmin(-1)], -1)
    # In float64, which not every device has
    own_log_probs = logits.cpu().double().log_softmax(-1)
    with head.gathered(lm_head) as weights:
        weight, transform = weights.weight, weights.transform
        if weight.shape[-1] != hidden.shape[-1]:
            sizes = (
                f"the head's weight is {list(weight.shape)}, and its hidden states have"
                f" {hidden.shape[-1]} elements"
            )
            raise ConfigurationError(f"model_type={model_type(model)!r}: {sizes}. {REASON}")
        _, losses = fused_loss(
            hidden.unsqueeze(1).expand(-1, 3, -1), weights, candidates, head.plain
        )
        bias = None if weights.bias is None else weights.bias.to(hidden.dtype)
        z = transform.logit_scale * F.linear(hidden, weight.to(hidden.dtype), bias)
        norms = (
            transform.logit_scale
            * hidden.float().norm(dim=-1, keepdim=True)
            * weight[candidates].float().norm(dim=-1)
        )
    operations = 4 + (transform.logit_scale != 1) + 3 * (transform.softcap is not None)
    unit = max(torch.finfo(z.dtype).eps, torch.finfo(logits.dtype).eps)
    if z.is_cuda and z.dtype == torch.float32:
        unit = max(unit, 2**-10)  # the products may be in TF32, which has ten bits
    size = z.float().abs()
    size = size.clamp(min=size.square().mean(-1, keepdim=True).sqrt()).clamp(
        max=transform.softcap or math.inf
    )
    spread = hidden.shape[-1] ** 0.5 * norms
    moved = (operations / 2 * unit * size).cpu().double()
    allowed = rounding(moved, own_log_probs, candidates.cpu(), spread.cpu().double()).to(
        device, torch.float32
    )
    own_nll = -own_log_probs.gather(-1, candidates.cpu()).to(device, torch.float32)
    compared = torch.zeros(3 * TOKENS + 1, 3, device=device)
    compared[:-1] = torch.stack([losses.statistics.nll, own_nll.flatten(), allowed.flatten()], -1)
    if (own_aux_loss := getattr(own, "aux_loss", None)) is not None:
        aux_loss = head.aux_loss(model, backbone, kwargs.get("attention_mask"))
        # The same sum over tokens, in float32
        error = 8 * torch.finfo(torch.float32).eps * math.sqrt(labelled.numel()) * aux_loss
        compared[-1] = torch.tensor([aux_loss, own_aux_loss, error])
    return compared


def run_own_forward(
    head: Any,
    model: PreTrainedModel,
    rows: Tensor,
    columns: Tensor,
    shape: torch.Size,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """
    Return the output of the model's own forward, with logits of some tokens only `[n, V]`, and the
    output of its backbone.
    """
    backbone: list[Any] = []
    cuts = 0

    def keep(module: Any, inputs: Any, output: Any) -> None:
        if getattr(output, "router_logits", None) == ():
            output.router_logits = None  # the model's own auxiliary loss fails on an empty tuple
        backbone.append(output)

    def cut(module: Any, inputs: tuple[Any, ...]) -> Any:
        # The head only sees these tokens, so that the logits of a long batch never exist
        nonlocal cuts
        if not inputs or inputs[0].shape[:2] != shape:
            return None
        cuts += 1
        return (inputs[0][rows, columns].unsqueeze(0),)

    hooks = (
        head.backbone(model).register_forward_hook(keep),
        model.get_output_embeddings().register_forward_pre_hook(
            cut, prepend=True
        ),  # before a sharded head's own
    )
    try:
        with unchanged(model):
            own = head.own_forward(model, *args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    # OPT's forward calls only a part of its backbone. This pass draws the same random numbers
    if not backbone:
        with unchanged(model):
            backbone = [head.backbone(model)(*args, **kwargs)]
    # Without a cut; a batch may also be one row of as many tokens as are compared
    whole = not cuts and own.logits.shape[:2] == shape
    own.logits = own.logits[rows, columns] if whole else own.logits[0]
    return own, backbone[0]


@contextlib.contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """
    After a forward, restore the model's buffers and the random number generators it may have used.
    """
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    # A model's own code may use these generators
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    accelerator = torch.accelerator.current_accelerator()
    kind = "cuda" if accelerator is None else accelerator.type
    used = {x.device for x in (*model.parameters(), *model.buffers())}
    devices = [device.index for device in used if device.type == kind and device.index is not None]
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)


def rounding(moved: Tensor, log_probs: Tensor, candidates: Tensor, spread: Tensor) -> Tensor:
    """
    Return by how much two nll from the same hidden states may differ, `[n, k]`.

    Let u be the spacing of the logits' dtype at 1. One rounding moves a logit z by at most u / 2
    |z|. Both sides together have two roundings of a product, one of a scale and three of a cap (if
    the model has them). Two more are for products that a GPU sums in parts, which are about as
    large as the logits are on average. If each logit moves by m_v against the label, the nll moves
    by m_y + ln sum_v p_v exp(m_v).

    The float32 sum of H products has an error of about 4 sqrt(H) 2^-24 |h| |w| (Higham and Mary,
    2019, doi:10.1137/18M1226312: four standard deviations of independent roundings), on both sides,
    for two logits.

    Our nll is computed from float32 logits, the model's nll in float64. Ours rounds the label's
    distance from the largest logit, which is at most nll, then the nll, and once more when both are
    compared: 3 nll 2^-24. The distances of all logits, their exponentials, their pairwise sum and
    its logarithm add at most about 6 ln V 2^-24.

    Args:
        moved: m, `[n, V]`.
        log_probs: ln p, `[n, V]`.
        candidates: labels y, `[n, k]`.
        spread: sqrt(H) |h| |w_y|, `[n, k]`.
    """
    normaliser = (log_probs.exp() * moved.expm1()).sum(-1, keepdim=True).log1p()
    eps = torch.finfo(torch.float32).eps
    sums = 8 * eps * spread.amax(-1, keepdim=True)
    nll = eps / 2 * (3 * -log_probs.gather(-1, candidates) + 6 * math.log(log_probs.shape[-1]))
    return moved.gather(-1, candidates) + normaliser + sums + nll
