"""
The vocabulary of a head: whole in one process, or its rows sharded over ranks (tensor parallelism).

Each rank scores the logits of its own rows. What is a maximum or a sum over the vocabulary is
merged over the ranks, `[n, 1]` or `[n, K]` numbers each; no rank sees another's logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Vocabulary:
    """The whole vocabulary in this process: merging changes nothing."""

    def size(self, rows: int) -> int:
        """Return how many tokens there are, from how many rows this process has."""
        return rows

    def widest(self, rows: int) -> int:
        """Return the most rows of a process. All processes must make chunks of equal size."""
        return rows

    def columns(self, labels: Tensor) -> Tensor:
        """Return the column of each label among this process's logits; any if it is not here."""
        return labels

    def owned(self, values: Tensor, labels: Tensor) -> Tensor:
        """Return values `[n, 1]` of labels `[n, 1]`, and 0 for a label that is not here."""
        return values

    def of_label(self, values: Tensor, labels: Tensor) -> Tensor:
        """Return values `[n, 1]` of labels `[n, 1]`, each from the process that has the label."""
        return values

    def maximum(self, values: Tensor) -> Tensor:
        """Return the maximum over processes, element by element."""
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over processes, element by element."""
        return values

    def first(self, columns: Tensor, here: Tensor) -> Tensor:
        """Return the lowest token id `[n, 1]` of the columns `[n, 1]` for which `here` is true."""
        return columns

    def largest(self, values: Tensor, k: int) -> Tensor:
        """Return the `k` largest over processes of each process's largest values `[n, <= k]`."""
        return values


WHOLE = Vocabulary()


@dataclass(frozen=True)
class ShardedVocabulary(Vocabulary):
    """Consecutive rows of the head on each rank of a group, in the order of the ranks."""

    group: Any  # a torch.distributed.ProcessGroup
    rows: tuple[int, ...]  # of each rank

    @property
    def start(self) -> int:
        """The token id of this rank's first row."""
        return sum(self.rows[: dist.get_rank(self.group)])

    def size(self, rows: int) -> int:
        """See `Vocabulary`."""
        return sum(self.rows)

    def widest(self, rows: int) -> int:
        """See `Vocabulary`."""
        return max(self.rows)

    def here(self, labels: Tensor) -> Tensor:
        """Return which labels this rank has, bool."""
        start = self.start
        return (labels >= start) & (labels < start + self.rows[dist.get_rank(self.group)])

    def columns(self, labels: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return (labels - self.start).where(self.here(labels), 0)

    def owned(self, values: Tensor, labels: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return values.where(self.here(labels), 0)

    def of_label(self, values: Tensor, labels: Tensor) -> Tensor:
        """See `Vocabulary`."""
        merged = self.sum(self.owned(values, labels))
        # No rank has a label beyond the vocabulary; a loss of NaN is noticed, a logit of 0 is not
        return merged.where((labels >= 0) & (labels < self.size(0)), torch.nan)

    def maximum(self, values: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return self.reduced(values, dist.ReduceOp.MAX)

    def sum(self, values: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return self.reduced(values, dist.ReduceOp.SUM)

    def first(self, columns: Tensor, here: Tensor) -> Tensor:
        """See `Vocabulary`."""
        ids = (columns + self.start).where(here, self.size(0))
        return self.reduced(ids, dist.ReduceOp.MIN)

    def largest(self, values: Tensor, k: int) -> Tensor:
        """See `Vocabulary`."""
        values = F.pad(values, (0, k - values.shape[-1]), value=-torch.inf).contiguous()
        parts = [torch.empty_like(values) for _ in self.rows]
        dist.all_gather(parts, values, group=self.group)
        return torch.cat(parts, -1).topk(k, sorted=False).values

    def reduced(self, values: Tensor, operation: Any) -> Tensor:
        """Return the values reduced over the ranks."""
        values = values.clone()
        dist.all_reduce(values, operation, group=self.group)
        return values


def shard_vocabulary(group: Any, rows: int, device: torch.device) -> ShardedVocabulary:
    """
    Return the vocabulary whose rows lie on the ranks of a group. Every rank must call this.

    Args:
        group: a `torch.distributed.ProcessGroup`.
        rows: of this rank.
        device: one that the group communicates with.
    """
    own = torch.tensor([rows], device=device)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return ShardedVocabulary(group, tuple(int(part) for part in parts))
