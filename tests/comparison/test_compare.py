"""
`eaft compare` on the tiny model: from recipe to verdict; reuse, resumption, failures, folders, and
bad recipes.
"""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
import yaml

from eaft import cli
from eaft.comparison import compare, measurer, recipe, runs
from eaft.comparison.results import Comparison
from eaft.errors import ConfigurationError
from eaft.evaluation.paired import holm
from eaft.evaluation.results import as_json
from eaft.files import read_json
from eaft.models import template_today
from eaft.processes import locked
from eaft.training import apart
from eaft.training.family import write_member
from tests.conftest import make_model, make_rows, make_tokenizer
from tests.processes import SERVER, eaft_in_forks, start
from tests.test_killed import wait_for_end

SCHEMA = json.loads((Path(compare.__file__).parent / "results.schema.json").read_text())


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def make_tasks(folder):
    """`tiny`, questions of two choices, and `copy`, which are to be repeated."""
    questions = write_rows(
        folder / "questions.jsonl",
        [{"question": f"{i}?", "choices": ["a", "bb"], "answer": i % 2} for i in range(6)],
    )
    tasks = folder / "tasks"
    tasks.mkdir()
    of_both = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": questions}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    tiny = {
        "task": "tiny",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
    }
    copy = {"task": "copy", "output_type": "generate_until", "doc_to_target": "{{question}}"}
    copy["generation_kwargs"] = {"max_gen_toks": 4, "until": ["zzz"]}
    for task, metric in ((tiny, "acc"), (copy, "exact_match")):
        metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]
        (tasks / f"{task['task']}.yaml").write_text(
            yaml.safe_dump({**of_both, **task, "metric_list": metrics})
        )
    return str(tasks)


def make_recipe(folder, model_dir):
    """A recipe of two objectives, with rows held out, in a folder of its own."""
    tasks = make_tasks(folder)
    rows = make_rows(20)
    data, held_out = (
        write_rows(folder / "rows.jsonl", rows[:16]),
        write_rows(folder / "held_out.jsonl", rows[16:]),
    )
    return {
        "output_dir": str(folder / "out"),
        "objectives": {"sft": {"gate": "sft"}, "eaft2": {"gate": "eaft", "gate_alpha": 2.0}},
        "train": {
            "model_name_or_path": str(model_dir),
            "dataset_name": data,
            "max_steps": 2,
            "save_steps": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "use_cpu": True,
            "report_to": "none",
        },
        "evaluate": {
            "target_tasks": ["tiny"],
            "general_tasks": ["tiny", "copy"],
            "every_checkpoint_tasks": ["tiny"],
            "general_prompts": data,
            "target_prompts": data,
            "held_out": held_out,
            "include_path": tasks,
            "drift_prompts": 3,
            "max_new_tokens": 5,
            "apply_chat_template": False,
        },
    }


def run(content, *flags):
    path = Path(content["output_dir"]).parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return cli.main(["compare", "--config", str(path), *flags])


def train_here(config):
    """Training without a process of its own, whose start costs ten times what it does."""
    return cli.main(["train", "--config", str(config)])


@pytest.fixture
def content(model_dir, tmp_path):
    return make_recipe(tmp_path, model_dir)


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
        assert run(content) == 0
    return SimpleNamespace(content=content, out=folder / "out", results=read(folder / "out"))


def read(out):
    return json.loads((out / "results.json").read_text())


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


