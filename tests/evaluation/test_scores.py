"""
Scores: filters beside each other, what was cut, prompts without a template, loading, progress.
"""

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from eaft.errors import ConfigurationError
from eaft.evaluation import engine, lm_eval_models, scores
from eaft.evaluation.asking import ask
from eaft.evaluation.lm_eval_models import load, wrap
from eaft.evaluation.model_settings import load_tokenizer
from eaft.evaluation.progress import Progress
from eaft.evaluation.protocol import Protocol
from eaft.evaluation.results import Asked, Cut
from eaft.evaluation.scores import asked, score
from eaft.evaluation.suite import load_suites
from tests.conftest import make_model, make_tokenizer
from tests.evaluation.test_tasks import Oracle

PLAIN = Protocol(apply_chat_template=False, batch_size=4)


@pytest.fixture
def write_task(tmp_path):
    """
    A function that makes a task of questions, to be answered in words or by one of two choices.
    """

    def write(name, questions, max_gen_toks=None):
        rows = [{"question": question, "choices": ["a", "bbb"]} for question in questions]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        kind = (
            "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target:"
            " 0\ntarget_delimiter: ''\nmetric_list: [{metric: acc, aggregation: mean,"
            " higher_is_better: true}]\n"
            if max_gen_toks is None
            else (
                "output_type: generate_until\ndoc_to_target: question\ngeneration_kwargs:"
                f" {{max_gen_toks: {max_gen_toks}, until: ['\\0']}}\nmetric_list: [{{metric:"
                " exact_match, aggregation: mean, higher_is_better: true}]\n"
            )
        )
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test:"
            f" {tmp_path}/{name}.jsonl}}}}\n"
            f'test_split: test\ndoc_to_text: "{{{{question}}}}"\nmetadata: {{version: 2.5}}\n{kind}'
        )
        return load_suites([name], str(tmp_path))[1][name]

    return write


@pytest.fixture
def lm(model_dir):
    return load(str(model_dir), load_tokenizer(str(model_dir)), PLAIN)


def test_gsm8k_has_both_its_scores(tmp_path):
    """Arithmetic that is right and not written as `#### N` is lost to the strict filter only."""
    rows = [{"question": str(i), "answer": f"<<1+1=2>> #### {i + 40}"} for i in range(3)]
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = load_suites(["gsm8k"], data_dir=str(tmp_path))[1]["gsm8k"]
    written = {"0": "#### 40", "1": "So it is 41.", "2": "#### 7"}
    protocol = Protocol(num_fewshot=0)
    found = score(Oracle(lambda prompt, doc: written[doc["question"]]), benchmark, protocol)
    assert [item.scores for item in found] == [
        {"strict-match": 1, "flexible-extract": 1},
        {"strict-match": 0, "flexible-extract": 1},
        {"strict-match": 0, "flexible-extract": 0},
    ]
    assert [(item.score, item.metric) for item in found] == [
        (s, "exact_match,strict-match") for s in (1, 0, 0)
    ]
    assert asked(benchmark, protocol, {"base": found, "sft": found[:1]}) == Asked(
        version=3.0,
        metric="exact_match",
        filter="strict-match",
        num_fewshot=0,
        max_gen_toks=256,
        cut=dict.fromkeys(("base", "sft"), Cut(prompt=0, answer=0, thoughts=0)),
    )
    assert asked(benchmark, Protocol(), {"base": found}).num_fewshot == 5


def test_prompts_cut_on_the_left(write_task, lm):
    """
    A byte is a token, the context has 256: a choice's last token is not read, an answer of 16
    leaves 240.
    """
    letters = write_task("letters", ["x" * n for n in (253, 254, 255, 300)])
    found = score(lm, letters, PLAIN)
    assert [item.cut for item in found] == [[], [], ["prompt"], ["prompt"]]
    assert found[0].scores is None
    # What is cut has no influence: the first byte of a prompt that has one too many
    ys, zs = (score(lm, write_task(c, [c + "x" * 253, c + "x" * 254]), PLAIN) for c in "yz")
    assert [a.choices[1] == b.choices[1] for a, b in zip(ys, zs, strict=True)] == [
        False,
        True,
    ]

    words = write_task("words", ["x" * n for n in (239, 240, 241, 900)], max_gen_toks=16)
    found = score(lm, words, PLAIN)
    assert ["prompt" in item.cut for item in found] == [False, False, True, True]
    assert asked(words, PLAIN, {"base": found}).cut["base"].prompt == 2


