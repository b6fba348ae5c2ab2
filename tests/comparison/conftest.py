"""A recipe for the tiny model, and how the tests run it."""

import json
from pathlib import Path

import pytest
import yaml

from eaft import cli
from eaft.comparison import compare
from tests.conftest import make_rows

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


def read(out):
    return json.loads((out / "results.json").read_text())
