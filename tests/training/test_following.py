"""
The passes over Arrow batches that follow examples, against plain Python; and that TRL prepares but
once.
"""

import random

import numpy as np
import pytest
from datasets import Dataset

from eaft import EAFTTrainer
from eaft.training.following import labelled, mark, number_tokens, split, unmark
from tests.training.test_objectives import SETTINGS, make_examples
from tests.training.test_trainer import build


@pytest.fixture(params=["whole", "some rows", "parts"])
def data(request):
    """
    Rows of 0 to 12 tokens: as they are, chosen out of order, or in batches that begin inside
    Arrow's buffers.
    """
    draw = random.Random(0)
    rows = [
        {
            "input_ids": [draw.choice([0, 7, 2**31 - 1, 2**32 - 1]) for _ in range(n)],
            "labels": [draw.choice([-100, -100, 5]) for _ in range(n)],
        }
        for n in [3, 0, 1, 0, *(draw.randrange(13) for _ in range(50))]
    ]
    dataset = Dataset.from_list(rows)
    if request.param == "some rows":
        dataset = dataset.select(range(40, 2, -3))
    return dataset, 7 if request.param == "parts" else 1000


def mapped(data, function, **kwargs):
    dataset, size = data
    return (
        dataset.with_format("arrow")
        .map(function, batched=True, batch_size=size, **kwargs)
        .with_format(None)
    )


def test_a_marked_token_is_its_example_and_itself(data):
    rows = list(data[0])
    marked = mapped(data, mark, with_indices=True)
    assert marked["input_ids"][:] == [
        [i * 2**32 + t for t in row["input_ids"]] for i, row in enumerate(rows)
    ]
    back = mapped((marked, data[1]), unmark)
    assert [{k: row[k] for k in rows[0]} for row in back] == rows
    assert back["example_ids"][:] == [[i] * len(row["input_ids"]) for i, row in enumerate(rows)]


@pytest.mark.parametrize("length", [1, 3, 12, 20])
def test_split(length, data):
    expected = [
        {name: row[name][start : start + length] for name in row}
        for row in data[0]
        for start in range(0, len(row["labels"]), length)
    ]
    assert list(mapped(data, split, fn_kwargs={"length": length})) == expected


def test_labelled(data):
    dataset, size = data
    kept = (
        dataset.with_format("arrow")
        .filter(labelled, batched=True, batch_size=size)
        .with_format(None)
    )
    expected = [row for row in dataset if any(label != -100 for label in row["labels"][1:])]
    assert list(kept) == expected
    assert 0 < len(expected) < len(dataset)


def test_tokens_are_numbered_through_over_batches():
    """`map` takes a thousand rows at a time."""
    rows = [{"input_ids": list(range(n % 4)), "labels": list(range(n % 4))} for n in range(2500)]
    numbered = number_tokens(Dataset.from_list(rows))
    assert [i for row in numbered["token_numbers"][:] for i in row] == list(
        range(sum(n % 4 for n in range(2500)))
    )
    assert numbered["input_ids"][:] == [row["input_ids"] for row in rows]


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_example_is_tokenized_cut_and_packed_once(setting, tmp_path, monkeypatch):
    """
    Tokens that TRL's passes write, with a gate that is measured, beside those for one that needs no
    examples.
    """
    written = {"sft": 0, "talr": 0}
    for gate in written:
        plain = Dataset.map

        def counted(self, function, *args, gate=gate, plain=plain, **kwargs):
            if getattr(function, "__module__", "").startswith("trl."):
                written[gate] += len(self)
            return plain(self, function, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Dataset, "map", counted)
            build(EAFTTrainer, tmp_path, gate=gate, rows=make_examples(), **SETTINGS[setting])
    assert written["talr"] == written["sft"] > 0


def test_ids_are_half_as_wide_as_tokens(tmp_path):
    trainer = build(EAFTTrainer, tmp_path, gate="talr", rows=make_examples())
    assert trainer.train_dataset.features["example_ids"].feature.dtype == np.int32.__name__
