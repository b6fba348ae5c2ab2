"""
Confident conflicts of the data, and whether each is over format or over content.

A conflict counts as *content* if the label and the model's first choice are two different words or
numbers, as ` Rome` for ` Paris`. It counts as *format*

- if one of the two is special, or has no letter and no digit (`<<`, a line's end, an end of turn);
- if the two differ only in capitals, in spaces, or in where the tokenizer splits them (` PAR` for
  ` Paris`);
- if the label has no digit and is in conflict in many examples. It is then a habit of the writer,
  since facts differ from example to example. Many is a fifth of the examples with a label, and at
  least three.

The rule reads single tokens. So a minus for a plus is format, and a rare heading with another name
is content.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft.inspection.labelled import Labelled
from eaft.inspection.score.pieces import BYTE_TOKEN
from eaft.inspection.summary import TokenNll
from eaft.inspection.vocabulary import Vocabulary

RECURRING_SHARE, RECURRING_EXAMPLES = 0.2, 3
MOST_LABELS = 10  # of a kind that are listed


class Conflicts:
    """Sums over the conflicts of the data, by label."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.is_word = np.zeros(vocabulary.size, dtype=bool)  # a word or a number
        self.has_digit = np.zeros(vocabulary.size, dtype=bool)
        for token, text in vocabulary.texts.items():
            self.is_word[token] = token not in vocabulary.special and any(c.isalnum() for c in text)
            self.has_digit[token] = any(c.isdigit() for c in BYTE_TOKEN.sub("", text))
        # Sums over all conflicts
        self.nll = np.zeros(vocabulary.size)
        self.counts = np.zeros(vocabulary.size, dtype=np.int64)
        # Sums over the conflicts between two different words or numbers
        self.words_nll = np.zeros(vocabulary.size)
        self.words_counts = np.zeros(vocabulary.size, dtype=np.int64)
        # The number of examples in which the label is in conflict
        self.examples = np.zeros(vocabulary.size, dtype=np.int64)
        self.labelled_examples = 0
        self.last_example, self.labels_of_last = -1, np.zeros(0, dtype=np.int32)

    def add(self, tokens: Labelled) -> None:
        """Add tokens of the data, in order."""
        conflict = tokens.stats.is_conflict.numpy()
        label, first = tokens.token_id[conflict], tokens.first_choice[conflict]
        nll, size = tokens.quantities["nll"][conflict], self.vocabulary.size
        self.counts += np.bincount(label, minlength=size)
        self.nll += np.bincount(label, nll, size)
        words = self.are_two_words(label, first)
        self.words_counts += np.bincount(label[words], minlength=size)
        self.words_nll += np.bincount(label[words], nll[words], size)
        self.count_examples(tokens.example, tokens.example[conflict], label)

    def are_two_words(self, label: NDArray[Any], first: NDArray[Any]) -> NDArray[np.bool_]:
        """
        Return for each token whether its label and first choice are two different words or numbers.

        Args:
            label: `[n]`.
            first: `[n]`.
        """
        pairs, of_pair = np.unique(np.stack([label, first]), axis=1, return_inverse=True)
        differ = np.array([self.differ(*pair) for pair in pairs.T.tolist()], dtype=bool)
        return differ[of_pair.ravel()]

    def differ(self, label: int, first: int) -> bool:
        """Return whether a label and a first choice are two different words or numbers."""
        texts = self.vocabulary.texts
        if not all(token in texts and self.is_word[token] for token in (label, first)):
            return False
        one, other = ("".join(texts[token].casefold().split()) for token in (label, first))
        if self.has_digit[label] or self.has_digit[first]:
            return one != other
        return not (one.startswith(other) or other.startswith(one))

    def count_examples(
        self, all_examples: NDArray[Any], example: NDArray[Any], label: NDArray[Any]
    ) -> None:
        """
        Count the examples in which each label is in conflict.

        An example may continue from the batch before.

        Args:
            all_examples: `[tokens]`, the example of every token of the batch.
            example: `[conflicts]`, the example of every conflict.
            label: `[conflicts]`.
        """
        if not len(all_examples):
            return
        goes_on = all_examples[0] == self.last_example
        self.labelled_examples += len(np.unique(all_examples)) - int(goes_on)
        pairs = np.unique(example.astype(np.int64) << 32 | label)
        example, label = pairs >> 32, pairs & 0xFFFFFFFF
        new = ~((example == self.last_example) & np.isin(label, self.labels_of_last))
        self.examples += np.bincount(label[new], minlength=self.vocabulary.size)
        labels_of_last = label[example == all_examples[-1]]
        if all_examples[-1] == self.last_example:
            labels_of_last = np.union1d(labels_of_last, self.labels_of_last)
        self.last_example, self.labels_of_last = int(all_examples[-1]), labels_of_last

    def content(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """
        Return the nll and the number of content conflicts by label, `[vocabulary]` each.

        All other conflicts are format.
        """
        many = max(RECURRING_EXAMPLES, math.ceil(RECURRING_SHARE * self.labelled_examples))
        habit = (self.examples >= many) & ~self.has_digit
        return np.where(habit, 0.0, self.words_nll), np.where(habit, 0, self.words_counts)

    def content_share(self) -> float | None:
        """Return the share of content in the conflicts' nll; None if there are no conflicts."""
        total = self.nll.sum()
        return float(self.content()[0].sum() / total) if total else None

    def top_format(self) -> list[TokenNll]:
        """Return the labels with most nll in format conflicts."""
        nll, counts = self.content()
        return self.top(self.nll - nll, self.counts - counts)

    def top_content(self) -> list[TokenNll]:
        """Return the labels with most nll in content conflicts."""
        return self.top(*self.content())

    def top(self, nll: NDArray[np.float64], counts: NDArray[np.int64]) -> list[TokenNll]:
        """Return the labels with most nll; `nll` and `counts` are `[vocabulary]`."""
        most = np.argsort(-nll, kind="stable")[:MOST_LABELS]
        return [
            TokenNll(
                **vars(self.vocabulary.named(token)),
                count=int(counts[token]),
                nll=float(nll[token]),
            )
            for token in most
            if counts[token] > 0
        ]
