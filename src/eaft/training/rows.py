"""
Which row of its data set each row of a batch is, looked up for a message alone: batches carry no
numbers.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import MutableMapping
from typing import Any

import numpy as np
from datasets import Dataset
from datasets.fingerprint import Hasher

from eaft.models import template_today


def cached_by_date(dataset: Dataset) -> Dataset:
    """
    Return the same data set, whose maps `datasets` caches by the date that chat templates write,
    too.
    """
    dated = copy.copy(dataset)
    dated._fingerprint = Hasher.hash([dataset._fingerprint, template_today()])
    return dated


def describe_rows(
    batch: MutableMapping[str, Any], tokenizer: Any, dataset: Any, images: bool = False
) -> str:
    """
    Name a batch's rows: their index in their data set, as the trainer holds it, and how their text
    begins.

    Rows that are not found in the data set by their tokens have no index: a stream's, and those
    that a collator makes (images). Of rows with the same tokens it is the first one's. Of `images`,
    runs of the same placeholder are shortened to one.
    """
    input_ids = batch["input_ids"].cpu().numpy()
    if (mask := batch.get("attention_mask")) is not None:
        texts = [
            ids[keep] for ids, keep in zip(input_ids, mask.cpu().numpy().astype(bool), strict=True)
        ]
        starts = [[0] for _ in texts]
    elif len(input_ids) > 1 or "position_ids" not in batch:
        texts, starts = list(input_ids), [[0] for _ in input_ids]
    else:  # padding-free: one row holds every row, and each of their sequences starts at position 0
        texts = list(input_ids)
        starts = [np.flatnonzero(batch["position_ids"][0].cpu().numpy() == 0).tolist()]
    found = find_rows(dataset, texts, starts)
    named = []
    for text, (ids, begins) in enumerate(zip(texts, starts, strict=True)):
        end = 0
        for begin, following in itertools.pairwise([*begins, len(ids)]):
            if begin < end:
                continue  # another sequence of a packed row
            index, length = found.get((text, begin), ("(unnumbered)", following - begin))
            end = begin + length
            if found and len(begins) > 1 and index == "(unnumbered)" and length == 1:
                continue  # padding to a multiple
            shown = ids[begin:end]
            if images:
                shown = shown[np.flatnonzero(np.diff(shown, prepend=shown[0] - 1))]
            named.append(f"{index}: {tokenizer.decode(shown[:32].tolist())!r}")
    return ", ".join(named)


def find_rows(
    dataset: Any, texts: list[np.ndarray], starts: list[list[int]]
) -> dict[tuple[int, int], tuple[int, int]]:
    """
    Return the index and length of the data set's row that stands in a text from one of its starts.

    Args:
        dataset: read once, if it is a `Dataset` with `input_ids`.
        texts: token ids, each `[tokens]`.
        starts: of each text, where sequences begin; a packed row has several.
    """
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return {}
    sequences = defaultdict(list)
    for text, (ids, begins) in enumerate(zip(texts, starts, strict=True)):
        for begin, end in itertools.pairwise([*begins, len(ids)]):
            sequences[ids[begin:end].tobytes()].append((text, begin))
    columns = [name for name in ("input_ids", "seq_lengths") if name in dataset.column_names]
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for index, row in enumerate(dataset.with_format("numpy", columns=columns)):
        ids = np.asarray(row["input_ids"], texts[0].dtype)
        first = ids[: row["seq_lengths"][0]] if len(row.get("seq_lengths", ())) else ids
        for text, begin in {*sequences.get(ids.tobytes(), ()), *sequences.get(first.tobytes(), ())}:
            longest = found.get((text, begin), (0, 0))[1]
            if len(ids) > longest and np.array_equal(texts[text][begin : begin + len(ids)], ids):
                found[text, begin] = index, len(ids)
    return found
