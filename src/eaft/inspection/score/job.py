"""What is scored and where its tables go, and how a shard of it is scored and written."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eaft.inspection.folder import BASE, COMPARED, EXAMPLES, TOKENS
from eaft.inspection.run_file import ScoredModel
from eaft.inspection.score.examples import Examples
from eaft.inspection.score.model import ScoringModel, Settings
from eaft.inspection.score.pieces import Pieces
from eaft.inspection.score.shards import ScoredShard, score_shard
from eaft.inspection.score.tables import (
    compared_table,
    example_table,
    token_table,
    write_parquet,
)
from eaft.inspection.score.vllm_model import VLLMModel

PARTS = "parts"  # the folder for files that are incomplete until the end


@dataclass
class Job:
    """The models, the examples that they score, and the folder for the tables."""

    folder: Path
    settings: Settings
    tokenizer: Any
    base: str
    others: list[ScoredModel]
    examples: Examples
    backend: str  # "hf" or "vllm"
    context: int  # the most tokens of an example
    ray_actors: int = 0  # 0: the processes of this command score
    of: int | None = None  # rows of the data; None if all are scored

    @property
    def parts(self) -> Path:
        """The folder for files that are incomplete until the end."""
        return self.folder / PARTS

    def file(self, model: str, shard: int) -> Path:
        """Return a shard's file of a model's tokens."""
        parent = self.folder / "tokens" if model == BASE else self.folder / "compared" / model
        return parent / f"{shard:05d}.parquet"


class LazyModel:
    """
    A model that is loaded when it is first needed.

    Args:
        job: says how it computes.
        model: a Hub id or a folder.
        is_base: whether it is the base model.
        backend: the job's if None.
    """

    def __init__(
        self, job: Job, model: str, is_base: bool = True, backend: str | None = None
    ) -> None:
        self.job, self.name, self.is_base = job, model, is_base
        self.backend = backend or job.backend
        self.model: ScoringModel | VLLMModel | None = None

    def get(self) -> ScoringModel | VLLMModel:
        """Return the model, and load it the first time."""
        if self.model is None:
            job = self.job
            if self.backend == "vllm":
                self.model = VLLMModel(
                    self.name, job.tokenizer, job.settings, job.context, self.is_base
                )
            else:
                self.model = ScoringModel(self.name, job.settings, self.is_base)
        return self.model

    def free(self) -> None:
        """Free the memory for the next model."""
        if isinstance(self.model, VLLMModel):
            self.model.free()
        self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def write_shard(
    job: Job,
    model: str,
    shard: int,
    part: range,
    scoring: LazyModel,
    pieces: Pieces,
    advance: Callable[[int], object],
) -> None:
    """
    Score a shard and write its tables.

    Args:
        job: the examples and the folder.
        model: the name of the model whose files are written.
        shard: its number.
        part: its examples.
        scoring: the model.
        pieces: the texts of its tokens.
        advance: called with the number of tokens of each batch.
    """
    scored = score_shard(scoring.get(), job.examples, part, advance)
    if model == BASE:
        write_base_shard(job, shard, part, scored, pieces)
    else:
        table = compared_table(part, scored.tokens, scored.statistics)
        write_parquet(table, COMPARED, job.file(model, shard))


def write_base_shard(
    job: Job, shard: int, part: range, scored: ScoredShard, pieces: Pieces
) -> None:
    """
    Write a shard's examples and tokens under the base model.

    The examples come first, so that a shard with tokens always has its examples.
    """
    tokens, statistics = scored.tokens, scored.statistics
    table, texts = token_table(part, tokens, statistics, pieces)
    about, top_k = job.examples.about(part), job.settings.args.gate_top_k
    examples = example_table(about, tokens, statistics, texts, top_k)
    write_parquet(examples, EXAMPLES, job.parts / f"{shard:05d}.parquet")
    write_parquet(table, TOKENS, job.file(BASE, shard))
