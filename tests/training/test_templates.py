"""
What chat templates make of rows: errors by row before a model is loaded, and the assistant's tokens
by turns.
"""

import json
import runpy
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DatasetMixtureConfig, ScriptArguments

from eaft import cli
from eaft import models as eaft_models
from eaft.errors import ConfigurationError
from eaft.training.config import EAFTConfig
from eaft.training.data import load_splits, to_dataset
from eaft.training.prepare import prepare_rows
from eaft.training.template_checks import check_rows
from eaft.training.templates import find_template_tokenizer
from tests.conftest import make_tokenizer

DOCS = Path(__file__).parents[2] / "docs"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def tokenizer_with(name, more=""):
    """
    Return the byte tokenizer with a template that TRL ships; with `more`, one that TRL does not
    know.
    """
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|pad|>"
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text() + more
    return tokenizer


def config(**settings):
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "max_length": None, **settings}
    return EAFTConfig("unused", **settings)


def row(*messages):
    return {
        "messages": [m if isinstance(m, dict) else {"role": r, "content": m} for m, r in messages]
    }


def said(*contents):
    return row(*zip(contents, ["user", "assistant"] * len(contents), strict=False))


def calling(arguments):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return row(
        ("Weather?", "user"), ({"role": "assistant", "content": "", "tool_calls": [call]}, None)
    )


