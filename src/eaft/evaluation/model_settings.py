"""What is saved beside the weights of a model or adapter: dtype, tokenizer, generation config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from eaft.models import adapter_of, loading, source


def own_dtype(model: str, model_args: dict[str, Any] | None = None) -> str:
    """
    Return the dtype that a model (an adapter's base model) was saved in, as `bfloat16`; float32 if
    its config has none.
    """
    adapter = adapter_of(model)
    config = AutoConfig.from_pretrained(
        adapter.base_model if adapter else model, **source(model_args)
    )
    return str(config.dtype or torch.float32).removeprefix("torch.")


def load_tokenizer(model: str, model_args: dict[str, Any] | None = None) -> Any:
    """
    Return a model's tokenizer, with padding on the left for generation. An adapter without one has
    its base model's.

    Raises:
        ConfigurationError: the model has no tokenizer.
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
    Return the generation config that is saved beside the weights of a model or adapter.

    An adapter that was saved without one has its base model's, and also stops at the end token of
    its own tokenizer. So does a whole model that was trained with this tokenizer (transformers'
    `Trainer` adds the token).
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
