"""
The results of `eaft eval` as types: what `results.json` and the files of items hold.

The names of the fields are the keys of the files, which are public. In them `before` is the base
model and `after` is the tuned model. `results.schema.json` is made from these types by
`docs/make_schemas.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, with_config

from eaft.evaluation.protocol import Protocol
from eaft.provenance import Environment, Software

# A field's docstring becomes its description in the schema
FORM = ConfigDict(extra="forbid", use_attribute_docstrings=True)
ABSENT = {"absent": True}  # marks a field that is left out of the file while it is None
Number = Annotated[int, Field(ge=0)]
Part = Literal["prompt", "answer", "thoughts"]
Probability = Annotated[float, Field(ge=0, le=1)]


def as_json(value: Any) -> Any:
    """Return a result as JSON: dataclasses are mappings, without `ABSENT` fields that are None."""
    if is_dataclass(value):
        pairs = [(f, getattr(value, f.name)) for f in fields(value)]
        return {
            f.name: as_json(inner)
            for f, inner in pairs
            if inner is not None or "absent" not in f.metadata
        }
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    return [as_json(inner) for inner in value] if isinstance(value, list | tuple) else value


@with_config(FORM)
@dataclass(kw_only=True)
class Item:
    """One row of a task, as one model answered it."""

    task: str
    """The lm-eval task."""
    doc_id: int
    """The row's number in the task's data."""
    metric: str
    """The metric of `score`, with its filter: `exact_match,strict-match`."""
    prompt: str
    """What the model was asked."""
    target: Any
    """The right answer; of a multiple-choice task usually the number of the choice."""
    response: Any
    """What the model answered."""
    score: float
    """In [0, 1]."""
    cut: list[Part]
    """The parts that were cut to fit the context or the limit."""
    prompt_hash: str
    """lm-eval's hash of the prompt."""
    target_hash: str
    """lm-eval's hash of the target."""
    doc_hash: str
    """lm-eval's hash of the row."""
    choices: list[float] | None = field(default=None, metadata=ABSENT)
    """Log-likelihood of each choice (nats), where the task is multiple choice."""
    max_gen_toks: int | None = field(default=None, metadata=ABSENT)
    """The most tokens that an answer could have, where it is generated."""
    scores: dict[str, float] | None = field(default=None, metadata=ABSENT)
    """The score by filter, where the metric has several filters."""
    repeats: list[float] | None = field(default=None, metadata=ABSENT)
    """The score of each answer, where the item was answered several times; `score` is their mean.
    """


@with_config(FORM)
@dataclass(kw_only=True)
class Cut:
    """Of how many items a part was cut to fit the context or the limit."""

    prompt: Number
    """Items whose prompt was cut."""
    answer: Number
    """Items whose answer was cut."""
    thoughts: Number
    """Items whose thoughts were cut; an empty answer is graded."""


@with_config(FORM)
@dataclass(kw_only=True)
class Asked:
    """How a benchmark was asked."""

    version: str | int | float | dict[str, Any] | None
    """The task's version; by task where the tasks of a group differ."""
    metric: str
    """The metric of the scores."""
    filter: str
    """The filter that reads the answers for this metric."""
    num_fewshot: int | dict[str, int] | None
    """Examples before each item; by task where the tasks of a group differ; null where another
    tool's log does not say."""
    max_gen_toks: int | dict[str, int | None] | None
    """The most tokens that an answer, with its thoughts, could have; null for multiple choice."""
    cut: dict[str, Cut]
    """By model: `before` and `after` in `eaft eval`, the base and the objectives in compare; empty
    where another tool's log does not say."""


@with_config(FORM)
@dataclass(kw_only=True)
class TaskScore:
    """One model's score on one task."""

    metric: str
    """The metric and its filter."""
    n: Number
    """Items."""
    score: float
    """Mean over items, in [0, 1]."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end of the 95% interval."""


@with_config(FORM)
@dataclass(frozen=True)
class Estimate:
    """
    A number of items, estimated, with its 95% interval; not cut at what is possible, which would
    bias it, so that it may be below 0.
    """

    estimate: float
    """Items."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end of the 95% interval."""


@with_config(FORM)
@dataclass(frozen=True, kw_only=True)
class Change:
    """A paired comparison of the base and the tuned model on one task, or on a mean of several."""

    n: Number
    """Items."""
    before: float
    """The base model's mean score, in [0, 1]."""
    after: float
    """The tuned model's mean score, in [0, 1]."""
    change: float
    """`after` minus `before`, in [-1, 1]."""
    low: float
    """Lower end of the 95% interval of the change."""
    high: float
    """Upper end of the 95% interval of the change."""
    p_value: Probability
    """Of the hypothesis that swapping the two models changes nothing, two-sided."""
    lost: Number
    """Items whose score fell."""
    gained: Number
    """Items whose score rose."""
    lost_beyond_chance: Estimate | None
    """Items known to the base and lost, beyond what guessing explains; null without choices."""
    gained_beyond_chance: Estimate | None
    """Items learned, beyond what guessing explains; null without choices."""
    smallest_drop: float
    """The drop that this many items would show as significant four times in five, in [0, 1]."""


