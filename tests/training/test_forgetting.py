"""
Forgetting measured while training: what is logged, that training is not disturbed, and which
checkpoint is kept.
"""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerState

from eaft import EAFTConfig, EAFTTrainer, cli
from eaft.errors import ConfigurationError
from eaft.evaluation.drift import BaseAnswers, sample_answers
from eaft.training.forgetting import ForgettingEval, ForgettingPoint, history, pareto_front, select
from tests.conftest import make_model, make_rows
from tests.processes import eaft, run_ranks

SUITE = "suite: tiny_suite\ntasks: [everyday]\nlimit: 8\n"


def runner(tmp_path, model_dir):
    """Return a function that trains the tiny model for six steps, in prompts of two words."""
    (tmp_path / "suite.yaml").write_text(SUITE)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(3)))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))

    common = {
        "model_name_or_path": model_dir,
        "dataset_name": tmp_path / "data.jsonl",
        "max_steps": 6,
        "learning_rate": 3e-3,
        "logging_steps": 2,
        "save_steps": 100,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,  # so that drift is what a measurement without autocast finds
        "report_to": "none",
        "per_device_eval_batch_size": 8,
        "forgetting_suite": tmp_path / "suite.yaml",
        "forgetting_prompts": tmp_path / "prompts.jsonl",
        "forgetting_eval_steps": 2,
    }

    def run(name="out", **changes):
        settings = {**common, "output_dir": tmp_path / name, **changes}
        code = cli.main(["train", *(f"--{key}={value}" for key, value in settings.items())])
        lines = []
        if (metrics := tmp_path / name / "metrics.jsonl").is_file():
            lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        return code, tmp_path / name, lines

    run.settings = common
    return run


@pytest.fixture
def train(tmp_path, model_dir):
    return runner(tmp_path, model_dir)


@pytest.fixture(scope="module")
def usual(tmp_path_factory, model_dir):
    """A run without changes: its exit code, its folder, and what it logged."""
    return runner(tmp_path_factory.mktemp("usual"), model_dir)()


def measured(lines):
    return history(TrainerState(log_history=lines))


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_what_is_logged_is_what_eval_finds(usual, model_dir):
    code, folder, lines = usual
    assert code == 0
    points = measured(lines)
    assert [p.step for p in points] == [0, 2, 4, 6]
    assert points[0].drift == 0
    assert points[3].drift > points[1].drift > 0
    measurements = [line for line in lines if "eval_drift" in line]
    assert all(m["eval_general"] == m["eval_score/everyday"] for m in measurements)
    # The model that was saved drifted as far as the last line says, by a measurement of its own
    assert not (folder / "forgetting").exists()
    out = folder.with_name("eval")
    flags = [
        folder,
        "--base",
        model_dir,
        "--suite",
        folder.with_name("suite.yaml"),
        "--output_path",
        out,
    ]
    assert (
        cli.main(["eval", *map(str, flags), "--prompts", str(folder.with_name("prompts.jsonl"))])
        == 0
    )
    again = json.loads((out / "results.json").read_text())
    assert again["drift"]["mean"] == pytest.approx(points[3].drift, rel=1e-4)
    assert again["tasks"]["everyday"]["before"] == points[0].scores["everyday"]
    assert again["tasks"]["everyday"]["after"] == points[3].scores["everyday"]
    # Training's own lines are whole: each has the nll of all its steps
    assert [line["step"] for line in lines if "nll" in line] == [2, 4, 6]


def test_training_is_not_disturbed(usual, train):
    _, measured, lines = usual
    _, plain, plain_lines = train("plain", forgetting_eval_steps=0)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(measured)[name], value, rtol=0, atol=0)
    losses = [[line["loss"] for line in run if "loss" in line] for run in (lines, plain_lines)]
    assert losses[0] == losses[1]


def test_budget_keeps_the_last_within_and_stops(usual, train):
    _, _, lines = usual
    drift = {point.step: point.drift for point in measured(lines)}
    budget = (drift[2] + drift[4]) / 2
    code, folder, lines = train("kept", forgetting_budget=budget)
    assert code == 0
    assert max(line["step"] for line in lines) == 4  # not 6
    _, two_steps, _ = train("two", max_steps=2, forgetting_eval_steps=0)
    for name, value in weights(two_steps).items():
        torch.testing.assert_close(weights(folder)[name], value, rtol=0, atol=0)


