"""
Rows in random order: the interval covers what it should though scoring stops by it, the rows are
the rows that they say they are, and one process, two and a continued run stop at the same place.
"""

import json

import numpy as np
import pytest
from trl import DatasetMixtureConfig, ScriptArguments

from eaft import cli
from eaft.evaluation import paired
from eaft.inspection import inspect
from eaft.inspection.folder import Inspection
from eaft.inspection.interval import interval_of
from eaft.inspection.run_file import FEW_CONFLICTS, MOST_ROWS, NARROW, ScoredRows
from eaft.inspection.score import chosen
from eaft.inspection.score import run as score_run
from eaft.inspection.score.chosen import Lines, random_order
from eaft.inspection.score.stopping import (
    FIRST,
    HALF_WIDTH,
    LEVEL,
    MIN_EFFECTIVE_ROWS,
    effective_rows,
    looks,
    reason_to_stop,
    scored_rows,
)
from eaft.inspection.summary import ROLLOUTS
from eaft.training.data import load_splits, row_digest
from tests.conftest import make_model, make_rows
from tests.inspection.test_interval import draw

CPU = ["--use_cpu", "--bf16", "false"]
TRIALS, ROWS = 600, 1536
FEWEST = 0.95 - 3 * np.sqrt(0.95 * 0.05 / TRIALS)  # of 95%, what chance leaves of so many trials


@pytest.mark.parametrize(("per_row", "share"), [(0.2, 1), (1.0, 1), (2.0, 1), (8.0, 0.1)])
def test_coverage_with_stopping(per_row, share, monkeypatch):
    """`share`: of the rows that have conflicts; the others have none."""
    monkeypatch.setattr(paired, "RESAMPLES", 499)
    rng = np.random.default_rng(2)
    part, whole, _ = draw(rng, 100_000, per_row)
    has_none = rng.random(len(part)) >= share
    whole = np.where(has_none, whole - part, whole)
    part = np.where(has_none, 0, part)
    truth, held, rows = part.sum() / whole.sum(), [], []
    for _ in range(TRIALS):
        chosen = rng.integers(0, len(part), ROWS)
        for look in looks(ROWS):
            some = part[chosen[:look]], whole[chosen[:look]]
            conflicts = int((some[0] > 0).sum())  # at least one for each such row
            if reason := reason_to_stop(*some, conflicts, look == ROWS):
                break
        interval = interval_of(*some, LEVEL)
        if reason == NARROW:
            assert interval.high - interval.low <= 2 * HALF_WIDTH
        assert reason == NARROW or share < 1
        held.append(interval.low <= truth <= interval.high)
        rows.append(look)
    assert np.mean(held) > FEWEST
    assert np.median(rows) < ROWS


def test_when_it_stops():
    assert looks(100) == [100]
    numbers = looks(4096)
    assert numbers[0] == FIRST
    assert numbers[-1] == 4096
    assert all(number % 32 == 0 for number in numbers)
    none, whole = np.zeros(100), np.full(100, 60.0)  # 10 tokens of 5 nats would be 0.8% of 6000
    assert reason_to_stop(none, whole, 0, False) == FEW_CONFLICTS
    assert reason_to_stop(none, whole / 10, 0, False) is None
    assert reason_to_stop(none, whole / 10, 0, True) == MOST_ROWS
    # The same nll in conflicts: 0.5% of the whole, in few rows and in many
    whole, few, many = np.full(1000, 60.0), np.zeros(1000), np.zeros(1000)
    few[:10], many[:100] = 30, 3
    assert effective_rows(few) == pytest.approx(10)
    assert effective_rows(few) < MIN_EFFECTIVE_ROWS < effective_rows(many)
    assert reason_to_stop(few, whole, 100, False) is None
    assert reason_to_stop(many, whole, 100, False) == NARROW
    assert scored_rows(ScoredRows(300, 300, NARROW)) is None  # all: nothing to say
    assert "128 of 1,000,000 rows" in scored_rows(ScoredRows(128, 1_000_000, NARROW))