@with_config(FORM)
@dataclass(frozen=True, kw_only=True)
class TaskChange(Change):
    """A task's change."""

    metric: str
    """The metric and its filter."""
    p_holm: Probability
    """`p_value`, adjusted for the number of tasks by Holm's method."""


@with_config(FORM)
@dataclass(kw_only=True)
class Changes:
    """What changed from the base to the tuned model; fractions: 0.12 is 12 points."""

    tasks: dict[str, TaskChange]
    """By task; fractions: 0.12 is 12 points."""
    filters: dict[str, dict[str, Change]]
    """By task and filter: other ways to read the same answers. No mean and no adjustment has them.
    """
    means: dict[str, Change]
    """By suite, of the suites with several tasks."""


@with_config(FORM)
@dataclass(kw_only=True)
class DriftSummary:
    """Drift: KL(base || tuned) over the base model's own answers, nats per token."""

    mean: float
    """Over all tokens."""
    low: float
    """Lower end of the 95% interval of the mean, by a bootstrap of the prompts."""
    high: float
    """Upper end of the 95% interval of the mean."""
    tokens: Number
    """Tokens of all answers."""
    per_prompt: list[float]
    """Each prompt's own mean."""
    tokens_per_prompt: list[Number]
    """The tokens of each prompt's answer."""
    quantiles: dict[str, float]
    """Of `per_prompt`: 0%, 25%, 50%, 75%, 100%."""


@with_config(FORM)
@dataclass(kw_only=True)
class HeldOutAnswer:
    """A held-out row: its prompt, its own answer, and the likeliest answer of each model."""

    row: Number
    """The row's number in the file, from 0."""
    prompt: str
    """What both models were asked."""
    target: str
    """The row's own answer."""
    before: str
    """The base model's answer."""
    after: str
    """The tuned model's answer."""


@with_config(FORM)
@dataclass(kw_only=True)
class HeldOut:
    """Rows of the user's own: the nll of their labelled tokens, nats per token."""

    file: str
    """The file of the rows."""
    rows: Number
    """Rows."""
    tokens: Number
    """Labelled tokens of all rows."""
    before: float
    """The base model's nll, a mean over all tokens."""
    after: float
    """The tuned model's nll, a mean over all tokens."""
    change: float
    """`after` minus `before`; below 0, the tuned model predicts the rows better."""
    low: float
    """Lower end of the 95% interval of the change, by a bootstrap of the rows."""
    high: float
    """Upper end of the 95% interval of the change."""
    p_value: Probability
    """Of the hypothesis that the nll has not changed, two-sided: the interval's inversion."""
    before_per_row: list[float]
    """Each row's own mean, of the base model."""
    after_per_row: list[float]
    """Each row's own mean, of the tuned model."""
    tokens_per_row: list[Number]
    """Each row's labelled tokens."""
    prepared: str
    """How the rows became tokens and labels."""
    apart: bool
    """Whether it was checked that no row's prompt is in the run's training data."""
    max_new_tokens: Number
    """The most tokens that an answer could have."""
    answers: list[HeldOutAnswer]
    """Of the first rows that ask something."""


@with_config(FORM)
@dataclass(kw_only=True)
class Response:
    """One model's answer to an item."""

    response: Any
    """The answer."""
    score: float
    """Its score, in [0, 1]."""


@with_config(FORM)
@dataclass(kw_only=True)
class Regression:
    """An item on which the tuned model's score is lower than the base model's."""

    benchmark: str
    """The task or group."""
    task: str
    """The lm-eval task."""
    doc_id: int
    """The row's number in the task's data."""
    prompt: str
    """What both models were asked."""
    target: Any
    """The right answer."""
    before: Response
    """The base model's answer."""
    after: Response
    """The tuned model's answer."""


@with_config(FORM)
@dataclass(kw_only=True)
class LossTest:
    """
    The test of one loss against its budget: percentage points for a task, nats per token for drift.
    """

    name: str
    """The task, or `drift`."""
    kind: Literal["task", "drift"]
    """What was tested."""
    budget: float
    """The loss that is allowed; 0 without a budget."""
    loss: float
    """The task's drop, or the drift."""
    low: float
    """Lower end of the 95% interval of the loss."""
    high: float
    """Upper end of the 95% interval of the loss."""
    p_value: Probability
    """Of the hypothesis that the loss is the budget, two-sided."""
    p_holm: Probability
    """`p_value`, adjusted by Holm's method over all tests."""
    shown: bool
    """Whether a loss beyond the budget is shown."""
    smallest: float
    """The drop, or the drift beyond the budget, that would be shown four times in five."""
    too_few: bool
    """Whether a loss beyond the budget could be there unseen."""
    n: Number
    """Items, or prompts."""
    n_needed: Number | None
    """Items or prompts that would be enough; null where there are enough."""


