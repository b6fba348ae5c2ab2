"""Samples the model's own answers to prompts of the data: on-policy examples."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from eaft.evaluation.drift import Share, sample_answers
from eaft.evaluation.lm_eval_models import load as load_lm
from eaft.evaluation.protocol import Protocol
from eaft.inspection.score.examples import Prompt, Rollout
from eaft.inspection.score.model import ScoringModel, Settings

BATCH = 16  # prompts at a time


def sample(
    model: ScoringModel,
    tokenizer: Any,
    prompts: list[Prompt],
    max_new_tokens: int,
    seed: int,
    share: Share,
    advance: Callable[[int], object],
) -> list[Rollout]:
    """
    Return an answer to each prompt from the model's own distribution.

    The temperature is 1, without top-k or top-p.

    Args:
        advance: as `sample_answers` calls it.
    """
    with model.computing():
        prompt_ids = [prompt.ids for prompt in prompts]
        answers = sample_answers(
            model.model,
            tokenizer,
            prompt_ids,
            max_new_tokens,
            seed=seed,
            batch_size=BATCH,
            share=share,
            advance=advance,
        )
    return [
        Rollout(prompt.row, answer.prompt_ids, answer.answer_ids)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def sample_with_vllm(
    model: str,
    tokenizer: Any,
    prompts: list[Prompt],
    max_new_tokens: int,
    seed: int,
    settings: Settings,
) -> list[Rollout]:
    """
    Return an answer to each prompt as `sample` does, by vLLM, and free vLLM's memory.

    Raises:
        ConfigurationError: vLLM cannot load the model.
    """
    from vllm import SamplingParams

    dtype = str(settings.autocast or settings.model_args.dtype or "auto").removeprefix("torch.")
    lm = load_lm(model, tokenizer, Protocol(backend="vllm", dtype=dtype))
    lm.generated = deque()  # lm-eval's record of each answer
    parameters = [
        SamplingParams(temperature=1.0, max_tokens=max_new_tokens, seed=seed + i)
        for i in range(len(prompts))
    ]
    outputs = lm._model_generate(
        [prompt.ids for prompt in prompts], generate=True, sampling_params=parameters
    )
    answers = [
        Rollout(prompt.row, prompt.ids, list(output.outputs[0].token_ids))
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    del lm, outputs
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return answers
