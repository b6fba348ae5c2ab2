"""
What each row must hold, in any of TRL's formats: for training, inspecting and held-out rows alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Value
from pydantic import AfterValidator, Field, StrictInt

from eaft.errors import ConfigurationError
from eaft.evaluation.drift import Messages
from eaft.files import NotNegative, check, short

STREAM_ROWS = 1000  # how many rows of a stream are checked
IGNORED = -100  # the label of a token that is not trained on


def label(value: int) -> int:
    """Refuse a label that is neither a token's id nor ignored."""
    if value < 0 and value != IGNORED:
        raise ValueError(f"expected a token's id, or {IGNORED} for a token that is not trained on")
    return value


Ids = Annotated[list[NotNegative], Field(min_length=1)]
Labels = list[Annotated[StrictInt, AfterValidator(label)]]
Mask = list[Annotated[StrictInt, Field(ge=0, le=1)]]
PARALLEL = {
    "labels": Labels,
    "attention_mask": Mask,
    "assistant_masks": Mask,
    "completion_mask": Mask,
}


def form_of(columns: Iterable[str], first: dict[str, Any], text_field: str) -> list[str]:
    """
    Return the columns that rows are read from. The first row decides the form; if it has several,
    TRL's order does.
    """
    forms = [["input_ids"], ["prompt", "completion"], ["messages"], ["conversations"], [text_field]]
    there = [form for form in forms if set(form) <= set(columns)]
    filled = [form for form in there if any(first.get(name) is not None for name in form)]
    return (filled or there or [[]])[0]


def check_rows(
    rows: Any, where: str, text_field: str = "text", numbers: Sequence[int] | None = None
) -> None:
    """
    Check the rows of a data set, or the first ones of a stream.

    Args:
        where: names the data; begins the message.
        numbers: of the rows in the data that they were chosen from; None: 0, 1, 2, ...

    Raises:
        ConfigurationError: names the first row that TRL cannot read, or would misread.
    """
    first = next(iter(rows), None)
    if first is None:
        return
    if "prompt" in first and not {"completion", "input_ids"} & first.keys():
        raise ConfigurationError(
            f"{where}: the rows have a prompt and no completion, and TRL looks for one: rename the"
            " column prompt, or add completion."
        )
    if not isinstance(rows, Dataset):
        form = form_of(first, first, text_field)
        for number, row in enumerate(itertools.islice(rows, STREAM_ROWS)):
            check_row(row, form, f"{where}, row {number}")
        return
    form = form_of(rows.column_names, first, text_field)
    texts = form not in (["input_ids"], ["messages"], ["conversations"])
    if (
        all(is_text(rows, name) for name in form)
        if texts
        else form == ["input_ids"] and are_ids(rows)
    ):
        return
    columns = [name for name in (*form, *PARALLEL) if name in rows.column_names]
    for number, row in zip(numbers or range(len(rows)), rows.select_columns(columns), strict=True):
        check_row(row, form, f"{where}, row {number}")


def is_text(rows: Dataset, name: str) -> bool:
    """Return whether a column is text in every row."""
    return (
        rows.features[name] in (Value("string"), Value("large_string"))
        and not rows.data.column(name).null_count
    )


def are_ids(rows: Dataset) -> bool:
    """
    Return whether columns of token ids have no null, no value out of bounds and equal lengths; on
    Arrow arrays, without Python lists.
    """
    names = ["input_ids", *(["labels"] if "labels" in rows.column_names else [])]
    if (PARALLEL.keys() - {"labels"}) & set(rows.column_names):
        return False
    for table in rows.select_columns(names).with_format("arrow").iter(1000):
        lengths = []
        for name in names:
            column = table[name].combine_chunks()
            is_list = isinstance(column, pa.ListArray | pa.LargeListArray)
            if not is_list or not pa.types.is_integer(column.type.value_type):
                return False
            values = column.flatten()
            if column.null_count or values.null_count:
                return False
            numbers = values.to_numpy(zero_copy_only=False)
            low = numbers[numbers != IGNORED] if name == "labels" else numbers
            if (low < 0).any():
                return False
            lengths.append(column.value_lengths().to_numpy())
        if (lengths[0] == 0).any() or not all(
            np.array_equal(lengths[0], other) for other in lengths
        ):
            return False
    return True


def check_row(row: dict[str, Any], form: list[str], where: str) -> None:
    """Check one row; see `check_rows`."""
    for name in form:
        value = row.get(name)
        if name == "input_ids":
            check(Ids, value, f"{where}: {name}")
        elif value is None:
            raise ConfigurationError(
                f"{where} has no {name}: every row must have {' and '.join(form)}."
            )
        elif isinstance(value, list) and name in ("messages", "prompt", "completion"):
            check(Messages, value, f"{where}: {name}")
        elif (
            not isinstance(value, list if name in ("messages", "conversations") else str)
            or value == []
        ):
            expected = "messages" if name in ("messages", "conversations") else "text"
            expected = "text or messages" if name in ("prompt", "completion") else expected
            raise ConfigurationError(f"{where}: {name}={short(value)}: expected {expected}.")
    if len({isinstance(row.get(name), str) for name in form}) > 1:
        raise ConfigurationError(
            f"{where}: {' and '.join(form)} must both be text, or both be messages."
        )
    for name, kind in PARALLEL.items():
        if form == ["input_ids"] and row.get(name) is not None:
            check(kind, row[name], f"{where}: {name}")
            if len(row[name]) != len(row["input_ids"]):
                sizes = f"{len(row[name])} {name} for {len(row['input_ids'])} input_ids"
                raise ConfigurationError(f"{where} has {sizes}: each token needs one.")


def check_ids(rows: Any, size: int, where: str, numbers: Sequence[int] | None = None) -> None:
    """
    Check that a model knows every token id of rows that are already tokenized.

    Args:
        size: how many tokens the model's embedding has.
        numbers: of the rows in the data that they were chosen from; None: 0, 1, 2, ...

    Raises:
        ConfigurationError: names the first row with an id that the model does not know.
    """
    if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names:
        return
    columns = [name for name in ("input_ids", "labels") if name in rows.column_names]
    for number, row in zip(numbers or range(len(rows)), rows.select_columns(columns), strict=True):
        for name, ids in row.items():
            if ids and max(ids) >= size:
                raise ConfigurationError(
                    f"{where}, row {number}: {name} has the id {max(ids)}, and the model knows"
                    f" {size} tokens: tokenize the data with this model's tokenizer."
                )
