"""
Replay: the base model's own answers to everyday requests, mixed into the training data against
forgetting.

Elsewhere users are told to mix in general data. Every model can make such data: its own answers.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import is_conversational

from eaft.errors import ConfigurationError
from eaft.evaluation.asking import ask
from eaft.evaluation.drift import (
    Answer,
    BaseAnswers,
    TopProbs,
    read_prompts,
    sample_answers,
)
from eaft.evaluation.folder import write_jsonl
from eaft.evaluation.launch import shared
from eaft.evaluation.model_settings import load_tokenizer
from eaft.evaluation.protocol import Protocol
from eaft.files import read_jsonl
from eaft.training.config import EAFTConfig
from eaft.training.replay_kl import save_probs

REPLAY_FILE = "replay.jsonl"  # in a run's folder: the rows
# The limit of an answer. A longer one is left out, since training also learns where a row ends
ANSWER_TOKENS = 256
TRIES = 8  # at most this many times the wanted number of answers is sampled


@dataclass(frozen=True)
class Replayed:
    """
    Replayed rows, as `sample_rows` returns them.

    Attributes:
        rows: each has `input_ids`, `labels`, `prompt` and `completion`.
        probs: for `replay_loss='kl'`, the base model's distribution at each label, if the rows were
            sampled just now, in this process.
    """

    rows: list[dict[str, Any]]
    probs: TopProbs | None = None

    def save(self, output_dir: Path) -> None:
        """Write them into a run's folder, the rows last: a resumed run reads them again."""
        if self.probs is not None:
            (output_dir / REPLAY_FILE).unlink(missing_ok=True)
            save_probs(self.probs, output_dir)
        write_jsonl(output_dir / REPLAY_FILE, self.rows)


def check_replay(dataset: Any, args: EAFTConfig) -> None:
    """
    Check that replayed rows can be mixed into a data set.

    Raises:
        ConfigurationError: the data set is a stream, its rows do not separate answers from prompts,
            the file of prompts cannot be read, or ZeRO-3 leaves no process a whole model to sample
            from.
    """
    if not isinstance(dataset, Dataset):
        raise ConfigurationError(
            f"replay={args.replay} needs the number of rows, which a stream does not have:"
            " leave dataset_streaming out."
        )
    if not (
        {"prompt", "completion"} <= set(dataset.column_names) or "messages" in dataset.column_names
    ):
        raise ConfigurationError(
            f"replay={args.replay} needs rows of `prompt` and `completion`, or of `messages`; these"
            f" have {', '.join(dataset.column_names)}."
        )
    if {"image", "images"} & set(dataset.column_names) or (args.dataset_kwargs or {}).get(
        "skip_prepare_dataset"
    ):
        raise ConfigurationError(
            f"replay={args.replay} mixes rows while the data is prepared: leave it out with images,"
            " and leave out dataset_kwargs={'skip_prepare_dataset': True}."
        )
    if "chat_template_kwargs" in dataset.column_names:
        raise ConfigurationError(
            f"replay={args.replay}: the data has chat_template_kwargs, which replayed rows do not"
            " have: leave the column out, and set what all rows share in the chat template"
            " (chat_template_path)."
        )
    if is_deepspeed_zero3_enabled():
        raise ConfigurationError(
            f"replay={args.replay}: one process samples from the whole model, and under ZeRO-3 no"
            " process has it: use ZeRO-2 or FSDP2."
        )
    read_prompts(args.replay_prompts, 1)


def count_replayed(rows: int, args: EAFTConfig) -> int:
    """Return how many replayed rows make the share `args.replay`, beside `rows` rows of data."""
    # Rounded, since 0.05 * 57 / 0.95 is a hair above 3
    return math.ceil(round(args.replay * rows / (1 - args.replay), 9))


def replayed_rows(dataset: Dataset, model: str, args: EAFTConfig) -> Replayed:
    """
    Return the base model's own answers (`sample_rows`): the share `args.replay` of all rows.

    A resumed run reads the answers that it began with. The first process samples, on one device,
    and the others wait.

    Raises:
        ConfigurationError: too few answers end; or the resumed run began with another number of
            answers, or with an eaft that wrote no token ids.
    """
    count = count_replayed(len(dataset), args)
    kept = Path(args.output_dir) / REPLAY_FILE
    resumed = str(args.resume_from_checkpoint or "false").lower() != "false"

    probs = None  # large, so not sent to the other processes: they read it from the run's folder

    def read_or_sample() -> list[dict[str, Any]]:
        nonlocal probs
        if resumed and kept.is_file():
            return read_jsonl(kept, dict[str, Any], "start afresh.")
        sampled = sample_rows(count, is_conversational(dataset[0]), model, args)
        probs = sampled.probs
        return sampled.rows

    rows = shared(read_or_sample)
    if len(rows) != count:
        raise ConfigurationError(
            f"replay={args.replay} is {count} rows beside this data, and {kept} has {len(rows)}:"
            " resume with the share and the data that the run began with."
        )
    if not all({"input_ids", "labels"} <= row.keys() for row in rows):
        raise ConfigurationError(
            f"{kept} has rows without input_ids and labels: an older eaft wrote it. Start afresh."
        )
    return Replayed(rows, probs)


def sample_rows(count: int, conversational: bool, model: str, args: EAFTConfig) -> Replayed:
    """
    Return `count` rows whose answers ended, as they were sampled.

    Each row has the token ids for training, `input_ids` and `labels` (-100 for the prompt), and the
    texts for a reader, `prompt` and `completion`. Training uses the tokens: a template that renders
    the answer as a message may write another context, or thoughts that the model did not write.
    """
    tokenizer = load_tokenizer(model, args.model_init_kwargs)
    loaded = (
        AutoModelForCausalLM.from_pretrained(model, **args.model_init_kwargs).to(args.device).eval()
    )
    protocol = Protocol(apply_chat_template=conversational)
    prompts = read_prompts(args.replay_prompts, sys.maxsize)
    random.Random(args.seed).shuffle(prompts)  # few rows use few prompts, and each seed uses others
    rows: list[dict[str, Any]] = []
    ended: list[Answer] = []
    asked = itertools.cycle(prompts)
    for attempt in range(TRIES):
        if len(rows) >= count:
            break
        batch = list(itertools.islice(asked, count))
        answers = sample_answers(
            loaded,
            tokenizer,
            [ask(tokenizer, prompt, protocol) for prompt in batch],
            ANSWER_TOKENS,
            add_special_tokens=not conversational,
            seed=(args.seed * TRIES + attempt) << 20,  # a batch adds its number
        )
        for answer in answers:
            if len(answer.answer_ids) < ANSWER_TOKENS:  # it ended
                ended.append(answer)
                ids, unlabelled = (
                    answer.prompt_ids + answer.answer_ids,
                    [-100] * len(answer.prompt_ids),
                )
                texts = {
                    "prompt": tokenizer.decode(answer.prompt_ids),
                    "completion": tokenizer.decode(answer.answer_ids),
                }
                rows.append({**texts, "input_ids": ids, "labels": unlabelled + answer.answer_ids})
    probs = None
    if args.replay_loss == "kl" and len(rows) >= count:
        probs = TopProbs.cat(BaseAnswers.record(loaded, ended[:count]).probs)
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(rows) < count:
        raise ConfigurationError(
            f"replay={args.replay} asks for {count} answers, and of {TRIES * count} only"
            f" {len(rows)} ended within {ANSWER_TOKENS} tokens: give prompts with shorter answers"
            " (replay_prompts), or a smaller share."
        )
    return Replayed(rows[:count], probs)
