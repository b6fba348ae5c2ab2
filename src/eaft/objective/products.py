"""The matrix products of the fused loss: sums in float32, in memory that is used again."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of a block that is cast on a CPU. Larger ones leave the cache, and each takes fresh memory
CAST_BUDGET = 2**22


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
        hidden = self.hidden[rows]
        if cast_first(hidden):
            hidden = hidden.float()
            with bfloat16_products(self.weight.dtype):
                for i, weight in cast_blocks(self.weight):
                    logits = torch.mm(hidden, weight.T)
                    out[:, i] = logits if self.bias is None else logits.add_(self.bias[i])
            return out
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=out)
        return torch.addmm(self.bias, hidden, self.weight.T, out=out)

    def multiply(self, grad_logits: Tensor, out: Tensor) -> Tensor:
        """Return grad_logits @ weight, `[n, hidden_size]`, in `out`."""
        if not cast_first(grad_logits):
            return torch.mm(grad_logits, self.weight, out=out)
        total = torch.zeros(out.shape, device=out.device)
        with bfloat16_products(self.weight.dtype):
            for i, weight in cast_blocks(self.weight):
                total.addmm_(grad_logits[:, i].float(), weight)
        return out.copy_(total)


def add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Return total + a @ b in `dtype`; the total is overwritten. For None, return a @ b.

    A float32 sum adds unrounded products. Rounding the product of each chunk first would bias it.
    """
    if a.dtype == dtype and not (total is None and cast_first(a)):
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if a.is_cuda:
        if total is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.addmm(total, a, b, out_dtype=dtype, out=total)
    # torch has no such product for a CPU: cast a few rows at a time
    first = total is None
    if total is None:
        total = torch.empty((a.shape[0], b.shape[1]), dtype=dtype, device=a.device)
    b = b.float()
    with bfloat16_products(a.dtype):
        for i, some in cast_blocks(a):
            if dtype == torch.float32:
                total[i].addmm_(some, b, beta=0 if first else 1)
            else:
                total[i] = torch.mm(some, b)
    return total


def cast_blocks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield a few rows at a time, cast to float32: which they are, and themselves."""
    size = max(1, CAST_BUDGET // (4 * max(1, matrix.shape[1])))
    for start in range(0, len(matrix), size):
        rows = slice(start, min(start + size, len(matrix)))
        yield rows, matrix[rows].float()


def cast_first(matrix: Tensor) -> bool:
    """Return whether a product with this matrix is faster after a cast to float32."""
    return matrix.dtype == torch.bfloat16 and matrix.device.type == "cpu" and slow_bfloat16()


@functools.cache
def slow_bfloat16() -> bool:
    """
    Return whether this CPU multiplies bfloat16 at less than three quarters of its rate for float32.

    Many do: those without instructions for it, and some that have them. Measured once a process, in
    about 0.1 s.
    """
    matrices = [torch.ones(128, 1024, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    best = [math.inf, math.inf]
    for _ in range(30):  # the fastest of so many is hardly disturbed by other programs
        for i, matrix in enumerate(matrices):
            start = time.perf_counter()
            torch.mm(matrix, matrix.T)
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] < 0.75 * best[1]


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
