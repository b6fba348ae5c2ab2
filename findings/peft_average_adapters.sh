#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0, transformers 5.23.0
# Behaviour: add_weighted_adapter averages LoRA's A and B apart, not their product. The mean (0.5,
#   0.5) of an adapter with itself is twice that adapter with "linear", "dare_linear" and
#   "magnitude_prune", and half of it with "ties". Of two different adapters none of these is the
#   mean, and "svd", the default, cuts a mean of rank 2r to rank r. "cat" is exact.
# Whom it hurts: who averages the adapters of several seeds or tasks. The more alike they are, the
#   more "linear" amplifies them, up to their number, and the result drifts from the base model by
#   as much. The docstring calls "linear" a rough approximation; nothing says in which direction.
# Guess beforehand: 0.5 and 0.5 of the same adapter are that adapter, whatever the combination type.
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
from transformers import LlamaConfig, LlamaForCausalLM

print({name: version(name) for name in ("torch", "transformers", "peft")})
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), config, adapter_name="a")
for name in ("copy", "other"):
    model.add_adapter(name, copy.deepcopy(config))
layer = model.base_model.model.model.layers[0].self_attn.q_proj
for half in (layer.lora_A, layer.lora_B):
    half["copy"].weight.data.copy_(half["a"].weight.data)

seen, error = {}, {}
a, other = layer.get_delta_weight("a"), layer.get_delta_weight("other")
for kind in ("linear", "dare_linear", "magnitude_prune", "ties", "svd", "cat"):
    density = {} if kind in ("linear", "svd", "cat") else {"density": 1.0}  # 1: nothing is pruned
    model.add_weighted_adapter(["a", "copy"], [0.5, 0.5], f"{kind}_same", combination_type=kind, **density)
    seen[kind] = round((layer.get_delta_weight(f"{kind}_same").norm() / a.norm()).item(), 3)
    model.add_weighted_adapter(["a", "other"], [0.5, 0.5], f"{kind}_two", combination_type=kind, **density)
    mean = (a + other) / 2
    error[kind] = round(((layer.get_delta_weight(f"{kind}_two") - mean).norm() / mean.norm()).item(), 3)
print("mean of an adapter with itself, relative to it:", seen)
print("mean of two adapters, relative error:", error)
for kind in ("linear", "dare_linear", "magnitude_prune"):
    assert seen[kind] == 2.0, "changed: averaging an adapter with itself no longer doubles it"
assert seen["ties"] == 0.5 and error["linear"] > 0.5 and error["svd"] > 0.3
assert seen["cat"] == 1.0 and error["cat"] < 1e-3
E