def test_a_budget_passed_at_once(train, capsys):
    code, folder, _ = train(forgetting_budget=1e-9)
    assert code == 2
    assert (
        "forgetting_budget=1e-09 was passed before the first measurement (drift 0."
        in capsys.readouterr().err
    )
    assert not (folder / "model.safetensors").exists()


def test_a_resumed_run_measures_from_the_same_base(usual, train, tokenizer):
    _, _, lines = usual
    _, folder, _ = train("cut", save_steps=2, max_steps=4)
    code, _, _ = train("cut", save_steps=2, resume_from_checkpoint="true")
    assert code == 2  # they were freed when that run ended
    before = [{"role": "user", "content": f"say {i}"} for i in range(3)]
    texts = [
        tokenizer.apply_chat_template([m], tokenize=False, add_generation_prompt=True)
        for m in before
    ]
    base = make_model().eval()
    (folder / "forgetting").mkdir()
    BaseAnswers.record(base, sample_answers(base, tokenizer, texts, 64, batch_size=8)).save(
        folder / "forgetting"
    )
    code, _, again = train("cut", save_steps=2, resume_from_checkpoint="true")
    assert code == 0
    drift = [[point.drift for point in measured(run)] for run in (lines, again)]
    assert drift[1] == pytest.approx(drift[0], rel=1e-5)


@pytest.mark.parametrize("rule", ["best-mean", "pareto"])
def test_the_chosen_checkpoint_is_what_is_saved(train, tmp_path, rule):
    code, folder, lines = train(select_checkpoint=rule, target_suite=tmp_path / "suite2.yaml")
    assert code == 2  # there is no such suite, and nothing was trained
    (tmp_path / "suite2.yaml").write_text(
        SUITE.replace("limit: 8", "limit: 8").replace("tiny_suite", "other")
    )
    code, folder, lines = train(
        "kept", select_checkpoint=rule, target_suite=tmp_path / "suite2.yaml"
    )
    assert code == 0
    points = measured(lines)
    chosen = select(points, rule, None).step
    saved = weights(folder)
    for name, value in weights(folder / f"checkpoint-{chosen}").items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0)
    if rule == "pareto":
        kept = {int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")}
        assert kept == {point.step for point in pareto_front(points[1:])} | {6}


def points(*rows):
    return [ForgettingPoint(i, d, t, {"a": t, "b": g}) for i, (d, t, g) in enumerate(rows)]


def test_rules_by_hand():
    run = points(
        (0, 0.1, 0.8), (0.1, 0.5, 0.8), (0.2, 0.7, 0.75), (0.5, 0.72, 0.5), (0.6, 0.6, 0.4)
    )
    assert select(run, "budget", 0.2).step == 2
    assert select(run, "budget", 0.05) is None
    assert select(run, "budget", 9.0).step == 4
    assert select(run, "best-mean", None).step == 2
    assert [p.step for p in pareto_front(run)] == [0, 1, 2, 3]
    # Gain as a share of the largest, less drift as a share of the largest: .645 - .2, .968 - .4, 1
    # - 1
    assert select(run, "pareto", None).step == 2
    # Drift that falls again after passing the budget does not count
    assert select(points((0, 0, 0), (0.1, 0, 0), (0.3, 0, 0), (0.1, 0, 0)), "budget", 0.2).step == 1


def test_pareto_keeps_what_it_chose_where_nothing_was_gained(tmp_path):
    """The base model beats every checkpoint here; it is not one of those to choose from."""
    run = points((0, 0.5, 0.8), (0.1, 0.5, 0.8), (0.2, 0.4, 0.7), (0.3, 0.5, 0.6))
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    args = EAFTConfig(
        str(tmp_path),
        use_cpu=True,
        forgetting_eval_steps=1,
        select_checkpoint="pareto",
        target_suite=["everyday"],
    )
    logs = [{"step": p.step, "eval_drift": p.drift, "eval_target": p.target} for p in run]
    ForgettingEval.on_save(None, args, TrainerState(log_history=logs, global_step=3), None)
    assert select(run, "pareto", None).step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-1",
        "checkpoint-3",
    ]  # and the newest


