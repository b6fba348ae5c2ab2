"""The folder that `eaft inspect` writes, read back."""

import json

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from eaft.errors import ConfigurationError
from eaft.inspection.folder import BASE, STATISTICS, Inspection
from eaft.inspection.summary import ROLLOUTS
from eaft.inspection.vocabulary import Vocabulary
from tests.inspection.made import VOCAB, make_inspection

NAMES = [field.name for field in STATISTICS]


def test_reads_what_was_written(tmp_path):
    inspection = Inspection(make_inspection(tmp_path, examples=6, rollouts=2))
    assert [model.name for model in inspection.models] == [BASE, "tuned"]
    examples = inspection.examples()
    assert len(examples) == 8
    assert examples["origin"].to_pylist().count(ROLLOUTS) == 2
    tokens = pa.Table.from_batches(
        inspection.batches(["example", "end", "token_id", "labelled", *NAMES])
    )
    assert len(tokens) == pc.sum(examples["tokens"]).as_py()
    for model in inspection.models:
        keys = pa.Table.from_batches(inspection.batches(["example"], model.name, rows=7))
        assert keys["example"].equals(tokens["example"].cast(pa.int32()))
    first = tokens.filter(pc.equal(tokens["example"], 0))
    text, start = examples["text"][0].as_py(), 0
    for token, end in zip(first["token_id"].to_pylist(), first["end"].to_pylist(), strict=True):
        assert text[start:end] in ("", "🙂", Vocabulary(inspection).texts[token])
        start = end
    assert start == len(text)


def test_statistics_are_those_of_objective(tmp_path):
    inspection = Inspection(make_inspection(tmp_path, examples=5, rollouts=0))
    batch = next(inspection.batches([*NAMES, "labelled"]))
    stats = inspection.statistics(batch.filter(batch["labelled"]))
    assert len(stats.log_prob) == batch["labelled"].true_count > 0
    assert stats.top_k == 20
    assert torch.equal(
        stats.is_top1, stats.log_prob.exp() >= torch.tensor(batch["first_prob"].drop_null()) - 1e-6
    )
    assert (stats.entropy <= torch.tensor(len(VOCAB)).log()).all()


@pytest.mark.parametrize("content", [None, "", "[]", '{"a": 1}', '{"scored": false}'])
def test_refuses_what_is_no_finished_inspection(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(
        ConfigurationError, match="give its" if content is not None else "is not a folder"
    ):
        Inspection(tmp_path)


def test_run_json_names_every_model(tmp_path):
    folder = make_inspection(tmp_path, examples=2, rollouts=0, compared=("a", "b"), shards=1)
    steps = [model.step for model in Inspection(folder).models]
    assert steps == [None, 10, 20]
    assert json.loads((folder / "run.json").read_text())["top_k"] == 20
