"""
`eaft train` as a user runs it: formats in, a loadable folder out, and bad input refused with
nothing written.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from eaft import cli
from eaft.comparison.recipe import read_recipe
from eaft.objective.registry import GATES
from eaft.training.arguments import parse
from eaft.training.run_folder import last_complete_checkpoint
from tests.conftest import TINY_TRAINING, make_rows
from tests.processes import eaft, run_ranks

SMALL = [*TINY_TRAINING, "--max_steps", "4"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    return path


@pytest.fixture
def given(model_dir, data):
    """The flags that every run has."""
    return ["--model_name_or_path", model_dir, "--dataset_name", data]


def run(*flags):
    """Run in this process; return the exit code."""
    return cli.main(["train", *SMALL, *map(str, flags)])


def weights(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="float32").named_parameters())


def test_trains_and_writes_what_it_promises(model_dir, tmp_path, capsys, given):
    out = tmp_path / "out"
    assert run(*given, "--output_dir", out, "--logging_steps", 1) == 0
    before, after = weights(model_dir), weights(out)
    assert any(not torch.equal(before[n], after[n]) for n in before)
    logs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [log["step"] for log in logs] == [1, 2, 3, 4, 4]
    assert {"loss", "nll", "mean_gate", "entropy", "conflict_share", "conflict_nll_share"} <= logs[
        0
    ].keys()
    assert "`eaft`" in (out / "README.md").read_text()
    record = json.loads((out / "run.json").read_text())
    assert record["finished"]
    assert record["gate"] == {"name": "eaft", "top_k": 20, "alpha": 1.0, "entropy": "top-k"}
    assert record["environment"]["libraries"]["trl"]
    assert record["result"]["steps"] == 4
    assert not (out / "saving").exists()
    # The same folder is not overwritten
    assert run(*given, "--output_dir", out) == 2
    assert "holds another run (run.json)" in capsys.readouterr().err


ROWS = make_rows()
CHAT = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in ROWS
]
SHAREGPT = [
    {
        "conversations": [
            {"from": "human", "value": r["prompt"]},
            {"from": "gpt", "value": r["completion"]},
        ]
    }
    for r in ROWS
]
MESSAGES = [{"messages": row["prompt"] + row["completion"]} for row in CHAT]
TEXT = [{"text": row["prompt"] + row["completion"]} for row in ROWS]


FORMATS = {"chat": CHAT, "sharegpt": SHAREGPT, "messages": MESSAGES, "text": TEXT}


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        *((name, suffix) for name in FORMATS for suffix in (".jsonl", ".json", ".parquet")),
        ("text", ".csv"),
    ],
)
def test_every_format_from_every_file(model_dir, tmp_path, name, suffix):
    path, table = tmp_path / f"rows{suffix}", pd.DataFrame(FORMATS[name])
    {
        ".jsonl": lambda: table.to_json(path, orient="records", lines=True),
        ".json": lambda: table.to_json(path, orient="records"),
        ".csv": lambda: table.to_csv(path, index=False),
        ".parquet": lambda: table.to_parquet(path),
    }[suffix]()
    assert (
        run(
            "--model_name_or_path",
            model_dir,
            "--dataset_name",
            path,
            "--output_dir",
            tmp_path / "out",
        )
        == 0
    )
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_yaml_lora_and_evaluation_from_a_folder_of_splits(model_dir, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:4])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model_name_or_path: {model_dir}\ndataset_name: {folder}\noutput_dir:"
        f" {tmp_path / 'out'}\ngate: dft\nuse_peft: true\nlora_r: 4\neval_strategy:"
        " steps\neval_steps: 2\n"
    )
    assert run("--config", config, "--gate", "eaft") == 0  # a flag overrides the file
    assert json.loads((tmp_path / "out" / "run.json").read_text())["gate"]["name"] == "eaft"
    logs = [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [log["step"] for log in logs if "eval_loss" in log] == [2, 4]
    assert "lm_head.weight" in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()


def test_a_run_at_its_end_is_not_trained_on(tmp_path, capsys, given):
    """
    max_steps in mid-epoch, where transformers' Trainer trains one step more at each resumption.
    """
    out = tmp_path / "out"
    flags = [*given, "--output_dir", out, "--logging_steps", 1]
    flags += [
        "--save_steps",
        3,
        "--resume_from_checkpoint",
        "true",
        "--lr_scheduler_type",
        "constant",
    ]

    def state():
        return {file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.is_file()}

    assert run(*flags, "--max_steps", 3) == 0
    whole = state()
    for again in ("true", out / "checkpoint-3"):
        assert run(*flags, "--max_steps", 3, "--resume_from_checkpoint", again) == 0
        assert state() == whole
        assert "finished after 3 steps; nothing was changed" in capsys.readouterr().out

    # As a kill between the last checkpoint and the final save leaves it
    (out / "model.safetensors").unlink()
    (out / "run.json").write_text(json.dumps({**json.loads(whole["run.json"]), "finished": False}))
    assert run(*flags, "--max_steps", 3) == 0
    assert state()["model.safetensors"] == whole["model.safetensors"]
    result, first = (json.loads(found["run.json"])["result"] for found in (state(), whole))
    assert result["steps"] == 3
    assert result["train_loss"] == pytest.approx(
        first["train_loss"], rel=1e-4
    )  # logged with four digits
    assert [log["step"] for log in map(json.loads, state()["metrics.jsonl"].splitlines())] == [
        1,
        2,
        3,
        3,
    ]

    assert run(*flags, "--max_steps", 4) == 0  # more is asked for
    assert json.loads(state()["run.json"])["result"]["steps"] == 4
    assert (
        run(*flags, "--max_steps", 4, "--resume_from_checkpoint", out / "checkpoint-3") == 0
    )  # from there again
    assert "nothing was changed" not in capsys.readouterr().out
    assert state()["model.safetensors"] != whole["model.safetensors"]


def test_a_run_goes_on_with_its_own_settings(tmp_path, capsys, given):
    """The checkpoint's optimizer keeps the old ones, whatever is given."""
    out = tmp_path / "out"
    flags = [*given, "--save_steps", 2]
    assert run(*flags, "--output_dir", out, "--max_steps", 2, "--weight_decay", 0.1) == 0
    before = (out / "run.json").read_bytes()
    longer = [*flags, "--max_steps", 3, "--weight_decay", 0.1]
    changes = {
        ("--learning_rate", "0.001"): "learning_rate=0.001: .* begun with 2e-05",
        ("--weight_decay", "0"): r"weight_decay=0\.0: .* begun with 0\.1",
        ("--warmup_steps", "1"): r"warmup_steps=1\.0: .* begun with 0",
        ("--gate", "sft"): "gate='sft': .* begun with 'eaft'",
        ("--seed", "1"): "seed=1: .* begun with 42",
        ("--optim", "sgd"): "optim='sgd': .* begun with 'adamw_torch_fused'",
    }
    for change, message in changes.items():
        for where, resume in ((out, "true"), (tmp_path / "other", out / "checkpoint-2")):
            given = [*longer, "--output_dir", where, "--resume_from_checkpoint", resume, *change]
            assert run(*given) == 2
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert re.search(message, error)
            assert (out / "run.json").read_bytes() == before
            assert not (tmp_path / "other").exists()
    assert run(*longer, "--output_dir", out, "--resume_from_checkpoint", "true") == 0


