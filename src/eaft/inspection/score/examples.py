"""
The examples that are scored: the data's rows as training sees them, then the model's own answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from eaft.arrow import flat
from eaft.errors import ConfigurationError
from eaft.inspection.score.stopping import SHARD_ROWS
from eaft.inspection.summary import DATA, ROLLOUTS
from eaft.training.data import row_digest
from eaft.training.prepare import PreparedRows

# A killed run loses at most one shard. Small data has 16 shards, so that processes can share them
SHARD_TOKENS, SMALLEST_SHARD, SHARDS = 2**17, 2**13, 16
# A row with one of these columns is more than plain text or token ids
CONVERSATION = ("messages", "prompt", "conversations")


@dataclass(frozen=True)
class Prompt:
    """The prompt of a row."""

    row: int  # among the prepared rows
    ids: list[int]


@dataclass(frozen=True)
class Rollout:
    """The model's own answer to the prompt of a row."""

    row: int  # among the prepared rows
    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True)
class Tokens:
    """The tokens of consecutive examples, one after another."""

    ids: NDArray[Any]  # int64
    labelled: NDArray[Any]  # bool; an example's first token is never a label
    lengths: NDArray[Any]  # int64, of each example

    @property
    def starts(self) -> NDArray[Any]:
        """Where each example begins."""
        return self.lengths.cumsum() - self.lengths


class Examples:
    """
    The examples by number. Memory holds only their lengths.

    Args:
        rows: the prepared data.
        dataset: the same rows before they were prepared.
        name: of the data set.
        rollouts: the model's own answers to prompts of the data.
        numbers: of the rows, if they are chosen from the data in random order; None: all, in order.

    Attributes:
        lengths: int64 `[examples]`, the number of tokens of each example.
        labelled: int64 `[rows]`, the number of labelled tokens of each row of the data.

    Raises:
        ConfigurationError: a label of the data is another token than the token at its position.
    """

    def __init__(
        self,
        rows: PreparedRows,
        dataset: Dataset,
        name: str,
        rollouts: list[Rollout],
        numbers: list[int] | None = None,
    ) -> None:
        self.rows, self.dataset, self.name, self.rollouts = rows, dataset, name, rollouts
        self.numbers = numbers
        self.cut, self.whole = (part.with_format("arrow") for part in (rows.cut, rows.whole))
        lengths, labelled = [], []
        for table in self.cut.iter(1024):
            tokens = tokens_of(table)
            lengths.append(tokens.lengths)
            labelled.append(count_labelled(tokens))
        lengths.append(
            np.array([len(r.prompt_ids) + len(r.answer_ids) for r in rollouts], dtype=np.int64)
        )
        self.lengths, self.labelled = np.concatenate(lengths), np.concatenate(labelled)

    def with_rollouts(self, rollouts: list[Rollout]) -> Examples:
        """Return the same examples of the data, and these answers."""
        return Examples(self.rows, self.dataset, self.name, rollouts, self.numbers)

    def first(self, n: int) -> Examples:
        """Return the first `n` examples of the data, without answers."""
        rows = PreparedRows(*(part.select(range(n)) for part in (self.rows.cut, self.rows.whole)))
        return Examples(rows, self.dataset.select(range(n)), self.name, [], self.numbers)

    def shards(self) -> list[range]:
        """
        Return the examples of each shard; all shards have about the same number of tokens.

        They do not depend on the number of processes. A shard has examples of one origin. Rows in
        random order are `SHARD_ROWS` a shard, however many follow.
        """
        size = min(SHARD_TOKENS, max(SMALLEST_SHARD, int(self.lengths.sum()) // SHARDS))
        shards = []
        for begin, stop in ((0, len(self.dataset)), (len(self.dataset), len(self.lengths))):
            start, tokens = begin, 0
            by_rows = self.numbers is not None and begin == 0
            for i in range(begin, stop):
                tokens += int(self.lengths[i])
                full = i + 1 - start == SHARD_ROWS if by_rows else tokens >= size
                if full or i + 1 == stop:
                    shards.append(range(start, i + 1))
                    start, tokens = i + 1, 0
        return shards

    def origin(self, part: range) -> str:
        """Return the origin of a shard's examples, `DATA` or `ROLLOUTS`."""
        return DATA if part.stop <= len(self.dataset) else ROLLOUTS

    def row(self, example: int) -> int:
        """Return the number in the data of the row that an example, or its prompt, is from."""
        row = self.prepared_row(example)
        return row if self.numbers is None else self.numbers[row]

    def prepared_row(self, example: int) -> int:
        """Return which of the prepared rows an example, or its prompt, is from."""
        rollout = example - len(self.dataset)
        return example if rollout < 0 else self.rollouts[rollout].row

    def tokens(self, part: range) -> Tokens:
        """Return the tokens of a shard's examples."""
        if self.origin(part) == DATA:
            return tokens_of(self.cut[part.start : part.stop])
        rollouts = self.rollouts[part.start - len(self.dataset) : part.stop - len(self.dataset)]
        sides = [side for r in rollouts for side in (r.prompt_ids, r.answer_ids)]
        labelled = np.repeat(np.tile([False, True], len(rollouts)), [len(side) for side in sides])
        return Tokens(np.concatenate(sides), labelled, self.lengths[part.start : part.stop])

    def about(self, part: range) -> dict[str, list[Any]]:
        """Return the columns of `EXAMPLES` that are known before a shard is scored."""
        origin, rows = self.origin(part), [self.dataset[self.prepared_row(i)] for i in part]
        cut = cut_labelled = [0] * len(part)
        if origin == DATA:
            left, whole = self.tokens(part), tokens_of(self.whole[part.start : part.stop])
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
            "messages": [original(row) if origin == DATA else None for row in rows],
            "cut": cut,
            "cut_labelled": cut_labelled,
        }

    def prompts(self, n: int) -> list[Prompt]:
        """
        Return the prompts of `n` rows, spread evenly over the rows that have a prompt.

        A row's prompt is its tokens before the first labelled one.

        Raises:
            ConfigurationError: no row has a prompt.
        """
        lengths = np.concatenate([prompt_lengths(table["labels"]) for table in self.cut.iter(1024)])
        rows = np.flatnonzero(lengths)
        if len(rows) == 0:
            raise ConfigurationError(
                f"rollouts={n}: no row has a prompt, which is the tokens before the first labelled"
                " one. Give prompt and completion, or messages with --assistant_only_loss; plain"
                " text has no question to answer."
            )
        chosen = rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).round().astype(int)]
        rows_ids = [self.rows.cut[int(i)]["input_ids"][: lengths[i]] for i in chosen]
        return [Prompt(int(i), ids) for i, ids in zip(chosen, rows_ids, strict=True)]


