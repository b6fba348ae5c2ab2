"""
`Protocol`: how a model is measured, with its defaults. Importing it does not import torch.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from eaft.errors import ConfigurationError, nearest
from eaft.files import (
    Count,
    Finite,
    FiniteNotNegative,
    Flag,
    NotNegative,
    Positive,
    Seed,
    check,
)

SEED = 1234  # lm-eval's own default for few-shot examples
PROMPTS = Path(__file__).parent / "suites" / "prompts.jsonl"  # everyday requests
# In `eaft eval` and in training alike, so that a budget means the same in both
DRIFT_PROMPTS = 128
ANSWER_TOKENS = 64  # at most, of each answer
SHOWN = 8  # held-out rows whose answers `eaft eval` shows


def date_text(value: Any) -> Any:
    """Return a date, which YAML reads where it has no quotes, as its text."""
    return value.isoformat() if isinstance(value, date) else value


def dtype_name(value: str) -> str:
    """Return the name of a dtype that a model can be loaded in; pydantic names the field."""
    import torch

    dtype = getattr(torch, value, None)
    if value != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError("expected auto, float32, bfloat16 or float16")
    return value


UpToOne = Annotated[Finite, Field(gt=0, le=1)]
# Settings of generation, and what values they take
GENERATION: dict[str, Any] = {
    "do_sample": Flag,
    "use_cache": Flag,
    "early_stopping": Flag | Literal["never"],
    "temperature": FiniteNotNegative,
    "top_k": NotNegative,
    "top_p": UpToOne,
    "typical_p": UpToOne,
    "min_p": Annotated[Finite, Field(ge=0, le=1)],
    "num_beams": Count,
    "num_return_sequences": Literal[1],
    "max_new_tokens": Count,
    "max_gen_toks": Count,
    "min_new_tokens": NotNegative,
    "repetition_penalty": Positive,
    "length_penalty": Finite,
    "no_repeat_ngram_size": NotNegative,
    "penalty_alpha": FiniteNotNegative,
    "eos_token_id": NotNegative,
    "until": str,
}


def generation_value(text: str) -> Any:
    """Return a value of `gen_kwargs` as lm-eval reads it: a flag, none, a number or a text."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def generation_flags(value: str) -> str:
    """
    Return lm-eval's `gen_kwargs` if each part of it has a name that generation knows, and a value
    that it takes.
    """
    from transformers import GenerationConfig

    known = {*GenerationConfig().to_dict(), "until", "max_gen_toks"}
    settings: dict[str, Any] = {}
    for part in value.split(","):
        name, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError("expected NAME=VALUE,NAME=VALUE, as temperature=0.7,do_sample=true")
        if name not in known:
            raise ValueError(f"{name!r} is no setting of generation.{nearest(name, known)}")
        settings[name] = setting = generation_value(text)
        if name in GENERATION:
            try:
                check(GENERATION[name], setting, "")
            except ConfigurationError as error:
                raise ValueError(f"{name}: {str(error).removesuffix('.')}") from error
        elif isinstance(setting, float) and not math.isfinite(setting):
            raise ValueError(f"{name}: expected a finite number, got {setting}")
    if settings.get("do_sample") is True and settings.get("temperature") == 0:
        raise ValueError("temperature=0 does not sample: leave do_sample=true out")
    if "max_length" in settings:
        raise ValueError("max_length counts the question too: give max_gen_toks")
    return value


@dataclass
class Protocol:
    """
    How a model is measured: what must be the same for two models to be compared.

    Attributes:
        apply_chat_template: ask as a chat; None: if the tokenizer has a template.
        enable_thinking: let the model think before it answers; None: only if its template cannot
            turn that off.
        max_thinking_tokens: tokens for the thoughts, beside a task's tokens for the answer, as far
            as the context allows.
        num_fewshot: examples before each item; None: what each task says.
        system_instruction: a system message before each item and prompt.
        gen_kwargs: generation settings for all tasks, as lm-eval's.
        dtype: `auto`: the dtype that a model was saved in; see `own_dtype`.
        batch_size: items of a task at a time.
        backend: lm-eval's model, `hf` or `vllm`.
        model_args: more arguments for it.
        drift_prompts: how many prompts drift is measured on.
        max_new_tokens: the length of each answer that drift is measured on.
        template_date: the date that chat templates write, as 2026-11-29; None: today's.
    """

    apply_chat_template: Flag | None = None
    enable_thinking: Flag | None = None
    max_thinking_tokens: NotNegative = 8192
    num_fewshot: NotNegative | None = None
    system_instruction: str | None = None
    gen_kwargs: Annotated[str, AfterValidator(generation_flags)] | None = None
    seed: Seed = SEED
    batch_size: Count = 8
    dtype: Annotated[str, AfterValidator(dtype_name)] = "auto"
    backend: Literal["hf", "vllm"] = "hf"
    model_args: dict[str, Any] = field(default_factory=dict)
    drift_prompts: NotNegative = DRIFT_PROMPTS
    max_new_tokens: Count = ANSWER_TOKENS
    template_date: Annotated[str, BeforeValidator(date_text)] | None = None

    @property
    def answer_batch(self) -> int:
        """
        Prompts that are answered at a time. Answers grow by one token a step, which reads all
        weights, so more of them cost little.
        """
        return 4 * self.batch_size
