"""
Drift: how far a model has moved from its base, as mean KL(base || tuned) over the base model's own
answers.

The base model's part is made once (`BaseAnswers`): answers sampled to a set of prompts, and its
largest probabilities at their positions, so that base and tuned model need not be in memory
together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from pydantic import ConfigDict, Field, with_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer
from typing_extensions import TypedDict

from eaft.errors import ConfigurationError, NonFiniteError
from eaft.evaluation.results import DriftSummary
from eaft.files import Text, read_jsonl
from eaft.objective.statistics import kl_divergence
from eaft.provenance import write_json

TOP = 2048  # probabilities kept for a position: 16 KiB; of the others only the sum
ANSWERERS = ("assistant", "gpt", "model")  # how data sets call this role
T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """The part of one of several processes: every `world`-th index, from `rank` on."""

    rank: int = 0
    world: int = 1

    def of(self, n: int) -> list[int]:
        """
        Return the indices below `n` that belong to this process.

        Every process gets equally many, so the last index may come twice: if the model is sharded,
        a forward pass needs all processes.
        """
        return [
            min(i, n - 1) for i in range(self.rank, -(-n // self.world) * self.world, self.world)
        ]

    def gather(self, own: dict[int, T]) -> list[T]:
        """Return the values of all processes, in order of the index."""
        pairs = list(own.items())
        if self.world > 1:
            pairs = gather_object(pairs)
        return [value for _, value in sorted(dict(pairs).items())]


@dataclass(frozen=True)
class Answer:
    """A prompt and a model's own answer to it, as token ids."""

    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True)
class TopProbs:
    """
    A model's next-token distribution at the positions of an answer: its `TOP` largest
    probabilities, the rest as one.

    `kl_to` treats all other tokens as a single token, in both distributions. So it is never above
    the KL of the whole distributions (data processing inequality), and it is exact if V <= `TOP`.
    For SmolLM2-135M-Instruct (V = 49,152; a rest of 0.6%) it is 0.7 to 0.8% lower, at drifts of
    0.016 and 0.05.

    Attributes:
        ids: int32 `[tokens, K]`.
        log_probs: float32 `[tokens, K]`.
        rest: float32 `[tokens, 1]`, the log-probability of all other tokens together.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor

    @classmethod
    def of(cls, log_probs: Tensor) -> TopProbs:
        """Keep the largest of log-probabilities `[tokens, V]`."""
        top, ids = log_probs.topk(min(TOP, log_probs.shape[-1]), dim=-1)
        return cls(ids.int().cpu(), top.cpu(), rest_of(log_probs, ids).cpu())

    @classmethod
    def cat(cls, parts: list[TopProbs]) -> TopProbs:
        """Join the distributions of consecutive tokens."""
        names = ("ids", "log_probs", "rest")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def select(self, tokens: Tensor) -> TopProbs:
        """Return the distributions of some tokens, by their numbers `[n]` (int64, on the CPU)."""
        return TopProbs(self.ids[tokens], self.log_probs[tokens], self.rest[tokens])

    def kl_to(self, log_probs: Tensor) -> Tensor:
        """
        Return the KL `[tokens]` (nats) to another model's log-probabilities `[tokens, V]`.

        Raises:
            ConfigurationError: the other model has no logit for a token that is kept here.
        """
        if (highest := int(self.ids.max())) >= log_probs.shape[-1]:
            raise ConfigurationError(
                f"The tuned model has {log_probs.shape[-1]} logits, and the base model's likeliest"
                f" tokens have one of id {highest}, so that drift cannot be measured: leave it out"
                " with --drift_prompts 0."
            )
        ids = self.ids.to(log_probs.device, torch.int64)
        other = torch.cat([log_probs.gather(-1, ids), rest_of(log_probs, ids)], -1)
        return kl_divergence(torch.cat([self.log_probs, self.rest], -1).to(log_probs.device), other)


def rest_of(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probability `[tokens, 1]` of all tokens but `ids` `[tokens, K]` together."""
    return log_probs.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)


@with_config(ConfigDict(extra="allow"))
class Message(TypedDict):
    """A message of a chat. Other keys are for the chat template."""

    role: Annotated[str, Field(min_length=1)]
    content: NotRequired[str | list[Any] | None]


Messages = Annotated[list[Message], Field(min_length=1)]


@with_config(ConfigDict(extra="allow"))
class PromptRow(TypedDict):
    """A row of a file of prompts. Other keys are ignored."""

    prompt: NotRequired[Text | Messages | None]
    messages: NotRequired[Messages | None]


