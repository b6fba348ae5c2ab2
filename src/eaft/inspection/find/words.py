"""
Tables of the most frequent tokens of high entropy, of low entropy and in confident conflict.

They are Figure 7 of arXiv:2601.02151.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from eaft.inspection.labelled import Labelled
from eaft.inspection.summary import CountedToken, GroupToken, TokenGroups
from eaft.inspection.vocabulary import Vocabulary
from eaft.objective.statistics import HIGH_ENTROPY, LOW_ENTROPY, TokenStatistics

MOST_COUNTED, MOST_WANTED = 100, 5  # tokens of a group, first choices of a token
GROUPS = ("high_entropy", "low_entropy", "conflict")


def groups_of(stats: TokenStatistics) -> dict[str, NDArray[np.bool_]]:
    """Return for each group which of the `n` tokens are in it, `[n]`."""
    masks = (stats.entropy >= HIGH_ENTROPY, stats.entropy <= LOW_ENTROPY, stats.is_conflict)
    return {name: mask.numpy() for name, mask in zip(GROUPS, masks, strict=True)}


class Words:
    """
    Counts of each group by token id, and what the model wanted instead of the frequent tokens.

    Call `add` with all tokens, then `choose`, then `add_wanted` with all tokens again.
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
        """Count the model's first choices where the label is a chosen token."""
        for name, mask in groups_of(tokens.stats).items():
            is_chosen = np.isin(tokens.token_id, self.chosen[name])
            mask = mask & is_chosen & (tokens.first_choice != tokens.token_id)
            labels, firsts, counts = count_pairs(tokens.token_id[mask], tokens.first_choice[mask])
            for label, first, count in zip(
                labels.tolist(), firsts.tolist(), counts.tolist(), strict=True
            ):
                self.wanted[name][label][first] += count

    def result(self) -> TokenGroups:
        """Return the chosen tokens of each group, the most frequent first."""
        return TokenGroups(**{name: self.rows(name) for name in GROUPS})

    def rows(self, group: str) -> list[GroupToken]:
        """Return the chosen tokens of a group."""
        return [self.row(group, int(token)) for token in self.chosen[group]]

    def row(self, group: str, token: int) -> GroupToken:
        """Return a token of a group."""
        count = int(self.counts[group][token])
        share = count / int(self.counts[group].sum())
        by_count = sorted(self.wanted[group][token].items(), key=lambda item: (-item[1], item[0]))
        return GroupToken(
            **vars(self.vocabulary.named(token)),
            count=count,
            share=share,
            lift=share / (int(self.all[token]) / int(self.all.sum())),
            nll=float(self.nll[group][token]),
            wanted=[
                CountedToken(**vars(self.vocabulary.named(first)), count=n)
                for first, n in by_count[:MOST_WANTED]
            ],
        )


def count_pairs(
    labels: NDArray[np.int32], firsts: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """
    Return the distinct pairs of label and first choice, and how often each occurs.

    Args:
        labels: `[n]`.
        firsts: `[n]`.

    Returns:
        Labels, first choices and counts, `[pairs]` each.
    """
    pairs = labels.astype(np.int64) << 32 | firsts.astype(np.int64)
    distinct, counts = np.unique(pairs, return_counts=True)
    return distinct >> 32, distinct & 0xFFFFFFFF, counts
