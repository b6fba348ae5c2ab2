"""What the page is built from: models, sources, sliders, the run and its summary."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

import numpy as np

from eaft.inspection.labelled import what_is_absent
from eaft.inspection.run_file import InspectedRun, ScoredModel
from eaft.inspection.score.stopping import scored_rows
from eaft.inspection.summary import ByOrigin, Counts, Summary
from eaft.inspection.view.queries.database import Database
from eaft.inspection.view.sliders import GateControls

MOST_SOURCES = 100  # to choose from; a column `source` may hold an address in every example
# Flags of `eaft train` that say what becomes of a row
DATA_FLAGS = (
    *("max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss"),
    *("dataset_text_field", "dataset_kwargs", "chat_template_path"),
)


@dataclass(frozen=True)
class About:
    """What the page is built from."""

    models: list[ScoredModel]
    origins: list[str]
    sources: list[str]  # the largest, to choose from
    counts: ByOrigin[Counts] | None  # of the summary
    top_k: int
    entropy_max: float  # nats, under any of the models
    entropy_name: str  # "entropy", or "top-20 entropy" in a run of vLLM
    scored_rows: str | None  # how many, and why no more; None if all were
    absent: str | None  # what a run of vLLM does not show; None for another run
    summary: Summary | None  # None if summary.json does not exist or cannot be read
    gates: list[GateControls]
    run: InspectedRun
    train: str  # the command line that trains on the exported examples


class AboutQueries:
    """The part of `/api/folder` that an inspection answers."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def about(self) -> About:
        """Return what the page is built from."""
        inspection, tables = self.database.inspection, self.database.tables
        summary = self.database.summary
        return About(
            models=inspection.models,
            origins=tables.origins,
            sources=self.largest_sources(),
            counts=None if summary is None else summary.counts,
            top_k=inspection.top_k,
            entropy_max=tables.entropy_max,
            entropy_name=inspection.run.entropy_name,
            scored_rows=scored_rows(inspection.run.sample),
            absent=what_is_absent(inspection.run),
            summary=summary,
            gates=self.database.gate_controls,
            run=inspection.run,
            train=train_command(inspection.run),
        )

    def largest_sources(self) -> list[str]:
        """Return the sources with most examples, at most `MOST_SOURCES`, in their own order."""
        tables = self.database.tables
        examples = np.bincount(tables.source_codes, minlength=len(tables.sources))
        largest = np.argsort(-examples, kind="stable")[:MOST_SOURCES]
        return [tables.sources[i] for i in np.sort(largest)]


def train_command(run: InspectedRun) -> str:
    """
    Return the command line that trains on the inspected data without the exported examples.

    Its parts are quoted for a shell.
    """
    flags = {"model_name_or_path": run.model, "dataset_name": run.dataset}
    flags |= {name: run.config.get(name) for name in DATA_FLAGS}
    flags["exclude_examples"] = "examples.jsonl"
    parts = ["eaft", "train"]
    for name, value in flags.items():
        if value is not None:
            parts += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(parts)
