"""
Triton kernels for CUDA: one read of a token's logits for all its statistics, one pass turns them into the gradient.

The same mathematics as `eaft.objective.fused.fold_block`, held to the same tests. With `TRITON_INTERPRET=1` they need
no GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits of one step through a row
GROUP = 64  # logits of which only the largest is remembered until the top K are looked for


@triton.jit
def load_logits(row_ptr, columns, mask, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Load a projection as float32 logits, scaled and capped; -inf where `mask` is false."""
    z = tl.load(row_ptr + columns, mask=mask, other=0.0).to(tl.float32) * logit_scale
    if HAS_SOFTCAP:
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)  # tanh
    return tl.where(mask, z, -float("inf"))


@triton.jit
def times(e, x):
    """Return e * x, 0 where e is 0 and x may be -inf."""
    return tl.where(e > 0, e * x, 0.0)


@triton.jit
def statistics_kernel(
    z_ptr,
    z_stride,
    labels_ptr,
    groups_ptr,  # scratch [n, GROUPS]: the largest logit of each group
    top_ptr,
    log_total_ptr,
    log_prob_ptr,
    entropy_ptr,
    top_k_entropy_ptr,
    sum_sq_probs_ptr,
    is_top1_ptr,
    n_columns,
    logit_scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_POWER: tl.constexpr,  # at least TOP_K, a power of 2
    GROUPS: tl.constexpr,  # at least n_columns / GROUP, a power of 2
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program a token: maximum, sums of exponentials and of squares, entropy; the top K by way of the groups."""
    row = tl.program_id(0).to(tl.int64)
    z_row, groups_row = z_ptr + row * z_stride, groups_ptr + row * GROUPS
    top, first = -float("inf"), -1
    total, weighted, squares = 0.0, 0.0, 0.0  # sums of e, e * (z - top), e^2 with e = exp(z - top)
    for start in range(0, n_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = load_logits(z_row, columns, columns < n_columns, logit_scale, softcap, HAS_SOFTCAP)
        group = start // GROUP + tl.arange(0, BLOCK // GROUP)
        tl.store(groups_row + group, tl.max(tl.reshape(z, (BLOCK // GROUP, GROUP)), axis=1), mask=group < GROUPS)
        block_top, block_first = tl.max(z, axis=0), tl.argmax(z, axis=0)
        first = tl.where(block_top > top, start + block_first, first)
        new_top = tl.maximum(top, block_top)
        # Until a finite logit is met every sum is 0, whatever it is shifted by
        shift = tl.where(top == -float("inf"), 0.0, top - new_top)
        reference = tl.where(new_top == -float("inf"), 0.0, new_top)
        e = tl.exp(z - reference)
        scale = tl.exp(shift)
        weighted = scale * (weighted + total * shift) + tl.sum(times(e, z - reference), axis=0)
        total = scale * total + tl.sum(e, axis=0)
        squares = scale * scale * squares + tl.sum(e * e, axis=0)
        top = new_top
    log_total = tl.log(total)
    label = tl.load(labels_ptr + row)
    label_logit = load_logits(z_row, label, label >= 0, logit_scale, softcap, HAS_SOFTCAP)
    tl.store(top_ptr + row, top)
    tl.store(log_total_ptr + row, log_total)
    tl.store(log_prob_ptr + row, label_logit - top - log_total)
    tl.store(entropy_ptr + row, log_total - weighted / total)
    tl.store(sum_sq_probs_ptr + row, squares / (total * total))
    tl.store(is_top1_ptr + row, (first == label).to(tl.int8))

    # The K largest logits lie in the K groups with the largest maxima: if one lay elsewhere, K others were as large
    tl.debug_barrier()
    group = tl.arange(0, GROUPS)
    n_groups = tl.cdiv(n_columns, GROUP)
    maxima = tl.load(groups_row + group, mask=group < n_groups, other=-float("inf"))
    slot = tl.arange(0, TOP_K_POWER)
    picked = tl.full((TOP_K_POWER,), -1, tl.int32)
    for i in range(TOP_K):
        largest, where = tl.max(maxima, axis=0), tl.argmax(maxima, axis=0)
        picked = tl.where(slot == i, tl.where(largest > -float("inf"), where, -1), picked)
        maxima = tl.where(group == where, -float("inf"), maxima)
    columns = tl.reshape(picked[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (TOP_K_POWER * GROUP,))
    z = load_logits(z_row, columns, (columns >= 0) & (columns < n_columns), logit_scale, softcap, HAS_SOFTCAP) - top
    candidate = tl.arange(0, TOP_K_POWER * GROUP)
    k_total, k_weighted = 0.0, 0.0
    for _ in range(TOP_K):
        largest, where = tl.max(z, axis=0), tl.argmax(z, axis=0)
        e = tl.exp(largest)
        k_total += e
        k_weighted += times(e, largest)
        z = tl.where(candidate == where, -float("inf"), z)
    tl.store(top_k_entropy_ptr + row, tl.log(k_total) - k_weighted / k_total)


@triton.jit
def gradient_kernel(
    z_ptr,
    z_stride,
    labels_ptr,
    top_ptr,
    log_total_ptr,
    weights_ptr,
    n_columns,
    logit_scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite a block of a token's projection with the gradient of weight * nll: weight * (p - 1[label])."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < n_columns
    z_row = z_ptr + row * z_stride
    z = load_logits(z_row, columns, mask, logit_scale, softcap, HAS_SOFTCAP)
    p = tl.exp(z - tl.load(top_ptr + row) - tl.load(log_total_ptr + row))
    gradient = tl.load(weights_ptr + row) * (p - (columns == tl.load(labels_ptr + row)).to(tl.float32))
    if HAS_SOFTCAP:
        gradient *= 1 - (z / softcap) * (z / softcap)  # d tanh(x) / dx = 1 - tanh(x)^2
    tl.store(z_row + columns, (gradient * logit_scale).to(z_ptr.dtype.element_ty), mask=mask)


def token_sums(z: Tensor, labels: Tensor, top_k: int, logit_scale: float, softcap: float | None) -> dict[str, Tensor]:
    """
    Return the fields of `TokenStatistics` of a projection `[n, V]`, and `top` and `log_total` for the gradient.

    Args:
        z: float32, bfloat16 or float16, rows contiguous.
        labels: `[n]` int64, each in `[0, V)`.
        top_k: at most V.
        logit_scale: what the projection is multiplied by.
        softcap: c of c * tanh(logits / c), or None.
    """
    n, n_columns = z.shape
    # One group may be cut off by the last block, so there is room for whole blocks
    groups = triton.next_power_of_2(triton.cdiv(n_columns, BLOCK) * (BLOCK // GROUP))
    names = ("top", "log_total", "log_prob", "entropy", "top_k_entropy", "sum_sq_probs")
    sums = {name: torch.empty(n, dtype=torch.float32, device=z.device) for name in names}
    sums["is_top1"] = torch.empty(n, dtype=torch.int8, device=z.device)
    if n:
        statistics_kernel[(n,)](
            z,
            z.stride(0),
            labels,
            torch.empty((n, groups), dtype=torch.float32, device=z.device),
            *sums.values(),
            n_columns,
            logit_scale,
            softcap or 0.0,
            HAS_SOFTCAP=softcap is not None,
            TOP_K=top_k,
            TOP_K_POWER=triton.next_power_of_2(top_k),
            GROUPS=groups,
            BLOCK=BLOCK,
            GROUP=GROUP,
            num_warps=8,
        )
    sums["is_top1"] = sums["is_top1"].bool()
    return sums


def gradient_(
    z: Tensor, labels: Tensor, weights: Tensor, sums: dict[str, Tensor], logit_scale: float, softcap: float | None
) -> None:
    """Overwrite a projection `[n, V]` with the gradient of sum_t weights_t * nll_t; `sums` are of `token_sums`."""
    n, n_columns = z.shape
    if n:
        gradient_kernel[(n, triton.cdiv(n_columns, BLOCK))](
            z,
            z.stride(0),
            labels,
            sums["top"],
            sums["log_total"],
            weights,
            n_columns,
            logit_scale,
            softcap or 0.0,
            HAS_SOFTCAP=softcap is not None,
            BLOCK=BLOCK,
            num_warps=8,
        )
