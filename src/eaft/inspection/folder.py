"""
The folder that `eaft inspect` writes: which files it has, which columns, and what they mean.

    run.json             what was scored, by which models, with which flags (written first;
    `finished` at the end) tokens/*.parquet     a row per token of every prepared example, in order:
    `TOKENS` compared/NAME/*.parquet   the same rows of the same files through another model:
    `COMPARED` examples.parquet     a row per prepared example, in order: `EXAMPLES`
    vocabulary.parquet   the text of every token id that occurs: `VOCABULARY` summary.json
    what was found (`eaft.inspection.find.findings`) report.html, figures/*.png

Every reader needs these files alone: no model, no tokenizer, no data set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NotRequired

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from eaft.errors import ConfigurationError
from eaft.files import read_json
from eaft.objective.statistics import TokenStatistics

RUN_FILE, SUMMARY_FILE, REPORT_FILE = "run.json", "summary.json", "report.html"
EXAMPLES_FILE, VOCABULARY_FILE = "examples.parquet", "vocabulary.parquet"
BASE = "base"  # the name of the model that everything is scored with; others are compared with it
DATA, ROLLOUTS = (
    "data",
    "rollouts",
)  # where an example is from: the data set, or the model's own answer to its prompt

# Of a token that is labelled: what the model thinks of it. Null where there is no label, and for
# the first token
STATISTICS = [
    pa.field("log_prob", pa.float32()),  # ln P(label), nats
    pa.field("entropy", pa.float32()),  # exact, nats
    pa.field("top_k_entropy", pa.float32()),  # of the K largest, renormalised; K is in run.json
    pa.field("sum_sq_probs", pa.float32()),
    pa.field("first_choice", pa.int32()),  # the most likely token's id
    pa.field("first_prob", pa.float32()),  # its probability
    pa.field(
        "rank", pa.int32()
    ),  # 1: the label is the first choice; 1 + the tokens that are more likely
]
KEYS = [
    pa.field("example", pa.int32(), nullable=False),  # index of a row of examples.parquet
    pa.field("position", pa.int32(), nullable=False),  # within the prepared example
]
TOKENS = pa.schema(
    [
        *KEYS,
        pa.field("token_id", pa.int32(), nullable=False),
        # Characters of the example's text up to this token's end: the text of token t is
        # text[end[t-1]:end[t]]. Of a character split over several tokens, all but the last have the
        # end of the character before it
        pa.field("end", pa.int32(), nullable=False),
        pa.field("labelled", pa.bool_(), nullable=False),
        *STATISTICS,
    ]
)
COMPARED = pa.schema([*KEYS, *STATISTICS])
EXAMPLES = pa.schema(
    [
        pa.field("example", pa.int32(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),  # DATA or ROLLOUTS
        pa.field(
            "source", pa.string(), nullable=False
        ),  # the row's `source` column, else the data set's name
        pa.field(
            "row", pa.int64(), nullable=False
        ),  # of the training split; a rollout has its prompt's
        pa.field("digest", pa.string(), nullable=False),  # of that row's content (`row_digest`)
        pa.field(
            "text", pa.string(), nullable=False
        ),  # as prepared: template and special tokens included
        pa.field(
            "messages", pa.string()
        ),  # the row as it was, as JSON; null where it was plain text or token ids
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("labelled", pa.int32(), nullable=False),
        pa.field("cut", pa.int32(), nullable=False),  # tokens lost to max_length
        pa.field("cut_labelled", pa.int32(), nullable=False),  # labelled ones among them
        # Means over the labelled tokens under the base model; null where none is labelled
        pa.field("nll", pa.float64()),
        pa.field("entropy", pa.float64()),
        pa.field("conflict_share", pa.float64()),  # of its tokens
        pa.field("conflict_nll_share", pa.float64()),  # of its nll; null where the nll is 0
    ]
)
VOCABULARY = pa.schema(
    [
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field(
            "text", pa.string(), nullable=False
        ),  # bytes that are no whole character are shown as <0xE2>
        pa.field("special", pa.bool_(), nullable=False),
    ]
)


@dataclass(frozen=True)
class ScoredModel:
    """A model that the tokens were scored with: an entry of `models` in run.json."""

    name: str  # BASE, or a name that is a folder of compared/
    model: str  # a Hub id or a folder
    step: int | None = None  # of the training run whose checkpoint it is


class ModelEntry(TypedDict):
    """`ScoredModel` as JSON."""

    name: str
    model: str
    step: NotRequired[int | None]


@with_config(ConfigDict(extra="allow"))
class InspectedRun(TypedDict):
    """The part of `run.json` that is read; a run that is not scored yet may lack the rest."""

    scored: bool
    models: Annotated[list[ModelEntry], Field(min_length=1)]
    top_k: int


class Inspection:
    """
    A folder that `eaft inspect` has written, to be read.

    Args:
        folder: with a `run.json` in it.

    Raises:
        ConfigurationError: it is not such a folder, or scoring has not finished.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / RUN_FILE).is_file():
            raise ConfigurationError(
                f"{str(folder)!r} is not a folder of `eaft inspect`: no {RUN_FILE}."
            )
        way = "give its `eaft inspect` command again, with another --output_dir."
        self.run: dict[str, Any] = read_json(self.folder / RUN_FILE, InspectedRun, way)
        if not self.run["scored"]:
            raise ConfigurationError(
                f"{str(folder)!r} is not finished: give its `eaft inspect` command again."
            )

    @property
    def top_k(self) -> int:
        """K of the top-K entropy."""
        return self.run["top_k"]

    @cached_property
    def models(self) -> list[ScoredModel]:
        """The models, the base first."""
        return [ScoredModel(**entry) for entry in self.run["models"]]

    def files(self, model: str = BASE) -> list[Path]:
        """
        Return the files of a model's tokens, in order; those of two models have the same rows.
        """
        folder = self.folder / "tokens" if model == BASE else self.folder / "compared" / model
        return sorted(folder.glob("*.parquet"))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What was found."""
        return json.loads((self.folder / SUMMARY_FILE).read_text())

    def examples(self, columns: list[str] | None = None) -> pa.Table:
        """Return `EXAMPLES`, or some of its columns."""
        return pq.read_table(self.folder / EXAMPLES_FILE, columns=columns)

    def vocabulary(self) -> dict[int, str]:
        """Return the text of every token id that occurs."""
        table = pq.read_table(self.folder / VOCABULARY_FILE, columns=["token_id", "text"])
        return dict(zip(table["token_id"].to_pylist(), table["text"].to_pylist(), strict=True))

    def batches(
        self, columns: list[str], model: str = BASE, rows: int = 1 << 20
    ) -> Iterator[pa.RecordBatch]:
        """Yield columns of a model's tokens, in order, at most so many rows at a time."""
        for file in self.files(model):
            yield from pq.ParquetFile(file).iter_batches(rows, columns=columns)

    def statistics(self, batch: pa.RecordBatch) -> TokenStatistics:
        """
        Return what `objective` computes with, of a batch with the columns `STATISTICS` and only
        labelled tokens.
        """

        def column(name: str) -> torch.Tensor:
            return torch.from_numpy(batch.column(name).to_numpy(zero_copy_only=False).copy())

        return TokenStatistics(
            log_prob=column("log_prob"),
            entropy=column("entropy"),
            top_k_entropy=column("top_k_entropy"),
            sum_sq_probs=column("sum_sq_probs"),
            is_top1=column("rank") == 1,
            top_k=self.top_k,
            first_prob=column("first_prob"),
            rank=column("rank"),
        )
