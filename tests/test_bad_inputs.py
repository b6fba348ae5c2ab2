"""
Inputs that cannot work, over all commands: each ends with exit code 2 and one message, and leaves
nothing behind.

`pytest` says at its end how many were tried. What would begin to train, to score or to measure
counts as accepted.
"""

import copy
import json
import shutil
from pathlib import Path

import pytest
import yaml

from eaft import cli
from eaft.comparison import compare
from eaft.evaluation import evaluate, lm_eval_internals
from eaft.inspection import inspect
from eaft.training import trainer

from .conftest import make_model, make_rows, make_tokenizer

TASK = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
NO_COUNT = ["0", "-1", "1.5", "nan", "many", ""]
NO_WHOLE = ["-1", "1.5", "nan", "many", ""]  # 0 is one
NO_NUMBER = ["-1", "nan", "inf", "many", ""]
NO_POSITIVE = ["0", *NO_NUMBER]
NO_SHARE = ["-0.1", "1", "2", "nan", "half", ""]
NO_FLAG = ["perhaps", "2"]
TRAIN_FLAGS = {
    "learning_rate": NO_NUMBER,
    "weight_decay": NO_NUMBER,
    "max_grad_norm": NO_NUMBER,
    "adam_epsilon": NO_POSITIVE,
    "adam_beta1": NO_SHARE,
    "adam_beta2": NO_SHARE,
    "num_train_epochs": NO_POSITIVE,
    "max_steps": ["0", "-2", "1.5", "many", ""],
    "warmup_steps": NO_NUMBER,
    "per_device_train_batch_size": NO_COUNT,
    "per_device_eval_batch_size": NO_COUNT,
    "gradient_accumulation_steps": NO_COUNT,
    "seed": ["-1", "1.5", "4294967296", "many", ""],
    "data_seed": ["-1", "1.5", "many"],
    "max_length": ["0", "-5", "1.5", "many"],
    "save_total_limit": ["0", "-1", "many"],
    "save_steps": ["0", "-1", "nan", "many"],
    "logging_steps": ["-1", "nan", "many"],
    "dataloader_num_workers": NO_WHOLE,
    "dataset_num_proc": ["0", "-1", "many"],
    "lora_r": ["0", "-1", "1.5", "many"],
    "lora_alpha": ["0", "-1", "1.5", "many"],
    "lora_dropout": NO_SHARE,
    "gate": [
        "",
        "eaf",
        "nosuch:f",
        "own_gates:nosuch",
        "own_gates:",
        ":f",
        "os:getcwd",
        "broken_gates:f",
    ],
    "gate_alpha": ["-1", "nan", "inf", "many"],
    "gate_top_k": ["1", "0", "-3", "1.5", "many"],
    "gate_entropy": ["", "full", "2"],
    "gate_kwargs": ["{", "[1]", "5", '{"nosuch": 1}', '{"alpha": 2}', "text"],
    "replay": ["-0.1", "1", "1.5", "nan", "half"],
    "replay_loss": ["", "KL", "mse", "kl"],
    "forgetting_eval_steps": ["-1", "1.5", "many"],
    "forgetting_budget": ["nan", "-1", "0.1"],
    "select_checkpoint": ["best", "budget", "pareto"],
    "loss_type": ["dft", "huber"],
    "label_smoothing_factor": ["0.1", "-1", "nan"],
    "eos_token": ["nosuch"],
    "chat_template_path": ["nosuch.jinja", "/nosuch"],
    "dataset_train_split": ["nosuch"],
    "resume_from_checkpoint": ["nosuch", "true/"],
    "exclude_examples": ["nosuch.jsonl"],
    "template_date": ["yesterday", "2026-13-01", "29.11.2026"],
    "lr_scheduler_type": ["nosuch", "cosine_with_min_lr", "warmup_stable_decay"],
    "lr_scheduler_kwargs": ['{"nosuch": 1}', "[1]", "5", "text", "{"],
    "optim": ["nosuch", "galore_adamw", "lomo"],
    "optim_args": ["nonsense", "nosuch=1", "betas=1", "lr=nan", "eps=x", "="],
    "save_strategy": ["sometimes"],
    "attn_implementation": ["nosuch"],
    "dtype": ["float12", "int8"],
    "bf16": NO_FLAG,
    "packing": NO_FLAG,
    "use_peft": NO_FLAG,
    "nosuch_flag": ["1"],
}
INSPECT_FLAGS = {
    "rollouts": ["-1", "1.5", "many"],
    "max_new_tokens": ["0", "-1", "many"],
    "rollout_backend": ["nosuch", ""],
    "compare": ["nosuch/folder/x", "/nosuch"],
    **{
        name: TRAIN_FLAGS[name]
        for name in ("gate", "gate_top_k", "gate_entropy", "max_length", "dtype", "seed")
    },
    "nosuch_flag": ["1"],
}
EVAL_FLAGS = {
    "limit": ["0", "-3", "1.5", "many"],
    "max_drop": ["-1", "nan", "many"],
    "max_drift": ["-1", "nan", "many"],
    "num_fewshot": ["-1", "1.5", "many"],
    "max_thinking_tokens": ["-1", "many"],
    "gen_kwargs": [
        *("nonsense", "=1", "nosuch=1", "temperature=", "max_length=9", "num_return_sequences=2"),
        *(f"temperature={value}" for value in ("nan", "-1", "x", "0,do_sample=true")),
        *(f"top_p={value}" for value in ("0", "2", "-1", "nan")),
        *(f"{name}={value}" for name in ("num_beams", "max_gen_toks") for value in NO_COUNT[:5]),
        *(f"repetition_penalty={value}" for value in ("0", "-1", "nan")),
        *("top_k=-1", "min_p=5", "do_sample=perhaps", "until=5", "eos_token_id=x", "max_time=nan"),
    ],
    "seed": ["-1", "4294967296", "many"],
    "batch_size": ["0", "-1", "1.5", "many"],
    "dtype": ["float12", "int8", ""],
    "backend": ["tf", ""],
    "model_args": ["[1]", "{", "5", "text"],
    "drift_prompts": ["-1", "1.5", "many"],
    "max_new_tokens": ["0", "-1", "many"],
    "prompts": ["nosuch.jsonl"],
    "suite": ["nosuch", "", "nosuch.yaml"],
    "data_dir": ["/nosuch"],
    "include_path": ["/nosuch"],
    "tokenizer": ["/nosuch"],
    "base": ["/nosuch", "a/b/c", ""],
    "template_date": ["yesterday", "2026-02-30"],
    "nosuch_flag": ["1"],
}
NO_LIST, NO_MAP = [None, 5, {}, {"a": 1}, True], [None, 5, "x", [], ["sft"], True]
RECIPE_KEYS = {
    "output_dir": [None, 5, [], {}, True, ""],
    "objectives": [
        *NO_MAP,
        {},
        {"sft": None},
        {"sft": 5},
        {"sft": ["gate"]},
        {"s/t": {}},
        {"sft": {"nosuch": 1}},
    ],
    "train": [*NO_MAP, {}, {"model_name_or_path": None}],
    "evaluate": [*NO_MAP, {}],
    "seeds": [*NO_LIST, [], [None], [-1], [1.5], ["x"], [0, 0], [True], 2**40],
    "learning_rates": [
        5,
        {},
        True,
        [],
        [None],
        [0],
        [-1.0],
        [float("nan")],
        [float("inf")],
        ["x"],
        [1e-4, 1e-4],
    ],
    "pairs": [
        5,
        {},
        "sft",
        [["sft"]],
        [["sft", "sft"]],
        [["sft", "nosuch"]],
        [5],
        [["a", "b", "c"]],
    ],
    "keep_checkpoints": [None, 5, "some", []],
    "nosuch": [1],
    "evaluate.target_tasks": [None, 5, "tiny", {}, [], [5], [None], ["nosuch"]],
    "evaluate.general_tasks": [None, 5, "other", {}, [], [5], ["nosuch"]],
    "evaluate.every_checkpoint_tasks": [5, "tiny", {}, [5], ["nosuch"]],
    "evaluate.limit": ["x", -1, 0, 1.5, True, []],
    "evaluate.drift_prompts": ["x", -1, 0, 1, 1.5, None, True, []],
    "evaluate.max_new_tokens": ["x", -1, 0, 1.5, None],
    "evaluate.batch_size": ["x", -1, 0, 1.5, None, True],
    "evaluate.num_fewshot": ["x", -1, 1.5],
    "evaluate.seed": ["x", -1, 1.5, None],
    "evaluate.dtype": ["float12", 5, None, ""],
    "evaluate.backend": ["tf", 5, None],
    "evaluate.model_args": [5, "x", [1], None],
    "evaluate.apply_chat_template": ["perhaps", 2, []],
    "evaluate.gen_kwargs": ["nonsense", 5, []],
    "evaluate.held_out": ["nosuch.jsonl", 5, [], True],
    "evaluate.target_prompts": ["nosuch.jsonl", 5, []],
    "evaluate.general_prompts": ["nosuch.jsonl", 5, None],
    "evaluate.include_path": ["/nosuch", 5],
    "evaluate.template_date": ["yesterday", 5],
    "evaluate.nosuch": [1],
    "train.model_name_or_path": [None, 5, "/nosuch", ""],
    "train.dataset_name": [None, 5, "/nosuch.jsonl", "nosuch.csv"],
    "train.learning_rate": ["x", -1.0, float("nan"), None, [], True],
    "train.max_steps": [None, "x", 1.5, 0, [], True],
    "train.per_device_train_batch_size": [None, 0, -1, 1.5, "x"],
    "objectives.sft.gate": [None, 5, "nosuch", []],
    "train.max_length": ["x", 0, -1, []],
    "train.seed": [1],
    "train.output_dir": ["x"],
    "train.load_best_model_at_end": [True],
    "train.nosuch": [1],
}
MESSAGES = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
GOOD = {"prompt": "a", "completion": "b"}
ROWS = {
    "numbers for texts": [{"prompt": 1, "completion": 2}] * 4,
    "true for a text": [{"prompt": True, "completion": "b"}] * 4,
    "a null completion": [GOOD, {"prompt": "a", "completion": None}],
    "a null prompt": [{"prompt": None, "completion": "b"}, GOOD],
    "a missing completion": [GOOD, {"prompt": "a"}],
    "text and messages": [{"prompt": "a", "completion": MESSAGES[1:]}] * 2,
    "messages and text": [{"prompt": MESSAGES[:1], "completion": "b"}] * 2,
    "rows of two forms": [GOOD, {"messages": MESSAGES}],
    "no column of any form": [{"question": "a", "answer": "b"}] * 2,
    "empty messages": [{"messages": []}] * 2,
    "one row of empty messages": [{"messages": MESSAGES}, {"messages": []}],
    "messages that are text": [{"messages": "x"}] * 2,
    "messages that are a map": [{"messages": MESSAGES[0]}] * 2,
    "messages that are numbers": [{"messages": [1, 2]}] * 2,
    "a null message": [{"messages": [None]}] * 2,
    "a message without a role": [{"messages": [{"content": "x"}]}] * 2,
    "a null role": [{"messages": [{"role": None, "content": "x"}]}] * 2,
    "a role that is a number": [{"messages": [{"role": 5, "content": "x"}]}] * 2,
    "content that is a number": [{"messages": [{"role": "user", "content": 5}]}] * 2,
    "an id beyond the vocabulary": [{"input_ids": [1, 2, 9999], "labels": [1, 2, 9999]}] * 4,
    "an id below 0": [{"input_ids": [1, -2, 3], "labels": [1, 2, 3]}] * 4,
    "a label of -5": [{"input_ids": [1, 2, 3], "labels": [1, 2, -5]}] * 4,
    "a label beyond the vocabulary": [{"input_ids": [1, 2, 3], "labels": [1, 2, 9999]}] * 4,
    "ids that are no integers": [{"input_ids": [1.5, 2.5, 3.5]}] * 4,
    "ids that are text": [{"input_ids": ["1", "2"]}] * 4,
    "ids that are one number": [{"input_ids": 5}] * 4,
    "null ids": [{"input_ids": None}] * 4,
    "no ids": [{"input_ids": [], "labels": []}] * 4,
    "fewer labels than ids": [{"input_ids": [1, 2, 3, 4], "labels": [1, 2]}] * 4,
    "more labels than ids": [{"input_ids": [1, 2], "labels": [1, 2, 3]}] * 4,
    "labels that are text": [{"input_ids": [1, 2], "labels": ["1", "2"]}] * 4,
    "a text that is a number": [{"text": 5}] * 4,
    "a null text": [{"text": "x"}, {"text": None}],
    "a list for a text": [{"text": ["x"]}] * 4,
}
FILES = {
    "Latin-1": '{"prompt": "é", "completion": "ü"}\n'.encode("latin-1"),
    "a cut line": b'{"prompt": "a", "completion": "b"}\n{"pro',
    "no JSON": b"prompt,completion\na,b\n",
    "a number a line": b"1\n2\n",
    "a list a line": b'["a"]\n["b"]\n',
    "null": b"null\n",
    "nothing": b"",
    "blank lines": b"\n\n",
    "bytes": bytes(range(128, 256)),
}
NO_JSON = ['{"a": 1', "[]", "null", "5", '"x"', "", "{}"]
GATES = {
    "raises": "def f(stats): raise RuntimeError('own')",
    "none": "def f(stats): return None",
    "a number": "f = 5",
    "text": "def f(stats): return 'x'",
    "a float": "def f(stats): return 1.0",
    "another shape": "def f(stats): return stats.nll.sum()",
    "negative": "def f(stats): return -stats.prob",
    "nan": "def f(stats): return stats.prob * float('nan')",
    "leaves": "def f(stats): raise SystemExit(0)",
    "no statistics": "def f(): return 1",
    "an unknown name": "def f(stats): return stats.nosuch",
    "leaves when imported": "raise SystemExit(0)",
    "raises when imported": "raise RuntimeError('own')",
    "no Python": "def f(:",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, its tuned version, data and tasks; the folder in which every command is given."""
    folder = tmp_path_factory.mktemp("bad")
    for name, seed in (("model", 0), ("tuned", 1)):
        make_model(seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    for name, rows in (("data", make_rows()), ("held", make_rows(20)[16:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    questions = [{"question": f"{i}?", "choices": ["a", "bb"], "answer": i % 2} for i in range(6)]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    for name in ("tiny", "other"):
        text = f"task: {name}\n{TASK.format(data=folder / 'q.jsonl')}"
        (folder / f"tasks/{name}.yaml").write_text(text)
    return folder


class Accepted(BaseException):
    """What was given would be trained with, scored or measured."""


@pytest.fixture
def attempt(place, monkeypatch, capsys, record_property):
    """A function that gives a command and notes what is wrong with how it ends."""

    def accept(*args, **kwargs):
        raise Accepted

    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    for module, name in ((compare, "run_all"), (evaluate, "run_tasks"), (inspect, "score_all")):
        monkeypatch.setattr(module, name, accept)
    monkeypatch.setattr(trainer.EAFTTrainer, "train", accept)
    monkeypatch.setenv("EAFT_CACHE", str(place / "cache"))
    # lm-eval takes seconds to look through its own thousands of tasks for a name that is wrong
    registry = lm_eval_internals.TaskManager
    monkeypatch.setattr(
        lm_eval_internals,
        "TaskManager",
        lambda include_path, **kwargs: registry(include_path=include_path, include_defaults=False),
    )
    wrong, tried = [], []

    def attempt(name, *argv, out="out", good=False):
        if good:
            shutil.rmtree(out, ignore_errors=True)
        before = {path for path in Path(out).rglob("*") if path.is_file()}
        try:
            code = cli.main([str(part) for part in argv])
        except SystemExit as end:
            code = end.code
        except Accepted:
            code = "accepted"
        except Exception as error:
            code = f"{type(error).__name__}: {error}"[:200]
        printed = capsys.readouterr()
        left = [
            p
            for p in Path(out).rglob("*")
            if p.is_file() and p not in before and not p.name.endswith("_lock")
        ]
        tried.append(name)
        record_property("bad_inputs", 0 if good else 1)
        if good:
            assert code == "accepted", f"{name}: {code} {printed.err[-500:]}"
        elif code != 2 or "error:" not in printed.err:
            wrong.append(f"{name}: {code} {printed.err.strip()[-200:] if code in (0, 1) else ''}")
        elif left:
            wrong.append(f"{name}: left {left}")

    yield attempt
    assert not wrong, f"{len(wrong)} of {len(tried)}:\n" + "\n".join(wrong)


TRAIN = [
    "--max_steps",
    "2",
    "--use_cpu",
    "--bf16",
    "false",
    "--report_to",
    "none",
    "--output_dir",
    "out",
]


def train(attempt, name, *more, model="model", data="data.jsonl", **how):
    given = [*TRAIN, "--model_name_or_path", model, "--dataset_name", data]
    attempt(f"train: {name}", "train", *without(given, more), *more, **how)


def scan(attempt, name, *more, model="model", data="data.jsonl", **how):
    given = ["--use_cpu", "--bf16", "false", "--output_dir", "out"]
    attempt(f"inspect: {name}", "inspect", model, data, *without(given, more), *more, **how)


def measure(attempt, name, *more, model="tuned", **how):
    given = (
        "--base model --suite tiny --include_path tasks --drift_prompts 2 --max_new_tokens 4"
        " --output_path out"
    )
    attempt(f"eval: {name}", "eval", model, *without(given.split(), more), *more, **how)


def without(given, more):
    """The flags that are given, but for those that are given otherwise."""
    pairs = [given[i : i + 2] for i in range(len(given)) if given[i].startswith("--")]
    kept = [
        [part for part in pair if part == pair[0] or not part.startswith("--")] for pair in pairs
    ]
    return [part for pair in kept if pair[0] not in more for part in pair]


RECIPE = {
    "output_dir": "out",
    "objectives": {"sft": {"gate": "sft"}},
    "train": {
        **{"model_name_or_path": "model", "dataset_name": "data.jsonl", "max_steps": 2},
        **{"use_cpu": True, "bf16": False, "report_to": "none"},
    },
    "evaluate": {
        **{"target_tasks": ["tiny"], "general_tasks": ["other"], "include_path": "tasks"},
        **{"drift_prompts": 2, "max_new_tokens": 4, "held_out": "held.jsonl"},
    },
}


def matched(attempt, name, change=None, value=None, text=lambda written: written, **how):
    """`eaft compare`, with one key of the recipe changed (`evaluate.limit`), or its text."""
    recipe = copy.deepcopy(RECIPE)
    if change is not None:
        *path, key = change.split(".")
        place = recipe
        for part in path:
            place = place[part]
        place[key] = value
    Path("recipe.yaml").write_text(text(yaml.safe_dump(recipe)))
    attempt(f"compare: {name}", "compare", "--config", "recipe.yaml", **how)


def test_the_controls_are_accepted(attempt):
    for command in (train, scan, measure, matched):
        command(attempt, "control", good=True)


@pytest.mark.parametrize(
    ("command", "flags"),
    [(train, TRAIN_FLAGS), (scan, INSPECT_FLAGS), (measure, EVAL_FLAGS)],
    ids=lambda x: "",
)
def test_flags(command, flags, attempt):
    Path("broken_gates.py").write_text("def f(:\n")
    Path("own_gates.py").write_text("")
    for flag, values in flags.items():
        for value in values:
            extra = ["--use_peft", "true"] if flag.startswith("lora_") else []
            command(attempt, f"{flag}={value!r}", *extra, f"--{flag}", value)


def test_values_of_schedules_and_optimizers(attempt):
    for schedule, value in (
        *(("cosine", f'{{"num_cycles": {value}}}') for value in ("NaN", "Infinity", '"x"', "null")),
        *(("cosine_with_min_lr", f'{{"min_lr": {value}}}') for value in ("-1", "NaN", '"x"')),
        *(("polynomial", f'{{"lr_end": {value}}}') for value in ("NaN", "5", '"x"')),
    ):
        flags = ["--lr_scheduler_type", schedule, "--lr_scheduler_kwargs", value]
        train(attempt, f"{schedule} {value}", *flags)
    for optimizer, value in (
        *(("sgd", value) for value in ("momentum=-1", "momentum=nan", "momentum=x", "nosuch=1")),
        *(("rmsprop", value) for value in ("alpha=-1", "momentum", "alpha=nan")),
        ("adafactor", "clip_threshold=1.0"),  # which transformers does not read
    ):
        train(attempt, f"{optimizer} {value}", "--optim", optimizer, "--optim_args", value)
    for flags in (
        ["--optim", "sgd", "--optim_args", "momentum=0.9, nesterov=true"],
        ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-6}'],
    ):
        train(attempt, str(flags), *flags, good=True)


def test_recipes(attempt):
    for key, values in RECIPE_KEYS.items():
        for value in values:
            matched(attempt, f"{key}={value!r}", key, value)
    twice = "  sft:\n    gate: sft\n"
    matched(
        attempt, "an objective twice", text=lambda written: written.replace(twice, twice + twice)
    )
    for name, text in (
        ("a list", "- a\n"),
        ("nothing", ""),
        ("no YAML", "a: [1"),
        ("tabs", "a:\t\n\tb: 1"),
        ("a text", "x"),
    ):
        matched(attempt, name, text=lambda _, text=text: text)
    attempt("compare: no such recipe", "compare", "--config", "nosuch.yaml")
    attempt("compare: no recipe", "compare")
    for jobs in ("0", "-1", "x"):
        Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        attempt(f"compare: --jobs {jobs}", "compare", "--config", "recipe.yaml", "--jobs", jobs)


@pytest.mark.parametrize("command", [train, scan, matched], ids=["train", "inspect", "compare"])
def test_rows(command, attempt):
    contents = {
        name: "".join(json.dumps(row) + "\n" for row in rows).encode()
        for name, rows in ROWS.items()
    }
    for i, (name, content) in enumerate({**contents, **FILES}.items()):
        file = f"rows{i}.jsonl"
        Path(file).write_bytes(content)
        if command is matched:
            matched(attempt, f"held out, {name}", "evaluate.held_out", file)
            matched(attempt, f"trained on, {name}", "train.dataset_name", file)
        else:
            command(attempt, name, data=file)


def test_gates(attempt):
    for i, (name, code) in enumerate(GATES.items()):
        Path(f"gates_{i}.py").write_text(code)
        train(attempt, f"gate, {name}", "--gate", f"gates_{i}:f")
        matched(attempt, f"gate, {name}", "objectives", {"own": {"gate": f"gates_{i}:f"}})


def test_files_of_ours(attempt):
    shutil.rmtree("out", ignore_errors=True)
    Path("out").mkdir()
    for text in NO_JSON:
        for command, file, flags in (
            (train, "run.json", ["--resume_from_checkpoint", "true"]),
            (
                train,
                "checkpoint-2/trainer_state.json",
                ["--resume_from_checkpoint", "out/checkpoint-2"],
            ),
            (scan, "run.json", []),
            (measure, "results.json", []),
            (matched, "compare.json", None),
        ):
            place = Path("out", file)
            place.parent.mkdir(exist_ok=True)
            place.write_text(text)
            command(attempt, f"{file} is {text!r}", *(flags or []))
            place.unlink()
    for text in NO_JSON[:-1]:
        Path("bad.jsonl").write_text(text)
        measure(attempt, f"prompts are {text!r}", "--prompts", "bad.jsonl")
        train(
            attempt,
            f"replay_prompts are {text!r}",
            "--replay",
            "0.5",
            "--replay_prompts",
            "bad.jsonl",
        )
        if text:
            train(attempt, f"exclude_examples are {text!r}", "--exclude_examples", "bad.jsonl")


def test_suites(attempt):
    for text in (
        *(
            "- a\n",
            "",
            "x",
            "suite: x\n",
            "suite: x\ntasks: tiny\n",
            "suite: x\ntasks: []\n",
            "suite: 5\ntasks: [tiny]\n",
        ),
        *(f"suite: x\ntasks: [tiny]\nlimit: {value}\n" for value in ("many", -3, 0, 1.5, "[1]")),
        *(
            "suite: x\ntasks: [nosuch]\n",
            "suite: x\ntasks: [5]\n",
            "suite: x\ntasks: [tiny]\nnosuch: 1\n",
        ),
    ):
        Path("suite.yaml").write_text(text)
        measure(attempt, f"suite {text!r}", "--suite", "suite.yaml")


@pytest.fixture(scope="module")
def models(place):
    """Folders of models that cannot be used."""
    found = []

    def broken(name, change=lambda folder: None, **config):
        folder = place / name
        make_model(**config).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        change(folder)
        found.append(name)

    def weights(folder, change):
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    broken("small", vocab_size=100)
    broken("cut", lambda folder: weights(folder, lambda content: content[:1000]))
    broken("empty weights", lambda folder: weights(folder, lambda content: b""))
    broken("no weights", lambda folder: (folder / "model.safetensors").unlink())
    broken("no tokenizer", lambda folder: [file.unlink() for file in folder.glob("token*")])
    broken("no config", lambda folder: (folder / "config.json").unlink())
    for i, text in enumerate(NO_JSON):
        broken(f"config {i}", lambda folder, text=text: (folder / "config.json").write_text(text))
    (place / "no folder").write_text("x")
    (place / "file.gguf").write_text("x")
    return [*found, "no folder", "file.gguf", "/nosuch", "a/b/c", "nosuch.gguf", ""]


@pytest.mark.parametrize("command", [train, scan, measure], ids=["train", "inspect", "eval"])
def test_models(command, models, attempt):
    for name in models:
        command(attempt, f"model {name!r}", model=name)


def test_view_cache_and_env(attempt):
    Path("empty").mkdir()
    for argv in (
        *(
            ["nosuch"],
            ["empty"],
            ["data.jsonl"],
            [],
            ["empty", "--port", "x"],
            ["empty", "--nosuch"],
        ),
        *(["model", "--port", "99999999"], ["model", "--token", "a b"]),
    ):
        attempt(f"view {argv}", "view", *argv, *(["--no_browser"] if argv else []))
    for command in ("cache", "env"):
        for flag in ("--nosuch", "extra", "--clear=x"):
            attempt(f"{command} {flag}", command, flag)
    attempt("no such command", "trian")
