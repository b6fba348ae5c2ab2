"""Figure 6 of arXiv:2601.02151: how well the top-K entropy stands for the exact one, and its cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from eaft.objective.statistics import entropy_from_log_probs

KS = (2, 5, 10, 20, 50, 100, 500, 2000, 10000)
REPEATS = 3


@torch.no_grad()
def top_k_curve(logits: Tensor, ks: Sequence[int] = KS) -> list[dict[str, Any]]:
    """
    Return for each K the correlations of the top-K with the exact entropy, and what it costs; the last K is all of V.

    Args:
        logits: `[n, V]`, n at least 2; computed in float32.
        ks: those above V are left out.

    Returns:
        Rows of `k`, `pearson`, `spearman` (None where an entropy does not vary), `seconds` (median of three for these n
        tokens, from their logits) and `mib`: on CUDA the peak above the logits; else computed, the largest
        probabilities in float32, their indices in int64, and three tensors of float32 of their size.
    """
    logits = logits.float()
    tokens, vocab_size = logits.shape
    exact = entropy_from_log_probs(logits.log_softmax(-1)).double().cpu()
    rows = []
    for k in [*(k for k in ks if k < vocab_size), vocab_size]:

        def compute(k: int = k) -> Tensor:
            largest = logits if k == vocab_size else logits.topk(k, sorted=False).values
            return entropy_from_log_probs(largest.log_softmax(-1))

        entropy, seconds, peak = timed(compute, logits.device)
        computed = tokens * k * (3 * 4 + (0 if k == vocab_size else 4 + 8))
        varies = float(entropy.std()) > 0 and float(exact.std()) > 0
        rows.append(
            {
                "k": k,
                "pearson": float(pearsonr(entropy, exact).statistic) if varies else None,
                "spearman": float(spearmanr(entropy, exact).statistic) if varies else None,
                "seconds": seconds,
                "mib": (computed if peak is None else peak) / 2**20,
            }
        )
    return rows


def timed(compute: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float, int | None]:
    """Return what is computed, in float64 on the CPU, its median time, and on CUDA the peak of memory it added."""
    cuda = device.type == "cuda"
    result, times, peak = compute(), [], None
    for _ in range(REPEATS):
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        begin = time.perf_counter()
        result = compute()
        if cuda:
            torch.cuda.synchronize(device)
            peak = torch.cuda.max_memory_allocated(device) - before
        times.append(time.perf_counter() - begin)
    return result.double().cpu(), statistics.median(times), peak
