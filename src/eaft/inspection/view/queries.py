"""
Everything that the viewer asks of an inspection: the plane, gates, examples, tokens, places, and
exports.

A question is about a `Selection` of labelled tokens. What is in SQL are filters, sums and orders;
entropies, conflicts, gradients, bins and gates are computed by `objective` and `landscape`. Values
reach SQL as bound parameters only.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from eaft.inspection.folder import BASE, EXAMPLES, STATISTICS
from eaft.inspection.labelled import with_examples
from eaft.inspection.landscape import bin_sums
from eaft.inspection.view.gating import effect, parameters, sliders, weigh
from eaft.inspection.view.kept import Kept
from eaft.inspection.view.selection import RequestError, Selection, one_of
from eaft.inspection.view.tables import DRAWS, Tables
from eaft.objective.statistics import HIGH_ENTROPY, LOW_ENTROPY, TokenStatistics

Answer = dict[str, Any]
Where = tuple[str, list[Any]]  # a condition, and what is bound to its question marks

MOST_ROWS = 200  # of one answer
GATE_TOKENS = 500_000  # that a gate is computed on; of more, a sample of about as many
WANTED = 5  # tokens listed
MOST_SOURCES = 100  # to choose from
CONTEXT = 80  # characters on each side of a place
SNIPPET = 200  # characters
EXPORTED, CHUNK = 20_000, 2000  # examples, and lines, of an export at a time

GROUPS = {
    "conflict": "conflict",
    "high_entropy": f"entropy >= {HIGH_ENTROPY}",
    "low_entropy": f"entropy <= {LOW_ENTROPY}",
}
NUMBERS = ("tokens", "labelled", "cut", "nll", "entropy", "conflict_share", "conflict_nll_share")
SORTED_BY = ("example", "row", *NUMBERS)
# Flags of `eaft train` that say what a row becomes
DATA_FLAGS = (
    *("max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss"),
    *("dataset_text_field", "dataset_kwargs", "chat_template_path"),
)
STATISTICS_NAMES = [field.name for field in STATISTICS]


class Queries:
    """The questions; methods may be called from several threads at once."""

    def __init__(self, tables: Tables) -> None:
        self.tables, self.inspection = tables, tables.inspection
        self.vocabulary = tables.vocabulary
        # What the next question about the same selection needs again: a slider moves, a box, a page
        # is turned
        self.chosen = Kept(self.find_chosen, 32)
        self.plane = Kept(self.find_plane, 16)
        self.ordered = Kept(self.find_ordered, 16)
        self.gate_tokens = Kept(self.find_gate_tokens, 4)
        self.token_counts = Kept(self.find_token_counts, 8)

    # Asking

    @contextmanager
    def cursor(self, selection: Selection | None = None) -> Iterator[Any]:
        """Lend a connection; in it `chosen` has the examples of a selection that filters them."""
        with self.tables.cursor() as cursor:
            if selection is not None and selection.filters_examples:
                cursor.register("chosen", pa.table({"example": self.chosen(selection.whole)}))
            yield cursor

    def ask(
        self, sql: str, values: list[Any], selection: Selection | None = None
    ) -> dict[str, Any]:
        """Return the columns of an answer, as arrays."""
        with self.cursor(selection) as cursor:
            found: dict[str, Any] = cursor.execute(sql, values).fetchnumpy()
            return {name: np.asarray(values) for name, values in found.items()}

    def rows(self, sql: str, values: list[Any], selection: Selection | None = None) -> list[Answer]:
        """Return the rows of an answer, with None for what is no number."""
        with self.cursor(selection) as cursor:
            cursor.execute(sql, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, map(plain, row), strict=True)) for row in cursor.fetchall()]

    def tokens(self, selection: Selection) -> str:
        """Return the name of the model's table of tokens."""
        return f"tokens_{self.tables.number(selection.model)}"

    def examples_of(self, model: str) -> str:
        """Return the name of the model's table of examples."""
        return f"examples_{self.tables.number(model)}"

    def find_chosen(self, selection: Selection) -> np.ndarray:
        """Return the examples of a selection that filters them, in order."""
        where, values = among("source", selection.sources)
        conditions = ["origin = ?", where]
        values = [selection.origin, *values]
        if selection.row is not None:
            conditions.append("row = ?")
            values.append(selection.row)
        for column, (low, high) in (("nll", selection.nll), ("conflict_share", selection.conflict)):
            for sign, end in ((">=", low), ("<=", high)):
                if end is not None:
                    conditions.append(f"{column} {sign} ?")
                    values.append(end)
        if selection.search:
            conditions.append(
                "example IN (SELECT example FROM texts WHERE contains(lower, lower(?)))"
            )
            values.append(selection.search)
        sql = (
            f"SELECT example FROM {self.examples_of(selection.model)} WHERE"
            f" {' AND '.join(conditions)} ORDER BY example"
        )
        found: np.ndarray = self.ask(sql, values)["example"].astype(np.int32)
        return found

    def of_tokens(self, selection: Selection) -> Where:
        """Return which rows of the model's tokens are in a selection."""
        where, values = among(
            "source", [self.tables.sources.index(source) for source in selection.sources]
        )
        conditions = ["origin = ?", where]
        values = [self.tables.origins.index(selection.origin), *values]
        if selection.filters_examples:
            conditions.append("example IN (SELECT example FROM chosen)")
        if selection.token is not None:
            conditions.append("token_id = ?")
            values.append(selection.token)
        if selection.box is not None:
            inside, more = self.in_box(selection.box)
            conditions.append(inside)
            values += more
        return " AND ".join(conditions), values

    def of_examples(self, selection: Selection) -> Where:
        """
        Return which examples are in a selection; if it is of certain tokens, those that have one.
        """
        where, values = among("source", selection.sources)
        conditions = ["origin = ?", where]
        values = [selection.origin, *values]
        if selection.filters_examples:
            conditions.append("example IN (SELECT example FROM chosen)")
        if selection != selection.whole:
            tokens, more = self.of_tokens(selection)
            conditions.append(
                f"example IN (SELECT DISTINCT example FROM {self.tokens(selection)} WHERE {tokens})"
            )
            values += more
        return " AND ".join(conditions), values

    def in_box(self, box: tuple[float, float, float, float]) -> Where:
        """
        Return the condition of a box: it has its lower sides; the upper ones only at the end of the
        plane.
        """
        conditions: list[str] = []
        values: list[Any] = []
        edges = (self.tables.entropy_edges, self.tables.prob_edges)
        for column, low, high, axis in (
            ("entropy", *box[:2], edges[0]),
            ("prob", *box[2:], edges[1]),
        ):
            # The plane's first and last bins have all that is beyond them
            if low > axis[0]:
                conditions.append(f"{column}::DOUBLE >= ?")
                values.append(low)
            if high < axis[-1]:
                conditions.append(f"{column}::DOUBLE < ?")
                values.append(high)
        return " AND ".join(conditions) or "true", values

    @cached_property
    def summary(self) -> Answer | None:
        """What was found; None if the folder is scored, and nothing found yet."""
        try:
            return self.inspection.summary
        except (OSError, ValueError):
            return None

    def about(self) -> Answer:
        """Return what a page is built from: names to choose from, sliders, and what was found."""
        run = self.inspection.run
        return {
            "models": [vars(model) for model in self.inspection.models],
            "origins": self.tables.origins,
            "sources": self.largest_sources,
            "counts": (self.summary or {}).get("counts"),
            "top_k": self.inspection.top_k,
            "entropy_max": self.tables.entropy_max,
            "summary": self.summary,
            "gates": sliders(self.measured),
            "run": run,
            "train": train_command(run),
        }

    @property
    def largest_sources(self) -> list[str]:
        """
        The sources to choose from; a column `source` may be an address that no two examples share.
        """
        examples = np.bincount(self.tables.source_codes, minlength=len(self.tables.sources))
        return [
            self.tables.sources[i]
            for i in np.sort(np.argsort(-examples, kind="stable")[:MOST_SOURCES])
        ]

    # The plane

    def landscape(self, selection: Selection) -> Answer:
        """
        Return sums of tokens, nll and gradient norms over the plane's bins, `[entropies,
        probabilities]`.

        The grids, `total` and `corner` (confident conflicts) leave the box aside; `selected` is
        what is in it.
        """
        plane = self.plane(replace(selection, box=None))
        if selection.box is None:
            where, values = self.of_examples(selection)
            # An example without labels has no nll, and no token here
            table = self.examples_of(selection.model)
            sql = f"SELECT count(*) AS examples FROM {table} WHERE {where} AND nll IS NOT NULL"
            return {**plane, "selected": plane["total"] | self.rows(sql, values, selection)[0]}
        where, values = self.of_tokens(selection)
        selected = self.rows(
            f"""
            SELECT coalesce(sum(tokens), 0)::BIGINT AS tokens, coalesce(sum(nll), 0) AS nll,
                coalesce(sum(gradient), 0) AS gradient, count(*) AS examples
            FROM (
                SELECT count(*) AS tokens, sum(-log_prob) AS nll, sum(grad_norm) AS gradient
                FROM {self.tokens(selection)} WHERE {where} GROUP BY example)""",
            values,
            selection,
        )
        return {**plane, "selected": selected[0]}

    def find_plane(self, selection: Selection) -> Answer:
        """Return what `landscape` has of a selection without a box."""
        where, values = self.of_tokens(selection)
        found = self.ask(
            f"""
            SELECT entropy_bin, prob_bin, conflict,
                count(*) AS tokens, sum(-log_prob) AS nll, sum(grad_norm) AS gradient
            FROM {self.tokens(selection)} WHERE {where} GROUP BY entropy_bin, prob_bin, conflict""",
            values,
            selection,
        )
        sums = {name: found[name].astype(np.float64) for name in ("tokens", "nll", "gradient")}

        def total(of: Any = slice(None)) -> Answer:
            return {"tokens": int(sums["tokens"][of].sum())} | {
                n: float(sums[n][of].sum()) for n in ("nll", "gradient")
            }

        return {
            **self.edges,
            **{name: self.grid(found, values) for name, values in sums.items()},
            "total": total(),
            "corner": total(found["conflict"].astype(bool)),
        }

    @property
    def edges(self) -> Answer:
        """The edges of the plane's bins."""
        return {
            "entropy_edges": self.tables.entropy_edges.tolist(),
            "prob_edges": self.tables.prob_edges.tolist(),
        }

    def grid(self, found: Answer, values: np.ndarray) -> list[list[float]]:
        """Return the sums of `values` in the plane's bins, to 4 decimals."""
        shape = len(self.tables.entropy_edges) - 1, len(self.tables.prob_edges) - 1
        rows, columns = (
            np.asarray(found[name], dtype=np.intp) for name in ("entropy_bin", "prob_bin")
        )
        sums: list[list[float]] = np.round(bin_sums(rows, columns, shape, values), 4).tolist()
        return sums

    # Gates

    @property
    def measured(self) -> dict[str, float]:
        """Gates' parameters that are measured on this data, as far as they are known."""
        found = (self.summary or {}).get("measured") or {}
        return {name: value for name, value in found.items() if value is not None}

    def find_gate_tokens(self, selection: Selection) -> tuple[TokenStatistics, Answer, int]:
        """
        Return a selection's statistics, the other columns that a gate's sums need, and how many
        tokens it has.
        """
        where, values = self.of_tokens(selection)
        table = self.tokens(selection)
        count = self.rows(f"SELECT count(*) AS n FROM {table} WHERE {where}", values, selection)[0][
            "n"
        ]
        draw = DRAWS if count <= GATE_TOKENS else math.ceil(DRAWS * GATE_TOKENS / count)
        columns = [name for name in STATISTICS_NAMES if name != "first_choice"]
        others = ["example", "token_id", "source", "grad_norm", "entropy_bin", "prob_bin"]
        sampled = f" AND draw < {draw}" if draw < DRAWS else ""
        sql = f"SELECT {', '.join(columns + others)} FROM {table} WHERE {where}{sampled}"
        arrays = self.ask(sql, values, selection)
        batch = pa.record_batch({name: arrays[name] for name in columns})
        stats = with_examples(
            self.inspection.statistics(batch), arrays["example"], self.tables.example_nll
        )
        return stats, {name: arrays[name] for name in others}, count

    def gate(self, selection: Selection, gate: str, given: Answer) -> Answer:
        """
        Return what a gate does to a selection (`gating.effect`), and its gradients over the plane's
        bins.

        Of a selection of more than `GATE_TOKENS` tokens it is computed on a fixed random sample
        (`sampled` says of how many), and sums and counts are scaled up.
        """
        params = parameters(gate, given, self.measured)
        stats, columns, count = self.gate_tokens(selection)
        used = len(stats.log_prob)
        scale = count / max(used, 1)
        weights = weigh(gate, stats, params)
        found = effect(weights, stats, columns, self.tables.sources)
        found["weights"]["counts"] = (
            np.round(found["weights"]["counts"] * scale).astype(int).tolist()
        )
        for muted in found["muted"]:
            muted.update(self.named(muted["token_id"]), count=round(muted["count"] * scale))
            muted["nll_removed"] = muted.pop("nll") * scale
        return {
            "gate": gate,
            "params": params,
            **found,
            "gradient": self.grid(columns, weights * columns["grad_norm"] * scale),
            **self.edges,
            "count": count,
            "sampled": used if used < count else None,
        }

    # Examples

    def find_ordered(self, selection: Selection, sort: str, descending: bool) -> np.ndarray:
        """Return the examples of a selection, in order of a column; nulls are last."""
        where, values = self.of_examples(selection)
        order = f"{sort} {'DESC' if descending else 'ASC'} NULLS LAST, example"
        sql = (
            f"SELECT example FROM {self.examples_of(selection.model)} WHERE {where} ORDER BY"
            f" {order}"
        )
        found: np.ndarray = self.ask(sql, values, selection)["example"]
        return found

    def examples(
        self, selection: Selection, sort: str, descending: bool, offset: int, limit: int
    ) -> Answer:
        """
        Return a page of the examples of a selection, in order of a column of `SORTED_BY`; nulls are
        last.
        """
        one_of("sort", sort, SORTED_BY)
        ordered = self.ordered(selection, sort, descending)
        page = ordered[offset : offset + limit].tolist()
        where, values = among("example", page, "false")
        # A search is shown where it is found; lower case may be longer or shorter, by a letter or
        # two
        found = "greatest(1, instr(lower, lower(?)) - 60)" if selection.search else "1"
        columns = ", ".join(("example", "origin", "source", "row", *NUMBERS))
        rows = self.rows(
            f"""
            SELECT {columns}, substring(text, {found}, {SNIPPET}) AS snippet
            FROM {self.examples_of(selection.model)} JOIN texts USING (example) WHERE {where}""",
            [*([selection.search] if selection.search else []), *values],
        )
        by_example = {row["example"]: row for row in rows}
        return {"total": len(ordered), "rows": [by_example[example] for example in page]}

    def example(self, number: int, model: str, gate: str | None, given: Answer) -> Answer:
        """
        Return an example with all its tokens, under a model; with a gate's weights if one is named.
        """
        known = len(self.tables.example_nll)
        if number >= known:
            raise RequestError(f"example={number}: there are {known}.")
        row = self.rows(f"SELECT * FROM {self.examples_of(model)} WHERE example = ?", [number])[0]
        row |= self.rows("SELECT text, messages FROM texts WHERE example = ?", [number])[0]
        text = row["text"]
        row["messages"] = None if row["messages"] is None else json.loads(row["messages"])
        only = ds.field("example") == number
        places = self.tables.datasets[BASE].to_table(filter=only)
        table = places if model == BASE else self.tables.datasets[model].to_table(filter=only)
        tokens = table.select(STATISTICS_NAMES).to_pylist()
        base = places["log_prob"].to_pylist()
        scored = [i for i, token in enumerate(tokens) if token["log_prob"] is not None]
        weights: list[float | None] = [None] * len(tokens)
        batch = pa.record_batch(
            [c.combine_chunks() for c in table.take(pa.array(scored, pa.int64())).columns],
            names=table.column_names,
        )
        stats = with_examples(
            self.inspection.statistics(batch), np.full(len(scored), number), self.tables.example_nll
        )
        if gate is not None:
            params = parameters(gate, given, self.measured)
            for i, weight in zip(scored, weigh(gate, stats, params).tolist(), strict=True):
                weights[i] = plain(weight)
        conflicts = dict(zip(scored, stats.is_conflict.tolist(), strict=True))
        probs = dict(zip(scored, stats.prob.tolist(), strict=True))
        start, found = 0, []
        keys = places.select(["position", "token_id", "end", "labelled"]).to_pylist()
        for i, (key, token) in enumerate(zip(keys, tokens, strict=True)):
            first = token["first_choice"]
            found.append(
                {
                    "position": key["position"],
                    "token_id": key["token_id"],
                    "token": self.named(key["token_id"])["text"],
                    # Cut here: ends count characters, and a browser's strings UTF-16 units
                    "text": text[start : key["end"]],
                    "start": start,
                    "end": key["end"],
                    "labelled": key["labelled"],
                    "log_prob": plain(token["log_prob"]),
                    "prob": plain(probs.get(i)),
                    "entropy": plain(token["entropy"]),
                    "nll": None if token["log_prob"] is None else plain(-token["log_prob"]),
                    "rank": token["rank"],
                    "first_choice": first,
                    "first_text": None if first is None else self.named(first)["text"],
                    "first_prob": plain(token["first_prob"]),
                    "conflict": conflicts.get(i),
                    "weight": weights[i],
                    "base_log_prob": plain(base[i]) if model != BASE else None,
                }
            )
            start = key["end"]
        return {**row, "tokens": found}

    # Tokens

    def named(self, token_id: int) -> Answer:
        """Return a token's id and text."""
        return {"token_id": token_id, "text": self.vocabulary.get(token_id, f"<{token_id}>")}

    def find_token_counts(self, selection: Selection, group: str | None) -> Answer:
        """
        Return, of each token of a group: count, nll and its count among all of the selection; the
        most first.
        """
        where, values = self.of_tokens(selection)
        of_group = GROUPS[group] if group else "true"
        arrays = self.ask(
            f"""
            SELECT token_id, count(*) FILTER (WHERE {of_group}) AS n, count(*) AS among_all,
                sum(-log_prob) FILTER (WHERE {of_group}) AS nll
            FROM {self.tokens(selection)} WHERE {where} GROUP BY token_id""",
            values,
            selection,
        )
        totals = {"all_of_group": int(arrays["n"].sum()), "all": int(arrays["among_all"].sum())}
        order = np.lexsort((arrays["token_id"], -arrays["n"]))
        order = order[arrays["n"][order] > 0]
        return {name: values[order] for name, values in arrays.items()} | totals

    def token_table(
        self, selection: Selection, group: str | None, offset: int, limit: int
    ) -> Answer:
        """
        Return a page of the tokens of a group, the most frequent first, with what the model wanted
        instead.

        `share` is of the group's tokens; `lift` is that share over the token's share of all tokens
        of the selection; `nll` is the mean.
        """
        if group is not None:
            one_of("group", group, GROUPS)
        counts = self.token_counts(selection, group)
        page = slice(offset, offset + limit)
        ids = counts["token_id"][page].tolist()
        wanted: dict[int, list[Answer]] = {token: [] for token in ids}
        where, values = self.of_tokens(selection)
        these, more = among("token_id", ids, none="false")
        for row in self.rows(
            f"""
            SELECT token_id, first_choice, count(*) AS n FROM {self.tokens(selection)}
            WHERE {where} AND {GROUPS[group] if group else "true"} AND {these}
            GROUP BY token_id, first_choice
            QUALIFY row_number() OVER (PARTITION BY token_id ORDER BY n DESC, first_choice)
                <= {WANTED}
            ORDER BY n DESC, first_choice""",
            [*values, *more],
            selection,
        ):
            wanted[row["token_id"]].append({**self.named(row["first_choice"]), "count": row["n"]})
        rows = []
        for token, n, among_all, nll in zip(
            ids, *(counts[name][page].tolist() for name in ("n", "among_all", "nll")), strict=True
        ):
            share = n / counts["all_of_group"]
            rows.append(
                {
                    **self.named(token),
                    "count": n,
                    "share": share,
                    "lift": share / (among_all / counts["all"]),
                    "nll": plain(nll / n),
                    "wanted": wanted[token],
                }
            )
        return {"total": len(counts["token_id"]), "rows": rows}

    def concordance(
        self, selection: Selection, group: str | None, offset: int, limit: int
    ) -> Answer:
        """
        Return a page of the places of a selection's tokens, in order, each with the text around it.
        """
        if group is not None:
            one_of("group", group, GROUPS)
        where, values = self.of_tokens(selection)
        where += f" AND {GROUPS[group]}" if group else ""
        table = self.tokens(selection)
        total = self.rows(f"SELECT count(*) AS n FROM {table} WHERE {where}", values, selection)[0][
            "n"
        ]
        places = self.rows(
            f"""
            SELECT example, position, token_id, "start", "end", first_choice, prob, entropy,
                -log_prob AS nll
            FROM {table} WHERE {where} ORDER BY example, position LIMIT ? OFFSET ?""",
            [*values, limit, offset],
            selection,
        )
        these, examples = among(
            "example", sorted({place["example"] for place in places}), none="false"
        )
        found = self.rows(f"SELECT example, text FROM texts WHERE {these}", examples)
        texts = {row["example"]: row["text"] for row in found}
        rows = []
        for place in places:
            text, start, end = texts[place["example"]], place["start"], place["end"]
            rows.append(
                {
                    **{name: place[name] for name in ("example", "position")},
                    "left": text[max(0, start - CONTEXT) : start],
                    # A token that ends no character has no text of its own there
                    **self.named(place["token_id"]),
                    **({"text": text[start:end]} if end > start else {}),
                    "right": text[end : end + CONTEXT],
                    "first_text": self.named(place["first_choice"])["text"],
                    **{name: place[name] for name in ("prob", "entropy", "nll")},
                }
            )
        return {"total": total, "rows": rows}

    # Exports

    def parts(
        self, columns: str, table: str, where: Where, order: str, selection: Selection
    ) -> Iterator[list[Any]]:
        """
        Yield an answer's rows, many at a time, by ranges of examples: what is sorted at once is no
        larger.
        """
        condition, values = where
        with self.cursor(selection) as cursor:
            for first in range(0, len(self.tables.example_nll), EXPORTED):
                cursor.execute(
                    f"SELECT {columns} FROM {table} WHERE {condition} AND example BETWEEN ? AND ?"
                    f" ORDER BY {order}",
                    [*values, first, first + EXPORTED - 1],
                )
                while rows := cursor.fetchmany(CHUNK):
                    yield rows

    def export_examples(self, selection: Selection) -> Iterator[str]:
        """
        Yield the examples of a selection as JSON Lines: what `examples.parquet` has, means under
        the model.
        """
        names = [field.name for field in EXAMPLES]
        table = f"{self.examples_of(selection.model)} JOIN texts USING (example)"
        for rows in self.parts(
            ", ".join(names), table, self.of_examples(selection), "example", selection
        ):
            lines = []
            for row in rows:
                line = dict(zip(names, map(plain, row), strict=True))
                line["messages"] = (
                    None if line["messages"] is None else json.loads(line["messages"])
                )
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            yield "".join(lines)

    def export_tokens(self, selection: Selection) -> Iterator[str]:
        """
        Yield the tokens of a selection as CSV.

        Texts are JSON strings: a token that is `=1+1` is `"=1+1"` in its cell, which no spreadsheet
        takes for a formula, and one that is a line's end is `"\\n"`.
        """
        where, table = self.of_tokens(selection), self.tokens(selection)
        names = [
            "example",
            "position",
            "token_id",
            *STATISTICS_NAMES,
            "prob",
            "grad_norm",
            "conflict",
        ]
        at = names.index("token_id"), names.index("first_choice")
        yield ",".join([*names, "text", "first_text"]) + "\n"
        for rows in self.parts(", ".join(names), table, where, "example, position", selection):
            lines = io.StringIO()
            csv.writer(lines, lineterminator="\n").writerows(
                [*row, *(json.dumps(self.named(row[i])["text"], ensure_ascii=False) for i in at)]
                for row in rows
            )
            yield lines.getvalue()


def among(column: str, values: Sequence[Any], none: str = "true") -> Where:
    """Return the condition that a column has one of these values, or `none` if there are none."""
    return (f"{column} IN ({', '.join('?' * len(values))})", [*values]) if values else (none, [])


def train_command(run: Answer) -> str:
    """
    Return the command line that trains on what was inspected, less the exported examples; quoted
    for a shell.
    """
    flags = {"model_name_or_path": run.get("model"), "dataset_name": run.get("dataset")}
    flags |= {name: run.get("config", {}).get(name) for name in DATA_FLAGS}
    flags["exclude_examples"] = "examples.jsonl"
    parts = ["eaft", "train"]
    for name, value in flags.items():
        if value is not None:
            parts += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(parts)


def plain(value: Any) -> Any:
    """Return a value as JSON has it: None for NaN and the infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
