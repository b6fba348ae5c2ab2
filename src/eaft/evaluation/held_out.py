"""A user's held-out rows: their nll, and answers to them, before and after training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from eaft.errors import ConfigurationError, NonFiniteError
from eaft.evaluation.asking import ask
from eaft.evaluation.measured_model import MeasuredModel
from eaft.evaluation.results import HeldOut, HeldOutAnswer
from eaft.models import context_length

LONGEST = 256  # tokens of an answer


@dataclass(frozen=True)
class Asked:
    """
    The prompt of a row, and its answer.

    Attributes:
        row: its number in the file, from 0.
        prompt: a string, which is asked as it is; or what `eaft.evaluation.asking.ask` takes.
        text: the prompt as a reader sees it.
        target: the row's own answer.
    """

    row: int
    prompt: Any
    text: str
    target: str


@dataclass(frozen=True)
class HeldOutRows:
    """
    Rows to measure.

    Attributes:
        file: as the user named it.
        rows: `input_ids` and `labels` of each, as `MeasuredModel.nll` takes them.
        asked: what the rows ask; empty if they are plain text.
        prepared: how they became tokens and labels, as a sentence.
        apart: whether it was checked that no row was trained on.
    """

    file: str
    rows: list[dict[str, list[int]]]
    asked: list[Asked]
    prepared: str
    apart: bool


@dataclass(frozen=True)
class Measurement:
    """
    What is measured on both models.

    Attributes:
        rows: whose nll is measured.
        shown: the rows whose answers are shown; `prompts`: their token ids.
        max_new_tokens: of an answer.
    """

    rows: HeldOutRows
    shown: list[Asked]
    prompts: list[list[int]]
    max_new_tokens: int


@dataclass(frozen=True)
class Side:
    """
    The measurements of one model.

    Attributes:
        sums, counts: each row's summed nll (nats) and labelled tokens, `[rows]`.
        answers: to the rows that are shown.
    """

    sums: np.ndarray
    counts: np.ndarray
    answers: list[str]


def plan(base: MeasuredModel, tuned: MeasuredModel, rows: HeldOutRows, n: int) -> Measurement:
    """
    Return what to measure; the rows shown are the first `n` that ask something and leave room for
    an answer.

    Raises:
        ConfigurationError: the models have different vocabularies.
    """
    if base.tokenizer is not tuned.tokenizer:
        raise ConfigurationError(
            f"--held_out: {tuned.model} and {base.model} have different vocabularies, so their nll"
            " per token cannot be compared: leave --held_out out."
        )
    return Measurement(rows, *to_show(base, rows.asked, n, LONGEST))


def to_show(
    base: MeasuredModel, rows: list[Asked], n: int, longest: int
) -> tuple[list[Asked], list[list[int]], int]:
    """
    Return the first `n` rows that leave room for an answer, the token ids of their prompts, and
    the largest number of tokens of an answer: `longest`, or half of the model's context.
    """
    context = context_length(base.model, base.protocol.model_args)
    room = min(longest, context // 2)
    asked: list[Asked] = []
    prompts: list[list[int]] = []
    for row in rows:
        if len(asked) == n:
            break
        if isinstance(row.prompt, str):  # trained on as plain text
            ids = base.tokenizer(row.prompt)["input_ids"]
        else:
            text = ask(base.tokenizer, row.prompt, base.protocol)
            special = not base.protocol.apply_chat_template
            ids = base.tokenizer(text, add_special_tokens=special)["input_ids"]
        if 0 < len(ids) <= context - room:
            asked.append(row)
            prompts.append(ids)
    return asked, prompts, room


def measure(model: MeasuredModel, what: Measurement) -> Side:
    """
    Measure one model. Only the first process gets numbers.

    Raises:
        NonFiniteError: its nll is not finite.
    """
    sums, counts = model.nll(what.rows.rows)
    if not np.isfinite(sums).all():
        row = int(np.flatnonzero(~np.isfinite(sums))[0])
        raise NonFiniteError(f"--held_out: {model.model}: the nll of row {row} is not finite.")
    answers = model.likeliest(what.prompts, what.max_new_tokens) if what.prompts else []
    return Side(sums, counts, answers)


def summarise(what: Measurement, before: Side, after: Side) -> HeldOut:
    """Compare the base model's side with the tuned model's, row by row."""
    from eaft.evaluation.paired import bootstrap_interval, bootstrap_test  # needs scipy

    counts, change = before.counts, after.sums - before.sums
    low, high = bootstrap_interval(change, counts)
    tokens = int(counts.sum())
    return HeldOut(
        file=what.rows.file,
        rows=len(counts),
        tokens=tokens,
        before=float(before.sums.sum()) / tokens,
        after=float(after.sums.sum()) / tokens,
        change=float(change.sum()) / tokens,
        low=low,
        high=high,
        p_value=bootstrap_test(change, counts, 0.0),
        before_per_row=(before.sums / counts).tolist(),
        after_per_row=(after.sums / counts).tolist(),
        tokens_per_row=counts.tolist(),
        prepared=what.rows.prepared,
        apart=what.rows.apart,
        max_new_tokens=what.max_new_tokens,
        answers=[
            HeldOutAnswer(
                row=asked.row, prompt=asked.text, target=asked.target, before=old, after=new
            )
            for asked, old, new in zip(what.shown, before.answers, after.answers, strict=True)
        ],
    )