def test_resume_equals_uninterrupted(tmp_path, given):
    shared = [*given, "--save_steps", 2, "--logging_steps", 1]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(*shared, "--output_dir", whole) == 0
    assert run(*shared, "--output_dir", broken) == 0
    # As if the machine had stopped while it wrote its last checkpoint
    (broken / "checkpoint-4" / "trainer_state.json").write_text('{"epoch":')
    (broken / "model.safetensors").unlink()
    assert last_complete_checkpoint(broken) == str(broken / "checkpoint-2")
    assert run(*shared, "--output_dir", broken, "--resume_from_checkpoint", "true") == 0
    a, b = weights(whole), weights(broken)
    assert all(torch.equal(a[name], b[name]) for name in a)
    logs = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[:4]]
        for out in (whole, broken)
    ]
    assert [log["nll"] for log in logs[0]] == [log["nll"] for log in logs[1]]


# The launcher chooses the port
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def launch(launcher, *flags, cwd):
    """Start processes as a user does."""
    command = [sys.executable, *launcher, "-m", "eaft", "train", *SMALL, *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("gate", ["flow", "conflict-mask", "psft", "asft"])
def test_two_processes_equal_one(model_dir, tmp_path, monkeypatch, gate, given):
    shared = [*given, "--logging_steps", 1, "--gate", gate]
    shared += ["--learning_rate", "1e-3"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(*shared, "--output_dir", one, "--per_device_train_batch_size", 4) == 0
    flags = [*shared, "--output_dir", two, "--per_device_train_batch_size", 2]
    if gate == "flow":  # what the launcher does beside is the same for all
        launch(TORCHRUN, *flags, cwd=tmp_path)
    else:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        run_ranks(eaft, "train", *SMALL, *flags)
    start, a, b = weights(model_dir), weights(one), weights(two)
    moved = sum((a[n] - start[n]).square().sum() for n in a).sqrt()
    different = sum((a[n] - b[n]).square().sum() for n in a).sqrt()
    assert different / moved < 1e-3
    logs = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[:4]]
        for out in (one, two)
    ]
    for key in ("nll", "mean_gate", "grad_norm", "num_tokens", *(["kl"] if gate == "asft" else [])):
        # The first step's divergence is that of a model from itself: 0, within rounding
        assert [log[key] for log in logs[0]] == pytest.approx(
            [log[key] for log in logs[1]], rel=1e-4, abs=1e-6
        ), key
    if gate in ("flow", "conflict-mask"):
        a, b = (json.loads((out / "gate_measurements.json").read_text()) for out in (one, two))
        assert a["inputs"] == b["inputs"]
        assert a["params"] == pytest.approx(b["params"], rel=1e-5 + 2**-15)  # a histogram's bin
        assert a.get("example_nll", []) == pytest.approx(b.get("example_nll", []), rel=1e-5)


