"""A tuned model and its base, made comparable: one protocol, one chat template, one context."""

from __future__ import annotations

import copy
import math
import shutil
import sys
from dataclasses import dataclass
from typing import Any

from eaft.errors import ConfigurationError
from eaft.evaluation.asking import ask, check_thinking, settled
from eaft.evaluation.drift import TOP
from eaft.evaluation.identity import check_weights, digest, tokenizer_digest
from eaft.evaluation.measured_model import MeasuredModel
from eaft.evaluation.model_settings import end_tokens, generation_config, load_tokenizer, own_dtype
from eaft.evaluation.protocol import Protocol
from eaft.evaluation.results import Setting
from eaft.evaluation.suite import Benchmark
from eaft.models import (
    check_vocabulary,
    context_length,
    find_model,
    text_config,
    vocabulary_size,
)

# Parts of a generation config that `differing` leaves out; `end_tokens` is compared as text
NOT_COMPARED = (
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "transformers_version",
    "_from_model_config",
)


def comparable_models(
    model: str, base: str | None, protocol: Protocol, drift: bool, tokenizer: str | None = None
) -> tuple[MeasuredModel, MeasuredModel | None]:
    """
    Return a model and its base, to be asked alike: with one protocol (completed here), and with one
    chat template. They share a tokenizer if they have one vocabulary.

    Args:
        drift: whether drift is to be measured, which needs one vocabulary.
        tokenizer: a folder or Hub id, in place of the models' own.

    Raises:
        ConfigurationError: a model is missing, or the vocabularies differ and drift is asked for.
    """
    protocol = copy.deepcopy(protocol)
    model = find_model(model, protocol.model_args)
    base = find_model(base, protocol.model_args) if base is not None else None
    if tokenizer is None:
        own, base_own = matching_tokenizers(model, base, drift, protocol.model_args)
    else:
        own = base_own = load_tokenizer(tokenizer)
    for name, its_own in ((model, own), (base, base_own)):
        if name is not None:
            check_vocabulary(name, its_own, text_config(name, protocol.model_args).vocab_size)
    protocol = settled(protocol, own)
    if protocol.dtype == "auto":
        protocol.dtype = own_dtype(base or model, protocol.model_args)
    lengths = {
        context_length(name, protocol.model_args) for name in (model, base) if name is not None
    }
    if len(lengths) > 1 and "max_length" not in protocol.model_args:
        protocol.model_args["max_length"] = min(lengths)
    tuned = MeasuredModel(model, own, protocol)
    return tuned, MeasuredModel(base, base_own, protocol) if base is not None else None


