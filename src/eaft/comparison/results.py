"""
The results of `eaft compare` as types: what its `results.json` holds.

Scores are in [0, 1]. Drift and nll are in nats per token, sums in nats. A difference is the first
objective's value minus the second's. `results.schema.json` is made from these types by
`docs/make_schemas.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import with_config

from eaft.evaluation.results import (
    ABSENT,
    FORM,
    Asked,
    Changes,
    Number,
    Probability,
    RecordedProtocol,
    Setting,
)
from eaft.provenance import Environment


@with_config(FORM)
@dataclass(kw_only=True)
class Difference:
    """The mean difference of two objectives, first minus second."""

    change: float
    """Over seeds and items."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end of the 95% interval."""
    p_value: Probability
    """Of the hypothesis that there is none, two-sided; below 0.05 where the interval excludes 0."""
    p_holm: Probability
    """`p_value`, adjusted by Holm's method over all differences of its kind."""
    items: Number
    """Items, prompts or held-out examples that it is measured on."""
    seeds: Number
    """Seeds; with one, the interval and the p-value hold no seed-to-seed variance."""
    per_seed: list[float]
    """Each seed's own difference."""


@with_config(FORM)
@dataclass(kw_only=True)
class FrontDifference:
    """The fronts of two objectives: the least drift at each target, and how they differ."""

    targets: list[float]
    """From hard to easy: held-out nll, or 1 minus a task's score."""
    first: list[float]
    """The first objective's least drift at each target, mean over seeds."""
    second: list[float]
    """The second objective's."""
    difference: list[float]
    """First minus second at each target."""
    low: list[float]
    """Lower end of the simultaneous 95% band of the difference."""
    high: list[float]
    """Upper end of the band."""
    mean: Difference
    """Over all targets."""


@with_config(FORM)
@dataclass(kw_only=True)
class PairView:
    """How two objectives differ at one view."""

    tasks: dict[str, Difference]
    """In score, by task."""
    means: dict[str, Difference]
    """In mean score, by group: `target` and `general`, as far as the recipe has tasks of each."""
    drift: dict[str, Difference]
    """In drift, by kind of prompts."""
    nll: Difference | None
    """In held-out nll; null without held-out rows."""


@with_config(FORM)
@dataclass(kw_only=True)
class PairResult:
    """Two objectives compared."""

    first: str
    """An objective."""
    second: str
    """The objective it is compared with."""
    seeds: list[int]
    """The seeds that both have."""
    views: dict[str, PairView]
    """By view: `chosen`, the objectives' own choices, and `last`, after the last step."""
    fronts: dict[str, FrontDifference | None]
    """Drift at a matched target, by target; null where there is no target that both reach."""
    interpolated: FrontDifference | None = field(default=None, metadata=ABSENT)
    """
    Drift at a matched held-out nll, both fronts over checkpoints and interpolations; null where
    none were measured, or there is no target that both reach.
    """
    against_interpolated: FrontDifference | None = field(default=None, metadata=ABSENT)
    """The same, with the first objective's checkpoints alone."""

    @property
    def own_choice(self) -> PairView:
        """The view at each objective's own choice; without held-out rows after the last step."""
        return self.views.get("chosen") or self.views["last"]


@with_config(FORM)
@dataclass(kw_only=True)
class PairVerdict:
    """In what the first of a pair is shown to be better or worse: Holm-adjusted p below 0.05."""

    first: str
    """An objective."""
    second: str
    """The objective it is compared with."""
    better: list[str]
    """The quantities in which the first is better."""
    worse: list[str]
    """The quantities in which the first is worse."""
    prefer: str | None
    """The objective to prefer; null where neither is better without being worse."""


@with_config(FORM)
@dataclass(kw_only=True)
class TokenCounts:
    """Numbers of tokens."""

    tokens: list[Number]
    """Of each answer, or of each held-out example."""


@with_config(FORM)
@dataclass(kw_only=True)
class Sums:
    """A mean over all tokens, and the sums it is made of."""

    mean: float
    """Nats per token."""
    sums: list[float]
    """Of each prompt or held-out example, nats."""


@with_config(FORM)
@dataclass(kw_only=True)
class TaskScores:
    """The scores on one task."""

    mean: float
    """Over items."""
    scores: list[float]
    """Of each item."""


@with_config(FORM)
@dataclass(kw_only=True)
class InterpolationResult:
    """All measurements of base + share * (checkpoint - base)."""

    share: float
    """Between 0, the base model, and 1, the checkpoint."""
    drift: dict[str, Sums]
    """By kind of prompts."""
    nll: Sums
    """Of the held-out examples."""


@with_config(FORM)
@dataclass(kw_only=True)
class CheckpointResult:
    """All measurements of one checkpoint."""

    step: Number
    """After how many steps; 0 is the base model."""
    epoch: float
    """After how many epochs."""
    drift: dict[str, Sums]
    """By kind of prompts."""
    nll: Sums | None
    """Of the held-out examples; null without held-out rows."""
    tasks: dict[str, TaskScores]
    """By task, of the tasks that were run on it."""
    interpolations: list[InterpolationResult] | None = field(default=None, metadata=ABSENT)
    """Between it and the base model, by rising share; null where none were measured."""


