"""
Models that think, on tiny ones that write what a test says: asked on and off, thoughts stripped,
cut, refused.
"""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from eaft.errors import ConfigurationError
from eaft.evaluation.asking import ask, check_thinking, settled
from eaft.evaluation.lm_eval_models import load, wrap
from eaft.evaluation.model_settings import load_tokenizer
from eaft.evaluation.protocol import Protocol
from eaft.evaluation.results import Cut
from eaft.evaluation.scores import asked, score
from eaft.evaluation.suite import Benchmark, load_suites
from eaft.evaluation.thinking import NONE, Thinking, decide, find_thinking, is_open, split_thoughts
from tests.conftest import CHAT_TEMPLATE, make_model, make_tokenizer

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
)
TEMPLATES = {
    # As Qwen3's: an empty thought is the beginning of an answer without one
    "switch": (
        CHAT
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined"
        " and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    # As Qwen3.5's: both modes begin in the prompt
    "both": (
        CHAT
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined"
        " and enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{%"
        " endif %}"
    ),
    # As DeepSeek-V3.1's: off by itself, and another name
    "named": (
        CHAT + "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if thinking is defined and thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
    ),
    # As Qwen3-Thinking's
    "always": CHAT + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    # As the first DeepSeek-R1-Distill's: thoughts are known, but begun by the model itself
    "itself": CHAT + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "never": CHAT_TEMPLATE,
}
EMPTY = "<think>\n\n</think>\n\n"


def tokenizer_of(template):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (
            "switch",
            Thinking(
                {"enable_thinking": True}, {"enable_thinking": False}, False, "<think>", "</think>"
            ),
        ),
        (
            "both",
            Thinking(
                {"enable_thinking": True}, {"enable_thinking": False}, False, "<think>", "</think>"
            ),
        ),
        ("named", Thinking({"thinking": True}, {"thinking": False}, False, "<think>", "</think>")),
        ("always", Thinking({}, {}, True, "<think>", "</think>")),
        ("itself", Thinking({}, {}, False, "<think>", "</think>")),
        ("never", NONE),
    ],
)
def test_thinking_is_found_in_the_template(template, found):
    assert find_thinking(tokenizer_of(template)) == found


def test_thinking_is_found_in_the_templates_of_real_models():
    """TRL has their copies. None that can be turned off begins thoughts when it is."""
    from trl import chat_template_utils

    found = {}
    for file in sorted(
        (Path(chat_template_utils.__file__).parent / "chat_templates").glob("*.jinja")
    ):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = file.read_text()
        tokenizer.bos_token = "<bos>"
        found[file.stem] = find_thinking(tokenizer)
        if found[file.stem].off:
            assert not is_open(ask(tokenizer, "Hi", Protocol()), found[file.stem].start)
    for name in ("qwen3", "glm4moe", "nemotron_3_nano"):
        assert found[name] == Thinking(
            {"enable_thinking": True}, {"enable_thinking": False}, False, "<think>", "</think>"
        )
    assert found["deepseek_r1_distill"] == Thinking({}, {}, True, "<think>", "</think>")
    assert (found["gemma4_v5"].start, found["gemma4_v5"].end) == ("<|channel>thought", "<channel|>")
    assert found["gptoss"].end == "<|end|><|start|>assistant<|channel|>final<|message|>"
    assert found["lfm2_2_5"] == Thinking({}, {}, False, "<think>", "</think>")
    for name in ("qwen2_5", "qwen3_instruct_2507", "llama3", "gemma3", "phi3"):
        assert found[name] == NONE


@pytest.mark.parametrize(
    ("prompt", "text", "start", "end", "answer"),
    [
        ("", "<think>a</think>b", None, None, "<think>a</think>b"),
        ("", "<think>a</think>\n\nb", "<think>", "</think>", "\n\nb"),
        ("", "<think>a</think>b</think>c", "<think>", "</think>", "c"),  # as lm-eval does
        ("", " <think>a", "<think>", "</think>", None),
        ("", "a <think>", "<think>", "</think>", "a <think>"),
        ("<think>\n", "a", "<think>", "</think>", None),
        ("<think>\n\n</think>\n\n", "a", "<think>", "</think>", "a"),
        ("", "a", "<start>", "<end>", "a"),
        ("", "<start>a<end>b", "<start>", "<end>", "b"),
    ],
)
def test_thoughts_are_split_off(prompt, text, start, end, answer):
    assert split_thoughts(prompt, text, start, end) == answer


OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n"
OTHERS = {
    # Ends without a slash, and known from what is cut from old answers
    "deep": (
        CHAT.replace("</think>", "<|reply|>") + OPENS + "<|deep|>{% endif %}",
        {},
        True,
        "<|deep|>",
        "<|reply|>",
    ),
    # As Seed-OSS's: a budget of 0 renders an empty thought
    "budget": (
        CHAT.replace("</think>", "</s:t>")
        + OPENS
        + "{% if thinking_budget is defined and thinking_budget == 0 %}"
        "<s:t>none</s:t>{% endif %}{% endif %}",
        {"thinking_budget": 0},
        False,
        "<s:t>",
        "</s:t>",
    ),
    # As Cohere's: thoughts are rendered from a field of the message
    "field": (
        (
            "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}<|START|>{{"
            " m.reasoning_content }}<|END|>{% endif %}{{ m.content }}<|im_end|>{% endfor %}{% if"
            " add_generation_prompt %}[assistant]{% if reasoning is defined and not reasoning"
            " %}<|START|><|END|>{% endif %}{% endif %}"
        ),
        {"reasoning": False},
        False,
        "<|START|>",
        "<|END|>",
    ),
    # The switch changes the instruction, and the prompt still begins thoughts
    "left": (
        "{% if enable_thinking is defined and not enable_thinking %}[system]Be brief.{% endif %}"
        + TEMPLATES["always"],
        {"enable_thinking": False},
        True,
        "<think>",
        "</think>",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_ends_and_switches(name):
    template, *found = OTHERS[name]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    thinking = find_thinking(tokenizer)
    assert [thinking.off, thinking.opens, thinking.start, thinking.end] == found
    assert decide(tokenizer, None) is thinking.opens
    assert is_open(ask(tokenizer, "Hi", Protocol()), thinking.start) is thinking.opens


def test_a_system_message_that_turns_thoughts_off():
    """As Nemotron Nano v2's."""
    tokenizer = make_tokenizer()
    shut = (
        "{% if '/no_think' in messages[0].content %}<think></think>{% else %}<think>\n{% endif %}{%"
        " endif %}"
    )
    tokenizer.chat_template = CHAT + OPENS + shut
    assert decide(tokenizer, None)
    assert not decide(tokenizer, False, system="/no_think")
    with pytest.raises(ConfigurationError, match="--system_instruction /no_think"):
        decide(tokenizer, False)


def test_what_begins_or_ends_thoughts_must_be_known():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        CHAT.replace(".split('</think>')[-1]", "") + OPENS + "<|deep|>{% endif %}"
    )
    with pytest.raises(
        ConfigurationError,
        match=r"^thinking: .*begins each answer with '<\|deep\|>'.*think_end_token",
    ):
        settled(Protocol(), tokenizer)
    assert settled(Protocol(model_args={"think_end_token": "<|reply|>"}), tokenizer).enable_thinking
    tokenizer.chat_template = CHAT_TEMPLATE
    named = {"think_end_token": "<|reply|>"}
    with pytest.raises(
        ConfigurationError, match=r"^thinking: '<\|reply\|>' ends .* what begins them is unknown"
    ):
        settled(Protocol(model_args=named), tokenizer)
    assert not settled(
        Protocol(model_args={**named, "think_start_token": "<|deep|>"}), tokenizer
    ).enable_thinking


@pytest.mark.parametrize(
    ("template", "wanted", "prompt"),
    [
        ("switch", None, EMPTY),
        ("switch", False, EMPTY),
        ("switch", True, ""),
        ("both", None, EMPTY),
        ("both", True, "<think>\n"),
        ("named", None, "</think>"),
        ("named", True, "<think>"),
        ("always", None, "<think>\n"),
        ("always", True, "<think>\n"),
        ("itself", None, ""),
        ("itself", True, ""),
        ("never", None, ""),
        ("never", False, ""),
    ],
)
def test_the_mode_asked_for(template, wanted, prompt):
    """Off wherever it can be, unless it is asked for; every prompt is in the mode."""
    tokenizer, protocol = tokenizer_of(template), Protocol(enable_thinking=wanted)
    thinks = template == "always" or wanted is True
    assert settled(protocol, tokenizer) == Protocol(
        apply_chat_template=True, enable_thinking=thinks
    )
    assert (
        ask(tokenizer, "Hi", protocol)
        == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{prompt}"
    )


@pytest.mark.parametrize(
    ("template", "protocol", "message"),
    [
        (
            "always",
            Protocol(enable_thinking=False),
            "enable_thinking=False: this chat template always begins",
        ),
        (
            "never",
            Protocol(enable_thinking=True),
            "enable_thinking=True: this chat template knows no thinking",
        ),
        ("switch", Protocol(False, enable_thinking=True), "by its chat template only"),
        ("switch", Protocol(model_args={"enable_thinking": True}), "model_args: enable_thinking"),
    ],
)
def test_what_cannot_be_is_refused(template, protocol, message):
    with pytest.raises(ConfigurationError, match=message):
        settled(protocol, tokenizer_of(template))


def test_an_unknown_end_of_thoughts_must_be_named():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if enable_thinking %}Think.{% endif %}" + CHAT_TEMPLATE
    assert settled(Protocol(), tokenizer).enable_thinking is False
    with pytest.raises(ConfigurationError, match="what ends this model's thoughts is unknown"):
        settled(Protocol(enable_thinking=True), tokenizer)
    named = Protocol(enable_thinking=True, model_args={"think_end_token": "</thought>"})
    assert settled(named, tokenizer).enable_thinking is True