def matching_tokenizers(
    model: str, base: str | None, drift: bool, model_args: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """
    Return the tokenizers of a model and its base: the base's for both if they have one vocabulary.
    Both have one chat template in any case.

    Raises:
        ConfigurationError: drift is asked for, and the vocabularies differ.
    """
    tokenizer = load_tokenizer(model, model_args)
    if base is None:
        return tokenizer, None
    base_tokenizer = load_tokenizer(base, model_args)
    if base_tokenizer.chat_template is None:
        base_tokenizer.chat_template = tokenizer.chat_template
    if tokenizer.get_vocab() == base_tokenizer.get_vocab():
        return base_tokenizer, base_tokenizer
    if drift:
        raise ConfigurationError(
            f"{model} and {base} have different vocabularies ({len(tokenizer)} and"
            f" {len(base_tokenizer)} tokens), and drift compares them token by token: leave it out"
            " with --drift_prompts 0."
        )
    tokenizer.chat_template = base_tokenizer.chat_template
    return tokenizer, base_tokenizer


def check_template_adds_nothing(
    path: str | None, base: str, where: str, model_args: dict[str, Any] | None = None
) -> None:
    """
    Check that a run's `chat_template_path` adds no tokens: drift compares token by token.

    With a model for it, TRL adds that tokenizer's tokens, and others up to a multiple of 64.

    Args:
        where: the user's name for it; begins the message.

    Raises:
        ConfigurationError: it would add some.
    """
    if path is None or str(path).endswith((".jinja", ".j2")):
        return
    own = load_tokenizer(base, model_args).get_vocab()
    theirs = {str(token) for token in load_tokenizer(path).added_tokens_decoder.values()}
    if more := 64 * math.ceil(len(own.keys() | theirs) / 64) - len(own):
        raise ConfigurationError(
            f"{where}={path!r}: TRL would add {more} tokens to the base model's {len(own)}, and"
            " drift compares token by token. Give the template alone, as a .jinja file."
        )


def differing(base: str, tuned: str, model_args: dict[str, Any]) -> dict[str, Setting]:
    """
    Return the settings, beside the weights, on which answers depend and which differ between two
    models: `end_tokens`, `generation_config` (without token ids), and digests of `tokenizer` and
    `chat_template`.
    """
    sides = [vars(settings_of(model, model_args)) for model in (base, tuned)]
    pairs = {name: Setting(base=value, model=sides[1][name]) for name, value in sides[0].items()}
    return {name: pair for name, pair in pairs.items() if pair.base != pair.model}


@dataclass
class AnswerSettings:
    """
    The settings on which a model's answers depend, beside its weights; None: it has no tokenizer.

    Attributes:
        end_tokens: the tokens that end an answer.
        generation_config: without token ids.
        tokenizer, chat_template: a digest of each.
    """

    end_tokens: list[str] | None
    generation_config: dict[str, Any]
    tokenizer: str | None
    chat_template: str | None


def settings_of(model: str, model_args: dict[str, Any]) -> AnswerSettings:
    """Return the settings that `differing` compares, of one model."""
    config = generation_config(model, model_args)
    generation = {k: v for k, v in config.to_diff_dict().items() if k not in NOT_COMPARED}
    try:
        tokenizer = load_tokenizer(model, model_args)
    except ConfigurationError:  # the model has none, and is asked with the other model's
        return AnswerSettings(None, generation, None, None)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    return AnswerSettings(
        sorted(map(str, tokenizer.convert_ids_to_tokens(end_tokens(config)))),
        generation,
        tokenizer_digest(tokenizer),
        template and digest(template),
    )


def check_measurable(
    models: list[MeasuredModel], benchmarks: dict[str, Benchmark], prompts: list[Any]
) -> None:
    """
    Check that all models support every task and drift prompt, and that they fit the context and the
    disk.

    Raises:
        ConfigurationError: a folder without weights, prompts for drift that do not fit, tasks that
            cannot be asked of a model that thinks, or no room for drift's files.
    """
    first, protocol = models[0], models[0].protocol
    for model in models:
        check_weights(model.model)
        check_thinking(benchmarks, model.tokenizer, protocol)
    if not prompts:
        return
    context = context_length(first.model, protocol.model_args)
    longest = max(
        len(first.tokenizer(ask(first.tokenizer, prompt, protocol))["input_ids"])
        for prompt in prompts
    )
    if longest + protocol.max_new_tokens > context:
        raise ConfigurationError(
            f"max_new_tokens={protocol.max_new_tokens}: with the longest prompt for drift"
            f" ({longest} tokens) it is more than the context of {context}: lower it, or give"
            " shorter --prompts."
        )
    need = len(prompts) * protocol.max_new_tokens * min(TOP, vocabulary_size(first.tokenizer)) * 8
    folder = next(
        parent for parent in (first.store.folder, *first.store.folder.parents) if parent.is_dir()
    )
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ConfigurationError(
            f"Drift keeps up to {need / 2**20:.0f} MiB in {first.store.folder}, where"
            f" {free / 2**20:.0f} MiB are free: lower --drift_prompts, or set EAFT_CACHE to a"
            " folder with room (`eaft cache --clear` empties this one)."
        )
    print(
        f"Drift: at most {need / 2**20:.0f} MiB of probabilities, kept in {first.store.folder}",
        file=sys.stderr,
    )
