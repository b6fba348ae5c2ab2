"""
The folder that `eaft inspect` writes: which files it has, which columns, and what they mean.

| file | content |
|---|---|
| run.json | what was scored, by which models, with which flags: `run_file.InspectedRun` |
| tokens/*.parquet | a row for each token of every prepared example, in order: `TOKENS` |
| compared/NAME/*.parquet | the same rows of the same files through another model: `COMPARED` |
| examples.parquet | a row for each prepared example, in order: `EXAMPLES` |
| vocabulary.parquet | the text of every token id that occurs: `VOCABULARY` |
| summary.json | what the tables say: `summary.Summary` |
| report.html, figures/*.png | the same for people |

run.json is written first. A reader needs these files only: no model, no tokenizer, no data set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from eaft.errors import ConfigurationError
from eaft.files import read_json
from eaft.inspection.run_file import RUN_FILE, InspectedRun, ScoredModel, read_run
from eaft.inspection.summary import SUMMARY_FILE, Summary
from eaft.objective.statistics import TokenStatistics

REPORT_FILE = "report.html"
EXAMPLES_FILE, VOCABULARY_FILE = "examples.parquet", "vocabulary.parquet"
BASE = "base"  # the name of the base model, with which the other models are compared

# What a model says of a labelled token. Null if a token has no label, or is the first. A run of
# vLLM has no `WHOLE_VOCABULARY`: these columns are null
STATISTICS = [
    pa.field("log_prob", pa.float32()),  # ln P(label), nats
    pa.field("entropy", pa.float32()),  # exact, nats
    pa.field("top_k_entropy", pa.float32()),  # of the K largest, renormalised; K is in run.json
    pa.field("sum_sq_probs", pa.float32()),
    pa.field("first_choice", pa.int32()),  # the most likely token's id
    pa.field("first_prob", pa.float32()),  # its probability
    pa.field("rank", pa.int32()),  # 1 + the number of tokens that are likelier than the label
]
WHOLE_VOCABULARY = ("entropy", "sum_sq_probs")
KEYS = [
    pa.field("example", pa.int32(), nullable=False),  # index of a row of examples.parquet
    pa.field("position", pa.int32(), nullable=False),  # within the prepared example
]
TOKENS = pa.schema(
    [
        *KEYS,
        pa.field("token_id", pa.int32(), nullable=False),
        # Characters of the example's text up to this token's end: token t has the text
        # text[end[t-1]:end[t]]. If several tokens share a character, only the last one ends after
        # it; the others end before it
        pa.field("end", pa.int32(), nullable=False),
        pa.field("labelled", pa.bool_(), nullable=False),
        *STATISTICS,
    ]
)
COMPARED = pa.schema([*KEYS, *STATISTICS])
EXAMPLES = pa.schema(
    [
        pa.field("example", pa.int32(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),  # summary.DATA or summary.ROLLOUTS
        # The row's column `source`; the data set's name if there is no such column
        pa.field("source", pa.string(), nullable=False),
        # Of the training split; the row of a rollout is the row of its prompt
        pa.field("row", pa.int64(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),  # of that row's content (`row_digest`)
        # As prepared, with the template and special tokens
        pa.field("text", pa.string(), nullable=False),
        # The row as it was, as JSON; null if it was plain text or token ids
        pa.field("messages", pa.string()),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("labelled", pa.int32(), nullable=False),
        pa.field("cut", pa.int32(), nullable=False),  # tokens lost to max_length
        pa.field("cut_labelled", pa.int32(), nullable=False),  # labelled tokens among them
        # Means over the labelled tokens under the base model; null if no token is labelled
        pa.field("nll", pa.float64()),
        pa.field("entropy", pa.float64()),  # exact; in a run of vLLM the top-K entropy
        pa.field("conflict_share", pa.float64()),  # of its tokens
        pa.field("conflict_nll_share", pa.float64()),  # of its nll; null if the nll is 0
    ]
)
VOCABULARY = pa.schema(
    [
        pa.field("token_id", pa.int32(), nullable=False),
        # Bytes that are no whole character are shown as <0xE2>
        pa.field("text", pa.string(), nullable=False),
        pa.field("special", pa.bool_(), nullable=False),
    ]
)


def statistics_of(columns: Mapping[str, torch.Tensor], top_k: int) -> TokenStatistics:
    """
    Return the statistics that the columns `STATISTICS` hold, `[n]` each.

    Without `WHOLE_VOCABULARY` the entropy is the top-K entropy, and `sum_sq_probs` is NaN.
    """
    top_k_entropy = columns["top_k_entropy"]
    return TokenStatistics(
        log_prob=columns["log_prob"],
        entropy=columns.get("entropy", top_k_entropy),
        top_k_entropy=top_k_entropy,
        sum_sq_probs=columns.get("sum_sq_probs", torch.full_like(top_k_entropy, torch.nan)),
        is_top1=columns["rank"] == 1,
        top_k=top_k,
        first_choice=columns.get("first_choice"),
        first_prob=columns["first_prob"],
        rank=columns["rank"],
    )


class Inspection:
    """
    A folder that `eaft inspect` has written, to be read.

    Args:
        folder: it has a run.json.

    Raises:
        ConfigurationError: the folder is of another kind, or scoring has not finished.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / RUN_FILE).is_file():
            raise ConfigurationError(
                f"{str(folder)!r} is not a folder of `eaft inspect`: no {RUN_FILE}."
            )
        self.run: InspectedRun = read_run(
            self.folder, "give its `eaft inspect` command again, with another --output_dir."
        )
        if not self.run.scored:
            raise ConfigurationError(
                f"{str(folder)!r} is not finished: give its `eaft inspect` command again."
            )

    @property
    def top_k(self) -> int:
        """K of the top-K entropy."""
        return self.run.top_k

    @property
    def whole_vocabulary(self) -> bool:
        """Whether the columns `WHOLE_VOCABULARY` have values."""
        return self.run.whole_vocabulary

    @property
    def entropy_column(self) -> str:
        """The column that `statistics` takes the entropy from."""
        return "entropy" if self.whole_vocabulary else "top_k_entropy"

    @property
    def models(self) -> list[ScoredModel]:
        """The models, the base model first."""
        return self.run.models

    def files(self, model: str = BASE) -> list[Path]:
        """Return the files of a model's tokens, in order; all models' files have the same rows."""
        folder = self.folder / "tokens" if model == BASE else self.folder / "compared" / model
        return sorted(folder.glob("*.parquet"))

    @cached_property
    def summary(self) -> Summary:
        """
        The content of summary.json.

        Raises:
            ConfigurationError: the file is missing, truncated, not JSON, or of another form.
        """
        way = "give the `eaft inspect` command of its folder again."
        summary: Summary = read_json(self.folder / SUMMARY_FILE, Summary, way)
        return summary

    def examples(self, columns: list[str] | None = None) -> pa.Table:
        """Return `EXAMPLES`, or some of its columns."""
        return pq.read_table(self.folder / EXAMPLES_FILE, columns=columns)

    def batches(
        self, columns: list[str], model: str = BASE, rows: int = 1 << 20
    ) -> Iterator[pa.RecordBatch]:
        """Yield columns of a model's tokens, in order, at most `rows` rows at a time."""
        for file in self.files(model):
            yield from pq.ParquetFile(file).iter_batches(rows, columns=columns)

    def statistics(self, batch: pa.RecordBatch) -> TokenStatistics:
        """Return the statistics of a batch of labelled tokens with the columns `STATISTICS`."""

        def column(name: str) -> torch.Tensor:
            return torch.from_numpy(batch.column(name).to_numpy(zero_copy_only=False).copy())

        names = [field.name for field in STATISTICS if field.name != "first_choice"]
        if not self.whole_vocabulary:
            names = [name for name in names if name not in WHOLE_VOCABULARY]
        return statistics_of({name: column(name) for name in names}, self.top_k)
