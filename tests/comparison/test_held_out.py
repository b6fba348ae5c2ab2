"""
Held-out rows are the tokens and labels that TRL trains, scored as its own trainer scores them.
"""

import json
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from eaft.comparison import compare
from eaft.comparison.recipe import EvaluateConfig, Recipe, Run, plan_runs
from eaft.errors import ConfigurationError
from eaft.evaluation.asking import ask
from eaft.evaluation.drift import read_prompts
from eaft.evaluation.measured_model import MeasuredModel
from eaft.evaluation.protocol import Protocol
from eaft.training import held_out
from eaft.training.apart import parse_flags
from eaft.training.data import load_rows
from tests.conftest import CHAT_TEMPLATE, make_model

WORDS = ["Paris", "London", "Rome", "Berlin"]
MARKS = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"]
TOOL = {
    "type": "function",
    "function": {"name": "find", "description": "look up", "parameters": {"type": "object"}},
}
OTHER = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
OTHER += "{% if add_generation_prompt %}[assistant] {% endif %}"


def template(name):
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def texts(question, answer):
    return [
        {"prompt": question.format(i), "completion": answer.format(word, word, word)}
        for i, word in enumerate(WORDS)
    ]


def chats(**more):
    return [
        {"prompt": [user(f"City {i}")], "completion": [assistant(word)], **more}
        for i, word in enumerate(WORDS)
    ]


def turns():
    return [
        {"messages": [user(f"City {i}"), assistant(word), user("Sure?"), assistant("Yes " * i)]}
        for i, word in enumerate(WORDS)
    ]


