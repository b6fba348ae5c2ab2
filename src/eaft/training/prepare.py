"""
Training data as the trainer prepares it, with a model of eight hidden units in place of the real
one. So the rows that are counted or inspected are the rows that would be trained on.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTTrainer

from eaft.arrow import flat, with_column
from eaft.errors import ConfigurationError
from eaft.models import vocabulary_size
from eaft.training.config import EAFTConfig
from eaft.training.following import mapped
from eaft.training.trainer import EAFTTrainer

UNLABELLED = -101  # TRL does not count this label as missing, so it drops no row


def narrow_trainer(
    tokenizer: Any, args: EAFTConfig, train_dataset: Any, eval_dataset: Any = None
) -> EAFTTrainer:
    """
    Return a trainer that has prepared the data as `eaft train` would, with a tiny model.
    """
    narrow = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    args = copy.copy(args)
    args.forgetting_eval_steps, args.model_init_kwargs, args.push_to_hub = 0, None, False
    with tempfile.TemporaryDirectory() as folder:  # the trainer makes its output folder
        args.output_dir = folder
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary_size(tokenizer), **narrow))
        return EAFTTrainer(
            model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
        )


@dataclass(frozen=True)
class PreparedRows:
    """
    A data set as it is trained on without packing: one row for each row of the data, in its order.

    Both have `input_ids` and `labels`. A negative label means "not trained on".
    """

    cut: Dataset  # to max_length
    whole: Dataset  # before that


def prepare_rows(tokenizer: Any, args: EAFTConfig, dataset: Any) -> PreparedRows:
    """
    Prepare every row as the trainer would, in order and without dropping any. (TRL shuffles rows,
    and drops rows that lose all their labels.)

    Args:
        tokenizer: changed as training changes it (`eos_token`, `chat_template_path`).
        args: the flags of training; only the data flags are used, without packing and shuffling.
        dataset: the training data.

    Raises:
        ConfigurationError: the data is a stream, has images or no labelled token, or TRL refuses
            it.
    """
    if not isinstance(dataset, Dataset):
        raise ConfigurationError(
            "Rows must have numbers, and a stream has none: set dataset_streaming false."
        )
    args = copy.copy(args)
    max_length = args.max_length
    changes: dict[str, Any] = {
        "packing": False,
        "eval_packing": False,
        "padding_free": False,
        "shuffle_dataset": False,
    }
    changes |= {
        "max_length": None,
        "gate": "sft",
        "gate_kwargs": None,
        "gate_alpha": 1.0,
        "gate_entropy": "top-k",
    }
    # Flags that matter only in training must not cause errors here
    changes |= {
        "report_to": [],
        "use_liger_kernel": False,
        "eval_strategy": "no",
        "parallelism_config": None,
    }
    for name, value in changes.items():
        setattr(args, name, value)
    try:
        trainer = narrow_trainer(tokenizer, args, dataset)
    except (ValueError, RuntimeError) as error:  # TRL's own complaints about data and flags
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(str(error)) from error
    whole = trainer.train_dataset
    if not {"input_ids", "labels"} <= set(whole.column_names):
        raise ConfigurationError(
            "The data is not prepared before training (images?), so its tokens are not known."
        )
    whole = whole.select_columns(["input_ids", "labels"])
    if trainer._skip_prepare_dataset:  # then rows are not cut either
        return PreparedRows(whole, whole)
    args.max_length = max_length
    kept = mapped(whole, keep_from_dropping, "Keeping unlabelled")
    cut = SFTTrainer._prepare_dataset(trainer, kept, tokenizer, args, False, None, "train")
    if len(cut) != len(dataset):
        raise ConfigurationError(
            f"TRL made {len(cut)} rows of {len(dataset)}, so that they cannot be followed: it drops"
            " rows without a token. Remove them from the data."
        )
    return PreparedRows(cut, whole)


def keep_from_dropping(table: pa.Table) -> pa.Table:
    """Replace label -100, so that TRL does not drop rows without a label."""
    labels, lengths = flat(table["labels"])
    return with_column(table, "labels", np.where(labels == -100, UNLABELLED, labels), lengths)
