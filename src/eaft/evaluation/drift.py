"""
Drift: how far a model has moved from its base, as mean KL(base || tuned) over the base model's own answers.

The base model's part is made once (`BaseAnswers`): answers sampled to a set of prompts, and its log-probabilities at
their positions, kept on disk, so that base and tuned model need not be in memory together.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig

from eaft.errors import ConfigurationError, NonFiniteError
from eaft.objective.statistics import kl_divergence
from eaft.provenance import write_json

PROMPTS = Path(__file__).parent / "suites" / "prompts.jsonl"  # 32 everyday requests


@dataclass(frozen=True)
class Answer:
    """A prompt and a model's own answer to it, as token ids."""

    prompt_ids: list[int]
    answer_ids: list[int]


def read_prompts(path: str, n: int) -> list[Any]:
    """
    Return the first `n` prompts (strings or messages) of a JSON Lines file with a `prompt` column.

    Raises:
        ConfigurationError: there is no such file, or a row without a prompt.
    """
    if not Path(path).is_file():
        raise ConfigurationError(f"{path}: there is no such file of prompts.")
    # Not splitlines, which also splits at the separators that JSON allows inside a string
    rows = [json.loads(line) for line in Path(path).read_text().split("\n") if line.strip()]
    if not rows or any("prompt" not in row for row in rows):
        raise ConfigurationError(f"{path}: expected JSON Lines with a `prompt` in every row.")
    return [row["prompt"] for row in rows[:n]]


@torch.no_grad()
def sample_answers(
    model: Any, tokenizer: Any, prompts: list[Any], max_new_tokens: int, seed: int = 0, batch_size: int = 16
) -> list[Answer]:
    """
    Sample one answer to each prompt from the model's own distribution: temperature 1, nothing cut off.

    Only then is the mean KL over the answers' positions an estimate of the divergence between the two models'
    distributions over answers (chain rule), and not between their behaviours on text neither would write.
    """
    answers = []
    # A string is sent as a request where the model has a chat template, as its users would
    chats = [
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) and tokenizer.chat_template else prompt
        for prompt in prompts
    ]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(chats), batch_size), desc="Sampling the base model's answers"):
            texts = [
                chat
                if isinstance(chat, str)
                else tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
                for chat in chats[start : start + batch_size]
            ]
            # A chat template has written its own special tokens
            add_special = isinstance(chats[start], str)
            batch = tokenizer(
                texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=add_special
            ).to(model.device)
            with plain_sampling(model):
                output = model.generate(**batch, max_new_tokens=max_new_tokens, use_cache=True)
            width = batch["input_ids"].shape[1]
            eos = model.generation_config.eos_token_id
            eos_ids = set(eos if isinstance(eos, list) else [eos])
            for row, mask in zip(output, batch["attention_mask"], strict=True):
                answer = row[width:].tolist()
                ends = [i for i, token in enumerate(answer) if token in eos_ids]
                answers.append(Answer(row[:width][mask.bool()].tolist(), answer[: ends[0] + 1] if ends else answer))
    return answers


@contextlib.contextmanager
def plain_sampling(model: Any) -> Iterator[None]:
    """Let `generate` sample from the probabilities as they are: many models ask for penalties and cut-offs."""
    holder = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT takes it from there
    own = holder.generation_config
    tokens = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    holder.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **tokens)
    try:
        yield
    finally:
        holder.generation_config = own


@torch.no_grad()
def answer_log_probs(model: Any, answer: Answer) -> Tensor:
    """Return the model's log-probabilities `[answer tokens, V]` (float32) at the positions that predict the answer."""
    ids = torch.tensor([answer.prompt_ids + answer.answer_ids], device=model.device)
    keep = len(answer.answer_ids) + 1  # the position before the answer predicts its first token
    return model(ids, logits_to_keep=keep).logits[0, :-1].float().log_softmax(-1)


class BaseAnswers:
    """
    A base model's answers, and its log-probabilities at their positions, in a folder.

    Takes answer tokens * V * 4 bytes of disk (32 answers of 64 tokens at V = 152k: 1.2 GB), which `free` gives back;
    the answers stay, as `answers.json`.

    Args:
        folder: where they are, or will be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "answers.json"
        self.log_probs = folder / "log_probs"

    @property
    def answers(self) -> list[Answer]:
        """The answers."""
        return [Answer(**answer) for answer in json.loads(self.file.read_text())]

    @property
    def recorded(self) -> bool:
        """Whether the log-probabilities are there, all of them."""
        return self.log_probs.is_dir()

    def record(self, model: Any, tokenizer: Any, prompts: list[Any], max_new_tokens: int, batch_size: int) -> None:
        """Sample the base model's answers, and store its log-probabilities at their positions."""
        self.folder.mkdir(parents=True, exist_ok=True)
        answers = sample_answers(model, tokenizer, prompts, max_new_tokens, batch_size=batch_size)
        write_json(self.file, [asdict(answer) for answer in answers])
        self.record_log_probs(model)

    def record_log_probs(self, model: Any) -> None:
        """
        Store the base model's log-probabilities at the positions of the answers there are.

        Raises:
            NonFiniteError: they are NaN.
        """
        staging = self.folder / "log_probs.tmp"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for i, answer in enumerate(tqdm(self.answers, desc="The base model's probabilities")):
            log_probs = answer_log_probs(model, answer)
            if log_probs.isnan().any():
                raise NonFiniteError(f"The base model's probabilities are NaN on prompt {i}.")
            save_file({"log_probs": log_probs.cpu()}, staging / f"{i}.safetensors")
        shutil.rmtree(self.log_probs, ignore_errors=True)
        staging.rename(self.log_probs)

    def free(self) -> None:
        """Delete the log-probabilities."""
        shutil.rmtree(self.log_probs, ignore_errors=True)

    def drift(self, tuned: Any) -> dict[str, Any]:
        """
        Return mean KL(base || tuned) in nats per token over the answers.

        Returns:
            `mean` (over all tokens), `low` and `high` (95%, a bootstrap of the prompts), `tokens`, `per_prompt` (each
            answer's own mean) and `quantiles` of these.

        Raises:
            NonFiniteError: the tuned model's probabilities are not finite.
        """
        sums, counts = [], []
        for i, answer in enumerate(tqdm(self.answers, desc="Drift")):
            base = load_file(self.log_probs / f"{i}.safetensors")["log_probs"].to(tuned.device)
            kl = kl_divergence(base, answer_log_probs(tuned, answer)).sum().item()
            if not np.isfinite(kl):
                raise NonFiniteError(f"The tuned model's probabilities are not finite on prompt {i}.")
            sums.append(kl)
            counts.append(len(answer.answer_ids))
        return summarise(np.array(sums), np.array(counts))


def summarise(sums: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """Return a drift's summary from each answer's summed KL and number of tokens; see `BaseAnswers.drift`."""
    from eaft.evaluation.paired import bootstrap_interval  # needs scipy, which comes with lm-eval

    low, high = bootstrap_interval(sums, counts)
    per_prompt = sums / counts
    return {
        "mean": float(sums.sum() / counts.sum()),
        "low": low,
        "high": high,
        "tokens": int(counts.sum()),
        "per_prompt": per_prompt.tolist(),
        "quantiles": {f"{q}%": float(np.percentile(per_prompt, q)) for q in (0, 25, 50, 75, 100)},
    }
