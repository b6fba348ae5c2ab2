"""Exports: the examples of a selection as JSON Lines, and its tokens as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from eaft.inspection.folder import EXAMPLES, STATISTICS, WHOLE_VOCABULARY
from eaft.inspection.view.queries.conditions import Condition
from eaft.inspection.view.queries.database import Database, finite
from eaft.inspection.view.selection import Selection

EXAMPLES_AT_ONCE = 20_000  # sorted at once
EXAMPLE_COLUMNS = [field.name for field in EXAMPLES]
TOKEN_COLUMNS = [
    *("example", "position", "token_id"),
    *(field.name for field in STATISTICS),
    *("prob", "grad_norm", "conflict"),
]


class Exports:
    """Answers of `/api/export/examples.jsonl` and `/api/export/tokens.csv`."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def examples(self, selection: Selection) -> Iterator[str]:
        """
        Yield the examples of a selection as JSON Lines.

        A line has the columns of examples.parquet; means are under the selection's model.
        """
        table = f"{self.database.examples_table(selection.model)} JOIN texts USING (example)"
        where = self.database.examples_where(selection)
        for rows in self.rows(EXAMPLE_COLUMNS, table, where, "example", selection):
            yield "".join(map(example_line, rows))

    def tokens(self, selection: Selection) -> Iterator[str]:
        """
        Yield the tokens of a selection as CSV.

        Texts are JSON strings. So the cell of a token `=1+1` is `"=1+1"`, which no spreadsheet
        takes for a formula, and the cell of a line's end is `"\\n"`.
        """
        table = self.database.tokens_table(selection.model)
        where, order = self.database.tokens_where(selection), "example, position"
        columns = TOKEN_COLUMNS
        if not self.database.inspection.whole_vocabulary:
            columns = [name for name in columns if name not in (*WHOLE_VOCABULARY, "grad_norm")]
        token, first_choice = map(columns.index, ("token_id", "first_choice"))
        yield ",".join([*columns, "text", "first_text"]) + "\n"
        for rows in self.rows(columns, table, where, order, selection):
            lines = io.StringIO()
            writer = csv.writer(lines, lineterminator="\n")
            for row in rows:
                writer.writerow([*row, self.quoted(row[token]), self.quoted(row[first_choice])])
            yield lines.getvalue()

    def quoted(self, token_id: int) -> str:
        """Return a token's text as a JSON string."""
        return json.dumps(self.database.token(token_id).text, ensure_ascii=False)

    def rows(
        self, columns: list[str], table: str, where: Condition, order: str, selection: Selection
    ) -> Iterator[list[tuple[Any, ...]]]:
        """
        Yield the rows of a table in order, many at a time.

        Each range of `EXAMPLES_AT_ONCE` examples is a query of its own, so that only these rows are
        sorted at once.
        """
        for first in range(0, len(self.database.tables.example_nll), EXAMPLES_AT_ONCE):
            sql = (
                f"SELECT {', '.join(columns)} FROM {table}"
                f" WHERE {where.sql} AND example BETWEEN ? AND ? ORDER BY {order}"
            )
            values = (*where.values, first, first + EXAMPLES_AT_ONCE - 1)
            yield from self.database.stream(sql, values, selection)


def example_line(row: tuple[Any, ...]) -> str:
    """Return an example as a line of JSON."""
    line = dict(zip(EXAMPLE_COLUMNS, map(finite, row), strict=True))
    if line["messages"] is not None:
        line["messages"] = json.loads(line["messages"])
    return json.dumps(line, ensure_ascii=False) + "\n"