@with_config(FORM)
@dataclass(kw_only=True)
class Verdict:
    """Whether a loss beyond the budget is shown."""

    status: Literal["loss", "no loss shown", "too few items", "nothing to judge"]
    """What the tests show together; `nothing to judge`: no tasks, and no budget of drift."""
    over_budget: bool
    """A loss is shown beyond a budget that was given: exit code 3."""
    max_drop: float | None
    """Percentage points that each task may lose; null: none given, any loss counts."""
    max_drift: float | None
    """Drift that is allowed, nats per token; null: none given, drift is not judged."""
    tests: list[LossTest]
    """One for each task, and one for drift if it has a budget."""
    sentence: str
    """The verdict in words, as Markdown."""


@with_config(FORM)
@dataclass(kw_only=True)
class Setting:
    """A setting that differs between the base and the tuned model."""

    base: Any
    """The base model's: tokens, a mapping, or a digest."""
    model: Any
    """The tuned model's."""


@with_config(FORM)
@dataclass(kw_only=True)
class Kept:
    """The measurements that were read from the store instead of made, of each model."""

    model: list[str]
    """Of the tuned model."""
    base: list[str]
    """Of the base model."""
    folder: str
    """The store."""


@with_config(ConfigDict(use_attribute_docstrings=True))
@dataclass(kw_only=True)
class RecordedProtocol(Protocol):
    """How the models were asked: the fields of `Protocol`, and on which rows."""

    limit: int | None
    """At most so many items of each task; null: all."""
    data_sha256: str | None = field(default=None, metadata=ABSENT)
    """A digest of the rows and prompts, which tells whether two results are of the same data."""


@with_config(FORM)
@dataclass(kw_only=True)
class LogRun:
    """One model's run in another tool, as its log tells it."""

    path: str
    """The log, as the user gave it."""
    model: str
    """The model."""
    version: str | None
    """The version of the tool that wrote the log."""
    date: str | None
    """When it ran, in UTC, as 2026-11-29T10:00:00+00:00."""
    settings: dict[str, Any]
    """How it ran: what the log says beside the tasks' own settings."""


@with_config(FORM)
@dataclass(kw_only=True)
class Source:
    """The logs of another tool that an evaluation was read from."""

    tool: Literal["lm-eval", "inspect_ai"]
    """The tool that asked the models."""
    base: LogRun
    """The base model's run."""
    model: LogRun
    """The tuned model's run."""
    data_sha256: str
    """A digest of the rows and prompts, which tells whether two results are of the same data."""


@with_config(FORM)
@dataclass(kw_only=True)
class Evaluation:
    """What both kinds of evaluation have."""

    output_path: str
    """The folder of the results."""
    model: str
    """The model that was evaluated."""
    suites: dict[str, list[str]]
    """The tasks of each suite."""
    protocol: RecordedProtocol | None
    """How the models were asked; null where another tool asked them, see `source`."""
    environment: Environment | Software
    """Versions, commit and machine."""
    kept: Kept | None
    """What was not measured anew; null where another tool measured."""
    asked: dict[str, Asked]
    """How each task was asked."""
    failed: dict[str, str]
    """The tasks that could not be run or compared: why."""
    source: Source | None = field(default=None, metadata=ABSENT)
    """Where another tool asked the models: its logs."""


@with_config(FORM)
@dataclass(kw_only=True)
class ModelEvaluation(Evaluation):
    """An evaluation of one model."""

    base: None
    """There is none."""
    tasks: dict[str, TaskScore]
    """Scores are fractions: 0.12 is 12 points."""


@with_config(FORM)
@dataclass(kw_only=True)
class TunedEvaluation(Evaluation, Changes):
    """An evaluation of a tuned model beside its base model."""

    base: str
    """The base model."""
    drift: DriftSummary | None
    """Null where it was not measured."""
    held_out: HeldOut | None = field(default=None, metadata=ABSENT)
    """Rows of the user's own."""
    worst: list[Regression]
    """The worst regressions, of each task in turn."""
    differs: dict[str, Setting] | None = field(default=None, metadata=ABSENT)
    """In what else than weights the two models differ: `end_tokens`, `generation_config`, and
    digests of `tokenizer` and `chat_template`."""
    verdict: Verdict
    """Whether a loss is shown."""


Results = ModelEvaluation | TunedEvaluation  # what a results.json of `eaft eval` holds
