#!/usr/bin/env bash
# transformers 5.23.0 (its Trainer's optimizer), peft 0.21.2, torch 2.13.0
# Behaviour: weight decay pulls a LoRA adapter back to the base model, and a DoRA, IA3 or RoAd
#   adapter, or modules_to_save, away from it. Trainer decays all that is trained but biases and
#   norms. DoRA's magnitudes are the base weights' norms, and IA3's and RoAd's factors begin at 1,
#   so decaying them to 0 decays the base model itself. Shown with gradients of exactly 0.
# Whom it hurts: who sets weight_decay once and compares kinds of adapters: DoRA and IA3 forget more
#   with each step, also where there is nothing to learn, and the recipe calls it regularisation.
# Guess beforehand: with an adapter, decay means "towards the base model", whatever its kind.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
"$work/venv/bin/python" - "$work" <<'E'
import copy
import sys
from importlib.metadata import version

import torch
from peft import IA3Config, LoraConfig, RoadConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

print({name: version(name) for name in ("torch", "transformers", "peft", "accelerate")})
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)).eval()
ids = torch.arange(1, 33)[None]


def drift(model):  # KL of the base model from `model`, nats per token
    with torch.no_grad():
        p, q = (m.eval()(ids).logits.log_softmax(-1) for m in (base, model))
    return round((p.exp() * (p - q)).sum(-1).mean().item(), 5)


kinds = {
    "lora": LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False),  # begins away from the base model
    "dora": LoraConfig(r=8, target_modules="all-linear", use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "road": RoadConfig(target_modules="all-linear", group_size=16),
    "modules_to_save": LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}
seen = {}
for name, config in kinds.items():
    model = get_peft_model(copy.deepcopy(base), config)
    args = TrainingArguments(f"{sys.argv[1]}/out", learning_rate=1e-3, weight_decay=0.1, use_cpu=True, report_to=[])
    optimizer = Trainer(model, args).create_optimizer()
    seen[name] = [drift(model)]
    for _ in range(2):
        for _ in range(1000):
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            optimizer.step()
        seen[name].append(drift(model))
    print(f"{name}: KL from the base model after 0, 1000 and 2000 steps with no gradient: {seen[name]}")
assert seen["lora"][0] > seen["lora"][1] > seen["lora"][2]
for name in list(kinds)[1:]:
    assert seen[name][0] < 1e-4 < seen[name][1] < seen[name][2], f"changed: {name} stays at the base model"
E
