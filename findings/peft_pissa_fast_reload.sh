#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0, transformers 5.23.0
# Behaviour: a LoRA adapter made with init_lora_weights="pissa_niter_4" (the fast PiSSA) and saved
#   is another model each time it is loaded. PiSSA subtracts its start from the base weights.
#   Loading repeats that, and the fast decomposition is drawn at random. Plain "pissa" comes back
#   exactly.
# Whom it hurts: who resumes, evaluates or selects checkpoints of such an adapter. Every load has an
#   error of its own, here half of what training changed, and one adapter loaded twice is compared
#   with itself as if it were two models. Nothing is said.
# Guess beforehand: what is saved is what is loaded; the fast way costs accuracy at the start only.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 peft==0.21.2
"$work/venv/bin/python" - "$work" <<'E'
import sys
from importlib.metadata import version

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, logging

logging.disable_progress_bar()
print({name: version(name) for name in ("torch", "transformers", "peft")})
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(f"{sys.argv[1]}/base")
ids = torch.arange(1, 33)[None]


def base():
    return LlamaForCausalLM.from_pretrained(f"{sys.argv[1]}/base", dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(ids).logits


error = {}
for init in ("pissa", "pissa_niter_4"):
    config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", init_lora_weights=init)
    model = get_peft_model(base(), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    for _ in range(10):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained, moved = logits(model), (logits(model) - logits(base())).norm()
    model.save_pretrained(f"{sys.argv[1]}/{init}")
    loads = [logits(PeftModel.from_pretrained(base(), f"{sys.argv[1]}/{init}")) for _ in range(3)]
    error[init] = [round(((load - trained).norm() / moved).item(), 4) for load in loads]
    print(f"{init}: error of three loads, relative to what training changed: {error[init]}")
assert max(error["pissa"]) < 1e-3
fast = error["pissa_niter_4"]
assert min(fast) > 0.02 and len(set(fast)) == 3, "changed: the fast PiSSA is loaded as saved"
E
