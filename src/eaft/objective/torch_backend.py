"""
A chunk scored and differentiated in torch operations: for CPUs, float64, and GPUs without Triton.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eaft.objective.chunk import LogitTransform
from eaft.objective.registry import Anchor
from eaft.objective.statistics import TokenStatistics, entropy_from_log_probs
from eaft.objective.vocabulary import WHOLE, Vocabulary

# Bytes of a block of rows in the passes over the logits: the processor's cache, for each thread, or
# an amount that a GPU can spare
CACHE_BUDGET, GPU_BUDGET = 2**23, 2**28
SEGMENT = 64  # logits of a row; the largest are looked for in a few segments


@dataclass(frozen=True)
class Scores:
    """
    The statistics, and the tensors that the gradient needs. `exps` is valid until the next block is
    scored.
    """

    statistics: TokenStatistics
    exps: Tensor  # [n, V]: exp(logit - the row's largest)
    total: Tensor  # [n, 1]: their sum over the whole vocabulary
    top: Tensor  # [n, 1]: the largest logit


@dataclass(frozen=True)
class Divergence:
    """The divergence, and its derivative by the policy's logits."""

    kl: Tensor  # [n], nats
    gradient: Tensor  # [n, V]


class TorchBackend:
    """
    A `chunk.Backend` in torch, for blocks of rows that stay in the processor's cache.

    Of a sharded vocabulary, projections have the columns of this rank, and labels are token ids.
    """

    def __init__(self, vocabulary: Vocabulary = WHOLE) -> None:
        self.vocabulary = vocabulary
        self.scratch: Tensor | None = None

    def block_rows(self, projection: Tensor) -> int:
        """Return how many rows fit into the budget, twice, in the dtype of the statistics."""
        budget = GPU_BUDGET
        if not projection.is_cuda:
            budget = min(budget, CACHE_BUDGET * torch.get_num_threads())
        itemsize = torch.promote_types(projection.dtype, torch.float32).itemsize
        return max(1, budget // (2 * self.vocabulary.widest(projection.shape[1]) * itemsize))

    def score(
        self,
        projection: Tensor,
        labels: Tensor,
        top_k: int,
        transform: LogitTransform,
        ranked: bool = False,
    ) -> Scores:
        """See `chunk.Backend.score`."""
        labels, vocabulary = labels.unsqueeze(-1), self.vocabulary
        shifted_memory, exps_memory = self.scratch_like(projection)
        logits = make_logits(projection, transform, shifted_memory)
        own_top, first, largest = find_largest(logits, min(top_k, logits.shape[-1]))
        top = vocabulary.maximum(own_top)
        first = vocabulary.first(first, own_top == top)
        largest = vocabulary.largest(largest, top_k)
        columns = vocabulary.columns(labels)
        label_logit = vocabulary.of_label(logits.gather(-1, columns), labels)
        shifted = torch.sub(logits, top, out=shifted_memory)
        exps = torch.exp(shifted, out=exps_memory)
        total = exps.sum(-1, keepdim=True)
        # The products with the exponentials overwrite the shifted logits
        weighted = torch.mul(exps, shifted, out=shifted_memory).sum(-1, keepdim=True)
        if weighted.isnan().any():  # 0 * -inf: a token that cannot occur adds 0
            shifted = make_logits(projection, transform, shifted_memory) - top
            weighted = (exps * torch.where(exps == 0, 0.0, shifted)).sum(-1, keepdim=True)
        # Not matrix products: `sum` adds pairwise, which keeps a long row's rounding small
        sum_sq_exps = torch.mul(exps, exps, out=shifted_memory).sum(-1, keepdim=True)
        sums = vocabulary.sum(torch.cat([total, weighted, sum_sq_exps], -1))
        total, weighted, sum_sq_exps = sums.split(1, -1)
        log_total = total.log()
        statistics = TokenStatistics(
            log_prob=(label_logit - top - log_total).squeeze(-1),
            entropy=(log_total - weighted / total).squeeze(-1),
            top_k_entropy=entropy_from_log_probs(largest.log_softmax(-1)),
            sum_sq_probs=(sum_sq_exps / total.square()).squeeze(-1),
            is_top1=(first == labels).squeeze(-1),
            top_k=top_k,
        )
        if ranked:
            statistics = replace(
                statistics,
                first_choice=first.squeeze(-1),
                first_prob=total.reciprocal().squeeze(-1),
                rank=self.label_ranks(projection, labels, transform, shifted_memory),
            )
        return Scores(statistics, exps, total, top)

    def diverge(
        self,
        projection: Tensor,
        reference_projection: Tensor,
        labels: Tensor,
        scores: Scores,
        anchor: Anchor,
        transform: LogitTransform,
    ) -> Divergence:
        """See `chunk.Backend.diverge`."""
        logits = make_logits(projection, transform, torch.empty_like(scores.exps))
        reference_logits = make_logits(
            reference_projection, transform, torch.empty_like(scores.exps)
        )
        # Both are normalised in the same way. Two ways of rounding would hide a small divergence
        reference_log_probs = normalised(anchor.compared(reference_logits, labels))
        if anchor.without_label:
            log_probs = normalised(anchor.compared(logits, labels))
        else:
            log_probs = logits - scores.top - scores.total.log()
        return Divergence(*anchor.kl_and_gradient(log_probs, reference_log_probs))

    def gradient_(
        self,
        projection: Tensor,
        labels: Tensor,
        weights: Tensor,
        scores: Scores,
        transform: LogitTransform,
        divergence: Divergence | None = None,
        kl_coef: float = 0.0,
    ) -> Tensor:
        """See `chunk.Backend.gradient_`."""
        weights, labels = weights.unsqueeze(-1), labels.unsqueeze(-1)
        # d (weight * nll) / d logits = weight * (p - 1[label])
        same = projection.dtype == scores.exps.dtype  # and nothing that reads the logits again
        memory = projection if same and transform.softcap is None else scores.exps
        gradient = torch.mul(scores.exps, weights / scores.total, out=memory).scatter_add_(
            -1, self.vocabulary.columns(labels), -self.vocabulary.owned(weights, labels)
        )
        if divergence is not None:
            gradient.add_(divergence.gradient, alpha=kl_coef)
        if transform.softcap is not None:  # d tanh(x) / dx = 1 - tanh(x)^2
            logits = make_logits(projection, transform, self.scratch_like(projection)[0])
            gradient.mul_(1 - (logits / transform.softcap).square())
        if transform.logit_scale != 1.0:
            gradient.mul_(transform.logit_scale)
        return gradient if gradient is projection else projection.copy_(gradient)

    def label_ranks(
        self, projection: Tensor, labels: Tensor, transform: LogitTransform, memory: Tensor
    ) -> Tensor:
        """
        Return 1 + how many logits are above the label's, `[n]` int64.

        Args:
            projection: `[n, V]`, in the order of the logits.
            labels: `[n, 1]`.
            transform: makes logits of the projection; a negative scale reverses the order.
            memory: `[n, V]`, at least float32, is overwritten. A CPU compares and counts floats
                fastest.
        """
        projection = memory.copy_(projection)
        own = self.vocabulary.of_label(
            projection.gather(-1, self.vocabulary.columns(labels)), labels
        )
        compare = torch.gt if transform.logit_scale >= 0 else torch.lt
        above = compare(projection, own, out=memory).sum(-1)
        return 1 + self.vocabulary.sum(above).long()

    def scratch_like(self, projection: Tensor) -> Tensor:
        """
        Return memory for two blocks like this one, in the dtype of the statistics.

        It is the same memory on every call. Memory that is freed between small tensors that stay
        alive would not be reused.
        """
        dtype = torch.promote_types(projection.dtype, torch.float32)
        if self.scratch is None or self.scratch.shape[1] < len(projection):
            self.scratch = torch.empty(
                (2, *projection.shape), dtype=dtype, device=projection.device
            )
        return self.scratch[:, : len(projection)]


def normalised(logits: Tensor) -> Tensor:
    """Return the log-probabilities of logits `[n, V]`, computed like the statistics."""
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def find_largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Return the largest logit `[n, 1]`, the index of its first `[n, 1]`, and the `k` largest `[n, k]`
    in any order.

    They all lie in the k segments of a row that have the largest maxima. A plain maximum is ten
    times as fast as a maximum with its index, or as a selection.
    """
    width = logits.shape[1]
    whole = width - width % SEGMENT
    maxima = logits[:, :whole].unflatten(-1, (-1, SEGMENT)).amax(-1)
    if whole < width:
        maxima = torch.cat([maxima, logits[:, whole:].amax(-1, keepdim=True)], -1)
    within = torch.arange(SEGMENT, device=logits.device)

    def read(segments: Tensor) -> tuple[Tensor, Tensor]:
        columns = (segments.unsqueeze(-1) * SEGMENT + within).flatten(1)
        values = logits.gather(-1, columns.clamp(max=width - 1))
        return columns, values.masked_fill_(columns >= width, -torch.inf)

    top, segment = maxima.max(-1, keepdim=True)
    columns, values = read(segment)
    first = columns.gather(-1, values.argmax(-1, keepdim=True))
    _, values = read(maxima.topk(min(k, maxima.shape[-1]), sorted=False).indices)
    return top, first, values.topk(k, sorted=False).values


def make_logits(projection: Tensor, transform: LogitTransform, memory: Tensor) -> Tensor:
    """
    Return the logits, in `memory` and its dtype; the projection itself if it equals the logits.
    """
    if projection.dtype == memory.dtype and transform == LogitTransform():
        return projection
    logits = memory.copy_(projection)
    if transform.logit_scale != 1.0:
        logits.mul_(transform.logit_scale)
    if transform.softcap is not None:
        logits.div_(transform.softcap).tanh_().mul_(transform.softcap)
    return logits