def tokens_of(table: Any) -> Tokens:
    """Return the tokens of prepared rows."""
    (ids, lengths), (labels, _) = flat(table["input_ids"]), flat(table["labels"])
    labelled = labels >= 0
    if (labels != ids)[labelled].any():
        raise ConfigurationError(
            "labels: a label differs from the token of input_ids at its position, which `eaft"
            " inspect` does not support. Give labels that are input_ids or -100."
        )
    labelled[(lengths.cumsum() - lengths)[lengths > 0]] = False
    return Tokens(ids, labelled, lengths.astype(np.int64))


def count_labelled(tokens: Tokens) -> NDArray[Any]:
    """Return how many tokens of each example are labelled."""
    total = np.concatenate([[0], tokens.labelled.cumsum()])
    return total[tokens.starts + tokens.lengths] - total[tokens.starts]


def prompt_lengths(column: Any) -> NDArray[Any]:
    """Return how many tokens of each row are before its first label; 0 where there is no label."""
    labels, lengths = flat(column)
    places = np.append(np.flatnonzero(labels >= 0), len(labels))
    starts = lengths.cumsum() - lengths
    first = places[np.searchsorted(places, starts)] - starts
    return np.where(first < lengths, first, 0)


def original(row: dict[str, Any]) -> str | None:
    """Return a row as JSON; None if it is plain text or token ids."""
    if not any(name in row for name in CONVERSATION):
        return None
    return json.dumps(row, default=str, ensure_ascii=False)


def batches(tokens: Tokens, budget: int) -> Iterator[list[int]]:
    """
    Yield batches of examples with labels, the longest first.

    Args:
        tokens: of a shard.
        budget: the most tokens of a batch, with padding to its longest example.
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
