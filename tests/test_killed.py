"""
kill -9 at random moments: run again, `eaft eval`, `train`, `compare` and `tune` give what an
undisturbed run gives.
"""

import contextlib
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from eaft.training import apart
from tests.conftest import make_model, make_rows
from tests.evaluation.test_evaluate import task_path  # noqa: F401 - a fixture
from tests.processes import eaft_training_itself, start

KILLS = 4


def run_killed(folder, whole, disturbed, seed, kills=KILLS):
    """
    Run both commands, the second with kills; returns how many of them hit, before it ended by
    itself.
    """
    log = folder / "log"

    def begin(argv, kept):
        environment = {**os.environ, "EAFT_CACHE": str(folder / kept)}
        return start(eaft_training_itself, *argv, log=log, environment=environment)

    undisturbed = begin(whole, "kept")
    duration = wait_for_work(undisturbed, math.inf)
    assert undisturbed.exitcode == 0, log.read_text()[-3000:]
    rng, killed = random.Random(seed), 0
    for i in range(kills):
        process = begin(disturbed, "kept-disturbed")
        # Later and later, since each begins where the last one was
        wait_for_work(process, duration * (i + rng.random()) / kills)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    last = begin(disturbed, "kept-disturbed")
    last.join()
    return {"duration": duration, "killed": killed, "code": last.exitcode}, log.read_text()


def wait_for_work(process, seconds):
    """
    Wait until a process has used so much CPU time, or has ended, and return how much it used. A
    busy machine does not change it.
    """
    used = 0.0
    while process.exitcode is None and used < seconds:
        process.join(0.02)
        with contextlib.suppress(psutil.NoSuchProcess):
            times = psutil.Process(process.pid).cpu_times()
            used = times.user + times.system
    process.join(0)
    return used


def test_what_a_killed_command_started_ends_with_it(tmp_path, monkeypatch):
    started, python = tmp_path / "started", tmp_path / "python"
    python.write_text(PYTHON.format(started))
    python.chmod(0o755)
    process = start(train_with, str(python), log=tmp_path / "log")
    while not started.exists():
        assert process.exitcode is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    process.kill()
    process.join()
    wait_for_end(int(started.read_text()))


# In the place of the interpreter that trains: writes its number, and takes long
PYTHON = "#!/bin/sh\necho $$ > {0}.new\nmv {0}.new {0}\nexec sleep 60\n"


def wait_for_end(number):
    """Wait until a process has ended; one that nobody has waited for is still listed, as a Z."""
    state, began = Path(f"/proc/{number}/stat"), time.monotonic()
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() - began < 20
        time.sleep(0.02)


def train_with(python):
    """Start what `eaft compare` starts to train, with another Python, and wait for it."""
    sys.executable = python
    return apart.run_train([], Path("run"))


@pytest.mark.parametrize("seed", [0])
def test_eval(model_dir, task_path, tmp_path, tokenizer, seed):  # noqa: F811
    tuned = tmp_path / "tuned"
    make_model(1).save_pretrained(tuned)
    tokenizer.save_pretrained(tuned)
    flags = [tuned, "--base", model_dir, "--suite", "tiny", "copy", "--include_path", task_path]
    flags += ["--drift_prompts", 4, "--max_new_tokens", 8, "--output_path"]
    commands = (["eval", *flags, tmp_path / name] for name in ("whole", "killed"))
    report, log = run_killed(tmp_path, *commands, seed)
    # A kill after the last file is written finds it complete
    assert report["code"] == 0 or "holds results" in log.splitlines()[-1]
    assert report["killed"] >= KILLS // 2, report
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")
    )
    for name in one.keys() - {"output_path", "environment", "kept"}:
        assert one[name] == two[name], name
    for part in (
        "items_before/tiny.jsonl",
        "items_after/copy.jsonl",
        "answers.json",
        "changes.png",
    ):
        assert (tmp_path / "whole" / part).read_bytes() == (tmp_path / "killed" / part).read_bytes()


