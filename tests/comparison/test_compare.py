"""`eaft compare` on the tiny model, from recipe to verdict."""

import json
import shutil
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
import yaml

from eaft import cli
from eaft.comparison import runs
from eaft.comparison.results import Comparison
from eaft.evaluation.paired import holm
from eaft.evaluation.results import as_json
from eaft.files import read_json
from eaft.training.family import write_member
from tests.comparison.conftest import (
    SCHEMA,
    make_recipe,
    read,
    run,
    train_here,
    write_rows,
)
from tests.conftest import make_rows
from tests.processes import eaft_in_forks, start


@pytest.fixture(scope="module")
def compared(model_dir, tmp_path_factory):
    """
    A comparison of two learning rates, of which only what is chosen is kept; do not change it.
    """
    folder = tmp_path_factory.mktemp("compared")
    content = make_recipe(folder, model_dir)
    content.update(
        keep_checkpoints="chosen", learning_rates=["1e-3", 1e-2]
    )  # YAML reads 1e-3 as text
    content["evaluate"]["interpolations"] = [0.75, 0.25]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "train_apart", train_here)
        patch.setenv("EAFT_CACHE", str(folder / "cache"))  # nothing is kept of other tests
        assert run(content) == 0
    return SimpleNamespace(content=content, out=folder / "out", results=read(folder / "out"))


def test_results_are_whole_and_as_the_schema_says(compared):
    results = compared.results
    jsonschema.Draft202012Validator(SCHEMA).validate(results)
    assert as_json(read_json(compared.out / "results.json", Comparison, "")) == results
    assert [(r["objective"], r["learning_rate"]) for r in results["runs"]] == [
        (name, rate) for name in ("sft", "eaft2") for rate in (1e-3, 1e-2)
    ]
    for r in results["runs"]:
        assert [point["step"] for point in r["points"]] == [1, 2]
        assert r["differs"] == {}
        for point in r["points"]:
            for kind, drift in point["drift"].items():
                assert drift["mean"] == pytest.approx(
                    sum(drift["sums"]) / sum(results["prompts"][kind]["tokens"])
                )
            assert point["nll"]["mean"] == pytest.approx(
                sum(point["nll"]["sums"]) / sum(results["held_out"]["tokens"])
            )
            assert "tiny" in point["tasks"]
        assert r["peak_memory_gib"] > 0.1
    assert results["environment"]["libraries"]["torch"]


def test_the_lowest_held_out_nll_chooses(compared):
    results = compared.results
    for choice in results["choices"]:
        own = [r for r in results["runs"] if r["objective"] == choice["objective"]]
        nll = {(r["learning_rate"], p["step"]): p["nll"]["mean"] for r in own for p in r["points"]}
        assert (choice["learning_rate"], choice["steps"]["chosen"]) == min(nll, key=nll.get)
        assert choice["numbers"]["chosen"]["nll"] == pytest.approx(min(nll.values()))
        (chosen,) = [r for r in own if r["chosen"]]
        assert choice["steps"]["last"] == chosen["points"][-1]["step"]
        items = (
            compared.out
            / chosen["folder"]
            / "items"
            / f"step-{choice['steps']['chosen']}"
            / "copy.jsonl"
        )
        assert len(items.read_text().splitlines()) == 6
    assert (
        results["base"]["point"]["nll"]["mean"]
        > results["objectives"]["sft"]["chosen"]["nll"]["mean"]
    )


def test_objectives_are_compared_on_the_same_items(compared):
    results = compared.results
    (pair,) = results["pairs"]
    assert (pair["first"], pair["second"], pair["seeds"]) == ("eaft2", "sft", [0])
    at = {c["objective"]: c["numbers"] for c in results["choices"]}
    for view, found in pair["views"].items():
        for measured, name in (
            (found["means"]["target"], "target"),
            (found["drift"]["general"], "drift_general"),
        ):
            assert measured["change"] == pytest.approx(
                at["eaft2"][view][name] - at["sft"][view][name]
            )
        family = [*found["means"].values(), *found["drift"].values(), found["nll"]]
        assert [d["p_holm"] for d in family] == pytest.approx(holm([d["p_value"] for d in family]))
    front = pair["fronts"]["held-out nll"]
    assert len(front["targets"]) == len(front["low"]) == len(front["first"])
    assert np.subtract(front["first"], front["second"]) == pytest.approx(
        np.array(front["difference"])
    )


