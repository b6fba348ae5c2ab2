"""
The gated cross-entropy from hidden states, without the logits: three matrix products, one chunk of logits alive.

A gate is known in the forward pass, so the gradient is too. Per chunk of tokens: logits -> statistics -> weights -> the
logits' gradient in their place -> gradients of the hidden states and of the head. Equal to `gated_cross_entropy` on
`hidden @ weight.T`, which says what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

try:
    from eaft.objective import kernels
except ImportError:  # Triton comes with torch where there are GPUs for it
    kernels = None  # type: ignore[assignment]
from eaft.errors import ConfigurationError
from eaft.objective.gates import Anchor, GateLike, check_gate, gate_weights, get_anchor, is_per_token
from eaft.objective.loss import example_ids_by_row, loss_terms
from eaft.objective.statistics import TokenStatistics, entropy_from_log_probs, usable_top_k

# Bytes of logits alive at a time. Each chunk reads and writes the whole gradient of the head, which takes a GPU as long
# as the products of a few hundred tokens: there a chunk must be larger
LOGITS_BUDGET, LOGITS_BUDGET_GPU = 2**28, 3 * 2**28
# Bytes that a block of rows may take in its passes over the logits, so that they stay in the processor's cache
CACHE_BUDGET = 2**23

Weigh = Callable[[TokenStatistics, slice], Tensor]


@dataclass(frozen=True)
class Reference:
    """The reference model's side of a KL term: hidden states `[N, H']`, head weight `[V, H']` and bias `[V]`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class TokenLosses:
    """What the loss is made of, for each labelled token, without gradient."""

    statistics: TokenStatistics
    weights: Any  # Tensor; None before there are any
    kl: Tensor | None  # divergence from the reference, in nats

    @classmethod
    def cat(cls, chunks: list[TokenLosses]) -> TokenLosses:
        """Join consecutive chunks of tokens."""
        weights, kls = ([getattr(chunk, name) for chunk in chunks] for name in ("weights", "kl"))
        return cls(
            TokenStatistics.cat([chunk.statistics for chunk in chunks]),
            None if weights[0] is None else torch.cat(weights),
            None if kls[0] is None else torch.cat(kls),
        )


@dataclass(frozen=True)
class Head:
    """What turns a projection into logits: softcap * tanh(logit_scale * z / softcap), without the tanh for None."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def logits_(self, projection: Tensor) -> Tensor:
        """Return the logits, in place of the projection."""
        if self.logit_scale != 1.0:
            projection.mul_(self.logit_scale)
        if self.softcap is not None:
            projection.div_(self.softcap).tanh_().mul_(self.softcap)
        return projection

    def backward_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Return the projection's gradient, in place of the logits'."""
        if self.softcap is not None:
            gradient.mul_(1 - (logits / self.softcap).square())  # d tanh(x) / dx = 1 - tanh(x)^2
        if self.logit_scale != 1.0:
            gradient.mul_(self.logit_scale)
        return gradient


@torch.compiler.disable  # a graph break, instead of tracing a loop over data
def linear_gated_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    gate: GateLike = "eaft",
    bias: Tensor | None = None,
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    top_k: int = 20,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    example_ids: Tensor | None = None,
    example_nll: Tensor | None = None,
    reference: Reference | None = None,
    logits_budget: int | None = None,
    return_losses: bool = False,
    **params: Any,
) -> Any:
    """
    `gated_cross_entropy(hidden @ weight.T + bias, labels, gate, ...)` without its logits (arXiv:2601.02151).

    Args:
        hidden: `[N, H]` (or `[..., H]`), any floating dtype; under autocast the products are in its dtype.
        weight: `[V, H]`. If it needs no gradient, neither its product nor its memory is spent.
        labels: `[N]` (or `[...]`) int64, already shifted; only positions that are not `ignore_index` are projected.
        gate: name of a registered gate, or a function of `TokenStatistics`. One that weighs each token by itself
            (`Gate.per_token`) takes three products; another, which must see the whole batch first, four.
        bias: `[V]`.
        num_items: what to divide the sum by. Default: the number of labelled tokens.
        ignore_index: label of positions without a loss.
        top_k: K of the top-K entropy.
        logit_scale: what the projection is multiplied by.
        softcap: c of c * tanh(logits / c), applied after the scale; None for none.
        example_ids: as in `gated_cross_entropy`.
        example_nll: as in `gated_cross_entropy`.
        reference: for a gate with a KL term; the same scale and softcap apply.
        logits_budget: bytes of logits alive at a time, which sets the chunks; default 256 MiB, 768 on a GPU.
        return_losses: also return the `TokenLosses`.
        params: what the gate takes, e.g. `alpha=2.0` for `eaft`.

    Returns:
        Scalar in nats per token, float32 (float64 for float64 inputs); with `return_losses` also `TokenLosses`.
        Gradients are computed here, accumulated in float32, and returned in the inputs' dtype by a single backward
        pass. Where nothing needs a gradient, only the statistics are computed.

    Raises:
        ConfigurationError: as in `gated_cross_entropy`.
        RuntimeError: in a second backward pass, or one with `create_graph=True`.
    """
    found, anchor = check_gate(gate, params), get_anchor(gate, **params)
    if anchor is not None and reference is None:
        raise ConfigurationError(f"gate={gate!r} needs reference, the base model's hidden states and head.")
    labelled = labels != ignore_index
    if example_ids is None:
        example_ids = example_ids_by_row(labels)
    example_ids = example_ids[labelled]
    example_nll = None if example_nll is None else example_nll[labelled]
    if reference is not None:
        reference = replace(reference, hidden=reference.hidden[labelled]) if anchor is not None else None

    def with_examples(stats: TokenStatistics, rows: slice) -> TokenStatistics:
        nll = None if example_nll is None else example_nll[rows]
        return replace(stats, example_ids=example_ids[rows], example_nll=nll)

    def weigh(stats: TokenStatistics, rows: slice) -> Tensor:
        return gate_weights(found, with_examples(stats, rows), **params)

    job = Job(
        labels=labels[labelled],
        weigh=weigh,
        per_token=is_per_token(found, params),
        anchor=anchor,
        reference=reference,
        head=Head(logit_scale, softcap),
        top_k=usable_top_k(top_k, weight.shape[0]),
        logits_budget=logits_budget or (LOGITS_BUDGET_GPU if hidden.is_cuda else LOGITS_BUDGET),
        gradient=torch.is_grad_enabled(),
    )
    loss, log_prob, entropy, top_k_entropy, sum_sq_probs, is_top1, weights, kl = GatedLinear.apply(
        hidden[labelled], weight, bias, job
    )
    count = labelled.sum() if num_items is None else torch.as_tensor(num_items, device=loss.device)
    loss = loss / count.clamp(min=1)
    if not return_losses:
        return loss
    stats = TokenStatistics(log_prob, entropy, top_k_entropy, sum_sq_probs, is_top1, top_k=job.top_k)
    return loss, TokenLosses(with_examples(stats, slice(None)), weights, kl)


