"""Which row of a data set each row of a batch is, so that a message can name them, at no cost while all is well."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from datasets.fingerprint import Hasher

from eaft.models import template_today

ROWS = "row_numbers"  # a batch's key, which `EAFTTrainer.compute_loss` takes out


class NumberedRows(Dataset):
    """A data set that tells its index to each row that a dataloader fetches."""

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        """Return the rows with these indices, each with its index; the method that dataloaders call."""
        return [{**row, ROWS: key} for key, row in zip(keys, super().__getitems__(keys), strict=True)]


def number_rows(dataset: Dataset) -> NumberedRows:
    """Return the same data set, neither copied nor mapped, whose rows know their index when fetched in batches."""
    numbered = copy.copy(dataset)
    numbered.__class__ = NumberedRows
    return numbered


def cached_by_date(dataset: Dataset) -> Dataset:
    """Return the same data set, whose maps `datasets` caches by the date that chat templates write, too."""
    dated = copy.copy(dataset)
    dated._fingerprint = Hasher.hash([dataset._fingerprint, template_today()])
    return dated


@dataclass
class RowCollator:
    """Collates as `collator` does, and adds `row_numbers` `[rows, 2]`: each row's index and its number of tokens."""

    collator: Callable[[list[dict[str, Any]]], Any]

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """Return the batch; rows whose tokens are still to be made (images) have 0 of them."""
        numbers = [(row.pop(ROWS), len(row.get("input_ids", ()))) for row in rows]
        batch = self.collator(rows)
        if isinstance(batch, MutableMapping):
            batch[ROWS] = torch.tensor(numbers)
        return batch


def describe_rows(batch: MutableMapping[str, Any], tokenizer: Any, images: bool) -> str:
    """
    Name a batch's rows: their index in their data set, as the trainer holds it, and how their text begins.

    A stream's rows have no index. Of `images`, runs of the same placeholder are shortened to one.
    """
    input_ids, numbers = batch["input_ids"], batch.get(ROWS)
    if (mask := batch.get("attention_mask")) is not None:
        texts = [ids[keep.bool()] for ids, keep in zip(input_ids, mask, strict=True)]
    elif len(input_ids) > 1:
        texts = list(input_ids)
    else:  # padding-free: one row holds every row; of a stream, every sequence, each starting at position 0
        starts = (batch["position_ids"][0] == 0).nonzero().flatten() if numbers is None else numbers[:, 1].cumsum(0)
        pieces = input_ids[0].tensor_split(starts.cpu())
        texts = list(pieces[1:] if numbers is None else pieces[:-1])  # what is left is nothing, or padding
    if images:
        texts = [ids.unique_consecutive() for ids in texts]
    names = ["(unnumbered)"] * len(texts)
    if numbers is not None and len(numbers) == len(texts):  # a collator of one's own may make more rows, or fewer
        names = [str(index) for index in numbers[:, 0].tolist()]
    return ", ".join(f"{name}: {tokenizer.decode(ids[:32])!r}" for name, ids in zip(names, texts, strict=True))