@pytest.mark.parametrize("block", [chosen.BLOCK, 7])
def test_lines_are_the_rows_that_a_whole_reading_finds(block, tmp_path, monkeypatch):
    monkeypatch.setattr(chosen, "BLOCK", block)
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"{i} é\u2028", "n": i} for i in range(40)]
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0).encode() for i, row in enumerate(rows)]
    blank = [b"", b"  \t", b"\r"]
    content = b"\n".join(part for i, line in enumerate(lines) for part in (line, blank[i % 3]))
    for end in (b"", b"\n", b"\n \n"):
        file.write_bytes(b"\xef\xbb\xbf" + content.rstrip() + end)
        found = Lines(file)
        every = load_splits(ScriptArguments(dataset_name=str(file)), DatasetMixtureConfig())
        assert len(found) == 40
        order = random_order(40, 3)
        assert sorted(order) == list(range(40))
        assert found.rows(order) == [every["train"][i] for i in order]


@pytest.fixture
def alone(monkeypatch):
    """Only scoring: what is found is tested elsewhere."""
    monkeypatch.setattr(inspect, "conclude", lambda folder: None)


def run(*argv):
    return cli.main(["inspect", *map(str, argv)])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_rows_that_are_scored(kind, model_dir, tmp_path, alone, capsys, monkeypatch):
    rows = make_rows(400)
    data = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(data)
    tuned = tmp_path / "tuned"
    make_model(1).save_pretrained(tuned)
    out = tmp_path / "out"
    flags = [model_dir, data, *CPU, "--rollouts", 5, "--max_new_tokens", 3, "--output_dir"]
    assert run(*flags, out) == 0
    inspection = Inspection(out)
    sample = inspection.run.sample
    assert (sample.rows, sample.of) == (FIRST, 400)
    examples = inspection.examples().to_pylist()
    assert [e["example"] for e in examples] == list(range(FIRST + 5))
    of_data, answers = examples[:FIRST], examples[FIRST:]
    numbers = [e["row"] for e in of_data]
    assert numbers == random_order(400, 42)[:FIRST]  # 42 is training's default seed
    for example in examples:
        assert example["digest"] == row_digest(rows[example["row"]])
        assert json.loads(example["messages"] or "null") in (rows[example["row"]], None)
    assert {e["origin"] for e in answers} == {ROLLOUTS}
    assert {e["row"] for e in answers} < set(numbers)

    # A model that is added later scores the same rows; the base model is not asked again
    before = {file: file.stat().st_mtime_ns for file in inspection.files()}
    assert run(*flags, out, "--compare", tuned) == 0
    inspection = Inspection(out)
    assert {file: file.stat().st_mtime_ns for file in inspection.files()} == before
    assert [file.name for file in inspection.files("tuned")] == [f.name for f in before]
    assert run(*flags, out, "--all") == 2
    assert "of rows in random order, without --all." in capsys.readouterr().err

    assert run(*flags[:-3], "--all", "--output_dir", tmp_path / "all") == 0
    whole = Inspection(tmp_path / "all")
    assert whole.run.sample is None
    assert whole.examples()["row"].to_pylist()[:400] == list(range(400))


def test_a_message_names_the_row_of_the_data(model_dir, tmp_path, capsys):
    rows = make_rows(300)
    rows[123] = {"prompt": 7, "completion": "x"}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(model_dir, data, *CPU, "--output_dir", tmp_path / "out") == 2
    assert "row 123: prompt=7" in capsys.readouterr().err


def test_stopped_before_it_was_decided(model_dir, tmp_path, alone, monkeypatch):
    """As if killed after a look: the command continues at the next one, and stops there."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows(300)))
    asked = []

    def second(part, whole, conflicts, is_last):
        asked.append(len(whole))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return NARROW if len(whole) == 224 else None

    monkeypatch.setattr(score_run, "reason_to_stop", second)
    flags = [model_dir, data, *CPU, "--output_dir", tmp_path / "out"]
    assert run(*flags) == 130
    assert run(*flags) == 0
    assert asked == [128, 160, 128, 160, 224]
    inspection = Inspection(tmp_path / "out")
    assert inspection.run.sample == ScoredRows(224, 300, NARROW)
    assert len(inspection.examples()) == 224
