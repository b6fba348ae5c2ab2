"""
Run in two ranks by test_rows.py: messages that every process has, data prepared once, measured in
two shares.
"""

import json
import math

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset, load_dataset

from eaft import EAFTConfig, EAFTTrainer
from eaft.errors import NonFiniteError
from eaft.training.gate_measurements import MEASUREMENTS_FILE
from tests.conftest import make_model, make_rows, make_tokenizer
from tests.training.test_trainer import DEFAULTS


def make_trainer(path, data, **settings):
    args = EAFTConfig(
        str(path), **{**DEFAULTS, "max_steps": 3, "per_device_train_batch_size": 2, **settings}
    )
    return EAFTTrainer(
        make_model(), args=args, train_dataset=data, processing_class=make_tokenizer()
    )


def same_message(folder):
    """One process's loss is not finite: both raise the same text, with its rows."""
    rank = dist.get_rank()
    trainer = make_trainer(folder / "nan", Dataset.from_list(make_rows()))
    forward = trainer.model.model.forward

    def poisoned(*args, **kwargs):
        output = forward(*args, **kwargs)
        if rank == 1:
            output.last_hidden_state = output.last_hidden_state * math.nan
        return output

    trainer.model.model.forward = poisoned
    with pytest.raises(NonFiniteError) as raised:
        trainer.train()
    messages = [None, None]
    dist.all_gather_object(messages, str(raised.value))
    assert messages[0] == messages[1]
    assert "The loss is nan in training, step 1; in process 1 the batch's rows are " in messages[0]
    assert messages[0].count(" plus ") == 2  # the rows of process 1, and only those


def measured_as_one(folder):
    """Shares of 3, 3, 1 and no rows give each example's nll as often as it is there: once."""
    file = folder / "rows.jsonl"
    if dist.get_rank() == 0:
        file.write_text("".join(json.dumps(row) + "\n" for row in make_rows(7)))
    dist.barrier()
    data = load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(folder / "cache")
    )
    trainer = make_trainer(
        folder / "flow", data, gate="flow", per_device_eval_batch_size=3, max_steps=1
    )
    trainer.train()
    measured = json.loads((folder / "flow" / MEASUREMENTS_FILE).read_text())
    assert measured["examples"] == 7
    labels = sum(label != -100 for row in trainer._followed.loose for label in row["labels"][1:])
    assert measured["tokens"] == labels
    model = make_model()
    for row, nll in zip(trainer._followed.loose, measured["example_nll"], strict=True):
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        assert math.isclose(model(ids, labels=labels).loss.item(), nll, rel_tol=1e-5)
    # The second process read what the first had prepared
    caches = [None, None]
    dist.all_gather_object(caches, [f["filename"] for f in trainer.train_dataset.cache_files])
    assert caches[0] == caches[1]
    assert caches[0]


def main(folder):
    dist.init_process_group("gloo")
    same_message(folder)
    measured_as_one(folder)