AS_MAP, AS_TEXT = "and this template takes a map", "and this template takes JSON text"
REFUSED = {
    "text, qwen3_5_think": ("qwen3_5_think", calling('{"city": "Paris"}'), AS_MAP),
    "text, glm4moe": ("glm4moe", calling('{"city": "Paris"}'), AS_MAP),
    "text, nemotron_3_nano": ("nemotron_3_nano", calling('{"city": "Paris"}'), AS_MAP),
    "map, deepseekv3": ("deepseekv3", calling({"city": "Paris"}), AS_TEXT),
    "system": (
        "gemma",
        row(("Be brief.", "system"), ("Hi", "user"), ("Hi.", "assistant")),
        "no system message",
    ),
    "roles do not alternate": (
        "gemma",
        row(("Hi", "user"), ("You", "user"), ("Hi.", "assistant")),
        "must alternate",
    ),
    "no content": (
        "qwen2_5",
        row(("Hi", "user"), ({"role": "assistant"}, None)),
        'Give each message a "content"',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_a_template_does_not_take_is_named_with_the_way_out(name):
    template, bad, advice = REFUSED[name]
    tokenizer = tokenizer_with(template)
    check_rows(tokenizer, [said("Hi", "Hello.")], config(), "data")
    with pytest.raises(ConfigurationError) as refused:
        check_rows(tokenizer, [said("Hi", "Hello."), said("Hi", "Bye."), bad], config(), "data")
    assert str(refused.value).startswith("data, row 2: the chat template does not take this row")
    assert advice in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_template_that_is_no_jinja_is_no_fault_of_a_row():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}\n{{ m['content'] "
    with pytest.raises(
        ConfigurationError, match=r"not valid Jinja.*give another with --chat_template_path"
    ):
        check_rows(tokenizer, [said("Hi", "Hello.")], config(), "data")
    tokenizer.chat_template = None
    with pytest.raises(ConfigurationError, match="no chat template, which rows of messages need"):
        check_rows(tokenizer, [said("Hi", "Hello.")], config(), "data")


@pytest.mark.parametrize("command", ["train", "dry_run", "inspect", "held_out"])
def test_no_model_is_loaded_and_nothing_written(command, model_dir, tmp_path, capsys, monkeypatch):
    template = tmp_path / "other.jinja"
    template.write_text((TEMPLATES / "glm4moe.jinja").read_text())
    data, held_out = tmp_path / "data.jsonl", tmp_path / "held_out.jsonl"
    data.write_text(
        "".join(json.dumps(r) + "\n" for r in (said("Hi", "Hello."), calling('{"city": "Paris"}')))
    )
    loads = [
        "training.train.resolve_model",
        "training.plan.resolve_model",
        "inspection.inspect.find_model",
    ]
    for module in [*loads, "comparison.recipe.resolve_model"]:
        monkeypatch.setattr(f"eaft.{module}", lambda *a, **k: pytest.fail("a model is looked for"))
    out = tmp_path / "out"
    flags = {
        "dataset_name": data,
        "output_dir": out,
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
    }
    flags |= {"model_name_or_path": model_dir, "chat_template_path": template}
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    if command == "held_out":
        good = {
            "prompt": said("Hi")["messages"],
            "completion": [{"role": "assistant", "content": "Hello."}],
        }
        bad = {
            "prompt": said("Weather?")["messages"],
            "completion": calling('{"city": "Paris"}')["messages"][1:],
        }
        data.write_text(json.dumps({**good, "prompt": said("Bye")["messages"]}))
        held_out.write_text(json.dumps(good) + "\n" + json.dumps(bad))
        train = {name: str(value) for name, value in flags.items() if name != "output_dir"}
        train |= {"use_cpu": True, "bf16": False}
        evaluate = {
            "target_tasks": ["everyday"],
            "general_tasks": ["everyday"],
            "held_out": str(held_out),
        }
        recipe = {
            "output_dir": str(out),
            "objectives": {"sft": {"gate": "sft"}},
            "train": train,
            "evaluate": evaluate,
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        code = cli.main(["compare", "--config", str(tmp_path / "recipe.yaml")])
    else:
        more = ["--dry_run"] if command == "dry_run" else []
        code = cli.main(["inspect" if command == "inspect" else "train", *argv, *more])
    error = capsys.readouterr().err
    assert code == 2
    where = "evaluate.held_out" if command == "held_out" else "dataset_train_split='train'"
    assert f"{where}, row 1: the chat template does not take this row" in error
    assert AS_MAP in error
    assert not out.exists()


def found(rows, tokenizer, args=None, **more):
    entries = check_rows(tokenizer, rows, args or config(), "data", **more)
    return {e.name: (e.count, e.rows, e.text) for e in entries}


@pytest.mark.parametrize(
    ("name", "count"), [("glm4moe", 2), ("qwen2_5", 0), ("phi3", 0), ("deepseekv3", 0)]
)
def test_answers_without_an_end_token_are_told(name, count):
    tokenizer = tokenizer_with(name)
    rows = [said("Hi", "Hello."), said("Hi"), said("Hi you", "Hello.")]
    ends, text = (
        {"<|im_end|>"},
        "generation stops at ('<|im_end|>',). Set --chat_template_path to a template that ends",
    )
    if name == "deepseekv3":
        ends = {"\uff5cend\u2581of\u2581sentence\uff5c>"}
    at_the_end = [
        tokenizer.apply_chat_template(r["messages"], tokenize=False).strip().endswith(tuple(ends))
        for r in rows
    ]
    assert (not at_the_end[0]) == bool(count)
    number, first, told = found(rows, tokenizer, ends=ends)["no_end"]
    assert (number, first) == (count, [0, 2][:count])
    assert (text in told) == bool(count)


def test_an_end_token_that_generation_does_not_know_is_told_with_the_flag():
    rows = [said("Hi", "Hello.")]
    assert (
        "Set --eos_token '<|im_end|>'."
        in found(rows, tokenizer_with("qwen2_5"), ends={"<|endoftext|>"})["no_end"][2]
    )
    assert found(rows, tokenizer_with("qwen2_5"))["no_end"][0] == 0


def test_an_end_token_outside_of_the_marks_is_told():
    tokenizer, masked = make_tokenizer(), config(assistant_only_loss=True)
    assert found([said("Hi", "Hello.")], tokenizer, masked, ends={"<|im_end|>"})["no_end"][0] == 0
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n"
    )
    assert found([said("Hi", "Hello.")], tokenizer, masked, ends={"<|im_end|>"})["no_end"][0] == 1
    assert found([said("Hi", "Hello.")], tokenizer, ends={"<|im_end|>"})["no_end"][0] == 0


NO_MESSAGES = [
    {"messages": []},
    {"messages": None},
    {"messages": "Hi"},
    {"messages": ["Hi"]},
    {"messages": [{"content": "Hi"}]},
    {"messages": [{"role": 1, "content": "Hi"}]},
    {"prompt": said("Hi")["messages"], "completion": "Hello."},
    {**said("Hi", "Hello."), "prompt": "Hi"},
    {**said("Hi", "Hello."), "tools": "weather"},
]


@pytest.mark.parametrize("bad", NO_MESSAGES, ids=str)
def test_what_are_no_messages_is_refused_by_row(bad):
    with pytest.raises(ConfigurationError, match=r"^data, row 1: "):
        check_rows(make_tokenizer(), [said("Hi", "Hello."), bad], config(), "data")


def test_nulls_that_parquet_fills_in_are_told_and_those_of_json_lines_are_not(tmp_path):
    rows = [
        said("Hi", "Hello."),
        calling({"city": "Paris"}),
        calling({"city": "Rome", "unit": None}),
    ]
    typed = [
        rows[0],
        calling({"city": "Paris"}),
        calling({"unit": "C"}),
        calling({"city": "Rome", "unit": "C"}),
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    Dataset.from_list(typed).to_parquet(tmp_path / "data.parquet")
    tokenizer = tokenizer_with("qwen3_5_think")
    assert found(load_rows(tmp_path / "data.jsonl"), tokenizer)["filled_nulls"][:2] == (0, [])
    assert found(load_rows(tmp_path / "data.parquet"), tokenizer)["filled_nulls"][:2] == (2, [1, 2])


def load_rows(path):
    return load_splits(ScriptArguments(dataset_name=str(path)), DatasetMixtureConfig())["train"]


@pytest.mark.parametrize(
    ("name", "count"), [("lfm2", 2), ("llama3", 2), ("qwen2_5", 0), ("phi3", 2), ("llama3_1", 0)]
)
def test_tool_calls_that_a_template_drops_are_told(name, count):
    answered = calling({"city": "Paris"})
    answered["messages"] += [
        {"role": "tool", "name": "weather", "content": "rain"},
        *said("", "Rain.")["messages"][1:],
    ]
    rows = [said("weather?", "Hello."), calling({"city": "Paris"}), answered]
    tokenizer = tokenizer_with(name)
    texts = [tokenizer.apply_chat_template(r["messages"], tokenize=False) for r in rows[1:]]
    assert all("weather" not in text for text in texts) == bool(count)
    assert found(rows, tokenizer)["dropped_calls"][:2] == (count, [1, 2][:count])


@pytest.mark.parametrize(
    "name", ["deepseek_r1_distill", "nemotron_3_nano", "glm4moe", "qwen2_5", "llama3", "gemma4_v5"]
)
def test_prompts_that_do_not_begin_their_row_are_told(name):
    tokenizer, messages = tokenizer_with(name), said("Hi you", "Hello.")["messages"]
    row = {"prompt": messages[:1], "completion": messages[1:]}
    given = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, return_dict=False
    )
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    right = whole[: len(given)] != given
    assert found([row], tokenizer)["no_prefix"][0] == right
    assert right or name not in ("deepseek_r1_distill", "nemotron_3_nano")


def test_a_token_that_spans_the_end_of_a_prompt_is_told():
    tokenizer = make_tokenizer()
    vocab = {token: i for i, token in enumerate([*tokenizer.get_vocab(), "ab"])}
    merging = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    merging.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="<|im_end|>")
    rows = [{"prompt": "x a", "completion": "c"}, {"prompt": "x a", "completion": "b"}]
    assert found(rows, tokenizer)["no_prefix"][:2] == (1, [1])
    # Rows spread over the data, not the first thousand alone
    count, first, text = found([rows[0]] * 1500 + [rows[1]] * 1000, tokenizer)["no_prefix"]
    assert (count, first[0]) == (334, 1500)
    assert text.endswith("Tokens were checked in 834 rows, 1 in 3.")


def test_train_dry_run_and_inspect_tell_the_same(model_dir, tmp_path, capsys):
    template, data = tmp_path / "other.jinja", tmp_path / "data.jsonl"
    template.write_text((TEMPLATES / "glm4moe.jinja").read_text())
    data.write_text(
        "".join(json.dumps(r) + "\n" for r in [said("Hi", "Hello."), said("Hi you", "Hello.")] * 4)
    )
    flags = {
        "dataset_name": data,
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
        "max_steps": 1,
    }
    flags |= {"model_name_or_path": model_dir, "chat_template_path": template}
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    line = (
        "dataset_train_split='train': Answers without an end token: 8 (row 0, 1, 2, 3, 4). The"
        " model does not learn to"
    )
    for command, *more in (["train"], ["train", "--dry_run"], ["inspect"]):
        assert (
            cli.main(
                [command, *argv, "--output_dir", str(tmp_path / (command + "".join(more))), *more]
            )
            == 0
        )
        assert line in capsys.readouterr().err
    checks = json.loads((tmp_path / "inspect" / "summary.json").read_text())["checks"]
    assert {c["name"]: c["count"] for c in checks}["no_end"] == 8


def labelled(tokenizer, data, **settings):
    """Return each row's tokens and labels, as training has them."""
    prepared = prepare_rows(tokenizer, config(**settings), to_dataset(data)).whole
    return prepared["input_ids"][:], prepared["labels"][:]


MARKED = ["cohere", "cohere2", "gemma3", "lfm2_v2", "llama3", "qwen2_5_vl", "qwen3_instruct_2507"]


@pytest.mark.parametrize("wanted", [{"assistant_only_loss": True}, {"completion_only_loss": True}])
@pytest.mark.parametrize("name", MARKED)
def test_turns_are_the_tokens_that_trl_marks(name, wanted):
    data = [said("Hi you", "Hello.", "Bye", "See you."), said("Café?", "Ja, 咖啡.")]
    right = labelled(
        tokenizer_with(name), data, assistant_only_loss=True
    )  # TRL's own marked version of it
    assert any(label == -100 for label in right[1][0])
    assert labelled(tokenizer_with(name, "{# mine #}"), data, **wanted) == right
    assert labelled(tokenizer_with(name), data, **wanted) == right


@pytest.mark.parametrize(
    "name", ["qwen2_5", "phi3", "glm4moe", "nemotron_3_nano", "qwen3_8", "gptoss", "qwen3"]
)
def test_a_single_turn_is_labelled_as_trl_labels_a_completion(name):
    tokenizer = tokenizer_with(name, "{# mine #}")
    whole = said("Hi you", "Hello.")
    split = {"prompt": whole["messages"][:1], "completion": whole["messages"][1:]}
    right = labelled(tokenizer, [split])
    assert labelled(tokenizer, [whole], assistant_only_loss=True) == right
    assert labelled(tokenizer, [split], assistant_only_loss=True) == right


def test_turns_that_cannot_be_found_are_refused_with_a_form_that_works():
    tokenizer = tokenizer_with(
        "qwen3", "{# mine #}"
    )  # leaves the empty thought out of earlier turns
    data = [said("Hi", "Hello."), said("Hi you", "Hello.", "Bye", "See you.")]
    with pytest.raises(
        ConfigurationError, match=r'Row 1: .*message 1 .*\{"prompt": .*"completion": '
    ):
        labelled(tokenizer, data, assistant_only_loss=True)


def test_the_table_of_the_docs_is_what_the_templates_do():
    page = (DOCS / "templates.md").read_text()
    if f"\nTRL {trl.__version__}:\n" not in page:
        pytest.skip("the table is of another TRL")
    assert runpy.run_path(str(DOCS / "make_templates.py"))["table"]() in page, (
        "run docs/make_templates.py"
    )


def test_the_tokenizer_of_a_converted_gguf_file_is_read_from_the_cache(tmp_path, monkeypatch):
    """The file itself is not parsed again, which takes ten seconds: here it is no GGUF at all."""
    monkeypatch.setattr(eaft_models, "HF_HOME", tmp_path)
    file = tmp_path / "m.gguf"
    file.write_text("not parsed")
    assert find_template_tokenizer(str(file), config(), None) is None
    make_tokenizer().save_pretrained(eaft_models.conversion_folder(file))
    found = find_template_tokenizer(str(file), config(), None)
    assert found.get_vocab() == make_tokenizer().get_vocab()
