"""
Logits that are not what we think: our nll beside that of the model's own logits, once, before the
first step.

The head multiplies hidden states by the weight it is shown, and knows the scales and caps that the
fields of known architectures tell of (`eaft.training.head`). An architecture that does something
else to its logits, or has a head that is more than its weight (a quantised one), would be trained
on a wrong loss without a word.
"""

from __future__ import annotations

import contextlib
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

TOKENS = 4  # of a batch, that are compared
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
    Compare our nll with that of the model's own logits on a few tokens of a batch; all ranks must
    call this.

    The forward runs in the mode that the model is in, since some layers change their weights for
    inference when they leave training mode (bitsandbytes' 4-bit ones on a CPU, adapters that
    merge). It leaves modes, buffers and random number generators as they were.

    Args:
        model: a model that `GatedLMHead` has patched, as it is wrapped for training.
        inputs: a batch, as the model is called with.
        gather: concatenates a tensor of each rank, on every rank.
        forward: what to call with the batch, where that is not the model itself with
            `check_logits=True`.

    Raises:
        ConfigurationError: on every rank, if on any they differ by more than rounding explains.
    """
    with torch.no_grad():
        found = gather(model(**inputs, check_logits=True) if forward is None else forward(**inputs))
    # NaN in both is the finiteness check's to report
    excess = ((found[:, 0] - found[:, 1]).abs() / found[:, 2]).nan_to_num(0.0, posinf=math.inf)
    worst = int(excess.argmax())
    if excess[worst] <= 1:
        return
    ours, own, allowed = found[worst].tolist()
    what = "router's auxiliary loss" if worst % (3 * TOKENS + 1) == 3 * TOKENS else "nll of a token"
    raise ConfigurationError(
        f"model_type={model_type(model)!r}: the {what} is {own:.6g} by the model's own forward and"
        f" {ours:.6g} by ours, where rounding explains a difference of {allowed:.2g}. {REASON}"
    )


def model_type(model: Any) -> str:
    """Return the architecture of a model, however it is wrapped."""
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
    Return our nll, that of the model's own logits, and by how much they may differ, float32 `[3 *
    TOKENS + 1, 3]`.

    Of each token three: its label, and the most and the least likely one by the model's logits,
    which a cap or a mask moves most. The last row is the auxiliary loss of a mixture of experts,
    zeros if the model's forward has none.
    """
    kwargs["use_cache"] = False
    kwargs.pop("example_ids", None)
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
    own_log_probs = (
        logits.cpu().double().log_softmax(-1)
    )  # of these logits, exact; not every device has float64
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
    found = torch.zeros(3 * TOKENS + 1, 3, device=device)
    found[:-1] = torch.stack([losses.statistics.nll, own_nll.flatten(), allowed.flatten()], -1)
    if (own_aux_loss := getattr(own, "aux_loss", None)) is not None:
        aux_loss = head.aux_loss(model, backbone, kwargs.get("attention_mask"))
        # The same sum over tokens, in float32
        error = 8 * torch.finfo(torch.float32).eps * math.sqrt(labelled.numel()) * aux_loss
        found[-1] = torch.tensor([aux_loss, own_aux_loss, error])
    return found


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
    Return the model's own output, its logits those of some tokens alone `[n, V]`, and its
    backbone's output.
    """
    backbone: list[Any] = []
    cuts = 0

    def keep(module: Any, inputs: Any, output: Any) -> None:
        if getattr(output, "router_logits", None) == ():
            output.router_logits = None  # models' own auxiliary loss takes no empty tuple
        backbone.append(output)

    def cut(module: Any, inputs: tuple[Any, ...]) -> Any:
        # The head sees these tokens alone, so that the logits of a long batch never exist
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
    if not backbone:  # OPT's forward calls a part of it; this pass draws the same random numbers
        with unchanged(model):
            backbone = [head.backbone(model)(*args, **kwargs)]
    whole = (
        not cuts and own.logits.shape[:2] == shape
    )  # a batch may itself be one row of as many tokens
    own.logits = own.logits[rows, columns] if whole else own.logits[0]
    return own, backbone[0]


@contextlib.contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """
    Put back, after a forward, the model's buffers and what random number generators it may have
    drawn from.
    """
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    # What a model's own code may draw from
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

    With u the spacing of the logits' dtype at 1, a rounding moves a logit z by at most u / 2 |z|.
    On both sides together there are two of a product, one of a scale and three of a cap, if there
    are such, and two for products that a GPU sums in parts, which are about as large as the logits
    are on average. If each logit moves by m_v against the label, its nll moves by m_y + ln sum_v
    p_v exp(m_v).

    The float32 sum of H products itself errs by about 4 sqrt(H) 2^-24 |h| |w| (Higham and Mary,
    2019, doi:10.1137/18M1226312: four standard deviations of independent roundings), on both sides,
    for two logits.

    Our nll is made of the logits in float32, the model's in float64. Ours rounds the label's
    distance from the largest logit, at most nll, and the nll, which is rounded once more where both
    are compared: 3 nll 2^-24. The distances of all logits, their exponentials, their pairwise sum
    and its logarithm add at most about 6 ln V 2^-24.

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
