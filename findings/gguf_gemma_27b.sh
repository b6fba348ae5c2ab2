#!/usr/bin/env bash
# transformers 5.23.0, gguf 0.19.0, torch 2.13.0
# Behaviour: a GGUF file of Gemma has no field for query_pre_attn_scalar, which scales attention.
#   llama.cpp knows the 27B models by their number of layers (46 in Gemma 2, 62 in Gemma 3) and
#   takes width / heads for them (144, 168); transformers takes its config's default, 256, for every
#   size. 256 is right for all other sizes, and wrong for 27B: its attention is flatter than it was
#   trained.
# Whom it hurts: who fine-tunes or measures Gemma 2 or 3 27B from a GGUF file with transformers. The
#   model still speaks, worse than it is, and training first repairs that.
# Guess beforehand: what a file does not hold is the same for all sizes, or raises an error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
"$work/venv/bin/python" - "$work" <<'E'
import sys
from importlib.metadata import version

import gguf
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, logging

logging.disable_progress_bar()
print({name: version(name) for name in ("torch", "transformers", "gguf")})
layers, width, heads, ids = 46, 288, 2, torch.arange(1, 33)[None]  # 27B's layers and width / heads
config = Gemma2Config(vocab_size=64, hidden_size=width, intermediate_size=64, num_hidden_layers=layers,
                      num_attention_heads=heads, num_key_value_heads=1, head_dim=32, initializer_range=0.1,
                      max_position_embeddings=64, query_pre_attn_scalar=width // heads)  # fmt: skip
torch.manual_seed(0)
model = Gemma2ForCausalLM(config).eval()

writer = gguf.GGUFWriter(f"{sys.argv[1]}/model.gguf", "gemma2")
for field, value in {"context_length": 64, "block_count": layers, "embedding_length": width,
                     "feed_forward_length": 64, "head_count": heads, "head_count_kv": 1, "key_length": 32,
                     "value_length": 32, "layer_norm_rms_eps": 1e-6, "sliding_window": 4096,
                     "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}.items():  # fmt: skip
    getattr(writer, f"add_{field}")(value)
writer.add_tokenizer_model("llama")
writer.add_token_list([f"t{i}" for i in range(64)])
writer.add_token_scores([0.0] * 64)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, layers)
for name, tensor in model.state_dict().items():
    if name != "lm_head.weight":  # tied
        shift = 1.0 if "norm" in name else 0.0  # as llama.cpp's converter stores Gemma's norms
        writer.add_tensor(names.get_name(name, (".weight",)), (tensor + shift).numpy())
for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
    getattr(writer, step)()

loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file="model.gguf", dtype=torch.float32).eval()


def difference():
    with torch.no_grad():
        p, q = (m(ids).logits.log_softmax(-1) for m in (model, loaded))
    return (p.exp() * (p - q)).sum(-1).mean().item()


scalar, wrong = loaded.config.query_pre_attn_scalar, difference()
for layer in loaded.model.layers:
    layer.self_attn.scaling = (width // heads) ** -0.5
right = difference()
print(f"query_pre_attn_scalar: trained with {width // heads}, loaded {scalar};",
      f"KL from the model written: {wrong:.1e}, with the scale mended {right:.1e} nats per token")
assert scalar == 256 and wrong > 1e-4 and right < 1e-6, "changed: the scale is that of the model"
E