@dataclass(frozen=True)
class Job:
    """What `GatedLinear` is told beside the tensors it differentiates."""

    labels: Tensor  # [N], all to be scored
    weigh: Weigh  # statistics of some rows, and which -> their weights
    per_token: bool  # a chunk can be weighed before the next is seen
    anchor: Anchor | None
    reference: Reference | None
    head: Head
    top_k: int
    logits_budget: int
    gradient: bool  # gradients are wanted of what requires them


class GatedLinear(torch.autograd.Function):
    """The sum of the loss's terms, with its gradients, a chunk of tokens at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> Any:
        """Return the sum, the fields of `TokenStatistics`, the weights and the KL; keep the gradients."""
        needs_hidden, needs_weight, needs_bias = (needs and job.gradient for needs in ctx.needs_input_grad[:3])
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        exact = torch.promote_types(dtype, torch.float32)
        grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if needs_weight else None
        grad_bias = torch.zeros(len(weight), dtype=exact, device=weight.device) if needs_bias else None
        with torch.autocast(device, enabled=False):
            projection = Projection(hidden, weight, bias, dtype, job.logits_budget)
            reference = None
            if job.reference is not None:
                r = job.reference
                reference = Projection(r.hidden, r.weight, r.bias, dtype, job.logits_budget)

            weigh = job.weigh
            if not job.per_token:  # the gate must see every token first: a fourth product
                seen = [fold(projection(rows), rows, job).statistics for rows in projection.chunks]
                weigh = all_rows(job.weigh(TokenStatistics.cat(seen), slice(None)))

            found = []
            for rows in projection.chunks:
                z, reference_z = projection(rows), reference(rows) if reference else None
                found.append(fold(z, rows, job, weigh, reference_z, needs_hidden or needs_weight or needs_bias))
                if grad_hidden is not None:
                    torch.mm(z, projection.weight, out=grad_hidden[rows])
                if grad_weight is not None:
                    add_product_(grad_weight, z.T, projection.hidden[rows])
                if grad_bias is not None:
                    grad_bias += z.sum(0, dtype=exact)

        losses = TokenLosses.cat(found)
        tensors = (*losses.statistics.tensors(), losses.weights, losses.kl)
        ctx.mark_non_differentiable(*(t for t in tensors if t is not None))
        ctx.gradients, ctx.dtypes = (grad_hidden, grad_weight, grad_bias), (hidden.dtype, weight.dtype, weight.dtype)
        return loss_terms(losses.statistics, losses.weights, losses.kl, job.anchor).sum(), *tensors

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
        """Return the gradients of the forward pass, times the loss's own."""
        if torch.is_grad_enabled():  # they are constants here, so what depends on them would silently miss a term
            raise RuntimeError("linear_gated_cross_entropy has no second derivative: do without create_graph=True.")
        if ctx.gradients is None:
            raise RuntimeError("linear_gated_cross_entropy has one backward pass; compute the loss again for another.")
        gradients, ctx.gradients = ctx.gradients, None
        # Multiplied in float32: 1 / N rounded to bfloat16 would be off by up to 0.4% for every element alike
        scaled = (None if g is None else g.to(grad_loss.dtype).mul_(grad_loss) for g in gradients)
        return *(None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True)), None


