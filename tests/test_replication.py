"""The replication's recipes are recipes of `eaft compare`, and their data is apart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eaft.comparison.compare import load_tasks
from eaft.comparison.recipe import plan_runs, read_recipe

ROOT = Path(__file__).parents[1]
REPLICATION = ROOT / "benchmarks" / "replication"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository's root with the data made, from a GSM8K of our own."""
    root = tmp_path_factory.mktemp("root")
    for name in ("benchmarks", "recipes"):
        (root / name).symlink_to(ROOT / name)
    rows = [
        {"question": f"{i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(100)
    ]
    rows.insert(3, {"question": "Long?", "answer": "x" * 240})
    for split, first in (("train", 0), ("test", 1000)):
        own = [{**row, "question": f"{first} + {row['question']}"} for row in rows]
        (root / f"gsm8k_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    subprocess.run([sys.executable, REPLICATION / "make_data.py", root], cwd=root, check=True)
    return root


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_is_trained_on_chosen_by_and_scored_is_apart(root):
    for name, sizes in (("gsm8k", (32, 64, 50)), ("function_calls", (48, 32, 68))):
        parts = [
            read(root / "runs/replication/data" / f"{name}_{p}.jsonl")
            for p in ("train", "held_out", "test")
        ]
        assert tuple(map(len, parts)) == sizes
        prompts = [row["prompt"][0]["content"] for part in parts for row in part]
        assert len(set(prompts)) == len(prompts)
        assert not any("Long" in prompt for prompt in prompts)


@pytest.mark.parametrize("name", ["gsm8k", "function_calls"])
def test_a_recipe_can_be_run(root, name, model_dir, monkeypatch):
    monkeypatch.chdir(root)
    overrides = {
        "model_name_or_path": str(model_dir),
        "objectives": ["sft", "eaft", "talr"],
        "seeds": [0],
    }
    recipe = read_recipe(f"benchmarks/replication/{name}.yaml", overrides)
    runs = plan_runs(recipe, None)
    assert len(runs) == 3 * len(recipe.learning_rates)
    assert recipe.compared == [("eaft", "sft"), ("talr", "sft")]
    recipe.evaluate.data_dir = None
    recipe.evaluate.general_tasks = ["everyday"]  # the others' data is not here
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    benchmarks, (target, _) = load_tasks(recipe)
    (task,) = benchmarks[target.benchmarks[0]].tasks.values()
    assert len(task.eval_docs) == {"gsm8k": 50, "function_calls": 68}[name]
    shown = task.doc_to_target(task.eval_docs[0])
    assert shown == {"gsm8k": "1", "function_calls": shown}[name]