@with_config(FORM)
@dataclass(kw_only=True)
class Means:
    """The means of one model."""

    target: float | None = field(default=None, metadata=ABSENT)
    """Mean score of the target tasks, if the recipe has some."""
    general: float | None = field(default=None, metadata=ABSENT)
    """Mean score of the general tasks, if the recipe has some."""
    drift_general: float
    """Drift on the general prompts."""
    drift_target: float | None = field(default=None, metadata=ABSENT)
    """Drift on the target prompts, if the recipe has some."""
    nll: float | None = field(default=None, metadata=ABSENT)
    """Held-out nll, if the recipe has held-out rows."""
    tasks: dict[str, float]
    """Mean score by task."""


@with_config(FORM)
@dataclass(kw_only=True)
class BaseResult(Means):
    """The base model."""

    point: CheckpointResult
    """All its measurements."""


@with_config(FORM)
@dataclass(kw_only=True)
class RunResult:
    """One run: an objective, a seed and a learning rate."""

    objective: str
    """The objective."""
    seed: int
    """The seed."""
    learning_rate: float | None
    """The learning rate, if the recipe names several."""
    folder: str
    """The run's folder, beside `results.json`."""
    chosen: bool
    """Whether its objective chose it among the learning rates."""
    commit: str | None
    """The commit of eaft that trained it; null if eaft was installed."""
    tokens_per_s: float
    """Training speed."""
    peak_memory_gib: float
    """Peak memory of training."""
    train_runtime_s: float
    """Duration of training."""
    differs: dict[str, Setting] | None = field(default=None, metadata=ABSENT)
    """
    The settings, beside the weights, in which its model differs from the base model; absent from
    results of earlier versions.
    """
    points: list[CheckpointResult]
    """Its checkpoints, in order of steps."""


@with_config(FORM)
@dataclass(kw_only=True)
class Choice:
    """What one objective chose with one seed."""

    objective: str
    """The objective."""
    seed: int
    """The seed."""
    learning_rate: float | None
    """The learning rate that was chosen, if the recipe names several."""
    steps: dict[str, int]
    """The step by view: `chosen` and `last`."""
    numbers: dict[str, Means]
    """The means by view."""
    changes: dict[str, Changes]
    """By view: each task and mean beside the base model."""

    @property
    def own_changes(self) -> Changes:
        """The changes at its own choice; without held-out rows after the last step."""
        return self.changes.get("chosen") or self.changes["last"]


@with_config(FORM)
@dataclass(kw_only=True)
class Spread:
    """A mean and standard deviation over seeds."""

    mean: float
    """Over seeds."""
    std: float | None
    """Sample standard deviation; null with one seed."""


@with_config(FORM)
@dataclass(kw_only=True)
class Spreads:
    """The means of one objective, over seeds."""

    target: Spread | None = field(default=None, metadata=ABSENT)
    """Mean score of the target tasks, if the recipe has some."""
    general: Spread | None = field(default=None, metadata=ABSENT)
    """Mean score of the general tasks, if the recipe has some."""
    drift_general: Spread
    """Drift on the general prompts."""
    drift_target: Spread | None = field(default=None, metadata=ABSENT)
    """Drift on the target prompts, if the recipe has some."""
    nll: Spread | None = field(default=None, metadata=ABSENT)
    """Held-out nll, if the recipe has held-out rows."""
    tasks: dict[str, Spread]
    """Mean score by task."""


@with_config(FORM)
@dataclass(kw_only=True)
class ObjectiveResult:
    """One objective, over seeds."""

    chosen: Spreads | None = field(default=None, metadata=ABSENT)
    """At its own choice, if the recipe has held-out rows."""
    last: Spreads
    """After the last step."""
    training: dict[str, Spread]
    """`tokens_per_s`, `peak_memory_gib` and `train_runtime_s` of the chosen runs."""

    def at(self, view: str) -> Spreads:
        """Return the means at a view, `chosen` or `last`."""
        return self.chosen if view == "chosen" and self.chosen is not None else self.last


@with_config(FORM)
@dataclass(kw_only=True)
class Failure:
    """A run or a task that failed."""

    objective: str | None
    """The objective; null for a task that failed on the base model."""
    seed: int | None
    """The seed; null for a task that failed on the base model."""
    message: str
    """What failed, and why."""


@with_config(FORM)
@dataclass(kw_only=True)
class KeptModels:
    """The measurements that were read from the store instead of made."""

    models: dict[str, list[str]]
    """By model."""


@with_config(FORM)
@dataclass(kw_only=True)
class Comparison:
    """
    A comparison. Scores are in [0, 1]; drift and nll in nats per token, sums in nats; differences
    are first minus second.
    """

    sentence: str
    """What to do, why, and how sure that is, as Markdown."""
    verdicts: list[PairVerdict]
    """One for each pair."""
    recipe: dict[str, Any]
    """The recipe, without this machine's paths."""
    environment: Environment
    """Versions, commit and machine."""
    protocol: RecordedProtocol
    """How the models were asked."""
    asked: dict[str, Asked]
    """How each task was asked."""
    kept: KeptModels
    """What was not measured anew."""
    groups: dict[str, list[str]]
    """The tasks of `target` and of `general`, as far as the recipe has some."""
    prompts: dict[str, TokenCounts]
    """The base model's answers that drift is measured on, by kind of prompts."""
    held_out: TokenCounts | None
    """The labelled tokens of the held-out examples; null without held-out rows."""
    base: BaseResult
    """The base model."""
    runs: list[RunResult]
    """All runs."""
    choices: list[Choice]
    """One for each objective and seed."""
    objectives: dict[str, ObjectiveResult]
    """Over seeds, by objective."""
    pairs: list[PairResult]
    """The objectives that were compared with each other."""
    failed: list[Failure]
    """What failed, and is not judged."""