def test_interpolations_are_the_models_between(compared, model_dir, tmp_path):
    """Those of a model that is kept, written as a model and measured as one."""
    choice = next(c for c in compared.results["choices"] if c["objective"] == "sft")
    run = next(r for r in compared.results["runs"] if r["chosen"] and r["objective"] == "sft")
    last = run["points"][-1]
    assert choice["steps"]["last"] == last["step"]
    assert [one["share"] for one in last["interpolations"]] == [0.25, 0.75]
    one = last["interpolations"][1]
    write_member(str(model_dir), compared.out / run["folder"], 0.75, tmp_path / "between")
    (measured,) = (tmp_path / "between").glob("model.safetensors")
    flags = ["--held_out", compared.content["evaluate"]["held_out"], "--max_new_tokens", 5]
    flags += ["--prompts", compared.content["evaluate"]["general_prompts"], "--drift_prompts", 3]
    flags += ["--no-apply_chat_template", "--output_path", tmp_path / "eval"]
    command = ["eval", measured.parent, "--base", model_dir, *flags]
    assert cli.main([str(part) for part in command]) == 0
    found = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert found["drift"]["mean"] == pytest.approx(one["drift"]["general"]["mean"], rel=1e-4)
    assert found["held_out"]["after"] == pytest.approx(one["nll"]["mean"], rel=1e-5)


def test_fronts_have_interpolations_beside_checkpoints(compared):
    (pair,) = compared.results["pairs"]
    both, alone = pair["interpolated"], pair["against_interpolated"]
    assert both["targets"][-1] >= pair["fronts"]["held-out nll"]["targets"][-1]
    assert both["second"] != alone["first"]
    text = (compared.out / "results.md").read_text()
    assert "- eaft2 with interpolation and sft with interpolation" in text
    assert "- eaft2 without interpolation and sft with interpolation" in text


def test_the_report_begins_with_what_to_do(compared):
    text = (compared.out / "results.md").read_text()
    first = text.splitlines()[0]
    assert first == compared.results["sentence"]
    assert first.startswith("**No objective is shown to be better")
    assert "eaft2 and sft cannot be told apart" in first
    assert "Asked in plain text, without a chat template, in float32, seed 1234." in text
    assert compared.results["asked"]["copy"]["cut"]["sft"] == {
        "prompt": 0,
        "answer": 6,
        "thoughts": 0,
    }
    assert "base: 6 answers; sft: 6 answers" in text
    assert "One seed: the intervals hold no seed-to-seed variance" in first
    assert "| general avg. " in text
    for picture in ("pareto.png", "curves.png", "fronts.png"):
        assert (compared.out / picture).read_bytes().startswith(b"\x89PNG")
        assert picture in text


def test_only_the_chosen_are_kept_and_again_gives_the_same(compared, capsys):
    kept = {
        p.parent.relative_to(compared.out).as_posix()
        for p in compared.out.glob("**/model.safetensors")
    }
    expected = set()
    for choice in compared.results["choices"]:
        folder = f"{choice['objective']}-lr{choice['learning_rate']:g}-seed0"
        expected |= {
            folder if step == 2 else f"{folder}/checkpoint-{step}"
            for step in choice["steps"].values()
        }
    assert kept == expected
    assert run(compared.content) == 0
    assert capsys.readouterr().out.count("already trained") == 4
    again = read(compared.out)
    kept = again.pop("kept")  # everything of what is still there
    assert "answers" in kept["models"]["base"]
    assert again == {name: found for name, found in compared.results.items() if name != "kept"}


