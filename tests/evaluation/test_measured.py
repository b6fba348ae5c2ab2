"""
What is measured is kept under a digest of all it depends on: read again where nothing changed, and
only there.
"""

import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from eaft import cli, models
from eaft.errors import ConfigurationError
from eaft.evaluation import comparable, identity, measured_model
from eaft.evaluation.comparable import comparable_models
from eaft.evaluation.drift import BaseAnswers
from eaft.evaluation.measured_model import MeasuredModel
from eaft.evaluation.model_settings import load_tokenizer
from eaft.evaluation.protocol import Protocol
from eaft.evaluation.store import Store
from eaft.evaluation.suite import load_suites
from eaft.processes import locked
from tests.conftest import make_model, make_tokenizer
from tests.evaluation.test_evaluate import task_path  # noqa: F401 - a fixture


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """A store of this test's own."""
    monkeypatch.setenv("EAFT_CACHE", str(tmp_path / "kept"))
    return Store()


@pytest.fixture
def folder(model_dir, tmp_path):
    """A copy of the tiny model, to be changed."""
    return shutil.copytree(model_dir, tmp_path / "copy")


@pytest.fixture(autouse=True)
def own_models(tmp_path, monkeypatch):
    """`eaft cache --clear` deletes the models converted from GGUF, too: none of this machine's."""
    monkeypatch.setattr(models, "HF_HOME", tmp_path / "home")


def run(*flags):
    return cli.main(["eval", *map(str, flags)])


def never(*args, **kwargs):
    raise AssertionError("a model was loaded")


def test_nothing_is_loaded_where_all_is_kept(
    model_dir,
    folder,
    task_path,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    flags = [
        "--suite",
        "tiny",
        "copy",
        "--include_path",
        task_path,
        "--drift_prompts",
        2,
        "--max_new_tokens",
        4,
    ]
    assert run(folder, "--base", model_dir, *flags, "--output_path", tmp_path / "one") == 0
    monkeypatch.setattr(measured_model, "load", never)
    # By another path, and as base and tuned model alike: what counts is what is in the files
    assert run(model_dir, "--base", folder, *flags, "--output_path", tmp_path / "two") == 0
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")
    )
    assert one["kept"]["base"] == []
    assert two["kept"]["model"] == ["drift", "tiny", "copy"]
    assert two["kept"]["base"] == ["answers", "tiny", "copy"]
    for name in ("tasks", "drift", "worst"):
        assert one[name] == two[name]
    capsys.readouterr()

    assert cli.main(["cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert str(folder) in lines[0] or str(folder) in lines[1]
    assert cli.main(["cache", "--clear"]) == 0
    assert not Store().folder.exists()
    with pytest.raises(AssertionError, match="a model was loaded"):
        run(model_dir, "--base", folder, *flags, "--output_path", tmp_path / "three")


CHANGES = {
    "weights": lambda d: make_model(1).save_pretrained(d),
    "a setting of the model": lambda d: edit(d / "config.json", "rms_norm_eps", 1e-3),
    "an end token": lambda d: edit(d / "generation_config.json", "eos_token_id", 7),
    "the chat template": lambda d: (d / "chat_template.jinja").write_text(
        "{{ messages[0]['content'] }}"
    ),
    "the vocabulary": lambda d: added_token().save_pretrained(d),
}


def edit(file, name, value):
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))


def added_token():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    return tokenizer


def identity_of(folder, **protocol):
    model = MeasuredModel(
        str(folder), load_tokenizer(str(folder)), Protocol(dtype="float32", **protocol)
    )
    return identity.digest(model._identity)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_model_is_a_new_key(folder, name):
    before = identity_of(folder)
    assert identity_of(folder) == before
    # What a run leaves beside its model is not the model
    (folder / "metrics.jsonl").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / "README.md").write_text("a card")
    load_tokenizer(str(folder))(["a", "bcd"], padding=True)  # leaves its settings in the tokenizer
    assert identity_of(folder) == before
    CHANGES[name](folder)
    assert identity_of(folder) != before


def test_a_file_of_equal_size_and_date_is_read(folder):
    import os

    before, file = identity.weights_digest(str(folder)), folder / "model.safetensors"
    state = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert identity.weights_digest(str(folder)) != before


