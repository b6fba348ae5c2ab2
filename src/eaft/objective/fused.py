"""
The gated cross-entropy from hidden states, without the logits: three matrix products, one chunk of
logits alive.

The gate is known in the forward pass, so the gradient is too. For each chunk of tokens: project,
score, weigh, overwrite the projection with the gradient, and multiply that into the gradients of
the hidden states and of the head. The result equals `gated_cross_entropy` on `hidden @ weight.T`,
which is the specification.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

try:
    from eaft.objective import triton_backend
except ImportError:  # Triton comes with torch where there are GPUs for it
    triton_backend = None  # type: ignore[assignment]
from eaft.errors import ConfigurationError
from eaft.objective.chunk import Backend, Head, LogitTransform
from eaft.objective.gate_spec import BoundGate, bind_gate
from eaft.objective.loss import example_ids_by_row, loss_terms
from eaft.objective.products import Projector, add_product, scaled
from eaft.objective.registry import Anchor, GateLike
from eaft.objective.statistics import NO_CONTEXT, TokenContext, TokenStatistics, usable_top_k
from eaft.objective.torch_backend import TorchBackend
from eaft.objective.vocabulary import WHOLE, Vocabulary, shard_vocabulary

# Each chunk reads and writes the whole gradient of the head. A GPU needs as long for that as for
# the products of about 150 tokens: 2% of the time with chunks of 8,192 rows. A chunk has fewer
# rows if its logits would take more than a share of the memory
CHUNK_ROWS, ROW_MULTIPLE = 8192, 256
LOGITS_BUDGET, GPU_MEMORY_SHARE = 2**28, 16
# A CPU multiplies no faster in float32 with more rows, and each page of fresh memory takes time
CPU_ROWS = 512


@dataclass(frozen=True)
class Reference:
    """The reference model's side of a KL term. The policy's `LogitTransform` applies to it too."""

    hidden: Tensor  # (..., reference_hidden_size), as many positions as the policy's hidden states
    weight: Tensor  # (vocab_size, reference_hidden_size)
    bias: Tensor | None = None  # (vocab_size,)


@dataclass(frozen=True)
class TokenLosses:
    """The parts of the loss, for each labelled token, without gradient."""

    statistics: TokenStatistics  # each field (labelled,)
    weights: Tensor  # (labelled,), float32 (float64 for float64 inputs)
    kl: Tensor | None  # (labelled,), divergence from the reference, in nats

    @classmethod
    def cat(cls, chunks: list[TokenLosses]) -> TokenLosses:
        """Join consecutive chunks of tokens."""
        kls = [chunk.kl for chunk in chunks if chunk.kl is not None]
        return cls(
            TokenStatistics.cat([chunk.statistics for chunk in chunks]),
            torch.cat([chunk.weights for chunk in chunks]),
            torch.cat(kls) if kls else None,
        )


@torch.compiler.disable  # a graph break, instead of tracing a loop over data
def linear_gated_cross_entropy(
    hidden: Tensor,  # (..., hidden_size), any floating dtype
    weight: Tensor,  # (vocab_size, hidden_size)
    labels: Tensor,  # (...), int64, already shifted
    gate: GateLike | BoundGate = "eaft",
    bias: Tensor | None = None,  # (vocab_size,)
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    top_k: int = 20,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    example_ids: Tensor | None = None,  # (...), int64
    example_nll: Tensor | None = None,  # (...), nats
    old_log_prob: Tensor | None = None,  # (...), nats
    reference: Reference | None = None,
    vocab_group: Any = None,
    logits_budget: int | None = None,
    backend: str | None = None,
    return_losses: bool = False,
    **params: Any,
) -> Any:
    """
    `gated_cross_entropy(hidden @ weight.T + bias, labels, gate, ...)` without its logits
    (arXiv:2601.02151).

    Args:
        hidden: under autocast the products are in autocast's dtype.
        weight: if it needs no gradient, neither its product nor its memory is spent.
        labels: only positions whose label is not `ignore_index` are projected.
        gate: name of a registered gate, or a function of `TokenStatistics`; or a `BoundGate`, which
            brings its own K and parameters. A gate that weighs each token by itself
            (`Gate.per_token`) takes three products. A gate that must see the whole batch first
            takes four.
        bias: added to the projection.
        num_items: what to divide the sum by. Default: the number of labelled tokens.
        ignore_index: label of positions without a loss.
        top_k: K of the top-K entropy.
        logit_scale: what the projection is multiplied by.
        softcap: c of c * tanh(logits / c), applied after the scale; None for none.
        example_ids: as in `gated_cross_entropy`.
        example_nll: as in `gated_cross_entropy`.
        old_log_prob: as in `gated_cross_entropy`.
        reference: for a gate with a KL term.
        vocab_group: a `torch.distributed` process group over whose ranks the vocabulary is sharded
            (tensor parallelism), in their order; `weight` and `bias` are then this rank's rows.
            Each rank gives the same hidden states and labels, and gets the same loss, the gradient
            of its own rows, and the whole gradient of the hidden states. Not for a gate with a KL
            term.
        logits_budget: bytes of logits alive at a time, which caps the chunks. Default: a 16th of a
            GPU's memory; on a CPU 256 MiB. In float32 a CPU takes at most 512 tokens at a time. In
            bfloat16 it takes all tokens at once where a float32 sum of the head's gradient would
            need as much memory. The last chunk is held until the backward pass. A KL term takes as
            much again for the reference.
        backend: `torch` or `triton`. Default: Triton on a GPU that has it, except for float64.
        return_losses: also return the `TokenLosses`.
        params: what the gate takes, e.g. `alpha=2.0` for `eaft`.

    Returns:
        Scalar in nats per token, float32 (float64 for float64 inputs); with `return_losses` also
        `TokenLosses`. Gradients are computed here, accumulated in float32 (within a single bfloat16
        product as torch does), and returned in the inputs' dtype by a single backward pass. Where
        nothing needs a gradient, only the statistics are computed.

    Raises:
        ConfigurationError: as in `gated_cross_entropy`; or there is no such backend here.
        RuntimeError: in a second backward pass, or one with `create_graph=True`.
    """
    vocabulary = WHOLE
    if vocab_group is not None:
        vocabulary = shard_vocabulary(vocab_group, len(weight), weight.device)
    loss, losses = fused_loss(
        hidden,
        Head(weight, bias, LogitTransform(logit_scale, softcap), vocabulary),
        labels,
        bind_gate(gate, params, top_k),
        TokenContext(example_ids, example_nll, old_log_prob),
        reference,
        num_items=num_items,
        ignore_index=ignore_index,
        logits_budget=logits_budget,
        backend=backend,
    )
    return (loss, losses) if return_losses else loss


@torch.compiler.disable
def fused_loss(
    hidden: Tensor,  # (..., hidden_size), any floating dtype
    head: Head,
    labels: Tensor,  # (...), int64, already shifted
    gate: BoundGate,
    context: TokenContext = NO_CONTEXT,  # each tensor (...)
    reference: Reference | None = None,
    *,
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    logits_budget: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, TokenLosses]:
    """Return `linear_gated_cross_entropy` and its parts; it says what the arguments mean."""
    anchor = gate.anchor
    if anchor is not None and reference is None:
        raise ConfigurationError(
            f"gate={gate.label} needs reference, the base model's hidden states and head."
        )
    if anchor is not None and head.vocabulary is not WHOLE:
        raise ConfigurationError(
            f"gate={gate.label} has a KL term, which needs the whole vocabulary on each rank: leave"
            " vocab_group out, or take another gate."
        )
    if context.example_ids is None:
        context = replace(context, example_ids=example_ids_by_row(labels))
    # A GPU waits for the number of labels once, here; gathering by their index needs no such wait
    index = (labels.flatten() != ignore_index).nonzero().squeeze(-1)

    def labelled(values: Tensor) -> Tensor:
        if values.shape[: labels.ndim] != labels.shape:
            raise ConfigurationError(
                f"labels {list(labels.shape)} do not go with a tensor {list(values.shape)}."
            )
        return values.reshape(labels.numel(), *values.shape[labels.ndim :]).index_select(0, index)

    if anchor is None or reference is None:
        reference = None
    else:
        reference = replace(reference, hidden=labelled(reference.hidden))
    spec = LossSpec(
        labels=labelled(labels),
        gate=gate,
        context=context.select(labelled),
        anchor=anchor,
        reference=reference,
        transform=head.transform,
        top_k=usable_top_k(gate.top_k, head.vocabulary.size(len(head.weight))),
        backend=choose_backend(backend, hidden, head.vocabulary),
        vocabulary=head.vocabulary,
        logits_budget=logits_budget
        or loss_budget(len(index), head, projection_dtype(hidden), 1 if anchor is None else 2),
        grad_enabled=torch.is_grad_enabled(),
    )
    loss, losses = GatedLinear.apply(labelled(hidden), head.weight, head.bias, spec)
    count = len(index) if num_items is None else num_items
    loss = loss / (
        count.to(loss.device).clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
    )
    return loss, replace(losses, statistics=spec.context.add_to(losses.statistics))


@torch.no_grad()
def linear_token_statistics(
    hidden: Tensor,  # (tokens, hidden_size), any floating dtype
    head: Head,
    labels: Tensor,  # (tokens,), int64, each in [0, vocab_size)
    top_k: int = 20,
    *,
    logits_budget: int | None = None,
    backend: str | None = None,
) -> TokenStatistics:
    """
    `token_statistics(hidden @ weight.T + bias, labels, top_k, ranked=True)` without its logits, and
    without gradient.

    Args:
        hidden: under autocast the product is in autocast's dtype.
        head: the LM head.
        labels: no ignored positions.
        top_k: as in `token_statistics`.
        logits_budget: bytes of logits alive at a time; default as in `linear_gated_cross_entropy`.
        backend: as in `linear_gated_cross_entropy`.

    Returns:
        The statistics of each token, with `first_choice`, `first_prob` and `rank`; float32 (float64
        for float64 inputs).
    """
    dtype, vocabulary, rows_here = projection_dtype(hidden), head.vocabulary, len(head.weight)
    top_k = usable_top_k(top_k, vocabulary.size(rows_here))
    backend_used = choose_backend(backend, hidden, vocabulary)
    budget = logits_budget or default_budget(hidden.device)
    chunks = chunk_slices(len(hidden), vocabulary.widest(rows_here), dtype, budget)
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):
        project = Projector(hidden, head.weight, head.bias, dtype, chunks[0].stop)
        for rows in chunks:
            projection = project(rows)
            for block, tokens in blocks(projection, rows, backend_used):
                scores = backend_used.score(
                    projection[block], labels[tokens], top_k, head.transform, True
                )
                parts.append(scores.statistics)
    return TokenStatistics.cat(parts)


def projection_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of the products: autocast's if it is on, else the hidden states'."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def chunk_slices(n: int, vocab_size: int, dtype: torch.dtype, budget: int) -> list[slice]:
    """Return the rows of each chunk; without rows, one empty chunk."""
    size = chunk_rows(n, vocab_size, dtype.itemsize, budget)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)] or [slice(0, 0)]


def choose_backend(name: str | None, hidden: Tensor, vocabulary: Vocabulary = WHOLE) -> Backend:
    """Return the backend with this name; for None, the fastest for tensors like `hidden`."""
    if vocabulary is not WHOLE:
        if name == "triton":
            raise ConfigurationError(
                "backend='triton' does not shard the vocabulary: leave it out."
            )
        name = "torch"
    if name is None:
        name = (
            "triton"
            if triton_backend is not None and hidden.is_cuda and hidden.dtype != torch.float64
            else "torch"
        )
    if name == "torch":
        return TorchBackend(vocabulary)
    if name != "triton":
        raise ConfigurationError(f"backend={name!r}: expected 'torch' or 'triton'.")
    if triton_backend is None or hidden.dtype == torch.float64:
        reason = (
            "Triton is not installed"
            if triton_backend is None
            else "it does not compute in float64"
        )
        raise ConfigurationError(f"backend='triton': {reason}; leave it out.")
    return triton_backend


def default_budget(device: torch.device) -> int:
    """Return how many bytes of logits may be alive at a time."""
    if device.type != "cuda":
        return LOGITS_BUDGET
    return torch.cuda.get_device_properties(device).total_memory // GPU_MEMORY_SHARE


def loss_budget(n: int, head: Head, dtype: torch.dtype, projections: int) -> int:
    """
    Return how many bytes of a projection of `n` tokens in `dtype` may be alive at a time, while the
    loss is computed. `projections` is 2 with a reference model's.
    """
    weight, budget = head.weight, default_budget(head.weight.device)
    row = head.vocabulary.widest(len(weight)) * dtype.itemsize
    if weight.is_cuda:
        return budget
    if dtype == torch.float32:
        return min(budget, CPU_ROWS * row)
    if dtype == weight.dtype == torch.bfloat16 and weight.requires_grad and torch.is_grad_enabled():
        # A single chunk needs no float32 sum of the head's gradient, and no passes over that sum
        more = (n - chunk_rows(n, row, 1, budget)) * row * projections
        if n <= CHUNK_ROWS and more <= 4 * weight.numel():
            return max(budget, n * row)
    return budget


def chunk_rows(n: int, vocab_size: int, itemsize: int, budget: int) -> int:
    """
    Return how many rows a chunk has: as many as the budget (bytes) and `CHUNK_ROWS` allow, in
    chunks of equal size.

    Of several chunks with at least 256 rows, it is a multiple of 256, so that the products fill
    their tiles.
    """
    most = max(1, min(CHUNK_ROWS, budget // (vocab_size * itemsize)))
    if n <= most:
        return max(1, n)
    multiple = ROW_MULTIPLE if most >= ROW_MULTIPLE else 1
    most -= most % multiple
    equal = math.ceil(n / max(1, math.ceil(n / most)))
    return multiple * math.ceil(equal / multiple)


@dataclass(frozen=True)
class LossSpec:
    """The loss, apart from the tensors that get a gradient."""

    labels: Tensor  # (labelled,), int64, each in [0, vocab_size)
    gate: BoundGate
    context: TokenContext  # each tensor (labelled,)
    anchor: Anchor | None
    reference: Reference | None  # its hidden states (labelled, reference_hidden_size)
    transform: LogitTransform
    top_k: int
    vocabulary: Vocabulary
    backend: Backend
    logits_budget: int  # bytes
    grad_enabled: bool

    def score(self, projection: Tensor, tokens: slice) -> Any:
        """Return the backend's `Scores` of the projection of some tokens."""
        labels, ranked = self.labels[tokens], self.gate.needs_rank
        return self.backend.score(projection, labels, self.top_k, self.transform, ranked)

    def weigh(self, stats: TokenStatistics, tokens: slice) -> Tensor:
        """Return the weights of some tokens from their statistics."""
        return self.gate.weights(self.context.select(lambda x: x[tokens]).add_to(stats))


