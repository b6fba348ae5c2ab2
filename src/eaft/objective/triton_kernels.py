"""
The Triton kernels: each reads a chunk's logits once.

A kernel walks through a row in blocks. Each lane (a thread) has its own columns, with its own
maximum and sums, so that lanes exchange nothing before the end of the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Logits further than this below the largest have probability 0 in float32; a bound keeps 0 * -inf
# out of the sums
LOWEST = tl.constexpr(-120.0)
# A maximum starts from this: -inf would make -inf - -inf
NOTHING = tl.constexpr(-3.4028234663852886e38)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """
    Return e^x with a relative error of |x| / 2^24, as `tl.exp` does.

    `tl.exp` spends three more instructions on results below 1e-38, which are 0 here.
    """
    return tl.exp2(x * LOG2_E)


@triton.jit
def to_logits(projection, logit_scale, softcap, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Turn a projection into float32 logits."""
    z = projection.to(tl.float32)
    # Added to 0 in one step, so that no product is fused, unrounded, with what is subtracted from
    # it later
    if HAS_SCALE:
        z = tl.fma(z, logit_scale, 0.0)
    if HAS_SOFTCAP:
        tanh = 1 - 2 / (1 + exp(z * (2 / softcap)))
        z = tl.fma(tanh, softcap, 0.0)
    return z