def test_an_adapter_is_its_base_too(folder, tmp_path):
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_model.safetensors").write_bytes(b"weights")
    (lora / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    before = identity.weights_digest(str(lora))
    make_model(1).save_pretrained(folder)
    assert identity.weights_digest(str(lora)) != before
    (lora / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="holds no weights"):
        identity.weights_digest(str(lora))


def test_a_change_of_task_or_data_is_a_new_key(task_path, tmp_path):  # noqa: F811
    def digest(limit=None, num_fewshot=None):
        benchmark = load_suites(["tiny"], task_path, limit=limit)[1]["tiny"]
        return identity.tasks_digest(benchmark.tasks, benchmark.limit, num_fewshot)

    seen = [digest(), digest(limit=3), digest(num_fewshot=1)]
    assert digest() == seen[0]
    data, task = tmp_path / "questions.jsonl", tmp_path / "tasks" / "tiny.yaml"
    data.write_text(data.read_text().replace("5?", "five?"))
    seen.append(digest())
    assert digest(limit=3) == seen[1]  # the first three are as they were
    task.write_text(task.read_text().replace("{{question}}", "{{question}} "))
    seen.append(digest())
    (tmp_path / "tasks" / "prepare.py").write_text("def rows(rows):\n    return rows\n")
    task.write_text(task.read_text() + "process_docs: !function prepare.rows\n")
    seen.append(digest())
    (tmp_path / "tasks" / "prepare.py").write_text(
        "def rows(rows):\n    return helper(rows)\n\n\ndef helper(rows):\n    return rows\n"
    )
    seen.append(digest())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 2},
        {"seed": 5},
        {"gen_kwargs": "max_gen_toks=2"},
        {"system_instruction": "Be brief."},
        {"dtype": "bfloat16"},
    ],
)
def test_a_change_of_protocol_is_measured_anew(model_dir, task_path, change):  # noqa: F811
    benchmark = load_suites(["tiny"], task_path)[1]["tiny"]
    for again, protocol in ((False, {}), (True, {}), (False, change)):
        model, _ = comparable_models(
            str(model_dir), None, Protocol(**{"apply_chat_template": True, **protocol}), True
        )
        model.items(benchmark)
        assert bool(model.kept) == again


def test_another_version_measures_anew(model_dir, monkeypatch):
    before = identity_of(model_dir)
    monkeypatch.setattr(identity, "versions", lambda names: dict.fromkeys(names, "0.0"))
    assert identity_of(model_dir) != before


def test_answers_are_kept_apart_from_what_computes_their_probabilities(model_dir, monkeypatch):
    """
    So that training finds what `eaft eval --record` sampled in another precision, on another
    device.
    """
    prompts = ["say a", [{"role": "user", "content": "say b"}]]
    model, _ = comparable_models(str(model_dir), None, Protocol(max_new_tokens=4), True)
    assert model.find_sampled(prompts) is None
    answers = model.sampled(prompts)
    monkeypatch.setattr(identity, "versions", lambda names: dict.fromkeys(names, "0.0"))
    again, _ = comparable_models(
        str(model_dir), None, Protocol(max_new_tokens=4, dtype="bfloat16"), True
    )
    assert again.find_sampled(prompts) == answers
    assert model.find_sampled(prompts[:1]) is None


def test_nll_is_the_definition(model_dir):
    """Only of labelled tokens, which need not follow one another; the first token is nobody's."""
    model, _ = comparable_models(str(model_dir), None, Protocol(), True)
    tokenizer = load_tokenizer(str(model_dir))
    ids = [tokenizer(text)["input_ids"] for text in ("one is two", "a", "three is four")]
    ids[1] = [5, 6]
    labelled = [{0, 3, 4, 8}, {0, 1}, {1, 12}]
    rows = [
        {
            "input_ids": row,
            "labels": [token if t in places else -100 for t, token in enumerate(row)],
        }
        for row, places in zip(ids, labelled, strict=True)
    ]
    sums, counts = model.nll(rows)
    torch_model = AutoModelForCausalLM.from_pretrained(model_dir).double().eval()
    for row, places, total, count in zip(ids, labelled, sums, counts, strict=True):
        with torch.no_grad():
            log_probs = torch_model(torch.tensor([row])).logits[0].log_softmax(-1)
        expected = -sum(log_probs[t - 1, row[t]].item() for t in places if t)
        assert (total, count) == (pytest.approx(expected, rel=1e-5), len(places - {0}))
    assert model.nll(rows)[0].tolist() == sums.tolist()
    assert model.kept == ["nll"]
    other, _ = comparable_models(str(model_dir), None, Protocol(), True)
    other.nll(
        [{**row, "labels": row["input_ids"]} for row in rows]
    )  # other labels are measured anew
    assert other.kept == []


