"""
The model's own answers to the prompts of data rows, sampled as it would answer: the on-policy side.
"""

from __future__ import annotations

import gc
from collections import deque
from typing import Any

import torch

from eaft.evaluation.drift import Share, sample_answers
from eaft.evaluation.protocol import Protocol
from eaft.evaluation.scores import load as load_lm
from eaft.inspection.score.examples import Rollout
from eaft.inspection.score.scorer import Scorer, Settings

Prompts = list[tuple[int, list[int]]]  # each with its row


def sample(
    scorer: Scorer, tokenizer: Any, prompts: Prompts, max_new_tokens: int, seed: int, share: Share
) -> list[Rollout]:
    """
    Return an answer to each prompt from the model's own distribution: temperature 1, nothing cut
    off.
    """
    with scorer.computing():
        texts = [ids for _, ids in prompts]
        answers = sample_answers(
            scorer.model, tokenizer, texts, max_new_tokens, seed=seed, share=share
        )
    return [
        Rollout(row, a.prompt_ids, a.answer_ids)
        for (row, _), a in zip(prompts, answers, strict=True)
    ]


def sample_with_vllm(
    model: str, tokenizer: Any, prompts: Prompts, max_new_tokens: int, seed: int, settings: Settings
) -> list[Rollout]:
    """
    Return the same by vLLM, which is gone afterwards.

    Raises:
        ConfigurationError: it cannot load the model.
    """
    from vllm import SamplingParams

    dtype = str(settings.autocast or settings.model_args.dtype or "auto").removeprefix("torch.")
    lm = load_lm(model, tokenizer, Protocol(backend="vllm", dtype=dtype))
    lm.generated = deque()  # what it tells lm-eval of each answer
    parameters = [
        SamplingParams(temperature=1.0, max_tokens=max_new_tokens, seed=seed + i)
        for i in range(len(prompts))
    ]
    outputs = lm._model_generate(
        [ids for _, ids in prompts], generate=True, sampling_params=parameters
    )
    found = [
        Rollout(row, ids, list(output.outputs[0].token_ids))
        for (row, ids), output in zip(prompts, outputs, strict=True)
    ]
    del lm, outputs
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found
