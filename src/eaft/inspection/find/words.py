"""
Figure 7 of arXiv:2601.02151 as tables: the tokens of high entropy, of low entropy and in confident
conflict.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft.inspection.labelled import Labelled, Vocabulary
from eaft.objective.statistics import HIGH_ENTROPY, LOW_ENTROPY, TokenStatistics

MOST_COUNTED, MOST_WANTED = 100, 5  # tokens of a group, first choices of a token
GROUPS = ("high_entropy", "low_entropy", "conflict")


def groups_of(stats: TokenStatistics) -> dict[str, NDArray[np.bool_]]:
    """Return which tokens are of each group."""
    masks = (stats.entropy >= HIGH_ENTROPY, stats.entropy <= LOW_ENTROPY, stats.is_conflict)
    return {name: mask.numpy() for name, mask in zip(GROUPS, masks, strict=True)}


class Words:
    """
    Counts by token id of each group, and what the model wanted instead of the most frequent ones.

    `add` all tokens, then `choose`, then `add_wanted` all tokens again.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.all = np.zeros(vocabulary.size, dtype=np.int64)
        self.counts = {name: np.zeros(vocabulary.size, dtype=np.int64) for name in GROUPS}
        self.nll = {name: np.zeros(vocabulary.size) for name in GROUPS}
        self.chosen: dict[str, NDArray[np.intp]] = {}
        self.wanted: dict[str, dict[int, Counter[int]]] = {}

    def add(self, tokens: Labelled) -> None:
        """Count tokens."""
        size = self.vocabulary.size
        self.all += np.bincount(tokens.token_id, minlength=size)
        for name, mask in groups_of(tokens.stats).items():
            labels = tokens.token_id[mask]
            self.counts[name] += np.bincount(labels, minlength=size)
            self.nll[name] += np.bincount(labels, tokens.quantities["nll"][mask], size)

    def choose(self) -> None:
        """Choose the most frequent tokens of each group."""
        for name, counts in self.counts.items():
            most = np.argsort(-counts, kind="stable")[:MOST_COUNTED]
            self.chosen[name] = most[counts[most] > 0]
            self.wanted[name] = {int(token): Counter() for token in self.chosen[name]}

    def add_wanted(self, tokens: Labelled) -> None:
        """Count the model's first choices where the label is one of those chosen."""
        for name, mask in groups_of(tokens.stats).items():
            mask &= np.isin(tokens.token_id, self.chosen[name]) & (
                tokens.first_choice != tokens.token_id
            )
            pairs = np.stack([tokens.token_id[mask], tokens.first_choice[mask]])
            for label, first, count in zip(
                *(x.tolist() for x in unique_columns(pairs)), strict=True
            ):
                self.wanted[name][label][first] += count

    def result(self) -> dict[str, list[dict[str, Any]]]:
        """
        Return the chosen tokens of each group, the most frequent first.

        `share` is of the group's tokens, `lift` that share over the token's share among all, `nll`
        the sum in the group in nats, and `wanted` the model's first choices there, of which the
        label is none.
        """
        return {
            name: [self.row(name, int(token)) for token in self.chosen[name]] for name in GROUPS
        }

    def row(self, group: str, token: int) -> dict[str, Any]:
        """Return a token's row."""
        count = int(self.counts[group][token])
        share = count / int(self.counts[group].sum())
        most = sorted(self.wanted[group][token].items(), key=lambda item: (-item[1], item[0]))[
            :MOST_WANTED
        ]
        return {
            **self.vocabulary.named(token),
            "count": count,
            "share": share,
            "lift": share / (int(self.all[token]) / int(self.all.sum())),
            "nll": float(self.nll[group][token]),
            "wanted": [{**self.vocabulary.named(first), "count": n} for first, n in most],
        }


def unique_columns(pairs: NDArray[np.int32]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the distinct columns of `pairs` `[2, n]`, and how often each occurs."""
    keys, counts = np.unique(
        pairs[0].astype(np.int64) << 32 | pairs[1].astype(np.int64), return_counts=True
    )
    return keys >> 32, keys & 0xFFFFFFFF, counts
