"""The matrix products of the fused loss: sums in float32, in memory that is used again."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of a block of rows that is cast for a product on a CPU
CAST_BUDGET = 2**25


class Projector:
    """
    hidden @ weight.T + bias, one chunk of tokens at a time, always in the same memory.
    """

    def __init__(
        self,
        hidden: Tensor,  # (labelled, hidden_size)
        weight: Tensor,  # (vocab_size, hidden_size)
        bias: Tensor | None,  # (vocab_size,)
        dtype: torch.dtype,
        size: int,  # of the largest chunk
    ) -> None:
        self.hidden, self.weight = hidden.to(dtype), weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        # On a GPU every row starts at a multiple of 16 elements, for vector loads
        width = 16 * math.ceil(len(weight) / 16) if weight.is_cuda else len(weight)
        self.memory = torch.empty((size, width), dtype=dtype, device=weight.device)[
            :, : len(weight)
        ]

    def __call__(self, rows: slice) -> Tensor:
        """Return the projection of some rows, `[n, V]`."""
        out = self.memory[: rows.stop - rows.start]
        if self.bias is None:
            return torch.mm(self.hidden[rows], self.weight.T, out=out)
        return torch.addmm(self.bias, self.hidden[rows], self.weight.T, out=out)


def add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Return total + a @ b in `dtype`; the total is overwritten. For None, return a @ b.

    A float32 sum adds unrounded products. Rounding the product of each chunk first would bias it.
    """
    if a.dtype == dtype:
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if a.is_cuda:
        if total is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.addmm(total, a, b, out_dtype=dtype, out=total)
    # torch has no such product for a CPU: cast a few rows at a time
    first = total is None
    total = (
        torch.empty((a.shape[0], b.shape[1]), dtype=dtype, device=a.device)
        if total is None
        else total
    )
    b = b.to(dtype)
    size = max(1, CAST_BUDGET // (max(1, len(b)) * dtype.itemsize))
    with bfloat16_products(a.dtype):
        for some_total, some_a in zip(total.split(size), a.split(size), strict=True):
            some_total.addmm_(some_a.to(dtype), b, beta=0 if first else 1)
    return total


@contextlib.contextmanager
def bfloat16_products(dtype: torch.dtype) -> Iterator[None]:
    """
    Let oneDNN multiply float32 numbers as bfloat16, which is exact if they were cast from bfloat16.

    Sums stay float32. If the processor has no bfloat16 product, nothing changes.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Return gradient * factor (a scalar) in `dtype`, in one pass. If the gradient has this dtype, it
    is overwritten.
    """
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    # With one dimension, the factor is not rounded to the gradient's dtype first: 1 / N in bfloat16
    # would be wrong by up to 0.4% for all elements alike. A CPU casts into new memory, so it
    # takes a few rows at a time
    factor = factor.view(1)
    size = (
        len(gradient)
        if gradient.is_cuda
        else max(1, CAST_BUDGET // (4 * max(1, gradient[:1].numel())))
    )
    for some_gradient, some_out in zip(
        gradient.split(max(1, size)), out.split(max(1, size)), strict=True
    ):
        torch.mul(some_gradient, factor, out=some_out)
    return out
