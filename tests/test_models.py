"""
From what a user calls a model to a folder: a GGUF file computes as the model it was made of, or is
refused.
"""

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eaft import gguf_model, models
from eaft.errors import ConfigurationError

from .conftest import make_model, make_tokenizer

HEADS, KV_HEADS, HEAD_DIM, WIDTH, CONTEXT = 4, 2, 16, 64, 4096
TOKENS = [*sorted(make_tokenizer().get_vocab(), key=make_tokenizer().get_vocab().get), "ab"]
VOCABULARY = len(TOKENS)
ORIGINAL = 64  # the context before the rope was scaled
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": ORIGINAL,
    },
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "HF_HOME", tmp_path)


def make_llama(rope):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        tie_word_embeddings=False,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(file, model, change=lambda writer: None, without=()):
    """Write a Llama as llama.cpp's converter does; `change` adds to the file."""
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3] * 3 + [1] * (VOCABULARY - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for own, weight in model.state_dict().items():
        weight = weight.numpy()
        if heads := {"q_proj": HEADS, "k_proj": KV_HEADS}.get(own.split(".")[-2]):
            # llama.cpp rotates neighbours, transformers the two halves
            pairs = weight.reshape(heads, 2, HEAD_DIM // 2, WIDTH)
            weight = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
        name = names.get_name(own, try_suffixes=(".weight",))
        if name not in without:
            writer.add_tensor(name, weight)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def divisors(model):
    """
    By what each frequency of a scaled rope is divided, from transformers' own frequencies; float32.
    """
    rope, device = model.config.rope_parameters, torch.device("cpu")
    scaled = ROPE_INIT_FUNCTIONS[rope["rope_type"]](model.config, device)[0]
    plain = 1 / rope["rope_theta"] ** (torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    return (plain / scaled).numpy().astype(np.float32)


def write_rope(writer, name, model):
    if name == "llama3":
        writer.add_tensor("rope_freqs.weight", divisors(model))
    elif name != "default":
        writer.add_string("llama.rope.scaling.type", name)
        writer.add_rope_scaling_factor(ROPES[name]["factor"])
        if name == "yarn":
            writer.add_rope_scaling_orig_ctx_len(ORIGINAL)


@pytest.mark.parametrize("name", ROPES)
def test_a_converted_model_computes_as_the_one_the_file_was_made_of(name, tmp_path):
    model = make_llama(ROPES[name])
    file = write_gguf(tmp_path / "m.gguf", model, lambda writer: write_rope(writer, name, model))
    found = AutoModelForCausalLM.from_pretrained(
        models.resolve_model(str(file)), dtype=torch.float32
    ).eval()
    ids = torch.randint(3, VOCABULARY, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        if name != "default":  # a rope that is lost is seen
            assert (make_llama(ROPES["default"])(ids).logits - model(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("layers", [3, 2])
def test_gemma_27b_has_the_scale_of_attention_that_llama_cpp_gives_it(
    layers, tmp_path, monkeypatch
):
    """
    llama.cpp takes width / heads where there are as many layers as the 27B model has; the file has
    no key for it. Here that is 3, since transformers takes long to read 46.
    """
    assert gguf_model.GEMMA_27B == {"gemma2": 46, "gemma3": 62}
    monkeypatch.setattr(gguf_model, "GEMMA_27B", {"gemma2": 3})
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    scalar = 64 if layers == 3 else 256
    config = Gemma2Config(
        **sizes,
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        head_dim=16,
        query_pre_attn_scalar=scalar,
    )
    config.initializer_range = 0.2
    model = Gemma2ForCausalLM(config).eval()
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "gemma2")
    numbers = {
        "context_length": 8192,
        "block_count": layers,
        "embedding_length": 64,
        "feed_forward_length": 32,
    }
    numbers |= {
        "head_count": 1,
        "head_count_kv": 1,
        "key_length": 16,
        "value_length": 16,
        "sliding_window": 4096,
    }
    for name, value in {**numbers, "layer_norm_rms_eps": 1e-6}.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, layers)
    for own, weight in model.state_dict().items():
        if own != "lm_head.weight":  # tied; norms are stored as what they multiply by
            writer.add_tensor(names.get_name(own, (".weight",)), (weight + ("norm" in own)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = AutoModelForCausalLM.from_pretrained(
        models.resolve_model(str(tmp_path / "m.gguf")), dtype=torch.float32
    )
    ids = torch.randint(3, VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            found.eval()(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4
        )


REFUSED = {
    "rope.scaling.type='longrope'": lambda writer: writer.add_string(
        "llama.rope.scaling.type", "longrope"
    ),
    "the rope factors 'rope_factors_long.weight'": lambda writer: writer.add_tensor(
        "rope_factors_long.weight", np.full(HEAD_DIM // 2, 2, np.float32)
    ),
    "the rope factors 'rope_freqs.weight'": lambda writer: writer.add_tensor(
        "rope_freqs.weight", np.linspace(3, 1, HEAD_DIM // 2, dtype=np.float32)
    ),
    "llama.attention.scale=": lambda writer: writer.add_float32("llama.attention.scale", 0.3),
    "llama.attention.sliding_window=64": lambda writer: writer.add_sliding_window(64),
    "llama.attention.causal=False": lambda writer: writer.add_causal_attention(False),
    "llama.logit_scale=0.5": lambda writer: writer.add_logit_scale(0.5),
    "a tensor of it": lambda writer: writer.add_tensor(
        "blk.0.attn_q.bias", np.ones(WIDTH, np.float32)
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_lost_is_refused_in_one_line(what, tmp_path):
    file = write_gguf(tmp_path / "m.gguf", make_llama(ROPES["default"]), REFUSED[what])
    with pytest.raises(ConfigurationError, match="is not read") as refused:
        models.resolve_model(str(file))
    assert what in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "eaft").exists()


def test_a_file_without_a_tensor_or_whole_in_parts_is_refused(tmp_path):
    model = make_llama(ROPES["default"])
    with pytest.raises(ConfigurationError, match=r"the file has no model\.norm\.weight"):
        models.resolve_model(
            str(write_gguf(tmp_path / "a.gguf", model, without=("output_norm.weight",)))
        )
    part = write_gguf(
        tmp_path / "b.gguf", model, lambda writer: writer.add_uint16("split.count", 2)
    )
    with pytest.raises(ConfigurationError, match="one of 2 parts of a model"):
        models.resolve_model(str(part))
    (tmp_path / "c.gguf").write_bytes(part.read_bytes()[:3000])
    with pytest.raises(ConfigurationError, match=r"is not a readable GGUF file\."):
        models.resolve_model(str(tmp_path / "c.gguf"))


def test_a_converted_model_stops_at_every_end_token_of_the_file(tmp_path):
    file = write_gguf(
        tmp_path / "m.gguf", make_llama(ROPES["default"]), lambda writer: writer.add_eot_token_id(7)
    )
    assert GenerationConfig.from_pretrained(models.resolve_model(str(file))).eos_token_id == [2, 7]


def test_two_processes_convert_a_gguf_file_at_the_same_time(tmp_path, monkeypatch, tokenizer):
    """The one that comes second finds the first one's folder in its place, and takes it."""

    class OtherModel:
        def save_pretrained(self, staging):
            make_model().save_pretrained(staging)
            folder = staging.with_suffix("")  # without this process's mark
            folder.mkdir()
            (folder / "model.safetensors").write_text("the other process's")

    monkeypatch.setattr(gguf_model, "load_gguf", lambda path: (OtherModel(), tokenizer))
    (tmp_path / "x.gguf").write_text("weights")
    folder = models.convert_gguf(tmp_path / "x.gguf")
    assert [path.name for path in (tmp_path / "eaft").iterdir()] == [folder.name]
    assert (folder / "model.safetensors").read_text() == "the other process's"
