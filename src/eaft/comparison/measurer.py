"""
Measures the base model and every checkpoint of every run: drift and held-out nll of all, tasks of
some.

Measurements are kept in the store of `eaft.evaluation`, under a digest of the weights and of
everything else that they depend on. The numbers of a deleted checkpoint are in its run's
`points.json`, with a digest of what they were measured with. If that has changed, an error says
that the run must be trained again.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from filelock import FileLock
from typing_extensions import TypedDict

from eaft.comparison.recipe import EvaluateConfig, Run
from eaft.comparison.runs import delete_models
from eaft.errors import ConfigurationError, EAFTError
from eaft.evaluation.comparable import check_measurable, comparable_models
from eaft.evaluation.drift import Share
from eaft.evaluation.identity import digest, tokenizer_digest
from eaft.evaluation.launch import processes, shared
from eaft.evaluation.measured_model import MeasuredModel, nll_of_rows, read_items
from eaft.evaluation.pairs import pair
from eaft.evaluation.protocol import Protocol
from eaft.evaluation.results import Item
from eaft.evaluation.suite import Benchmark
from eaft.evaluation.task_items import run_tasks
from eaft.files import read_json
from eaft.provenance import write_json
from eaft.training.apart import Checkpoint, checkpoints
from eaft.training.family import Family
from eaft.training.held_out import Row, check_number

POINTS_FILE = "points.json"
ITEMS = "items"
BASE_LOCK = "_base_lock"


@dataclass
class Between:
    """
    What was measured of base + share * (checkpoint - base); as in `Point`.
    """

    share: float
    drift: dict[str, np.ndarray]
    nll: np.ndarray


@dataclass
class Point:
    """
    The measurements of one model.

    Attributes:
        step, epoch: of its run; 0 is the base model.
        drift: by kind of prompts, each prompt's summed KL (nats).
        nll: each held-out example's summed nll (nats); empty without held-out rows.
        items: of the tasks that were run on it.
        between: interpolations between it and the base model, by rising share.
    """

    step: int
    epoch: float
    drift: dict[str, np.ndarray]
    nll: np.ndarray
    items: dict[str, list[Item]] = field(default_factory=dict)
    between: list[Between] = field(default_factory=list)

    def scores(self, task: str) -> np.ndarray:
        """Return a task's scores, item by item."""
        return np.array([item.score for item in self.items[task]])


class RecordedBetween(TypedDict):
    """An interpolation as `points.json` has it."""

    share: float
    drift: dict[str, list[float]]
    nll: list[float]


class RecordedPoint(TypedDict):
    """A point as `points.json` has it."""

    epoch: float
    deleted: bool
    inputs: str | None
    drift: dict[str, list[float]]
    nll: list[float]
    between: NotRequired[list[RecordedBetween]]


