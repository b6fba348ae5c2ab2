"""The plane of entropy and probability: sums over its bins."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from eaft.inspection.landscape import bin_sums
from eaft.inspection.view.cache import Cache
from eaft.inspection.view.queries.database import Columns, Database
from eaft.inspection.view.selection import Selection

Grid = list[list[float]]  # a row for each bin of the entropy, a column for each of the probability


@dataclass(frozen=True)
class Sums:
    """Sums over some tokens."""

    tokens: int
    nll: float  # nats
    gradient: float | None  # norms of the loss's gradient by the logits; None if not measured


@dataclass(frozen=True)
class SelectedSums(Sums):
    """Sums over the selected tokens, and how many examples have one."""

    examples: int


@dataclass(frozen=True)
class Edges:
    """The edges of the plane's bins."""

    entropy_edges: list[float]  # nats
    prob_edges: list[float]


@dataclass(frozen=True)
class Plane(Edges):
    """Sums over the bins of the plane, whatever the selection's box."""

    tokens: Grid
    nll: Grid
    gradient: Grid | None  # None if it was not measured
    total: Sums
    corner: Sums  # of the confident conflicts


@dataclass(frozen=True)
class Landscape(Plane):
    """The plane, and sums over the tokens in the selection's box."""

    selected: SelectedSums


class PlaneQueries:
    """Answers of `/api/landscape`."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.plane = Cache(self.find_plane, 16)
        self.whole = database.inspection.whole_vocabulary

    def landscape(self, selection: Selection) -> Landscape:
        """Return the plane of a selection."""
        plane = self.plane(replace(selection, box=None))
        if selection.box is None:
            selected = self.all_selected(plane, selection)
        else:
            selected = self.selected_in_box(selection)
        return Landscape(**vars(plane), selected=selected)

    def all_selected(self, plane: Plane, selection: Selection) -> SelectedSums:
        """Return the sums of a selection without a box."""
        where = self.database.examples_where(selection)
        # An example without labels has no nll, and no token in the plane
        table = self.database.examples_table(selection.model)
        sql = f"SELECT count(*) AS examples FROM {table} WHERE {where.sql} AND nll IS NOT NULL"
        examples = int(self.database.columns(sql, where.values, selection)["examples"][0])
        return SelectedSums(**vars(plane.total), examples=examples)

    def selected_in_box(self, selection: Selection) -> SelectedSums:
        """Return the sums of a selection with a box."""
        where = self.database.tokens_where(selection)
        table = self.database.tokens_table(selection.model)
        sql = f"""
            SELECT coalesce(sum(tokens), 0)::BIGINT AS tokens, coalesce(sum(nll), 0) AS nll,
                coalesce(sum(gradient), 0) AS gradient, count(*) AS examples
            FROM (
                SELECT count(*) AS tokens, sum(-log_prob) AS nll, sum(grad_norm) AS gradient
                FROM {table} WHERE {where.sql} GROUP BY example)"""
        selected = self.database.rows(SelectedSums, sql, where.values, selection)[0]
        return selected if self.whole else replace(selected, gradient=None)

    def find_plane(self, selection: Selection) -> Plane:
        """Return the plane of a selection without a box."""
        where = self.database.tokens_where(selection)
        table = self.database.tokens_table(selection.model)
        bins = self.database.columns(
            f"""
            SELECT entropy_bin, prob_bin, conflict,
                count(*) AS tokens, sum(-log_prob) AS nll, sum(grad_norm) AS gradient
            FROM {table} WHERE {where.sql} GROUP BY entropy_bin, prob_bin, conflict""",
            where.values,
            selection,
        )
        conflict = bins["conflict"].astype(bool)
        return Plane(
            **vars(self.edges),
            tokens=self.grid(bins, bins["tokens"].astype(np.float64)),
            nll=self.grid(bins, bins["nll"].astype(np.float64)),
            gradient=self.gradient(bins, bins["gradient"].astype(np.float64)),
            total=self.sums(bins, np.ones_like(conflict)),
            corner=self.sums(bins, conflict),
        )

    @property
    def edges(self) -> Edges:
        """The edges of the plane's bins."""
        tables = self.database.tables
        return Edges(tables.entropy_edges.tolist(), tables.prob_edges.tolist())

    def gradient(self, bins: Columns, values: NDArray[np.floating]) -> Grid | None:
        """Return sums of gradients in the plane's bins; None if they were not measured."""
        return self.grid(bins, values) if self.whole else None

    def grid(self, bins: Columns, values: NDArray[np.floating]) -> Grid:
        """
        Return sums of values in the plane's bins, to 4 decimals.

        Args:
            bins: `entropy_bin` and `prob_bin`, `[n]` each.
            values: `[n]`.
        """
        tables = self.database.tables
        shape = len(tables.entropy_edges) - 1, len(tables.prob_edges) - 1
        entropy_bins = np.asarray(bins["entropy_bin"], dtype=np.intp)
        prob_bins = np.asarray(bins["prob_bin"], dtype=np.intp)
        grid: Grid = np.round(bin_sums(entropy_bins, prob_bins, shape, values), 4).tolist()
        return grid

    def sums(self, bins: Columns, keep: NDArray[np.bool_]) -> Sums:
        """Return the sums over some of the bins."""
        nll, gradient = (
            float(bins[name].astype(np.float64)[keep].sum()) for name in ("nll", "gradient")
        )
        return Sums(
            tokens=int(bins["tokens"].astype(np.float64)[keep].sum()),
            nll=nll,
            gradient=gradient if self.whole else None,
        )
