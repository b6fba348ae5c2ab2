"""
A model under one protocol. Each measurement is made once, and read from the store afterwards.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from eaft import files
from eaft.evaluation.asking import ask
from eaft.evaluation.drift import Answer, BaseAnswers, Share, answer_log_probs, sample_answers
from eaft.evaluation.folder import write_items
from eaft.evaluation.identity import (
    digest,
    software,
    tasks_digest,
    tokenizer_digest,
    weights_digest,
)
from eaft.evaluation.launch import processes, shared
from eaft.evaluation.lm_eval_models import load, release
from eaft.evaluation.model_settings import generation_config
from eaft.evaluation.progress import Progress
from eaft.evaluation.protocol import Protocol
from eaft.evaluation.results import Item
from eaft.evaluation.scores import score
from eaft.evaluation.store import Store
from eaft.evaluation.suite import Benchmark
from eaft.files import read_json
from eaft.models import source
from eaft.provenance import write_json

T = TypeVar("T")
AGAIN = "delete {}, and it is measured again."
WAY = "delete its folder, or all that is kept: eaft cache --clear."


class MeasuredModel:
    """
    A model under one protocol. It is loaded when something has to be measured, once, and freed by
    `free`.

    Under a launcher every process calls every method: they share the work, and the first one reads
    and writes.

    Args:
        model: a Hub id, a folder, or a folder with a PEFT adapter.
        tokenizer: its tokenizer, with the chat template it is asked with.
        protocol: complete: no setting is "auto" or still to be chosen.
        store: where measurements are kept.

    Attributes:
        kept: what was read from the store instead of measured, as `eaft eval` reports it.
    """

    def __init__(
        self, model: str, tokenizer: Any, protocol: Protocol, store: Store | None = None
    ) -> None:
        self.model, self.tokenizer, self.protocol = model, tokenizer, protocol
        self.store = store or Store()
        self.kept: list[str] = []
        self._lm: Any = None
        self._backend: str | None = None

    def items(self, benchmark: Benchmark, progress: Progress | None = None) -> list[Item]:
        """Return a benchmark's items, as `eaft.evaluation.scores.score` does."""
        others = (
            "drift_prompts",
            "max_new_tokens",
            "template_date",
        )  # the last is in the tokenizer's digest
        protocol = {
            name: value for name, value in asdict(self.protocol).items() if name not in others
        }
        if benchmark.digest is None:
            benchmark.digest = tasks_digest(
                benchmark.tasks, benchmark.limit, self.protocol.num_fewshot
            )
        identity = {"items": benchmark.digest, "protocol": protocol}
        return self._keep(
            {**self._identity, **identity},
            lambda: score(self._load(self.protocol.backend), benchmark, self.protocol, progress),
            lambda items, folder: write_items(folder / "items.jsonl", items),
            lambda folder: read_items(folder / "items.jsonl"),
            otherwise=[],
            name=benchmark.name,
        )

    def sampled(
        self, prompts: list[Any], advance: Callable[[int], object] | None = None
    ) -> list[Answer]:
        """
        Return the model's own answers to prompts (strings or messages).

        They are kept for any device and batch size, since all sample one distribution.

        Args:
            advance: as `sample_answers` takes it.
        """

        def sample() -> list[Answer]:
            lm, protocol = self._load("hf"), self.protocol
            return sample_answers(
                lm.model,
                self.tokenizer,
                self._texts(prompts),
                protocol.max_new_tokens,
                add_special_tokens=not protocol.apply_chat_template,
                batch_size=protocol.answer_batch,
                share=share_of(lm),
                advance=advance,
            )

        answers = self._keep(
            self._sampled_identity(prompts),
            sample,
            lambda answers, folder: write_json(
                folder / "answers.json", [asdict(answer) for answer in answers]
            ),
            read_sampled,
            otherwise=[],
        )
        return shared(lambda: answers)

    def find_sampled(self, prompts: list[Any]) -> list[Answer] | None:
        """Return the answers of `sampled` if they are kept; for the first process alone."""
        folder = self.store.find(self._sampled_identity(prompts))
        return None if folder is None else read_sampled(folder)

    def answers(
        self, prompts: list[Any], advance: Callable[[int], object] | None = None
    ) -> BaseAnswers:
        """
        Return the model's own answers to prompts (strings or messages), and its probabilities at
        their positions.

        All processes get them, since each measures the drift of a part.

        Args:
            advance: as `sample_answers` takes it.
        """
        sampled = self.sampled(prompts, advance)
        identity = {
            **self._identity,
            "probs": digest([asdict(answer) for answer in sampled]),
            **self._computed,
        }

        def record() -> BaseAnswers:
            lm = self._load("hf")
            return BaseAnswers.record(lm.model, sampled, share_of(lm))

        answers = self._keep(
            identity, record, BaseAnswers.save, BaseAnswers.load, otherwise=None, name="answers"
        )
        return shared(lambda: answers)

    def drift(self, answers: BaseAnswers) -> tuple[np.ndarray, np.ndarray]:
        """
        Return, for each of a base model's answers, summed KL(base || this) (nats) and tokens:
        `[prompts]` each.
        """
        identity = {"drift": answers.digest, **self._computed}

        def measure() -> tuple[np.ndarray, np.ndarray]:
            lm = self._load("hf")
            return answers.drift(lm.model, share_of(lm))

        return self._keep_sums("drift", identity, measure)

    def nll(self, rows: list[dict[str, list[int]]]) -> tuple[np.ndarray, np.ndarray]:
        """
        Return, for each row, the nll (nats) summed over its labelled tokens, and their number:
        `[rows]` each.

        Args:
            rows: `input_ids` and `labels` of each, as a trainer prepares them, with at least one
                labelled token. A negative label is not scored, nor is the first one, which no
                position predicts.
        """

        def measure() -> tuple[np.ndarray, np.ndarray]:
            lm = self._load("hf")
            return nll_of_rows(lm.model, rows, share_of(lm))

        return self._keep_sums("nll", {"nll": digest(rows), **self._computed}, measure)

    def likeliest(self, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        """
        Return the model's likeliest answer (greedy) to each prompt, as text.

        Args:
            prompts: token ids of each.
        """

        def answer() -> list[str]:
            lm, size = self._load("hf"), self.protocol.answer_batch
            return likeliest_answers(
                lm.model, self.tokenizer, prompts, max_new_tokens, size, share_of(lm)
            )

        identity = {"likeliest": digest(prompts), "max_new_tokens": max_new_tokens}
        return self._keep(
            {**self._identity, **identity, **self._computed},
            answer,
            lambda answers, folder: write_json(folder / "texts.json", answers),
            lambda folder: read_json(folder / "texts.json", list[str], WAY),
            otherwise=[],
        )

    def loaded(self) -> Any:
        """Return the torch model, loaded now if it is not; to change its weights until `free`."""
        return self._load("hf").model.eval()

    def free(self) -> None:
        """Free the memory for the next model."""
        release(self._lm)
        self._lm = self._backend = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What every measurement of this model depends on."""
        weights = weights_digest(self.model, self.protocol.model_args.get("revision"))
        return {
            **{
                "weights": weights,
                "tokenizer": tokenizer_digest(self.tokenizer),
                "software": software(),
            },
            "generation": generation_config(self.model, self.protocol.model_args).to_diff_dict(),
        }

    @property
    def _computed(self) -> dict[str, Any]:
        """The part of the protocol that changes the computed probabilities."""
        return {name: getattr(self.protocol, name) for name in ("dtype", "model_args")}

    def _sampled_identity(self, prompts: list[Any]) -> dict[str, Any]:
        return {
            **{name: self._identity[name] for name in ("weights", "tokenizer", "generation")},
            **{"sampled": self._texts(prompts), "eaft": self._identity["software"]["eaft"]},
            **{
                name: getattr(self.protocol, name)
                for name in ("apply_chat_template", "max_new_tokens")
            },
        }

    def _texts(self, prompts: list[Any]) -> list[str]:
        """
        Return the texts that the model gets for prompts, by the protocol and the template.
        """
        return [ask(self.tokenizer, prompt, self.protocol) for prompt in prompts]

    def _load(self, backend: Literal["hf", "vllm"]) -> Any:
        """Return lm-eval's model; `hf`'s has the torch model, as `.model`."""
        if self._backend != backend:
            self.free()
            args = self.protocol.model_args
            if (
                backend != self.protocol.backend
            ):  # drift beside vLLM: the same model, without vLLM's own arguments
                args = source(args)
            self._lm = load(
                self.model, self.tokenizer, replace(self.protocol, backend=backend, model_args=args)
            )
            self._backend = backend
        return self._lm

    def _keep(
        self,
        identity: dict[str, Any],
        measure: Callable[[], T],
        write: Callable[[T, Path], None],
        read: Callable[[Path], T],
        otherwise: Any,
        name: str | None = None,
    ) -> T:
        """
        Return the measurement that is kept under an identity, or measure and keep it. Processes
        other than the first return `otherwise`.

        Args:
            name: its name in `kept`.
        """
        main = processes().is_main_process
        folder = self.store.find(identity) if main else None
        if shared(lambda: folder is not None):
            self.kept += [name] if name else []
            return read(folder) if folder is not None else otherwise
        measured = measure()
        if main:
            with self.store.write(identity, self.model) as staging:
                write(measured, staging)
        return measured if main else otherwise

    def _keep_sums(
        self,
        name: str,
        identity: dict[str, Any],
        measure: Callable[[], tuple[np.ndarray, np.ndarray]],
    ) -> tuple[np.ndarray, np.ndarray]:
        of_ids = {
            name: self._identity[name] for name in ("weights", "software")
        }  # no tokenizer takes part
        return self._keep(
            {**of_ids, **identity},
            measure,
            lambda sums, folder: write_json(folder / "sums.json", [part.tolist() for part in sums]),
            read_sums,
            otherwise=(np.array([]), np.array([])),
            name=name,
        )


def likeliest_answers(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    share: Share,
    advance: Callable[[int], object] | None = None,
) -> list[str]:
    """
    Return a model's likeliest answer (greedy) to each prompt, as text.

    Args:
        model: the torch model.
        prompts: token ids of each.
        share, advance: as `sample_answers` takes them.
    """
    answers = sample_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens,
        batch_size=batch_size,
        share=share,
        greedy=True,
        advance=advance,
    )
    ids = [answer.answer_ids for answer in answers]
    return list(tokenizer.batch_decode(ids, skip_special_tokens=True))


@torch.no_grad()
def nll_of_rows(
    model: Any, rows: list[dict[str, list[int]]], share: Share
) -> tuple[np.ndarray, np.ndarray]:
    """
    Return each row's nll (nats) summed over its labelled tokens, and their number: `[rows]` each.

    Args:
        model: the torch model.
        rows: see `MeasuredModel.nll`.
        share: which rows belong to this process.
    """
    ids, labels = ([np.array(row[name]) for row in rows] for name in ("input_ids", "labels"))
    labelled = [np.flatnonzero(row[1:] >= 0) + 1 for row in labels]
    sums = {}
    for i in share.of(len(rows)):
        first = labelled[i][0]
        log_probs = answer_log_probs(
            model, Answer(ids[i][:first].tolist(), ids[i][first:].tolist())
        )
        places = torch.tensor(labelled[i] - first, device=log_probs.device)
        targets = torch.tensor(labels[i][labelled[i]], device=log_probs.device)
        nll = torch.nn.functional.nll_loss(log_probs[places], targets, reduction="sum")
        sums[i] = nll.item()
    return np.array(share.gather(sums)), np.array([len(places) for places in labelled])


def read_sums(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums and numbers of tokens that `MeasuredModel.drift` and `nll` kept."""
    sums, counts = read_json(folder / "sums.json", tuple[list[float], list[int]], WAY)
    return np.array(sums), np.array(counts)


def read_sampled(folder: Path) -> list[Answer]:
    """Return the answers that `MeasuredModel.sampled` kept."""
    return [
        Answer(**answer) for answer in read_json(folder / "answers.json", list[dict[str, Any]], WAY)
    ]


def share_of(lm: Any) -> Share:
    """
    Return this process's share, as lm-eval divides the work: if processes hold one model together,
    each has all of it.
    """
    return Share(lm.rank, lm.world_size)


def read_items(file: Path) -> list[Item]:
    """Return the items that `write_items` wrote."""
    return files.read_jsonl(file, Item, AGAIN.format(file.parent))