def test_without_tasks_held_out_nll_and_drift_judge(compared, tmp_path, capsys):
    shutil.copytree(compared.out, tmp_path / "out")
    tasks = ("target_tasks", "general_tasks", "every_checkpoint_tasks", "include_path")
    evaluate = {k: v for k, v in compared.content["evaluate"].items() if k not in tasks}
    content = {**compared.content, "output_dir": str(tmp_path / "out"), "evaluate": evaluate}
    assert run(content) == 0
    assert capsys.readouterr().out.count("already trained") == 4
    results = read(tmp_path / "out")
    jsonschema.Draft202012Validator(SCHEMA).validate(results)
    assert results["groups"] == {}
    pair, before = results["pairs"][0], compared.results["pairs"][0]
    for name in ("change", "low", "high", "p_value"):
        assert pair["views"]["chosen"]["nll"][name] == before["views"]["chosen"]["nll"][name]
    assert list(pair["fronts"]) == ["held-out nll"]
    assert "target" not in results["objectives"]["sft"]["chosen"]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "sft has a held-out nll of" in text.splitlines()[0]
    assert "no tasks were asked" in text.splitlines()[0]
    assert "target %" not in text
    assert "## Every benchmark" not in text
    assert (tmp_path / "out" / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_deleted_is_not_shown_under_another_measure(compared, tmp_path, capsys):
    rows = write_rows(tmp_path / "other.jsonl", make_rows(30)[24:])
    more = {"target_tasks": ["tiny", "copy"], "every_checkpoint_tasks": ["copy"]}
    for changes, message in (
        (
            {"held_out": rows},
            "was deleted (keep_checkpoints: chosen), and what it was measured with has changed",
        ),
        (more, "was deleted (keep_checkpoints: chosen), and copy cannot be run on it"),
    ):
        assert (
            run({**compared.content, "evaluate": {**compared.content["evaluate"], **changes}}) == 2
        )
        assert message in capsys.readouterr().err


def test_jobs_find_what_one_after_the_other_finds(compared, tmp_path, monkeypatch, capsys):
    """
    In processes of their own, one of which fails; as the same runs in `compared`, at one of its
    learning rates.
    """
    monkeypatch.setenv("EAFT_CACHE", str(tmp_path / "cache"))
    content = {**compared.content, "output_dir": str(tmp_path / "out"), "learning_rates": [1e-2]}
    content["objectives"] = {
        "sft": {"gate": "sft"},
        "broken": {"gate": "sft", "attn_implementation": "none"},
    }
    path, log = tmp_path / "recipe.yaml", tmp_path / "log"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    process = start(eaft_in_forks, "compare", "--config", path, "--jobs", 2, log=log)
    process.join()
    assert process.exitcode == 1, log.read_text()
    results = read(tmp_path / "out")
    assert [f["objective"] for f in results["failed"]] == ["broken"]
    assert "training ended with exit code" in results["failed"][0]["message"]
    (found,) = results["runs"]
    (before,) = (
        r
        for r in compared.results["runs"]
        if (r["objective"], r["learning_rate"]) == (found["objective"], 1e-2)
    )
    for point, same in zip(found["points"], before["points"], strict=True):
        assert point["drift"]["general"]["mean"] == pytest.approx(
            same["drift"]["general"]["mean"], rel=1e-4
        )
        assert point["nll"]["sums"] == pytest.approx(same["nll"]["sums"], rel=1e-4)
        assert point["tasks"]["tiny"] == same["tasks"]["tiny"]
    kept = results["kept"]["models"]
    assert kept == {name: compared.results["kept"]["models"][name] for name in kept}
    assert set(kept) == {"base", f"{found['folder']}, step 1", f"{found['folder']}, step 2"}
    assert run(content, "--jobs", "0") == 2
    assert "--jobs=0: expected at least 1" in capsys.readouterr().err
