#!/usr/bin/env bash
# inspect_ai 0.3.285 (provider "hf"), transformers 5.23.0, torch 2.13.0, templates of trl 1.16.0
# Behaviour: the prompt that inspect_ai gives to a local model is not its chat template's. It always
#   passes enable_thinking, as None where nothing was set. Templates that ask "is it defined?" take
#   this for "no": GLM 4.5 and Nemotron 3 think by default, and get "<think></think>". And it renders
#   the template to text and then tokenizes it with special tokens: Llama 3 and Gemma get two BOS.
# Whom it hurts: who evaluates such a model, or a tuned one, which was trained on one BOS and with
#   thoughts: its scores are those of another prompt. The log has messages only, and shows neither.
# Guess beforehand: the model's own template decides what is not set, and BOS comes once.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 accelerate==1.15.0 inspect-ai==0.3.285
"$work/venv/bin/pip" install -q --no-deps trl==1.16.0 # for its files only: it is not imported
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf"
cd "$work"
"$work/venv/bin/python" - 2> "$work/log" <<'E' || { cat "$work/log"; exit 1; }
import asyncio
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from inspect_ai.model import ChatMessageUser, GenerateConfig, get_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print({name: version(name) for name in ("torch", "transformers", "inspect_ai", "trl")})
templates = Path(find_spec("trl").origin).parent / "chat_templates"  # the models' own; trl ships them
vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()) + ["<bos>", "<eos>"])}
sizes = dict(vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("model")


def compare(name, bos):
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:  # as the tokenizers of these models do
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = (templates / f"{name}.jinja").read_text()
    tokenizer.save_pretrained("model")
    model = get_model(f"hf/{name}", model_path="model", device="cpu", memoize=False)
    given, generate = [], model.api.model.generate

    def record(input_ids, **settings):
        given.append(input_ids[0].tolist())
        return generate(input_ids=input_ids, **settings)

    model.api.model.generate = record
    asyncio.run(model.generate([ChatMessageUser(content="Hi")], config=GenerateConfig(max_tokens=2)))
    messages = [{"role": "user", "content": "Hi"}]
    own = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    print(f"{name}: the same prompt: {own == given[0]}")
    print(f"  its template {tokenizer.decode(own)[-120:]!r}\n  inspect_ai   {tokenizer.decode(given[0])[-120:]!r}")
    return tokenizer.decode(own), tokenizer.decode(given[0])


for name in ("qwen3", "qwen2_5"):
    own, given = compare(name, bos=False)
    assert own == given
for name in ("nemotron_3_nano", "glm4moe"):
    own, given = compare(name, bos=False)
    assert "</think>" not in own and given.endswith("<think></think>"), "changed: thinks by default"
for name in ("gemma3", "llama3"):
    own, given = compare(name, bos=True)
    assert own.count("<bos>") == 1 and given == "<bos>" + own, "changed: one BOS"
E