class Projection:
    """hidden @ weight.T + bias, a chunk of tokens at a time, each in the place of the one before."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, budget: int) -> None:
        self.hidden, self.weight = hidden.to(dtype), weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        size = min(max(1, budget // (len(weight) * dtype.itemsize)), max(1, len(hidden)))
        self.chunks = [slice(start, min(start + size, len(hidden))) for start in range(0, max(1, len(hidden)), size)]
        self.logits = torch.empty((size, len(weight)), dtype=dtype, device=weight.device)

    def __call__(self, rows: slice) -> Tensor:
        """Return the projection of some rows, `[n, V]`."""
        z = self.logits[: rows.stop - rows.start]
        if self.bias is None:
            return torch.mm(self.hidden[rows], self.weight.T, out=z)
        return torch.addmm(self.bias, self.hidden[rows], self.weight.T, out=z)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a float32 total, unrounded: rounding each chunk's product first would bias the sum."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # no such product here: cast a few rows at a time
        b = b.to(total.dtype)
        size = max(1, CACHE_BUDGET // (max(1, len(b)) * b.itemsize))
        for some_total, some_a in zip(total.split(size), a.split(size), strict=True):
            some_total.addmm_(some_a.to(total.dtype), b)


def all_rows(weights: Tensor) -> Weigh:
    """Return a `weigh` that knows every row's weight already."""
    return lambda stats, rows: weights[rows]


