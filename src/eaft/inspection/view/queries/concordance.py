"""The places where tokens occur, each with the text around it."""

from __future__ import annotations

from dataclasses import dataclass

from eaft.inspection.view.queries.conditions import NEVER, all_of, among, in_group
from eaft.inspection.view.queries.database import Database
from eaft.inspection.view.selection import Selection

CONTEXT = 80  # characters on each side of a token


@dataclass(frozen=True)
class Place:
    """A token's place in the text of an example."""

    example: int
    position: int
    left: str  # the text before the token
    token_id: int
    text: str
    right: str  # the text after the token
    first_text: str  # the model's first choice
    prob: float | None
    entropy: float | None
    nll: float | None


@dataclass(frozen=True)
class Concordance:
    """A page of the places of tokens."""

    total: int  # places in the list
    rows: list[Place]


@dataclass(frozen=True)
class PlaceInTable:
    """A row of the model's table of tokens."""

    example: int
    position: int
    token_id: int
    start: int
    end: int
    first_choice: int
    prob: float | None
    entropy: float | None
    nll: float | None


@dataclass(frozen=True)
class ExampleText:
    """The text of an example."""

    example: int
    text: str


class ConcordanceQueries:
    """Answers of `/api/concordance`."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def page(self, selection: Selection, group: str | None, offset: int, limit: int) -> Concordance:
        """
        Return a page of the places of a selection's tokens, in order.

        Args:
            selection: which tokens.
            group: of `GROUPS`; None for all tokens.
            offset: places before the page.
            limit: the most rows of the page.

        Raises:
            RequestError: no such group.
        """
        where = all_of(self.database.tokens_where(selection), in_group(group))
        table = self.database.tokens_table(selection.model)
        places = self.database.rows(
            PlaceInTable,
            f"""
            SELECT example, position, token_id, "start", "end", first_choice, prob, entropy,
                -log_prob AS nll
            FROM {table} WHERE {where.sql} ORDER BY example, position LIMIT ? OFFSET ?""",
            (*where.values, limit, offset),
            selection,
        )
        texts = self.texts(sorted({place.example for place in places}))
        rows = [self.with_text(place, texts[place.example]) for place in places]
        return Concordance(self.database.count(table, where, selection), rows)

    def texts(self, examples: list[int]) -> dict[int, str]:
        """Return the texts of some examples by number."""
        where = among("example", examples, NEVER)
        sql = f"SELECT example, text FROM texts WHERE {where.sql}"
        rows = self.database.rows(ExampleText, sql, where.values)
        return {row.example: row.text for row in rows}

    def with_text(self, place: PlaceInTable, text: str) -> Place:
        """Return a place with the text around it."""
        start, end = place.start, place.end
        # A token that ends no character has no part of the text: its own text stands there
        has_text = end > start
        return Place(
            example=place.example,
            position=place.position,
            left=text[max(0, start - CONTEXT) : start],
            token_id=place.token_id,
            text=text[start:end] if has_text else self.database.token(place.token_id).text,
            right=text[end : end + CONTEXT],
            first_text=self.database.token(place.first_choice).text,
            prob=place.prob,
            entropy=place.entropy,
            nll=place.nll,
        )