def read_prompts(path: str, n: int) -> list[Any]:
    """
    Return the first `n` prompts of a JSON Lines file, as `prompt_of` makes them of its rows.

    Raises:
        ConfigurationError: there is no such file, or a row has neither `prompt` nor `messages`.
    """
    if not Path(path).is_file():
        raise ConfigurationError(f"{path}: there is no such file of prompts.")
    expected = (
        "expected JSON Lines with a `prompt` (text or messages), or `messages`, in every row."
    )
    rows = read_jsonl(Path(path), PromptRow, expected)
    if not rows or any(row.get("prompt") is None and row.get("messages") is None for row in rows):
        raise ConfigurationError(f"{path}: {expected}")
    return [prompt_of(row) for row in rows[:n]]


def prompt_of(row: dict[str, Any]) -> Any:
    """
    Return the prompt of a row of training data, as `eaft.evaluation.asking.ask` takes it.

    Returns:
        a string or messages; for a row of `messages`, all before the last answer. If the row has
        `tools` or `chat_template_kwargs`, a mapping with these and the `prompt`.
    """
    prompt = row.get("prompt")
    if prompt is None:
        prompt = list(row["messages"])
        while prompt and isinstance(prompt[-1], dict) and prompt[-1].get("role") in ANSWERERS:
            prompt.pop()
    settings = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}
    return {"prompt": prompt, **settings} if settings else prompt


@torch.no_grad()
def sample_answers(
    model: Any,
    tokenizer: Any,
    texts: list[str] | list[list[int]],
    max_new_tokens: int,
    add_special_tokens: bool = False,
    seed: int = 0,
    batch_size: int = 16,
    share: Share = Share(),
    greedy: bool = False,
    advance: Callable[[int], object] | None = None,
) -> list[Answer]:
    """
    Sample one answer to each text from the model's own distribution: temperature 1, nothing cut
    off.

    Only with such answers is the mean KL over their positions an estimate of the divergence between
    the two models' distributions over answers (chain rule).

    Args:
        texts: prompts as the model sees them (`eaft.evaluation.asking.ask`), or their token ids.
        add_special_tokens: whether the tokenizer adds its own; a chat template has written them.
        share: which batches belong to this process. The seed of a batch depends on its index, so
            the number of processes changes nothing.
        greedy: take the likeliest token each time instead.
        advance: called with the number of tokens by which a batch's answers have grown, for each
            batch `max_new_tokens` in all. Without it a bar is shown.
    """
    by_batch: dict[int, list[Answer]] = {}
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    eos = model.generation_config.eos_token_id
    eos_ids = set(eos if isinstance(eos, list) else [eos])
    devices = [model.device] if model.device.type == "cuda" else []
    mine = share.of(len(batches))
    quiet = True if advance or share.rank else None  # None: a bar on a terminal only
    name = "Answers" if greedy else "Sampling the base model's answers"
    for i in tqdm(mine, desc=name, disable=quiet):
        if isinstance(batches[i][0], str):
            batch = tokenizer(
                batches[i],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=add_special_tokens,
            )
        else:
            batch = tokenizer.pad(
                {"input_ids": batches[i]}, return_tensors="pt", padding_side="left"
            )
        batch = batch.to(model.device)
        with torch.random.fork_rng(devices), plain_generation(model, greedy):
            torch.manual_seed(seed + i)
            steps = None if advance is None else Steps(advance)
            output = model.generate(
                **batch, max_new_tokens=max_new_tokens, use_cache=True, streamer=steps
            )
            if steps is not None:  # the answers may have ended before
                steps.advance(max_new_tokens - steps.count)
        width = batch["input_ids"].shape[1]
        by_batch[i] = []
        for row, mask in zip(output, batch["attention_mask"], strict=True):
            answer = row[width:].tolist()
            ends = [j for j, token in enumerate(answer) if token in eos_ids]
            by_batch[i].append(
                Answer(row[:width][mask.bool()].tolist(), answer[: ends[0] + 1] if ends else answer)
            )
    return [answer for batch in share.gather(by_batch) for answer in batch]


class Steps(BaseStreamer):
    """Reports each token by which the answers of a batch grow."""

    def __init__(self, advance: Callable[[int], object]) -> None:
        self.advance = advance
        self.count = -1  # the prompts come first

    def put(self, value: Any) -> None:
        """Count a token of every answer."""
        self.count += 1
        if self.count:
            self.advance(1)

    def end(self) -> None:
        """Do nothing: `generate` calls it."""


@contextlib.contextmanager
def plain_generation(model: Any, greedy: bool) -> Iterator[None]:
    """
    Let `generate` use the probabilities as they are: many models ask for penalties and cut-offs.

    Args:
        greedy: take the likeliest token; else sample.
    """
    holder = (
        model.get_base_model() if hasattr(model, "get_base_model") else model
    )  # PEFT takes it from there
    own = holder.generation_config
    tokens = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = (
        {"do_sample": False}
        if greedy
        else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    )
    holder.generation_config = GenerationConfig(**settings, **tokens)
    try:
        yield
    finally:
        holder.generation_config = own


