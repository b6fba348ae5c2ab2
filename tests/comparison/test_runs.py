"""The runs of `eaft compare`: resumption, failures, processes and folders."""

import errno
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
import pytest
import yaml

from eaft import cli
from eaft.comparison import compare, runs
from eaft.models import template_today
from eaft.processes import locked
from eaft.training import apart
from tests.comparison.conftest import (
    SCHEMA,
    read,
    run,
    train_here,
)
from tests.processes import SERVER, start
from tests.test_killed import wait_for_end


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


def test_no_objective_that_succeeds_is_an_error(content, monkeypatch, capsys):
    monkeypatch.setattr(compare, "train_run", lambda run: "training ended with exit code 1")
    assert run(content) == 2
    assert (
        "Nothing can be compared:\n  sft-seed0: training ended with exit code 1"
        in capsys.readouterr().err
    )
