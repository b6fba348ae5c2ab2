"""
lm-eval's own models, and what lm-eval does not report of them: thoughts that never end, truncated
parts, and progress.

Importing this needs lm-eval.
"""

from __future__ import annotations

from collections import defaultdict, deque
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from eaft.evaluation.lm_eval_internals import (
    HFLM,
    handle_stop_sequences,
    postprocess_generated_text,
)
from eaft.evaluation.progress import Progress
from eaft.evaluation.thinking import NONE, Thinking, split_thoughts
from eaft.models import vocabulary_size

# A text has at most as many tokens as bytes, and so many special tokens
MOST_SPECIAL = 8


class Generation(NamedTuple):
    """
    What a model wrote, thoughts and special tokens included, and whether only the limit on its
    length ended it.
    """

    text: str
    full: bool


class Watched:
    """
    A class to put before a model of lm-eval. It notes truncated parts, replaces unfinished thoughts
    by an empty answer, and counts progress.

    lm-eval orders and batches the requests itself, and calls a cache hook for each answer in that
    order. From these calls we know which request a row of a batch answers.
    """

    progress: Progress | None = None
    thinking = False  # whether it is asked to think
    ways: Thinking = NONE  # how it thinks
    # (task, row) -> truncated parts, `answer` or `thoughts`; this process's items only
    cuts: dict[tuple[str, int], set[str]]

    def think(self, thinking: bool, ways: Thinking) -> None:
        """
        Ask with thinking on or off from here on, and begin `cuts` anew; see
        `eaft.evaluation.thinking.Thinking`.
        """
        self.cuts = {}
        ours = {**ways.on, **ways.off}
        others = {
            name: value for name, value in self.chat_template_args.items() if name not in ours
        }
        self.chat_template_args = {**others, **(ways.on if thinking else ways.off)}
        self.enable_thinking = self.thinking = thinking
        self.ways = ways

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """
        Return lm-eval's answers without thoughts, which a model may write with thinking off, too.
        An answer is empty if its thoughts never ended.
        """
        self.generated: deque[Generation] = deque()
        # Of equal prompts the first is answered first: lm-eval's sorting is stable
        generations: defaultdict[str, deque[Generation]] = defaultdict(deque)
        step = self.share(requests)

        def note(kind: str, request: tuple[str, dict[str, Any]], answer: str) -> None:
            generations[request[0]].append(self.generated.popleft())
            self.advance(items=step)

        self.cache_hook = SimpleNamespace(add_partial=note)
        answers = super().generate_until(requests, disable_tqdm=True)  # type: ignore[misc]
        for i, request in enumerate(requests):
            prompt, settings = request.args[:2]
            written, until = generations[prompt].popleft(), settings.get("until")
            answer = split_thoughts(prompt, written.text, self.ways.start, self.ways.end)
            if answer is None:
                answers[i] = ""
            elif answer != written.text:
                answers[i] = self.clean(answer, until)
            cut = cut_of(written, answer, until)
            self.cuts.setdefault((request.task_name, request.doc_id), set()).update(
                [cut] if cut else []
            )
        return answers

    def clean(self, answer: str, until: str | list[str] | None) -> str:
        """Return an answer as lm-eval returns it: up to a stop string, without special tokens."""
        added = self.tokenizer.added_tokens_decoder.values()
        for token in {
            *self.tokenizer.all_special_tokens,
            *(token.content for token in added if token.special),
        }:
            answer = answer.replace(token, "")
        end = (
            None
            if self.tokenizer.eos_token in self.tokenizer.all_special_tokens
            else self.tokenizer.eos_token
        )
        return postprocess_generated_text(
            answer.lstrip(), handle_stop_sequences(until, eos=end), None
        )

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return lm-eval's log-likelihoods."""
        step = self.share(requests)
        self.cache_hook = SimpleNamespace(
            add_partial=lambda kind, request, answer: self.advance(items=step)
        )
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]

    def cuts_prompt(self, prompt: str, rest: str | dict[str, Any]) -> bool:
        """
        Return whether a request (a choice, or the settings for an answer) was left-truncated, to
        fit the context.
        """
        text, most = (
            (prompt + rest, self.longest_pair)
            if isinstance(rest, str)
            else (prompt, self.max_length)
        )
        if isinstance(rest, dict):
            most -= rest["max_gen_toks"]
        return len(text.encode()) + MOST_SPECIAL > most and len(self.tok_encode(text)) > most

    def share(self, requests: list[Any]) -> float:
        """Return how many items, of all processes, a request of this one stands for."""
        items = {(request.task_name, request.doc_id) for request in requests}
        return len(items) / max(len(requests), 1) * self.world_size

    def advance(self, items: float = 0, tokens: int = 0) -> None:
        """Count progress, if it is shown."""
        if self.progress is not None:
            self.progress.advance(items, tokens * self.world_size)

    # Attributes of all models of lm-eval
    chat_template_args: dict[str, Any]
    max_length: int
    tok_encode: Any
    tokenizer: Any
    world_size: int
    longest_pair: int  # tokens of a prompt and a choice; longer ones are cut on the left


