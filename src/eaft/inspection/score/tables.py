"""The tables of a shard: its tokens and its examples, as `folder` describes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from eaft.inspection.folder import COMPARED, EXAMPLES, STATISTICS, TOKENS, statistics_of
from eaft.inspection.score.examples import Tokens, count_labelled
from eaft.inspection.score.pieces import Pieces

# The columns `STATISTICS` by name, those that the model computes; a value for each token, 0 for an
# unlabelled one
Statistics = dict[str, NDArray[Any]]

FLOATS = [field.name for field in STATISTICS if pa.types.is_floating(field.type)]
# These encodings make a token of GSM8K take 14 bytes on disk if answers are labelled, and 18 if all
# the text is. The upper bytes of a column's floats are alike, and the integers count up
DICTIONARY = ("token_id", "first_choice", "rank", "origin", "source")
ENCODINGS = dict.fromkeys(FLOATS, "BYTE_STREAM_SPLIT")
ENCODINGS |= dict.fromkeys(("example", "position", "end"), "DELTA_BINARY_PACKED")


def token_table(
    part: range, tokens: Tokens, statistics: Statistics, pieces: Pieces
) -> tuple[pa.Table, list[str]]:
    """Return a shard as a table of `TOKENS`, and the texts of its examples."""
    texts: list[str] = []
    ends: list[int] = []
    for start, length in zip(tokens.starts, tokens.lengths, strict=True):
        text, ends_of_text = pieces.join(tokens.ids[start : start + length].tolist())
        texts.append(text)
        ends += ends_of_text
    columns = {
        **keys(part, tokens),
        "token_id": tokens.ids,
        "end": ends,
        "labelled": tokens.labelled,
    }
    return as_table({**columns, **nulled(tokens, statistics)}, TOKENS), texts


def compared_table(part: range, tokens: Tokens, statistics: Statistics) -> pa.Table:
    """Return a shard as a table of `COMPARED`."""
    return as_table({**keys(part, tokens), **nulled(tokens, statistics)}, COMPARED)


def keys(part: range, tokens: Tokens) -> dict[str, NDArray[Any]]:
    """Return the columns `example` and `position`."""
    position = np.arange(len(tokens.ids)) - np.repeat(tokens.starts, tokens.lengths)
    return {"example": np.repeat(np.array(part), tokens.lengths), "position": position}


def nulled(tokens: Tokens, statistics: Statistics) -> dict[str, pa.Array]:
    """Return the columns `STATISTICS`, null where a token has no label or the model no value."""
    columns = {field.name: pa.nulls(len(tokens.ids), field.type) for field in STATISTICS}
    scored = {name: pa.array(values, mask=~tokens.labelled) for name, values in statistics.items()}
    return columns | scored


def as_table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """Return columns as a table, in the order and with the types of a schema."""
    arrays = {name: pa.array(values) for name, values in columns.items()}
    return pa.table({field.name: arrays[field.name].cast(field.type) for field in schema}, schema)


def example_table(
    about: dict[str, list[Any]],
    tokens: Tokens,
    statistics: Statistics,
    texts: list[str],
    top_k: int,
) -> pa.Table:
    """
    Return a shard's examples as a table of `EXAMPLES`.

    Args:
        about: the columns that are known before scoring, from `Examples.about`.
        tokens: of the shard.
        statistics: of these tokens.
        texts: of the examples.
        top_k: K of the top-K entropy.
    """
    stats = statistics_of({n: torch.from_numpy(v) for n, v in statistics.items()}, top_k)
    nll, conflict = stats.nll.double().numpy(), stats.is_conflict.numpy()
    labelled = count_labelled(tokens)

    def sums(values: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the sum of `values`, one for each token, over each example's labelled tokens."""
        total = np.concatenate([[0.0], np.where(tokens.labelled, values, 0.0).cumsum()])
        return total[tokens.starts + tokens.lengths] - total[tokens.starts]

    def share(part: NDArray[Any], whole: NDArray[Any]) -> pa.Array:
        """Return part / whole, null where the whole is 0."""
        return pa.array(part / np.where(whole > 0, whole, 1), mask=~(whole > 0))

    nll_sum = sums(nll)
    columns = {
        **about,
        "text": texts,
        "tokens": tokens.lengths,
        "labelled": labelled,
        "nll": share(nll_sum, labelled),
        "entropy": share(sums(stats.entropy.double().numpy()), labelled),
        "conflict_share": share(sums(conflict.astype(float)), labelled),
        "conflict_nll_share": share(sums(nll * conflict), np.where(labelled > 0, nll_sum, 0)),
    }
    return as_table(columns, EXAMPLES)


def write_parquet(tables: pa.Table | Iterator[pa.Table], schema: pa.Schema, file: Path) -> None:
    """Write a table, or several tables one after another, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_suffix(".tmp")
    with pq.ParquetWriter(
        staging,
        schema,
        compression="zstd",
        use_dictionary=[name for name in DICTIONARY if name in schema.names],
        column_encoding={
            name: encoding for name, encoding in ENCODINGS.items() if name in schema.names
        },
    ) as writer:
        for table in [tables] if isinstance(tables, pa.Table) else tables:
            writer.write_table(table)
    os.replace(staging, file)