@pytest.fixture
def tasks(tmp_path):
    """
    `words`, to be answered in words, with a stop string; `letter`, a choice of two; `begun`, one
    that is begun.
    """
    rows = [{"question": f"{i}?", "answer": f"right {i}", "choices": ["A", "B"]} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        "dataset_path: json\ndataset_kwargs: {data_files: {test:"
        f' {tmp_path}/rows.jsonl}}}}\ntest_split: test\ndoc_to_text: "{{{{question}}}}"\n'
    )
    words = (
        f"{common}output_type: generate_until\ndoc_to_target: answer\ngeneration_kwargs:"
        " {max_gen_toks: 12, until: ['STOP']}\nmetric_list: [{metric: exact_match, aggregation:"
        " mean, higher_is_better: true}]\n"
    )
    letter = (
        f"{common}output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: 0\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    for name, text in (
        ("words", words),
        ("letter", letter),
        ("begun", f'{letter}gen_prefix: "Answer:"\n'),
    ):
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{text}")
    return load_suites(["words", "letter", "begun"], str(tmp_path))[1]


class Writer(LlamaForCausalLM):
    """A model that writes to each prompt what it is told to, token by token, then ends."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids, attention_mask=None, **kwargs):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for i, row in enumerate(input_ids):
            prompt, _, written = self.tokenizer.decode(row).rpartition("<|im_start|>assistant\n")
            text = self.script[prompt.rpartition("user\n")[2][0]]  # by the question's number
            written = written.removeprefix(EMPTY).removeprefix(
                "<think>\n"
            )  # which the prompt ended with
            rest = self.tokenizer(text)["input_ids"][len(self.tokenizer(written)["input_ids"]) :]
            logits[i, -1, rest[0] if rest else self.tokenizer.eos_token_id] = 1.0
        return CausalLMOutput(logits=logits)


def writer(tokenizer, script):
    model = make_model(max_position_embeddings=512)
    model.resize_token_embeddings(264)
    model.__class__ = Writer
    model.tokenizer, model.script = tokenizer, script
    return model


LONG = "thought " * 20
SCRIPT = {
    "0": "<think>is it STOP?</think>\n\nright 0",  # a stop string in the thoughts is none
    "1": "<think>hm</think>\n\nright 1STOP and more",  # in the answer it is one
    "2": f"<think>{LONG}right 2",  # never ends
    "3": "right 3",  # no thoughts at all: an answer
    "4": f"<think>hm</think>\n\nright 4{'!' * 200}",  # an answer without end
    "5": "<think>right 5",  # ends within its thoughts
}
RESPONSES = ["right 0", "right 1", "", "right 3", None, ""]
CUTS = [[], [], ["thoughts"], [], ["answer"], ["thoughts"]]


@pytest.mark.parametrize("batch_size", [1, 3, 6])
def test_thoughts_are_no_answers(tasks, batch_size):
    tokenizer = tokenizer_of("switch")
    protocol = Protocol(enable_thinking=True, max_thinking_tokens=60, batch_size=batch_size)
    items = score(wrap(writer(tokenizer, SCRIPT), tokenizer, protocol), tasks["words"], protocol)
    assert [item.score for item in items] == [1, 1, 0, 1, 0, 0]
    assert [item.cut for item in items] == CUTS
    for item, response in zip(items, RESPONSES, strict=True):
        assert (
            item.response.startswith("right 4!!!!")
            if response is None
            else item.response == response
        )
        assert item.max_gen_toks == 12 + 60
    about = asked(tasks["words"], protocol, {"after": items})
    assert about.cut == {"after": Cut(prompt=0, answer=1, thoughts=2)}


@pytest.mark.parametrize("batch_size", [1, 6])
def test_thoughts_that_the_prompt_begins(tasks, batch_size):
    """As above, but that nothing before the end can be an answer."""
    tokenizer = tokenizer_of("always")
    protocol = Protocol(max_thinking_tokens=60, batch_size=batch_size)
    script = {key: text.removeprefix("<think>") for key, text in SCRIPT.items()}
    items = score(wrap(writer(tokenizer, script), tokenizer, protocol), tasks["words"], protocol)
    assert [item.score for item in items] == [1, 1, 0, 0, 0, 0]
    assert [item.cut for item in items] == [
        [],
        [],
        ["thoughts"],
        ["thoughts"],
        ["answer"],
        ["thoughts"],
    ]


def test_an_end_that_is_a_special_token(tasks):
    """lm-eval decodes answers without them."""
    tokenizer = tokenizer_of("switch")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<think>", "</think>"]}
    )
    protocol = Protocol(enable_thinking=True, max_thinking_tokens=60, batch_size=6)
    items = score(wrap(writer(tokenizer, SCRIPT), tokenizer, protocol), tasks["words"], protocol)
    assert [item.score for item in items] == [1, 1, 0, 1, 0, 0]
    assert [item.cut for item in items] == CUTS


def test_without_thinking_nothing_is_stripped_and_stop_strings_stop(tasks):
    tokenizer = tokenizer_of("switch")
    script = {str(i): f"right {i}" for i in range(4)}
    script |= {"4": f"right 4STOP{'!' * 200}", "5": f"right 5{'!' * 200}"}
    protocol = Protocol(batch_size=2)
    items = score(wrap(writer(tokenizer, script), tokenizer, protocol), tasks["words"], protocol)
    assert [item.score for item in items] == [1, 1, 1, 1, 1, 0]
    assert [item.cut for item in items] == [[]] * 5 + [["answer"]]
    assert all(item.prompt.endswith(EMPTY) and item.max_gen_toks == 12 for item in items)
    assert items[5].response == "right 5!!!!!"


def test_thoughts_of_a_model_that_was_not_to_think_are_no_answers(tasks):
    """
    As LFM2.5's and Kimi's: there is nothing in the prompt that says so. Special tokens are no text.
    """
    tokenizer = tokenizer_of("itself")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<think>", "</think>"]}
    )
    script = {str(i): f"<think></think>right {i}" for i in range(5)} | {"5": "<think>never ends"}
    items = score(
        wrap(writer(tokenizer, script), tokenizer, Protocol()), tasks["words"], Protocol()
    )
    assert [item.response for item in items] == [*(f"right {i}" for i in range(5)), ""]
    assert [item.cut for item in items] == [[]] * 5 + [["thoughts"]]


def test_choices_are_asked_without_thinking(tasks, tmp_path):
    """Tasks of both kinds, in one group too, are asked each in its mode."""
    tokenizer = tokenizer_of("both")
    protocol = Protocol(enable_thinking=True, max_thinking_tokens=20)
    lm = wrap(writer(tokenizer, {str(i): "no" for i in range(6)}), tokenizer, protocol)
    group = Benchmark(
        "group", {name: tasks[name].tasks[name] for name in ("letter", "words")}, limit=2
    )
    check_thinking({**tasks, "group": group}, tokenizer, protocol)
    items = score(lm, group, protocol)
    assert [item.task for item in items] == ["letter", "letter", "words", "words"]
    assert [item.prompt.endswith(EMPTY) for item in items] == [True, True, False, False]
    assert [item.prompt.endswith("<think>\n") for item in items] == [False, False, True, True]


def test_choices_are_refused_where_thoughts_cannot_be_turned_off(tasks):
    tokenizer = tokenizer_of("always")
    with pytest.raises(
        ConfigurationError, match=r"^letter: the likelihood of the choices .* Leave these tasks out"
    ):
        check_thinking(tasks, tokenizer, Protocol())
    with pytest.raises(ConfigurationError, match=r"^letter: "):
        score(wrap(writer(tokenizer, {}), tokenizer, Protocol()), tasks["letter"], Protocol())
    with pytest.raises(ConfigurationError, match=r"^letter: "):
        check_thinking(tasks, tokenizer_of("itself"), Protocol(enable_thinking=True))
    for template, protocol in (
        ("always", Protocol(False)),
        ("switch", Protocol()),
        ("itself", Protocol()),
    ):
        check_thinking(tasks, tokenizer_of(template), protocol)
    check_thinking({name: tasks[name] for name in ("words", "begun")}, tokenizer, Protocol())


def test_room_for_thoughts_is_fitted_to_the_context(tasks, caplog):
    tokenizer, protocol = tokenizer_of("switch"), Protocol(enable_thinking=True)
    items = score(wrap(writer(tokenizer, SCRIPT), tokenizer, protocol), tasks["words"], protocol)
    assert {item.max_gen_toks for item in items} == {384}  # three quarters of a context of 512
    assert "words: answers are cut at 384 tokens instead of 8204" in caplog.text
    assert [item.score for item in items] == [1, 1, 0, 1, 0, 0]
    # The task is as it was, and says so again
    assert tasks["words"].tasks["words"].config.generation_kwargs["max_gen_toks"] == 12


def test_thinking_off_is_lm_evals_own_run(model_dir, tasks, tmp_path):
    """
    The same prompts and answers as `lm_eval --model_args enable_thinking=False`, from a random
    model.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer(str(model_dir))
    tokenizer.chat_template = TEMPLATES["switch"]
    protocol = Protocol(batch_size=4)
    for name in ("words", "letter"):
        ours = score(load(str(model_dir), tokenizer, protocol), tasks[name], protocol)
        task = copy.copy(tasks[name].tasks[name])
        task.config.num_fewshot = 0
        theirs = evaluate(
            HFLM(
                str(model_dir),
                tokenizer=tokenizer,
                device="cpu",
                batch_size=4,
                enable_thinking=False,
            ),
            {"tasks": {name: task}},
            apply_chat_template=True,
            log_samples=True,
        )["samples"][name]
        assert [item.prompt_hash for item in ours] == [sample["prompt_hash"] for sample in theirs]
        if name == "words":
            assert [item.response for item in ours] == [sample["resps"][0][0] for sample in theirs]
            assert any(item.response for item in ours)
        else:
            assert [item.choices for item in ours] == [
                [r[0][0] for r in sample["resps"]] for sample in theirs
            ]


