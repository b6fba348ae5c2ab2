"""
Which example of the training data each token is from, followed through whatever TRL does to it; and
its number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from eaft.errors import ConfigurationError
from eaft.training.trl_internals import (
    DataCollatorForLanguageModeling,
    global_then_local_main_first,
)


@dataclass
class FollowedData:
    """
    Training data with a column `example_ids`: of every token, the index of its example (int32).
    """

    prepared: Dataset  # as TRL prepares it: cut, shuffled, packed
    loose: (
        Dataset | None
    )  # one example a row, in their order, cut to what a training row can hold; if asked for
    num_examples: int  # also those that lost every label


def follow_examples(
    prepare: Callable[..., Dataset],
    dataset: Any,
    args: Any,
    packing: bool,
    formatting_func: Any,
    loose: bool,
) -> FollowedData:
    """
    Prepare the training data with TRL's `prepare`, keeping of every token the index of its example.

    The index travels in the upper half of each token's 64 bits, so that whatever TRL does to the
    tokens (cut, drop, shuffle, pack, split) it does to both. Our own passes are over Arrow batches;
    under a launcher one process makes them and the others read its cache, as with TRL's.

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
        """Return the examples in their order, a row each, as TRL cuts them."""
        return mapped(prepare_train(marked, shuffle_dataset=False, **changes), unmark, "Numbering")

    whole = prepare_train(dataset, False, formatting_func, max_length=None, shuffle_dataset=False)
    marked = mapped(
        whole.select_columns(["input_ids", "labels"]), mark, "Marking", with_indices=True
    )
    if packing:
        prepared = mapped(prepare_train(marked, packing), unmark, "Numbering")
    else:
        alone = cut()
        prepared = prepare_train(alone, max_length=None)  # shuffled, if TRL is asked to
    if not loose:
        return FollowedData(prepared, None, len(whole))
    if (
        packing and args.packing_strategy == "bfd"
    ):  # which cuts the end off, whatever the truncation mode
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
    Return the data after a function of Arrow tables; under a launcher one process computes, and all
    read.
    """
    with global_then_local_main_first():
        data = data.with_format("arrow").map(
            function, batched=True, desc=f"{what} examples", **kwargs
        )
    return data.with_format(None)


def mark(table: pa.Table, indices: list[int]) -> pa.Table:
    """Put each row's index above its tokens: `input_ids` becomes `index * 2**32 + input_ids`."""
    tokens, lengths = flat(table["input_ids"])
    return with_column(
        table,
        "input_ids",
        (np.repeat(np.array(indices, np.int64), lengths) << 32) + tokens,
        lengths,
    )


def unmark(table: pa.Table) -> pa.Table:
    """Undo `mark`: `input_ids` are tokens again, and `example_ids` are the indices."""
    marked, lengths = flat(table["input_ids"])
    table = with_column(table, "input_ids", marked & 0xFFFFFFFF, lengths)
    return with_column(table, "example_ids", (marked >> 32).astype(np.int32), lengths)


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
    """Return which rows have a label; the first token is nobody's."""
    labels, lengths = flat(table["labels"])
    counted = labels != -100
    ends = lengths.cumsum()
    counted[(ends - lengths)[lengths > 0]] = False
    total = np.concatenate([[0], counted.cumsum()])
    return (total[ends] > total[ends - lengths]).tolist()


def flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return a column of lists as their values, one after another, and each list's length."""
    lists = column.combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False), lists.value_lengths().to_numpy(
        zero_copy_only=False
    )


def lists(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """Undo `flat`."""
    return pa.ListArray.from_arrays(
        np.concatenate([[0], lengths.cumsum()]).astype(np.int32), values
    )


def with_column(table: pa.Table, name: str, values: np.ndarray, lengths: np.ndarray) -> pa.Table:
    """Return the table with one column of lists added or replaced."""
    column = lists(values, lengths)
    if name not in table.column_names:
        return table.append_column(name, column)
    return table.set_column(table.column_names.index(name), name, column)


def number_tokens(data: Dataset) -> Dataset:
    """
    Return prepared data with a column `token_numbers`: of every token, how many come before it
    (int64).
    """
    tables = data.select_columns(["input_ids"]).with_format("arrow").iter(1024)
    ends = np.concatenate([flat(table["input_ids"])[1] for table in tables]).cumsum()
    return mapped(data, with_numbers, "Numbering", with_indices=True, fn_kwargs={"ends": ends})


def with_numbers(table: pa.Table, indices: list[int], ends: np.ndarray) -> pa.Table:
    """
    Add `token_numbers` to consecutive rows, given how many tokens there are up to each row's end.
    """
    tokens, lengths = flat(table["input_ids"])
    first = ends[indices[0]] - lengths[0]
    return with_column(table, "token_numbers", np.arange(first, first + len(tokens)), lengths)


@dataclass
class ExampleCollator:
    """
    Collates as TRL does, and lays the rows' `example_ids` and `token_numbers` out as it lays out
    their tokens.
    """

    collator: DataCollatorForLanguageModeling

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return TRL's batch, with these of the shape of `input_ids` if the rows have them."""
        batch = self.collator(rows)
        for name in ("example_ids", "token_numbers"):
            if name in rows[0]:
                # Padded with the padding token's id, where no label reads it
                batch[name] = self.collator([{**r, "input_ids": r[name]} for r in rows])[
                    "input_ids"
                ]
        return batch
