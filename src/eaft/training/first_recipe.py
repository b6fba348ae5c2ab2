"""A first recipe for a model and data: YAML with comments, which `eaft tune` and `train` read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from eaft.errors import ConfigurationError
from eaft.evaluation.model_settings import load_tokenizer
from eaft.models import context_length, resolve_model
from eaft.text import visible
from eaft.training.apart import parse_flags
from eaft.training.data import load_data
from eaft.training.prepare import prepare_rows

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # of max_length
MANY_ROWS = 1000  # from here on one epoch is suggested
BATCH = 8


@dataclass(frozen=True)
class DataFacts:
    """
    What a recipe depends on.

    Attributes:
        rows: how many the training split has.
        columns: their names.
        longest: tokens of the longest row.
        usual: tokens of the row that is longer than 99% of them.
        labelled: the share of tokens that are trained on.
        context: the model's context, in tokens.
        assistant_only: whether rows are chats, and the assistant's turns can be told apart.
    """

    rows: int
    columns: list[str]
    longest: int
    usual: int
    labelled: float
    context: int
    assistant_only: bool


def read_data(model: str, data: str) -> DataFacts:
    """
    Prepare data as training does, and count it.

    Args:
        model: a Hub id, a folder or a GGUF file.
        data: a Hub id, a file or a folder, in a form that `eaft train` takes.

    Raises:
        ConfigurationError: the model or the data cannot be read.
    """
    flags = {"model_name_or_path": model, "dataset_name": data, "use_cpu": True}
    configs = parse_flags({**flags, "max_length": LENGTHS[-1], "report_to": "none"})
    dataset, _ = load_data(*configs)
    args = configs[1]
    args.assistant_only_loss = bool({"messages", "conversations"} & set(dataset.column_names))
    try:
        prepared = prepare_rows(load_tokenizer(resolve_model(model, False)), args, dataset).whole
    except ConfigurationError:
        if not args.assistant_only_loss:
            raise
        args.assistant_only_loss = False  # the template does not mark the assistant's tokens
        prepared = prepare_rows(load_tokenizer(resolve_model(model, False)), args, dataset).whole
    lengths = np.array([len(row["input_ids"]) for row in prepared])
    labelled = sum(sum(label >= 0 for label in row["labels"]) for row in prepared)
    return DataFacts(
        rows=len(prepared),
        columns=list(dataset.column_names),
        longest=int(lengths.max()),
        usual=int(np.quantile(lengths, 0.99, method="higher")),
        labelled=labelled / int(lengths.sum()),
        context=context_length(resolve_model(model, False), {}),
        assistant_only=args.assistant_only_loss,
    )


def recipe(model: str, data: str, facts: DataFacts, output: Path) -> str:
    """Return the recipe as YAML; its comments call the file `output`."""
    fitting = [length for length in LENGTHS if length >= facts.usual]
    max_length = min(fitting[0] if fitting else LENGTHS[-1], facts.context)
    epochs = 1 if facts.rows >= MANY_ROWS else 3
    cut = "no row is cut" if facts.longest <= max_length else "longer rows are cut"
    lines = [
        f"# {facts.rows:,} rows of {visible(', '.join(facts.columns))}; up to {facts.longest:,}"
        f" tokens, {facts.labelled:.0%} of them trained on.",
        f"#     eaft tune --config {output} --max_drift 0.05    the best model within a budget",
        f"#     eaft train --config {output}                    one training run",
        "",
        *setting("model_name_or_path", model),
        *setting("dataset_name", data),
        *setting("output_dir", "out", "of eaft train; eaft tune has its own --output_dir"),
        "",
        *setting("gate", "sft", "plain SFT; eaft and others: docs/objectives.md"),
        *setting("num_train_epochs", epochs, "more for few rows, fewer for many"),
        *setting("learning_rate", 2e-5, "TRL's default; about 2e-4 with LoRA"),
        *setting("lr_scheduler_type", "cosine"),
        *setting("warmup_steps", 0.03, "a share of all steps"),
        *setting("per_device_train_batch_size", min(BATCH, facts.rows)),
        *setting("max_length", max_length, f"tokens; {cut}"),
    ]
    if facts.assistant_only:
        lines += setting("assistant_only_loss", True, "false: train on the user's turns, too")
    lines += [
        "# use_peft: true  # LoRA",
        *setting("logging_steps", 10),
        *setting("report_to", "none"),
    ]
    if not torch.accelerator.is_available():
        lines += setting("use_cpu", True, "no GPU was found on this machine")
    return "\n".join(lines) + "\n"


def setting(name: str, value: object, comment: str = "") -> list[str]:
    """Return a line of YAML."""
    line = yaml.safe_dump({name: value}, allow_unicode=True, width=float("inf")).rstrip("\n")
    return [f"{line}  # {comment}" if comment else line]


def write_recipe(model: str, data: str, output: Path) -> DataFacts:
    """
    Write a recipe, whole or not at all.

    Raises:
        ConfigurationError: the file exists, or `read_data` refuses.
    """
    if output.exists():
        raise ConfigurationError(f"--output={str(output)!r} exists: choose another file.")
    if not output.parent.is_dir():
        raise ConfigurationError(f"--output={str(output)!r}: there is no folder {output.parent}.")
    facts = read_data(model, data)
    staging = output.with_name(f"{output.name}.tmp")
    staging.write_text(recipe(model, data, facts, output))
    os.replace(staging, output)
    return facts