class Measurer:
    """
    Measures a comparison's models. On processes other than the first, points hold no numbers.

    Attributes:
        base: the base model's point, after `begin`.
        rows: the held-out rows, as training prepares them.
        prompt_tokens: by kind, of each of its answers; `held_out_tokens`, the labelled ones of each
            held-out row.
        benchmarks: the benchmarks that did not fail on the base model; `failed` has the others,
            with the reason.
        protocol: how all are asked, complete; after `begin`.
        kept: by model, what was read from the store instead of measured.
    """

    base: Point
    protocol: Protocol
    prompt_tokens: dict[str, np.ndarray]
    held_out_tokens: np.ndarray

    def __init__(
        self,
        config: EvaluateConfig,
        base: str,
        benchmarks: dict[str, Benchmark],
        folder: Path,
        rows: list[Row],
    ) -> None:
        self.config, self.base_path, self.benchmarks, self.folder = config, base, benchmarks, folder
        self.rows = rows
        self.failed: dict[str, str] = {}
        self.kept: dict[str, list[str]] = {}
        self.inputs: str | None = None

    def begin(self, first: Run) -> None:
        """
        Measure the base model, if that is still to be done. If it has no chat template, it takes
        the template of the first run.

        One job measures; the others wait, and read the store.
        """
        if self.inputs is not None:
            return
        with (
            FileLock(self.folder / BASE_LOCK)
            if processes().is_main_process
            else contextlib.nullcontext()
        ):
            self.measure_base(first)

    def measure_base(self, first: Run) -> None:
        """Measure the base model; see `begin`."""
        _, model = comparable_models(
            str(first.folder), self.base_path, self.config.protocol, drift=True
        )
        assert model is not None
        self.answers = {
            kind: model.answers(prompts) for kind, prompts in self.config.prompts.items()
        }
        self.prompt_tokens = {
            kind: np.array([len(answer.answer_ids) for answer in a.answers])
            for kind, a in self.answers.items()
        }
        nll, self.held_out_tokens = (
            model.nll(self.rows) if self.rows else (np.array([]), np.array([]))
        )
        measured = run_tasks(model, self.benchmarks, self.folder / "base" / ITEMS)
        model.free()
        self.protocol, self.kept["base"] = model.protocol, model.kept
        self.failed = shared(lambda: measured.failed)
        self.benchmarks = {
            name: b for name, b in self.benchmarks.items() if name not in self.failed
        }
        nothing = {kind: np.zeros(len(tokens)) for kind, tokens in self.prompt_tokens.items()}
        self.base = Point(0, 0.0, nothing, nll, measured.items)
        answered = {kind: a.digest for kind, a in self.answers.items()}
        self.inputs = digest(
            [answered, self.rows, tokenizer_digest(model.tokenizer), asdict(model.protocol)]
        )

    def points(self, run: Run) -> list[Point]:
        """
        Return a finished run's points, with drift, nll and the tasks that every checkpoint is
        asked.

        Raises:
            EAFTError: a checkpoint cannot be measured.
        """
        record = shared(lambda: self.record(run))
        points = {}
        there = {checkpoint.step: checkpoint for checkpoint in checkpoints(run.folder)}
        for step in sorted({*there, *map(int, record)}):
            kept = record.get(str(step))
            if kept is not None and kept["deleted"]:
                points[step] = self.recorded(run, step, kept)
            else:
                points[step] = self.point(run, there[step])
        return list(points.values())

    def point(self, run: Run, checkpoint: Checkpoint) -> Point:
        """Measure a checkpoint that still exists."""
        model = self.model(checkpoint.folder)
        drift = {kind: model.drift(answers)[0] for kind, answers in self.answers.items()}
        nll = model.nll(self.rows)[0] if self.rows else np.array([])
        point = Point(checkpoint.step, checkpoint.epoch, drift, nll)
        self.run_tasks(run, point, model, self.config.every_checkpoint_tasks)
        point.between = self.interpolated(run, checkpoint, model)
        model.free()
        self.kept[f"{run.name}, step {point.step}"] = model.kept
        if processes().is_main_process:
            record = self.record(run)
            record[str(point.step)] = {
                "epoch": point.epoch,
                "deleted": False,
                "inputs": self.inputs,
                "drift": {kind: sums.tolist() for kind, sums in drift.items()},
                "nll": nll.tolist(),
                "between": [recorded_between(between) for between in point.between],
            }
            write_json(run.folder / POINTS_FILE, record)
        return point

    def interpolated(self, run: Run, checkpoint: Checkpoint, model: MeasuredModel) -> list[Between]:
        """
        Measure the interpolations of a checkpoint that are not in the run's record yet.

        Args:
            model: the checkpoint, whose weights are replaced; it is to be freed afterwards.
        """
        kept = shared(lambda: self.record(run).get(str(checkpoint.step)))
        known = self.known_between(kept) if kept and kept["inputs"] == self.inputs else {}
        found, family = [], None
        share = Share(processes().process_index, processes().num_processes)
        for part in sorted(set(self.config.interpolations)):
            if part not in known:
                family = family or Family(model.loaded(), self.base_path, self.options)
                family.put(checkpoint.folder, part)
                torch_model = family.model
                drift = {k: a.drift(torch_model, share)[0] for k, a in self.answers.items()}
                known[part] = Between(part, drift, nll_of_rows(torch_model, self.rows, share)[0])
            found.append(known[part])
        return found

    @property
    def options(self) -> dict[str, Any]:
        """The models' arguments that identify the base model."""
        given = self.config.protocol.model_args
        return {k: given[k] for k in ("revision", "trust_remote_code") if k in given}

    @staticmethod
    def known_between(kept: RecordedPoint) -> dict[float, Between]:
        """Return a record's interpolations by their share."""
        return {
            one["share"]: Between(
                one["share"],
                {kind: np.array(sums) for kind, sums in one["drift"].items()},
                np.array(one["nll"]),
            )
            for one in kept.get("between", [])
        }

    def all_tasks(self, run: Run, point: Point) -> None:
        """
        Run the tasks that are still to be run on a point.

        Raises:
            EAFTError: its checkpoint has been deleted, or a task fails.
        """
        due = [name for name in self.benchmarks if name not in shared(lambda: list(point.items))]
        if not due:
            return
        kept = shared(lambda: self.record(run).get(str(point.step)))
        if kept is not None and kept["deleted"]:
            raise EAFTError(deleted(run, point.step, f"{', '.join(due)} cannot be run on it"))
        checkpoint = next(c for c in checkpoints(run.folder) if c.step == point.step)
        model = self.model(checkpoint.folder)
        self.run_tasks(run, point, model, due)
        model.free()
        self.kept[f"{run.name}, step {point.step}"] += model.kept

    def run_tasks(self, run: Run, point: Point, model: MeasuredModel, names: list[str]) -> None:
        """Run tasks on a loaded point; see `all_tasks`."""
        wanted = {name: self.benchmarks[name] for name in names if name in self.benchmarks}
        measured = run_tasks(model, wanted, run.folder / ITEMS / f"step-{point.step}")
        for name, message in shared(lambda: measured.failed).items():
            raise EAFTError(f"{run.name}: {name} failed after step {point.step}: {message}")
        self.take(point, measured.items)

    def take(self, point: Point, items: dict[str, list[Item]]) -> None:
        """
        Add items to a point, after checking that the base model was asked the same.

        Raises:
            ConfigurationError: it was not; on all processes.
        """

        def check() -> str | None:
            try:
                for name, answered in items.items():
                    pair(name, self.base.items[name], answered)
            except ConfigurationError as error:
                return str(error)
            return None

        if (message := shared(check)) is not None:
            raise ConfigurationError(message)
        point.items.update(items)

    def delete(self, run: Run, keep: set[int]) -> None:
        """Delete a run's models except after the steps in `keep`; all numbers stay."""
        if processes().is_main_process:
            record = self.record(run)
            for step in {int(step) for step in record} - keep:
                record[str(step)]["deleted"] = True
            # Written first, so that an interrupted deletion is continued
            write_json(run.folder / POINTS_FILE, record)
            delete_models(run, keep)
        processes().wait_for_everyone()

    def recorded(self, run: Run, step: int, kept: RecordedPoint) -> Point:
        """
        Return the point of a checkpoint that has been deleted.

        Raises:
            EAFTError: the recipe or the software has changed, so it must be measured again.
        """
        if kept["inputs"] != self.inputs:
            raise EAFTError(deleted(run, step, "what it was measured with has changed"))
        drift = {kind: np.array(sums) for kind, sums in kept["drift"].items()}
        point = Point(step, kept["epoch"], drift, np.array(kept["nll"]))
        known = self.known_between(kept)
        if missing_shares := set(self.config.interpolations) - known.keys():
            shares = ", ".join(f"{share:g}" for share in sorted(missing_shares))
            raise EAFTError(deleted(run, step, f"interpolations ({shares}) cannot be measured"))
        point.between = [known[share] for share in sorted(set(self.config.interpolations))]
        files = {
            name: run.folder / ITEMS / f"step-{step}" / f"{Path(name).stem}.jsonl"
            for name in self.benchmarks
        }
        there = shared(lambda: [name for name, file in files.items() if file.is_file()])
        if missing := [
            n for n in self.config.every_checkpoint_tasks if n in self.benchmarks and n not in there
        ]:
            raise EAFTError(deleted(run, step, f"{', '.join(missing)} cannot be run on it"))
        main = processes().is_main_process
        self.take(point, {name: read_items(files[name]) if main else [] for name in there})
        return point

    def model(self, folder: Path) -> MeasuredModel:
        """Return a checkpoint as a model that is asked as the base model is."""
        return comparable_models(str(folder), self.base_path, self.config.protocol, drift=True)[0]

    def record(self, run: Run) -> dict[str, RecordedPoint]:
        """Return what `points.json` holds."""
        file = run.folder / POINTS_FILE
        way = "delete this run's folder, and it is trained again."
        return read_json(file, dict[str, RecordedPoint], way) if file.is_file() else {}


def recorded_between(between: Between) -> RecordedBetween:
    """Return an interpolation as `points.json` has it."""
    drift = {kind: sums.tolist() for kind, sums in between.drift.items()}
    return {"share": between.share, "drift": drift, "nll": between.nll.tolist()}


def deleted(run: Run, step: int, what: str) -> str:
    """Return the message for a checkpoint that is needed and was deleted."""
    return (
        f"{run.name}: the checkpoint of step {step} was deleted (keep_checkpoints: chosen), and"
        f" {what}: delete the folder, and it is trained again."
    )


def check_before_training(
    config: EvaluateConfig, base: str, benchmarks: dict[str, Benchmark]
) -> None:
    """
    Check that the models can be asked everything in the recipe, before runs are trained.

    Raises:
        ConfigurationError: prompts or tasks that do not fit the model, or no room for drift's
            files.
    """
    model, _ = comparable_models(base, None, config.protocol, drift=True)
    check_measurable(
        [model], benchmarks, [prompt for prompts in config.prompts.values() for prompt in prompts]
    )
    for kind, prompts in config.prompts.items():
        check_number(f"evaluate.{kind}_prompts", len(prompts))
