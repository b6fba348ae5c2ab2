"""Figure 6 of arXiv:2601.02151: how close the top-K entropy is to the exact one, and its cost."""

from __future__ import annotations

import time
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eaft.inspection.score.examples import Examples
from eaft.inspection.score.model import ScoringModel
from eaft.inspection.summary import TopKRow
from eaft.objective.statistics import entropy_from_log_probs

KS = (2, 5, 10, 20, 50, 100, 200, 500, 1000)
REPEATS = 3
BLOCK = 256  # tokens at a time, whatever K
# The sample of logits: tokens, examples that they are from, and elements of all logits
SAMPLE_TOKENS, SAMPLE_EXAMPLES, SAMPLE_LOGITS = 2048, 64, 10**8


def sample_logits(model: ScoringModel, examples: Examples, seed: int) -> Tensor:
    """
    Return the logits of labelled tokens from examples that are spread evenly over the data.

    Args:
        model: that computes them.
        examples: of the data.
        seed: of the choice of tokens within an example.

    Returns:
        `[n, V]`, float32, on the CPU.
    """
    left = min(SAMPLE_TOKENS, max(1, SAMPLE_LOGITS // model.vocab_size))
    rng, logits = np.random.default_rng(seed), []
    rows = np.flatnonzero(examples.labelled)
    spread = np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE_EXAMPLES)).round().astype(int)
    candidates = rows[spread].tolist()
    for done, i in enumerate(candidates):
        tokens = examples.tokens(range(i, i + 1))
        positions = np.flatnonzero(tokens.labelled)
        share = min(len(positions), -(-left // (len(candidates) - done)))
        chosen = np.sort(rng.choice(positions, share, replace=False))
        logits.append(model.logits(tokens.ids.tolist(), chosen))
        left -= share
    return torch.cat(logits)


def top_k_curve(logits: Tensor, ks: tuple[int, ...] = KS) -> list[TopKRow]:
    """
    Return what the top-K entropy is worth, for each K below the vocabulary's size and for all.

    The time is the median of three runs on the device of `logits`: selecting the K largest logits,
    except if K is the whole vocabulary, and computing their entropy. The memory counts the
    tensors alive at once for a block of 256 tokens; a kernel's own workspace is not counted.

    Args:
        logits: `[n, V]`, float32.
        ks: values of K.

    Returns:
        An empty list for fewer than two tokens.
    """
    from scipy.stats import pearsonr, spearmanr

    n, vocab_size = logits.shape
    if n < 2:
        return []
    exact = compute(logits, None).double().cpu().numpy()
    rows = []
    for k in [*(k for k in ks if k < vocab_size), vocab_size]:
        seconds = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            entropy = compute(logits, k if k < vocab_size else None).double().cpu().numpy()
            seconds.append(time.perf_counter() - began)
        with LiveBytes() as live:
            compute(logits[:BLOCK], k if k < vocab_size else None)
        varies = np.ptp(entropy) > 0 and np.ptp(exact) > 0
        rows.append(
            TopKRow(
                k=k,
                pearson=float(pearsonr(entropy, exact).statistic) if varies else None,
                spearman=float(spearmanr(entropy, exact).statistic) if varies else None,
                seconds=float(np.median(seconds)) * 1000 / n,
                mib=live.peak / 2**20,
            )
        )
    return rows


def compute(logits: Tensor, k: int | None) -> Tensor:
    """Return the top-K entropy `[n]` in nats, or the exact entropy if K is None."""
    blocks = [
        entropy_from_log_probs(
            (block if k is None else block.topk(k, sorted=False).values).log_softmax(-1)
        )
        for block in logits.split(BLOCK)
    ]
    return torch.cat(blocks)


class LiveBytes(TorchDispatchMode):
    """
    Counts the bytes of the tensors that are made in its context.

    Attributes:
        peak: the most bytes alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shared = {
            tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)
        }
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            storage = tensor.untyped_storage()
            # A view of a counted tensor, or of the logits, needs no memory of its own
            if storage.data_ptr() not in shared | self.storages:
                self.storages.add(storage.data_ptr())
                self.live += storage.nbytes()
                weakref.finalize(tensor, self.free, storage.data_ptr(), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return made

    def free(self, storage: int, size: int) -> None:
        """Subtract a tensor that was freed."""
        self.storages.discard(storage)
        self.live -= size
