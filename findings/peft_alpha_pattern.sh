#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Behaviour: where two keys of alpha_pattern match a layer, the first key decides. save_pretrained
#   writes adapter_config.json with sorted keys, so after loading another key can come first. Then
#   the layer has another scale (alpha / r) than it was trained with. Nothing is raised or warned
#   of: alpha changes no shape. {"layers.1.mlp.down_proj": 64, "down_proj": 16} comes back in the
#   other order; with q_proj in place of down_proj the order happens to stay.
# Whom it hurts: who gives some layers an alpha of their own beside one for all layers. What is
#   saved, resumed, evaluated, merged or served is not what was trained; merged before saving, it is.
# Guess beforehand: a saved adapter is the trained one, and adapter_config.json keeps the order.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 peft==0.21.2
"$work/venv/bin/python" - "$work" <<'E'
import copy
import sys
from importlib.metadata import version

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

print({name: version(name) for name in ("torch", "transformers", "peft")})
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
base = LlamaForCausalLM(LlamaConfig(**sizes))
ids = torch.randint(64, (4, 32))


def loss(model):
    return model(ids, labels=ids).loss


def logits(model):
    with torch.no_grad():
        return model.eval()(ids).logits


def scales(model, name):
    return [layer.get_submodule(name).scaling["default"] for layer in model.base_model.model.model.layers]


error = {}
for name in ("mlp.down_proj", "self_attn.q_proj"):
    short = name.split(".")[1]
    pattern = {f"layers.1.{name}": 64, short: 16}  # the special case first
    config = LoraConfig(r=8, lora_alpha=8, target_modules=[short], alpha_pattern=dict(pattern))
    model = get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(20):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = f"{sys.argv[1]}/{short}"
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    trained, moved = logits(model), (logits(model) - logits(base)).norm()
    error[short] = ((logits(loaded) - trained).norm() / moved).item()
    merged = (logits(copy.deepcopy(model).merge_and_unload()) - trained).norm() / moved
    print(f"alpha_pattern {pattern}: scales of the two layers trained with {scales(model, name)},",
          f"loaded {scales(loaded, name)}; keys in the file {list(loaded.peft_config['default'].alpha_pattern)}")
    print(f"  loss of the base model {loss(base):.3f}, trained {loss(model):.3f}, loaded {loss(loaded):.3f};",
          f"output differs by {error[short]:.3f} of what training changed (merged before saving: {merged:.3f})")
    assert merged < 1e-3
assert error["down_proj"] > 0.1, "changed: an adapter with overlapping alpha patterns survives saving"
assert error["q_proj"] < 1e-3
E
