"""
Training data from the Hub or from files, in TRL's formats, checked before anything is loaded or
written.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import itertools
import json
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    ArrowBasedBuilder,
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    IterableDatasetDict,
    Json,
    List,
    SplitGenerator,
    Value,
    load_dataset,
    load_dataset_builder,
)
from datasets.features.features import register_feature
from datasets.packaged_modules.json.json import Json as JsonBuilder
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_dataset

from eaft.errors import ConfigurationError, first_line
from eaft.evaluation.launch import processes
from eaft.training.config import EAFTConfig
from eaft.training.held_out import check_apart
from eaft.training.replay import check_replay
from eaft.training.row_checks import check_rows
from eaft.training.template_checks import check_templates, told
from eaft.training.template_findings import Finding
from eaft.training.trl_internals import maybe_convert_to_chatml

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED = (".gz", ".bz2", ".xz")  # Python unpacks them; they follow one of the above


def load_splits(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> DatasetDict:
    """
    Load the data that TRL's flags describe; `dataset_name` may also be a local file (its rows
    become `train`).

    Raises:
        ConfigurationError: no data is named, or it is missing or unreadable.
    """
    name = script_args.dataset_name
    if name is None and not dataset_args.datasets:
        raise ConfigurationError(
            "dataset_name is missing: give a Hub id, a .jsonl, .json, .csv or .parquet file, or a"
            " folder."
        )
    path = Path(name or "").expanduser()
    ending = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    options: dict[str, Any] = {
        "name": script_args.dataset_config,
        "streaming": script_args.dataset_streaming,
    }
    if name and (ending in BUILDERS or path.is_absolute() or name.startswith(("./", "../", "~"))):
        if not path.exists():
            raise ConfigurationError(f"dataset_name={name!r}: there is no such file or folder.")
        if path.is_file():
            if ending not in BUILDERS:
                raise ConfigurationError(
                    f"dataset_name={name!r}: expected one of {', '.join(BUILDERS)}, which may be"
                    f" packed ({', '.join(COMPRESSED)})."
                )
            if path.stat().st_size == 0:
                raise ConfigurationError(f"dataset_name={name!r}: the file is empty.")
            name, options["data_files"] = BUILDERS[ending], str(path)
        else:
            name = str(path)
    where = f"dataset_name={script_args.dataset_name!r}"
    if dataset_args.datasets:
        where = f"datasets={[part.path for part in dataset_args.datasets]}"
    try:
        return mixture(dataset_args) if dataset_args.datasets else load(name, **options)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}, {error}") from error
    except Exception as error:  # each format has its own errors, as causes of the library's
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):
            raise ConfigurationError(f"{where}: the data set is empty.") from error
        raise ConfigurationError(f"{where} cannot be read. ({first_line(cause)})") from error


def load(path: str, streaming: bool, **options: Any) -> Any:
    """
    Return the splits, as `load_dataset` does. JSON is read by `JsonRows`, except for a stream of
    remote files.
    """
    builder = load_dataset_builder(path, **options)
    files = builder.config.data_files
    if not isinstance(builder, JsonBuilder) or (
        streaming and any("://" in f for fs in files.values() for f in fs)
    ):
        return load_dataset(path, streaming=streaming, **options)
    return json_splits(builder, streaming)


def json_splits(builder: JsonBuilder, streaming: bool = False) -> Any:
    """Return the splits of files of JSON, as `JsonRows` reads them."""
    splits = {}
    for split, data_files in builder.config.data_files.items():
        rows = JsonRows(
            dataset_name=builder.dataset_name,
            data_files={split: data_files},
            hash=version("eaft"),
            token=builder.token,
        )
        if streaming:
            splits[split] = rows.as_streaming_dataset(split)
        else:
            rows.download_and_prepare()
            splits[split] = rows.as_dataset(split)
    return IterableDatasetDict(splits) if streaming else DatasetDict(splits)


def mixture(config: DatasetMixtureConfig) -> DatasetDict:
    """
    Return TRL's mixture of data sets.

    If all are JSON files, TRL gets the Arrow files that `JsonRows` writes. If some are typed files
    (Parquet), TRL reads the JSON itself, so that the columns fit.
    """
    builders = [
        load_dataset_builder(
            part.path, name=part.name, data_dir=part.data_dir, data_files=part.data_files
        )
        for part in config.datasets
    ]
    if not config.streaming and all(isinstance(builder, JsonBuilder) for builder in builders):
        parts = []
        for part, builder in zip(config.datasets, builders, strict=True):
            files = {
                split: [f["filename"] for f in rows.cache_files]
                for split, rows in json_splits(builder).items()
            }
            parts.append(replace(part, path="arrow", name=None, data_dir=None, data_files=files))
        config = replace(config, datasets=parts)
    return get_dataset(config)


@dataclass
class ExactJson(Json):
    """
    A column of JSON whose values are read as they were written.

    The `Json` of datasets 5.2 rounds numbers to 10 decimals, and parses a text that happens to be
    JSON.
    """

    _type: str = field(default="ExactJson", init=False, repr=False)

    def encode_example(self, example_data: Any) -> str | None:
        """Return the value as JSON text."""
        return None if example_data is None else json.dumps(example_data)

    def decode_example(self, example_data: str | None, token_per_repo_id: Any = None) -> Any:
        """Return the value of JSON text."""
        return None if example_data is None else json.loads(example_data)


with warnings.catch_warnings(action="ignore", category=UserWarning):  # "experimental"
    register_feature(ExactJson, "ExactJson")


class JsonRows(ArrowBasedBuilder):
    """
    Reads files of JSON (an object a line, or one list of objects), and keeps every row as it is.

    A column that holds anything but numbers, texts or lists of integers is `ExactJson`. So no row
    gets the keys of another row, and types may differ between rows. `datasets` would infer the
    types from the first 10 MiB.

    Messages of `from` and `value` become `role` and `content` here, by TRL's function. TRL would
    convert them later in a map, which infers types batch by batch.
    """

    def _info(self) -> DatasetInfo:
        return DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        files = {
            split: dl_manager.download_and_extract(names)
            for split, names in self.config.data_files.items()
        }
        self.info.features = features(row for names in files.values() for row in json_rows(names))
        if not self.info.features:
            raise ConfigurationError("the data set is empty.")
        return [SplitGenerator(split, {"files": tuple(names)}) for split, names in files.items()]

    def _generate_tables(self, files: tuple[str, ...]) -> Iterator[tuple[int, pa.Table]]:
        rows = json_rows(files)
        for number, batch in enumerate(iter(lambda: list(itertools.islice(rows, 1000)), [])):
            yield number, table(batch, self.info.features)


def to_dataset(rows: list[dict[str, Any]]) -> Dataset:
    """
    Return rows as a data set in memory, each as it is: as `JsonRows` would read them from a file.
    """
    columns = features(rows)
    return Dataset(table(rows, columns), info=DatasetInfo(features=columns))


def table(rows: list[dict[str, Any]], columns: Features) -> pa.Table:
    """Return rows as a table with these columns."""
    arrays = []
    for name, column in columns.items():
        values = [row.get(name) for row in rows]
        if name == "chat_template_kwargs":  # None would break TRL's call
            values = [value or {} for value in values]
        if isinstance(column, ExactJson):
            arrays.append(
                pa.array([column.encode_example(v) for v in values], pa.string()).cast(
                    column.pa_type
                )
            )
        else:
            arrays.append(pa.array(values, columns.arrow_schema.field(name).type))
    return pa.table(arrays, names=list(columns))


def features(rows: Iterable[dict[str, Any]]) -> Features:
    """Return the columns of rows and their types."""
    kinds: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(name, set()).add(kind(value))
    return Features(
        {name: column_of(frozenset(values) - {"null"}) for name, values in kinds.items()}
    )


def kind(value: Any) -> str:
    """Return the kind of column that can hold this value."""
    if type(value) is int:
        return "int64" if -(1 << 63) <= value < 1 << 63 else "json"
    if (
        isinstance(value, list)
        and set(map(type, value)) <= {int}
        and all(kind(v) == "int64" for v in value)
    ):
        return "list"
    return {str: "string", bool: "bool", float: "float64", type(None): "null"}.get(
        type(value), "json"
    )


@functools.cache
def column_of(kinds: frozenset[str]) -> Any:
    """Return the type of a column that holds values of these kinds."""
    if kinds == {"list"}:
        return List(Value("int64"))
    if kinds == {"int64", "float64"}:
        return Value("float64")
    return Value(*kinds) if len(kinds) == 1 and kinds != {"json"} else ExactJson()


def json_rows(files: Iterable[str]) -> Iterator[dict[str, Any]]:
    """
    Yield the rows of JSON Lines, or of a list of objects, one file after another.

    Raises:
        ConfigurationError: a line is not UTF-8, not JSON, not an object, or no text.
    """
    for file in files:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                    if line.lstrip().startswith(b"["):
                        for index, row in enumerate(
                            parsed(line + lines.read(), f"file {Path(file).name}")
                        ):
                            yield as_row(row, f"row {index}")
                        break
                if line.strip():
                    yield as_row(parsed(line.strip(), f"line {number}"), f"line {number}")


def parsed(text: bytes, where: str) -> Any:
    """
    Return the value of JSON text.

    Raises:
        ConfigurationError: it is not UTF-8, not JSON, or no text: it has half of a surrogate pair.
    """
    try:
        value = json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{where} is not UTF-8 ({first_line(error)}): save it as UTF-8, as iconv -f latin1 -t"
            " utf8 does."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{where} is not JSON ({first_line(error)}): give one object a line, or one list of"
            " objects."
        ) from error
    if re.search(rb"\\u[dD]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ConfigurationError(
                f"{where} has half of a surrogate pair ({first_line(error)}): remove it, it is no"
                " character."
            ) from error
    return value


def as_row(value: Any, where: str) -> dict[str, Any]:
    """
    Return a row, its messages with `role` and `content`.

    Raises:
        ConfigurationError: it is no object.
    """
    if not isinstance(value, dict):
        raise ConfigurationError(
            f"{where} is {json.dumps(value)[:40]}: each row must be an object, as {{...}}."
        )
    if not {"messages", "conversations"} <= value.keys():
        value = maybe_convert_to_chatml(value)
    return value


def exclude_rows(dataset: Any, file: str) -> Any:
    """
    Return a data set without the rows that a file names, the others in their order.

    Args:
        dataset: a split, as loaded.
        file: JSON Lines with `row` (its index, from 0) and `digest` (its `row_digest`), as `eaft
            view` exports them.

    Raises:
        ConfigurationError: the file cannot be read, was made from other data, or names every row.
    """
    name = f"exclude_examples={file!r}"
    if not isinstance(dataset, Dataset):
        raise ConfigurationError(
            f"{name} names rows by number, and a stream has no numbers: leave dataset_streaming"
            " out."
        )
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
                f"{where}: expected a JSON map with `row` and `digest`, as `eaft view` exports"
                " examples."
            ) from error
        if entry.get("origin", "data") != "data":
            raise ConfigurationError(
                f"{where}: this is no row of the data but the model's own answer"
                f" ({entry['origin']}). Export examples of the data alone."
            )
        if (
            type(row) is not int
            or not 0 <= row < len(dataset)
            or row_digest(dataset[row]) != digest
        ):
            raise ConfigurationError(
                f"{where}: row {row!r} of this data ({len(dataset)} rows) is not the one that was"
                " exported. Inspect this data as it is, with no rows excluded (with --all if it is"
                " JSON Lines), and export again."
            )
        excluded.add(row)
    if len(excluded) == len(dataset):
        raise ConfigurationError(f"{name} names all {len(dataset)} rows: none is left to train on.")
    return dataset.select([row for row in range(len(dataset)) if row not in excluded])


def select_split(
    splits: DatasetDict,
    split: str,
    flag: str,
    text_field: str,
    numbers: Sequence[int] | None = None,
) -> Any:
    """
    Return one split after checking that it has rows, in a format TRL's SFT takes.

    Args:
        numbers: of its rows in the data that they were chosen from; None: 0, 1, 2, ...

    Raises:
        ConfigurationError: there is no such split, it is empty, its columns are none of the
            expected, or a row holds what cannot be trained on.
    """
    if split not in splits:
        raise ConfigurationError(f"{flag}={split!r}: the data has only {', '.join(splits)}.")
    dataset = splits[split]
    first = next(iter(dataset), None)
    if first is None:
        raise ConfigurationError(f"{flag}={split!r}: the data set is empty.")
    expected = [
        {"messages"},
        {"prompt", "completion"},
        {text_field},
        {"conversations"},
        {"input_ids"},
    ]
    if not any(columns <= first.keys() for columns in expected):
        names = ", ".join(" + ".join(sorted(columns, reverse=True)) for columns in expected)
        raise ConfigurationError(
            f"{flag}={split!r} has the columns {', '.join(first)}; expected one of: {names}."
            " Rename yours, or set dataset_text_field to the name of the text column."
        )
    check_rows(dataset, f"{flag}={split!r}", text_field, numbers)
    return dataset


def load_rows(path: str, text_field: str, where: str) -> Dataset:
    """
    Return the rows of a file, in any form that training takes.

    Raises:
        ConfigurationError: there is no such file, it cannot be read, or its rows have none of the
            forms.
    """
    if not Path(path).expanduser().is_file():
        raise ConfigurationError(f"{where}: {path}: there is no such file.")
    try:
        splits = load_splits(
            ScriptArguments(dataset_name=str(Path(path).resolve())), DatasetMixtureConfig()
        )
        return select_split(splits, "train", "dataset_train_split", text_field)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from error


def row_digest(row: dict[str, Any]) -> str:
    """
    Return a digest of a row's content, 16 hexadecimal digits of a SHA-256. It identifies
    the row, whatever the order of rows and keys.
    """
    content = json.dumps(row, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:16]


def rows_digest(dataset: Dataset) -> str:
    """Return a digest of all rows' content, in their order."""
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(1024):
        for row in table.to_pylist():
            digest.update(row_digest(row).encode())
    return digest.hexdigest()


