#!/usr/bin/env bash
# transformers 5.23.0, bitsandbytes 0.50.2, torch 2.13.0 (no GPU needed)
# Behaviour: load_in_4bit leaves the experts of a mixture of experts as they are. Since transformers
#   5 keeps all experts of a layer in one 3-D parameter, and bitsandbytes replaces nn.Linear only,
#   just the attention becomes 4-bit. In the shape of Qwen3-30B-A3B that is about 3% of the weights.
# Whom it hurts: who rents a GPU for QLoRA of such a model: it takes nearly four times the memory
#   that was planned. Nothing warns; get_memory_footprint() tells.
# Guess beforehand: all large matrices become 4-bit, experts first, since they are most of the
#   model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 bitsandbytes==0.50.2 accelerate==1.15.0
"$work/venv/bin/python" - "$work" <<'E'
import sys
from importlib.metadata import version

import torch
from transformers import (AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM,
                          MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, logging)

logging.disable_progress_bar()
packages = ("torch", "transformers", "bitsandbytes", "accelerate")
print({name: version(name) for name in packages})
quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
# Proportions of Qwen3-30B-A3B: hidden 2048, 32 heads of 128, 4 for keys, 128 experts of 768, 48 layers
common = dict(vocab_size=512, hidden_size=256, num_hidden_layers=1, num_attention_heads=4, head_dim=64)
qwen = dict(common, num_key_value_heads=1, intermediate_size=768, num_experts=64)
models = {
    "Llama": LlamaForCausalLM(LlamaConfig(**common, intermediate_size=768)),
    "Qwen3-MoE": Qwen3MoeForCausalLM(Qwen3MoeConfig(**qwen, moe_intermediate_size=96)),
    "Mixtral": MixtralForCausalLM(MixtralConfig(**common, intermediate_size=768, num_local_experts=8)),
}
share = {}
for name, model in models.items():
    model.to(torch.bfloat16).save_pretrained(f"{sys.argv[1]}/{name}")
    layers = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
    loaded = AutoModelForCausalLM.from_pretrained(
        f"{sys.argv[1]}/{name}", quantization_config=quantization, dtype=torch.bfloat16
    )
    kept = {n: p.numel() for n, p in loaded.named_parameters() if ".layers." in n and p.dtype != torch.uint8}
    share[name] = 1 - sum(kept.values()) / layers
    print(f"{name}: {share[name]:.1%} of the layers' weights are 4-bit;",
          f"memory {loaded.get_memory_footprint() / model.get_memory_footprint():.2f} of bf16's;",
          "largest in bf16:", max(kept, key=kept.get))
assert share["Llama"] > 0.99
assert share["Qwen3-MoE"] < 0.1 and share["Mixtral"] < 0.1, "changed: experts are quantised"
E
