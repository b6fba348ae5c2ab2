"""
A loss that is not finite: which rows of the data set the message names, for every way that rows
reach the model.
"""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from eaft import EAFTConfig, EAFTTrainer, cli
from eaft.errors import NonFiniteError
from eaft.training.rows import describe_rows
from tests.conftest import make_model, make_rows, make_tokenizer
from tests.processes import run_ranks
from tests.training import rows_check
from tests.training.test_trainer import DEFAULTS, build


def poison(trainer, step):
    """Make the hidden states of one step NaN."""
    forward = trainer.model.model.forward

    def poisoned(*args, **kwargs):
        output = forward(*args, **kwargs)
        if trainer.state.global_step == step:
            output.last_hidden_state = output.last_hidden_state * math.nan
        return output

    trainer.model.model.forward = poisoned


def failure(trainer, step=1):
    """Train into the poisoned step; return the message."""
    poison(trainer, step)
    with pytest.raises(NonFiniteError) as raised:
        trainer.train()
    return str(raised.value)


SETTINGS = {
    "padded": {},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "workers": {"dataloader_num_workers": 1},
    "every column kept": {
        "remove_unused_columns": False,
        "rows": [{"input_ids": [i + 3] * 9, "labels": [i + 3] * 9} for i in range(16)],
    },
    "padding-free": {"padding_free": True, "max_length": None},
    "padded to a multiple": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
    "packed": {"packing": True, "max_length": 32, "per_device_train_batch_size": 2},
    "packed, wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    "shuffled": {"shuffle_dataset": True},
    "followed": {"gate": "talr", "shuffle_dataset": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_rows_are_named_by_index_and_text(setting, tmp_path):
    trainer = build(EAFTTrainer, tmp_path, **SETTINGS[setting])
    message = failure(trainer)
    assert "The loss is nan in training, step 2; the batch's rows are" in message
    named = re.findall(r"(?:are |, )(\d+): (['\"].*?['\"])(?=, \d+:|\. The weights)", message)
    assert len(named) == trainer.args.per_device_train_batch_size
    for index, text in named:
        ids = trainer.train_dataset[int(index)]["input_ids"][:32]
        assert text == repr(trainer.processing_class.decode(ids))


def test_rows_of_an_evaluation_are_named(tmp_path):
    trainer = build(EAFTTrainer, tmp_path, eval_rows=make_rows(5))
    poison(trainer, 0)
    text = trainer.processing_class.decode(trainer.eval_dataset[4]["input_ids"][:32])
    with pytest.raises(
        NonFiniteError, match=re.escape("in evaluation; the batch's rows are 0: ")
    ) as raised:
        trainer.evaluate()
    assert f"4: {text!r}" in str(raised.value)


@pytest.mark.parametrize("padding_free", [False, True])
def test_rows_of_a_stream_have_text_but_no_number_and_it_is_not_read_again(padding_free, tmp_path):
    read = []

    def endless():
        i = 0
        while True:
            read.append(i)
            yield {"input_ids": [3 + i % 200] * (4 + i % 3), "labels": [3 + i % 200] * (4 + i % 3)}
            i += 1

    settings = {
        **DEFAULTS,
        "padding_free": padding_free,
        "max_length": None if padding_free else 64,
    }
    trainer = EAFTTrainer(
        make_model(),
        args=EAFTConfig(str(tmp_path), **settings),
        train_dataset=IterableDataset.from_generator(endless),
        processing_class=make_tokenizer(),
    )
    message = failure(trainer)
    assert message.count("(unnumbered): ") == 4
    for i in range(4, 8):
        assert (
            f"(unnumbered): {trainer.processing_class.decode([3 + i] * (4 + i % 3))!r}" in message
        )
    assert len(read) < 100


def keys_seen(trainer_class, tmp_path):
    """
    Train a step with a collator and a loss of one's own; return the keys that they see of rows and
    batches.
    """
    seen = set()

    class Watching(trainer_class):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.update(("step", key) for key in inputs)
            return super().training_step(model, inputs, *args, **kwargs)

        def prediction_step(self, model, inputs, *args, **kwargs):
            seen.update(("prediction", key) for key in inputs)
            return super().prediction_step(model, inputs, *args, **kwargs)

        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.update(("batch", key) for key in inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    def collate(rows):
        seen.update(("row", key) for row in rows for key in row)
        return DataCollatorForLanguageModeling(0)(rows)

    config = EAFTConfig if issubclass(trainer_class, EAFTTrainer) else SFTConfig
    args = config(str(tmp_path), **{**DEFAULTS, "max_steps": 1})
    rows = Dataset.from_list(make_rows())
    trainer = Watching(make_model(), args, collate, rows, rows.select(range(4)), make_tokenizer())
    trainer.train()
    trainer.evaluate()
    seen.update(("loader", key) for key in next(iter(trainer.get_train_dataloader())))
    return seen


def test_code_of_ones_own_sees_what_it_sees_under_trl(tmp_path):
    assert keys_seen(EAFTTrainer, tmp_path / "ours") == keys_seen(SFTTrainer, tmp_path / "theirs")


class Words:
    def decode(self, ids):
        return " ".join(map(str, ids))


def test_rows_that_are_not_in_the_data_set_have_no_number():
    dataset = Dataset.from_list([{"input_ids": [5, 6]}, {"input_ids": [7, 8, 9]}])
    batch = {"input_ids": torch.tensor([[7, 8, 9], [7, 8, 0]])}
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    assert describe_rows(batch, Words(), dataset) == "1: '7 8 9', (unnumbered): '7 8'"
    images = {"input_ids": torch.tensor([[9, 9, 9, 70, 71]])}
    assert describe_rows(images, Words(), None, images=True) == "(unnumbered): '9 70 71'"


def test_a_long_row_is_named_by_how_it_begins():
    dataset = Dataset.from_list([{"input_ids": list(range(1, 200))}, {"input_ids": [7]}])
    batch = DataCollatorForLanguageModeling(0, padding_free=True)([dataset[1], dataset[0]])
    shown = " ".join(map(str, range(1, 33)))
    assert describe_rows(batch, Words(), dataset) == f"1: '7', 0: {shown!r}"


def test_a_packed_row_is_told_from_one_that_begins_like_it():
    packed = [
        {"input_ids": [3, 4], "seq_lengths": [2]},
        {"input_ids": [3, 4, 5, 6, 7], "seq_lengths": [2, 3]},
    ]
    rows = Dataset.from_list(packed).shuffle(seed=1)
    index = {tuple(row["input_ids"]): i for i, row in enumerate(rows)}[3, 4, 5, 6, 7]
    batch = DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=8)([packed[1]])
    assert describe_rows(batch, Words(), rows) == f"{index}: '3 4 5 6 7'"


def test_every_process_has_the_message_and_uneven_shares_are_measured_as_one(tmp_path):
    """Two processes: see `rows_check`, which they run."""
    run_ranks(rows_check.main, tmp_path)


@pytest.mark.parametrize(("rank", "printed"), [(None, 1), ("0", 1), ("1", 0)])
def test_the_command_prints_an_error_once(rank, printed, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(main=fail))
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err.count("eaft train: error: nan at 3") == printed
    assert bool(waited) == (
        not printed
    )  # the first has spoken before a launcher sees that one has left


def fail(argv):
    raise NonFiniteError("nan at 3")
