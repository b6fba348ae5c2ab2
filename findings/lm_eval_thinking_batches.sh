#!/usr/bin/env bash
# lm-eval 0.4.13 (--model hf), transformers 5.23.0, torch 2.13.0
# Behaviour: with thinking on, a score depends on --batch_size. Generation ends when every row of
#   the batch has met the same stop text, also inside the thoughts; thoughts are taken off only
#   afterwards. Alone (batch size 1, the default), a model that writes the stop text in its thoughts
#   never answers; in company it goes on, and its answer is graded. (Rows are sorted: here batches
#   of 2 hold two alike.)
# Whom it hurts: who evaluates thinking models on tasks that stop at a blank line or at "Question:",
#   and compares runs of different batch sizes, machines, or batch_size=auto: a difference in score
#   is none of the models. The order of rows matters as well.
# Guess beforehand: batch size changes speed, and rounding; stop texts count after the thoughts.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 lm-eval==0.4.13 accelerate==1.15.0 datasets==5.2.0
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf"
"$work/venv/bin/python" - 2> "$work/log" <<'E' || { cat "$work/log"; exit 1; }
from importlib.metadata import version

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print({name: version(name) for name in ("torch", "transformers", "lm-eval")})
tokens = ["<eos>", "<pad>", "P", "Q", "so ", "\n\n", "then ", "hm ", "well ", "so, ", "that ", "is ", "</think>", "4"]
backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
backend.add_tokens([AddedToken(token, normalized=False) for token in tokens[2:]])
backend.decoder = decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
# A model of which token follows which, by hand: attention and MLP add nothing
chains = [["P", "so ", "\n\n", "then ", "</think>", "4", "<eos>"]]
chains += [["Q", "hm ", "well ", "so, ", "that ", "is ", "</think>", "4", "<eos>"]]
size = len(tokens)
config = LlamaConfig(vocab_size=size, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                     bos_token_id=None, eos_token_id=0, pad_token_id=1, tie_word_embeddings=False)  # fmt: skip
model = LlamaForCausalLM(config)
with torch.no_grad():
    for weight in (model.model.layers[0].self_attn.o_proj.weight, model.model.layers[0].mlp.down_proj.weight,
                   model.model.embed_tokens.weight, model.lm_head.weight):  # fmt: skip
        weight.zero_()
    model.model.embed_tokens.weight[range(size), range(size)] = 1.0
    for chain in chains:
        for token, following in zip(chain, chain[1:]):
            model.lm_head.weight[tokens.index(following), tokens.index(token)] = 10.0

settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
requests = [Instance("generate_until", {}, (prompt, settings), i) for i, prompt in enumerate("PQPQ")]
answers = {}
for size in (1, 2, 4):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=64, think_end_token="</think>")
    answers[size] = lm.generate_until(requests, disable_tqdm=True)
    print(f"batch size {size}: graded answers {answers[size]}, right {sum(a == '4' for a in answers[size])} of 4")
print("every row thinks and then answers 4; P's thoughts hold a blank line, which is a stop text of the task")
right = {size: sum(answer == "4" for answer in each) for size, each in answers.items()}
assert right == {1: 2, 2: 2, 4: 4}, "changed: the answers do not depend on the batch size"
E