def test_a_task_that_fails_does_not_take_the_others_along(
    model_dir,
    folder,
    task_path,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    flags = [
        folder,
        "--base",
        model_dir,
        "--suite",
        "tiny",
        "copy",
        "--include_path",
        task_path,
        "--drift_prompts",
        0,
    ]
    flags += ["--output_path", tmp_path / "out"]
    score = measured_model.score

    def fail(lm, benchmark, *args):
        if benchmark.name == "tiny":
            raise RuntimeError("CUDA out of memory")
        return score(lm, benchmark, *args)

    monkeypatch.setattr(measured_model, "score", fail)
    assert run(*flags) == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["failed"] == {"tiny": "RuntimeError: CUDA out of memory"}
    assert list(results["tasks"]) == ["copy"]
    assert "CUDA out of memory" in (tmp_path / "out" / "results.md").read_text()
    # Started again, it does what is missing, and only that
    monkeypatch.setattr(
        measured_model,
        "score",
        lambda lm, benchmark, *args: (
            score(lm, benchmark, *args) if benchmark.name == "tiny" else never()
        ),
    )
    assert run(*flags) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["tasks"]) == ["tiny", "copy"]
    assert results["failed"] == {}
    assert run(*flags) == 2  # it is complete


def test_a_folder_in_use_or_with_something_else(model_dir, task_path, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    flags = [model_dir, "--include_path", task_path, "--output_path", out, "--suite"]
    with locked(out):
        assert run(*flags, "tiny") == 2
        assert "is in use: another eaft process writes there" in capsys.readouterr().err
    (out / "inputs.json").write_text(json.dumps({"model": "other"}))
    assert run(*flags, "tiny") == 2
    assert "holds another evaluation (model, " in capsys.readouterr().err
    (out / "inputs.json").unlink()
    assert run(*flags, "tiny") == 0


def test_no_chat_template(folder, task_path, tmp_path):  # noqa: F811
    """The built-in prompts are messages: a base model without a template is asked in plain text."""
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = None
    shutil.rmtree(folder)
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    out = tmp_path / "out"
    flags = [
        folder,
        "--base",
        folder,
        "--suite",
        "tiny",
        "--include_path",
        task_path,
        "--max_new_tokens",
        4,
    ]
    assert run(*flags, "--drift_prompts", 3, "--output_path", out) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["protocol"]["apply_chat_template"] is False
    assert "plain text" in (out / "results.md").read_text()
    answers = json.loads((out / "answers.json").read_text())
    assert answers[0]["prompt"] == "Explain in two sentences why the sky is blue."


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_new_tokens", 256], "max_new_tokens=256: with the longest prompt for drift"),
        (["--drift_prompts", 0, "--max_drift", 0.1], "--max_drift 0.1 needs drift"),
        (["--max_drop", -1], "--max_drop: expected greater than or equal to 0, got -1.0"),
        (["--max_drift", "nan"], "--max_drift: expected a finite number, got nan"),
    ],
)
def test_what_can_be_known_before_is_said_before(
    model_dir,
    task_path,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
    flags,
    message,
):
    monkeypatch.setattr(measured_model, "load", never)
    common = [model_dir, "--base", model_dir, "--suite", "tiny", "--include_path", task_path]
    assert run(*common, "--output_path", tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["matplotlib", "tabulate", "scipy"])
def test_a_missing_package_is_said_before(model_dir, tmp_path, monkeypatch, capsys, package):
    monkeypatch.setattr(
        "eaft.evaluation.folder.find_spec",
        lambda name: None if name == package else find_spec(name),
    )
    assert run(model_dir, "--suite", "everyday", "--output_path", tmp_path / "out") == 2
    assert f"Evaluating needs {package}: pip install 'eaft[eval]'" in capsys.readouterr().err


def test_a_full_disk_is_said_before(model_dir, task_path, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(
        comparable.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 2**10)
    )
    flags = [model_dir, "--base", model_dir, "--suite", "tiny", "--include_path", task_path]
    assert run(*flags, "--output_path", tmp_path / "out", "--drift_prompts", 2) == 2
    assert "lower --drift_prompts, or set EAFT_CACHE" in capsys.readouterr().err


