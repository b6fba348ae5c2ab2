"""
Rows for `eaft eval --held_out`, prepared as the tuned model's run prepared its training data.

`eaft tune` and `eaft compare` choose by the same nll.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from eaft.errors import ConfigurationError
from eaft.evaluation.drift import prompt_of
from eaft.evaluation.held_out import Asked, HeldOutRows
from eaft.evaluation.model_settings import load_tokenizer
from eaft.files import read_json
from eaft.models import find_model, template_date, template_today
from eaft.training.config import EAFTConfig
from eaft.training.data import load_data, load_rows
from eaft.training.held_out import check_apart, check_fit, check_number, prepare
from eaft.training.run_folder import RUN_FILE, TUNED_RUN, RunRecord
from eaft.training.template_checks import check_templates
from eaft.training.templates import without_nulls
from eaft.training.trl_internals import maybe_convert_to_chatml

WHERE = "--held_out"
# The settings of a run that change its rows, their tokens or their labels
SHAPING = (
    *("max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss"),
    *("eos_token", "chat_template_path", "dataset_text_field", "dataset_kwargs"),
    *("trust_remote_code", "template_date", "exclude_examples"),
)
MASKED = "<EOS_TOKEN>"  # in a `run.json` of eaft 0.1.0; the model's own tokenizer has it


def read_rows(path: str, model: str, base: str, model_args: dict[str, Any]) -> HeldOutRows:
    """
    Return the rows of a file, to be measured on a model and its base.

    A folder of `eaft train`, `tune` or `compare` has a `run.json`, whose settings prepare the rows.
    Another model's rows are prepared by its own tokenizer, with the defaults of `eaft train`, and
    not cut.

    Args:
        model: the tuned model, as the user named it; `base` likewise.
        model_args: where both come from, as `Protocol.model_args`.

    Raises:
        ConfigurationError: there is no such file, a row cannot be used or has no labelled token, or
            a row was trained on.
    """
    base = find_model(base, model_args)
    run = find_run(model)
    record: RunRecord | None = None
    if run is not None:
        way = f"leave {WHERE} out, or name the model by another folder."
        record = read_json(run / RUN_FILE, RunRecord, way)
    config = None if record is None else record.get("config")
    known = config is not None
    settings = {name: value for name, value in (config or {}).items() if name in SHAPING}
    if settings.get("eos_token") == MASKED:
        settings["eos_token"] = load_tokenizer(model).eos_token
    settings.setdefault("max_length", EAFTConfig.max_length if known else None)
    template = settings.get("chat_template_path")
    if template and str(template).endswith((".jinja", ".j2")) and not Path(template).is_file():
        raise ConfigurationError(
            f"{WHERE}: chat_template_path={template!r} of {run}/{RUN_FILE}: there is no such file,"
            " and the rows are prepared with it: put it back."
        )
    source = base if known else find_model(model, model_args)
    models = ModelConfig(
        model_name_or_path=source, model_revision=model_args.get("revision") or "main"
    )
    date = settings.get("template_date") or template_today()
    with tempfile.TemporaryDirectory() as folder, template_date(date):
        args = EAFTConfig(
            output_dir=folder,
            report_to=[],
            use_cpu=not torch.accelerator.is_available(),
            **settings,
        )
        try:
            rows, apart = checked_rows(path, run, record, args, models)
            configs = [ScriptArguments(), args, models, DatasetMixtureConfig()]
            prepared = prepare(rows, configs, source, WHERE)
        finally:
            # Arguments of training set up its processes; measuring has its own
            AcceleratorState._reset_state(reset_partial_state=True)
    if empty := [i for i, row in enumerate(prepared) if not row["input_ids"]]:
        limit = (
            "" if args.max_length is None else f" among its first {args.max_length} (max_length)"
        )
        raise ConfigurationError(
            f"{WHERE}: row {empty[0]} has no labelled token{limit}; {len(empty)} of"
            f" {len(prepared)} rows have none: leave them out."
        )
    check_fit(prepared, base, model_args, WHERE)
    return HeldOutRows(
        file=path,
        rows=prepared,
        asked=asked_by(rows),
        prepared=(
            f"as the training data of {run}"
            if known
            else f"with the defaults of eaft train, since {model} has no {RUN_FILE}"
        ),
        apart=apart,
    )


def find_run(model: str) -> Path | None:
    """Return the run's folder of a model that `eaft train`, `tune` or `compare` wrote."""
    folder = Path(model).expanduser()
    places = [folder, folder / TUNED_RUN]
    if folder.name.startswith("checkpoint-"):
        places.append(folder.parent)
    return next((place for place in places if (place / RUN_FILE).is_file()), None)


def checked_rows(
    path: str, run: Path | None, record: RunRecord | None, args: EAFTConfig, models: ModelConfig
) -> tuple[Dataset, bool]:
    """
    Return the rows, and whether they could be compared with the run's training data.

    Raises:
        ConfigurationError: as `read_rows`.
    """
    rows = load_rows(path, args.dataset_text_field, WHERE)
    check_number(WHERE, len(rows))
    check_templates({WHERE: rows}, args, models)
    train = None if record is None else training_data(record, args, models)
    if train is None:
        return rows, False
    check_apart(rows, train, args.dataset_text_field, WHERE)
    return rows, True


def training_data(record: RunRecord, args: EAFTConfig, models: ModelConfig) -> Dataset | None:
    """Return a run's training data if it is a file or folder of this machine that can be read."""
    name = record.get("dataset")
    if not isinstance(name, str) or not Path(name).expanduser().exists():
        return None
    script_args = ScriptArguments(dataset_name=name, **(record.get("dataset_flags") or {}))
    try:
        train, _ = load_data(script_args, args, models, DatasetMixtureConfig())
    except ConfigurationError:  # it has changed since, or gone
        return None
    return train if isinstance(train, Dataset) else None


def asked_by(rows: Dataset) -> list[Asked]:
    """Return the prompt and the answer of each row; plain text and token ids have neither."""
    columns = set(rows.column_names)
    asked_in = [{"prompt", "completion"}, {"messages"}, {"conversations"}]
    if "input_ids" in columns or not any(form <= columns for form in asked_in):
        return []
    questions = []
    for i, row in enumerate(rows):
        row = without_nulls(maybe_convert_to_chatml(row))
        prompt = prompt_of(row)
        asked = prompt["prompt"] if isinstance(prompt, dict) else prompt
        answer = row["completion"] if "completion" in row else row["messages"][len(asked) :]
        questions.append(Asked(i, prompt, text_of(asked), text_of(answer)))
    return questions


def text_of(value: Any) -> str:
    """Return a prompt or an answer as text; each of several messages begins with its role."""
    if isinstance(value, str):
        return value
    texts = []
    for message in value:
        content = message.get("content") or {k: v for k, v in message.items() if k != "role"}
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        texts.append(text if len(value) == 1 else f"{message['role']}: {text}")
    return "\n\n".join(texts)
