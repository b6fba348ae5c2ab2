"""
What a model generates by is what is saved with it: an adapter's end token, as a whole model's.
"""

import json

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from eaft import cli
from eaft.evaluation.comparable import differing
from eaft.evaluation.lm_eval_models import vllm_args
from eaft.evaluation.model_settings import end_tokens, generation_config
from tests.conftest import chain_model, make_tokenizer

PROMPT = [{"role": "user", "content": "What?"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """
    Ends with `<|endoftext|>`, which its chat template never writes; goes on after `<|im_end|>`.
    """
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    model = chain_model(tokenizer, "\nOK<|im_end|>xyx")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(repetition_penalty=1.01, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """Trained to end with `<|im_end|>`."""
    folder = tmp_path_factory.mktemp("run")
    row = {"prompt": PROMPT, "completion": [{"role": "assistant", "content": "OK"}]}
    (folder / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    flags = {
        "model_name_or_path": base,
        "dataset_name": folder / "rows.jsonl",
        "output_dir": folder / "out",
    }
    flags |= {
        "eos_token": "<|im_end|>",
        "gate": "sft",
        "lora_r": 4,
        "max_steps": 2,
        "save_steps": 1,
    }
    flags |= {"learning_rate": 1e-9, "bf16": "false", "report_to": "none", "disable_tqdm": "true"}
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    assert cli.main(["train", "--use_peft", "--use_cpu", *argv]) == 0
    return folder / "out"


def test_an_adapter_is_saved_with_what_it_generates_by(base, adapter):
    """
    Also each checkpoint; and one that was saved without it stops at its tokenizer's end token.
    """
    own = make_tokenizer().eos_token_id
    ends = [own, GenerationConfig.from_pretrained(base).eos_token_id]
    for folder in (adapter, adapter / "checkpoint-1"):
        saved = GenerationConfig.from_pretrained(folder)
        assert saved.eos_token_id == ends
        assert saved.repetition_penalty == 1.01
        file = folder / "generation_config.json"
        found, text = generation_config(str(folder)), file.read_text()
        assert found == saved
        file.unlink()
        assert end_tokens(generation_config(str(folder))) == ends
        file.write_text(text)
    assert end_tokens(generation_config(str(base))) == ends[1:]
    assert vllm_args(str(adapter), "folder", {})["generation_config"] == "folder"


@pytest.mark.parametrize("saved", [True, False])
def test_an_adapter_stops_at_the_end_token_it_was_trained_with(saved, base, adapter, tmp_path):
    """
    Right: transformers' own generate up to that token. The report says that the models differ.
    """
    if not saved:
        (adapter / "generation_config.json").unlink()
    tokenizer = make_tokenizer()
    asked = tokenizer.apply_chat_template(
        PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    model = AutoModelForCausalLM.from_pretrained(adapter)
    said = model.generate(
        asked, eos_token_id=tokenizer.eos_token_id, do_sample=False, max_new_tokens=20
    )
    right = tokenizer.decode(said[0, asked.shape[1] :], skip_special_tokens=True)

    (tmp_path / "rows.jsonl").write_text('{"q": "What?", "a": "OK"}\n' * 2)
    (tmp_path / "words.yaml").write_text(
        "task: words\ndataset_path: json\ndataset_kwargs: {data_files: {test:"
        f" {tmp_path}/rows.jsonl}}}}\ntest_split: test\noutput_type: generate_until\ndoc_to_text:"
        " '{{q}}'\ndoc_to_target: '{{a}}'\nmetric_list: [{metric:"
        " exact_match}]\ngeneration_kwargs: {until: ['Q:'], max_gen_toks: 20, do_sample:"
        " false}\n"
    )
    argv = [
        "eval",
        adapter,
        "--base",
        base,
        "--suite",
        tmp_path / "words.yaml",
        "--drift_prompts",
        0,
    ]
    assert cli.main([str(part) for part in [*argv, "--output_path", tmp_path / "out"]]) == 0
    items = [json.loads(line) for line in (tmp_path / "out" / "items_after" / "words.jsonl").open()]
    assert [item["response"] for item in items] == [right] * 2
    differs = json.loads((tmp_path / "out" / "results.json").read_text())["differs"]
    assert differs["end_tokens"] == {
        "base": ["<|endoftext|>"],
        "model": ["<|endoftext|>", "<|im_end|>"],
    }
    assert set(differs) == {"end_tokens", "tokenizer"}
    assert (
        "The models differ in more than weights**: end tokens"
        in (tmp_path / "out" / "results.md").read_text()
    )


def test_a_model_does_not_differ_from_itself(base):
    assert differing(str(base), str(base), {}) == {}