def cut_of(written: Generation, answer: str | None, until: str | list[str] | None) -> str | None:
    """
    Return the part of an answer that the limit on its length cut: `thoughts` (no answer is left),
    `answer`, or None.
    """
    if answer is None:
        return "thoughts"
    stopped = any(stop in answer for stop in handle_stop_sequences(until, eos=None) if stop)
    return "answer" if written.full and not stopped else None


class HFModel(Watched, HFLM):
    """
    lm-eval's `hf` model, watched. For an adapter the base model's embeddings grow if they must, and
    never shrink.
    """

    _model: Any

    @property
    def longest_pair(self) -> int:  # type: ignore[override]
        """One token more than the context: the last token is predicted and not read."""
        return self.max_length + 1

    def _create_model(self, *args: Any, peft: str | None = None, **kwargs: Any) -> None:
        super()._create_model(*args, **kwargs)
        if peft is not None:
            # lm-eval would cut the embeddings to the tokenizer's size, and many models have more
            # rows than tokens
            from peft import PeftModel

            size = vocabulary_size(self.tokenizer)
            if size > len(self._model.get_input_embeddings().weight):
                self._model.resize_token_embeddings(size)
            self._model = PeftModel.from_pretrained(self._model, peft)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
        if self.thinking and self.ways.end is not None:
            # The task's stop strings may stand in the thoughts; lm-eval cuts the answer at them
            # afterwards
            stop = [self.tok_decode(self.eot_token_id, skip_special_tokens=False)]
        output = super()._model_generate(context, max_length=max_length, stop=stop, **kwargs)
        own = self.model.generation_config.eos_token_id
        ends = {self.eot_token_id, *(own if isinstance(own, list) else [own])}
        for i, row in enumerate(output[:, context.shape[1] :].tolist()):
            length = next((n for n, token in enumerate(row, 1) if token in ends), None)
            if length is not None:  # lm-eval cuts at the tokenizer's end token alone
                output[i, context.shape[1] + length - 1 :] = self.eot_token_id
            text = self.tok_decode(row[:length], skip_special_tokens=False)
            self.generated.append(
                Generation(text, length is None and context.shape[1] + len(row) >= max_length)
            )
            self.advance(tokens=length or len(row))
        return output

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.advance(tokens=inps.numel())
        return super()._model_call(inps, *args, **kwargs)


class WatchedVLLM(Watched):
    """`Watched` for lm-eval's `vllm` model, whose import needs vLLM."""

    @property
    def longest_pair(self) -> int:  # type: ignore[override]
        """One token less than the context: vLLM needs room to generate one."""
        return self.max_length - 1

    def think(self, thinking: bool, ways: Thinking) -> None:
        """See `Watched.think`; lm-eval itself passes `enable_thinking` to the template."""
        super().think(thinking, ways)
        # With it, lm-eval passes no stop string of a task to vLLM
        self.think_end_token = ways.end if thinking else None
        self.chat_template_args.pop("enable_thinking", None)

    def _model_generate(
        self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None
    ) -> Any:
        outputs = super()._model_generate(  # type: ignore[misc]
            requests, generate=generate, sampling_params=sampling_params
        )
        for request, output in zip(requests, outputs, strict=True):
            if generate:
                written = output.outputs[0]
                self.generated.append(Generation(written.text, written.finish_reason == "length"))
            self.advance(tokens=len(written.token_ids) if generate else len(request))
        return outputs
