"""What a gate does to the tokens of a selection."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eaft.inspection.folder import STATISTICS
from eaft.inspection.labelled import with_examples
from eaft.inspection.removed import QUANTITIES, Removed
from eaft.inspection.summary import NamedToken, Shares
from eaft.inspection.view.cache import Cache
from eaft.inspection.view.queries.database import Columns, Database
from eaft.inspection.view.queries.plane import Edges, Grid, PlaneQueries
from eaft.inspection.view.selection import Selection
from eaft.inspection.view.sliders import Parameters
from eaft.inspection.view.tables import DRAWS
from eaft.objective.registry import gate_weights
from eaft.objective.statistics import TokenStatistics

SAMPLE_TOKENS = 500_000  # a gate is computed on a sample of about this many tokens at most
MOST_MUTED = 50  # tokens that are listed
WEIGHT_BINS = 50
STATISTICS_READ = [field.name for field in STATISTICS if field.name != "first_choice"]
COLUMNS_READ = ["example", "token_id", "source", "grad_norm", "entropy_bin", "prob_bin"]


@dataclass(frozen=True)
class GateTokens:
    """The tokens that a gate is computed on."""

    stats: TokenStatistics  # of `n` tokens
    columns: Columns  # `COLUMNS_READ` of the same tokens, `[n]` each
    count: int  # tokens in the selection; these may be a sample of them

    @property
    def scale(self) -> float:
        """What a sum over these tokens is multiplied by to estimate the sum over the selection."""
        return self.count / max(len(self.stats.log_prob), 1)


@dataclass(frozen=True)
class SourceShares(Shares):
    """The shares that a gate removes from the tokens of one source."""

    source: str


@dataclass(frozen=True)
class Histogram:
    """Counts of tokens by weight."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class MutedToken(NamedToken):
    """A token that a gate takes nll from."""

    count: int  # of its occurrences with a weight below `removed.MUTED`
    nll_removed: float  # nats


@dataclass(frozen=True)
class GateEffect(Edges):
    """
    What a gate does to a selection.

    In a selection of more than `SAMPLE_TOKENS` tokens the gate is computed on a fixed random
    sample; counts, sums of nll and gradients are scaled up to the selection.
    """

    gate: str
    params: Parameters
    removed: Shares
    by_source: list[SourceShares]  # of the largest sources
    mean_weight: float | None
    weights: Histogram
    muted: list[MutedToken]  # the tokens that lose most nll
    gradient: Grid | None  # None if it was not measured
    count: int  # tokens in the selection
    sampled: int | None  # tokens in the sample; None if all were used


class GateQueries:
    """Answers of `/api/gates`."""

    def __init__(self, database: Database, plane: PlaneQueries) -> None:
        self.database, self.plane = database, plane
        self.gate_tokens = Cache(self.find_gate_tokens, 4)

    def effect(self, selection: Selection, gate: str, chosen: Parameters) -> GateEffect:
        """
        Return what a gate does to a selection.

        Args:
            selection: which tokens.
            gate: its name.
            chosen: parameters that are not where their sliders begin.

        Raises:
            RequestError: no such gate or parameter, or a value that the gate does not take.
        """
        params = self.database.parameters(gate, chosen)
        tokens = self.gate_tokens(selection)
        weights = weigh(gate, tokens.stats, params)
        removed = self.removed(weights, tokens)
        used = len(weights)
        gradient = weights * tokens.columns["grad_norm"] * tokens.scale
        sources = self.database.tables.sources
        return GateEffect(
            **vars(self.plane.edges),
            gate=gate,
            params=params,
            removed=removed.shares(),
            by_source=[
                SourceShares(**vars(removed.shares(i)), source=sources[i]) for i in removed.largest
            ],
            mean_weight=float(weights.mean()) if used else None,
            weights=histogram(weights, tokens.scale),
            muted=self.muted(removed, tokens.scale),
            gradient=self.plane.gradient(tokens.columns, gradient),
            count=tokens.count,
            sampled=used if used < tokens.count else None,
        )

    def removed(self, weights: NDArray[np.float32], tokens: GateTokens) -> Removed:
        """Return the sums of what these weights `[n]` take from the tokens."""
        columns = tokens.columns
        size = int(columns["token_id"].max(initial=-1)) + 1
        removed = Removed(len(self.database.tables.sources), size)
        values = (np.ones_like(weights), tokens.stats.nll.numpy(), columns["grad_norm"])
        quantities = dict(zip(QUANTITIES, values, strict=True))
        removed.add(weights, quantities, columns["source"], columns["token_id"])
        return removed

    def muted(self, removed: Removed, scale: float) -> list[MutedToken]:
        """Return the tokens that lose most nll, with counts and sums scaled up."""
        return [
            MutedToken(
                **vars(self.database.token(token.token_id)),
                count=round(token.count * scale),
                nll_removed=token.nll * scale,
            )
            for token in removed.most_muted(MOST_MUTED)
        ]

    def find_gate_tokens(self, selection: Selection) -> GateTokens:
        """Return a selection's tokens, or a fixed random sample of them."""
        where = self.database.tokens_where(selection)
        table = self.database.tokens_table(selection.model)
        count = self.database.count(table, where, selection)
        draw = DRAWS if count <= SAMPLE_TOKENS else math.ceil(DRAWS * SAMPLE_TOKENS / count)
        sampled = f" AND draw < {draw}" if draw < DRAWS else ""
        names = ", ".join(STATISTICS_READ + COLUMNS_READ)
        sql = f"SELECT {names} FROM {table} WHERE {where.sql}{sampled}"
        columns = self.database.columns(sql, where.values, selection)
        batch = pa.record_batch({name: columns[name] for name in STATISTICS_READ})
        stats = with_examples(
            self.database.inspection.statistics(batch),
            columns["example"],
            self.database.tables.example_nll,
        )
        return GateTokens(stats, {name: columns[name] for name in COLUMNS_READ}, count)


def weigh(gate: str, stats: TokenStatistics, params: Parameters) -> NDArray[np.float32]:
    """
    Return a gate's weights `[n]`.

    A formula may have no value at the far end of a slider: the weight is 0 there.
    """
    weights: NDArray[np.float32] = gate_weights(gate, stats, **params).nan_to_num(0).numpy()
    return weights


def histogram(weights: NDArray[np.float32], scale: float) -> Histogram:
    """Return the histogram of weights `[n]` from 0 to the largest (at least 1), scaled up."""
    top = max(1.0, float(weights.max(initial=0)))
    counts, _ = np.histogram(weights, WEIGHT_BINS, (0.0, top))
    return Histogram(
        edges=np.linspace(0, top, WEIGHT_BINS + 1).tolist(),
        counts=np.round(counts * scale).astype(int).tolist(),
    )
