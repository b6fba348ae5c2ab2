"""
Each token keeps the index of its example, and its own number, through everything TRL does to rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from eaft.arrow import flat, lists, with_column
from eaft.errors import ConfigurationError
from eaft.training.trl_internals import (
    DataCollatorForLanguageModeling,
    global_then_local_main_first,
)

FOLLOWED = (
    "example_ids",
    "token_numbers",
    "replay_numbers",
)  # columns with one number for each token


@dataclass
class FollowedData:
    """Training data with a column `example_ids`: for each token the index of its example, int32."""

    prepared: Dataset  # as TRL prepares it: cut, shuffled, packed
    # If asked for: one example a row, in the data's order, cut to what a training row can hold
    loose: Dataset | None
    num_examples: int  # including examples that lost every label


@dataclass(frozen=True)
class ReplayedTokens:
    """
    The tokens of the replayed rows, which come last in the data.

    Attributes:
        first: index of the first replayed row.
        rows: the replayed row of each token, counted from 0, int32 `[tokens]`.
        numbers: for a labelled token, how many labels come before it; -1 for other tokens; int32
            `[tokens]`.
    """

    first: int
    rows: np.ndarray
    numbers: np.ndarray

    @classmethod
    def of(cls, data: Dataset, first: int) -> ReplayedTokens:
        """Return the tokens of the rows of `data` from `first` on."""
        rows = data.select(range(first, len(data))).with_format("arrow")
        labels, lengths = flat(rows[:]["labels"])
        labelled = labels != -100
        return cls(
            first,
            np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
            np.where(labelled, labelled.cumsum() - 1, -1).astype(np.int32),
        )

    def marks(self, indices: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """
        Return a mark for each token of the rows with these indices and lengths: the index of its
        row or, in a replayed row, `first` plus the number of replayed tokens before it.
        """
        ends = np.concatenate([[0], np.bincount(self.rows).cumsum()])
        replayed = indices >= self.first
        starts = np.where(replayed, self.first + ends[(indices - self.first) * replayed], indices)
        within = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        return np.repeat(starts, lengths) + within * np.repeat(replayed, lengths)

    def read(self, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the index of each marked token's row, and its number among the labels or -1."""
        replayed = marks >= self.first
        tokens = (marks - self.first) * replayed
        return (
            np.where(replayed, self.first + self.rows[tokens], marks),
            np.where(replayed, self.numbers[tokens], -1),
        )


def follow_examples(
    prepare: Callable[..., Dataset],
    dataset: Any,
    args: Any,
    packing: bool,
    formatting_func: Any,
    loose: bool,
    first_replayed: int | None = None,
) -> FollowedData:
    """
    Prepare the training data with TRL's `prepare`, and keep the index of each token's example.

    The index travels in the upper half of each token's 64 bits. So TRL does the same to both when
    it cuts, drops, shuffles, packs or splits tokens. Our own passes are over Arrow batches. Under a
    launcher one process computes them and the others read its cache, as with TRL's passes.

    Args:
        prepare: TRL's `_prepare_dataset`, without the tokenizer.
        dataset: the training data.
        args: an `EAFTConfig`.
        packing: whether TRL packs rows.
        formatting_func: as TRL takes it.
        loose: also return the examples one by one.
        first_replayed: index of the first replayed row, if the labels of these rows are to be
            numbered: then there is a column `replay_numbers`, see `ReplayedTokens.numbers`.

    Raises:
        ConfigurationError: `dataset` is a stream.
    """
    if not isinstance(dataset, Dataset):
        raise ConfigurationError(
            f"gate={args.gate!r} needs a data set with a length: set dataset_streaming false."
        )

    def prepare_train(
        data: Dataset, packing: bool = False, formatting_func: Any = None, **changes: Any
    ) -> Dataset:
        changed = copy.copy(args)
        vars(changed).update(changes)
        return prepare(
            data,
            args=changed,
            packing=packing,
            formatting_func=formatting_func,
            dataset_name="train",
        )

    def cut(**changes: Any) -> Dataset:
        """Return one example a row, in the data's order, as TRL cuts them."""
        return numbered(prepare_train(marked, shuffle_dataset=False, **changes))

    def numbered(data: Dataset) -> Dataset:
        return mapped(data, unmark, "Numbering", fn_kwargs={"replayed": replayed})

    whole = prepare_train(dataset, False, formatting_func, max_length=None, shuffle_dataset=False)
    replayed = None if first_replayed is None else ReplayedTokens.of(whole, first_replayed)
    marked = mapped(
        whole.select_columns(["input_ids", "labels"]),
        mark,
        "Marking",
        with_indices=True,
        fn_kwargs={"replayed": replayed},
    )
    if packing:
        prepared = numbered(prepare_train(marked, packing))
    else:
        alone = cut()
        prepared = prepare_train(alone, max_length=None)  # shuffled, if TRL is asked to
    if not loose:
        return FollowedData(prepared, None, len(whole))
    if packing and args.packing_strategy == "bfd":  # it cuts the end, whatever truncation_mode is
        alone = cut(truncation_mode="keep_start")
    elif packing:  # the other strategies split
        alone = mapped(
            cut(max_length=None), split, "Splitting", fn_kwargs={"length": args.max_length}
        )
    with global_then_local_main_first():
        alone = alone.with_format("arrow").filter(
            labelled, batched=True, desc="Dropping unlabelled examples"
        )
    return FollowedData(prepared, alone.with_format(None), len(whole))


