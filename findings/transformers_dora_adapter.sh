#!/usr/bin/env bash
# transformers 5.23.0, peft 0.21.2, torch 2.13.0
# Behaviour: AutoModelForCausalLM.from_pretrained(ADAPTER FOLDER) loads a LoRA adapter exactly as
#   peft does, but of a DoRA adapter A and B only. The trained magnitudes are looked for under
#   another name than they are saved under, and stay as they start. The load report lists both names
#   as "unexpected" and "missing"; nothing is raised.
# Whom it hurts: who gives an adapter's folder to something that calls AutoModelForCausalLM
#   (evaluation, pipelines). What is scored is not what was trained: here half of what training
#   changed is lost. PeftModel.from_pretrained and AutoPeftModelForCausalLM are right.
# Guess beforehand: both ways load the same model, as they do for LoRA and for modules_to_save.
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
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, logging

logging.disable_progress_bar()
print({name: version(name) for name in ("torch", "transformers", "peft")})
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(f"{sys.argv[1]}/base")
ids = torch.arange(1, 33)[None]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{folder}", dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(ids).logits


error = {}
for name in ("lora", "dora"):
    config = LoraConfig(r=8, target_modules="all-linear", use_dora=name == "dora")
    model = get_peft_model(load("base"), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(20):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained, moved = logits(model), (logits(model) - logits(load("base"))).norm()
    model.save_pretrained(f"{sys.argv[1]}/{name}")
    ways = {"peft": PeftModel.from_pretrained(load("base"), f"{sys.argv[1]}/{name}"), "transformers": load(name)}
    error[name] = {way: round(((logits(m) - trained).norm() / moved).item(), 4) for way, m in ways.items()}
    print(f"{name}: difference from the trained model, relative to what training changed: {error[name]}")
assert max(error["lora"].values()) < 1e-3 and error["dora"]["peft"] < 1e-3
assert error["dora"]["transformers"] > 0.02, "changed: transformers loads DoRA's magnitudes"
E