def test_vllm_is_asked_and_cut_likewise(tasks):
    """vLLM itself needs a GPU: a stand-in for what lm-eval's model hands on from it."""
    from lm_eval.api.model import LM
    from lm_eval.models.utils import postprocess_generated_text

    from eaft.evaluation.engine import WatchedVLLM

    tokenizer = tokenizer_of("switch")

    class VLLM(LM):
        """
        As lm-eval 0.4.13's: longest prompt first, settings of its own to the cache hook, thoughts
        stripped.
        """

        max_length = 512

        def __init__(self):
            super().__init__()
            self.tokenizer, self.chat_template_args, self.enable_thinking = tokenizer, {}, None

        def apply_chat_template(self, chat, add_generation_prompt=True):
            return self.tokenizer.apply_chat_template(
                chat,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=self.enable_thinking,
                **self.chat_template_args,
            )

        tokenizer_name = "name"

        def tok_encode(self, text):
            return self.tokenizer(text)["input_ids"]

        def _model_generate(self, requests, generate=False, sampling_params=None):
            outputs = []
            for ids in requests:
                text = SCRIPT[self.tokenizer.decode(ids).rpartition("user\n")[2][0]]
                reason = "length" if len(text) > sampling_params else "stop"
                written = SimpleNamespace(
                    text=text[:sampling_params], finish_reason=reason, token_ids=[0] * 3
                )
                outputs.append(SimpleNamespace(outputs=[written]))
            return outputs

        def generate_until(self, requests, disable_tqdm=False):
            order = sorted(range(len(requests)), key=lambda i: requests[i].args[0], reverse=True)
            answers = [None] * len(requests)
            for i in order:
                prompt, settings = requests[i].args
                most = settings["max_gen_toks"]
                (output,) = self._model_generate(
                    [self.tok_encode(prompt)], generate=True, sampling_params=most
                )
                until = [*settings["until"], "<|im_end|>"]
                answers[i] = postprocess_generated_text(
                    output.outputs[0].text, until, self.think_end_token
                )
                self.cache_hook.add_partial(
                    "generate_until", (prompt, {"until": until}), answers[i]
                )
            return answers

        loglikelihood = loglikelihood_rolling = None

    lm = type("VLLMModel", (WatchedVLLM, VLLM), {})()
    protocol = Protocol(enable_thinking=True, max_thinking_tokens=60, backend="vllm")
    items = score(lm, tasks["words"], protocol)
    assert [item.score for item in items] == [1, 1, 0, 1, 0, 0]
    assert [item.cut for item in items] == CUTS
    off = score(lm, tasks["words"], Protocol(backend="vllm"))
    assert all(item.prompt.endswith(EMPTY) for item in off)
