"""Logs of other tools in one form: the rows of a task, with the answers and scores of a model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eaft.errors import ConfigurationError
from eaft.evaluation.results import LogRun, Part

Json = dict[str, Any]  # an object of a JSON file

Tool = Literal["lm-eval", "inspect_ai"]


@dataclass
class Answered:
    """
    One row of a task, with every answer that a model gave to it.

    Attributes:
        doc_id: the row's number in the task's data.
        row: a digest of the row's content.
        asked: digests of all that the model was asked with, one for each answer, sorted.
        prompt: what it was asked, as text.
        target: the right answer.
        responses: one for each answer.
        scores: by metric and filter (`acc,none`), one for each answer; None is no number in [0, 1].
        generation: the settings of generation.
        hashes: lm-eval's `prompt_hash`, `target_hash` and `doc_hash`.
        choices: the log-likelihood of each choice (nats), where there are any.
        cut: the parts that were cut, as far as the log says.
        problem: why the row has no score; None: it has.
    """

    doc_id: int
    row: str
    asked: list[str]
    prompt: str
    target: Any
    responses: list[Any]
    scores: dict[str, list[float | None]]
    generation: Json
    hashes: dict[str, str]
    choices: list[float] | None = None
    cut: list[Part] = field(default_factory=list)
    problem: str | None = None


@dataclass
class LoggedTask:
    """
    One task of a log.

    Attributes:
        version: the task's.
        num_fewshot: examples before each item; None: the log does not say.
        metrics: metric and filter (`acc,none`) in the task's order, where higher is better.
        means: the tool's own mean score by metric, where it is a plain mean over rows.
        grading: the settings that decide how answers are made and graded.
        items: the rows.
        counts_cuts: whether the log says which answers were cut.
    """

    version: Any
    num_fewshot: int | None
    metrics: list[str]
    means: dict[str, float]
    grading: Json
    items: list[Answered]
    counts_cuts: bool


@dataclass
class Log:
    """
    One model's log.

    Attributes:
        tool: the tool that wrote it.
        run: the model, and how it ran.
        tasks: by name.
        groups: the tasks of each group that has a score of its own, the outermost groups only.
    """

    tool: Tool
    run: LogRun
    tasks: dict[str, LoggedTask]
    groups: dict[str, list[str]]

    @classmethod
    def of_runs(
        cls,
        tool: Tool,
        path: str,
        runs: list[LogRun],
        tasks: dict[str, LoggedTask],
        groups: dict[str, list[str]],
    ) -> Log:
        """
        Return the log of one run or several.

        Raises:
            ConfigurationError: they are of several models.
        """
        if len(models := sorted({run.model for run in runs})) > 1:
            raise ConfigurationError(
                f"--from: {path} holds logs of {len(models)} models ({', '.join(models[:3])}): name"
                " one model's folder."
            )
        return cls(tool, runs[-1], tasks, groups)


def check_new(path: str, file: Path, names: Iterable[str], tasks: dict[str, LoggedTask]) -> None:
    """
    Check that no task is in two runs.

    Raises:
        ConfigurationError: one is.
    """
    for name in names:
        if name in tasks:
            raise ConfigurationError(
                f"--from: {path} holds task {name} twice: name one run's file, as {file}."
            )


def unit(value: Any) -> float | None:
    """Return a number in [0, 1] as it is, and anything else as None."""
    if not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
        return None
    return float(value)


def digest(value: Any) -> str:
    """Return the SHA-256 of a text, or of a value as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
