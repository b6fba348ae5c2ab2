"""Which example of the training data each token is from, followed through whatever TRL does to the data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from eaft.errors import ConfigurationError


@dataclass
class FollowedData:
    """Training data with a column `example_ids`: of every token, the index of its example."""

    prepared: Dataset  # as TRL prepares it: cut, shuffled, packed
    loose: Dataset | None  # one example a row, in their order, cut to what a training row can hold; if asked for
    num_examples: int  # also those that lost every label


def follow_examples(
    prepare: Callable[..., Dataset], dataset: Any, args: Any, packing: bool, formatting_func: Any, loose: bool
) -> FollowedData:
    """
    Prepare the training data with TRL's `prepare`, keeping of every token the index of its example.

    The examples are prepared as they are and with their index in place of every token, so that whatever TRL does to
    them (cut, drop, shuffle, pack, split) it does to both.

    Raises:
        ConfigurationError: `dataset` is a stream.
    """
    if not isinstance(dataset, Dataset):
        raise ConfigurationError(f"gate={args.gate!r} needs a data set with a length: set dataset_streaming false.")

    def changed(**changes: Any) -> Any:
        changed_args = copy.copy(args)
        vars(changed_args).update(changes)
        return changed_args

    def prepare_train(data: Dataset, args: Any, packing: bool, formatting_func: Any = None) -> Dataset:
        return prepare(data, args=args, packing=packing, formatting_func=formatting_func, dataset_name="train")

    whole = prepare_train(dataset, changed(max_length=None, shuffle_dataset=False), False, formatting_func)
    whole = whole.select_columns(["input_ids", "labels"])
    numbered = whole.map(
        lambda row, i: {"input_ids": [i] * len(row["input_ids"])},
        with_indices=True,
        num_proc=args.dataset_num_proc,
        desc="Numbering examples",
    )

    def follow(args: Any, packing: bool) -> Dataset:
        tokens, ids = (prepare_train(data, args, packing) for data in (whole, numbered))
        ids = ids.select_columns(["input_ids"]).rename_column("input_ids", "example_ids")
        return concatenate_datasets([tokens, ids], axis=1)

    alone = None
    if loose:
        # `bfd` cuts the end off, whatever the truncation mode; the other strategies split instead
        splits = packing and args.packing_strategy != "bfd"
        changes: dict[str, Any] = {"truncation_mode": "keep_start"} if packing else {}
        changes["max_length"] = None if splits else args.max_length
        alone = follow(changed(shuffle_dataset=False, **changes), packing=False)
        if splits:
            alone = alone.map(split, batched=True, fn_kwargs={"length": args.max_length}, desc="Splitting examples")
        alone = alone.filter(lambda row: any(label != -100 for label in row["labels"][1:]), desc="Dropping unlabelled")
    return FollowedData(follow(args, packing), alone, len(whole))


def split(columns: dict[str, list[list[int]]], length: int) -> dict[str, list[list[int]]]:
    """Split every row into rows of at most `length` tokens."""
    return {
        name: [row[start : start + length] for row in rows for start in range(0, len(row), length)]
        for name, rows in columns.items()
    }


@dataclass
class ExampleCollator:
    """Collates as TRL does, and lays the rows' `example_ids` out as it lays out their tokens."""

    collator: DataCollatorForLanguageModeling

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return TRL's batch, with `example_ids` of the shape of `input_ids` if the rows have them."""
        batch = self.collator(rows)
        if "example_ids" in rows[0]:
            # Padded with the padding token's id, where no label reads it
            batch["example_ids"] = self.collator([{**r, "input_ids": r["example_ids"]} for r in rows])["input_ids"]
        return batch
