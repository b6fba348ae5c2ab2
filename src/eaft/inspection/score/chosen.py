"""
The rows to inspect: all, or at most `MOST` in random order.

Of a file of JSON Lines only these rows are parsed: the others cost a search for the ends of lines.
Other data is opened by `datasets`, which converts a file once and then reads only the rows that
are asked for.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from numpy.typing import NDArray
from trl import DatasetMixtureConfig, ScriptArguments

from eaft.errors import ConfigurationError
from eaft.inspection.score.stopping import MOST, WHOLE
from eaft.training.config import EAFTConfig
from eaft.training.data import as_row, exclude_rows, load_splits, parsed, to_dataset

BLOCK = 1 << 24  # bytes of a file that are searched at a time
NEWLINE = ord("\n")
BLANKS = np.frombuffer(b" \t\r\n\v\f", np.uint8)  # a line that begins otherwise is not blank


@dataclass(frozen=True)
class ChosenRows:
    """
    Data, loaded as far as it is inspected.

    Attributes:
        splits: the split that is inspected has the chosen rows, in their order.
        numbers: of the chosen rows in the data; None if the data is whole and in its own order.
        of: the number of rows of the data; None if `numbers` is None.
    """

    splits: DatasetDict
    numbers: list[int] | None = None
    of: int | None = None


def choose_rows(
    script_args: ScriptArguments,
    args: EAFTConfig,
    dataset_args: DatasetMixtureConfig,
    every: bool,
) -> ChosenRows:
    """
    Return the rows to inspect. Data of at most `WHOLE` rows is always whole.

    Args:
        every: whether all rows are asked for.

    Raises:
        ConfigurationError: the data cannot be read, or `exclude_examples` does not fit it.
    """
    if not every and (file := file_of_lines(script_args, args, dataset_args)) is not None:
        lines = Lines(file)
        if len(lines) > WHOLE:
            numbers = random_order(len(lines), args.seed)
            try:
                rows = to_dataset(lines.rows(numbers))
            except ConfigurationError as error:
                where = f"dataset_name={script_args.dataset_name!r}"
                raise ConfigurationError(f"{where}, {error}") from error
            return ChosenRows(DatasetDict({"train": rows}), numbers, len(lines))
    splits = load_splits(script_args, dataset_args)
    split = script_args.dataset_train_split
    data = splits.get(split)
    if every or not isinstance(data, Dataset) or len(data) <= WHOLE:
        return ChosenRows(splits)
    if args.exclude_examples is not None:
        data = exclude_rows(data, args.exclude_examples)
    numbers = random_order(len(data), args.seed)
    return ChosenRows(DatasetDict({split: data.select(numbers)}), numbers, len(data))


def random_order(rows: int, seed: int) -> list[int]:
    """Return the first `MOST` of so many rows in random order."""
    order: list[int] = np.random.default_rng(seed).permutation(rows)[:MOST].tolist()
    return order


def file_of_lines(
    script_args: ScriptArguments, args: EAFTConfig, dataset_args: DatasetMixtureConfig
) -> Path | None:
    """Return the file of JSON Lines whose rows can be picked one by one; None if there is none."""
    file = Path(script_args.dataset_name or "").expanduser()
    picked = (
        file.suffix in (".jsonl", ".json")
        and file.is_file()
        and script_args.dataset_train_split == "train"
        and not (script_args.dataset_streaming or dataset_args.datasets or args.exclude_examples)
    )
    if not picked:
        return None
    with file.open("rb") as lines:
        first = lines.readline().removeprefix(codecs.BOM_UTF8)
    # A list of objects is parsed as a whole
    return None if not first.strip() or first.lstrip().startswith(b"[") else file


class Lines:
    """
    The rows of a file of JSON Lines, by number.

    The file is read once, and memory holds 16 bytes a line.

    Args:
        file: its first line is a row.
    """

    def __init__(self, file: Path) -> None:
        starts, firsts, size, ended = [], [], 0, True
        with file.open("rb") as content:
            while block := content.read(BLOCK):
                codes = np.frombuffer(block, np.uint8)
                begins = np.flatnonzero(codes[:-1] == NEWLINE) + 1
                if ended:  # the block before it ended with a line
                    begins = np.concatenate([[0], begins])
                starts.append(begins + size)
                firsts.append(codes[begins])
                size, ended = size + len(block), codes[-1] == NEWLINE
        self.starts: NDArray[np.int64] = np.concatenate([*starts, [size + (not ended)]])
        first = np.concatenate(firsts)
        self.content = np.memmap(file, np.uint8, "r")
        filled = first != NEWLINE
        for line in np.flatnonzero(filled & np.isin(first, BLANKS)).tolist():
            filled[line] = bool(self.line(line))
        self.filled = np.flatnonzero(filled)

    def __len__(self) -> int:
        return len(self.filled)

    def line(self, number: int) -> bytes:
        """Return a line by its number from 0, without white space around it."""
        return self.content[self.starts[number] : self.starts[number + 1] - 1].tobytes().strip()

    def rows(self, numbers: list[int]) -> list[dict[str, object]]:
        """
        Return rows by their numbers.

        Raises:
            ConfigurationError: a line is not UTF-8, not JSON, not an object, or no text.
        """
        rows = []
        for line in self.filled[numbers].tolist():
            where = f"line {line + 1}"
            text = self.line(line).removeprefix(codecs.BOM_UTF8)
            rows.append(as_row(parsed(text, where), where))
        return rows