def load_data(
    script_args: ScriptArguments,
    args: EAFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    splits: DatasetDict | None = None,
    numbers: Sequence[int] | None = None,
) -> tuple[Any, Any]:
    """
    Return the training data and, if the recipe evaluates, the evaluation data, before a model is
    loaded or converted.

    Args:
        splits: that were loaded already.
        numbers: of the training rows in the data that they were chosen from, `exclude_examples`
            included; None: all were.

    Raises:
        ConfigurationError: no model or no data is named, or the data cannot be used.
    """
    if model_args.model_name_or_path is None:
        raise ConfigurationError(
            "model_name_or_path is missing: give a Hub id, a folder or a .gguf file."
        )
    if splits is None:
        splits = load_splits(script_args, dataset_args)
    names = [(script_args.dataset_train_split, "dataset_train_split")]
    if args.eval_strategy != "no" and args.held_out is None:
        names.append((script_args.dataset_test_split, "dataset_test_split"))
    train, *evaluation = [
        select_split(
            splits,
            split,
            flag,
            args.dataset_text_field,
            numbers if flag == "dataset_train_split" else None,
        )
        for split, flag in names
    ]
    if args.exclude_examples is not None and numbers is None:
        train = exclude_rows(train, args.exclude_examples)
    if args.replay:
        check_replay(train, args)
    if args.held_out is not None:
        evaluation = [load_rows(args.held_out, args.dataset_text_field, "held_out")]
        if isinstance(train, Dataset):  # a stream is read once
            check_apart(evaluation[0], train, args.dataset_text_field, "held_out")
    return train, evaluation[0] if evaluation else None


def check_data(
    script_args: ScriptArguments,
    args: EAFTConfig,
    model_args: ModelConfig,
    train_dataset: Any,
    eval_dataset: Any,
    numbers: Sequence[int] | None = None,
) -> list[Finding]:
    """
    Print the findings of `check_templates`; return the findings about the training data.

    Args:
        numbers: of the training rows in the data that they were chosen from; None: 0, 1, 2, ...

    Raises:
        ConfigurationError: the chat template raises on a row.
    """
    test = "held_out" if args.held_out is not None else "dataset_test_split"
    names = {"dataset_train_split": train_dataset, test: eval_dataset}
    flags = {**vars(script_args), "held_out": args.held_out}
    rows = {f"{flag}={flags[flag]!r}": data for flag, data in names.items()}
    findings = check_templates(rows, args, model_args, numbers)
    if processes().is_main_process:
        print(told(findings), end="", file=sys.stderr)
    return findings.get(next(iter(rows)), [])