def fold(
    z: Tensor,
    rows: slice,
    job: Job,
    weigh: Weigh | None = None,
    reference_z: Tensor | None = None,
    gradient: bool = False,
) -> TokenLosses:
    """
    Return the losses of a chunk of tokens from their projection `z` `[n, V]`, with weights if there is a `weigh`.

    With `gradient`, `z` becomes the gradient of the sum of their terms; else what it holds is spent.
    """
    if reference_z is None and use_triton(z):
        return fold_in_kernels(z, rows, job, weigh, gradient)
    budget = LOGITS_BUDGET if z.is_cuda else CACHE_BUDGET
    size = max(1, budget // (2 * z.shape[1] * torch.float32.itemsize))
    losses = []
    # Allocated once: blocks of memory freed between small tensors that live on would not be found again
    scratch = torch.empty(
        (2, min(size, len(z)), z.shape[1]), dtype=torch.promote_types(z.dtype, torch.float32), device=z.device
    )
    for start in range(0, max(1, len(z)), size):
        block = slice(start, min(start + size, len(z)))
        of_all = slice(rows.start + block.start, rows.start + block.stop)
        reference_block = None if reference_z is None else reference_z[block]
        losses.append(fold_block(z[block], of_all, job, weigh, reference_block, gradient, scratch[:, : len(z[block])]))
    return TokenLosses.cat(losses)


def use_triton(z: Tensor) -> bool:
    """Return whether the kernels can take `z`."""
    return kernels is not None and z.is_cuda and z.dtype != torch.float64


def fold_in_kernels(z: Tensor, rows: slice, job: Job, weigh: Weigh | None, gradient: bool) -> TokenLosses:
    """`fold` for a GPU: one kernel reads the logits, another turns them into their gradient."""
    labels, head = job.labels[rows], job.head
    sums = kernels.token_sums(z, labels, job.top_k, head.logit_scale, head.softcap)
    stats = TokenStatistics(
        sums["log_prob"],
        sums["entropy"],
        sums["top_k_entropy"],
        sums["sum_sq_probs"],
        sums["is_top1"],
        top_k=job.top_k,
    )
    if weigh is None:
        return TokenLosses(stats, None, None)
    weights = weigh(stats, rows)
    if gradient:
        kernels.gradient_(z, labels, weights, sums, head.logit_scale, head.softcap)
    return TokenLosses(stats, weights, None)


def fold_block(
    z: Tensor,
    rows: slice,
    job: Job,
    weigh: Weigh | None,
    reference_z: Tensor | None,
    gradient: bool,
    scratch: Tensor,
) -> TokenLosses:
    """`fold` in torch, on a block of rows; `scratch` is memory for two of them in the dtype of the statistics."""
    exact, labels = scratch.dtype, job.labels[rows].unsqueeze(-1)
    logits = job.head.logits_(z.to(exact))
    top, first = logits.max(-1, keepdim=True)
    largest = logits.topk(job.top_k, sorted=False).values
    label_logit = logits.gather(-1, labels)
    shifted = logits - top if job.head.softcap else logits.sub_(top)
    e = torch.exp(shifted, out=scratch[0])
    total = e.sum(-1, keepdim=True)
    log_total = total.log()
    stats = TokenStatistics(
        log_prob=(label_logit - top - log_total).squeeze(-1),
        entropy=(log_total - row_dot(e, shifted, scratch[1]) / total).squeeze(-1),
        top_k_entropy=entropy_from_log_probs(largest.log_softmax(-1)),
        sum_sq_probs=(row_dot(e, e, scratch[1]) / total.square()).squeeze(-1),
        is_top1=(first == labels).squeeze(-1),
        top_k=job.top_k,
    )
    if weigh is None:
        return TokenLosses(stats, None, None)
    weights, kl, kl_gradient = weigh(stats, rows), None, None
    if reference_z is not None and job.anchor is not None:
        reference_log_probs = job.head.logits_(reference_z.to(exact)).log_softmax(-1)
        kl, kl_gradient = job.anchor.kl_and_gradient(shifted - log_total, reference_log_probs)
    if gradient:
        # d (weight * nll) / d logits = weight * (p - 1[label])
        e.mul_(weights.unsqueeze(-1) / total).scatter_add_(-1, labels, -weights.unsqueeze(-1))
        if kl_gradient is not None and job.anchor is not None:
            e.add_(kl_gradient, alpha=job.anchor.coef)
        z.copy_(job.head.backward_(e, logits))
    return TokenLosses(stats, weights, kl)


def row_dot(e: Tensor, x: Tensor, scratch: Tensor) -> Tensor:
    """Return sum_v e_v x_v of each row, `[n, 1]`; where e_v is 0 and x_v -inf, nothing is added."""
    # Not a matrix product: `sum` adds pairwise, which keeps a long row's rounding small
    dot = torch.mul(e, x, out=scratch).sum(-1, keepdim=True)
    if dot.isnan().any():
        dot = (e * torch.where(e == 0, 0.0, x)).sum(-1, keepdim=True)
    return dot
