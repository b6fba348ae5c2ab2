"""Recipes of `eaft compare`: what is refused, and what a run is known by."""

import json

import pytest
import yaml

from eaft import cli
from eaft.comparison import measurer, recipe, runs
from eaft.errors import ConfigurationError
from eaft.training import apart
from tests.comparison.conftest import run, write_rows
from tests.conftest import make_model, make_rows, make_tokenizer


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


def test_the_model_that_is_trained_is_measured(content, tmp_path):
    content["train"] |= {"model_revision": "v2", "trust_remote_code": True}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    found = recipe.read_recipe(str(file), {}).evaluate.protocol.model_args
    assert (found["revision"], found["trust_remote_code"]) == ("v2", True)


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