# Rows, a chat template, and flags of training
FORMS = {
    "tokens merge across the boundary": (texts("City {}: ", "{}"), None, {}),
    "the completion ends in EOS": (texts("City {}:", " {}<|im_end|>"), None, {}),
    "another end token": (texts("City {}:", " {}"), None, {"eos_token": "<|endoftext|>"}),
    "all tokens": (texts("City {}:", " {}"), None, {"completion_only_loss": False}),
    "text": (
        [{"story": f"City {i}: {word}"} for i, word in enumerate(WORDS)],
        None,
        {"dataset_text_field": "story"},
    ),
    "cut on the left": (
        texts("City {}:", " {} {} {}"),
        None,
        {"max_length": 9, "truncation_mode": "keep_end"},
    ),
    "chat": (chats(), CHAT_TEMPLATE, {}),
    "tools": (chats(tools=[TOOL]), template("qwen3"), {}),
    "template settings": (
        chats(chat_template_kwargs={"enable_thinking": False}),
        template("qwen3"),
        {},
    ),
    "the prompt is no prefix": (chats(), template("deepseek_r1_distill"), {}),
    "another template": (chats(), CHAT_TEMPLATE, {"chat_template_path": "other.jinja"}),
    "messages": (turns(), CHAT_TEMPLATE, {}),
    "messages, assistant only": (turns(), CHAT_TEMPLATE, {"assistant_only_loss": True}),
    "assistant only, by TRL's own marks": (
        turns(),
        template("qwen3"),
        {"assistant_only_loss": True},
    ),
    "from and value": (
        [
            {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": w}]}
            for w in WORDS
        ],
        CHAT_TEMPLATE,
        {},
    ),
    "token ids": (
        [{"input_ids": [9, 8 + i, 7], "labels": [-100, 8 + i, 7]} for i in range(4)],
        None,
        {},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and a tokenizer in which ` Paris` is one token."""
    path = tmp_path_factory.mktemp("held-out")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([f"City: {word} City" for word in WORDS] * 9, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=MARKS[0], eos_token=MARKS[2]
    ).save_pretrained(path)
    make_model(vocab_size=320, max_position_embeddings=1024).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def measured(folder):
    model = MeasuredModel(
        str(folder), AutoTokenizer.from_pretrained(folder), Protocol(dtype="float32")
    )
    yield model
    model.free()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def flags_of(folder, rows, **flags):
    path = folder / "chat_template.jinja"
    path.unlink(missing_ok=True)
    data = write(folder / "rows.jsonl", rows)
    shared = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "output_dir": str(folder / "out"),
    }
    return {"model_name_or_path": str(folder), "dataset_name": data, **shared, **flags}


@pytest.mark.parametrize("name", FORMS)
def test_nll_is_what_trls_own_trainer_evaluates(name, folder, measured, monkeypatch):
    monkeypatch.chdir(folder)
    Path("other.jinja").write_text(OTHER)
    rows, chat_template, settings = FORMS[name]
    flags = flags_of(folder, rows, **settings)
    if chat_template is not None:
        Path("chat_template.jinja").write_text(chat_template)
    field = settings.get("dataset_text_field", "text")
    loaded = load_rows(flags["dataset_name"], field, "held_out")
    found = held_out.prepare(loaded, parse_flags(flags), str(folder), "held_out")
    sums, counts = measured.nll([row for row in found if row["input_ids"]])

    args = {
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "per_device_eval_batch_size": len(rows),
    }
    theirs = SFTTrainer(
        str(folder),
        SFTConfig(str(folder / "trl"), **args, **settings),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
    )
    assert sums.sum() / counts.sum() == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-5)
    labels = [label for row in theirs.eval_dataset for label in row["labels"][1:]]
    assert counts.sum() == sum(label != -100 for label in labels)


def runs_of(folder, flags, **objectives):
    return [
        Run(name, 0, None, folder / name, {**flags, **own}, {}) for name, own in objectives.items()
    ]


def recipe_of(path, flags, **objectives):
    config = EvaluateConfig(target_tasks=["t"], general_tasks=["g"], held_out=path)
    return Recipe("out", objectives, flags, config)


def test_objectives_that_make_other_tokens_are_refused(folder):
    """
    Their nlls would be of different tokens; a flag that changes no token of these rows is no
    matter.
    """
    flags = flags_of(folder, texts("City {}:", " {}"))
    recipe = recipe_of(flags["dataset_name"], flags)
    alike = runs_of(
        folder,
        flags,
        sft={"gate": "sft"},
        eaft={"gate": "eaft", "max_length": 64, "learning_rate": 1e-3},
    )
    rows = compare.prepare_held_out(recipe, alike, str(folder))
    assert len(rows) == 4
    for own, words in (
        (
            {"eos_token": "<|endoftext|>"},
            "sft and eaft make different tokens or labels of row 0 (by eos_token)",
        ),
        (
            {"max_length": 3, "completion_only_loss": False},
            r"\(by max_length, completion_only_loss\)",
        ),
    ):
        with pytest.raises(
            ConfigurationError,
            match=words.replace("(by eos", r"\(by eos").replace("token)", r"token\)"),
        ):
            compare.prepare_held_out(recipe, runs_of(folder, flags, sft={}, eaft=own), str(folder))


def test_rows_without_a_label_are_left_out_and_others_must_fit(folder, caplog):
    rows = [*texts("City {}:", " {}"), {"prompt": "City " * 40, "completion": " Rome"}]
    flags = flags_of(folder, rows, max_length=24)
    recipe = recipe_of(flags["dataset_name"], flags)
    assert len(compare.prepare_held_out(recipe, runs_of(folder, flags, sft={}), str(folder))) == 4
    assert "row 4 has no labelled token left" in caplog.text
    with pytest.raises(
        ConfigurationError, match="row 0 has 3 tokens, more than the model's context of 2"
    ):
        held_out.check_fit(
            [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}],
            str(folder),
            {"max_length": 2},
            "held_out",
        )
    with pytest.raises(
        ConfigurationError,
        match="row 0 has the token id 320, and the base model's vocabulary has 320",
    ):
        held_out.check_fit(
            [{"input_ids": [1, 320], "labels": [-100, 320]}], str(folder), {}, "held_out"
        )


@pytest.mark.parametrize(
    ("trained", "row"),
    [
        ({"text": "all of it"}, {"text": "all of it"}),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}),
        ({"messages": [user("a"), assistant("b")]}, {"messages": [user("a"), assistant("c")]}),
        (
            {"messages": [user("a"), assistant("b")]},
            {"prompt": [user("a")], "completion": [assistant("c")]},
        ),
        (
            {"messages": [{**user("a"), "name": None}, assistant("b")]},
            {"messages": [user("a"), assistant("c")]},
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "c"}]},
        ),
        (
            {"prompt": [user("a")], "completion": [assistant("b")], "tools": [TOOL]},
            {"messages": [user("a")]},
        ),
        ({"input_ids": [3, 4]}, {"input_ids": [3, 4]}),
    ],
)
def test_a_row_that_is_trained_on_is_found_in_every_form(trained, row, folder, tmp_path):
    apart = json.loads(
        json.dumps(row)
        .replace('"a"', '"x"')
        .replace("all of it", "none of it")
        .replace("[3,", "[5,")
    )
    path = write(tmp_path / "held_out.jsonl", [apart, row])
    flags = flags_of(folder, [trained])
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    recipe = recipe_of(path, flags, sft={"gate": "sft"})
    with pytest.raises(ConfigurationError, match=r"evaluate\.held_out: row 1 is trained on"):
        plan_runs(recipe, None)
    recipe.evaluate.held_out = write(tmp_path / "apart.jsonl", [apart])
    assert len(plan_runs(recipe, None)) == 1


def test_drift_is_asked_with_a_rows_tools_and_settings(folder, tmp_path):
    """As TRL writes the same prompt for training."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template("qwen3")
    rows = [
        {"messages": [user("City 1"), assistant("Rome")], "tools": [TOOL]},
        {
            "prompt": [user("City 2")],
            "tools": json.dumps([TOOL]),
            "chat_template_kwargs": {"enable_thinking": False},
        },
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
        {"prompt": "City 3"},
    ]
    prompts = read_prompts(write(tmp_path / "prompts.jsonl", rows), 9)
    found = [ask(tokenizer, prompt, Protocol(enable_thinking=True)) for prompt in prompts]
    messages = [
        [user("City 1")],
        [user("City 2")],
        [user("a"), assistant("b"), user("c")],
        [user("City 3")],
    ]
    settings = [{"tools": [TOOL]}, {"tools": [TOOL], "enable_thinking": False}, {}, {}]
    assert found == [
        tokenizer.apply_chat_template(
            m, tokenize=False, add_generation_prompt=True, **{"enable_thinking": True, **s}
        )
        for m, s in zip(messages, settings, strict=True)
    ]
    with pytest.raises(ConfigurationError, match="or `messages`, in every row"):
        read_prompts(write(tmp_path / "none.jsonl", [{"text": "a"}]), 9)
