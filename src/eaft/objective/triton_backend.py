"""
The Triton backend: `score`, `diverge` and `gradient_` launch kernels that read a chunk's logits
once.

The mathematics and the tests are the same as for the torch backend. With `TRITON_INTERPRET=1` the
kernels need no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from eaft.objective.chunk import LogitTransform
from eaft.objective.registry import Anchor
from eaft.objective.statistics import TokenStatistics, entropy_from_log_probs
from eaft.objective.triton_kernels import diverge_kernel, gradient_kernel, score_kernel

LANES = 256

BLOCK = 8192  # logits of one step through a row; a lane's share of them is a group

MAX_TOP_K = 128  # for a larger K, torch finds the top K

ALIGNMENT = 16  # elements; rows padded to a multiple of it load as vectors


@dataclass(frozen=True)
class Scores:
    """
    The statistics, and the two numbers that normalise: ln P(v) = logit_v - top - log_total.
    """

    statistics: TokenStatistics
    top: Tensor  # [n] float32: the largest logit
    log_total: Tensor  # [n] float32: ln sum_v exp(logit_v - top)


@dataclass(frozen=True)
class Divergence:
    """
    The divergence, and the tensors that its gradient reads. If the anchor is without the label, the
    numbers that normalise are too.
    """

    kl: Tensor  # [n] float32, nats
    top: Tensor  # [n] float32: the policy's largest logit
    log_total: Tensor  # [n] float32: the policy's ln sum_v exp(logit_v - top)
    reference_projection: Tensor  # [n, V]
    reference_top: Tensor  # [n] float32
    reference_log_total: Tensor  # [n] float32
    anchor: Anchor


def layout(*projections: Tensor) -> dict[str, int]:
    """
    Return how rows are read: `VECTOR` elements by one load, up to `width`.

    A load has 128 bits if every row starts at a multiple of ALIGNMENT and its memory is padded to
    one; the padding is read and not used. Otherwise a load has one element, and loads end with the
    row.
    """
    n_columns = projections[0].shape[1]
    padded = triton.cdiv(n_columns, ALIGNMENT) * ALIGNMENT
    for projection in projections:
        room = (
            projection.untyped_storage().nbytes() // projection.itemsize
            - projection.storage_offset()
        )
        stride, last = projection.stride(0), (len(projection) - 1) * projection.stride(0)
        if (
            stride % ALIGNMENT
            or projection.data_ptr() % 16
            or stride < padded
            or room < last + padded
        ):
            return {"VECTOR": 1, "width": n_columns}
    return {"VECTOR": 16 // projections[0].itemsize, "width": padded}


def transform_arguments(transform: LogitTransform) -> dict[str, float | bool]:
    """Return a transform as arguments of the kernels."""
    return {
        "logit_scale": float(transform.logit_scale),
        "softcap": float(transform.softcap or 1.0),
        "HAS_SCALE": transform.logit_scale != 1.0,
        "HAS_SOFTCAP": transform.softcap is not None,
    }


def launch_options() -> dict[str, int | bool]:
    """Return the launch options of every kernel: one thread per lane, fused multiply-add."""
    return {"num_warps": LANES // (64 if torch.version.hip else 32), "enable_fp_fusion": True}


def block_rows(projection: Tensor) -> int:
    """
    Return how many rows `score`, `diverge` and `gradient_` take at a time: all, up to the limit of
    a grid's second axis.
    """
    return min(max(1, len(projection)), 65535)


def score(
    projection: Tensor, labels: Tensor, top_k: int, transform: LogitTransform, ranked: bool = False
) -> Scores:
    """
    Return the statistics of a chunk's tokens.

    Args:
        projection: `[n, V]` float32, bfloat16 or float16, each row contiguous. Rows padded to a
            multiple of 16 elements are read faster.
        labels: `[n]` int64, each in `[0, V)`.
        top_k: from 2 to V; above 128 the projection is read more than once.
        transform: makes logits of the projection.
        ranked: also return the first choice, its probability and the label's rank.
    """
    n, n_columns = projection.shape
    searched = top_k if top_k <= MAX_TOP_K else 0
    n_blocks = triton.next_power_of_2(triton.cdiv(n_columns, BLOCK))
    top, log_total, log_prob, entropy, top_k_entropy, sum_sq_probs = torch.empty(
        (6, n), dtype=torch.float32, device=projection.device
    )
    is_top1 = torch.empty(n, dtype=torch.int8, device=projection.device)
    first_choice, rank = torch.empty(
        (2, n if ranked else 0), dtype=torch.int64, device=projection.device
    )
    if n:
        with torch.cuda.device_of(projection):  # Triton launches on the current device
            score_kernel[(n,)](
                projection,
                projection.stride(0),
                labels.contiguous(),
                torch.empty(
                    (n, n_blocks * LANES) if searched else 1,
                    dtype=torch.float32,
                    device=projection.device,
                ),
                top,
                log_total,
                log_prob,
                entropy,
                top_k_entropy,
                sum_sq_probs,
                is_top1,
                first_choice,
                rank,
                n_columns,
                **layout(projection),
                **transform_arguments(transform),
                TOP_K=searched,
                TOP_K_POWER=triton.next_power_of_2(searched),
                RANKED=ranked,
                N_BLOCKS=n_blocks,
                SHORT_KEYS=projection.itemsize == 2
                and transform == LogitTransform()
                and n_blocks * LANES <= 2**16,
                BLOCK=BLOCK,
                LANES=LANES,
                **launch_options(),
            )
    if not searched:
        top_k_entropy = (
            entropy_of_top(projection, top_k, transform) + 0.0 * log_total
        )  # as in the kernel
    ranks = (
        {"first_choice": first_choice, "first_prob": log_total.neg().exp(), "rank": rank}
        if ranked
        else {}
    )
    stats = TokenStatistics(
        log_prob, entropy, top_k_entropy, sum_sq_probs, is_top1.bool(), top_k=top_k, **ranks
    )
    return Scores(stats, top, log_total)


def entropy_of_top(projection: Tensor, top_k: int, transform: LogitTransform) -> Tensor:
    """Return the entropy of the K largest logits in torch."""
    # A negative scale reverses the order
    z = (
        projection.topk(top_k, largest=transform.logit_scale >= 0, sorted=False).values.float()
        * transform.logit_scale
    )
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return entropy_from_log_probs(z.log_softmax(-1))


def diverge(
    projection: Tensor,
    reference_projection: Tensor,
    labels: Tensor,
    scores: Scores,
    anchor: Anchor,
    transform: LogitTransform,
) -> Divergence:
    """
    Return the divergence at each token, in nats, in the anchor's direction. Both projections and
    the labels are as in `score`.
    """
    n, n_columns = projection.shape
    kl, reference_top, reference_log_total = torch.empty(
        (3, n), dtype=torch.float32, device=projection.device
    )
    top, log_total = scores.top, scores.log_total
    if anchor.without_label:
        top, log_total = torch.empty((2, n), dtype=torch.float32, device=projection.device)
    if n:
        with torch.cuda.device_of(projection):
            diverge_kernel[(n,)](
                projection,
                projection.stride(0),
                reference_projection,
                reference_projection.stride(0),
                labels.contiguous(),
                kl,
                top,
                log_total,
                reference_top,
                reference_log_total,
                n_columns,
                **layout(projection, reference_projection),
                **transform_arguments(transform),
                FORWARD=anchor.direction == "forward",
                WITHOUT_LABEL=anchor.without_label,
                BLOCK=BLOCK // 2,
                LANES=LANES,
                **launch_options(),
            )
    return Divergence(
        kl, top, log_total, reference_projection, reference_top, reference_log_total, anchor
    )


def gradient_(
    projection: Tensor,
    labels: Tensor,
    weights: Tensor,
    scores: Scores,
    transform: LogitTransform,
    divergence: Divergence | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """
    Overwrite a projection with the gradient of sum_t weights_t * nll_t + kl_coef * KL_t by it, and
    return it.

    Args:
        projection: as in `score`; padding of its rows is overwritten too.
        labels: `[n]`.
        weights: `[n]`.
        scores: from `score`.
        transform: makes logits of the projection.
        divergence: from `diverge`; None without a KL term.
        kl_coef: the coefficient of the KL term.
    """
    n, n_columns = projection.shape
    if n:
        kl = (
            (projection, 0, *[scores.top] * 5)  # not read
            if divergence is None
            else (
                divergence.reference_projection,
                divergence.reference_projection.stride(0),
                divergence.top,
                divergence.log_total,
                divergence.reference_top,
                divergence.reference_log_total,
                divergence.kl,
            )
        )
        read = (
            (projection,) if divergence is None else (projection, divergence.reference_projection)
        )
        block = BLOCK // 2
        with torch.cuda.device_of(projection):
            # Neighbouring programs take neighbouring memory
            gradient_kernel[(triton.cdiv(n_columns, block), n)](
                projection,
                projection.stride(0),
                labels.contiguous(),
                scores.top,
                scores.log_total,
                weights.contiguous(),
                *kl,
                kl_coef,
                n_columns,
                **layout(*read),
                **transform_arguments(transform),
                KL="" if divergence is None else divergence.anchor.direction,
                WITHOUT_LABEL=divergence is not None and divergence.anchor.without_label,
                BLOCK=block,
                LANES=LANES,
                **launch_options(),
            )
    return projection
