"""
Load a GGUF file as a model of transformers, with every key and tensor that changes the output.

transformers silently ignores keys and tensors that it does not know. Without the factors of its
scaled rope, for example, a Llama 3.1 is another model. Here each key and tensor is read, or is
known to change nothing, or the file is refused.
"""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eaft.errors import ConfigurationError

logger = logging.getLogger(__name__)
# Names of how text is split before BPE (`tokenizer.ggml.pre`), by llama.cpp's src/llama-vocab.cpp.
# transformers takes GPT-2's split for each name that it does not know
# (findings/gguf_indented_digits.sh)
SPLITS_DIGITS = {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"}
SPLITS_AS_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "granite-docling"}
# Keys below the architecture's name that the shapes of the tensors fix, or that change no output
HARMLESS = {
    *(
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "tensor_data_layout",
    ),
    *(
        "attention.key_length",
        "attention.value_length",
        "expert_count",
        "expert_feed_forward_length",
    ),
    *("expert_shared_feed_forward_length", "rope.scaling.finetuned"),
}
# Values with which a key changes nothing
NEUTRAL: dict[str, Any] = {
    **{
        "attention.causal": True,
        "rope.scaling.attn_factor": 1.0,
        "rope.scaling.yarn_log_multiplier": 0.0,
    },
    **{"rope.scale_linear": 1.0, "expert_weights_scale": 1.0},
}
# Keys that a configuration has as this field; llama.cpp's converter wrote the field's value
FIELDS = {
    "attention.sliding_window": "sliding_window",
    "logit_scale": "logit_scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "use_parallel_residual": "use_parallel_residual",
    "expert_used_count": "num_experts_per_tok",
    "expert_weights_norm": "norm_topk_prob",
}
# Layers by which llama.cpp knows Gemma's 27B models: their attention has another scale, which no
# key holds (findings/gguf_gemma_27b.sh)
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
ROPE_KEYS = {"rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor"}
ROPE_KEYS |= {
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
ROPE_TENSOR = "rope_freqs.weight"
# llama.cpp's converter writes frequencies made with these two, of all Llama 3.1 to 3.3
LOW, HIGH = 1.0, 4.0
INSTEAD = "Give the folder or the Hub id of the model that the file was made from."


def load_gguf(path: Path) -> tuple[Any, Any]:
    """
    Return a GGUF file's model, in float32 on the CPU, and its tokenizer.

    Returns:
        the model and its tokenizer. The configuration also has the settings that transformers
        ignores, so the model computes as the file says after it is saved and loaded again. The
        generation config has every end token of the file.

    Raises:
        ConfigurationError: the file has a key or a tensor that is not read and changes the output.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    prefix = f"{architecture}."
    keys = {
        name.removeprefix(prefix): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(prefix)
    }
    if (parts := reader.fields.get("split.count")) is not None and parts.contents() > 1:
        raise ConfigurationError(
            f"model_name_or_path={str(path)!r} is one of {parts.contents()} parts of a model: join"
            " them with llama.cpp's llama-gguf-split --merge, and give the whole file."
        )
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    changes = changed_fields(path, architecture, keys, config)
    if keys.get("block_count") == GEMMA_27B.get(architecture, -1):
        changes["query_pre_attn_scalar"] = config.hidden_size // config.num_attention_heads
    rope = changed_rope(path, architecture, keys, tensors, config)

    model, loading = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
    )
    check_tensors(path, tensors, model, loading)
    for name, value in changes.items():
        setattr(model.config, name, value)
    if rope is not None:
        model.config.rope_parameters = rope
    add_end_tokens(model.generation_config, reader.fields)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # with this mark the model could not be saved
    model.hf_quantizer = None
    return model, load_gguf_tokenizer(path, reader)


def load_gguf_tokenizer(path: Path, reader: Any = None) -> Any:
    """
    Return a GGUF file's tokenizer, which splits text as the file says; warn if that way to split is
    unknown.

    Args:
        reader: gguf's `GGUFReader` of the file, if there is one already.
    """
    from gguf import GGUFReader

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    fields = (reader or GGUFReader(path)).fields
    kind, split = (
        fields[name].contents() if name in fields else None
        for name in ("tokenizer.ggml.model", "tokenizer.ggml.pre")
    )
    if kind != "gpt2" or split is None or split in SPLITS_AS_GPT2:
        return tokenizer
    if split in SPLITS_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif split not in splits_of_transformers():
        logger.warning(
            f"model_name_or_path={str(path)!r}: the file splits text as {split!r}, which is not"
            f" known here, and GPT-2's split is taken: some texts get other tokens. {INSTEAD}"
        )
    return tokenizer


def splits_of_transformers() -> set[str]:
    """Return the names of splits that transformers itself reads; older versions read none."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return set()
    return set(GGUF_PRE_TOKENIZER_SPLITS)


def unread(path: Path, what: str) -> ConfigurationError:
    """Return the error for a part of the file that changes the output and that we do not read."""
    return ConfigurationError(
        f"model_name_or_path={str(path)!r}: the file has {what}, which is not read, so that another"
        f" model would be made of it. {INSTEAD}"
    )


def changed_fields(
    path: Path, architecture: str, keys: dict[str, Any], config: Any
) -> dict[str, Any]:
    """
    Return the fields of the configuration that the file's keys change and transformers does not
    read.

    Raises:
        ConfigurationError: a key is unknown, or the configuration has no such field.
    """
    names = (architecture, architecture.replace("-", "_"), architecture.replace("moe", "_moe"))
    mapping: dict[str, Any] = next(
        (GGUF_CONFIG_MAPPING[name] for name in names if name in GGUF_CONFIG_MAPPING), {}
    )
    changes = {}
    for key, value in keys.items():
        if (
            mapping.get(key) is not None
            or key in HARMLESS
            or key in ROPE_KEYS
            or NEUTRAL.get(key) == value
        ):
            continue
        if key == "attention.sliding_window" and value >= keys.get("context_length", math.inf):
            continue
        field = FIELDS.get(key)
        if field is None or not hasattr(config, field):
            raise unread(path, f"{architecture}.{key}={value!r}")
        if not same(getattr(config, field), value):
            if getattr(config, "layer_types", None) and field == "sliding_window":
                raise unread(path, f"{architecture}.{key}={value!r}")
            changes[field] = value
    return changes


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal; numbers may differ by float32's rounding."""
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def changed_rope(
    path: Path, architecture: str, keys: dict[str, Any], tensors: dict[str, Any], config: Any
) -> dict[str, Any] | None:
    """
    Return the configuration's `rope_parameters` as the file has them; None if they are right.

    Raises:
        ConfigurationError: the file has a kind of scaling that we do not read.
    """
    if factors := [name for name in tensors if name.startswith("rope_factors_")]:
        raise unread(path, f"the rope factors {factors[0]!r}")
    scaling = {key: value for key, value in keys.items() if key.startswith("rope.scaling.")}
    kind, factor = scaling.get("rope.scaling.type"), scaling.get("rope.scaling.factor")
    if kind is None and factor not in (None, 0.0, 1.0):
        kind = "linear"  # as llama.cpp takes it
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        if ROPE_KEYS & keys.keys() or ROPE_TENSOR in tensors:
            raise unread(path, "a rope")
        return None
    by_layer = any(
        isinstance(value, dict) for value in rope.values()
    )  # each kind of attention has its own
    changed = dict(rope["full_attention"] if by_layer else rope)
    before = dict(changed)
    if (base := keys.get("rope.freq_base")) is not None and not same(changed["rope_theta"], base):
        changed["rope_theta"] = base
    if kind not in (None, "none"):
        if (
            kind not in ("linear", "yarn")
            or architecture == "gpt-oss"
            or (by_layer and kind != "linear")
        ):
            raise unread(path, f"{architecture}.rope.scaling.type={kind!r}")
        changed.update(rope_type=kind, factor=factor)
        if kind == "yarn":
            changed["original_max_position_embeddings"] = scaling[
                "rope.scaling.original_context_length"
            ]
            for name in ("beta_fast", "beta_slow"):
                if (value := scaling.get(f"rope.scaling.yarn_{name}")) is not None:
                    changed[name] = value
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    share = (
        changed.get("partial_rotary_factor")
        or getattr(config, "partial_rotary_factor", None)
        or 1.0
    )
    if not by_layer and keys.get("rope.dimension_count", int(head_dim * share)) != int(
        head_dim * share
    ):
        raise unread(path, f"{architecture}.rope.dimension_count={keys['rope.dimension_count']}")
    if (
        ROPE_TENSOR in tensors and changed["rope_type"] != "proportional"
    ):  # Gemma 4's configuration has its own
        divisors = np.array(tensors[ROPE_TENSOR].data, dtype=np.float64).reshape(-1)
        if not np.allclose(divisors, 1, rtol=1e-6):
            if by_layer or changed["rope_type"] != "default":
                raise unread(path, f"the rope factors {ROPE_TENSOR!r}")
            changed.update(llama3_rope(path, divisors, changed, config))
    if changed == before:
        return None
    return {**rope, "full_attention": changed} if by_layer else changed


def llama3_rope(
    path: Path, divisors: np.ndarray, rope: dict[str, Any], config: Any
) -> dict[str, Any]:
    """
    Return the parameters of a `llama3` rope (Llama 3.1 and later) from each frequency's divisor.

    Each frequency is divided by `factor` where its wave is longer than the original context, by 1
    where it is shorter than a fourth of that, and in between by 1 / ((1 - s) / factor + s), s =
    (context / wave - 1) / 3.

    Args:
        divisors: float64 `[head_dim / 2]`.
        rope: the configuration's parameters without scaling.

    Raises:
        ConfigurationError: transformers' own frequencies of these parameters differ from the
            file's.
    """
    plain = 1 / rope["rope_theta"] ** (np.arange(len(divisors)) / len(divisors))
    waves, factor = 2 * math.pi / plain, float(divisors.max())
    between = (divisors > 1 + 1e-6) & (divisors < factor * (1 - 1e-6))
    shares = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    contexts = waves[between] * (LOW + (HIGH - LOW) * shares[between])
    if not len(contexts):  # any context between the two groups will do
        contexts = np.array([HIGH * waves[divisors <= 1 + 1e-6].max(initial=1.0) + 1])
    scaling = {
        **{
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": LOW,
            "high_freq_factor": HIGH,
        },
        "original_max_position_embeddings": round(float(np.median(contexts))),
    }
    scaled = type(config)(**{**config.to_dict(), "rope_parameters": {**rope, **scaling}})
    frequencies = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))[0].double().numpy()
    if len(frequencies) != len(plain) or not np.allclose(frequencies, plain / divisors, rtol=1e-4):
        raise unread(path, f"the rope factors {ROPE_TENSOR!r}")
    return scaling


