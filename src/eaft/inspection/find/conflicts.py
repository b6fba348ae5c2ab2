"""
Confident conflicts of the data, and whether each is over format or over content.

A conflict counts as *content* if the label and the model's first choice are two different words or
numbers, as ` Rome` for ` Paris`, or ` the` for ` a`. It counts as *format*

- if one of the two is special, or has no letter and no digit (`<<`, a line's end, an end of turn);
- if the two differ only in capitals and spaces, or in where the tokenizer splits the text: ` PAR`
  for ` Paris` where the text goes on with `IS`;
- if the label has no digit, opens a line or an answer, and is in conflict there in many examples.
  It is then a heading or a set phrase of the writer. Many is a fifth of the examples with a label,
  and at least three.

The rule reads single tokens. So a minus for a plus is format, and a rare heading with another name
is content.
"""

from __future__ import annotations

import math
import unicodedata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft.inspection.labelled import Labelled
from eaft.inspection.score.pieces import BYTE_TOKEN
from eaft.inspection.summary import TokenNll
from eaft.inspection.vocabulary import Vocabulary

RECURRING_SHARE, RECURRING_EXAMPLES = 0.2, 3
MOST_LABELS = 10  # of a kind that are listed
MARKS = " \t#*_->|`"  # may stand between a line's beginning and its first word
MOST_MARKS = 3  # tokens of them
# Bytes that begin an emoji, a symbol or a punctuation mark; others are parts of letters
SYMBOL_BYTES = ("<0xF0>", "<0xE2>", "<0xC2>")
# Parts of the Unicode names of scripts that write no space between words
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


