#!/usr/bin/env bash
# lm-eval 0.4.13, transformers 5.23.0, torch 2.13.0
# Behaviour: with --apply_chat_template, white space at the end of the template's generation prompt
#   (in ChatML the newline after "assistant") is moved from the context into each choice and scored
#   there. Every choice's log-likelihood then has log p(newline) in it. In acc that is the same for
#   all choices. acc_norm divides by the choice's own length, so it counts most against short
#   choices.
# Whom it hurts: who compares a base model's acc_norm with that of its chat-tuned model. The base
#   model is less sure of the newline, so its short answers lose; training on any rows of that
#   template gains acc_norm without a single answer getting likelier. Shown with two models that
#   differ in p(newline).
# Guess beforehand: a choice's score is that of the choice's own tokens.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 lm-eval==0.4.13 accelerate==1.15.0 datasets==5.2.0
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf"
"$work/venv/bin/python" - "$work" 2> "$work/log" <<'E' || { cat "$work/log"; exit 1; }
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print({name: version(name) for name in ("torch", "transformers", "lm-eval")})
work = sys.argv[1]
vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()) + ["<eos>"])}
backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
each = "{% for m in messages %}<{{ m.role }}>{{ '\\n' + m.content + '\\n' }}{% endfor %}"
tokenizer.chat_template = each + "<assistant>{{ '\\n' }}"
rows = [{"q": f"Is {i} even?", "choices": ["it is", "it is not so at all"], "gold": 0} for i in range(40)]
Path(f"{work}/rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
Path(f"{work}/task.yaml").write_text(
    f"task: task\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {work}/rows.jsonl}}}}\n"
    "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: gold\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
)
# A model by hand: each byte has one probability, whatever comes before, except the newline after ">"
config = LlamaConfig(vocab_size=257, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                     bos_token_id=None, eos_token_id=256, tie_word_embeddings=False)  # fmt: skip
model = LlamaForCausalLM(config)
layer, head, embedding = model.model.layers[0], model.lm_head.weight, model.model.embed_tokens.weight
with torch.no_grad():
    for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, head, embedding):
        weight.zero_()
    embedding[:, 0] = 1.0
    embedding[vocab[">"], 1] = 1.0
    head[[vocab[byte] for byte in "itsĠ"], 0] = 0.05  # the short choice's bytes are likelier
seen = {}
for name, logit in {"base": 0.0, "tuned": 3.0}.items():  # p(newline) is 0.004 and 1.000
    with torch.no_grad():
        head[vocab["Ċ"], 1] = logit
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, max_length=256)
    result = simple_evaluate(lm, tasks=["task"], task_manager=TaskManager(include_path=work), bootstrap_iters=0,
                             apply_chat_template=True, log_samples=True)  # fmt: skip
    seen[name] = {metric: result["results"]["task"][f"{metric},none"] for metric in ("acc", "acc_norm")}
    prompt, choice = result["samples"]["task"][0]["arguments"][0]
    scored = tokenizer.decode(lm._encode_pair(prompt, choice)[1])
    print(f"{name}: scored as the choice {choice!r}: {scored!r}, {seen[name]}")
assert scored == "\n" + choice, "changed: only the choice is scored"
assert seen["base"] == {"acc": 1.0, "acc_norm": 0.0} and seen["tuned"] == {"acc": 1.0, "acc_norm": 1.0}
E