@pytest.mark.parametrize("batch_size", [1, 5])
def test_answers_cut_at_the_limit(write_task, batch_size):
    """As `generate` itself, prompt by prompt, ends with the end token or not."""
    tokenizer, limit = make_tokenizer(), 24
    model = make_model(initializer_range=0.5).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.eos_token_id] *= 1.6  # else no answer ends
    prompts = [f"question {i * i}" for i in range(10)] + ["question 1"]  # one of them twice
    protocol = Protocol(apply_chat_template=False, batch_size=batch_size)
    found = score(wrap(model, tokenizer, protocol), write_task("words", prompts, limit), protocol)
    ended = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        written = model.generate(ids, max_new_tokens=limit, do_sample=False)[0, ids.shape[1] :]
        ended.append(tokenizer.eos_token_id in written)
    assert [item.cut for item in found] == [[] if end else ["answer"] for end in ended]
    assert 1 < sum(ended) < 10


def test_a_tasks_settings_do_not_stay(write_task, lm, caplog):
    """What fits one model's context is not what another is asked with after it."""
    task = write_task("words", ["x"], max_gen_toks=500)
    small = Protocol(apply_chat_template=False, model_args={"max_length": 64})
    for protocol, most in ((small, 48), (PLAIN, 192), (small, 48)):
        model = wrap(lm.model, lm.tokenizer, protocol)
        model._max_length = protocol.model_args.get("max_length")
        (item,) = score(model, task, protocol)
        assert item.max_gen_toks == most == asked(task, protocol, {"": [item]}).max_gen_toks
        assert f"words: answers are cut at {most} tokens instead of 500" in caplog.text


def test_a_model_without_a_template_is_asked_in_plain_text(write_task, model_dir):
    tokenizer = load_tokenizer(str(model_dir))
    tokenizer.chat_template = None
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    for protocol in (Protocol(), Protocol(apply_chat_template=False)):
        assert ask(tokenizer, "Hi", protocol) == "Hi"
        assert ask(tokenizer, chat, protocol) == "s\n\nu\n\na"
    assert ask(tokenizer, "Hi", Protocol(system_instruction="Be brief.")) == "Be brief.\n\nHi"
    with pytest.raises(ConfigurationError, match="the model has no chat template"):
        ask(tokenizer, "Hi", Protocol(apply_chat_template=True))
    (item,) = score(
        load(str(model_dir), tokenizer, Protocol()), write_task("words", ["Hi"], 2), Protocol()
    )
    assert item.prompt == ask(tokenizer, "Hi", Protocol())


def test_a_prompt_is_asked_as_a_task_is(write_task, model_dir):
    """By the template, with a system instruction, and where the template knows none."""
    tokenizer, task = load_tokenizer(str(model_dir)), write_task("words", ["Hi"], 2)
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    for template in (tokenizer.chat_template, strict + tokenizer.chat_template):
        tokenizer.chat_template = template
        for protocol in (Protocol(), Protocol(system_instruction="Be brief.")):
            (item,) = score(load(str(model_dir), tokenizer, protocol), task, protocol)
            assert item.prompt == ask(tokenizer, "Hi", protocol)
            instructed = protocol.system_instruction is not None and not template.startswith(strict)
            assert ("Be brief." in item.prompt) == instructed


def test_lm_evals_own_arguments_work(model_dir, write_task):
    tokenizer = load_tokenizer(str(model_dir))
    args = {"max_length": 100, "attn_implementation": "eager", "parallelize": True}
    lm = load(str(model_dir), tokenizer, Protocol(dtype="bfloat16", model_args=args))
    assert (lm.max_length, lm.model.config._attn_implementation, lm.model.dtype) == (
        100,
        "eager",
        torch.bfloat16,
    )
    assert lm.model.hf_device_map  # it was spread by accelerate
    assert len(score(lm, write_task("letters", ["x", "y"]), Protocol())) == 2
    with pytest.raises(
        ConfigurationError, match=r"cannot be loaded, with model_args={'paralelize': True}"
    ):
        load(str(model_dir), tokenizer, Protocol(model_args={"paralelize": True}))


