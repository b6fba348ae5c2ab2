"""Examples: pages of a sorted list, and one example with all its tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray

from eaft.inspection.folder import BASE, STATISTICS
from eaft.inspection.labelled import with_examples
from eaft.inspection.view.cache import Cache
from eaft.inspection.view.queries.conditions import NEVER, among
from eaft.inspection.view.queries.database import Database, finite
from eaft.inspection.view.queries.gates import weigh
from eaft.inspection.view.selection import RequestError, Selection, one_of
from eaft.inspection.view.sliders import Parameters
from eaft.objective.statistics import TokenStatistics

SNIPPET = 200  # characters
BEFORE_MATCH = 60  # characters of a snippet before the text that was searched
NUMBERS = ("tokens", "labelled", "cut", "nll", "entropy", "conflict_share", "conflict_nll_share")
SORTED_BY = ("example", "row", *NUMBERS)
STATISTICS_NAMES = [field.name for field in STATISTICS]


@dataclass(frozen=True)
class ExampleRow:
    """A row of the list of examples; `folder.EXAMPLES` says what the columns mean."""

    example: int
    origin: str
    source: str
    row: int
    tokens: int
    labelled: int
    cut: int
    nll: float | None
    entropy: float | None
    conflict_share: float | None
    conflict_nll_share: float | None
    snippet: str


@dataclass(frozen=True)
class ExamplePage:
    """A page of the list of examples."""

    total: int  # examples in the list
    rows: list[ExampleRow]


@dataclass(frozen=True)
class TokenOfExample:
    """
    A token of an example. What a model says of it is None if the token was not scored.

    Attributes:
        token: the token's own text.
        text: the part of the example's text that ends with this token, `[start, end)`. The server
            cuts it, since a browser counts UTF-16 units instead of characters.
        weight: of the gate that was asked for.
        base_log_prob: under the base model, if another model was asked for.
    """

    position: int
    token_id: int
    token: str
    text: str
    start: int
    end: int
    labelled: bool
    log_prob: float | None
    prob: float | None
    entropy: float | None
    nll: float | None
    rank: int | None
    first_choice: int | None
    first_text: str | None
    first_prob: float | None
    conflict: bool | None
    weight: float | None
    base_log_prob: float | None


@dataclass(frozen=True)
class WholeExample:
    """An example with all its tokens; `folder.EXAMPLES` says what the other columns mean."""

    example: int
    origin: str
    source: str
    row: int
    digest: str
    text: str
    messages: Any  # the row as it was; None if it was plain text or token ids
    tokens: list[TokenOfExample]
    labelled: int
    cut: int
    cut_labelled: int
    nll: float | None
    entropy: float | None
    conflict_share: float | None
    conflict_nll_share: float | None


class ExampleQueries:
    """Answers of `/api/examples` and `/api/example`."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.ordered = Cache(self.find_ordered, 16)

    def find_ordered(
        self, selection: Selection, sort: str, descending: bool
    ) -> NDArray[np.integer]:
        """Return the examples of a selection in the order of a column; nulls are last."""
        where = self.database.examples_where(selection)
        table = self.database.examples_table(selection.model)
        order = f"{sort} {'DESC' if descending else 'ASC'} NULLS LAST, example"
        sql = f"SELECT example FROM {table} WHERE {where.sql} ORDER BY {order}"
        return self.database.columns(sql, where.values, selection)["example"]

    def page(
        self, selection: Selection, sort: str, descending: bool, offset: int, limit: int
    ) -> ExamplePage:
        """
        Return a page of the examples of a selection.

        Args:
            selection: which examples.
            sort: a column of `SORTED_BY`; examples without a value are last.
            descending: whether the largest is first.
            offset: examples before the page.
            limit: the most rows of the page.

        Raises:
            RequestError: no such column.
        """
        one_of("sort", sort, SORTED_BY)
        ordered = self.ordered(selection, sort, descending)
        page = ordered[offset : offset + limit].tolist()
        where = among("example", page, NEVER)
        begin, values = "1", where.values
        if selection.search:
            # Lower case may be longer or shorter by a letter or two, so the place is approximate
            begin = f"greatest(1, instr(lower, lower(?)) - {BEFORE_MATCH})"
            values = (selection.search, *values)
        columns = ", ".join(("example", "origin", "source", "row", *NUMBERS))
        table = self.database.examples_table(selection.model)
        rows = self.database.rows(
            ExampleRow,
            f"""
            SELECT {columns}, substring(text, {begin}, {SNIPPET}) AS snippet
            FROM {table} JOIN texts USING (example) WHERE {where.sql}""",
            values,
        )
        by_example = {row.example: row for row in rows}
        return ExamplePage(len(ordered), [by_example[example] for example in page])

    def whole(self, number: int, model: str, gate: str | None, chosen: Parameters) -> WholeExample:
        """
        Return an example with all its tokens.

        Args:
            number: of the example.
            model: whose statistics the tokens have.
            gate: whose weights the tokens have; None for no weights.
            chosen: the gate's parameters that are not where their sliders begin.

        Raises:
            RequestError: no such example, gate or parameter.
        """
        examples = len(self.database.tables.example_nll)
        if number >= examples:
            raise RequestError(f"example={number}: there are {examples}.")
        table = self.database.examples_table(model)
        row: dict[str, Any] = self.database.rows(
            dict,
            f"SELECT * FROM {table} JOIN texts USING (example) WHERE example = ?",
            (number,),
        )[0]
        del row["lower"]
        messages = None if row["messages"] is None else json.loads(row["messages"])
        tokens = self.tokens(number, row["text"], model, gate, chosen)
        return WholeExample(**row | {"messages": messages, "tokens": tokens})

    def tokens(
        self, number: int, text: str, model: str, gate: str | None, chosen: Parameters
    ) -> list[TokenOfExample]:
        """Return the tokens of an example; see `whole`."""
        of_example = ds.field("example") == number
        datasets = self.database.tables.datasets
        places = datasets[BASE].to_table(filter=of_example)
        table = places if model == BASE else datasets[model].to_table(filter=of_example)
        base = places["log_prob"].to_pylist()
        scored = self.scored(number, table)
        weights: dict[int, float] = {}
        if gate is not None:
            params = self.database.parameters(gate, chosen)
            values = weigh(gate, scored.stats, params).tolist()
            weights = dict(zip(scored.indices, values, strict=True))
        conflicts = dict(zip(scored.indices, scored.stats.is_conflict.tolist(), strict=True))
        probs = dict(zip(scored.indices, scored.stats.prob.tolist(), strict=True))
        keys = places.select(["position", "token_id", "end", "labelled"]).to_pylist()
        start, tokens = 0, []
        for i, (key, token) in enumerate(
            zip(keys, table.select(STATISTICS_NAMES).to_pylist(), strict=True)
        ):
            log_prob, first = token["log_prob"], token["first_choice"]
            tokens.append(
                TokenOfExample(
                    **key,
                    token=self.database.token(key["token_id"]).text,
                    text=text[start : key["end"]],
                    start=start,
                    log_prob=finite(log_prob),
                    prob=finite(probs.get(i)),
                    entropy=finite(token[self.database.inspection.entropy_column]),
                    nll=None if log_prob is None else finite(-log_prob),
                    rank=token["rank"],
                    first_choice=first,
                    first_text=None if first is None else self.database.token(first).text,
                    first_prob=finite(token["first_prob"]),
                    conflict=conflicts.get(i),
                    weight=finite(weights.get(i)),
                    base_log_prob=None if model == BASE else finite(base[i]),
                )
            )
            start = key["end"]
        return tokens

    def scored(self, number: int, table: pa.Table) -> ScoredTokens:
        """Return the tokens of an example that have statistics."""
        indices = [i for i, value in enumerate(table["log_prob"].to_pylist()) if value is not None]
        rows = table.take(pa.array(indices, pa.int64()))
        batch = pa.record_batch(
            [column.combine_chunks() for column in rows.columns], names=rows.column_names
        )
        stats = with_examples(
            self.database.inspection.statistics(batch),
            np.full(len(indices), number),
            self.database.tables.example_nll,
        )
        return ScoredTokens(indices, stats)


@dataclass(frozen=True)
class ScoredTokens:
    """The tokens of an example that have statistics."""

    indices: list[int]  # `[n]`, among all tokens of the example
    stats: TokenStatistics  # of these `n` tokens
