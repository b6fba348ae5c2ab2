"""The content of summary.json as types: what `eaft inspect` finds in the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from eaft.provenance import write_json

DATA = "data"  # the origin of an example: the data set
ROLLOUTS = "rollouts"  # the origin of an example: the model's own answer to a prompt of the data
ORIGINS = (DATA, ROLLOUTS)
SUMMARY_FILE = "summary.json"

Part = TypeVar("Part")


@dataclass(frozen=True)
class ByOrigin(Generic[Part]):
    """The same thing for the data and for the model's own answers; None if there are no answers."""

    data: Part
    rollouts: Part | None

    def of(self, origin: str) -> Part | None:
        """Return the part of an origin, `DATA` or `ROLLOUTS`."""
        return self.data if origin == DATA else self.rollouts


@dataclass(frozen=True)
class Counts:
    """How many examples, tokens and labelled tokens there are."""

    examples: int
    tokens: int
    labelled: int


@dataclass(frozen=True)
class Shares:
    """
    Shares of the tokens, of their nll and of their gradient.

    None if the whole is 0. The gradient is None in a run of vLLM.
    """

    tokens: float | None
    nll: float | None
    gradient: float | None


@dataclass(frozen=True)
class GroupNll:
    """
    Mean nll (nats) of all labelled tokens and of two groups; None for a group without tokens.

    The base model's entropy says which tokens are in a group, also for other models.
    """

    all: float | None
    high_entropy: float | None
    low_entropy: float | None


@dataclass(frozen=True)
class MeasuredParameters:
    """Gate parameters as training measures them on this data."""

    entropy_threshold: float  # in units of the normalized entropy
    prob_threshold: float
    tau: float  # nats


@dataclass(frozen=True)
class NamedToken:
    """A token's id and its text."""

    token_id: int
    text: str


@dataclass(frozen=True)
class CountedToken(NamedToken):
    """A token and how often it occurs."""

    count: int


@dataclass(frozen=True)
class TokenNll(CountedToken):
    """A token, how often it occurs, and the sum of its nll (nats) there."""

    nll: float


@dataclass(frozen=True)
class GroupToken(CountedToken):
    """A frequent token of a group."""

    share: float  # of the group's tokens
    lift: float  # that share, divided by the token's share of all labelled tokens
    nll: float  # sum in the group, nats
    wanted: list[CountedToken]  # the model's most frequent first choices other than the label


@dataclass(frozen=True)
class TokenGroups:
    """The most frequent tokens of each group."""

    high_entropy: list[GroupToken]
    low_entropy: list[GroupToken]
    conflict: list[GroupToken]

    def of(self, group: str) -> list[GroupToken]:
        """Return the tokens of a group by its name."""
        tokens: list[GroupToken] = getattr(self, group)
        return tokens


@dataclass(frozen=True)
class GateEffect(Shares):
    """The shares that a gate removes, and the tokens that it mutes most."""

    gate: str
    params: dict[str, Any]  # the gate's parameters by name
    note: str | None
    source: str | None  # None: all sources
    muted: list[TokenNll]  # count: muted occurrences; nll: removed; empty for a single source


@dataclass(frozen=True)
class TopKRow:
    """What the entropy of the K largest probabilities is worth; the last row has K = vocabulary."""

    k: int
    pearson: float | None  # correlation with the exact entropy; None if either does not vary
    spearman: float | None
    seconds: float  # for 1000 tokens
    mib: float  # memory, 256 tokens at a time


@dataclass(frozen=True)
class CheckResult:
    """The rows of the data that a check is about."""

    name: str
    title: str
    count: int  # rows
    rows: list[int]  # the first of them: numbers of rows in the data
    text: str  # advice


@dataclass(frozen=True)
class ExpectedDrift:
    """
    The expected change in drift of one more run: EAFT's drift minus SFT's, as a share of SFT's.

    The interval holds 95% of runs.
    """

    change: float
    low: float
    high: float


@dataclass(frozen=True)
class Interval:
    """An interval, in the units of what it is about."""

    low: float
    high: float


@dataclass(frozen=True)
class AdviceFacts(Shares):
    """What the advice rests on: the shares of the data in confident conflicts, and more."""

    rollouts: Shares | None  # the same shares of the model's own answers
    content_share: float | None  # of the conflicts' nll; None if there are no conflicts
    examples_with_label: int
    format: list[TokenNll]  # labels with most nll in format conflicts
    content: list[TokenNll]  # labels with most nll in content conflicts
    expected: ExpectedDrift | None = None  # None if no token has a label
    conflicts: int | None = None  # tokens in confident conflict; None in older files
    # The 95% interval of `nll` over rows like these; None if there is too little to say
    interval: Interval | None = None


@dataclass(frozen=True)
class Advice:
    """How much of the data fights the model, and what to do about it."""

    kind: str  # "none", "too_few", "few", "format", "content" or "mixed"
    headline: str
    text: str  # begins with the headline
    facts: AdviceFacts


@dataclass(frozen=True)
class Summary:
    """What `eaft inspect` finds. A map by name has an entry for each scored model."""

    counts: ByOrigin[Counts]
    conflicts: dict[str, ByOrigin[Shares]]  # shares in confident conflicts
    nll: dict[str, ByOrigin[GroupNll]]
    entropy: dict[str, ByOrigin[float | None]]  # mean, nats; exact, but in a run of vLLM top-K
    entropy_max: float  # largest under any model, nats
    measured: MeasuredParameters | None  # None if no token has a label
    gates: list[GateEffect]
    tokens: TokenGroups
    top_k: list[TopKRow] | None
    checks: list[CheckResult]
    advice: Advice


def write_summary(folder: Path, summary: Summary) -> None:
    """Write summary.json in a folder, whole or not at all."""
    write_json(folder / SUMMARY_FILE, asdict(summary))