def test_flags_of_accelerate_launch_are_passed_on(tmp_path, given):
    flags = [*given, "--output_dir", "out", "--num_processes", "1"]
    launch([], *flags, cwd=tmp_path)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


def test_divergence_ends_with_one_message_and_a_good_checkpoint(tmp_path, capsys, given):
    """
    The rows of the batch, which the message also names for a loss, are tested in test_trainer.py.
    """
    out = tmp_path / "out"
    flags = [
        "--learning_rate",
        "1e30",
        "--max_grad_norm",
        "0",
        "--save_steps",
        1,
        "--output_dir",
        out,
    ]
    assert run(*given, *flags) == 2
    error = capsys.readouterr().err
    assert re.search(
        r"error: The (loss|gradient's norm) is (nan|inf) in training, step 2[;.]", error
    )
    assert "Traceback" not in error
    assert all(weight.isfinite().all() for weight in weights(out / "checkpoint-1").values())
    assert not json.loads((out / "run.json").read_text())["finished"]
    assert not (out / "model.safetensors").exists()


def bad(tmp_path, name, text=""):
    path = tmp_path / name
    path.write_text(text)
    return path


BAD_INPUT = {
    "unknown gate": (
        lambda d: ["--gate", "eatf"],
        r"gate='eatf' is unknown. Did you mean 'eaft'? Gates: sft, eaft, eaft-sigmoid",
    ),
    "unknown flag": (lambda d: ["--gaet", "eaft"], "--gaet is unknown. Did you mean '--gate'?"),
    "wrong type": (lambda d: ["--gate_top_k", "many"], "invalid int value"),
    "gate_top_k": (lambda d: ["--gate_top_k", "1"], "gate_top_k must be at least 2, got 1"),
    "gate_alpha": (
        lambda d: ["--gate_alpha", "-1"],
        "alpha must be a number of at least 0, got -1.0",
    ),
    "no such folder": (lambda d: ["--model_name_or_path", d / "none"], "there is no such folder"),
    "no such Hub id": (
        lambda d: ["--model_name_or_path", "nobody/nothing"],
        "'nobody/nothing' is not a readable model",
    ),
    "no such GGUF": (lambda d: ["--model_name_or_path", d / "none.gguf"], "there is no such file"),
    "damaged GGUF": (
        lambda d: ["--model_name_or_path", bad(d, "x.gguf", "GGUF")],
        "is not a readable GGUF file",
    ),
    "folder without model": (lambda d: ["--model_name_or_path", d], "is not a readable model"),
    "no such data file": (
        lambda d: ["--dataset_name", d / "none.jsonl"],
        "there is no such file or folder",
    ),
    "no such data set": (
        lambda d: ["--dataset_name", "nobody/nothing"],
        "dataset_name='nobody/nothing' cannot be read",
    ),
    "damaged data": (
        lambda d: ["--dataset_name", bad(d, "x.jsonl", '{"prompt": ')],
        "line 1 is not JSON",
    ),
    "empty file": (lambda d: ["--dataset_name", bad(d, "x.jsonl")], "the file is empty"),
    "no rows": (lambda d: ["--dataset_name", bad(d, "x.csv", "text\n")], "data set is empty"),
    "wrong columns": (
        lambda d: ["--dataset_name", bad(d, "x.jsonl", '{"question": "a", "answer": "b"}\n')],
        "has the columns question, answer; expected one of: messages, prompt + completion, text",
    ),
    "no labelled token": (
        lambda d: ["--max_length", "3"],
        "No row has a labelled token left after truncation",
    ),
    "no test split": (
        lambda d: ["--eval_strategy", "epoch"],
        "dataset_test_split='test': the data has only train",
    ),
    "nothing to resume": (
        lambda d: ["--resume_from_checkpoint", d / "checkpoint-1"],
        "is no complete checkpoint",
    ),
    "no such recipe": (lambda d: ["--config", d / "none.yaml"], "there is no such file"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_message_and_nothing_written(name, tmp_path, capsys, given):
    flags, message = BAD_INPUT[name]
    out = tmp_path / "out"
    # argparse itself exits for a value of the wrong type; ours is returned
    try:
        code = run(*given, "--output_dir", out, *flags(tmp_path))
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert not out.exists()


def test_truncated_weights_are_refused(model_dir, data, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model_dir.iterdir():
        (broken / file.name).write_bytes(
            file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None]
        )
    out = tmp_path / "out"
    assert run("--model_name_or_path", broken, "--dataset_name", data, "--output_dir", out) == 2
    assert "is truncated or no safetensors" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("flag", ["--help_all", "--help-all"])
def test_help_teaches(flag, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", flag])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "--ddp_find_unused_parameters" in text
    assert "torchrun --nproc_per_node 8 -m eaft train" in text
    for name, gate in GATES.items():
        assert f" {name} {gate.help} " in " ".join(text.split())
    assert "(steepness: 30.0, center: 0.17, entropy: top-k)" in text
    assert "(entropy_threshold: measured, entropy_percentile: 15.0, entropy: top-k)" in text


def test_env_is_json(capsys):
    assert cli.main(["env"]) == 0
    environment = json.loads(capsys.readouterr().out)
    assert (
        environment["libraries"]["torch"] == torch.__version__.split("+")[0]
        or "+" in environment["libraries"]["torch"]
    )
    assert environment["cores"] >= 1


def test_recipes_parse():
    recipes = Path(__file__).parents[2] / "recipes"
    (_, args, model_args, *_), launch_args, _ = parse(
        ["--config", str(recipes / "train.yaml"), "--use_cpu", "--output_dir", "out"]
    )
    assert args.gate == "eaft"
    assert model_args.model_name_or_path
    assert not launch_args
    parse(["--config", str(recipes / "demo" / "tune.yaml"), "--model_name_or_path", "model"])
    assert set(read_recipe(str(recipes / "demo" / "gsm8k.yaml"), {}).objectives) == {"sft", "eaft"}
