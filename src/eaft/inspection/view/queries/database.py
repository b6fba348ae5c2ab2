"""The database that all queries ask: rows and columns of a selection, and its conditions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eaft.errors import ConfigurationError
from eaft.inspection.summary import MeasuredParameters, NamedToken, Summary
from eaft.inspection.view.cache import Cache
from eaft.inspection.view.queries.conditions import (
    ALWAYS,
    Condition,
    all_of,
    among,
    within,
)
from eaft.inspection.view.selection import Selection
from eaft.inspection.view.sliders import GateControls, Parameters, gate_controls, parameters
from eaft.inspection.view.tables import Tables

Row = TypeVar("Row")
Columns = dict[str, NDArray[Any]]

ROWS_AT_ONCE = 2000  # fetched at once when an answer is streamed


class Database:
    """
    An inspection's tables, asked in SQL by several threads at once.

    Values reach SQL as bound parameters only. Entropies, conflicts, gradients, bins and gates are
    computed by `objective` and `landscape`; SQL only filters, sums and sorts.
    """

    def __init__(self, tables: Tables) -> None:
        self.tables, self.inspection = tables, tables.inspection
        # A page asks about the same examples again when a slider moves
        self.chosen_examples = Cache(self.find_chosen_examples, 32)

    # Asking

    @contextmanager
    def cursor(self, selection: Selection | None = None) -> Iterator[Any]:
        """
        Lend a connection.

        If the selection filters examples, the connection has a table `chosen` of these examples.
        """
        with self.tables.cursor() as cursor:
            if selection is not None and selection.filters_examples:
                examples = self.chosen_examples(selection.whole)
                cursor.register("chosen", pa.table({"example": examples}))
            yield cursor

    def columns(
        self, sql: str, values: tuple[Any, ...], selection: Selection | None = None
    ) -> Columns:
        """Return the columns of an answer by name."""
        with self.cursor(selection) as cursor:
            columns = cursor.execute(sql, values).fetchnumpy()
            return {name: np.asarray(column) for name, column in columns.items()}

    def rows(
        self,
        row_type: Callable[..., Row],
        sql: str,
        values: tuple[Any, ...],
        selection: Selection | None = None,
    ) -> list[Row]:
        """
        Return the rows of an answer.

        Args:
            row_type: called with a row's columns by name; None stands for NaN and infinity.
            sql: a query.
            values: bound to its question marks.
            selection: whose examples the query names as `chosen`.
        """
        with self.cursor(selection) as cursor:
            cursor.execute(sql, values)
            names = [column[0] for column in cursor.description]
            return [
                row_type(**dict(zip(names, map(finite, row), strict=True)))
                for row in cursor.fetchall()
            ]

    def count(self, table: str, where: Condition, selection: Selection) -> int:
        """Return how many rows of a table fulfil a condition."""
        with self.cursor(selection) as cursor:
            cursor.execute(f"SELECT count(*) FROM {table} WHERE {where.sql}", where.values)
            return int(cursor.fetchone()[0])

    def stream(
        self, sql: str, values: tuple[Any, ...], selection: Selection
    ) -> Iterator[list[tuple[Any, ...]]]:
        """Yield the rows of an answer, `ROWS_AT_ONCE` at a time."""
        with self.cursor(selection) as cursor:
            cursor.execute(sql, values)
            while rows := cursor.fetchmany(ROWS_AT_ONCE):
                yield rows

    # Names of tables and tokens

    def tokens_table(self, model: str) -> str:
        """Return the name of a model's table of labelled tokens."""
        return f"tokens_{self.tables.number(model)}"

    def examples_table(self, model: str) -> str:
        """Return the name of a model's table of examples."""
        return f"examples_{self.tables.number(model)}"

    def token(self, token_id: int) -> NamedToken:
        """Return a token with its text."""
        return self.tables.vocabulary.named(token_id)

    # Conditions of a selection

    def find_chosen_examples(self, selection: Selection) -> NDArray[np.int32]:
        """Return the numbers of the examples that a selection filters, in ascending order."""
        conditions = [
            Condition("origin = ?", (selection.origin,)),
            among("source", selection.sources, ALWAYS),
            within("nll", selection.nll),
            within("conflict_share", selection.conflict),
        ]
        if selection.row is not None:
            conditions.append(Condition("row = ?", (selection.row,)))
        if selection.search:
            matching = "SELECT example FROM texts WHERE contains(lower, lower(?))"
            conditions.append(Condition(f"example IN ({matching})", (selection.search,)))
        where = all_of(*conditions)
        table = self.examples_table(selection.model)
        sql = f"SELECT example FROM {table} WHERE {where.sql} ORDER BY example"
        return self.columns(sql, where.values)["example"].astype(np.int32)

    def tokens_where(self, selection: Selection) -> Condition:
        """Return the condition that a row of the model's tokens is in a selection."""
        sources = [self.tables.sources.index(source) for source in selection.sources]
        conditions = [
            Condition("origin = ?", (self.tables.origins.index(selection.origin),)),
            among("source", sources, ALWAYS),
            self.example_is_chosen(selection),
        ]
        if selection.token is not None:
            conditions.append(Condition("token_id = ?", (selection.token,)))
        if selection.box is not None:
            conditions.append(self.in_box(selection.box))
        return all_of(*conditions)

    def examples_where(self, selection: Selection) -> Condition:
        """
        Return the condition that an example is in a selection.

        If the selection names tokens or a box, an example must have at least one such token.
        """
        conditions = [
            Condition("origin = ?", (selection.origin,)),
            among("source", selection.sources, ALWAYS),
            self.example_is_chosen(selection),
        ]
        if selection != selection.whole:
            table, tokens = self.tokens_table(selection.model), self.tokens_where(selection)
            with_tokens = f"SELECT DISTINCT example FROM {table} WHERE {tokens.sql}"
            conditions.append(Condition(f"example IN ({with_tokens})", tokens.values))
        return all_of(*conditions)

    def example_is_chosen(self, selection: Selection) -> Condition:
        """Return the condition that an example is in the table `chosen`, if there is one."""
        if not selection.filters_examples:
            return ALWAYS
        return Condition("example IN (SELECT example FROM chosen)")

    def in_box(self, box: tuple[float, float, float, float]) -> Condition:
        """
        Return the condition that a token lies in a box of the plane.

        A box includes its lower sides. It includes its upper sides only at the plane's end. The
        plane's first and last bins also hold everything beyond them.
        """
        conditions: list[Condition] = []
        for column, low, high, edges in (
            ("entropy", *box[:2], self.tables.entropy_edges),
            ("prob", *box[2:], self.tables.prob_edges),
        ):
            if low > edges[0]:
                conditions.append(Condition(f"{column}::DOUBLE >= ?", (low,)))
            if high < edges[-1]:
                conditions.append(Condition(f"{column}::DOUBLE < ?", (high,)))
        return all_of(*conditions)

    # The summary

    @cached_property
    def summary(self) -> Summary | None:
        """The content of summary.json; None if it does not exist or cannot be read."""
        try:
            return self.inspection.summary
        except ConfigurationError:
            return None

    @property
    def measured(self) -> MeasuredParameters | None:
        """The gate parameters that were measured on this data, if any were."""
        return None if self.summary is None else self.summary.measured

    @property
    def gate_controls(self) -> list[GateControls]:
        """The gates that this inspection can show, with their sliders."""
        return gate_controls(self.measured, self.inspection.whole_vocabulary)

    def parameters(self, gate: str, chosen: Parameters) -> Parameters:
        """
        Return all parameters of a gate; see `sliders.parameters`.

        Raises:
            RequestError: no such gate or parameter, or a value that the gate does not take.
        """
        return parameters(gate, chosen, self.gate_controls)


def finite(value: Any) -> Any:
    """Return a value as JSON can hold it: None for NaN and infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
