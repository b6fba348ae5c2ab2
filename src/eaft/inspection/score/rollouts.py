"""Samples the model's own answers to prompts of the data: on-policy examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eaft.evaluation.drift import Share, sample_answers
from eaft.inspection.score.examples import Prompt, Rollout
from eaft.inspection.score.model import ScoringModel

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
