"""Training data from the Hub or from files, in TRL's formats, checked before anything is loaded or written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from eaft.errors import ConfigurationError, first_line

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_splits(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> DatasetDict:
    """
    Load the data that TRL's flags describe; `dataset_name` may also be a local file (its rows become `train`).

    Raises:
        ConfigurationError: no data is named, or it is missing or unreadable.
    """
    name = script_args.dataset_name
    if name is None and not dataset_args.datasets:
        raise ConfigurationError(
            "dataset_name is missing: give a Hub id, a .jsonl, .json, .csv or .parquet file, or a folder."
        )
    path = Path(name or "").expanduser()
    options: dict[str, Any] = {"name": script_args.dataset_config, "streaming": script_args.dataset_streaming}
    if name and (path.suffix in BUILDERS or path.is_absolute() or name.startswith(("./", "../", "~"))):
        if not path.exists():
            raise ConfigurationError(f"dataset_name={name!r}: there is no such file or folder.")
        if path.is_file():
            if path.suffix not in BUILDERS:
                raise ConfigurationError(f"dataset_name={name!r}: expected one of {', '.join(BUILDERS)}.")
            if path.stat().st_size == 0:
                raise ConfigurationError(f"dataset_name={name!r}: the file is empty.")
            name, options["data_files"] = BUILDERS[path.suffix], str(path)
        else:
            name = str(path)
    try:
        return get_dataset(dataset_args) if dataset_args.datasets else load_dataset(name, **options)
    except Exception as error:  # each format has its own errors, chained below the datasets library's
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):
            raise ConfigurationError(f"dataset_name={script_args.dataset_name!r}: the data set is empty.") from error
        raise ConfigurationError(
            f"dataset_name={script_args.dataset_name!r} cannot be read. ({first_line(cause)})"
        ) from error


def exclude_rows(dataset: Any, file: str) -> Any:
    """
    Return a data set without the rows that a file names, the others in their order.

    Args:
        dataset: a split, as loaded.
        file: JSON Lines with `row` (its index, from 0) and `digest` (its `row_digest`), as `eaft view` exports them.

    Raises:
        ConfigurationError: the file cannot be read, or was not made of this data; or no row would be left.
    """
    name = f"exclude_examples={file!r}"
    if not isinstance(dataset, Dataset):
        raise ConfigurationError(f"{name} names rows by number, which a stream has not: leave dataset_streaming out.")
    try:
        lines = Path(file).expanduser().read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{name} cannot be read. ({error})") from error
    excluded = set()
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        where = f"{name}, line {number}"
        try:
            entry = json.loads(line)
            row, digest = entry["row"], entry["digest"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{where}: expected a JSON map with `row` and `digest`, as `eaft view` exports examples."
            ) from error
        if entry.get("origin", "data") != "data":
            raise ConfigurationError(
                f"{where}: this is no row of the data but the model's own answer ({entry['origin']}). Export examples "
                "of the data alone."
            )
        if type(row) is not int or not 0 <= row < len(dataset) or row_digest(dataset[row]) != digest:
            raise ConfigurationError(
                f"{where}: row {row!r} of this data ({len(dataset)} rows) is not the one that was exported. Inspect "
                "this data as it is, with no rows excluded, and export again."
            )
        excluded.add(row)
    if len(excluded) == len(dataset):
        raise ConfigurationError(f"{name} names all {len(dataset)} rows: none is left to train on.")
    return dataset.select([row for row in range(len(dataset)) if row not in excluded])


def select_split(splits: DatasetDict, split: str, flag: str, text_field: str) -> Any:
    """
    Return one split after checking that it has rows, in a format TRL's SFT takes.

    Raises:
        ConfigurationError: there is no such split, it is empty, or its columns are none of the expected.
    """
    if split not in splits:
        raise ConfigurationError(f"{flag}={split!r}: the data has only {', '.join(splits)}.")
    dataset = splits[split]
    first = next(iter(dataset), None)
    if first is None:
        raise ConfigurationError(f"{flag}={split!r}: the data set is empty.")
    expected = [{"messages"}, {"prompt", "completion"}, {text_field}, {"conversations"}, {"input_ids"}]
    if not any(columns <= first.keys() for columns in expected):
        names = ", ".join(" + ".join(sorted(columns, reverse=True)) for columns in expected)
        raise ConfigurationError(
            f"{flag}={split!r}: found the columns {', '.join(first)}; expected one of: {names}. Rename yours, or "
            "name the text column with --dataset_text_field."
        )
    return dataset


def row_digest(row: dict[str, Any]) -> str:
    """Return a digest of a row's content, 16 hexadecimal digits of a SHA-256: it names the row in whatever order."""
    content = json.dumps(row, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:16]


def rows_digest(dataset: Dataset) -> str:
    """Return a digest of all rows' content, in their order."""
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(1024):
        for row in table.to_pylist():
            digest.update(row_digest(row).encode())
    return digest.hexdigest()
