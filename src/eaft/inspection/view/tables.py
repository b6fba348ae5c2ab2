"""
The labelled tokens and the examples of an inspection as DuckDB tables in memory.

Everything is read from Parquet once, at the start. DuckDB itself opens no file. While reading,
`objective` and `landscape` compute what follows from a token's statistics: its probability, its
gradient's norm, whether it is a conflict, and its bins of the plane. In a run of vLLM `entropy` is
the top-K entropy, and the gradient's norm is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from eaft.errors import ConfigurationError
from eaft.inspection.folder import (
    BASE,
    EXAMPLES_FILE,
    STATISTICS,
    VOCABULARY_FILE,
    WHOLE_VOCABULARY,
    Inspection,
)
from eaft.inspection.landscape import bin_indices, entropy_edges, prob_edges
from eaft.inspection.vocabulary import Vocabulary

DRAWS = 1 << 16  # each token has a random number `draw` below this, so `draw < n` is a sample
BATCH_ROWS = 1 << 20
NAMES = [field.name for field in STATISTICS]


class Tables:
    """
    The tables of an inspection.

    `texts` has the texts of all examples. Model number N has the tables `tokens_N` and `examples_N`
    with means under this model. The base model's tables exist when this returns. A thread reads the
    tables of the other models, and `number` waits for them.

    Args:
        inspection: to read.
        tell: called with a line that shows the progress.

    Raises:
        ConfigurationError: a file is missing, damaged, or a link that leads out of the folder.
    """

    def __init__(
        self, inspection: Inspection, tell: Callable[[str], None] = lambda line: None
    ) -> None:
        self.inspection, self.tell = inspection, tell
        self.names = [model.name for model in inspection.models]
        if not inspection.files():
            raise ConfigurationError(
                f"{str(inspection.folder)!r} has no tokens: give its `eaft inspect` command again."
            )
        files = [file for name in self.names for file in inspection.files(name)]
        check_inside(
            inspection.folder,
            [*files, *(inspection.folder / n for n in (EXAMPLES_FILE, VOCABULARY_FILE))],
        )
        # Python reads the files and hands over tables, so that no query can open a file
        self.connection = duckdb.connect(
            config={"enable_external_access": "false", "temp_directory": ""}
        )
        self.connection.execute("SET lock_configuration = true")
        try:
            self.entropy_edges, self.prob_edges = entropy_edges(self.entropy_max), prob_edges()
            self.read_examples()
            self.vocabulary = Vocabulary(inspection)
            self.reader = ThreadPoolExecutor(1)
            self.read: dict[str, Future[None]] = {
                n: self.reader.submit(self.read_model, n) for n in self.names
            }
            self.number(BASE)
        except (OSError, pa.ArrowException, KeyError) as error:
            raise ConfigurationError(
                f"{str(inspection.folder)!r} cannot be read. ({error})"
            ) from error

    def cursor(self) -> Any:
        """Return a connection to the tables for one thread."""
        return self.connection.cursor()

    def close(self) -> None:
        """Read no more models."""
        self.reader.shutdown(cancel_futures=True)

    def number(self, model: str) -> int:
        """Return a model's number N once its tables exist."""
        self.read[model].result()
        return self.names.index(model)

    @cached_property
    def entropy_max(self) -> float:
        """The largest entropy under any model, nats; 0 if no token is labelled."""
        largest = 0.0
        for file in (file for name in self.names for file in self.inspection.files(name)):
            metadata = pq.read_metadata(file)
            names = metadata.schema.to_arrow_schema().names
            column = names.index(self.inspection.entropy_column)
            for group in range(metadata.num_row_groups):
                statistics = metadata.row_group(group).column(column).statistics
                if statistics is not None and statistics.has_min_max:
                    largest = max(largest, statistics.max)
        return largest

    @cached_property
    def datasets(self) -> dict[str, Any]:
        """Each model's files as one data set, which also has the unlabelled tokens."""
        return {
            name: ds.dataset([str(f) for f in self.inspection.files(name)], format="parquet")
            for name in self.names
        }

    def read_examples(self) -> None:
        """Make `examples_0` and `texts`; `texts` also has lower case, for searching."""
        examples = self.inspection.examples()
        self.sources = sorted(pc.unique(examples["source"]).to_pylist())
        self.origins = sorted(pc.unique(examples["origin"]).to_pylist())
        # Both as numbers by example, which `tokens_N` has for each token
        self.source_codes = (
            pc.index_in(examples["source"], pa.array(self.sources)).to_numpy().astype(np.int32)
        )
        self.origin_codes = (
            pc.index_in(examples["origin"], pa.array(self.origins)).to_numpy().astype(np.uint8)
        )
        self.example_nll = examples["nll"].to_numpy(zero_copy_only=False)
        if not np.array_equal(examples["example"].to_numpy(), np.arange(len(examples))):
            raise KeyError(f"{EXAMPLES_FILE}: its rows are not in order")
        with Handed(self.connection, examples) as cursor:
            cursor.execute(
                "CREATE TABLE examples_0 AS SELECT * EXCLUDE (text, messages) FROM handed"
            )
            cursor.execute(
                "CREATE TABLE texts AS SELECT example, text, lower(text) AS lower, messages FROM"
                " handed"
            )

    def read_model(self, name: str) -> None:
        """Make a model's `tokens_N`; for another model than the base model also `examples_N`."""
        number, rows = self.names.index(name), 0
        total = sum(pq.read_metadata(file).num_rows for file in self.inspection.files(name))
        random = np.random.default_rng(0)
        table, made, waiting = f"tokens_{number}", False, []
        for batch in self.batches(name):
            rows += len(batch)
            waiting.append(self.labelled(batch, random))
            # DuckDB inserts many rows at once with all cores
            if sum(map(len, waiting)) >= BATCH_ROWS or rows == total:
                with Handed(self.connection, pa.concat_tables(waiting)) as cursor:
                    verb = f"INSERT INTO {table}" if made else f"CREATE TABLE {table} AS"
                    cursor.execute(f"{verb} SELECT * FROM handed")
                made, waiting = True, []
                self.tell(f"{name}: {rows:,} of {total:,} tokens")
        if name != BASE:
            self.cursor().execute(f"""
                CREATE TABLE examples_{number} AS
                SELECT kept.* EXCLUDE (nll, entropy, conflict_share, conflict_nll_share),
                    means.* EXCLUDE (example)
                FROM examples_0 AS kept LEFT JOIN (
                    SELECT example, avg(-log_prob) AS nll, avg(entropy) AS entropy,
                        avg(conflict::INTEGER) AS conflict_share,
                        sum(CASE WHEN conflict THEN -log_prob ELSE 0 END)
                            / nullif(sum(-log_prob), 0)
                            AS conflict_nll_share
                    FROM tokens_{number} GROUP BY example) AS means USING (example)
                ORDER BY example""")

    def batches(self, name: str) -> Iterator[pa.Table]:
        """Yield a model's rows with the base model's columns and where each token starts."""
        of_tokens = ["example", "position", "token_id", "end", "labelled"]
        previous = 0
        for ours, theirs in zip(
            self.inspection.files(BASE), self.inspection.files(name), strict=True
        ):
            places, statistics = pq.ParquetFile(ours), pq.ParquetFile(theirs)
            pairs = zip(
                places.iter_batches(BATCH_ROWS, columns=of_tokens),
                statistics.iter_batches(BATCH_ROWS, columns=["example", "position", *NAMES]),
                strict=True,
            )
            for place, scores in pairs:
                if not all(place[key].equals(scores[key]) for key in ("example", "position")):
                    raise ConfigurationError(f"{theirs}: its rows differ from those of {ours}.")
                end, position = place["end"].to_numpy(), place["position"].to_numpy()
                start = np.where(position == 0, 0, np.concatenate([[previous], end[:-1]])).astype(
                    np.int32
                )
                previous = int(end[-1])
                table = pa.table({n: place[n] for n in of_tokens} | {n: scores[n] for n in NAMES})
                yield table.append_column("start", pa.array(start))

    def labelled(self, table: pa.Table, random: np.random.Generator) -> pa.Table:
        """Return the labelled rows that have statistics, with the columns that follow from them."""
        draw = random.integers(DRAWS, size=len(table), dtype=np.uint16)
        keep = pc.and_(table["labelled"], pc.is_valid(table["log_prob"]))
        table = (
            table.append_column("draw", pa.array(draw))
            .filter(keep)
            .drop_columns(["labelled"])
            .combine_chunks()
        )
        batch = pa.record_batch(
            [column.combine_chunks() for column in table.columns], names=table.column_names
        )
        stats = self.inspection.statistics(batch)
        example = batch["example"].to_numpy()
        columns = {
            "prob": stats.prob.numpy(),
            "grad_norm": stats.grad_norm.numpy(),
            "conflict": stats.is_conflict.numpy(),
            "entropy_bin": bin_indices(stats.entropy.numpy(), self.entropy_edges).astype(np.uint8),
            "prob_bin": bin_indices(stats.prob.numpy(), self.prob_edges).astype(np.uint8),
            "source": self.source_codes[example],
            "origin": self.origin_codes[example],
        }
        if not self.inspection.whole_vocabulary:
            table = table.drop_columns(list(WHOLE_VOCABULARY))
            columns |= {name: getattr(stats, name).numpy() for name in WHOLE_VOCABULARY}
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values))
        return table


class Handed:
    """Lends a connection in which an Arrow table is called `handed`."""

    def __init__(self, connection: Any, table: pa.Table) -> None:
        self.cursor, self.table = connection.cursor(), table

    def __enter__(self) -> Any:
        self.cursor.register("handed", self.table)
        return self.cursor

    def __exit__(self, *error: object) -> None:
        self.cursor.unregister("handed")
        self.cursor.close()


def check_inside(folder: Path, files: list[Path]) -> None:
    """
    Check that files exist, and that their links do not lead out of the folder.

    Raises:
        ConfigurationError: a file is missing, or lies elsewhere.
    """
    for file in files:
        if not file.is_file():
            raise ConfigurationError(
                f"{str(file)!r} is missing: give the `eaft inspect` command of its folder again."
            )
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ConfigurationError(
                f"{str(file)!r} is a link that leads out of its folder: put the file there."
            )
