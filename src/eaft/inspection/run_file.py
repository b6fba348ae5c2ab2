"""The content of run.json as types: what was scored, by which models, and with which flags."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from eaft.files import read_json
from eaft.inspection.summary import CheckResult, TopKRow
from eaft.provenance import Environment, write_json

RUN_FILE = "run.json"
# Why scoring stopped: the interval of the conflicts' share of the nll is narrow; there are so few
# conflicts that their share is small in any case; or so many rows are the most that are scored
NARROW, FEW_CONFLICTS, MOST_ROWS = "narrow", "few_conflicts", "most_rows"


@dataclass(frozen=True)
class ScoredModel:
    """A model that the tokens were scored with."""

    name: str  # `folder.BASE`, or the name of a folder in compared/
    model: str  # a Hub id or a folder
    step: int | None = None  # of the training run whose checkpoint it is


@dataclass(frozen=True)
class RolloutFlags:
    """The flags that say how the model's own answers are sampled."""

    rollouts: int
    rollout_backend: str
    max_new_tokens: int


@dataclass(frozen=True)
class SeededRolloutFlags(RolloutFlags):
    """The flags that say how the model's own answers are sampled, and the seed."""

    seed: int


@dataclass(frozen=True)
class Identity:
    """What a stopped run must have in common with the command that continues it."""

    model: str  # digest of the weights
    data: list[str]  # fingerprint of the prepared rows, digest of the data set's rows
    numbers: dict[str, Any]  # flags that change what is computed
    rollouts: SeededRolloutFlags | None
    compared: dict[str, str]  # digest of the weights of each other model, by its name


@dataclass(frozen=True)
class ScoredRows:
    """How many rows were scored, in random order, and why no more."""

    rows: int
    of: int  # rows of the data
    reason: str  # `NARROW`, `FEW_CONFLICTS` or `MOST_ROWS`


@dataclass(frozen=True)
class InspectedRun:
    """What was scored. A reader needs the fields without a default; older files lack others."""

    scored: bool  # whether every model's tokens are there
    models: Annotated[list[ScoredModel], Field(min_length=1)]  # the base model first
    top_k: int  # K of the top-K entropy
    # What scored. With "vllm" the entropy is the top-K entropy, and there is no `WHOLE_VOCABULARY`
    backend: str = "hf"
    finished: bool = False  # whether the report is there
    model: str | None = None  # as the flag says it
    dataset: str | None = None
    template: list[CheckResult] = field(default_factory=list)  # what the chat template makes of it
    rollouts: RolloutFlags | None = None
    config: dict[str, Any] = field(default_factory=dict)  # flags that are not at their default
    environment: Environment | None = None  # versions and hardware
    identity: Identity | None = None
    top_k_curve: list[TopKRow] | None = None  # None if it is not measured yet
    sample: ScoredRows | None = None  # None if every row is scored in order, or while it is open

    @property
    def whole_vocabulary(self) -> bool:
        """Whether the statistics of the whole vocabulary are there."""
        return self.backend != "vllm"

    @property
    def entropy_name(self) -> str:
        """What the entropy is called in reports and on the page."""
        return "entropy" if self.whole_vocabulary else f"top-{self.top_k} entropy"


def read_run(folder: Path, way: str) -> InspectedRun:
    """
    Return the content of run.json.

    Args:
        folder: that `eaft inspect` has written.
        way: what the user can do about a file that cannot be used.

    Raises:
        ConfigurationError: the file is truncated, not JSON, or of another form.
    """
    run: InspectedRun = read_json(folder / RUN_FILE, InspectedRun, way)
    return run


def write_run(folder: Path, run: InspectedRun) -> None:
    """Write run.json in a folder, whole or not at all."""
    write_json(folder / RUN_FILE, asdict(run))
