#!/usr/bin/env bash
# lm-eval 0.4.13, transformers 5.23.0, torch 2.13.0
# Behaviour: neither of lm-evaluation-harness's two caches knows all that its answers depend on.
#   --use_cache FILE keeps answers by request only, not by model: another model with the same FILE
#   gets the first one's answers. --cache_requests keeps requests by task, shots and tokenizer, with
#   the generation settings inside: another --gen_kwargs is announced, and not used.
# Whom it hurts: who measures a model before and after fine-tuning with one command in a loop: both
#   get the same score, to the last digit, which reads as "nothing was forgotten".
# Guess beforehand: the key holds the model and the settings, or the file is refused.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 lm-eval==0.4.13 accelerate==1.15.0 datasets==5.2.0
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf" LM_HARNESS_CACHE_PATH="$work/requests"
"$work/venv/bin/python" - "$work" 2> "$work/log" <<'E' || { cat "$work/log"; exit 1; }
import json
import sys
from importlib.metadata import version

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
with open(f"{work}/rows.jsonl", "w") as file:
    for i in range(50):
        row = {"q": f"{i} plus {i} is", "choices": [str(2 * i), str(2 * i + 1)], "gold": i % 2, "a": str(2 * i)}
        file.write(json.dumps(row) + "\n")
data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {work}/rows.jsonl}}}}\ntest_split: test\n"
choice = "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: gold\n"
free = "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
for name, text in {"choice": choice, "free": free}.items():
    with open(f"{work}/{name}.yaml", "w") as file:
        file.write(f"task: {name}\n{data}{text}")
tasks = TaskManager(include_path=work)


def answers(seed, task, **options):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3, eos_token_id=256))
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=25, max_length=256)
    result = simple_evaluate(lm, tasks=[task], task_manager=tasks, log_samples=True, bootstrap_iters=0, **options)
    return [sample["resps"] for sample in result["samples"][task]]


first, second = (answers(seed, "choice", use_cache=f"{work}/cache") for seed in (0, 1))
own = answers(1, "choice")
print(f"--use_cache: both models have the same answers: {first == second}; without: {first == own}")
same, changed = first == second, first == own
long, short = (answers(0, "free", gen_kwargs={"max_gen_toks": n}, cache_requests=True) for n in (12, 2))
uncached = answers(0, "free", gen_kwargs={"max_gen_toks": 2})
length = [max(len(answer[0][0]) for answer in each) for each in (long, short, uncached)]
print("--cache_requests: longest answer with max_gen_toks=12, then 2, and 2 without the cache:", length)
assert same and not changed, "changed: --use_cache tells models apart"
assert short == long != uncached, "changed: --cache_requests tells generation settings apart"
E
