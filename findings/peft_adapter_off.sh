#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0, transformers 5.23.0
# Behaviour: model.disable_adapter() gives the base model for plain LoRA only. With
#   init_lora_weights "pissa" or "olora" it gives the base weights without their largest directions,
#   before the first step already, without a word. With bias="lora_only" on a model whose
#   projections have biases (Qwen2), the base model's own biases are trained and stay on; of that
#   peft warns.
# Whom it hurts: every method that takes "adapters off" as its frozen reference, to save a second
#   copy: preference training, KL-anchored fine-tuning, measuring drift in one process. The anchor
#   is a model that nobody ever had, and drift from it is not forgetting.
# Guess beforehand: with the adapters off a PEFT model is the base model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 peft==0.21.2
"$work/venv/bin/python" - <<'E'
import copy
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

print({name: version(name) for name in ("torch", "transformers", "peft")})
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
torch.manual_seed(0)
base = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=4)).eval()
ids = torch.arange(1, 33)[None]


def kl(model):  # of the base model from `model`, nats per token
    with torch.no_grad():
        p, q = (m.eval()(ids).logits.log_softmax(-1) for m in (base, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


seen = {}
kinds = {"lora": {}, "pissa": {"init_lora_weights": "pissa"}, "olora": {"init_lora_weights": "olora"}}
for name, options in {**kinds, "bias": {"bias": "lora_only"}}.items():
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], **options)
    model = get_peft_model(copy.deepcopy(base), config)
    with model.disable_adapter():
        before = kl(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(20):
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    on = kl(model)
    with model.disable_adapter():
        seen[name] = before, kl(model)
    print(f"{name}: KL from the base model with the adapter off, before training {before:.1e},",
          f"after {seen[name][1]:.1e} (with the adapter on {on:.1e})")
assert max(seen["lora"]) < 1e-6
assert min(seen["pissa"]) > 1e-4 and min(seen["olora"]) > 1e-4, "changed: off is the base model"
assert seen["bias"][0] < 1e-6 < 1e-4 < seen["bias"][1], "changed: trained biases are switched off too"
E
