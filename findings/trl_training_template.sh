#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0, torch 2.13.0
# Behaviour: SFTTrainer with assistant_only_loss trains Qwen3 (and Qwen3.5, 3.6) on another text
#   than the model is ever asked with. It takes a training template of its own, in which each
#   earlier answer has an empty thought too ("<think>\n\n</think>\n\n"), and saves the model with
#   the old template, which gives that to the last answer only. Without assistant_only_loss, rows
#   are rendered with the old one.
# Whom it hurts: who trains on conversations of several turns: from the second answer on, the
#   context that was trained never comes when the model is served, and the one that comes was never
#   trained. Held-out loss, rendered by the same trainer, does not show it. The trainer says
#   nothing.
# Guess beforehand: the training template adds marks for the mask, and renders the same text.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf"
"$work/venv/bin/python" - "$work" 2> "$work/log" <<'E' || { cat "$work/log"; exit 1; }
import sys
from importlib.metadata import version
from pathlib import Path

import trl
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

print({name: version(name) for name in ("torch", "transformers", "trl")})
special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()) + special)}
backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
backend.add_tokens([AddedToken(token, normalized=False) for token in special])
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
turns = ("Hi", "Yo", "More", "So")
messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
templates = Path(trl.__file__).parent / "chat_templates"  # the models' own; trl ships them to know models by
same = {}
for family in ("qwen3", "qwen3_6", "qwen2_5"):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (templates / f"{family}.jinja").read_text()
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes, num_key_value_heads=2, head_dim=16))
    out = f"{sys.argv[1]}/{family}"
    args = trl.SFTConfig(out, assistant_only_loss=True, use_cpu=True, bf16=False, report_to=[])
    rows = Dataset.from_list([{"messages": messages}])
    trainer = trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.save_model()
    saved = AutoTokenizer.from_pretrained(out)
    trained = saved.decode(trainer.train_dataset[0]["input_ids"])
    asked = saved.apply_chat_template(messages[:3], add_generation_prompt=True, tokenize=False)
    same[family] = trained.startswith(asked)
    print(f"{family}: what is asked was trained: {same[family]}\n  trained {trained!r}\n  asked   {asked!r}")
assert same["qwen2_5"]
assert not same["qwen3"] and not same["qwen3_6"], "changed: what is trained is what is served"
E
