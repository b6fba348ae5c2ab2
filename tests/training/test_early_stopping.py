"""Early stopping: when it stops, and that a killed run stops where it would have."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from eaft import cli
from eaft.training.early_stopping import stopped_after
from tests.conftest import make_rows

PATIENCE = 2


@pytest.fixture
def train(model_dir, tmp_path):
    rows = make_rows(24)
    for name, part in (("data", rows[:16]), ("held_out", rows[16:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    common = {
        "model_name_or_path": model_dir,
        "dataset_name": tmp_path / "data.jsonl",
        "learning_rate": 0.03,  # so large that the held-out nll soon rises
        "lr_scheduler_type": "constant",
        "max_steps": 20,
        "save_steps": 2,
        "logging_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    stops = {"held_out": tmp_path / "held_out.jsonl", "early_stopping_patience": PATIENCE}

    def run(name, **changes):
        settings = {**common, **stops, "output_dir": tmp_path / name, **changes}
        flags = [f"--{key}={value}" for key, value in settings.items() if value is not None]
        return cli.main(["train", *flags]), tmp_path / name

    return run


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_nll"] for line in lines if "eval_nll" in line}


def same_weights(one, two):
    one, two = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert one.keys() == two.keys()
    return all(torch.equal(two[name], weight) for name, weight in one.items())


def test_stops_and_a_killed_run_stops_there_too(train, tmp_path, capsys):
    code, whole = train("whole")
    assert code == 0
    nll = evaluations(whole)
    last, best = max(nll), min(nll, key=nll.get)
    assert list(nll) == list(range(2, last + 1, 2))  # where it saves
    assert last < 20
    assert last == best + 2 * PATIENCE
    result = json.loads((whole / "run.json").read_text())["result"]
    said = f"stopped early, after {last} of 20 steps: the held-out nll was lowest at step {best}"
    assert said in result["stopped_early"]
    assert said in capsys.readouterr().out
    # Killed when its last checkpoint was there, and when it was not
    for name, gone in (("late", []), ("early", [f"checkpoint-{last}"])):
        shutil.copytree(whole, tmp_path / name)
        for folder in gone:
            shutil.rmtree(tmp_path / name / folder)
        (tmp_path / name / "model.safetensors").unlink()
        run = tmp_path / name / "run.json"
        run.write_text(json.dumps({**json.loads(run.read_text()), "finished": False}))
        code, killed = train(name, resume_from_checkpoint=True)
        assert code == 0
        assert evaluations(killed) == nll
        assert same_weights(whole, killed)
        again = json.loads(run.read_text())["result"]
        assert again["stopped_early"] == result["stopped_early"]
    # Evaluating changed nothing
    plain = {"held_out": None, "early_stopping_patience": None, "max_steps": last}
    assert same_weights(whole, train("plain", **plain)[1])


@pytest.mark.parametrize(
    ("nlls", "patience", "best"),
    [
        ([], 1, None),
        ([3.0, 2.0, 1.0], 1, None),
        ([2.0, 2.0], 1, 10),  # no lower is no better
        ([3.0, 1.0, 2.0], 1, 20),
        ([3.0, 1.0, 2.0], 2, None),
        ([1.0, 2.0, 1.5], 2, 10),
        ([2.0, 3.0, 1.0, 4.0], 2, None),
    ],
)
def test_the_rule_by_hand(nlls, patience, best):
    log = [{"step": 10 * (i + 1), "eval_nll": nll} for i, nll in enumerate(nlls)]
    assert stopped_after(TrainerState(log_history=[{"step": 5, "loss": 1}, *log]), patience) == best


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"save_strategy": "no"}, "early_stopping_patience=2 needs evaluations"),
        ({"early_stopping_patience": None}, "is never evaluated on: set eval_strategy"),
        (
            {"early_stopping_patience": -1},
            "early_stopping_patience=-1: expected greater than or equal to 0",
        ),
        ({"held_out": "none.jsonl"}, "held_out: none.jsonl: there is no such file"),
    ],
    ids=str,
)
def test_wrong_inputs_are_one_line(train, changes, says, capsys):
    code, folder = train("out", **changes)
    assert code == 2
    assert says in capsys.readouterr().err
    assert not folder.exists()


def test_rows_that_are_trained_on_are_refused(train, tmp_path, capsys):
    assert train("out", held_out=tmp_path / "data.jsonl")[0] == 2
    assert "held_out: row 0 is trained on" in capsys.readouterr().err
