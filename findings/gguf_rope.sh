#!/usr/bin/env bash
# transformers 5.23.0, gguf 0.19.0, torch 2.13.0
# Behaviour: of what a GGUF file says of the rotary embedding, transformers takes the base frequency,
#   and for these models nothing else. Llama 3.1 to 3.3 lose their scaling (the tensor
#   rope_freqs.weight), Gemma 3 from 4B on its linear factor of 8 (rope.scaling.*). StarCoder2 gets
#   the default base, 10000, in place of its own. What is not read is not reported: the load report
#   has nothing missing and nothing unexpected.
# Whom it hurts: who trains or measures these models from a GGUF file. StarCoder2 and Gemma 3 differ
#   from the first tokens on, Llama mostly far into the context. Training then fits a model to
#   positions that llama.cpp, which reads all of this, will not give it.
# Guess beforehand: what a file holds is read, or the loader says that it was not.
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
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
    logging,
)

logging.disable_progress_bar()
print({name: version(name) for name in ("torch", "transformers", "gguf")})
sizes = dict(vocab_size=64, hidden_size=128, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2,
             max_position_embeddings=8192, initializer_range=0.1)  # fmt: skip
llama3 = dict(rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)  # fmt: skip
gemma3 = {"sliding_attention": dict(rope_type="default", rope_theta=1e4),
          "full_attention": dict(rope_type="linear", rope_theta=1e6, factor=8.0)}  # fmt: skip
torch.manual_seed(0)
models = {
    "llama": LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, rope_parameters=llama3)),
    "gemma3": Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_hidden_layers=6, head_dim=256, rope_parameters=gemma3)),
    "starcoder2": Starcoder2ForCausalLM(Starcoder2Config(
        **sizes, num_hidden_layers=2, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
}  # fmt: skip
fields = {  # beside those of every architecture, as llama.cpp's converter writes them
    "llama": dict(layer_norm_rms_eps=1e-6, rope_freq_base=500000.0, rope_dimension_count=64),
    "gemma3": dict(layer_norm_rms_eps=1e-6, rope_freq_base=1e6, key_length=256, value_length=256, sliding_window=4096,
                   rope_scaling_type=gguf.RopeScalingType.LINEAR, rope_scaling_factor=8.0),
    "starcoder2": dict(layer_norm_eps=1e-5, rope_freq_base=1e6),
}  # fmt: skip


def write(name, model):
    config = model.config
    writer = gguf.GGUFWriter(f"{sys.argv[1]}/{name}.gguf", name)
    common = dict(context_length=8192, block_count=config.num_hidden_layers, embedding_length=128,
                  feed_forward_length=128, head_count=2, head_count_kv=2)  # fmt: skip
    for field, value in (common | fields[name]).items():
        getattr(writer, f"add_{field}")(value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(64)])
    writer.add_token_scores([0.0] * 64)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name == "llama" and ("q_proj" in key or "k_proj" in key):  # llama.cpp turns neighbouring pairs
            tensor = tensor.reshape(2, 2, 32, 128).swapaxes(1, 2).reshape(128, 128)
        if name == "gemma3" and "norm" in key:
            tensor = tensor + 1
        writer.add_tensor(names.get_name(key, (".weight", ".bias")), tensor.numpy().copy())
    if name == "llama":
        plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()


ids = torch.randint(64, (1, 768))
for name, model in models.items():
    write(name, model.eval())
    loaded, report = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], gguf_file=f"{name}.gguf", dtype=torch.float32, output_loading_info=True)  # fmt: skip
    loaded.eval()

    def differences():
        with torch.no_grad():
            p, q = (m(ids).logits[0].log_softmax(-1) for m in (model, loaded))
        each = (p.exp() * (p - q)).sum(-1)
        return each[:64].mean().item(), each[-64:].mean().item()

    early, late = differences()
    loaded.model.rotary_emb = model.model.rotary_emb
    mended = max(differences())
    print(f"{name}: file {model.config.rope_parameters}\n  loaded {loaded.config.rope_parameters}\n  KL from the",
          f"model written: tokens 1-64 {early:.1e}, 705-768 {late:.1e}, with its rope {mended:.1e} nats per token;",
          {key: list(value) for key, value in report.items() if key.endswith("_keys")})
    assert max(early, late) > 1e-4 and mended < 1e-6, f"changed: {name}'s rope is read from the file"
    assert not any(report.values()), "changed: the report names what was not read"
E