def test_an_adapter_keeps_the_rows_of_its_base_model(model_dir, tmp_path):
    """The tiny model has 264 rows for 259 tokens, as many have more; drift compares all of them."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(
        tmp_path
    )
    tokenizer = load_tokenizer(str(tmp_path))  # its base model's
    assert len(tokenizer) == 259
    lm = load(str(tmp_path), tokenizer, Protocol())
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = lm.model(ids).logits
        assert torch.equal(logits, AutoPeftModelForCausalLM.from_pretrained(tmp_path)(ids).logits)
        assert logits.shape[-1] == 264
        assert not torch.equal(logits, AutoModelForCausalLM.from_pretrained(model_dir)(ids).logits)


def test_what_cannot_be_loaded_is_one_message(model_dir, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(str(model_dir))
    (tmp_path / "config.json").write_text(Path(model_dir, "config.json").read_text())
    with pytest.raises(ConfigurationError, match=f"{tmp_path} cannot be loaded"):
        load(str(tmp_path), tokenizer, Protocol())
    with pytest.raises(ConfigurationError, match="has no tokenizer that can be loaded"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(model_dir)})
    )
    monkeypatch.setattr(lm_eval_models, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigurationError, match=r"holds a PEFT adapter: pip install 'eaft\[peft\]'"
    ):
        load(str(tmp_path), tokenizer, Protocol())


def test_processes_share_items_but_not_those_that_hold_one_model_together(monkeypatch):
    """Under `tp_plan` each process must run every item; the first has them."""
    made = {"model": make_model(), "_rank": 0, "_world_size": 1}
    monkeypatch.setattr(engine, "HFModel", lambda **args: SimpleNamespace(args=args, **made))
    monkeypatch.setattr(lm_eval_models, "Accelerator", lambda: "accelerator")
    state = SimpleNamespace(num_processes=2, process_index=1, device="cpu", is_main_process=False)
    monkeypatch.setattr(lm_eval_models, "processes", lambda: state)
    lm = load("model", None, Protocol())
    assert (lm._rank, lm._world_size, lm.accelerator) == (1, 2, "accelerator")
    lm = load("model", None, Protocol(model_args={"tp_plan": "auto"}))
    assert (lm._rank, lm._world_size, lm.args["tp_plan"]) == (0, 1, "auto")


def test_items_are_the_first_processs(write_task, lm, monkeypatch):
    task = write_task("letters", ["x", "y"])
    assert len(score(lm, task, PLAIN)) == 2
    monkeypatch.setattr(scores, "processes", lambda: SimpleNamespace(is_main_process=False))
    assert score(lm, task, PLAIN) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line(write_task, lm, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(3)
    score(lm, write_task("letters", [f"{i}?" for i in range(6)]), PLAIN, progress)
    assert progress.bar.n == pytest.approx(6)
    assert progress.tokens == 16 + 16 + 8  # 6 of 4 tokens and 6 of 2, in batches of 4, padded
    score(lm, write_task("words", [f"{i}?" for i in range(5)], 3), PLAIN, progress)
    assert progress.bar.n == pytest.approx(5)
    progress.bar.refresh()
    line = terminal.getvalue().rpartition("\r")[2]
    assert re.fullmatch(r"task 2 of 3, words: 5 of 5 items, \d+ tokens/s, 00:00 left *", line)
    assert "\n" not in terminal.getvalue()
    progress.close()
    assert terminal.getvalue().rpartition("\r")[2].strip() == ""


def test_a_pipe_stays_empty(write_task, lm, capfd):
    progress = Progress(2)
    score(lm, write_task("letters", ["1?", "2?"]), PLAIN, progress)
    score(lm, write_task("words", ["1?", "2?"], 3), PLAIN, progress)
    progress.close()
    assert capfd.readouterr() == ("", "")
