"""The results of `eaft tune` as types: what its `results.json` holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import with_config

from eaft.evaluation.results import ABSENT, FORM, HeldOutAnswer
from eaft.provenance import Environment


@with_config(FORM)
@dataclass(kw_only=True)
class Budget:
    """What was allowed."""

    max_drift: float | None
    """The largest drift, in nats per token; null if any was allowed."""
    max_drop: float | None
    """The largest drop of a task, in percentage points; null if no tasks were run."""
    strict: bool
    """Whether the bounds had to be within, and not only the estimates."""


@with_config(FORM)
@dataclass(kw_only=True)
class Data:
    """How much there was to train and to measure on."""

    training_rows: int
    """Rows that were trained on."""
    screening_rows: int
    """Held-out rows that the candidates were chosen by."""
    confirmation_rows: int
    """Held-out rows that the statements are about."""
    left_out: int
    """Rows of --held_out with a prompt that training has, or nearly; they were not used."""
    screening_prompts: int
    """Prompts for drift that the candidates were chosen by."""
    confirmation_prompts: int
    """Prompts for drift that the statements are about."""


@with_config(FORM)
@dataclass(kw_only=True)
class Screened:
    """A member of the family on the screening data, which choose, and prove nothing."""

    step: int
    """Training steps of the checkpoint."""
    share: float
    """The model is base + share * (checkpoint - base)."""
    nll: float
    """Held-out nll, nats per token."""
    drift: float
    """KL(base || model) on the base model's answers, nats per token."""
    nll_change: float | None = field(default=None, metadata=ABSENT)
    """`nll` minus the base model's, on the same rows."""
    nll_low: float | None = field(default=None, metadata=ABSENT)
    """Lower end of the 95% interval of `nll_change`, of this member alone."""
    nll_high: float | None = field(default=None, metadata=ABSENT)
    """Upper end."""
    drift_low: float | None = field(default=None, metadata=ABSENT)
    """Lower end of the 95% interval of `drift`, of this member alone."""
    drift_high: float | None = field(default=None, metadata=ABSENT)
    """Upper end."""


@with_config(FORM)
@dataclass(kw_only=True)
class TaskLoss:
    """What a candidate lost on a task, item by item against the base model."""

    task: str
    """The task."""
    items: int
    """Items that both models answered."""
    base: float
    """The base model's score, in [0, 1]."""
    tuned: float
    """The candidate's."""
    drop: float
    """The base's minus the candidate's, in percentage points."""
    bound: float
    """The true drop is at most this; with 95% for all candidates and tasks together."""
    within: bool
    """Whether the drop is within the budget."""
    shown: bool
    """Whether the bound is."""
    items_needed: int | None
    """How many items would show it; null where it is shown, or the drop is not within."""


@with_config(FORM)
@dataclass(kw_only=True)
class Confirmation:
    """A candidate on the confirmation data."""

    step: int
    """Training steps of the checkpoint."""
    share: float
    """The model is base + share * (checkpoint - base)."""
    drift: float
    """Nats per token."""
    bound: float
    """The true drift is at most this; with 95% it holds for all candidates together."""
    within: bool
    """Whether the estimates (drift, and the tasks' drops) are within the budgets."""
    shown: bool
    """Whether the bounds are."""
    prompts_needed: int | None
    """How many prompts would show the drift; null where shown, or the estimate is not within."""
    tasks: list[TaskLoss]
    """What was lost on tasks; empty if none were run on it."""
    prompts: int
    """Prompts of `drift`."""
    nll: float
    """Held-out nll, nats per token."""
    nll_change: float
    """The same minus the base model's."""
    nll_low: float
    """Lower end of its interval; with 95% the intervals of all candidates hold together."""
    nll_high: float
    """Upper end."""
    rows: int
    """Rows of `nll`."""


@with_config(FORM)
@dataclass(kw_only=True)
class Unconstrained:
    """The lowest held-out nll that screening measured, whatever its drift; screening data."""

    step: int
    """Training steps of the checkpoint."""
    share: float
    """The model is base + share * (checkpoint - base)."""
    nll: float
    """Held-out nll, nats per token."""
    drift: float
    """Nats per token."""
    cost: float | None
    """By how much the returned model's nll is higher on the same rows; null without a model."""


@with_config(FORM)
@dataclass(kw_only=True)
class Drifted:
    """An answer of the base model that the returned model drifted from most."""

    prompt: str
    """What the models were asked."""
    answer: str
    """The base model's own answer."""
    drift: float
    """KL(base || tuned) on it, nats per token."""


@with_config(FORM)
@dataclass(kw_only=True)
class TuneResults:
    """What `eaft tune` found."""

    status: Literal["shown", "within", "none"]
    """shown: the bound is within the budget; within: the estimate is; none: there is no model."""
    sentence: str
    """What was learned, what was lost, how sure that is, and what the budget cost."""
    budget: Budget
    """What was allowed."""
    model: str
    """The base model."""
    data: Data
    """How much there was."""
    base_nll: float
    """The base model's held-out nll on the confirmation rows, nats per token."""
    base_nll_screening: float
    """The same on the screening rows."""
    chosen: Confirmation | None
    """The returned model; null if there is none."""
    candidates: list[Confirmation]
    """All that were confirmed, in their order; the first that passed was returned."""
    screened: list[Screened]
    """All that screening measured."""
    unconstrained: Unconstrained
    """What a budget without end would have returned."""
    answers: list[HeldOutAnswer]
    """
    Of the first rows of `held_out.jsonl`, the rows that confirmed; empty without a model, or where
    rows have no prompts.
    """
    most_drifted: list[Drifted]
    """Worst first; empty without a model."""
    flags: list[str]
    """What `eaft train` was given."""
    stopped_early: str | None = field(default=None, metadata=ABSENT)
    """Why training ended before its last step, as a sentence; null if it did not."""
    environment: Environment
    """Versions, commit and machine."""