@pytest.mark.parametrize("seed", [0])
def test_train(model_dir, tmp_path, seed):
    data, prompts, suite = (
        tmp_path / "data.jsonl",
        tmp_path / "prompts.jsonl",
        tmp_path / "suite.yaml",
    )
    suite.write_text("suite: few\ntasks: [everyday]\nlimit: 4\n")
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    prompts.write_text('{"prompt": "say a"}\n{"prompt": "say b"}\n')
    flags = [
        "--model_name_or_path",
        model_dir,
        "--dataset_name",
        data,
        "--max_steps",
        12,
        "--save_steps",
        2,
    ]
    flags += [
        "--learning_rate",
        1e-3,
        "--logging_steps",
        1,
        "--use_cpu",
        "--bf16",
        "false",
        "--report_to",
        "none",
    ]
    flags += [
        "--forgetting_eval_steps",
        4,
        "--forgetting_suite",
        suite,
        "--forgetting_prompts",
        prompts,
    ]
    flags += ["--resume_from_checkpoint", "true", "--output_dir"]
    commands = (["train", *flags, tmp_path / name] for name in ("whole", "killed"))
    report, log = run_killed(tmp_path, *commands, seed)
    assert report["code"] == 0, log[-3000:]
    assert report["killed"] >= KILLS // 2, report
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=0)
    since_resumed = (
        "num_tokens",
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "total_flos",
        "train_loss",
    )
    logs = [
        [
            {key: value for key, value in json.loads(line).items() if key not in since_resumed}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "killed")
    ]
    assert logs[0] == logs[1]


def test_compare(model_dir, task_path, tmp_path):  # noqa: F811
    data, held_out = tmp_path / "data.jsonl", tmp_path / "held_out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    held_out.write_text("".join(json.dumps(row) + "\n" for row in make_rows(20)[16:]))
    train = {
        "model_name_or_path": str(model_dir),
        "dataset_name": str(data),
        "max_steps": 4,
        "save_steps": 2,
    }
    train |= {"learning_rate": 1e-3, "use_cpu": True, "bf16": False, "report_to": "none"}
    evaluate = {"target_tasks": ["tiny"], "general_tasks": ["copy"], "include_path": task_path}
    evaluate |= {"held_out": str(held_out), "drift_prompts": 4, "max_new_tokens": 8}
    commands = []
    for name in ("whole", "killed"):
        recipe = {"output_dir": str(tmp_path / name), "objectives": {"sft": {"gate": "sft"}}}
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump(
                {**recipe, "train": train, "evaluate": evaluate, "keep_checkpoints": "chosen"}
            )
        )
        commands.append(["compare", "--config", tmp_path / f"{name}.yaml"])
    report, log = run_killed(tmp_path, *commands, seed=0)
    assert report["code"] == 0, log[-3000:]
    assert report["killed"] >= 2, report
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")
    )
    measured = [name for name in one if name not in ("environment", "kept", "recipe")]
    assert {"base", "objectives", "failed"} <= set(measured)
    for name in measured:
        assert without_times(one[name]) == without_times(two[name]), name


def test_tune(model_dir, tmp_path):
    assert tune_killed(model_dir, tmp_path, seed=0)["killed"] >= 2


def tune_killed(model_dir, tmp_path, seed, kills=KILLS):
    """Assert that a killed `eaft tune` gives what an undisturbed one gives; see `run_killed`."""
    data, prompts = tmp_path / "data.jsonl", tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows(40)))
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(40)))
    flags = [model_dir, data, "--max_drift", 0.05, "--prompts", prompts, "--max_new_tokens", 8]
    flags += ["--screening_prompts", 8, "--confirmation_prompts", 32, "--max_steps", 8]
    flags += ["--learning_rate", "3e-3", "--use_cpu", "--bf16", "false", "--report_to", "none"]
    commands = (["tune", *flags, "--output_dir", tmp_path / name] for name in ("whole", "killed"))
    report, log = run_killed(tmp_path, *commands, seed, kills)
    assert report["code"] == 0, log[-3000:]
    one, two = (tmp_path / name for name in ("whole", "killed"))
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (one, two))
    for name in first.keys() - {"environment", "flags"}:
        assert first[name] == second[name], name
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert not list(two.glob("work/**/*.safetensors"))
    return report


def without_times(value):
    """Leave out what a second start measures anew."""
    if isinstance(value, dict):
        timed = ("tokens_per_s", "peak_memory_gib", "train_runtime_s", "train_loss")
        return {name: without_times(part) for name, part in value.items() if name not in timed}
    return [without_times(part) for part in value] if isinstance(value, list) else value
