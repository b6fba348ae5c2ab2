"""`eaft compare` on the tiny model: from recipe to table and pictures; reuse, resumption, and bad recipes."""

import json
import shutil

import pytest
import yaml

from eaft import cli
from eaft.comparison import compare, report
from tests.conftest import make_rows
from tests.evaluation.test_evaluate import task_path  # noqa: F401 - a fixture


@pytest.fixture
def recipe(model_dir, tmp_path, task_path):  # noqa: F811
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    content = {
        "output_dir": str(tmp_path / "out"),
        "objectives": {"sft": {"gate": "sft"}, "eaft2": {"gate": "eaft", "gate_alpha": 2.0}},
        "train": {
            "model_name_or_path": str(model_dir),
            "dataset_name": str(data),
            "max_steps": 4,
            "save_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "use_cpu": True,
            "report_to": "none",
        },
        "evaluate": {
            "target_tasks": ["tiny"],
            "general_tasks": ["tiny", "copy"],
            "general_prompts": str(data),
            "target_prompts": str(data),
            "include_path": task_path,
            "drift_prompts": 3,
            "max_new_tokens": 5,
            "apply_chat_template": False,
        },
    }

    def write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
        return path

    write.content = content
    return write


def run(path, *flags):
    return cli.main(["compare", "--config", str(path), *flags])


def test_compares_reuses_and_resumes(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(recipe(), "--seeds", "0", "1") == 0
    results = json.loads((out / "results.json").read_text())
    assert [(r["objective"], r["seed"]) for r in results["runs"]] == [
        ("sft", 0),
        ("eaft2", 0),
        ("sft", 1),
        ("eaft2", 1),
    ]
    for r in results["runs"]:
        assert r["drift_general"] > 0
        assert r["tokens_per_s"] > 0
        assert r["peak_memory_gib"] > 0.1
    sft = [r["drift_general"] for r in results["runs"] if r["objective"] == "sft"]
    assert results["objectives"]["sft"]["drift_general"]["mean"] == pytest.approx(sum(sft) / 2)
    assert results["objectives"]["sft"]["drift_general"]["std"] == pytest.approx(abs(sft[0] - sft[1]) / 2**0.5)
    assert results["environment"]["libraries"]["torch"]
    table = (out / "results.md").read_text()
    assert "| sft " in table
    assert "| eaft2 " in table
    assert "±" in table
    assert table in capsys.readouterr().out.replace("\r", "") + "\n"
    for picture in ("pareto.png", "curves.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    items = [json.loads(line) for line in (out / "sft-seed0" / "items" / "tiny.jsonl").read_text().splitlines()]
    assert sum(item["score"] for item in items) / 6 == pytest.approx(results["runs"][0]["target"])
    for r in results["runs"]:
        assert r["general"] == pytest.approx((r["tasks"]["tiny"] + r["tasks"]["copy"]) / 2)
        change = r["changes"]["target"]
        assert change["after"] - change["before"] == pytest.approx(change["change"])
        assert change["before"] == pytest.approx(results["base"]["target"])
        assert 0 < change["p_value"] <= 1
    assert "| general avg. " in table
    assert not list(out.glob("base/*/log_probs"))

    # Again: the finished is reused, the interrupted goes on from its checkpoint and ends in the same place
    finished = (out / "sft-seed0" / "model.safetensors").stat().st_mtime_ns
    broken = out / "eaft2-seed1"
    for name in ("run.json", "evaluation.json", "model.safetensors"):
        (broken / name).unlink()
    shutil.rmtree(broken / "checkpoint-4")
    (broken / "run.json").write_text('{"finished": false}')
    assert run(recipe(), "--seeds", "0", "1") == 0
    output = capsys.readouterr().out
    assert "sft-seed0: already trained" in output
    assert f"eaft2-seed1: training from {broken / 'checkpoint-2'}" in output
    assert (out / "sft-seed0" / "model.safetensors").stat().st_mtime_ns == finished
    again = json.loads((out / "results.json").read_text())
    for before, after in zip(results["runs"], again["runs"], strict=True):
        assert after["drift_general"] == before["drift_general"]

    # Another setting does not silently reuse or overwrite
    changed = {**recipe.content["train"], "learning_rate": 1e-4}
    assert run(recipe(train=changed)) == 2
    assert "holds another run: learning_rate changed since" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {}}, "'objective' is unknown. Did you mean 'objectives'?"),
        ({"objectives": {"a": {"gate": "eatf"}}}, "gate='eatf' is unknown. Did you mean 'eaft'"),
        ({"objectives": {"a": {"gaet": "eaft"}}}, "--gaet=eaft is unknown. Did you mean '--gate'?"),
        ({"objectives": {"a/b": {}}}, "the objective 'a/b' names a folder"),
        (
            {"evaluate": {"target_tasks": ["tiny"]}},
            "evaluate: missing 1 required positional argument: 'general_tasks'",
        ),
        ({"train": {"dataset_name": "x.jsonl"}}, "train: model_name_or_path is missing"),
    ],
)
def test_bad_recipe_is_one_message_and_nothing_written(recipe, tmp_path, capsys, changes, message):
    assert run(recipe(**changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_recipe(tmp_path, capsys):
    assert run(tmp_path / "none.yaml") == 2
    assert "No such file" in capsys.readouterr().err


def test_failed_training_is_reported(recipe, capsys):
    content = {**recipe.content["train"], "max_length": 3}
    assert run(recipe(train=content)) == 2
    assert "training ended with exit code 2" in capsys.readouterr().err


def test_changed_data_is_noticed(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("a")
    before = compare.fingerprint({"dataset_name": str(data)})
    data.write_text("b")
    assert compare.fingerprint({"dataset_name": str(data)}) != before
    assert compare.fingerprint({"dataset_name": "trl-lib/Capybara"}) is None


def test_tables_show_spread_only_with_several_seeds():
    numbers = {"mean": 0.5, "std": None}
    names = ("target", "general", "drift_general", "tokens_per_s", "peak_memory_gib")
    results = {
        "base": {"target": 0.1, "general": 0.6, "tasks": {"t": 0.1, "g": 0.7, "h": 0.5}},
        "groups": {"target": ["t"], "general": ["g", "h"]},
        "objectives": {"sft": {**dict.fromkeys(names, numbers), "tasks": dict.fromkeys("tgh", numbers)}},
        "recipe": {"seeds": [3]},
    }
    row = report.table(results).splitlines()[3]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "sft", "50.0", "+40.0", "50.0", "-10.0", "0.5000", "", "0", "0.50",
    ]  # fmt: skip
    results["objectives"]["sft"]["tasks"]["g"] = {"mean": 0.5, "std": 0.02}
    head, _, base, sft = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in report.table_1(results).splitlines()[:4]
    )
    assert head == ["method", "g", "h", "general avg.", "change", "t", "target avg.", "change"]
    assert base == ["base", "70.0", "50.0", "60.0", "", "10.0", "10.0", ""]
    assert sft == ["sft", "50.0 ± 2.0", "50.0", "50.0", "-10.0", "50.0", "50.0", "+40.0"]