class Conflicts:
    """Sums over the conflicts of the data, by label."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary, self.texts = vocabulary, vocabulary.texts
        self.is_word = np.zeros(vocabulary.size, dtype=bool)  # a word or a number
        self.has_digit = np.zeros(vocabulary.size, dtype=bool)
        self.ends_line = np.zeros(vocabulary.size, dtype=bool)  # or a turn
        self.is_mark = np.zeros(vocabulary.size, dtype=bool)
        for token, text in vocabulary.texts.items():
            is_special = token in vocabulary.special
            self.is_word[token] = not is_special and is_word(text)
            self.has_digit[token] = any(c.isdigit() for c in BYTE_TOKEN.sub("", text))
            self.ends_line[token] = is_special or text.rstrip(" \t").endswith(("\n", "\r"))
            self.is_mark[token] = not is_special and not text.strip(MARKS)
        # Sums over all conflicts
        self.nll = np.zeros(vocabulary.size)
        self.counts = np.zeros(vocabulary.size, dtype=np.int64)
        self.all_nll = 0.0  # of all tokens
        # Sums over the conflicts between two different words or numbers
        self.words_nll = np.zeros(vocabulary.size)
        self.words_counts = np.zeros(vocabulary.size, dtype=np.int64)
        # The part of these sums where the label opens a line
        self.opening_nll = np.zeros(vocabulary.size)
        self.opening_counts = np.zeros(vocabulary.size, dtype=np.int64)
        # The number of examples in which the label opens a line and is in conflict
        self.examples = np.zeros(vocabulary.size, dtype=np.int64)
        self.labelled_examples = 0
        self.last_example, self.labels_of_last = -1, np.zeros(0, dtype=np.int32)
        self.last_token, self.last_opens = 0, False

    def add(self, tokens: Labelled) -> None:
        """Add tokens of the data, in order."""
        conflict = tokens.stats.is_conflict.numpy()
        label, size = tokens.token_id[conflict], self.vocabulary.size
        nll = tokens.quantities["nll"]
        self.all_nll += float(nll.sum())
        nll = nll[conflict]
        self.counts += np.bincount(label, minlength=size)
        self.nll += np.bincount(label, nll, size)
        words, opens = self.are_two_words(tokens, conflict), self.opens_line(tokens)[conflict]
        self.words_counts += np.bincount(label[words], minlength=size)
        self.words_nll += np.bincount(label[words], nll[words], size)
        opening = words & opens
        self.opening_counts += np.bincount(label[opening], minlength=size)
        self.opening_nll += np.bincount(label[opening], nll[opening], size)
        self.count_examples(tokens.example, tokens.example[conflict][opens], label[opens])

    def are_two_words(self, tokens: Labelled, conflict: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """
        Return for each conflict whether label and first choice are two different words or numbers.

        Args:
            tokens: `n` tokens, in order.
            conflict: `[n]`.
        """
        places = np.flatnonzero(conflict)
        pairs, of_pair = np.unique(
            np.stack([tokens.token_id[places], tokens.first_choice[places]]),
            axis=1,
            return_inverse=True,
        )
        found = [self.differ(*pair) for pair in pairs.T.tolist()]
        differ = np.array([bool(answer) for answer in found], dtype=bool)[of_pair.ravel()]
        depends = np.array([answer is None for answer in found], dtype=bool)[of_pair.ravel()]
        for i in np.flatnonzero(depends).tolist():
            first = self.texts[int(tokens.first_choice[places[i]])].strip().casefold()
            text = self.text_from(tokens, int(places[i]), len(first))
            differ[i] = not text.startswith(first)
        return differ

    def differ(self, label: int, first: int) -> bool | None:
        """
        Return whether a label and a first choice are two different words or numbers.

        Return None if the text that follows decides it.
        """
        if not all(token in self.texts and self.is_word[token] for token in (label, first)):
            return False
        one, other = (self.texts[token].strip().casefold() for token in (label, first))
        if one == other or self.has_digit[label] or self.has_digit[first]:
            return one != other
        if other.startswith(one):
            return None
        return not (one.startswith(other) and is_unspaced(other))

    def text_from(self, tokens: Labelled, place: int, length: int) -> str:
        """Return at least `length` characters of an example from a token on, or all there are."""
        text, end = "", place
        while (
            len(text) < length
            and end < len(tokens.example)
            and tokens.example[end] == tokens.example[place]
        ):
            text = (text + self.texts[int(tokens.token_id[end])]).lstrip()
            end += 1
        return text.casefold()

    def opens_line(self, tokens: Labelled) -> NDArray[np.bool_]:
        """Return for each token, `[n]`, whether it opens a line or an answer."""
        if not len(tokens.token_id):
            return np.zeros(0, dtype=bool)
        before = np.concatenate([[self.last_token], tokens.token_id[:-1]])
        example = np.concatenate([[self.last_example], tokens.example[:-1]])
        opens: NDArray[np.bool_] = (example != tokens.example) | self.ends_line[before]
        for _ in range(MOST_MARKS):
            opens |= self.is_mark[before] & np.concatenate([[self.last_opens], opens[:-1]])
        self.last_token, self.last_opens = int(tokens.token_id[-1]), bool(opens[-1])
        return opens

    def count_examples(
        self, all_examples: NDArray[Any], example: NDArray[Any], label: NDArray[Any]
    ) -> None:
        """
        Count the examples in which each label opens a line and is in conflict.

        An example may continue from the batch before.

        Args:
            all_examples: `[tokens]`, the example of every token of the batch.
            example: `[conflicts]`, the example of every conflict that opens a line.
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
        return (
            self.words_nll - np.where(habit, self.opening_nll, 0.0),
            self.words_counts - np.where(habit, self.opening_counts, 0),
        )

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


def is_word(text: str) -> bool:
    """
    Return whether a token's text has a letter, a digit or a mark that belongs to a letter.

    A part of a character counts as a letter unless its bytes begin a symbol.
    """
    rest = BYTE_TOKEN.sub("", text)
    if not rest and text:
        return not text.startswith(SYMBOL_BYTES)
    return any(c.isalnum() or unicodedata.category(c) in ("Mn", "Mc") for c in rest)


def is_unspaced(text: str) -> bool:
    """Return whether a script without spaces between words is in the text."""
    return any(unicodedata.name(c, "").startswith(UNSPACED) for c in text)