@torch.no_grad()
def answer_log_probs(model: Any, answer: Answer) -> Tensor:
    """
    Return the model's log-probabilities `[answer tokens, V]` (float32) at the positions that
    predict the answer.

    Raises:
        ConfigurationError: the model does not return logits for each token.
    """
    ids = torch.tensor([answer.prompt_ids + answer.answer_ids], device=model.device)
    keep = len(answer.answer_ids) + 1  # the position before the answer predicts its first token
    logits = model(ids, logits_to_keep=keep).logits
    # A forward may ignore logits_to_keep, and prompt learning then has positions of its own before
    # the prompt's
    config = getattr(model, "active_peft_config", None)
    virtual = config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0
    if logits.ndim != 3 or logits.shape[1] not in {keep, ids.shape[1], ids.shape[1] + virtual}:
        raise ConfigurationError(
            f"model_type={model.config.model_type!r}: its logits for {ids.shape[1]} tokens are"
            f" {list(logits.shape)}, and not one position a token, so that drift cannot be"
            " measured (leave it out with --drift_prompts 0), nor replay_loss='kl' be computed."
        )
    return logits[0, -keep:-1].float().log_softmax(-1)


@dataclass(frozen=True)
class BaseAnswers:
    """
    A base model's own answers, and its probabilities at their positions.

    Attributes:
        answers: one for each prompt.
        probs: one for each answer; at most 16 KiB a token (128 answers of 64 tokens: 128 MiB).
    """

    answers: list[Answer]
    probs: list[TopProbs]

    @property
    def digest(self) -> str:
        """A digest of both."""
        sha = hashlib.sha256(json.dumps([asdict(answer) for answer in self.answers]).encode())
        for tensor in (tensor for probs in self.probs for tensor in vars(probs).values()):
            sha.update(tensor.contiguous().numpy().data)
        return sha.hexdigest()

    @classmethod
    def record(cls, model: Any, answers: list[Answer], share: Share = Share()) -> BaseAnswers:
        """
        Take the base model's probabilities at the positions of its answers.

        Raises:
            NonFiniteError: they are NaN.
        """
        probs = {}
        mine = share.of(len(answers))
        for i in tqdm(
            mine, desc="The base model's probabilities", disable=None if share.rank == 0 else True
        ):
            log_probs = answer_log_probs(model, answers[i])
            if log_probs.isnan().any():
                raise NonFiniteError(f"The base model's probabilities are NaN on prompt {i}.")
            probs[i] = TopProbs.of(log_probs)
        return cls(answers, share.gather(probs))

    def save(self, folder: Path) -> None:
        """Write `answers.json` and `probs.safetensors` into a folder."""
        tensors = {
            f"{i}.{name}": tensor
            for i, probs in enumerate(self.probs)
            for name, tensor in vars(probs).items()
        }
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "probs.safetensors",
        )
        write_json(folder / "answers.json", [asdict(answer) for answer in self.answers])

    @classmethod
    def load(cls, folder: Path) -> BaseAnswers:
        """Read what `save` wrote."""
        answers = [Answer(**answer) for answer in json.loads((folder / "answers.json").read_text())]
        tensors = load_file(folder / "probs.safetensors")
        names = ("ids", "log_probs", "rest")
        return cls(
            answers,
            [TopProbs(*(tensors[f"{i}.{name}"] for name in names)) for i in range(len(answers))],
        )

    def drift(self, tuned: Any, share: Share = Share()) -> tuple[np.ndarray, np.ndarray]:
        """
        Return each answer's KL(base || tuned) summed over its tokens (nats), and their number:
        `[prompts]` each.

        Raises:
            NonFiniteError: the tuned model's probabilities are not finite.
        """
        sums = {}
        mine = share.of(len(self.answers))
        for i in tqdm(mine, desc="Drift", disable=None if share.rank == 0 else True):
            kl = self.probs[i].kl_to(answer_log_probs(tuned, self.answers[i])).sum().item()
            if not np.isfinite(kl):
                raise NonFiniteError(
                    f"The tuned model's probabilities are not finite on prompt {i}."
                )
            sums[i] = kl
        return np.array(share.gather(sums)), np.array(
            [len(answer.answer_ids) for answer in self.answers]
        )


def summarise(sums: np.ndarray, counts: np.ndarray) -> DriftSummary:
    """Return a drift's summary from each prompt's summed KL (nats) and number of tokens."""
    from eaft.evaluation.paired import bootstrap_interval  # needs scipy, which comes with lm-eval

    low, high = bootstrap_interval(sums, counts)
    per_prompt = sums / counts
    return DriftSummary(
        mean=float(sums.sum() / counts.sum()),
        low=low,
        high=high,
        tokens=int(counts.sum()),
        per_prompt=per_prompt.tolist(),
        tokens_per_prompt=counts.tolist(),
        quantiles={f"{q}%": float(np.percentile(per_prompt, q)) for q in (0, 25, 50, 75, 100)},
    )