def check_tensors(path: Path, tensors: dict[str, Any], model: Any, loading: dict[str, Any]) -> None:
    """
    Check that each weight of the model comes from the file, and that each tensor is used.

    Raises:
        ConfigurationError: a weight is missing from the file, or a tensor of the file was not read.
    """
    if missing := sorted(loading["missing_keys"]):
        raise ConfigurationError(
            f"model_name_or_path={str(path)!r}: the file has no {missing[0]}, which"
            f" {type(model).__name__} needs. {INSTEAD}"
        )
    own = {weight.data_ptr(): weight.numel() for weight in model.state_dict().values()}
    tied = {"output.weight"} if model.config.tie_word_embeddings else set()
    named = {
        name: int(tensor.n_elements)
        for name, tensor in tensors.items()
        if name not in tied and not re.match(r"rope_(freqs|factors)", name)
    }
    if (numbers := sum(named.values())) != sum(own.values()):
        raise unread(
            path,
            f"{numbers:,} numbers in its tensors and the model {sum(own.values()):,}: a tensor"
            " of it",
        )


def add_end_tokens(config: Any, fields: dict[str, Any]) -> None:
    """Let a model stop at each end token of the file: end of text, of turn and of message."""
    names = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(int(fields[name].contents()) for name in names if name in fields))
    if len(ends) > 1:
        config.eos_token_id = ends
