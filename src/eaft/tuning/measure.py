"""Measure members of the family: one model in memory, each member once, kept in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from eaft.evaluation.drift import BaseAnswers, Share
from eaft.evaluation.identity import digest
from eaft.evaluation.lm_eval_models import load
from eaft.evaluation.measured_model import MeasuredModel, likeliest_answers, nll_of_rows
from eaft.evaluation.model_settings import generation_config
from eaft.evaluation.paired import paired_change
from eaft.evaluation.results import Change, Item
from eaft.evaluation.scores import score
from eaft.evaluation.suite import Benchmark
from eaft.files import read_jsonl
from eaft.training.apart import Checkpoint
from eaft.training.family import Family
from eaft.training.held_out import Row
from eaft.tuning.points import Member, Point, Sums


@dataclass(frozen=True)
class Part:
    """
    Data to measure on: of screening, or of confirmation.

    Attributes:
        rows: held-out rows, as training prepares them, each with a label.
        answers: the base model's own, for drift.
        base_nll: the base model's nll of the rows.
    """

    rows: list[Row]
    answers: BaseAnswers
    base_nll: Sums

    @classmethod
    def of(
        cls,
        base: MeasuredModel,
        rows: list[Row],
        prompts: list[Any],
        advance: Callable[[int], object] | None = None,
    ) -> Part:
        """
        Measure the base model on rows and prompts; what is in the store is read from there.

        Args:
            advance: as `sample_answers` takes it.
        """
        return cls(rows, base.answers(prompts, advance), Sums(*base.nll(rows)))

    @property
    def digest(self) -> str:
        """A digest of what is measured on."""
        return digest([self.rows, self.answers.digest])


class LoadedFamily:
    """
    The family of a run, loaded when something has to be measured.

    Args:
        base: the base model, which is freed before.
        checkpoints: of the run.
        options: of the base model, as `from_pretrained` takes them.
    """

    def __init__(
        self, base: MeasuredModel, checkpoints: list[Checkpoint], options: dict[str, Any]
    ) -> None:
        self.base, self.options = base, options
        self.folders = {checkpoint.step: checkpoint.folder for checkpoint in checkpoints}
        self.family: Family | None = None
        self.lm: Any = None

    def model(self, member: Member) -> Any:
        """Return the torch model with a member's weights, and the tokens that end its answers."""
        folder = self.folders[member.step]
        if self.family is None:
            self.base.free()
            adapter = (folder / "adapter_config.json").is_file()
            name = str(folder) if adapter else self.base.model
            self.lm = load(name, self.base.tokenizer, self.base.protocol)
            self.family = Family(self.lm.model.eval(), self.base.model, self.options)
        self.family.put(folder, member.share)
        source = str(folder) if member.share else self.base.model
        ends = generation_config(source, self.base.protocol.model_args).eos_token_id
        self.lm.model.generation_config.eos_token_id = ends  # --eos_token may have added one
        return self.family.model

    def measure(self, part: Part, member: Member) -> Point:
        """Return a member's nll and drift on a part of the data."""
        model = self.model(member)
        nll = nll_of_rows(model, part.rows, Share())
        return Point(member, Sums(*nll), Sums(*part.answers.drift(model)))

    def scores(self, benchmark: Benchmark, member: Member) -> list[Item]:
        """Return a member's items of a task."""
        self.model(member)
        return score(self.lm, benchmark, self.base.protocol)

    def likeliest(
        self,
        member: Member,
        prompts: list[list[int]],
        max_new_tokens: int,
        advance: Callable[[int], object],
    ) -> list[str]:
        """Return a member's likeliest answers to prompts, as `likeliest_answers` does."""
        model, size = self.model(member), self.base.protocol.answer_batch
        return likeliest_answers(
            model, self.base.tokenizer, prompts, max_new_tokens, size, Share(), advance
        )


class KeptPoint(TypedDict):
    """A line of the file."""

    part: str
    step: int
    share: float
    nll: list[float]
    drift: list[float]


class KeptScores(TypedDict):
    """A line of the file of tasks' scores."""

    step: int
    share: float
    task: str
    scores: list[float]


def whole_lines(file: Path, kind: Any) -> list[Any]:
    """Return the lines of a JSON Lines file, without a last one that was cut by a kill."""
    if not file.is_file():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        staging = file.with_suffix(".tmp")
        staging.write_text(whole)
        os.replace(staging, file)
    return read_jsonl(file, kind, f"delete {file}, and it is measured again.")


def append(file: Path, line: dict[str, Any]) -> None:
    """Add a line to a JSON Lines file."""
    with file.open("a") as opened:
        opened.write(json.dumps(line) + "\n")


class TaskChanges:
    """
    Changes of the tasks' scores from the base model to members, kept in a JSON Lines file.

    The base model's items are in the store of `eaft eval`.
    """

    def __init__(
        self,
        file: Path,
        benchmarks: dict[str, Benchmark],
        base: MeasuredModel,
        family: LoadedFamily,
    ) -> None:
        self.file, self.benchmarks, self.family = file, benchmarks, family
        self.base = {
            name: np.array([item.score for item in base.items(benchmark)])
            for name, benchmark in benchmarks.items()
        }
        self.scores = {
            (Member(line["step"], line["share"]), line["task"]): line["scores"]
            for line in whole_lines(file, KeptScores)
        }

    def __call__(self, member: Member) -> dict[str, Change]:
        """Return the change of each task, measured now if it is not in the file."""
        for name, benchmark in self.benchmarks.items():
            if (member, name) not in self.scores:
                scores = [item.score for item in self.family.scores(benchmark, member)]
                append(self.file, {**asdict(member), "task": name, "scores": scores})
                self.scores[member, name] = scores
        return {
            name: paired_change(base, np.array(self.scores[member, name]))
            for name, base in self.base.items()
        }


class Kept:
    """
    A part's measurements in a JSON Lines file: each is made once, also if the command is killed.

    Lines of other data (`Part.digest`) are left in the file, and not used.
    """

    def __init__(self, file: Path, part: Part, family: LoadedFamily) -> None:
        self.file, self.part, self.family = file, part, family
        self.rows = part.base_nll.counts
        self.prompts = np.array([len(answer.answer_ids) for answer in part.answers.answers])
        self.points: dict[Member, Point] = {}
        self.digest = part.digest
        for line in whole_lines(file, KeptPoint):
            if line["part"] == self.digest:
                member = Member(line["step"], line["share"])
                self.points[member] = Point(
                    member,
                    Sums(np.array(line["nll"]), self.rows),
                    Sums(np.array(line["drift"]), self.prompts),
                )

    def __call__(self, member: Member) -> Point:
        """Return a member's point, measured now if it is not in the file."""
        if member not in self.points:
            point = self.family.measure(self.part, member)
            line = {"part": self.digest, **asdict(member)}
            line |= {"nll": point.nll.sums.tolist(), "drift": point.drift.sums.tolist()}
            append(self.file, line)
            self.points[member] = point
        return self.points[member]
