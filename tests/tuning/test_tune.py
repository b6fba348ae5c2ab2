"""`eaft tune` from end to end on a tiny model: what it returns is what it says."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from eaft import cli
from eaft.evaluation.comparable import comparable_models
from eaft.evaluation.drift import read_prompts
from eaft.evaluation.protocol import Protocol
from eaft.evaluation.results import Results
from eaft.evaluation.suite import load_suites
from eaft.files import adapter
from eaft.tuning import tune as tune_module
from eaft.tuning.report import sentence
from eaft.tuning.results import TuneResults
from tests.conftest import make_rows
from tests.evaluation.test_evaluate import task_path  # noqa: F401 - a fixture
from tests.training import fsdp_on_cpu
from tests.training.test_distributed import FSDP2, launch

HOSTILE = "<script>alert(1)</script>"


def train_here(arguments, folder):
    """`eaft train` in this process, which saves the seconds that a new one takes to start."""
    return cli.main(["train", *arguments])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    rows = make_rows(48)
    rows += rows[:3]  # duplicates
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": f"{HOSTILE} say {i}"} for i in range(48)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return folder


def flags_of(model_dir, inputs, out, *more, drift="0.05"):
    flags = ["tune", model_dir, inputs / "data.jsonl"]
    flags += [] if drift is None else ["--max_drift", drift]
    flags += ["--prompts", inputs / "prompts.jsonl", "--screening_prompts", 8]
    flags += ["--confirmation_prompts", 40, "--max_new_tokens", 8, "--output_dir", out]
    flags += ["--use_cpu", "--bf16", "false", "--max_steps", 8, "--learning_rate", "3e-3"]
    return [*map(str, flags), "--report_to", "none", *map(str, more)]


@pytest.fixture(scope="module")
def tuned(model_dir, inputs):
    """A finished run whose checkpoints are kept."""
    out = inputs / "tuned"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_module, "run_train", train_here)
        assert cli.main(flags_of(model_dir, inputs, out, "--keep_checkpoints")) == 0
    return out


def results_of(out):
    return adapter(TuneResults).validate_python(json.loads((out / "results.json").read_text()))


def drift_of(out, model_dir, inputs):
    """Measured as `eaft eval` does, on the prompts that confirmed."""
    model, base = comparable_models(str(out), str(model_dir), Protocol(max_new_tokens=8), True)
    prompts = read_prompts(str(inputs / "prompts.jsonl"), 48)[8:]
    sums, counts = model.drift(base.answers(prompts))
    return sums.sum() / counts.sum()


def test_the_returned_model_has_the_drift_that_is_said(tuned, model_dir, inputs):
    results = results_of(tuned)
    assert results.chosen.prompts == 40
    assert drift_of(tuned, model_dir, inputs) == pytest.approx(results.chosen.drift, rel=1e-5)
    assert results.chosen.drift <= 0.05 < results.screened[0].drift
    assert results.chosen.nll < results.base_nll
    assert results.chosen.drift <= results.chosen.bound


def test_the_returned_model_is_the_interpolation(tuned, model_dir):
    chosen = results_of(tuned).chosen
    assert 0 < chosen.share < 1
    old, written = (
        load_file(model_dir / "model.safetensors"),
        load_file(tuned / "model.safetensors"),
    )
    new = load_file(tuned / "work" / "run" / f"checkpoint-{chosen.step}" / "model.safetensors")
    for name, tensor in written.items():
        exact = old[name].double() + chosen.share * (new[name].double() - old[name].double())
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-7)
    AutoModelForCausalLM.from_pretrained(tuned)
    model = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    model |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    ours = {"_lock", "front.png", "report.html", "results.json", "tune.json", "work"}
    ours |= {"held_out.jsonl"}
    assert {path.name for path in tuned.iterdir()} == model | ours


def test_no_prompt_is_trained_on_and_held_out(tuned, inputs):
    results = results_of(tuned)
    data = [json.loads(line) for line in (inputs / "data.jsonl").read_text().splitlines()]
    lines = (tuned / "work" / "excluded_rows.jsonl").read_text().splitlines()
    held = {json.loads(line)["row"] for line in lines}
    assert len(held) == results.data.screening_rows + results.data.confirmation_rows == 16
    assert results.data.training_rows == 35
    trained = {row["prompt"] for i, row in enumerate(data) if i not in held}
    assert not trained & {data[i]["prompt"] for i in held}
    run = json.loads((tuned / "work" / "run" / "run.json").read_text())
    assert run["config"]["exclude_examples"] == str(tuned / "work" / "excluded_rows.jsonl")
    assert run["gate"]["name"] == "sft"


def test_eval_finds_the_nll_and_the_answers_that_tune_found(
    tuned, model_dir, inputs, tmp_path, capsys
):
    """On the rows that confirmed, which the run's data still has but did not train on."""
    said, data = results_of(tuned), (inputs / "data.jsonl").read_text().splitlines()
    held_out = (tuned / "held_out.jsonl").read_text().splitlines()
    assert len(held_out) == said.data.confirmation_rows
    assert {*held_out} <= {*data}
    flags = ["eval", tuned, "--base", model_dir, "--held_out", tuned / "held_out.jsonl"]
    flags += ["--drift_prompts", 2, "--max_new_tokens", 4, "--held_out_answers", 8]
    assert cli.main([*map(str, flags), "--output_path", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "results.json").read_text()
    results = adapter(Results).validate_python(json.loads(text))
    found = results.held_out
    assert found.apart
    assert found.before == pytest.approx(said.base_nll, rel=1e-5)
    assert found.after == pytest.approx(said.chosen.nll, rel=1e-5)
    assert found.low <= found.change < 0
    assert len(said.answers) == 8
    for here, there in zip(said.answers, found.answers, strict=True):
        assert (here.row, here.prompt, here.target) == (there.row, there.prompt, there.target)
        assert there.before.startswith(here.before)  # `eaft eval` cuts later
        assert there.after.startswith(here.after)
    assert found.answers[0].target == json.loads(held_out[0])["completion"]
    assert results.verdict.status == "nothing to judge"
    assert results.drift is not None
    assert f"Written to {tmp_path / 'out'}" in capsys.readouterr().out


def test_the_first_candidate_that_passes_is_returned(tuned):
    results = results_of(tuned)
    assert [c.within for c in results.candidates] == [False] * (len(results.candidates) - 1) + [
        True
    ]
    assert results.chosen == results.candidates[-1]
    assert results.status == ("shown" if results.chosen.shown else "within")
    screened = {(p.step, p.share): p for p in results.screened}
    assert len(screened) == len(results.screened) < 20
    assert {p.step for p in results.screened if p.share == 1} == {2, 4, 6, 8}
    for p in results.screened:
        assert p.nll_change == pytest.approx(p.nll - results.base_nll_screening)
        assert p.nll_low < p.nll_change < p.nll_high < 0 < p.drift_low < p.drift < p.drift_high
    lines = map(json.loads, (tuned / "work" / "run" / "metrics.jsonl").read_text().splitlines())
    watched = {line["step"]: line["eval_nll"] for line in lines if "eval_nll" in line}
    assert watched == {s: pytest.approx(screened[s, 1].nll, rel=1e-5) for s in (2, 4, 6, 8)}
    assert results.stopped_early is None  # each checkpoint was better than those before
    best = min(results.screened, key=lambda p: p.nll)
    assert (results.unconstrained.step, results.unconstrained.share) == (best.step, best.share)
    returned = screened[results.chosen.step, results.chosen.share]
    assert results.unconstrained.cost == pytest.approx(returned.nll - best.nll)


def test_a_budget_that_was_hardly_used_is_told(tuned):
    results = results_of(tuned)
    free = replace(results.unconstrained, cost=0.0)
    for drift, told in [(0.02, True), (0.03, False)]:
        said = replace(results, chosen=replace(results.chosen, drift=drift), unconstrained=free)
        assert ("Most of the budget was not used" in sentence(said)) == told
    cost = replace(results, chosen=replace(results.chosen, drift=0.02))
    assert "Most of the budget was not used" not in sentence(cost)


def test_candidates_that_did_not_pass_are_told(tuned):
    results = results_of(tuned)
    for refused in (0, 2):
        candidates = refused * [results.chosen] + [results.chosen]
        told = f"{refused} candidates that learned more did not pass the confirmation"
        assert (told in sentence(replace(results, candidates=candidates))) == bool(refused)


def test_answers_that_loop_are_told(tuned):
    results = results_of(tuned)
    answers = [replace(answer, before="", after="") for answer in results.answers]
    assert "in a loop" not in sentence(replace(results, answers=answers))
    answers[0].after = 30 * "and so on, "
    assert "1 of the tuned model ends in a loop" in sentence(replace(results, answers=answers))


def test_the_report_shows_text_as_text(tuned):
    page = (tuned / "report.html").read_text()
    assert results_of(tuned).sentence.partition(" (change")[0] in page
    assert HOSTILE not in page
    assert HOSTILE.replace("<", "&lt;").replace(">", "&gt;") in page
    assert (tuned / "front.png").stat().st_size > 10_000
    assert "\n# tuned\n" in (tuned / "README.md").read_text()


def test_again_changes_nothing_and_other_settings_are_refused(tuned, model_dir, inputs, capsys):
    before = {path: path.stat().st_mtime_ns for path in tuned.iterdir() if path.is_file()}
    del before[tuned / "tune.json"], before[tuned / "_lock"]
    assert cli.main(flags_of(model_dir, inputs, tuned, "--keep_checkpoints")) == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert cli.main(flags_of(model_dir, inputs, tuned, drift="0.06")) == 2
    assert "holds another run: settings changed since" in capsys.readouterr().err


def test_no_model_within_the_budget(model_dir, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune_module, "run_train", train_here)
    out = tmp_path / "none"
    still = ["--learning_rate", "1e-20", "--early_stopping_patience", "1"]
    assert cli.main(flags_of(model_dir, inputs, out, "--strict", *still, drift="1e-9")) == 3
    said = capsys.readouterr().out
    assert "No model within the budget (a drift of 1e-09 nats per token)" in said
    results = results_of(out)
    assert results.stopped_early.startswith("Training stopped early, after 4 of 8 steps")
    assert results.stopped_early in said
    assert results.stopped_early in (out / "report.html").read_text()
    assert {point.step for point in results.screened} == {2, 4}
    assert (results.status, results.chosen, results.answers) == ("none", None, [])
    assert not list(out.glob("**/*.safetensors"))
    assert "No model within the budget" in (out / "report.html").read_text()


def test_lora_and_held_out_rows_of_a_file(model_dir, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(tune_module, "run_train", train_here)
    out, held_out = tmp_path / "lora", tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in make_rows(64)[44:]))
    flags = ["--use_peft", "--lora_r", 4, "--learning_rate", "3e-2", "--held_out", held_out]
    assert cli.main(flags_of(model_dir, inputs, out, *flags)) == 0
    results = results_of(out)
    assert results.data.left_out == 4
    assert results.data.screening_rows == results.data.confirmation_rows == 8
    assert results.data.training_rows == 51
    assert not list((out / "work").glob("**/*.safetensors"))  # deleted at the end
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["lora_alpha"] == pytest.approx(32 * results.chosen.share)
    assert not (out / "model.safetensors").exists()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), out)
    assert drift_of(out, model_dir, inputs) == pytest.approx(results.chosen.drift, rel=1e-4)
    assert np.isfinite([p.nll for p in results.screened]).all()


