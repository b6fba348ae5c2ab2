"""
What is scored: the data's rows as they are trained on, then the model's own answers to their
prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from eaft.arrow import flat
from eaft.errors import ConfigurationError
from eaft.inspection.summary import DATA, ROLLOUTS
from eaft.training.data import row_digest
from eaft.training.prepare import PreparedRows

# A shard is what a killed run loses at most: 16 of small data, so that processes have something to
# share
SHARD_TOKENS, SMALLEST_SHARD, SHARDS = 2**17, 2**13, 16
CONVERSATION = (
    "messages",
    "prompt",
    "conversations",
)  # columns of rows that are more than plain text or token ids


@dataclass(frozen=True)
class Rollout:
    """The model's own answer to the prompt of a row."""

    row: int
    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True)
class Tokens:
    """The tokens of consecutive examples, one after another."""

    ids: np.ndarray  # int64
    labelled: np.ndarray  # bool; an example's first token is nobody's label
    lengths: np.ndarray  # int64, of each example

    @property
    def starts(self) -> np.ndarray:
        """Where each example begins."""
        return self.lengths.cumsum() - self.lengths


class Examples:
    """
    The examples, by number; only their lengths are in memory.

    Args:
        rows: the data as prepared.
        dataset: the same rows as they were.
        name: of the data set.
        rollouts: answers to rows' prompts.

    Attributes:
        lengths: int64 `[examples]`, tokens of each.
        labelled: int64 `[rows]`, labelled tokens of each row of the data.

    Raises:
        ConfigurationError: the data has labels that are other tokens than its own.
    """

    def __init__(
        self, rows: PreparedRows, dataset: Dataset, name: str, rollouts: list[Rollout]
    ) -> None:
        self.rows, self.dataset, self.name, self.rollouts = rows, dataset, name, rollouts
        self.cut, self.whole = (part.with_format("arrow") for part in (rows.cut, rows.whole))
        lengths, labelled = [], []
        for table in self.cut.iter(1024):
            tokens = labelled_tokens(table)
            lengths.append(tokens.lengths)
            labelled.append(count_labelled(tokens))
        lengths.append(
            np.array([len(r.prompt_ids) + len(r.answer_ids) for r in rollouts], dtype=np.int64)
        )
        self.lengths, self.labelled = np.concatenate(lengths), np.concatenate(labelled)

    def shards(self) -> list[range]:
        """
        Return the examples of each file, of about as many tokens; the same however many processes
        there are.
        """
        size = min(SHARD_TOKENS, max(SMALLEST_SHARD, int(self.lengths.sum()) // SHARDS))
        found = []
        for begin, stop in ((0, len(self.dataset)), (len(self.dataset), len(self.lengths))):
            start, tokens = begin, 0
            for i in range(begin, stop):
                tokens += int(self.lengths[i])
                if tokens >= size or i + 1 == stop:
                    found.append(range(start, i + 1))
                    start, tokens = i + 1, 0
        return found

    def origin(self, part: range) -> str:
        """Return where the examples of a shard are from."""
        return DATA if part.stop <= len(self.dataset) else ROLLOUTS

    def row(self, example: int) -> int:
        """Return the row of the data set that an example is from."""
        rollout = example - len(self.dataset)
        return example if rollout < 0 else self.rollouts[rollout].row

    def tokens(self, part: range) -> Tokens:
        """Return the tokens of a shard's examples."""
        if self.origin(part) == DATA:
            return labelled_tokens(self.cut[part.start : part.stop])
        rollouts = self.rollouts[part.start - len(self.dataset) : part.stop - len(self.dataset)]
        sides = [side for r in rollouts for side in (r.prompt_ids, r.answer_ids)]
        labelled = np.repeat(np.tile([False, True], len(rollouts)), [len(side) for side in sides])
        return Tokens(np.concatenate(sides), labelled, self.lengths[part.start : part.stop])

    def about(self, part: range) -> dict[str, list[Any]]:
        """
        Return what is known of a shard's examples before they are scored, by column of `EXAMPLES`.
        """
        origin, rows = self.origin(part), [self.dataset[self.row(i)] for i in part]
        cut = cut_labelled = [0] * len(part)
        if origin == DATA:
            left, whole = self.tokens(part), labelled_tokens(self.whole[part.start : part.stop])
            cut = (whole.lengths - left.lengths).tolist()
            cut_labelled = (count_labelled(whole) - count_labelled(left)).tolist()
        return {
            "example": list(part),
            "origin": [origin] * len(part),
            "source": [
                str(row["source"]) if row.get("source") is not None else self.name for row in rows
            ],
            "row": [self.row(i) for i in part],
            "digest": [row_digest(row) for row in rows],
            "messages": [as_it_was(row) if origin == DATA else None for row in rows],
            "cut": cut,
            "cut_labelled": cut_labelled,
        }

    def prompts(self, n: int) -> list[tuple[int, list[int]]]:
        """
        Return the prompts of `n` rows, spread evenly over those that have one, each with its row.

        A row's prompt is its tokens up to the first that is labelled.

        Raises:
            ConfigurationError: no row has one.
        """
        lengths = np.concatenate([prompt_lengths(table["labels"]) for table in self.cut.iter(1024)])
        rows = np.flatnonzero(lengths)
        if len(rows) == 0:
            raise ConfigurationError(
                f"rollouts={n}: no row has a prompt, tokens before the first labelled one. Give"
                " prompt and completion, or messages with --assistant_only_loss; plain text has no"
                " question to answer."
            )
        chosen = rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).round().astype(int)]
        return [(int(i), self.rows.cut[int(i)]["input_ids"][: lengths[i]]) for i in chosen]


def labelled_tokens(table: Any) -> Tokens:
    """Return the tokens of prepared rows."""
    (ids, lengths), (labels, _) = flat(table["input_ids"]), flat(table["labels"])
    labelled = labels >= 0
    if (labels != ids)[labelled].any():
        raise ConfigurationError(
            "The data has labels that are other tokens than those of input_ids: not inspected."
        )
    labelled[(lengths.cumsum() - lengths)[lengths > 0]] = False
    return Tokens(ids, labelled, lengths.astype(np.int64))


def count_labelled(tokens: Tokens) -> np.ndarray:
    """Return how many tokens of each example are labelled."""
    total = np.concatenate([[0], tokens.labelled.cumsum()])
    return total[tokens.starts + tokens.lengths] - total[tokens.starts]


def prompt_lengths(column: Any) -> np.ndarray:
    """Return how many tokens of each row are before its first label; 0 where there is no label."""
    labels, lengths = flat(column)
    places = np.append(np.flatnonzero(labels >= 0), len(labels))
    starts = lengths.cumsum() - lengths
    first = places[np.searchsorted(places, starts)] - starts
    return np.where(first < lengths, first, 0)


def as_it_was(row: dict[str, Any]) -> str | None:
    """Return a row as JSON if it is more than plain text or token ids."""
    if not any(name in row for name in CONVERSATION):
        return None
    return json.dumps(row, default=str, ensure_ascii=False)


def batches(tokens: Tokens, budget: int) -> Iterator[list[int]]:
    """
    Yield examples of about one length, padded to the longest of at most `budget` tokens; the
    longest first.
    """
    with_labels = np.flatnonzero(count_labelled(tokens))
    order = with_labels[np.argsort(-tokens.lengths[with_labels], kind="stable")]
    batch: list[int] = []
    for i in order.tolist():
        if batch and tokens.lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