def test_history_survives_a_resumption_without_doubles():
    logs = [{"step": step, "eval_drift": drift} for step, drift in ((0, 0.0), (2, 1.0), (2, 1.5))]
    logs.insert(2, {"step": 2, "loss": 1})
    state = TrainerState(log_history=logs)
    assert [(p.step, p.drift) for p in history(state)] == [(0, 0.0), (2, 1.5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"select_checkpoint": "worst"},
            "select_checkpoint='worst' is unknown; choose one of budget",
        ),
        ({"select_checkpoint": "budget"}, "forgetting_budget goes with select_checkpoint='budget'"),
        ({"select_checkpoint": "pareto"}, "weighs target against forgetting: set target_suite"),
        (
            {"select_checkpoint": "pareto", "target_suite": ["everyday"], "save_total_limit": 2},
            "keeps the whole curve: leave save_total_limit out",
        ),
        (
            {"forgetting_budget": 0.1, "forgetting_eval_steps": 0},
            "needs measurements: set forgetting_eval_steps",
        ),
        ({"forgetting_budget": 0.1, "save_strategy": "no"}, "keeps checkpoints: set save_strategy"),
        (
            {"forgetting_budget": 0.1, "load_best_model_at_end": True, "eval_strategy": "steps"},
            "both choose a checkpoint: set one",
        ),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        EAFTConfig(
            str(tmp_path),
            use_cpu=True,
            **{"forgetting_eval_steps": 2, "save_strategy": "steps", **changes},
        )


@pytest.mark.parametrize("enabled", ["is_fsdp_enabled", "is_deepspeed_enabled"])
@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (["everyday"], "need the whole model on each process"),
        (None, "give the model by its name or folder"),
    ],
)
def test_what_a_sharded_model_cannot_do(tmp_path, monkeypatch, tokenizer, enabled, suite, message):
    make_accelerator = EAFTTrainer.create_accelerator_and_postprocess

    def make_sharded(self):
        make_accelerator(self)
        setattr(self, enabled, True)

    monkeypatch.setattr(EAFTTrainer, "create_accelerator_and_postprocess", make_sharded)
    args = EAFTConfig(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        forgetting_eval_steps=1,
        forgetting_suite=suite,
    )
    with pytest.raises(ConfigurationError, match=message):
        EAFTTrainer(
            make_model(),
            args,
            train_dataset=Dataset.from_list(make_rows()),
            processing_class=tokenizer,
        )


def test_works_in_python_too(tmp_path, tokenizer):
    (tmp_path / "suite.yaml").write_text(SUITE)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "say a"}\n{"prompt": "say b"}\n')
    args = EAFTConfig(
        str(tmp_path / "out"),
        max_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        forgetting_eval_steps=1,
        forgetting_suite=[str(tmp_path / "suite.yaml")],
        forgetting_prompts=str(tmp_path / "prompts.jsonl"),
    )
    trainer = EAFTTrainer(
        make_model(), args, train_dataset=Dataset.from_list(make_rows()), processing_class=tokenizer
    )
    trainer.train()
    assert [p.step for p in history(trainer.state)] == [0, 1]
    assert trainer.model.training


def test_two_processes_measure_what_one_measures(train, tmp_path, model_dir):
    """
    Under DDP the items are shared out, the first process measures drift, and all choose the same
    checkpoint.
    """
    flags = {"per_device_train_batch_size": 8, "forgetting_budget": 1e9, "save_total_limit": 1}
    _, _, lines = train("one", **flags)
    settings = {
        **train.settings,
        **flags,
        "per_device_train_batch_size": 4,
        "output_dir": tmp_path / "two",
    }
    run_ranks(eaft, "train", *(f"--{key}={value}" for key, value in settings.items()))
    again = [
        json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    ]
    for one, two in zip(measured(lines), measured(again), strict=True):
        assert two.step == one.step
        assert two.drift == pytest.approx(one.drift, rel=1e-3)
        assert two.scores == one.scores