def test_a_model_with_code_of_its_own(model_dir, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(tune_module, "run_train", train_here)
    own = shutil.copytree(model_dir, tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    places = {"AutoConfig": "own_config.Own", "AutoModelForCausalLM": "own_model.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": places}
    (own / "config.json").write_text(json.dumps(config))
    (own / "own_config.py").write_text(
        "from transformers import LlamaConfig\nclass Own(LlamaConfig):\n    model_type = 'own'\n"
    )
    (own / "own_model.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .own_config import Own\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = Own\n"
    )
    assert cli.main(flags_of(own, inputs, tmp_path / "out", "--trust_remote_code", "true")) == 0
    assert (tmp_path / "out" / "own_model.py").is_file()


def test_training_in_two_processes_under_fsdp2_gives_the_same_folder(
    tuned, model_dir, inputs, tmp_path, monkeypatch
):
    """As `eaft train` starts them: with `--accelerate_config`, or one on each GPU."""
    whole = {**FSDP2["fsdp_config"], "fsdp_state_dict_type": "FULL_STATE_DICT"}
    config = {**FSDP2, "fsdp_config": whole}

    def train_launched(arguments, folder):
        launch(tmp_path, config, fsdp_on_cpu.main, "train", *arguments)
        return 0

    monkeypatch.setattr(tune_module, "run_train", train_launched)
    out, batch = tmp_path / "two", ["--per_device_train_batch_size", 4]
    assert cli.main(flags_of(model_dir, inputs, out, "--keep_checkpoints", *batch)) == 0
    one, two = results_of(tuned), results_of(out)
    assert {p.step for p in two.screened if p.share == 1} == {2, 4, 6, 8}
    # The epoch's last batch, step 5, has 3 rows, which two ranks fill up with others
    for name in ("nll", "drift"):
        early = [
            {p.step: getattr(p, name) for p in r.screened if p.share == 1 and p.step < 5}
            for r in (one, two)
        ]
        assert early[1] == pytest.approx(early[0], rel=1e-3)
    assert two.chosen.drift <= 0.05
    assert {path.name for path in out.iterdir()} == {path.name for path in tuned.iterdir()}
    assert drift_of(out, model_dir, inputs) == pytest.approx(two.chosen.drift, rel=1e-4)


def test_a_launcher_is_told_to_go_into_the_flags(model_dir, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(flags_of(model_dir, inputs, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert "start it without a launcher, and give it the launcher's flags" in said
    assert not (tmp_path / "out").exists()


def test_a_drop_of_tasks_is_the_budget(model_dir, inputs, tmp_path, task_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tune_module, "run_train", train_here)
    tasks = ["--suite", "tiny", "--include_path", task_path, "--max_drop"]
    out = tmp_path / "a"
    assert cli.main(flags_of(model_dir, inputs, out, *tasks, 100, drift=None)) == 0
    results = results_of(out)
    assert (results.budget.max_drift, results.budget.max_drop) == (None, 100)
    (task,) = results.chosen.tasks
    # As `eaft eval` scores the two models
    model, base = comparable_models(str(out), str(model_dir), Protocol(), True)
    _, benchmarks = load_suites(["tiny"], task_path)
    scores = [np.mean([i.score for i in m.items(benchmarks["tiny"])]) for m in (base, model)]
    assert (task.items, task.base, task.tuned) == (6, *map(pytest.approx, scores))
    assert task.drop == pytest.approx(100 * (task.base - task.tuned))
    assert task.drop <= task.bound
    assert (task.within, task.shown, results.status) == (True, False, "within")  # six items only
    # No drift is too large: the first candidate is the lowest nll of all
    assert results.chosen.step == results.unconstrained.step
    assert results.unconstrained.cost == 0
    assert f"tiny changed by {-task.drop:+.1f} points" in results.sentence
    assert cli.main(flags_of(model_dir, inputs, tmp_path / "b", *tasks, 1, "--strict")) == 3
    assert results_of(tmp_path / "b").chosen is None


def test_a_training_that_fails_is_told(model_dir, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune_module, "run_train", lambda arguments, folder: 2)
    out = tmp_path / "failed"
    assert cli.main(flags_of(model_dir, inputs, out)) == 2
    assert "training ended with exit code 2; its message is above" in capsys.readouterr().err
    assert not list(out.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--max_drift", "-1"], "--max_drift: expected greater than 0, got -1.0"),
        (["--max_drop", "2"], "--max_drop and --suite go together"),
        (["--suite", "everyday"], "--max_drop and --suite go together"),
        (["--screening_prompts", "1"], "--screening_prompts=1: how sure a mean is takes 2"),
        (["--held_out", "none.jsonl"], "--held_out: none.jsonl: there is no such file"),
        (["--push_to_hub"], "--push_to_hub does not go with eaft tune"),
        (["--save_only_model"], "--save_only_model does not go with eaft tune"),
        (["--resume_from_checkpoint", "true"], "the same command goes on by itself"),
        (["--save_strategy", "no"], "--save_strategy=no: checkpoints are the candidates"),
        (["--use_peft", "--use_dora"], "use_dora=True cannot be interpolated"),
        (["--lerning_rate", "1"], "--lerning_rate is unknown. Did you mean '--learning_rate'"),
        (["--output_dir", "."], "was not made by eaft tune"),
    ],
    ids=str,
)
def test_wrong_inputs_are_one_line(change, says, model_dir, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    assert cli.main(flags_of(model_dir, inputs, tmp_path / "out", *change)) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_model_and_data_come_first(capsys):
    assert cli.main(["tune", "model", "--max_drift", "0.1"]) == 2
    assert "'model': give MODEL and DATA first" in capsys.readouterr().err


def test_a_budget_is_needed(model_dir, inputs, tmp_path, capsys):
    assert cli.main(flags_of(model_dir, inputs, tmp_path / "out", drift=None)) == 2
    assert "A budget is missing" in capsys.readouterr().err
