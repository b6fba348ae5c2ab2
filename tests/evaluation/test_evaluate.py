"""
`eaft eval`: lm-eval's scores, paired; a model beside itself, and beside one with a damaged head;
bad input.
"""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from eaft import cli
from eaft.errors import ConfigurationError
from eaft.evaluation import evaluate
from eaft.evaluation.changes import compare_items
from eaft.evaluation.lm_eval_models import load, vllm_args
from eaft.evaluation.model_settings import load_tokenizer, own_dtype
from eaft.evaluation.pairs import pair, worst_regressions
from eaft.evaluation.protocol import Protocol
from eaft.evaluation.results import Item, Results, as_json
from eaft.evaluation.scores import score
from eaft.evaluation.suite import Suite, load_suites, suites_help, task_manager
from eaft.files import read_json
from tests.conftest import make_model
from tests.processes import eaft, run_ranks

SCHEMA = Path(evaluate.__file__).with_name("results.schema.json")


@pytest.fixture
def task_path(tmp_path):
    """
    A folder with `tiny`, six questions of two choices, and `copy`, four to be answered in words.
    """
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"{i}?", "choices": ["a", "bb"], "answer": i % 2} for i in range(6)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (
        "dataset_path: json\ndataset_kwargs: {data_files: {test:"
        f" {tmp_path}/questions.jsonl}}}}\ntest_split: test\n"
    )
    (folder / "tiny.yaml").write_text(
        f'task: tiny\n{data}output_type: multiple_choice\ndoc_to_text: "{{{{question}}}}"\n'
        'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / "copy.yaml").write_text(
        f'task: copy\n{data}output_type: generate_until\ndoc_to_text: "{{{{question}}}}"\n'
        'doc_to_target: "{{question}}"\ngeneration_kwargs: {max_gen_toks: 4, until: [zzz]}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    return str(folder)


@pytest.fixture
def damaged_dir(model_dir, tmp_path):
    """The tiny model with its head turned upside down."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
    model.save_pretrained(tmp_path / "damaged")
    load_tokenizer(str(model_dir)).save_pretrained(tmp_path / "damaged")
    return tmp_path / "damaged"


def measured(model_dir, task_path, names=("tiny",), limit=None):
    _, benchmarks = load_suites(list(names), task_path, limit=limit)
    protocol = Protocol(apply_chat_template=False, batch_size=4)
    lm = load(str(model_dir), load_tokenizer(str(model_dir)), protocol)
    return {name: score(lm, benchmark, protocol) for name, benchmark in benchmarks.items()}


def test_scores_are_lm_evals(model_dir, task_path):
    items = measured(model_dir, task_path)["tiny"]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_dir),
        load_tokenizer(str(model_dir)),
    )
    # By hand: which of the two continuations has the larger log-likelihood?
    for i, item in enumerate(items):
        prompt = tokenizer(f"{i}?")["input_ids"]
        likelihoods = []
        for choice in (" a", " bb"):
            ids = prompt + tokenizer(choice)["input_ids"]
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            likelihoods.append(
                sum(log_probs[t, ids[t + 1]].item() for t in range(len(prompt) - 1, len(ids) - 1))
            )
        best = int(likelihoods[1] > likelihoods[0])
        assert item.choices == pytest.approx(likelihoods, abs=1e-4)
        assert (item.score, item.response) == (float(best == i % 2), ["a", "bb"][best])
        assert (item.prompt, item.target, item.doc_id) == (f"{i}?", i % 2, i)


def test_a_generated_answer_is_an_item(model_dir, task_path):
    items = measured(model_dir, task_path, ["copy"])["copy"]
    assert len(items) == 6
    assert all(isinstance(item.response, str) and item.choices is None for item in items)


def run(*flags):
    return cli.main(["eval", *map(str, flags)])


def test_a_model_beside_itself(model_dir, task_path, tmp_path, capsys):
    out = tmp_path / "out"
    flags = [model_dir, "--base", model_dir, "--suite", "tiny", "copy", "--include_path", task_path]
    flags += ["--drift_prompts", 3, "--max_new_tokens", 6, "--output_path", out]
    assert run(*flags) == 0
    results = json.loads((out / "results.json").read_text())
    for change in results["tasks"].values():
        assert (change["change"], change["p_value"], change["lost"], change["gained"]) == (
            0,
            1,
            0,
            0,
        )
    assert results["drift"]["mean"] == 0
    assert len(results["drift"]["per_prompt"]) == 3
    assert results["worst"] == []
    assert results["protocol"]["apply_chat_template"] is True
    jsonschema.validate(results, json.loads(SCHEMA.read_text()))
    assert as_json(read_json(out / "results.json", Results, "")) == results
    markdown = (out / "results.md").read_text()
    assert markdown in capsys.readouterr().out
    assert "| tiny " in markdown
    assert (out / "changes.png").read_bytes().startswith(b"\x89PNG")
    before, after = (
        (out / f"items_{side}" / "tiny.jsonl").read_text() for side in ("before", "after")
    )
    assert before == after
    assert (out / "answers.json").is_file()
    assert not (out / "log_probs").exists()

    assert run(*flags) == 2  # nothing is overwritten
    assert "holds results" in capsys.readouterr().err


def test_a_damaged_head_is_found(model_dir, damaged_dir, tmp_path):
    """
    Questions whose answers the base model decided itself: it has them all, the damaged model loses
    them.
    """
    base, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_dir),
        load_tokenizer(str(model_dir)),
    )
    choices = ["a", "b", "c", "d"]
    letters = [tokenizer(choice)["input_ids"][0] for choice in choices]
    with (tmp_path / "own.jsonl").open("w") as file:
        for i in range(60):
            with torch.no_grad():
                logits = base(torch.tensor([tokenizer(f"{i}? ")["input_ids"]])).logits[0, -1]
            row = {
                "question": f"{i}?",
                "choices": choices,
                "answer": logits[letters].argmax().item(),
            }
            file.write(json.dumps(row) + "\n")
    task = tmp_path / "own.yaml"
    task.write_text(
        "task: own\ndataset_path: json\ndataset_kwargs: {data_files: {test:"
        f" {tmp_path}/own.jsonl}}}}\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text:"
        ' "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\nmetric_list:'
        " [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    out = tmp_path / "out"
    flags = [
        damaged_dir,
        "--base",
        model_dir,
        "--suite",
        task,
        "--output_path",
        out,
        "--no-apply_chat_template",
    ]
    assert run(*flags, "--drift_prompts", 32, "--max_new_tokens", 8) == 0
    results = json.loads((out / "results.json").read_text())
    change = results["tasks"][str(task)]
    assert change["before"] == 1
    assert change["high"] < 0
    assert change["p_value"] < 1e-6
    assert change["lost"] >= 30
    assert (
        0
        < change["lost_beyond_chance"]["low"]
        <= change["lost_beyond_chance"]["estimate"]
        <= 60 * 4 / 3
    )
    assert results["drift"]["mean"] > 0.1
    assert len(results["worst"]) == 20
    for item in results["worst"]:
        assert item["before"]["score"] == 1 > item["after"]["score"] == 0
        assert item["before"]["response"] != item["after"]["response"]
    assert "Worst regressions (20)" in (out / "results.md").read_text()


def test_one_dtype_for_both(model_dir, task_path, tmp_path):
    """Weights that differ in nothing but the dtype they were saved in have changed nothing."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).to(torch.bfloat16)
    for name, dtype in (("narrow", torch.bfloat16), ("wide", torch.float32)):
        model.to(dtype).save_pretrained(tmp_path / name)
        load_tokenizer(str(model_dir)).save_pretrained(tmp_path / name)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": f"{tmp_path}/wide"})
    )
    assert own_dtype(str(tmp_path / "narrow")) == "bfloat16"
    assert own_dtype(str(tmp_path / "lora")) == "float32"
    flags = [
        tmp_path / "wide",
        "--base",
        tmp_path / "narrow",
        "--suite",
        "copy",
        "--include_path",
        task_path,
    ]
    assert run(*flags, "--drift_prompts", 2, "--output_path", tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["drift"]["mean"] == 0
    assert results["protocol"]["dtype"] == "bfloat16"


def test_answers_are_cut_to_the_context(model_dir, task_path, caplog):
    file = Path(task_path) / "copy.yaml"
    file.write_text(file.read_text().replace("max_gen_toks: 4", "max_gen_toks: 32768"))
    assert len(measured(model_dir, task_path, ["copy"], limit=1)["copy"]) == 1
    assert (
        "copy: answers are cut at 192 tokens instead of 32768" in caplog.text
    )  # of a context of 256


def test_an_item_is_never_its_own_example(model_dir, tmp_path):
    rows = [{"question": f"number {i}?", "answer": f"#### {i}"} for i in range(6)]
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, benchmarks = load_suites(["gsm8k"], data_dir=str(tmp_path))
    protocol = Protocol(
        apply_chat_template=False, num_fewshot=3, gen_kwargs="max_gen_toks=1", batch_size=4
    )
    items = score(
        load(str(model_dir), load_tokenizer(str(model_dir)), protocol),
        benchmarks["gsm8k"],
        protocol,
    )
    for i, item in enumerate(items):
        assert item.prompt.count("number") == 4
        assert item.prompt.count(f"number {i}?") == 1


def test_an_adapter_and_no_base(model_dir, task_path, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(
        tmp_path / "lora"
    )
    common = ["--suite", "tiny", "--include_path", task_path]
    out = tmp_path / "out"
    drift = ["--drift_prompts", 2, "--max_new_tokens", 8]
    assert run(tmp_path / "lora", "--base", model_dir, *common, *drift, "--output_path", out) == 0
    assert json.loads((out / "results.json").read_text())["drift"]["mean"] > 1e-4
    assert run(model_dir, *common, "--limit", 4, "--output_path", tmp_path / "alone") == 0
    results = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert results["tasks"]["tiny"]["n"] == 4
    assert (
        results["tasks"]["tiny"]["low"]
        < results["tasks"]["tiny"]["score"]
        < results["tasks"]["tiny"]["high"]
    )
    jsonschema.validate(results, json.loads(SCHEMA.read_text()))
    assert as_json(read_json(tmp_path / "alone" / "results.json", Results, "")) == results
    assert "score %" in (tmp_path / "alone" / "results.md").read_text()


def test_two_processes_find_what_one_finds(model_dir, task_path, tmp_path):
    flags = [model_dir, "--base", model_dir, "--suite", "tiny", "copy", "--include_path", task_path]
    flags += ["--drift_prompts", "2", "--max_new_tokens", "4"]
    assert run(*flags, "--output_path", tmp_path / "one") == 0
    run_ranks(eaft, "eval", *flags, "--output_path", tmp_path / "two")
    for name in ("tiny", "copy"):
        one, two = (
            [
                json.loads(line)
                for line in (
                    (tmp_path / run / "items_after" / f"{name}.jsonl").read_text().splitlines()
                )
            ]
            for run in ("one", "two")
        )
        assert [(i["doc_id"], i["score"], i["response"]) for i in one] == [
            (i["doc_id"], i["score"], i["response"]) for i in two
        ]
    assert json.loads((tmp_path / "two" / "results.json").read_text())["drift"]["mean"] == 0


def test_another_vocabulary(model_dir, task_path, tmp_path, capsys):
    tokenizer = load_tokenizer(str(model_dir))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "other")
    make_model(1).save_pretrained(tmp_path / "other")
    flags = [
        tmp_path / "other",
        "--base",
        model_dir,
        "--suite",
        "tiny",
        "--include_path",
        task_path,
    ]
    assert run(*flags, "--output_path", tmp_path / "out") == 2
    assert "different vocabularies (260 and 259 tokens)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(*flags, "--output_path", tmp_path / "out", "--drift_prompts", 0) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["drift"] is None


def test_items_of_other_prompts_are_not_compared(model_dir, task_path):
    items = measured(model_dir, task_path)
    other = {"tiny": [replace(item, prompt_hash="x") for item in items["tiny"]]}
    with pytest.raises(ConfigurationError, match="tiny: the two models were not asked the same"):
        pair("tiny", items["tiny"], other["tiny"])
    with pytest.raises(ConfigurationError, match="not asked the same"):
        compare_items(items, {"tiny": items["tiny"][:-1]}, [])


def test_worst_regressions_take_benchmarks_in_turn():
    def item(name, doc_id, score, right):
        choices = None if right is None else [right, 0.0]
        asked = dict.fromkeys(("prompt", "prompt_hash", "target_hash", "doc_hash"), "")
        return Item(
            **asked,
            task=name,
            doc_id=doc_id,
            metric="acc,none",
            target=0,
            response="",
            score=score,
            cut=[],
            choices=choices,
        )

    base = {
        "a": [item("a", i, 1.0, 1.0) for i in range(30)],
        "b": [item("b", i, 1.0, None) for i in range(2)],
    }
    tuned = {
        "a": [item("a", i, 0.0, -float(i)) for i in range(30)],
        "b": [item("b", 0, 1.0, None), item("b", 1, 0.0, None)],
    }
    worst = worst_regressions(base, tuned)
    assert [(w.benchmark, w.doc_id) for w in worst[:4]] == [
        ("a", 29),
        ("b", 1),
        ("a", 28),
        ("a", 27),
    ]
    assert len(worst) == 20


def test_suites(task_path, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("suite: mine\ntasks: [tiny, copy]\nlimit: 3\n")
    suites, benchmarks = load_suites([str(mine)], task_path)
    assert suites == [Suite("mine", ["tiny", "copy"])]
    assert [b.limit for b in benchmarks.values()] == [3, 3]
    # The same task in two suites is measured once
    suites, benchmarks = load_suites([str(mine), "tiny"], task_path, limit=2)
    assert [s.benchmarks for s in suites] == [["tiny", "copy"], ["tiny"]]
    assert [b.limit for b in benchmarks.values()] == [2, 2]
    with pytest.raises(ConfigurationError, match="tiny is in two suites with different limits"):
        load_suites([str(mine), "tiny"], task_path)
    mine.write_text("suite: mine\ntask: [tiny]\n")
    with pytest.raises(ConfigurationError, match="'task' is unknown"):
        load_suites([str(mine)], task_path)
    other = tmp_path / "tiny.yaml"
    other.write_text("task: other")
    with pytest.raises(ConfigurationError, match=r"tiny and .*tiny\.yaml would write to one file"):
        load_suites(["tiny", str(other)], task_path)
    mine.write_text("group: mine\ntask: [tiny]")
    with pytest.raises(
        ConfigurationError,
        match="is a group's file: give its folder as include_path, and name 'mine'",
    ):
        load_suites([str(mine)], task_path)
    for name in ("general", "math", "medical", "agent", "quick"):
        assert name in suites_help()


def test_local_data(tmp_path):
    """A benchmark's rows from a folder, in the forms the README promises."""
    question = {"question": "1+1?", "choices": ["1", "2", "3", "4"], "answer": 1}
    files = {
        "gsm8k_test": [{"question": "q", "answer": "#### 1"}] * 2,
        "gsm8k_train": [{"question": "t", "answer": "#### 2"}] * 6,
        "mmlu_stem": [{**question, "type": "astronomy"}, {**question, "type": "college_physics"}],
        "pubmedqa_labeled": [{"question": "q", "contexts": ["c", "d"], "answer": "yes"}],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, found = load_suites(["gsm8k", "mmlu_astronomy", "pubmedqa"], data_dir=str(tmp_path))
    assert [len(b.tasks[name].eval_docs) for name, b in found.items()] == [2, 1, 1]
    pubmedqa = found["pubmedqa"].tasks["pubmedqa"]
    assert pubmedqa.doc_to_text(pubmedqa.eval_docs[0]) == "Abstract: c\nd\nQuestion: q\nAnswer:"
    with pytest.raises(ConfigurationError) as error:
        load_suites(["mmlu_stem", "medmcqa"], data_dir=str(tmp_path))
    assert "mmlu_stem: mmlu_abstract_algebra: no row with type 'abstract_algebra'" in str(
        error.value
    )
    assert (
        "medmcqa needs the data set openlifescienceai/medmcqa from the Hub, or medmcqa.jsonl in"
        f" {tmp_path}" in str(error.value)
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite", "medicla"], "no suite and no lm-eval task 'medicla'. Did you mean 'medical'"),
        (
            ["--suite", "tiny", "--include_path", "nowhere"],
            "include_path='nowhere': there is no such folder",
        ),
        (
            ["--suite", "everyday", "--data_dir", "nowhere"],
            "data_dir='nowhere': there is no such folder",
        ),
        (["--suite", "none.yaml"], "suite 'none.yaml': there is no such file"),
        (["--suite", "everyday", "--base", "./none"], "'./none': there is no such folder"),
        (
            ["--suite", "everyday", "--backend", "vllm"],
            "backend='vllm' needs vLLM: pip install vllm",
        ),
    ],
)
def test_bad_flags_are_one_message_and_nothing_written(
    model_dir, tmp_path, capsys, monkeypatch, flags, message
):
    monkeypatch.chdir(tmp_path)
    assert run(model_dir, *flags) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_unknown_task_is_refused():
    with pytest.raises(
        ConfigurationError, match=r"no lm-eval task 'gsm8kk'\. Did you mean 'gsm8k'"
    ):
        task_manager(["gsm8kk"], None)


def test_a_task_without_a_score_is_refused(task_path):
    file = Path(task_path) / "tiny.yaml"
    file.write_text(file.read_text().replace("higher_is_better: true", "higher_is_better: false"))
    with pytest.raises(ConfigurationError, match="tiny: its first metric, acc, is no score"):
        load_suites(["tiny"], task_path)


def test_vllm_runs_an_adapter_on_its_base(tmp_path):
    assert vllm_args("m", "t", {"dtype": "bfloat16"}) == {
        "pretrained": "m",
        "tokenizer": "t",
        "dtype": "bfloat16",
    }
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "base", "r": 32}')
    args = vllm_args(str(tmp_path), "t", {})
    assert (args["pretrained"], args["lora_local_path"], args["max_lora_rank"]) == (
        "base",
        str(tmp_path),
        32,
    )


def test_gsm8k_and_ifeval_agree_with_lm_evals_own_run(model_dir, tmp_path, monkeypatch):
    """
    The same model and rows through lm-eval's own loading of the model, its own metrics and its own
    averages.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from eaft.evaluation import suite

    monkeypatch.setattr(
        suite, "has_sentence_tokenizer", lambda: True
    )  # these instructions do not need it
    gsm8k = [
        {"question": f"{i} and {i}?", "answer": f"<<{i}+{i}={2 * i}>> #### {2 * i}"}
        for i in range(6)
    ]
    ifeval = [
        {"key": i, "prompt": f"Write {i}.", "instruction_id_list": [name], "kwargs": [{}]}
        for i, name in enumerate(["punctuation:no_comma", "change_case:english_lowercase"] * 3)
    ]
    for name, rows in (("gsm8k_test", gsm8k), ("gsm8k_train", gsm8k), ("ifeval", ifeval)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, benchmarks = load_suites(["gsm8k", "ifeval"], data_dir=str(tmp_path))
    settings = {
        "apply_chat_template": True,
        "num_fewshot": 2,
        "gen_kwargs": "max_gen_toks=24",
    }  # 2: gsm8k's sampling
    protocol = Protocol(**settings, batch_size=3)
    lm = load(str(model_dir), load_tokenizer(str(model_dir)), protocol)
    ours = {name: score(lm, benchmark, protocol) for name, benchmark in benchmarks.items()}
    theirs = simple_evaluate(
        "hf",
        {"pretrained": str(model_dir), "device": "cpu"},
        [task for benchmark in benchmarks.values() for task in benchmark.tasks.values()],
        batch_size=3,
        task_manager=TaskManager(include_defaults=False),
        log_samples=True,
        **settings,
    )
    for name, metric in (
        ("gsm8k", "exact_match,strict-match"),
        ("ifeval", "prompt_level_strict_acc,none"),
    ):
        assert ours[name][0].metric == metric
        mean = sum(item.score for item in ours[name]) / len(ours[name])
        assert mean == pytest.approx(theirs["results"][name][metric])
        samples = [s for s in theirs["samples"][name] if s["filter"] == metric.partition(",")[2]]
        assert [item.response for item in ours[name]] == [
            sample["resps"][0][0] for sample in samples
        ]
        assert any(item.response for item in ours[name])
    assert (
        0 < sum(item.score for item in ours["ifeval"]) < 6
    )  # both right and wrong answers were compared
