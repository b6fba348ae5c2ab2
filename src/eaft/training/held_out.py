"""
Held-out rows, by which a learning rate, a checkpoint or a model is chosen. They are in no run's
training data, and are prepared as training data is.

In all functions `where` is the user's name for the rows; each error begins with it.
"""

from __future__ import annotations

import json
from typing import Any

from datasets import Dataset

from eaft.errors import ConfigurationError
from eaft.evaluation.drift import prompt_of
from eaft.evaluation.model_settings import load_tokenizer
from eaft.models import context_length, text_config
from eaft.training.prepare import prepare_rows
from eaft.training.templates import without_nulls
from eaft.training.trl_internals import maybe_convert_to_chatml

Row = dict[str, list[int]]  # `input_ids` and `labels`; -100 is no label


def check_number(where: str, rows: int) -> None:
    """
    Check that there are enough rows to measure on.

    Raises:
        ConfigurationError: fewer than two.
    """
    if rows < 2:
        raise ConfigurationError(
            f"{where}: {rows} row: an interval needs at least two rows, better many more."
        )


def check_apart(rows: Dataset, train: Dataset, text_field: str, where: str) -> None:
    """
    Check that no row is trained on.

    Raises:
        ConfigurationError: the training data has the prompt of a row or, for plain text, the row.
    """
    places: dict[str, int] = {}
    for i, row in enumerate(rows):
        places.setdefault(question(row, text_field), i)
    columns = {"prompt", "messages", "conversations", text_field, "input_ids"} & set(
        train.column_names
    )
    train = train.select_columns(sorted(columns))
    if trained := {
        places[asked] for row in train if (asked := question(row, text_field)) in places
    }:
        raise ConfigurationError(
            f"{where}: row {min(trained)} is trained on, so its nll says nothing about new rows."
            " Take rows that are not trained on."
        )


def question(row: dict[str, Any], text_field: str) -> str:
    """Return what identifies a row, as JSON: its prompt, its text or its token ids."""
    row = without_nulls(maybe_convert_to_chatml(row))
    if "prompt" in row or "messages" in row:
        asked = prompt_of(row)
        asked = asked["prompt"] if isinstance(asked, dict) else asked
    else:
        asked = row.get(text_field, row.get("input_ids"))
    return json.dumps(asked, sort_keys=True)


def prepare(dataset: Dataset, configs: list[Any], model: str, where: str) -> list[Row]:
    """
    Return rows as a run prepares its training data. A row without a labelled token becomes empty.

    Args:
        configs: the run's arguments, as `eaft.training.train.train` takes them.
        model: the base model, as it can be loaded.

    Raises:
        ConfigurationError: they cannot be prepared.
    """
    _, args, model_args, _ = configs
    source = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    try:
        prepared = prepare_rows(load_tokenizer(model, source), args, dataset).cut
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from error
    rows: list[Row] = []
    for row in prepared:
        labels = [label if label >= 0 else -100 for label in row["labels"]]
        labelled = any(label >= 0 for label in labels[1:])
        rows.append(
            {"input_ids": row["input_ids"], "labels": labels}
            if labelled
            else {"input_ids": [], "labels": []}
        )
    return rows


def check_fit(rows: list[Row], model: str, model_args: dict[str, Any], where: str) -> None:
    """
    Check that the base model can read prepared rows.

    Args:
        model_args: where it comes from, as `Protocol.model_args`.

    Raises:
        ConfigurationError: a row is longer than its context, or has a token that it does not know.
    """
    config, context = text_config(model, model_args), context_length(model, model_args)
    for i, row in enumerate(rows):
        if (length := len(row["input_ids"])) > context:
            raise ConfigurationError(
                f"{where}: row {i} has {length} tokens, more than the model's context of"
                f" {context}: leave it out."
            )
        if (
            row["input_ids"]
            and (largest := max(*row["input_ids"], *row["labels"])) >= config.vocab_size
        ):
            raise ConfigurationError(
                f"{where}: row {i} has the token id {largest}, and the base model's"
                f" vocabulary has {config.vocab_size} tokens, so its nll cannot be measured: take"
                " an eos_token and a chat template (chat_template_path) that add no tokens."
            )
