"""Tables of the most frequent tokens, and what the model wanted instead of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eaft.inspection.summary import CountedToken
from eaft.inspection.view.cache import Cache
from eaft.inspection.view.queries.conditions import NEVER, all_of, among, in_group
from eaft.inspection.view.queries.database import Database, finite
from eaft.inspection.view.selection import Selection

MOST_WANTED = 5  # first choices that are listed for each token


@dataclass(frozen=True)
class TokenRow(CountedToken):
    """A token of a group, and what the model wanted instead."""

    share: float  # of the group's tokens
    lift: float  # that share, divided by the token's share of all tokens in the selection
    nll: float | None  # mean, nats
    wanted: list[CountedToken]  # the model's most frequent first choices


@dataclass(frozen=True)
class TokenPage:
    """A page of the table of tokens."""

    total: int  # tokens in the table
    rows: list[TokenRow]


@dataclass(frozen=True)
class TokenCounts:
    """
    Counts of the token ids that occur in a group, the most frequent first.

    Attributes:
        token_id: `[ids]`.
        counts: `[ids]`, in the group.
        counts_of_all: `[ids]`, in the whole selection.
        nll: `[ids]`, sums over the group, nats.
        total: tokens in the group.
        total_of_all: tokens in the selection.
    """

    token_id: NDArray[np.integer]
    counts: NDArray[np.integer]
    counts_of_all: NDArray[np.integer]
    nll: NDArray[np.floating]
    total: int
    total_of_all: int


@dataclass(frozen=True)
class FirstChoice:
    """How often a label's first choice was this token."""

    token_id: int
    first_choice: int
    count: int


class TokenQueries:
    """Answers of `/api/tokens`."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.token_counts = Cache(self.find_token_counts, 8)

    def page(self, selection: Selection, group: str | None, offset: int, limit: int) -> TokenPage:
        """
        Return a page of the tokens of a group, the most frequent first.

        Args:
            selection: which tokens.
            group: of `GROUPS`; None for all tokens.
            offset: tokens before the page.
            limit: the most rows of the page.

        Raises:
            RequestError: no such group.
        """
        counts = self.token_counts(selection, group)
        end = min(offset + limit, len(counts.token_id))
        wanted = self.wanted(selection, group, counts.token_id[offset:end].tolist())
        rows = [self.row(counts, i, wanted) for i in range(offset, end)]
        return TokenPage(len(counts.token_id), rows)

    def row(self, counts: TokenCounts, i: int, wanted: dict[int, list[CountedToken]]) -> TokenRow:
        """Return a row of the table."""
        token_id, count = int(counts.token_id[i]), int(counts.counts[i])
        share = count / counts.total
        return TokenRow(
            **vars(self.database.token(token_id)),
            count=count,
            share=share,
            lift=share / (int(counts.counts_of_all[i]) / counts.total_of_all),
            nll=finite(float(counts.nll[i]) / count),
            wanted=wanted[token_id],
        )

    def wanted(
        self, selection: Selection, group: str | None, token_ids: list[int]
    ) -> dict[int, list[CountedToken]]:
        """Return the model's most frequent first choices for each of some labels in a group."""
        where = all_of(
            self.database.tokens_where(selection),
            in_group(group),
            among("token_id", token_ids, NEVER),
        )
        table = self.database.tokens_table(selection.model)
        choices = self.database.rows(
            FirstChoice,
            f"""
            SELECT token_id, first_choice, count(*) AS count FROM {table} WHERE {where.sql}
            GROUP BY token_id, first_choice
            QUALIFY row_number() OVER (PARTITION BY token_id ORDER BY count DESC, first_choice)
                <= {MOST_WANTED}
            ORDER BY count DESC, first_choice""",
            where.values,
            selection,
        )
        wanted: dict[int, list[CountedToken]] = {token_id: [] for token_id in token_ids}
        for choice in choices:
            token = self.database.token(choice.first_choice)
            wanted[choice.token_id].append(CountedToken(**vars(token), count=choice.count))
        return wanted

    def find_token_counts(self, selection: Selection, group: str | None) -> TokenCounts:
        """Return the counts of a group's tokens."""
        where, of_group = self.database.tokens_where(selection), in_group(group).sql
        table = self.database.tokens_table(selection.model)
        columns = self.database.columns(
            f"""
            SELECT token_id, count(*) FILTER (WHERE {of_group}) AS n, count(*) AS n_of_all,
                sum(-log_prob) FILTER (WHERE {of_group}) AS nll
            FROM {table} WHERE {where.sql} GROUP BY token_id""",
            where.values,
            selection,
        )
        order = np.lexsort((columns["token_id"], -columns["n"]))
        order = order[columns["n"][order] > 0]
        return TokenCounts(
            token_id=columns["token_id"][order],
            counts=columns["n"][order],
            counts_of_all=columns["n_of_all"][order],
            nll=columns["nll"][order],
            total=int(columns["n"].sum()),
            total_of_all=int(columns["n_of_all"].sum()),
        )