class GatedLinear(torch.autograd.Function):
    """The sum of the terms of the loss, with its gradients, one chunk of tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: LossSpec
    ) -> Any:
        """Return the sum and the `TokenLosses`; keep the gradients."""
        needs_hidden, needs_weight, needs_bias = (
            needs and spec.grad_enabled for needs in ctx.needs_input_grad[:3]
        )
        wanted = needs_hidden or needs_weight or needs_bias
        device, dtype = hidden.device.type, projection_dtype(hidden)
        exact = torch.promote_types(dtype, torch.float32)
        vocab_size = len(weight)
        width = spec.vocabulary.widest(vocab_size)
        chunks = chunk_slices(len(hidden), width, dtype, spec.logits_budget)
        size = chunks[0].stop
        grad_hidden = (
            torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if needs_hidden else None
        )
        grad_weight = None  # of all chunks except the last, whose product waits for `backward`
        grad_bias = (
            torch.zeros(vocab_size, dtype=exact, device=weight.device) if needs_bias else None
        )
        with torch.autocast(device, enabled=False):
            project = Projector(hidden, weight, bias, dtype, size)
            project_reference = None
            if (r := spec.reference) is not None:
                project_reference = Projector(r.hidden, r.weight, r.bias, dtype, size)

            weights = None
            if not spec.gate.per_token:  # the gate must see every token first: a fourth product
                seen = [chunk_statistics(project(rows), rows, spec) for rows in chunks]
                weights = spec.weigh(TokenStatistics.cat(seen), slice(None))

            losses = []
            for rows in chunks:
                projection = project(rows)
                reference_projection = project_reference(rows) if project_reference else None
                losses.append(
                    weigh_and_differentiate_(
                        projection, rows, spec, weights, reference_projection, wanted
                    )
                )
                grad_logits = projection  # it was overwritten
                if grad_hidden is not None:
                    project.multiply(grad_logits, grad_hidden[rows])
                if needs_weight and rows is not chunks[-1]:
                    grad_weight = add_product(
                        grad_weight, grad_logits.T, project.hidden[rows], exact
                    )
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0, dtype=exact)

        if grad_hidden is not None:  # each rank has the part of its own rows of the head
            grad_hidden = spec.vocabulary.sum(grad_hidden)
        ctx.grad_hidden, ctx.grad_weight, ctx.grad_bias = grad_hidden, grad_weight, grad_bias
        ctx.last_product = (grad_logits, project.hidden[rows]) if needs_weight else None
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.spent = False
        joined = TokenLosses.cat(losses)
        terms = loss_terms(joined.statistics, joined.weights, joined.kl, spec.anchor)
        return terms.sum(), joined

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> Any:
        """Return the gradients from the forward pass, times the gradient of the loss."""
        # Gradients are constants here, so a second derivative would silently miss a term
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_gated_cross_entropy has no second derivative: do without create_graph=True."
            )
        if ctx.spent:
            raise RuntimeError(
                "linear_gated_cross_entropy has one backward pass; compute the loss again for"
                " another."
            )
        hidden_dtype, weight_dtype = ctx.dtypes
        grad_weight = ctx.grad_weight
        if ctx.last_product is not None:
            grad_logits, hidden = ctx.last_product
            with torch.autocast(hidden.device.type, enabled=False):
                if grad_weight is None and hidden.dtype == weight_dtype != torch.float16:
                    # The gradient is a single product. The factor goes into the smaller matrix
                    hidden = scaled(hidden.clone(), grad_loss, hidden.dtype)
                    grad_weight = add_product(None, grad_logits.T, hidden, weight_dtype)
                else:  # in float32, since a float16 sum could overflow before it is divided
                    exact = torch.promote_types(hidden.dtype, torch.float32)
                    grad_weight = scaled(
                        add_product(grad_weight, grad_logits.T, hidden, exact),
                        grad_loss,
                        weight_dtype,
                    )
        gradients = (
            None if ctx.grad_hidden is None else scaled(ctx.grad_hidden, grad_loss, hidden_dtype),
            grad_weight,
            None if ctx.grad_bias is None else scaled(ctx.grad_bias, grad_loss, weight_dtype),
        )
        ctx.spent = True
        ctx.grad_hidden = ctx.grad_weight = ctx.grad_bias = ctx.last_product = None
        return *gradients, None


def blocks(projection: Tensor, rows: slice, backend: Backend) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of each block: in the projection, and among all tokens."""
    size = backend.block_rows(projection)
    for start in range(0, max(1, len(projection)), size):
        stop = min(start + size, len(projection))
        yield slice(start, stop), slice(rows.start + start, rows.start + stop)