def mapped(data: Dataset, function: Callable[..., pa.Table], what: str, **kwargs: Any) -> Dataset:
    """
    Return the data after a function of Arrow tables. Under a launcher one process computes it, and
    the others read its cache.
    """
    with global_then_local_main_first():
        data = data.with_format("arrow").map(
            function, batched=True, desc=f"{what} examples", **kwargs
        )
    return data.with_format(None)


def mark(table: pa.Table, indices: list[int], replayed: ReplayedTokens | None = None) -> pa.Table:
    """
    Put each row's index above its tokens: `input_ids` becomes `index * 2**32 + input_ids`. For
    replayed tokens it is another mark, see `ReplayedTokens.marks`.
    """
    tokens, lengths = flat(table["input_ids"])
    rows = np.array(indices, np.int64)
    marks = np.repeat(rows, lengths) if replayed is None else replayed.marks(rows, lengths)
    return with_column(table, "input_ids", (marks << 32) + tokens, lengths)


def unmark(table: pa.Table, replayed: ReplayedTokens | None = None) -> pa.Table:
    """
    Undo `mark`: `input_ids` are tokens again, `example_ids` are the indices, and `replay_numbers`
    are the replayed labels' numbers.
    """
    marked, lengths = flat(table["input_ids"])
    table = with_column(table, "input_ids", marked & 0xFFFFFFFF, lengths)
    marks = marked >> 32
    if replayed is not None:
        marks, numbers = replayed.read(marks)
        table = with_column(table, "replay_numbers", numbers, lengths)
    return with_column(table, "example_ids", marks.astype(np.int32), lengths)


def split(table: pa.Table, length: int) -> pa.Table:
    """Split every row into rows of at most `length` tokens."""
    columns = {name: flat(table[name]) for name in table.column_names}
    lengths = next(iter(columns.values()))[1]
    pieces = -(-lengths // length)
    sizes = np.full(pieces.sum(), length)
    ends = pieces.cumsum()[pieces > 0] - 1
    sizes[ends] = (lengths - (pieces - 1) * length)[pieces > 0]
    return pa.table({name: lists(values, sizes) for name, (values, _) in columns.items()})


def labelled(table: pa.Table) -> list[bool]:
    """Return which rows have a label. The first token of a row is never a label."""
    labels, lengths = flat(table["labels"])
    counted = labels != -100
    ends = lengths.cumsum()
    counted[(ends - lengths)[lengths > 0]] = False
    total = np.concatenate([[0], counted.cumsum()])
    return (total[ends] > total[ends - lengths]).tolist()


def number_tokens(data: Dataset) -> Dataset:
    """
    Return prepared data with a column `token_numbers`: for each token the number of tokens before
    it in the data, int64.
    """
    tables = data.select_columns(["input_ids"]).with_format("arrow").iter(1024)
    ends = np.concatenate([flat(table["input_ids"])[1] for table in tables]).cumsum()
    return mapped(data, with_numbers, "Numbering", with_indices=True, fn_kwargs={"ends": ends})


def with_numbers(table: pa.Table, indices: list[int], ends: np.ndarray) -> pa.Table:
    """
    Add `token_numbers` to consecutive rows. `ends` says how many tokens there are up to the end of
    each row of the data.
    """
    tokens, lengths = flat(table["input_ids"])
    first = ends[indices[0]] - lengths[0]
    return with_column(table, "token_numbers", np.arange(first, first + len(tokens)), lengths)


@dataclass
class ExampleCollator:
    """
    Collates as TRL does, and lays `example_ids`, `token_numbers` and `replay_numbers` out like the
    tokens.
    """

    collator: DataCollatorForLanguageModeling

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return TRL's batch; if the rows have these columns, each has the shape of `input_ids`."""
        batch = self.collator(rows)
        for name in FOLLOWED:
            if name in rows[0]:
                # Padded with the padding token's id, where no label reads it
                batch[name] = self.collator([{**r, "input_ids": r[name]} for r in rows])[
                    "input_ids"
                ]
        return batch
