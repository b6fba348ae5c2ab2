"""What `eaft tune` decides before it trains, and its parts that a small run does not reach."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from eaft import cli
from eaft.errors import ConfigurationError
from eaft.evaluation.comparable import comparable_models
from eaft.evaluation.protocol import Protocol
from eaft.phases import Phases
from eaft.training.apart import Checkpoint
from eaft.training.data import row_digest
from eaft.training.family import write_member
from eaft.training.run_rows import asked_by
from eaft.tuning import tune as tune_module
from eaft.tuning.measure import LoadedFamily
from eaft.tuning.plan import Settings, make_plan, named
from eaft.tuning.points import Member, Point, Sums
from eaft.tuning.search import Search
from tests.conftest import CHAT_TEMPLATE, chain_model, make_model, make_rows, make_tokenizer


def plan(folder, model_dir, *flags, rows=None, **settings):
    """Return the plan for 48 rows, or others."""
    data = folder / "data.jsonl"
    lines = make_rows(48) if rows is None else rows
    data.write_text("".join(json.dumps(row) + "\n" for row in lines))
    more = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--max_steps", "8", *flags]
    first = ["--model_name_or_path", model_dir, "--dataset_name", data]
    sizes = {"screening_prompts": 4, "confirmation_prompts": 8, "max_new_tokens": 8}
    settings = Settings(
        **{"max_drift": 0.05, "output_dir": str(folder / "out"), **sizes, **settings}
    )
    return make_plan(settings, [*map(str, first), *map(str, more)], "2026-11-30")


@pytest.mark.parametrize("power", [1.0, 1.3, 1.9])
@pytest.mark.parametrize("height", [2, 40])
def test_a_share_within_the_budget_is_found(power, height):
    """The drift of the only checkpoint is `height` times the budget, and a power of the share."""
    one = np.ones(2)

    def measure(member):
        drift = height * 0.05 * member.share**power
        return Point(member, Sums((2 - member.share) * one, one), Sums(drift * one, one))

    search = Search(measure, 2.0)
    search.run([10], 0.05)
    assert 0.8 * 0.05 < search.best(0.05).drift.mean <= 0.05
    assert len(search.points) <= 8


def test_a_recipe_and_excluded_rows_are_part_of_the_folder(tmp_path, model_dir):
    recipe, excluded = tmp_path / "recipe.yaml", tmp_path / "excluded.jsonl"
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in make_rows(64)[48:]))
    flags = ["--config", recipe, "--exclude_examples", excluded]
    found = []
    for rate, row in ((1e-3, 0), (1e-3, 0), (5e-2, 0), (1e-3, 1)):
        recipe.write_text(f"learning_rate: {rate}\n")
        entry = {"row": row, "digest": row_digest(make_rows(48)[row])}
        excluded.write_text(json.dumps(entry) + "\n")
        found.append(plan(tmp_path, model_dir, *flags, held_out=str(held_out)).identity)
    assert found[0] == found[1]
    assert [{k for k in found[0] if found[0][k] != other[k]} for other in found[2:]] == [
        {"recipe"},
        {"excluded"},
    ]


def test_rows_that_confirm_have_labels(tmp_path, model_dir):
    rows = [
        {"prompt": f"{'x' * 100 * (i % 3 == 0)}{i} plus {i * 3}", "completion": f" is {i * 4}"}
        for i in range(48)
    ]
    found = plan(tmp_path, model_dir, "--max_length", 64, rows=rows)
    assert [len(part) for part in found.held_out] == [len(part) for part in found.rows]
    assert all(len(row["prompt"]) < 64 for part in found.held_out for row in part)


def test_the_prompts_of_a_model_without_a_template_are_those_of_eaft_eval(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(CHAT_TEMPLATE)
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    tokenizer = make_tokenizer()
    for folder, own in ((base, None), (tuned, CHAT_TEMPLATE)):
        make_model().save_pretrained(folder)
        tokenizer.chat_template = own
        tokenizer.save_pretrained(folder)
    protocol = plan(tmp_path, base, "--chat_template_path", template).protocol
    _, ours = comparable_models(str(tuned), str(base), protocol, drift=True)
    _, evals = comparable_models(str(tuned), str(base), Protocol(), drift=True)
    assert ours.protocol.apply_chat_template
    assert ours.protocol.apply_chat_template == evals.protocol.apply_chat_template


@pytest.mark.parametrize(
    ("flags", "settings", "says"),
    [
        ([], {"strict": True}, "--strict: 8 prompts cannot show"),
        (["--hub_token", "secret"], {}, "--hub_token does not go with eaft tune"),
        (["--save_strat", "no"], {}, "--save_strategy=no: checkpoints are the candidates"),
    ],
)
def test_what_can_be_known_is_refused_before_training(flags, settings, says, tmp_path, model_dir):
    with pytest.raises(ConfigurationError, match=says):
        plan(tmp_path, model_dir, *flags, **settings)


def test_prompts_that_are_replayed_measure_no_drift(tmp_path, model_dir):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(12)))
    flags = ["--replay", 0.5, "--replay_prompts", prompts]
    with pytest.raises(ConfigurationError, match="has 12 of the prompts that drift is measured on"):
        plan(tmp_path, model_dir, *flags, prompts=str(prompts))


def test_a_template_that_adds_tokens_is_refused(tmp_path, model_dir):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "template")
    with pytest.raises(ConfigurationError, match=r"--chat_template_path=.*TRL would add"):
        plan(tmp_path, model_dir, "--chat_template_path", tmp_path / "template")


def test_flags_may_be_written_with_hyphens_or_cut(monkeypatch):
    assert {"save_strategy", "learning_rate"} <= named(["--save_strat=no", "--learning-rate", "1"])
    seen = []

    def tune(settings, flags):
        seen.append((settings.output_dir, flags))
        return SimpleNamespace(chosen=None)

    monkeypatch.setattr(tune_module, "tune", tune)
    cli.main(["tune", "m", "d", "--max-drift=1", "--output-dir", "mine", "--learning-rate", "1"])
    assert seen == [
        ("mine", ["--model_name_or_path", "m", "--dataset_name", "d", "--learning-rate", "1"])
    ]


def test_rows_of_token_ids_have_no_prompt_to_show():
    rows = [{"prompt": "2 + 2", "input_ids": [1, 2], "labels": [1, 2]}]
    assert asked_by(Dataset.from_list(rows)) == []
    assert len(asked_by(Dataset.from_list([{"prompt": "2 + 2", "completion": "4"}]))) == 1


def test_a_prompt_without_a_completion_is_one_line(tmp_path, model_dir):
    rows = [{"prompt": "2 + 2", "text": "2 + 2 is 4"}] * 48
    with pytest.raises(ConfigurationError, match="the rows have a prompt and no completion"):
        plan(tmp_path, model_dir, rows=rows)


def test_the_tuned_model_ends_its_answers_where_it_was_trained_to(tmp_path):
    """`--eos_token <|im_start|>` adds an end token to the checkpoint's generation config."""
    tokenizer, folders = make_tokenizer(), {}
    for name, text, ends in (
        ("base", "Qab<|im_end|>", 2),
        ("tuned", "Qok<|im_start|>ok<|im_start|>", [1, 2]),
    ):
        model, folders[name] = chain_model(tokenizer, text), tmp_path / name
        model.generation_config.eos_token_id = ends
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    tuned, base = comparable_models(
        *map(str, (folders["tuned"], folders["base"])), Protocol(), True
    )
    family = LoadedFamily(base, [Checkpoint(8, 1.0, folders["tuned"])], {})
    prompts = [tokenizer("Q")["input_ids"]]
    whole, none, again = (
        family.likeliest(Member(8, share), prompts, 20, lambda n: None) for share in (1, 0, 1)
    )
    assert whole == again == tuned.likeliest(prompts, 20)
    assert none == base.likeliest(prompts, 20)


def test_a_folder_of_an_optimizer_is_deleted_too(tmp_path, monkeypatch):
    """As accelerate writes with FSDP's SHARDED_STATE_DICT."""

    def train(arguments, folder):
        (folder / "checkpoint-4" / "optimizer_0").mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"finished": True, "result": {"steps": 8}}))
        return 0

    monkeypatch.setattr(tune_module, "run_train", train)
    tune_module.train(SimpleNamespace(excluded=[], watched=False, arguments=[]), tmp_path, Phases())
    assert not list((tmp_path / "run").glob("checkpoint-*/optimizer*"))


def test_all_chat_templates_are_kept_and_no_tensorboard_file(tmp_path, model_dir):
    checkpoint, written = tmp_path / "checkpoint", tmp_path / "written"
    make_model(seed=0).save_pretrained(checkpoint)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE + "tools"}
    tokenizer.save_pretrained(checkpoint)
    (checkpoint / "events.out.tfevents.1.x").write_text("x")
    write_member(str(model_dir), checkpoint, 0.5, written)
    assert AutoTokenizer.from_pretrained(written).chat_template == tokenizer.chat_template
    assert not list(written.glob("events*"))
