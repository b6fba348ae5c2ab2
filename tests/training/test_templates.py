"""What chat templates make of rows: errors by row before a model is loaded, and the assistant's tokens by turns."""

import json
from pathlib import Path

import pytest
import trl

from eaft import cli
from eaft.errors import ConfigurationError
from eaft.training.config import EAFTConfig
from eaft.training.data import to_dataset
from eaft.training.prepare import prepare_rows
from eaft.training.templates import check_rows
from tests.conftest import make_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def tokenizer_with(name, more=""):
    """Return the byte tokenizer with a template that TRL ships; with `more`, one that TRL does not know."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|pad|>"
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text() + more
    return tokenizer


def config(**settings):
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "max_length": None, **settings}
    return EAFTConfig("unused", **settings)


def row(*messages):
    return {"messages": [m if isinstance(m, dict) else {"role": r, "content": m} for m, r in messages]}


def said(*contents):
    return row(*zip(contents, ["user", "assistant"] * len(contents), strict=False))


def calling(arguments):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return row(("Weather?", "user"), ({"role": "assistant", "content": "", "tool_calls": [call]}, None))


AS_MAP, AS_TEXT = "and this template takes a map", "and this template takes JSON text"
REFUSED = {
    "text, qwen3_5_think": ("qwen3_5_think", calling('{"city": "Paris"}'), AS_MAP),
    "text, glm4moe": ("glm4moe", calling('{"city": "Paris"}'), AS_MAP),
    "text, nemotron_3_nano": ("nemotron_3_nano", calling('{"city": "Paris"}'), AS_MAP),
    "map, deepseekv3": ("deepseekv3", calling({"city": "Paris"}), AS_TEXT),
    "system": ("gemma", row(("Be brief.", "system"), ("Hi", "user"), ("Hi.", "assistant")), "no system message"),
    "roles do not alternate": ("gemma", row(("Hi", "user"), ("You", "user"), ("Hi.", "assistant")), "must alternate"),
    "no content": ("qwen2_5", row(("Hi", "user"), ({"role": "assistant"}, None)), 'Give each message a "content"'),
}  # fmt: skip


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
    with pytest.raises(ConfigurationError, match=r"not valid Jinja.*give another with --chat_template_path"):
        check_rows(tokenizer, [said("Hi", "Hello.")], config(), "data")
    tokenizer.chat_template = None
    with pytest.raises(ConfigurationError, match="no chat template, which rows of messages need"):
        check_rows(tokenizer, [said("Hi", "Hello.")], config(), "data")


@pytest.mark.parametrize("command", ["train", "dry_run", "inspect", "held_out"])
def test_no_model_is_loaded_and_nothing_written(command, model_dir, tmp_path, capsys, monkeypatch):
    template = tmp_path / "other.jinja"
    template.write_text((TEMPLATES / "glm4moe.jinja").read_text())
    data, held_out = tmp_path / "data.jsonl", tmp_path / "held_out.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in (said("Hi", "Hello."), calling('{"city": "Paris"}'))))
    for module in ("training.train.resolve_model", "training.plan.resolve_model", "inspection.inspect.find_model"):
        monkeypatch.setattr(f"eaft.{module}", lambda *a, **k: pytest.fail("a model is looked for"))
    out = tmp_path / "out"
    flags = {"dataset_name": data, "output_dir": out, "use_cpu": "true", "bf16": "false", "report_to": "none"}
    flags |= {"model_name_or_path": model_dir, "chat_template_path": template}
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    if command == "held_out":
        good = {"prompt": said("Hi")["messages"], "completion": [{"role": "assistant", "content": "Hello."}]}
        bad = {"prompt": said("Weather?")["messages"], "completion": calling('{"city": "Paris"}')["messages"][1:]}
        data.write_text(json.dumps({**good, "prompt": said("Bye")["messages"]}))
        held_out.write_text(json.dumps(good) + "\n" + json.dumps(bad))
        train = {name: str(value) for name, value in flags.items() if name != "output_dir"}
        train |= {"use_cpu": True, "bf16": False}
        evaluate = {"target_tasks": ["everyday"], "general_tasks": ["everyday"], "held_out": str(held_out)}
        recipe = {"output_dir": str(out), "objectives": {"sft": {"gate": "sft"}}, "train": train, "evaluate": evaluate}
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


def labelled(tokenizer, data, **settings):
    """Return each row's tokens and labels, as training has them."""
    prepared = prepare_rows(tokenizer, config(**settings), to_dataset(data)).whole
    return prepared["input_ids"][:], prepared["labels"][:]


MARKED = ["cohere", "cohere2", "gemma3", "lfm2_v2", "llama3", "qwen2_5_vl", "qwen3_instruct_2507"]


@pytest.mark.parametrize("wanted", [{"assistant_only_loss": True}, {"completion_only_loss": True}])
@pytest.mark.parametrize("name", MARKED)
def test_turns_are_the_tokens_that_trl_marks(name, wanted):
    data = [said("Hi you", "Hello.", "Bye", "See you."), said("Café?", "Ja, 咖啡.")]
    right = labelled(tokenizer_with(name), data, assistant_only_loss=True)  # TRL's own marked version of it
    assert any(label == -100 for label in right[1][0])
    assert labelled(tokenizer_with(name, "{# mine #}"), data, **wanted) == right
    assert labelled(tokenizer_with(name), data, **wanted) == right


@pytest.mark.parametrize("name", ["qwen2_5", "phi3", "glm4moe", "nemotron_3_nano", "qwen3_8", "gptoss", "qwen3"])
def test_a_single_turn_is_labelled_as_trl_labels_a_completion(name):
    tokenizer = tokenizer_with(name, "{# mine #}")
    whole = said("Hi you", "Hello.")
    split = {"prompt": whole["messages"][:1], "completion": whole["messages"][1:]}
    right = labelled(tokenizer, [split])
    assert labelled(tokenizer, [whole], assistant_only_loss=True) == right
    assert labelled(tokenizer, [split], assistant_only_loss=True) == right


def test_turns_that_cannot_be_found_are_refused_with_a_form_that_works():
    tokenizer = tokenizer_with("qwen3", "{# mine #}")  # leaves the empty thought out of earlier turns
    data = [said("Hi", "Hello."), said("Hi you", "Hello.", "Bye", "See you.")]
    with pytest.raises(ConfigurationError, match=r'Row 1: .*message 1 .*\{"prompt": .*"completion": '):
        labelled(tokenizer, data, assistant_only_loss=True)