def chunk_statistics(projection: Tensor, rows: slice, spec: LossSpec) -> TokenStatistics:
    """Return the statistics of a chunk of tokens."""
    return TokenStatistics.cat(
        [
            spec.score(projection[block], tokens).statistics
            for block, tokens in blocks(projection, rows, spec.backend)
        ]
    )


def weigh_and_differentiate_(
    projection: Tensor,  # (chunk, vocab_size)
    rows: slice,
    spec: LossSpec,
    weights: Tensor | None,  # (labelled,): of all tokens, if the gate has seen them already
    reference_projection: Tensor | None,  # (chunk, vocab_size)
    differentiate: bool,
) -> TokenLosses:
    """
    Return the losses of a chunk. With `differentiate` the projection becomes the gradient of the
    sum of their terms.
    """
    backend, anchor, losses = spec.backend, spec.anchor, []
    for block, tokens in blocks(projection, rows, backend):
        scores = spec.score(projection[block], tokens)
        if weights is None:
            block_weights = spec.weigh(scores.statistics, tokens)
        else:
            block_weights = weights[tokens]
        divergence = None
        if anchor is not None and reference_projection is not None:
            divergence = backend.diverge(
                projection[block],
                reference_projection[block],
                spec.labels[tokens],
                scores,
                anchor,
                spec.transform,
            )
        if differentiate:
            backend.gradient_(
                projection[block],
                spec.labels[tokens],
                block_weights,
                scores,
                spec.transform,
                divergence,
                0.0 if anchor is None else anchor.coef,
            )
        kl = None if divergence is None else divergence.kl
        losses.append(TokenLosses(scores.statistics, block_weights, kl))
    return TokenLosses.cat(losses)
