#!/usr/bin/env bash
# lm-eval 0.4.13 (--model hf), transformers 5.23.0, torch 2.13.0
# Behaviour: "greedy" in lm-evaluation-harness (do_sample=False, each task's default) is not the
#   most probable token. What the model's folder says in generation_config.json still holds, except
#   for sampling: repetition_penalty, no_repeat_ngram_size, suppress_tokens, num_beams, and
#   max_new_tokens, which beats the task's own limit. Qwen2.5's folders, for example, ship a
#   repetition_penalty.
# Whom it hurts: who compares a base model with a fine-tuned folder that lost or gained that file
#   (merging and exporting tools drop it; adapters have none): two ways of decoding are compared,
#   not two models.
# Guess beforehand: greedy is argmax, and the answer's length is the task's.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 lm-eval==0.4.13 accelerate==1.15.0 datasets==5.2.0
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf"
"$work/venv/bin/python" - "$work" 2> "$work/log" <<'E' || { cat "$work/log"; exit 1; }
import sys
from importlib.metadata import version

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print({name: version(name) for name in ("torch", "transformers", "lm-eval")})
vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()) + ["<eos>"])}
backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
torch.manual_seed(0)
sizes = dict(vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3, bos_token_id=None, eos_token_id=256))
settings = {"max_gen_toks": 16, "do_sample": False, "until": ["<eos>"]}  # what a task says
prompts = [f"{i} plus {i} is" for i in range(40)]
requests = [Instance("generate_until", {}, (prompt, settings), i) for i, prompt in enumerate(prompts)]


def answers(**folder):
    model.generation_config = GenerationConfig(eos_token_id=256, **folder)
    model.save_pretrained(f"{sys.argv[1]}/model")
    tokenizer.save_pretrained(f"{sys.argv[1]}/model")
    lm = HFLM(pretrained=f"{sys.argv[1]}/model", batch_size=8, device="cpu", dtype="float32", max_length=256)
    return lm.generate_until(requests, disable_tqdm=True)


plain, changed = answers(), {}
for field, value in {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05, "no_repeat_ngram_size": 3,
                     "suppress_tokens": list(range(0, 257, 8)), "num_beams": 2, "max_new_tokens": 4}.items():  # fmt: skip
    sampling = {"do_sample": True} if field in ("temperature", "top_p") else {}
    changed[field] = sum(a != b for a, b in zip(plain, answers(**{field: value}, **sampling), strict=True))
    print(f"{field} in generation_config.json: {changed[field]} of {len(plain)} greedy answers differ")
assert changed.pop("temperature") == changed.pop("top_p") == 0
assert min(changed.values()) > 0, f"changed: greedy ignores {[field for field, n in changed.items() if n == 0]}"
E