@triton.jit
def block_columns(start, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """
    Return the columns of a block as `[repeats, LANES, VECTOR]`: each lane loads VECTOR neighbours
    at a time.
    """
    repeat = tl.arange(0, BLOCK // (LANES * VECTOR))[:, None, None]
    lane, place = tl.arange(0, LANES)[None, :, None], tl.arange(0, VECTOR)[None, None, :]
    return start + repeat * (LANES * VECTOR) + lane * VECTOR + place


@triton.jit
def load_logits(
    row_ptr,
    columns,
    n_columns,
    width,
    logit_scale,
    softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """
    Load the logits of some columns; columns from `n_columns` on are -inf. Memory is readable up to
    `width`.
    """
    x = tl.load(row_ptr + columns, mask=columns < width, other=0.0)
    return tl.where(
        columns < n_columns,
        to_logits(x, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP),
        -float("inf"),
    )


@triton.jit
def lane_max(z):
    """Return the largest logit of each lane's share of a block."""
    return tl.max(tl.max(z, axis=2), axis=0)


@triton.jit
def lane_sum(x):
    """Return the sum of each lane's share of a block."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def below(z, top):
    """Return z - top, bounded from below; a NaN stays."""
    return tl.maximum(z - top, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add_block(z, biggest, top, total, weighted, squares):
    """
    Add a block to each lane's sums of e, e * (z - top) and e^2, where e = exp(z - top) and top is
    the lane's largest logit so far.
    """
    new_top = tl.maximum(top, biggest)
    shift = below(top, new_top)
    scale = exp(shift)
    d = below(z, new_top[None, :, None])
    e = exp(d)
    weighted = scale * (weighted + total * shift) + lane_sum(e * d)
    total = scale * total + lane_sum(e)
    squares = scale * scale * squares + lane_sum(e * e)
    return new_top, total, weighted, squares


@triton.jit
def sortable(value, index, dtype: tl.constexpr):
    """
    Pack values that `dtype` holds exactly, and their indices (below 2^16 if it has 16 bits), into
    keys that have the order of the values.
    """
    if dtype.primitive_bitwidth == 16:
        bits = value.to(dtype).to(tl.int16, bitcast=True)
        return ((bits ^ ((bits >> 15) & 0x7FFF)).to(tl.int32) << 16) | index
    else:
        bits = value.to(tl.int32, bitcast=True)
        return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | index


@triton.jit
def indices_of_largest(keys, K: tl.constexpr):
    """Return the indices in the K largest keys of `sortable`."""
    return (tl.topk(keys, K) & (0xFFFF if keys.dtype.primitive_bitwidth == 32 else 0xFFFFFFFF)).to(
        tl.int32
    )


@triton.jit
def score_kernel(
    projection_ptr,
    stride,
    labels_ptr,
    groups_ptr,  # scratch [n, N_BLOCKS, LANES]: the largest logit of each group
    top_ptr,
    log_total_ptr,
    log_prob_ptr,
    entropy_ptr,
    top_k_entropy_ptr,
    sum_sq_probs_ptr,
    is_top1_ptr,
    first_choice_ptr,
    rank_ptr,
    n_columns,
    width,
    logit_scale,
    softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TOP_K: tl.constexpr,  # 0: not computed here
    TOP_K_POWER: tl.constexpr,  # at least TOP_K, a power of 2
    RANKED: tl.constexpr,  # also the first choice, and the label's rank
    N_BLOCKS: tl.constexpr,  # at least n_columns / BLOCK, a power of 2
    # the logits in memory have 16 bits, and there are at most 2^16 groups
    SHORT_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """
    One program per token: maximum, sums of exponentials and of squares, entropy; the top K are
    looked for in the groups with the largest maxima.
    """
    row = tl.program_id(0).to(tl.int64)
    projection_row, groups_row = (
        projection_ptr + row * stride,
        groups_ptr + row * (N_BLOCKS * LANES),
    )
    lane = tl.arange(0, LANES)
    columns = block_columns(0, BLOCK, LANES, VECTOR)
    lane_top = tl.full((LANES,), NOTHING, tl.float32)
    first_block = tl.zeros((LANES,), tl.int32)  # where the lane's largest logit is first
    total, weighted, squares = (
        tl.zeros((LANES,), tl.float32),
        tl.zeros((LANES,), tl.float32),
        tl.zeros((LANES,), tl.float32),
    )
    label = tl.load(labels_ptr + row).to(tl.int32)
    # A label outside the vocabulary is not hidden: its nll is NaN
    known = (label >= 0) & (label < n_columns)
    label_logit = tl.load(projection_row + label, mask=known, other=0.0)
    label_logit = to_logits(label_logit, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    label_logit = tl.where(known, label_logit, float("nan"))
    above = tl.zeros((LANES,), tl.int32)  # how many logits are above the label's
    full_blocks = n_columns // BLOCK
    for block in tl.range(full_blocks, num_stages=2):  # the next block is loaded meanwhile
        x = tl.load(projection_row + block * BLOCK + columns)
        z = to_logits(x, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        biggest = lane_max(z)
        if TOP_K > 0:
            tl.store(groups_row + block * LANES + lane, biggest)
        if RANKED:
            above += lane_sum((z > label_logit).to(tl.int32))
        first_block = tl.where(biggest > lane_top, block, first_block)
        lane_top, total, weighted, squares = add_block(
            z, biggest, lane_top, total, weighted, squares
        )
    if full_blocks * BLOCK < n_columns:  # the last block is cut off
        z = load_logits(
            projection_row,
            full_blocks * BLOCK + columns,
            n_columns,
            width,
            logit_scale,
            softcap,
            HAS_SCALE,
            HAS_SOFTCAP,
        )
        biggest = lane_max(z)
        if TOP_K > 0:
            tl.store(groups_row + full_blocks * LANES + lane, biggest)
        if RANKED:
            above += lane_sum((z > label_logit).to(tl.int32))
        first_block = tl.where(biggest > lane_top, full_blocks, first_block)
        lane_top, total, weighted, squares = add_block(
            z, biggest, lane_top, total, weighted, squares
        )

    top = tl.max(lane_top, axis=0)
    shift = below(lane_top, top)
    scale = exp(shift)
    weighted = tl.sum(scale * (weighted + total * shift), axis=0)
    total = tl.sum(scale * total, axis=0)
    squares = tl.sum(scale * scale * squares, axis=0)
    log_total = tl.log(total)
    tl.store(top_ptr + row, top)
    tl.store(log_total_ptr + row, log_total)
    tl.store(log_prob_ptr + row, label_logit - top - log_total)
    tl.store(entropy_ptr + row, log_total - weighted / total)
    tl.store(sum_sq_probs_ptr + row, squares / (total * total))

    # Of equal logits, the first lies in the first block that has one
    block = tl.min(tl.where(lane_top == top, first_block, N_BLOCKS), axis=0)
    is_top1 = label_logit == top
    if is_top1 | RANKED:
        columns_of_first = block * BLOCK + columns
        z = load_logits(
            projection_row,
            columns_of_first,
            n_columns,
            width,
            logit_scale,
            softcap,
            HAS_SCALE,
            HAS_SOFTCAP,
        )
        earliest = tl.min(tl.ravel(tl.where(z == top, columns_of_first, n_columns)), axis=0)
        is_top1 = earliest == label
        if RANKED:
            tl.store(
                first_choice_ptr + row, tl.minimum(earliest, n_columns - 1)
            )  # a NaN is never the largest
            tl.store(rank_ptr + row, 1 + tl.sum(above, axis=0))
    tl.store(is_top1_ptr + row, is_top1.to(tl.int8))

    # The K largest logits lie in the K lanes with the largest maxima, and in the K groups of these
    # with the largest: if one lay elsewhere, K others were as large
    if TOP_K > 0:
        tl.debug_barrier()  # wait until every group is written
        dtype: tl.constexpr = projection_ptr.dtype.element_ty if SHORT_KEYS else tl.float32
        picked = indices_of_largest(sortable(lane_top, lane, dtype), TOP_K_POWER)
        blocks = tl.arange(0, N_BLOCKS)[None, :]
        groups = blocks * LANES + picked[:, None]
        largest = tl.load(groups_row + groups, mask=blocks * BLOCK < n_columns, other=-float("inf"))
        keys = tl.reshape(sortable(largest, groups, dtype), (TOP_K_POWER * N_BLOCKS,))
        picked = indices_of_largest(keys, TOP_K_POWER)
        start = (picked // LANES) * BLOCK + (picked % LANES) * VECTOR
        member = tl.arange(0, BLOCK // LANES)[None, :]
        columns_of_picked = start[:, None] + (member // VECTOR) * (LANES * VECTOR) + member % VECTOR
        z = load_logits(
            projection_row,
            columns_of_picked,
            n_columns,
            width,
            logit_scale,
            softcap,
            HAS_SCALE,
            HAS_SOFTCAP,
        )
        largest = tl.topk(tl.reshape(z, (TOP_K_POWER * (BLOCK // LANES),)), TOP_K_POWER)
        d = below(largest, top)
        e = tl.where(tl.arange(0, TOP_K_POWER) < TOP_K, exp(d), 0.0)
        k_total = tl.sum(e, axis=0)
        # The search may miss a NaN among the logits; the total contains it
        tl.store(
            top_k_entropy_ptr + row, tl.log(k_total) - tl.sum(e * d, axis=0) / k_total + 0.0 * total
        )


@triton.jit
def diverge_kernel(
    projection_ptr,
    stride,
    reference_ptr,
    reference_stride,
    labels_ptr,
    kl_ptr,
    top_ptr,
    log_total_ptr,
    reference_top_ptr,
    reference_log_total_ptr,
    n_columns,
    width,
    logit_scale,
    softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FORWARD: tl.constexpr,
    WITHOUT_LABEL: tl.constexpr,  # the label counts as a token that cannot occur, in both models
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """
    One program per token: KL(q || p) forward, KL(p || q) reverse, with policy p and reference q.

    ln q - ln p = d - ln(total_q / total_p) with d = (z_q - z_p) - (top_q - top_p). For models that
    are nearly equal every term is small, and so is its rounding.
    """
    row = tl.program_id(0).to(tl.int64)
    p_row, q_row = projection_ptr + row * stride, reference_ptr + row * reference_stride
    columns = block_columns(0, BLOCK, LANES, VECTOR)
    p_top, q_top = tl.full((LANES,), NOTHING, tl.float32), tl.full((LANES,), NOTHING, tl.float32)
    p_total, q_total = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    weighted = tl.zeros(
        (LANES,), tl.float32
    )  # sum of e * d, with q's e forward and p's e reverse; d from the lane's tops
    if WITHOUT_LABEL:
        label = tl.load(labels_ptr + row).to(tl.int32)
    for start in range(0, n_columns, BLOCK):
        p = load_logits(
            p_row, start + columns, n_columns, width, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP
        )
        q = load_logits(
            q_row, start + columns, n_columns, width, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP
        )
        if WITHOUT_LABEL:
            p = tl.where(start + columns == label, -float("inf"), p)
            q = tl.where(start + columns == label, -float("inf"), q)
        new_p_top, new_q_top = tl.maximum(p_top, lane_max(p)), tl.maximum(q_top, lane_max(q))
        p_scale, q_scale = exp(below(p_top, new_p_top)), exp(below(q_top, new_q_top))
        e_p = exp(below(p, new_p_top[None, :, None]))
        e_q = exp(below(q, new_q_top[None, :, None]))
        e = e_q if FORWARD else e_p
        apart = new_q_top - new_p_top
        # A token with probability 0 adds 0, whatever its probability in the other model
        added = lane_sum(tl.where(e > 0, e * (q - p - apart[None, :, None]), 0.0))
        moved = weighted + (q_total if FORWARD else p_total) * (q_top - p_top - apart)
        weighted = moved * (q_scale if FORWARD else p_scale) + added
        p_total = p_total * p_scale + lane_sum(e_p)
        q_total = q_total * q_scale + lane_sum(e_q)
        p_top, q_top = new_p_top, new_q_top
    top_p, top_q = tl.max(p_top, axis=0), tl.max(q_top, axis=0)
    p_scale, q_scale = exp(below(p_top, top_p)), exp(below(q_top, top_q))
    moved = weighted + (q_total if FORWARD else p_total) * (q_top - p_top - (top_q - top_p))
    weighted = tl.sum(moved * (q_scale if FORWARD else p_scale), axis=0)
    total_p, total_q = tl.sum(p_total * p_scale, axis=0), tl.sum(q_total * q_scale, axis=0)
    # ln(total_q / total_p), from their difference if they are close
    x = (total_q - total_p) / total_p
    log_ratio = tl.where(tl.abs(x) < 1e-3, x - x * x * (0.5 - x / 3), tl.log(total_q / total_p))
    tl.store(
        kl_ptr + row, weighted / total_q - log_ratio if FORWARD else log_ratio - weighted / total_p
    )
    if WITHOUT_LABEL:  # else they are the scores'
        tl.store(top_ptr + row, top_p)
        tl.store(log_total_ptr + row, tl.log(total_p))
    tl.store(reference_top_ptr + row, top_q)
    tl.store(reference_log_total_ptr + row, tl.log(total_q))


@triton.jit
def gradient_kernel(
    projection_ptr,
    stride,
    labels_ptr,
    top_ptr,
    log_total_ptr,
    weights_ptr,
    reference_ptr,
    reference_stride,
    kl_top_ptr,
    kl_log_total_ptr,
    reference_top_ptr,
    reference_log_total_ptr,
    kl_ptr,
    kl_coef,
    n_columns,
    width,
    logit_scale,
    softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KL: tl.constexpr,  # "" without a KL term; "forward"; "reverse"
    WITHOUT_LABEL: tl.constexpr,  # as in `diverge_kernel`
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """
    Overwrite a block of a token's projection with the gradient of weight * nll + kl_coef * KL.

    The gradient by the logits: weight * (p - 1[label]), plus kl_coef times p - q (forward) or
    p (ln p - ln q - KL) (reverse); without the label, p and q are normalised without it.
    """
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = block_columns(block * BLOCK, BLOCK, LANES, VECTOR)
    projection_row = projection_ptr + row * stride
    z = load_logits(
        projection_row, columns, n_columns, width, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP
    )
    top, log_total, weight = (
        tl.load(top_ptr + row),
        tl.load(log_total_ptr + row),
        tl.load(weights_ptr + row),
    )
    label = tl.load(labels_ptr + row).to(tl.int32)
    p = exp(z - top - log_total)
    gradient = weight * (p - (columns == label).to(tl.float32))
    if KL != "":
        if WITHOUT_LABEL:
            top, log_total = tl.load(kl_top_ptr + row), tl.load(kl_log_total_ptr + row)
            z_p = tl.where(columns == label, -float("inf"), z)
            p = exp(z_p - top - log_total)
        q_row = reference_ptr + row * reference_stride
        z_q = load_logits(
            q_row, columns, n_columns, width, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP
        )
        top_q, log_total_q = (
            tl.load(reference_top_ptr + row),
            tl.load(reference_log_total_ptr + row),
        )
        if WITHOUT_LABEL:
            z_q = tl.where(columns == label, -float("inf"), z_q)
        if KL == "forward":
            gradient += kl_coef * (p - exp(z_q - top_q - log_total_q))
        else:
            constant = (top - top_q) + (log_total - log_total_q) + tl.load(kl_ptr + row)
            gradient += tl.where(p > 0, kl_coef * p * (z - z_q - constant), 0.0)
    if HAS_SOFTCAP:
        share = z / softcap
        gradient *= 1 - share * share  # d tanh(x) / dx = 1 - tanh(x)^2
    if HAS_SCALE:
        gradient *= logit_scale
    tl.store(
        projection_row + columns, gradient.to(projection_ptr.dtype.element_ty), mask=columns < width
    )