def test_half_a_measurement_is_none(store, model_dir):
    def stopped():
        with store.write({"a": 1}, "model") as staging:
            (staging / "items.jsonl").write_text("[]")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert store.find({"a": 1}) is None
    assert store.sizes() == {}
    with store.write({"a": 1}, "model") as staging:
        (staging / "items.jsonl").write_text("[]")
    assert store.find({"a": 1}) is not None
    with store.write({"a": 1}, "model") as staging:  # another process was first
        (staging / "items.jsonl").write_text("[1]")
    assert (store.find({"a": 1}) / "items.jsonl").read_text() == "[]"
    assert list(store.sizes()) == ["model"]


def test_drift_depends_on_the_bases_probabilities(model_dir, folder):
    make_model(1).save_pretrained(folder)
    tuned, base = comparable_models(str(folder), str(model_dir), Protocol(max_new_tokens=4), True)
    answers = base.answers(["say a", "say b"])
    first = tuned.drift(answers)[0]
    assert tuned.drift(answers)[0].tolist() == first.tolist()
    assert tuned.kept == ["drift"]
    moved = BaseAnswers.record(make_model(2).eval(), answers.answers)
    assert not np.allclose(tuned.drift(moved)[0], first)


def test_a_template_that_writes_the_day_is_another_question_tomorrow(monkeypatch):
    """
    Else a base model kept from yesterday is not asked what the tuned one is asked today, and all is
    refused.
    """
    from transformers.utils import chat_template_utils

    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d') }} {{ messages[0]['content'] }}"
    digests = []
    for day in (1, 1, 2):

        class Day(chat_template_utils.datetime):
            @classmethod
            def now(cls, day=day):
                return cls(2026, 1, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Day)
        chat_template_utils._compile_jinja_template.cache_clear()
        digests.append(identity.tokenizer_digest(tokenizer))
    assert digests[0] == digests[1] != digests[2]


def test_clearing_leaves_what_is_not_ours(store):
    mine = store.folder / "thesis"
    mine.mkdir(parents=True)
    (mine / "chapter.txt").write_text("the only copy")
    with store.write({"a": 1}, "model") as staging:
        (staging / "items.jsonl").write_text("[]")
    (store.folder / "writing-killed").mkdir()
    assert list(store.sizes()) == ["model", "unfinished"]
    assert cli.main(["cache", "--clear"]) == 0
    assert [path.name for path in store.folder.iterdir()] == ["thesis"]
    assert (mine / "chapter.txt").exists()


def test_sampled_answers_are_to_the_prompts_as_they_are_asked(folder):
    (folder / "chat_template.jinja").write_text("{{ effort }} {{ messages[0]['content'] }}")

    def model(batch_size, **settings):
        args = {"chat_template_args": settings}
        protocol = Protocol(max_new_tokens=4, batch_size=batch_size, model_args=args)
        return comparable_models(str(folder), None, protocol, True)[0]

    answers = model(8, effort="low").sampled(["say a"])
    assert model(1, effort="low").find_sampled(["say a"]) == answers
    assert model(8, effort="high").find_sampled(["say a"]) is None


def test_drift_beside_vllm_is_of_the_same_revision(model_dir, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        measured_model,
        "load",
        lambda model, tokenizer, protocol: loaded.append(protocol.model_args),
    )
    args = {"revision": "v1", "gpu_memory_utilization": 0.5}
    protocol = Protocol(backend="vllm", model_args=args)
    model = MeasuredModel(str(model_dir), load_tokenizer(str(model_dir)), protocol)
    model._load("vllm")
    model._load("hf")
    assert loaded == [args, {"revision": "v1"}]


def test_record_refuses_what_it_would_ignore(model_dir, capsys):
    assert run(model_dir, "--record", "--base", model_dir) == 2
    assert "leave --base, --suite and --held_out out" in capsys.readouterr().err


def test_thinking_is_set_in_one_place(model_dir):
    for args in ({"enable_thinking": True}, {"chat_template_args": {"enable_thinking": True}}):
        with pytest.raises(ConfigurationError, match="enable_thinking is a setting of its own"):
            comparable_models(str(model_dir), None, Protocol(model_args=args), False)