def test_a_disk_that_is_full_while_a_run_trains_ends_the_comparison(content, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(runs, "train_apart", lambda config: trained.append(config) or errno.ENOSPC)
    assert run(content) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: sft-seed0: No space left on device: free some space" in told
    assert len(trained) == 1
    assert not (Path(content["output_dir"]) / "results.json").exists()


def test_resumes_and_lets_others_go_on_when_one_fails(content, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "train_apart", train_here)
    content["objectives"]["broken"] = {
        "gate": "sft",
        "max_length": 3,
    }  # nothing is left to train on
    content["evaluate"].update(
        held_out=None, every_checkpoint_tasks=[], target_prompts=None, general_tasks=["tiny"]
    )
    out = tmp_path / "out"
    assert run(content, "--seeds", "0", "1") == 1
    results = read(out)
    jsonschema.Draft202012Validator(SCHEMA).validate(results)
    assert [(f["objective"], f["seed"]) for f in results["failed"]] == [
        ("broken", 0),
        ("broken", 1),
    ]
    assert "training ended with exit code 2" in results["failed"][0]["message"]
    assert "## What failed" in (out / "results.md").read_text()
    assert set(results["objectives"]) == {"sft", "eaft2"}
    (pair,) = results["pairs"]
    assert pair["seeds"] == [0, 1]
    assert list(pair["views"]) == ["last"]
    numbers = [
        c["numbers"]["last"]["drift_general"] for c in results["choices"] if c["objective"] == "sft"
    ]
    assert results["objectives"]["sft"]["last"]["drift_general"] == {
        "mean": pytest.approx(sum(numbers) / 2),
        "std": pytest.approx(abs(numbers[0] - numbers[1]) / 2**0.5),
    }

    # Again, with the same model elsewhere: the finished is reused, the interrupted goes on from its
    # checkpoint and ends in the same place
    capsys.readouterr()
    del content["objectives"]["broken"]
    interrupted = out / "eaft2-seed1"
    (interrupted / "model.safetensors").unlink()
    shutil.rmtree(interrupted / "checkpoint-2")
    (interrupted / "run.json").write_text('{"finished": false}')
    moved = shutil.copytree(content["train"]["model_name_or_path"], tmp_path / "moved")
    content["train"]["model_name_or_path"] = str(moved)
    assert run(content, "--seeds", "0", "1") == 0
    output = capsys.readouterr().out
    assert "sft-seed0: already trained" in output
    assert f"eaft2-seed1: training from {interrupted / 'checkpoint-1'}" in output
    assert read(out)["pairs"] == results["pairs"]

    # Another setting does not silently reuse or overwrite
    content["train"]["learning_rate"] = 1e-4
    assert run(content) == 2
    assert "holds another run: learning_rate changed since" in capsys.readouterr().err


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


def test_a_job_that_is_killed_is_said_to_be(content, monkeypatch, capsys):
    monkeypatch.setattr(compare, "start_worker", kill_oneself)
    monkeypatch.setattr(compare, "get_context", lambda kind: SERVER)
    content["objectives"] = {"sft": {"gate": "sft"}}
    assert run(content, "--jobs", "2") == 2
    assert (
        "one of 2 jobs was killed, perhaps for its memory, and all stopped: run the command"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_is_one_line_and_nothing_goes_on(content, tmp_path, jobs):
    """Ctrl-C at a terminal, which all processes hear, while runs train."""
    content["objectives"]["eaft"] = {"gate": "eaft"}
    content["evaluate"].update(held_out=None, target_prompts=None)
    path, python, log = tmp_path / "recipe.yaml", tmp_path / "python", tmp_path / "log"
    path.write_text(yaml.safe_dump(content))
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/started-$$\nexec sleep 60\n")
    python.chmod(0o755)
    argv = ("compare", "--config", path, "--jobs", jobs)
    process = start(in_a_terminal_of_its_own, str(python), *argv, log=log)
    while len(started := list(tmp_path.glob("started-*"))) < jobs:
        assert process.exitcode is None, log.read_text()
        time.sleep(0.05)
    before = len(log.read_text())
    os.killpg(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130, log.read_text()
    told = log.read_text()[before:]
    assert told == "eaft compare: interrupted: give the same command again to go on.\n"
    for file in started:
        wait_for_end(int(file.name.partition("-")[2]))


def in_a_terminal_of_its_own(python, *argv):
    """`eaft` as the first of a group of processes, with another Python to train with."""
    os.setpgid(0, 0)
    sys.executable = python
    compare.get_context = lambda kind: multiprocessing.get_context("fork")
    return cli.main([str(part) for part in argv])


def kill_oneself(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def test_training_is_a_process_of_its_own(content, tmp_path, monkeypatch):
    """It ends with its own exit code, and knows nothing of the launch that compare is part of."""
    monkeypatch.setenv("RANK", "1")  # as part of a launch it would wait for the other processes
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = {**content["train"], "max_length": 3, "output_dir": str(tmp_path / "run")}
    one = runs.Run("sft", 0, None, tmp_path / "run", flags, {})
    assert "training ended with exit code 2" in runs.train_run(one)


def test_trackers_show_the_runs_as_one_group(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_NAME", "WANDB_RUN_GROUP", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.delenv(name, raising=False)
    trained = []
    monkeypatch.setattr(
        apart.subprocess,
        "run",
        lambda command, env, **_: trained.append((command, env)) or SimpleNamespace(returncode=0),
    )
    folder = Path("mine/eaft-lr1e-05-seed0")
    one = runs.Run("eaft", 0, 1e-5, folder, {"gate": "eaft"}, {})
    assert runs.train_run(one) is None
    assert yaml.safe_load((folder / "train.yaml").read_text()) == {
        "run_name": folder.name, "project": "mine", "gate": "eaft",
    }  # fmt: skip
    env = trained[0][1]
    assert (env["WANDB_RUN_GROUP"], env["TENSORBOARD_LOGGING_DIR"]) == ("mine", str(folder))

    # What the user has set, stays; a folder for TensorBoard is one for all runs
    one.flags.update(run_name="theirs", project="ours")
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "boards")
    assert runs.train_run(one) is None
    assert yaml.safe_load((folder / "train.yaml").read_text()) == one.flags
    env = trained[1][1]
    assert (env["WANDB_RUN_GROUP"], env["TENSORBOARD_LOGGING_DIR"]) == (
        "theirs",
        f"boards/{folder.name}",
    )


def test_the_others_wait_for_the_first_without_a_collective(tmp_path, monkeypatch):
    """
    Two processes, here threads: the second gets what the first returns, and does nothing itself.
    """
    local = threading.local()
    monkeypatch.setattr(runs, "shared", lambda find: "launch")
    monkeypatch.setattr(runs, "processes", lambda: local.state)
    monkeypatch.setattr(runs, "POLL", 0.01)
    barrier, worked, found = threading.Barrier(2), [], {}

    def process(rank):
        local.state = SimpleNamespace(
            is_main_process=rank == 0, num_processes=2, wait_for_everyone=barrier.wait
        )
        first_alone = runs.FirstAlone(tmp_path)
        for i in range(3):
            found[rank, i] = first_alone(lambda i=i: worked.append((rank, i)) or [i, None])
        first_alone.close()

    (tmp_path / "_done-earlier-1.json").write_text("[7]")  # of a launch that was killed
    threads = [threading.Thread(target=process, args=(rank,)) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert worked == [(0, 0), (0, 1), (0, 2)]
    assert found == {(rank, i): [i, None] for rank in (0, 1) for i in range(3)}
    assert not list(tmp_path.iterdir())


def test_a_folder_of_somebody_else_is_left_alone(content, tmp_path, capsys):
    theirs = tmp_path / "out" / "sft-seed0"
    theirs.mkdir(parents=True)
    (theirs / "thesis.txt").write_text("all of it")
    assert run(content) == 2
    assert "was not made by eaft compare" in capsys.readouterr().err
    runs.claim(tmp_path / "out2", {**compare.OURS, "template_date": template_today()})
    content["output_dir"] = str(tmp_path / "out2")
    theirs.replace(tmp_path / "out2" / "sft-seed0")
    assert run(content) == 2
    assert (
        f"{str(tmp_path / 'out2' / 'sft-seed0')!r} was not made by eaft compare"
        in capsys.readouterr().err
    )
    assert (tmp_path / "out2" / "sft-seed0" / "thesis.txt").read_text() == "all of it"


def test_a_second_process_leaves(content, tmp_path, capsys):
    runs.claim(tmp_path / "out", {**compare.OURS, "template_date": template_today()})
    with locked(tmp_path / "out"):
        assert run(content) == 2
    assert "is in use: another eaft process writes there" in capsys.readouterr().err


def test_a_folder_in_which_something_trains_on_is_a_failure_that_all_hear_of(tmp_path):
    one = runs.Run("sft", 0, None, tmp_path / "run", {}, {})
    with locked(one.folder):
        assert "is in use" in runs.train_run(one)


def test_emptying_a_folder_keeps_the_mark_that_it_is_ours(tmp_path):
    runs.claim(tmp_path / "run", {"a": 1})
    (tmp_path / "run" / "checkpoint-1").mkdir()
    runs.empty(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [runs.MARK]
    runs.check_folder(tmp_path / "run", {"a": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {}}, "'objective' is unknown. Did you mean 'objectives'?"),
        ({"objectives": {"a": {"gate": "eatf"}}}, "gate='eatf' is unknown. Did you mean 'eaft'"),
        ({"objectives": {"a": {"gaet": "eaft"}}}, "--gaet is unknown. Did you mean '--gate'?"),
        ({"objectives": {"a/b": {}}}, "the objective 'a/b' names a folder"),
        ({"objectives": {"a": {"seed": 3}}}, "seed is compare's to set"),
        (
            {"objectives": {"a": {"learning_rate": 3}}, "learning_rates": [1]},
            "a has a learning_rate",
        ),
        (
            {"objectives": {"a": {"load_best_model_at_end": True}}},
            "with load_best_model_at_end the model is not",
        ),
        ({"pairs": [["eaft2", "stf"]]}, "pairs: 'stf' is none of sft, eaft2. Did you mean 'sft'?"),
        ({"pairs": [["sft", "sft"]]}, "is not two objectives"),
        (
            {"seeds": [0, 1, 0]},
            "seeds: [0, 1, 0]: expected a list of values that differ",
        ),  # a seed twice is no second
        ({"seeds": []}, "seeds=[]: expected a list of at least 1 item"),
        ({"learning_rates": ["fast"]}, "learning_rates.0="),
        ({"keep_checkpoints": "best"}, "keep_checkpoints='best': expected 'all' or 'chosen'"),
        (
            {"evaluate": {"target_tasks": None, "held_out": None}},
            "evaluate: nothing says what is learned: give held_out, target_tasks, or both",
        ),
        ({"evaluate": {"target_tasks": []}}, "evaluate: target_tasks: []: name a task"),
        (
            {"evaluate": {"held_out": "none.jsonl"}},
            "evaluate.held_out: none.jsonl: there is no such file",
        ),
        (
            {"evaluate": {"held_out": None, "interpolations": [0.5]}},
            "evaluate: interpolations=[0.5]: they are compared at equal held-out nll: give",
        ),
        (
            {"evaluate": {"interpolations": [0.5, 1]}},
            "evaluate.interpolations.1=1: expected less than 1",
        ),
        (
            {"train": {"use_peft": True, "use_dora": True}, "evaluate": {"interpolations": [0.5]}},
            "use_dora=True cannot be interpolated by the adapter's scale",
        ),
        (
            {"evaluate": {"held_out": None}, "learning_rates": [1, 2]},
            "several learning_rates need evaluate.held_out",
        ),
        (
            {"evaluate": {"every_checkpoint_tasks": ["copy"]}},
            "every_checkpoint_tasks: 'copy' is none of tiny",
        ),
        ({"evaluate": {"drift_prompts": 0}}, "drift_prompts=0 leaves nothing to compare"),
        (
            {"evaluate": {"batchsize": 1}},
            "evaluate: 'batchsize' is unknown. Did you mean 'batch_size'?",
        ),
        (
            {"train": {"dataset_name": "none.jsonl"}},
            "dataset_name='none.jsonl': there is no such file",
        ),
        ({"train": {"model_name_or_path": None}}, "train: model_name_or_path is missing"),
    ],
)
def test_bad_recipe_is_one_message_and_nothing_written(content, tmp_path, capsys, changes, message):
    for name, value in changes.items():
        part = name in ("train", "evaluate")
        content[name] = {**content[name], **value} if part else value
        if part:  # None stands for a field that is not in the file
            content[name] = {k: v for k, v in content[name].items() if v is not None}
    assert run(content) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_that_are_trained_on_cannot_choose(content, tmp_path, capsys):
    content["evaluate"]["held_out"] = write_rows(tmp_path / "both.jsonl", make_rows(18)[15:])
    assert run(content) == 2
    assert "evaluate.held_out: row 0 is trained on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_held_out_rows_fit_the_model(content, tmp_path, capsys):
    rows = [{"prompt": "a", "completion": "b" * 300}, {"prompt": "b", "completion": "b"}]
    content["evaluate"]["held_out"] = write_rows(tmp_path / "long.jsonl", rows)
    assert run(content) == 2
    assert (
        "evaluate.held_out: row 0 has 302 tokens, more than the model's context of 256"
        in capsys.readouterr().err
    )


def test_one_row_is_too_few_to_say_how_sure(content, tmp_path, capsys):
    """
    Of a single prompt no variance can be had: it would end, or mislead, after all the training.
    """
    content["evaluate"]["target_prompts"] = write_rows(tmp_path / "one.jsonl", make_rows(1))
    assert run(content) == 2
    assert (
        "evaluate.target_prompts: 1 row: an interval needs at least two rows"
        in capsys.readouterr().err
    )


def test_missing_recipe(tmp_path, capsys):
    assert cli.main(["compare", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_flags_take_a_part_of_the_recipe(content, tmp_path):
    content["objectives"]["dft"] = {"gate": "dft"}
    content["pairs"] = [["eaft2", "dft"], ["eaft2", "sft"]]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    found = recipe.read_recipe(
        str(file), {"objectives": ["sft", "eaft2"], "seeds": [3], "learning_rates": [0.5]}
    )
    assert list(found.objectives) == ["sft", "eaft2"]
    assert found.compared == [("eaft2", "sft")]
    assert [r.folder.name for r in recipe.plan_runs(found, None)] == [
        "sft-lr0.5-seed3",
        "eaft2-lr0.5-seed3",
    ]
    del content["pairs"]
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    assert recipe.read_recipe(str(file), {}).compared == [("eaft2", "sft"), ("dft", "sft")]
    with pytest.raises(ConfigurationError, match="'eaft' is none of"):
        recipe.read_recipe(str(file), {"objectives": ["eaft"]})
    other = recipe.read_recipe(
        str(file), {"dataset_name": "d", "model_name_or_path": "m", "held_out": "h"}
    )
    assert (
        other.train["dataset_name"],
        other.train["model_name_or_path"],
        other.evaluate.held_out,
    ) == ("d", "m", "h")


def test_a_run_is_known_by_what_it_depends_on(content, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))

    def identity(model="digest"):
        return recipe.plan_runs(recipe.read_recipe(str(file), {}), model)[0].identity

    before = identity()
    assert identity() == before != identity("another model, at the same path")
    write_rows(tmp_path / "rows.jsonl", make_rows(15))
    assert identity() != before
    assert str(tmp_path) not in json.dumps(before)
    prompts = tmp_path / "requests.jsonl"
    content["train"] |= {"replay": 0.1, "replay_prompts": str(prompts)}
    file.write_text(yaml.safe_dump(content))
    prompts.write_text('{"prompt": "Hi?"}\n')
    before = identity()
    prompts.write_text('{"prompt": "Hello?"}\n')
    assert identity() != before
    assert str(tmp_path) not in json.dumps(before)

    # Each seed can have its own data
    for seed in (0, 1):
        write_rows(tmp_path / f"rows-{seed}.jsonl", make_rows(15 + seed))
    content["train"]["dataset_name"] = str(tmp_path / "rows-{seed}.jsonl")
    file.write_text(yaml.safe_dump({**content, "seeds": [0, 1]}))
    of_seeds = recipe.plan_runs(recipe.read_recipe(str(file), {}), "digest")
    assert [(r.seed, r.flags["dataset_name"][-12:]) for r in of_seeds[::2]] == [
        (0, "rows-0.jsonl"),
        (1, "rows-1.jsonl"),
    ]
    assert of_seeds[0].identity["files"] != of_seeds[2].identity["files"]
    (tmp_path / "rows-1.jsonl").unlink()
    with pytest.raises(ConfigurationError, match=r"rows-1\.jsonl"):
        recipe.plan_runs(recipe.read_recipe(str(file), {}), "digest")


def test_baselines_that_are_no_gate_are_objectives(content, tmp_path):
    """LoRA, a learning rate of one's own, and replay, which samples nothing before it trains."""
    prompts = tmp_path / "prompts.jsonl"
    content["objectives"] = {
        "lora": {"gate": "sft", "use_peft": True, "lora_r": 8},
        "low": {"gate": "sft", "learning_rate": 1e-3},
        "replay": {
            "gate": "sft",
            "replay": 0.05,
            "replay_loss": "kl",
            "replay_prompts": str(prompts),
        },
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))

    def identities(*requests):
        write_rows(prompts, [{"prompt": request} for request in requests])
        return [
            found.identity
            for found in recipe.plan_runs(recipe.read_recipe(str(file), {}), "digest")
        ]

    before, after = identities("Hello"), identities("Good day")
    assert [found["flags"].get("replay") for found in before] == [None, None, 0.05]
    assert [found["flags"].get("replay_loss") for found in before] == [None, None, "kl"]
    assert [found["flags"]["learning_rate"] for found in before] == [1e-2, 1e-3, 1e-2]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False]
    assert str(tmp_path) not in json.dumps(before)


def test_a_gate_of_ones_own_is_part_of_the_run(content, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "own_gate_of_compare.py"
    module.write_text("def gate(token):\n    return token.entropy * 0 + 1\n")
    flags = {"gate": "own_gate_of_compare:gate"}
    assert apart.local_files(flags) == {"gate": module}


def test_a_base_without_a_template_is_asked_as_the_tuned_model_is(tmp_path):
    """As `eaft eval` does: in the template that training gave it."""
    tokenizer = make_tokenizer()
    for name in ("tuned", "base"):
        make_model().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        tokenizer.chat_template = None
        (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Hello"}])
    config = recipe.EvaluateConfig(
        target_tasks=[], general_tasks=[], general_prompts=prompts, max_new_tokens=2
    )
    found = measurer.Measurer(config, str(tmp_path / "base"), {}, tmp_path, [])
    found.begin(runs.Run("sft", 0, None, tmp_path / "tuned", {}, {}))
    asked = make_tokenizer().decode(found.answers["general"].answers[0].prompt_ids)
    assert asked == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_how_models_are_asked_is_a_protocol():
    """All its fields, those that a later version adds too, and no list of them here."""
    config = recipe.EvaluateConfig(
        target_tasks=[], general_tasks=[], backend="vllm", enable_thinking=True, seed=5
    )
    assert (config.protocol.backend, config.protocol.enable_thinking, config.protocol.seed) == (
        "vllm",
        True,
        5,
    )


def test_no_objective_that_succeeds_is_an_error(content, monkeypatch, capsys):
    monkeypatch.setattr(compare, "train_run", lambda run: "training ended with exit code 1")
    assert run(content) == 2
    assert (
        "Nothing can be compared:\n  sft-seed0: training ended with exit code 1"
        in capsys.readouterr().err
    )
