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
    Return the same data set. `datasets` caches its maps also by the date that chat templates write.
    """
    dated = copy.copy(dataset)
    dated._fingerprint = Hasher.hash([dataset._fingerprint, template_today()])
    return dated


def describe_rows(
    batch: MutableMapping[str, Any], tokenizer: Any, dataset: Any, images: bool = False
) -> str:
    """
    Name a batch's rows: their index in the data set that the trainer holds, and how their text
    begins.

    A row whose tokens are not in the data set has no index: rows of a stream, and rows that a
    collator makes (images). If several rows have the same tokens, the index is of the first. With
    `images`, runs of the same placeholder are shortened to one.
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
    rows = find_rows(dataset, texts, starts)
    named = []
    for text, (ids, begins) in enumerate(zip(texts, starts, strict=True)):
        end = 0
        for begin, following in itertools.pairwise([*begins, len(ids)]):
            if begin < end:
                continue  # another sequence of a packed row
            index, length = rows.get((text, begin), ("(unnumbered)", following - begin))
            end = begin + length
            if rows and len(begins) > 1 and index == "(unnumbered)" and length == 1:
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
    Return (text, start) -> the index and the length of the data set's row that begins there.

    Args:
        dataset: read once, if it is a `Dataset` with `input_ids`.
        texts: token ids, each `[tokens]`.
        starts: where the sequences of each text begin; a packed row has several.
    """
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return {}
    sequences = defaultdict(list)
    for text, (ids, begins) in enumerate(zip(texts, starts, strict=True)):
        for begin, end in itertools.pairwise([*begins, len(ids)]):
            sequences[ids[begin:end].tobytes()].append((text, begin))
    columns = [name for name in ("input_ids", "seq_lengths") if name in dataset.column_names]
    rows: dict[tuple[int, int], tuple[int, int]] = {}
    for index, row in enumerate(dataset.with_format("numpy", columns=columns)):
        ids = np.asarray(row["input_ids"], texts[0].dtype)
        first = ids[: row["seq_lengths"][0]] if len(row.get("seq_lengths", ())) else ids
        for text, begin in {*sequences.get(ids.tobytes(), ()), *sequences.get(first.tobytes(), ())}:
            longest = rows.get((text, begin), (0, 0))[1]
            if len(ids) > longest and np.array_equal(texts[text][begin : begin + len(ids)], ids):
                rows[text, begin] = index, len(ids)
    return rows
