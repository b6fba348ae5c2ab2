"""What is saved beside the weights of a model or adapter: dtype, tokenizer, generation config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from eaft.models import adapter_of, loading, source


def own_dtype(model: str, model_args: dict[str, Any] | None = None) -> str:
    """
    Return the dtype a model (an adapter's base model) was saved in, as `bfloat16`; float32 where
    none is noted.
    """
    adapter = adapter_of(model)
    config = AutoConfig.from_pretrained(
        adapter.base_model if adapter else model, **source(model_args)
    )
    return str(config.dtype or torch.float32).removeprefix("torch.")


def load_tokenizer(model: str, model_args: dict[str, Any] | None = None) -> Any:
    """
    Return a model's tokenizer (an adapter's may be its base model's), padding left as generation
    needs it.

    Raises:
        ConfigurationError: there is none.
    """
    adapter = adapter_of(model)
    if adapter is not None and not Path(model, "tokenizer_config.json").is_file():
        model = adapter.base_model
    with loading(f"{model} has no tokenizer that can be loaded."):
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", **source(model_args))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def generation_config(model: str, model_args: dict[str, Any] | None = None) -> GenerationConfig:
    """
    Return what a model generates by: what is saved beside its weights, an adapter's too.

    An adapter that was saved without it has its base model's, and stops at its own tokenizer's end
    token as well, as a whole model does that was trained with this tokenizer (transformers'
    `Trainer` aligns them).
    """
    adapter = adapter_of(model)
    own = Path(model, "generation_config.json").is_file()
    name, options = model, source(model_args)
    if adapter is not None and not own:
        name = adapter.base_model
        options = {"revision": adapter.revision or "main", **options}
    try:
        place = {key: value for key, value in options.items() if key != "trust_remote_code"}
        config = GenerationConfig.from_pretrained(name, **({} if own else place))
    except OSError:  # saved without one
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(name, **options))
    if adapter is not None and not own and Path(model, "tokenizer_config.json").is_file():
        end, ends = load_tokenizer(model, model_args).eos_token_id, end_tokens(config)
        if end is not None and end not in ends:
            config.eos_token_id = [end, *ends]
    return config


def end_tokens(config: GenerationConfig) -> list[int]:
    """Return the ids that end an answer."""
    ends = config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
