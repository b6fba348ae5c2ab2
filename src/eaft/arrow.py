"""Arrow columns of lists as numpy arrays and back, so that a pass over a table needs no loop."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """
    Return a column of lists as two arrays: all values, list after list, and each list's length.
    """
    combined = column.combine_chunks()
    values = combined.flatten().to_numpy(zero_copy_only=False)
    return values, combined.value_lengths().to_numpy(zero_copy_only=False)


def lists(
    values: np.ndarray,  # (sum of lengths,)
    lengths: np.ndarray,  # (rows,), int
) -> pa.ListArray:
    """Return a column of lists; undoes `flat`."""
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, values)


def with_column(
    table: pa.Table,
    name: str,
    values: np.ndarray,  # (sum of lengths,)
    lengths: np.ndarray,  # (rows,), int
) -> pa.Table:
    """Return the table with one column of lists added or replaced."""
    column = lists(values, lengths)
    if name not in table.column_names:
        return table.append_column(name, column)
    return table.set_column(table.column_names.index(name), name, column)
