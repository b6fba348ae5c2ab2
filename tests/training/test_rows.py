"""A loss that is not finite: which rows of the data set the message names, for every way that rows reach the model."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from eaft import EAFTConfig, EAFTTrainer, cli
from eaft.errors import NonFiniteError
from eaft.training.rows import ROWS, RowCollator, describe_rows, number_rows
from tests.conftest import make_model, make_rows, make_tokenizer
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
    with pytest.raises(NonFiniteError, match=re.escape("in evaluation; the batch's rows are 0: ")) as raised:
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

    settings = {**DEFAULTS, "padding_free": padding_free, "max_length": None if padding_free else 64}
    trainer = EAFTTrainer(
        make_model(),
        args=EAFTConfig(str(tmp_path), **settings),
        train_dataset=IterableDataset.from_generator(endless),
        processing_class=make_tokenizer(),
    )
    message = failure(trainer)
    assert message.count("(unnumbered): ") == 4
    for i in range(4, 8):
        assert f"(unnumbered): {trainer.processing_class.decode([3 + i] * (4 + i % 3))!r}" in message
    assert len(read) < 100


def test_numbering_maps_nothing_and_leaves_the_data_set_as_it_was():
    dataset = Dataset.from_list([{"input_ids": [i], "labels": [i]} for i in range(9)]).shuffle(seed=0)
    numbered = number_rows(dataset)
    assert numbered._data is dataset._data
    assert numbered.column_names == dataset.column_names
    assert numbered[3] == dataset[3]
    rows = numbered.remove_columns("labels").__getitems__([4, 2])
    assert rows == [{"input_ids": dataset[i]["input_ids"], ROWS: i} for i in (4, 2)]
    assert ROWS not in dataset.__getitems__([4, 2])[0]


def test_a_collator_of_images_sees_its_own_columns_and_its_rows_are_named():
    """Images become tokens in TRL's other collator, which is given the rows as the data set has them."""
    seen = []

    def collate(rows):
        seen.extend(rows)
        ids = torch.tensor([[9, 9, 9, 9, 70 + i, 71 + i] for i in range(len(rows))])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "pixel_values": ids}

    dataset = Dataset.from_list([{"prompt": "p", "completion": "c", "images": [i]} for i in range(5)])
    batch = RowCollator(collate)(number_rows(dataset).__getitems__([3, 1]))
    assert seen == [dataset[3], dataset[1]]
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids.tolist())))
    assert describe_rows(batch, tokenizer, images=True) == "3: '9 70 71', 1: '9 71 72'"


def test_a_long_row_is_named_by_how_it_begins():
    rows = number_rows(Dataset.from_list([{"input_ids": list(range(200))}, {"input_ids": [7]}]))
    batch = RowCollator(DataCollatorForLanguageModeling(0, padding_free=True))(rows.__getitems__([1, 0]))
    tokenizer = SimpleNamespace(decode=lambda ids: ids.tolist())
    assert describe_rows(batch, tokenizer, images=False) == f"1: [7], 0: {list(range(32))}"


def test_every_process_has_the_message_and_uneven_shares_are_measured_as_one(tmp_path):
    """Two processes: see `rows_check`, which they run."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path[1:]])}
    command += ["-m", "tests.training.rows_check", str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


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
    assert bool(waited) == (not printed)  # the first has spoken before a launcher sees that one has left


def fail(argv):
    raise NonFiniteError("nan at 3")


class Words:
    def decode(self, ids):
        return " ".join(map(str, ids.tolist()))


def test_rows_of_a_collator_of_ones_own():
    """It makes two rows of three, or has no mask: all texts are shown, with numbers only where they are known."""
    ids, numbers = torch.tensor([[5, 6, 0], [7, 8, 9]]), torch.tensor([[4, 2], [1, 1], [3, 2]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), ROWS: numbers}
    assert describe_rows(batch, Words(), images=False) == "(unnumbered): '5 6', (unnumbered): '7 8 9'"
    without_mask = {"input_ids": ids, ROWS: numbers[:2]}
    assert describe_rows(without_mask, Words(), images=False) == "4: '5 6 0', 1: '7 8 9'"


def test_a_data_set_of_ones_own_class_keeps_its_ways(model, tokenizer, tmp_path):
    class Own(Dataset):
        def __getitems__(self, keys):
            raise NotImplementedError

    trainer = EAFTTrainer(model, train_dataset=Dataset.from_list(make_rows()), processing_class=tokenizer,
                          args=EAFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"))  # fmt: skip
    trainer.train_dataset.__class__ = Own
    with pytest.raises(NotImplementedError):
        next(iter(trainer.get_train_dataloader()))
