#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Behaviour: transformers 5 keeps a mixture's experts in joint tensors, so peft converts an adapter
#   that was trained with transformers 4, where each expert had linear layers of its own. gate_proj
#   and up_proj become one tensor of twice the rank, and alpha is doubled with it. That keeps
#   alpha / r. With use_rslora the scale is alpha / sqrt(r), and comes out sqrt(2) times too large.
#   down_proj is right. Nothing is raised. The one warning, that the patterns for gate_up_proj "were
#   ignored", is not true, and comes without rsLoRA too.
# Whom it hurts: who evaluates, merges or trains on with an older rsLoRA adapter of a mixture (here
#   Qwen3-MoE) after going to transformers 5. Two of the three layers of each expert get 41% more
#   than was trained; the adapter seems to have been worse than it was.
# Guess beforehand: an older adapter either computes as it did, or does not load.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 peft==0.21.2
"$work/venv/bin/python" - "$work" <<'E'
import math
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, logging

logging.disable_progress_bar()
print({name: version(name) for name in ("torch", "transformers", "peft")})
work, ids, r, alpha = Path(sys.argv[1]), torch.arange(1, 33)[None], 16, 16
torch.manual_seed(0)
config = Qwen3MoeConfig(vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_experts=4,
                        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                        head_dim=8, initializer_range=0.1)  # fmt: skip
Qwen3MoeForCausalLM(config).save_pretrained(work / "base")
weights = load_file(work / "base" / "model.safetensors")  # files still have one tensor for each expert's layer


def logits(model):
    with torch.no_grad():
        return model.eval()(ids).logits


def load(folder):
    return Qwen3MoeForCausalLM.from_pretrained(work / folder, dtype=torch.float32)


def scales(model, name):
    return {module.scaling["default"] for module in model.modules() if getattr(module, "parameter_name", "") == name}


error = {}
for rslora in (False, True):
    scale = alpha / math.sqrt(r) if rslora else alpha / r
    adapter, changed = {}, dict(weights)
    for name, weight in weights.items():
        if ".experts." in name:
            a, b = torch.randn(r, weight.shape[1]) * 0.05, torch.randn(weight.shape[0], r) * 0.05
            layer = "base_model.model." + name.removesuffix("weight")  # as peft named them with transformers 4
            adapter |= {f"{layer}lora_A.weight": a, f"{layer}lora_B.weight": b}
            changed[name] = weight + scale * b @ a
    folder, want = work / f"adapter{rslora}", work / f"want{rslora}"
    targets = ["gate_proj", "up_proj", "down_proj"]
    LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=targets).save_pretrained(folder)
    save_file(adapter, folder / "adapter_model.safetensors")
    config.save_pretrained(want)
    save_file(changed, want / "model.safetensors", metadata={"format": "pt"})

    base, want = logits(load("base")), logits(load(want.name))
    model = PeftModel.from_pretrained(load("base"), folder)
    error[rslora] = ((logits(model) - want).norm() / (want - base).norm()).item()
    print(f"use_rslora={rslora}: trained with scale {scale:g}; loaded: {scales(model, 'down_proj')} for down_proj,",
          f"{scales(model, 'gate_up_proj')} for gate_proj and up_proj; output differs by {error[rslora]:.3f}",
          "of what the adapter changes")
assert error[False] < 1e-3
assert error[True] > 0.05, "changed: converting an adapter of experts keeps rsLoRA's scale"
E
