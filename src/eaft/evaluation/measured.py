"""A model under one protocol: measured when it is first asked, and read from the store ever after."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from eaft.errors import ConfigurationError
from eaft.evaluation.drift import Answer, BaseAnswers, Share, answer_log_probs, sample_answers
from eaft.evaluation.identity import digest, software, tasks_digest, tokenizer_digest, weights_digest
from eaft.evaluation.scores import Item, Progress, Protocol, ask, load, processes, score
from eaft.evaluation.store import Store
from eaft.evaluation.suite import Benchmark
from eaft.provenance import write_json

T = TypeVar("T")
# Of a protocol, what each kind of measurement depends on
ASKED = ("apply_chat_template", "enable_thinking", "system_instruction")
COMPUTED = ("dtype", "model_args")


class MeasuredModel:
    """
    A model under one protocol. It is loaded when something has to be measured, once, and freed by `free`.

    Under a launcher every process calls every method: they share the work, and the first one reads and writes.

    Args:
        model: a Hub id, a folder, or a folder with a PEFT adapter.
        tokenizer: its tokenizer, with the chat template it is asked with.
        protocol: complete, without "auto" or None where there is something to choose.
        store: where measurements are kept.

    Attributes:
        kept: what was read from the store instead of measured, as `eaft eval` reports it.
    """

    def __init__(self, model: str, tokenizer: Any, protocol: Protocol, store: Store | None = None) -> None:
        self.model, self.tokenizer, self.protocol = model, tokenizer, protocol
        self.store = store or Store()
        self.kept: list[str] = []
        self._lm: Any = None
        self._backend: str | None = None

    def items(self, benchmark: Benchmark, progress: Progress | None = None) -> list[Item]:
        """Return a benchmark's items, as `eaft.evaluation.scores.score` does."""
        protocol = {k: v for k, v in asdict(self.protocol).items() if k not in ("drift_prompts", "max_new_tokens")}
        if benchmark.digest is None:  # before the first run of its tasks, which changes their settings
            benchmark.digest = tasks_digest(benchmark.tasks, benchmark.limit, self.protocol.num_fewshot)
        identity = {"items": benchmark.digest, "protocol": protocol}
        return self._keep(
            benchmark.name,
            identity,
            lambda: score(self._load(self.protocol.backend), benchmark, self.protocol, progress),
            lambda items, folder: write_jsonl(folder / "items.jsonl", items),
            lambda folder: read_jsonl(folder / "items.jsonl"),
            otherwise=[],
        )

    def answers(self, prompts: list[Any]) -> BaseAnswers:
        """
        Return the model's own answers to prompts (strings or messages), and its probabilities at their positions.

        On every process, since each measures the drift of a part of them.
        """

        def record() -> BaseAnswers:
            lm, protocol = self._load("hf"), self.protocol
            texts = [ask(self.tokenizer, prompt, protocol) for prompt in prompts]
            answers = sample_answers(
                lm.model,
                self.tokenizer,
                texts,
                protocol.max_new_tokens,
                add_special_tokens=not protocol.apply_chat_template,
                batch_size=protocol.batch_size,
                share=share_of(lm),
            )
            return BaseAnswers.record(lm.model, answers, share_of(lm))

        found = self._keep(
            "answers",
            self._answers_identity(prompts),
            record,
            BaseAnswers.save,
            BaseAnswers.load,
            otherwise=None,
        )
        return shared(found)

    def drift(self, answers: BaseAnswers) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each of a base model's answers, summed KL(base || this) (nats) and tokens: `[prompts]` each."""
        identity = {"drift": answers.digest, "protocol": {name: getattr(self.protocol, name) for name in COMPUTED}}

        def measure() -> tuple[np.ndarray, np.ndarray]:
            lm = self._load("hf")
            return answers.drift(lm.model, share_of(lm))

        return self._keep_sums("drift", identity, measure)

    def nll(self, rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """
        Return, for each row's completion, the summed nll (nats) and tokens: `[rows]` each.

        Args:
            rows: with `prompt` and `completion`, text or messages, as for training.

        Raises:
            ConfigurationError: a row without them, or one that does not fit the context.
        """
        identity = {"nll": digest(rows), "protocol": {name: getattr(self.protocol, name) for name in COMPUTED}}
        examples = [example(self.tokenizer, row) for row in rows]

        @torch.no_grad()
        def measure() -> tuple[np.ndarray, np.ndarray]:
            lm, sums = self._load("hf"), {}
            share = share_of(lm)
            for i in share.of(len(examples)):
                log_probs = answer_log_probs(lm.model, examples[i])
                labels = torch.tensor(examples[i].answer_ids, device=log_probs.device)
                sums[i] = torch.nn.functional.nll_loss(log_probs, labels, reduction="sum").item()
            return np.array(share.gather(sums)), np.array([len(e.answer_ids) for e in examples])

        return self._keep_sums("nll", identity, measure)

    def free(self) -> None:
        """Give back the memory, so that the next model finds it free."""
        self._lm = self._backend = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What every measurement of this model depends on."""
        weights = weights_digest(self.model, self.protocol.model_args.get("revision"))
        return {"weights": weights, "tokenizer": tokenizer_digest(self.tokenizer), "software": software()}

    def _answers_identity(self, prompts: list[Any]) -> dict[str, Any]:
        names = (*ASKED, *COMPUTED, "max_new_tokens", "batch_size")
        return {"answers": digest(prompts), "protocol": {name: getattr(self.protocol, name) for name in names}}

    def _load(self, backend: str) -> Any:
        """Return lm-eval's model; `hf`'s has the torch model, as `.model`."""
        if self._backend != backend:
            self.free()
            self._lm = load(self.model, self.tokenizer, self.protocol, backend)
            self._backend = backend
        return self._lm

    def _keep(
        self,
        name: str,
        identity: dict[str, Any],
        measure: Callable[[], T],
        write: Callable[[T, Path], None],
        read: Callable[[Path], T],
        otherwise: Any,
    ) -> T:
        """Return what is kept under an identity, or measure and keep it; on other processes, `otherwise`."""
        state = processes()
        folder = None
        if state.is_main_process:
            identity = {**self._identity, **identity}
            folder = self.store.find(identity)
        if shared(folder is not None):
            self.kept.append(name)
            return read(folder) if folder is not None else otherwise
        found = measure()
        if state.is_main_process:
            with self.store.write(identity, self.model) as staging:
                write(found, staging)
        return found if state.is_main_process else otherwise

    def _keep_sums(
        self, name: str, identity: dict[str, Any], measure: Callable[[], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        return self._keep(
            name,
            identity,
            measure,
            lambda found, folder: write_json(folder / "sums.json", [part.tolist() for part in found]),
            lambda folder: tuple(np.array(part) for part in json.loads((folder / "sums.json").read_text())),
            otherwise=(np.array([]), np.array([])),
        )


def share_of(lm: Any) -> Share:
    """Return this process's share: lm-eval's, which gives every process all where they hold one model together."""
    return Share(lm.rank, lm.world_size)


def shared(value: T) -> T:
    """Return the first process's value on all."""
    if processes().num_processes == 1:
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]


def example(tokenizer: Any, row: dict[str, Any]) -> Answer:
    """
    Return a training row as token ids: what is given, and what is to be learned.

    As TRL tokenizes it: messages by the chat template, text as it is with the end token.

    Raises:
        ConfigurationError: it has no prompt and completion.
    """
    if not {"prompt", "completion"} <= row.keys():
        raise ConfigurationError(f"A held-out row needs `prompt` and `completion`, and has {', '.join(row)}.")
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        given = tokenizer(prompt)["input_ids"]
        whole = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]
    else:
        given = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(prompt + completion, return_dict=False)
    return Answer(given, whole[len(given) :])


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON Lines, whole or not at all."""
    staging = file.with_suffix(".tmp")
    staging.write_text("".join(json.dumps(row) + "\n" for row in rows))
    staging.replace(file)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Return a JSON Lines file's rows."""
    # Not splitlines, which also splits at the separators that JSON allows inside a string
    return [json.loads(line) for line in file.read_text().split("\n") if line]
