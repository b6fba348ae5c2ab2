"""
The results of `eaft compare`, `eaft eval` and `eaft tune` below a folder, as the page draws them.

They are read as plain files: results.json, and beside it each run's metrics.jsonl and, by `items`,
the items of its tasks.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eaft.evaluation.paired import few_items, few_prompts
from eaft.inspection.view.items import (
    ItemReader,
    Items,
    Place,
    drift_entry,
    entries_of,
    held_out_entry,
    numbered,
    worst_entry,
)

Json = dict[str, Any]  # an object of a JSON file

RESULTS_FILE = "results.json"
# Each command writes one of these files first, beside results.json
MARKS = ("inputs.json", "compare.json", "tune.json")
DEPTH = 3  # levels of folders below the folder that are searched
# Keys that tell our results from other files, and from results of a version with another form
COMPARISON = {"asked", "recipe", "objectives", "sentence", "groups", "base", "runs", "choices"}
EVALUATION = {"asked", "model", "base", "tasks"}
TUNING = {"sentence", "budget", "model", "candidates", "screened", "base_nll_screening"}
# Lists that the page does not need
BY_ITEM = (
    *("sums", "scores", "per_prompt", "tokens_per_prompt"),
    *("before_per_row", "after_per_row", "tokens_per_row"),
)


@dataclass(frozen=True)
class ResultsEntry:
    """A folder with results, in the list of all."""

    name: str  # its path below the viewer's folder
    kind: Literal["compare", "eval", "tune", "broken"]  # broken: the results cannot be read
    sentence: str | None  # the verdict, or why the results cannot be read
    model: str | None
    base: str | None


@dataclass(frozen=True)
class RunKey:
    """Which run of a comparison something belongs to."""

    run: str  # the run's folder
    objective: str
    seed: int
    learning_rate: float
    chosen: bool  # whether the comparison chose this learning rate


@dataclass(frozen=True)
class Point(RunKey):
    """A measured checkpoint of a run; None for what was not measured there."""

    step: int
    epoch: float | None
    nll: float | None  # held-out, nats
    drift_general: float | None  # nats per token
    drift_target: float | None
    target: float | None  # mean score of the target's tasks
    general: float | None  # mean score of the general tasks
    tasks: dict[str, float]  # score by task


@dataclass(frozen=True)
class Curve(RunKey):
    """What a run has logged: by metric, pairs of step and value."""

    metrics: dict[str, list[list[float]]]


@dataclass(frozen=True)
class Pairing:
    """Two models whose items can be listed: the base model, and a tuned one."""

    objective: str | None  # None: of `eaft eval` or `eaft tune`
    seed: int | None
    step: int | None


@dataclass(frozen=True)
class Results(ResultsEntry):
    """The results of a folder."""

    results: Json  # results.json without `BY_ITEM`, and for a comparison without `runs`
    points: list[Point]  # before each run's points comes the base model's
    curves: list[Curve]
    pairings: list[Pairing]  # of each objective and seed; of other commands, one
    warnings: list[str]  # where there are too few items or prompts


class Runs:
    """
    The comparisons and evaluations that a folder holds.

    Args:
        folder: a comparison or evaluation, or a folder that has some below it.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).resolve()
        self.places = {self.name_of(place): place for place in find(self.folder, DEPTH)}
        self.reader = ItemReader(read_text)

    def name_of(self, place: Path) -> str:
        """Return a folder's path below the viewer's folder; the folder's own name for itself."""
        if place == self.folder:
            return self.folder.name
        return place.relative_to(self.folder).as_posix()

    @property
    def names(self) -> list[str]:
        """The names that `run` takes."""
        return list(self.places)

    def entries(self) -> list[ResultsEntry]:
        """Return an entry for each folder with results."""
        return [describe(name, place) for name, place in self.places.items()]

    def run(self, name: str) -> Results:
        """Return the results of a folder by its name."""
        place = self.places[name]
        entry = describe(name, place)
        if entry.kind == "broken":
            return Results(
                **vars(entry), results={}, points=[], curves=[], pairings=[], warnings=[]
            )
        results = read_results(place)
        if entry.kind != "compare":
            return Results(
                **vars(entry),
                results=trimmed(results),
                points=[],
                curves=[],
                pairings=[Pairing(None, None, None)],
                warnings=too_few(results) if entry.kind == "eval" else [],
            )
        runs = results["runs"]
        all_points: list[Point] = []
        for run in runs:
            all_points += points(run, results)
        return Results(
            **vars(entry),
            results=trimmed({name: value for name, value in results.items() if name != "runs"}),
            points=all_points,
            curves=[curve(place, run) for run in runs],
            pairings=[
                Pairing(choice["objective"], choice["seed"], chosen_step(choice))
                for choice in results["choices"]
            ],
            warnings=[],
        )

    def items(self, name: str, pairing: int) -> Items:
        """
        Return the items of a folder by its name.

        Args:
            pairing: which of `Results.pairings`.

        Raises:
            IndexError: there are fewer pairings.
        """
        place = self.places[name]
        results, kind = read_results(place), describe(name, place).kind
        if kind == "broken" or pairing >= (len(results["choices"]) if kind == "compare" else 1):
            raise IndexError(pairing)
        if kind == "tune":
            entries = entries_of(results.get("answers"), held_out_entry)
            entries += entries_of(results.get("most_drifted"), drift_entry)
            return Items(numbered(entries), [])
        if kind == "compare":
            choice = results["choices"][pairing]
            after = f"{chosen_folder(choice, results)}/items/step-{chosen_step(choice)}"
            tasks = tuple(task for names in results["groups"].values() for task in names)
            return self.reader(Place(place, "base/items", after, tasks))
        tasks = tuple(results["tasks"])
        alone = results["base"] is None
        items = self.reader(
            Place(place, None, "items", tasks)
            if alone
            else Place(place, "items_before", "items_after", tasks)
        )
        held_out = results.get("held_out") or {}
        entries, notes = entries_of(held_out.get("answers"), held_out_entry), items.notes
        worst = entries_of(results.get("worst"), worst_entry)
        if worst and not items.listed("all"):
            entries += worst
            notes = [
                f"No items are in the folder: these are the {len(worst)} worst of results.json."
            ]
        return Items(numbered([*items.entries, *entries]), notes)


def too_few(results: Json) -> list[str]:
    """Return where an evaluation has too few items or prompts, as its report says it."""
    tasks, drift = results["tasks"], results.get("drift") or {}
    sizes = {name: task["n"] for name, task in tasks.items() if results["base"] and "n" in task}
    warnings = [few_items(sizes)]
    if "per_prompt" in drift:
        warnings.append(few_prompts(len(drift["per_prompt"])))
    if results.get("held_out"):
        warnings.append(few_prompts(results["held_out"]["rows"], "rows"))
    return [warning for warning in warnings if warning]


def find(folder: Path, depth: int) -> list[Path]:
    """
    Return the folders with results, in order.

    It follows no links, and does not search below a folder with results. A folder whose results
    cannot be read counts if one of `MARKS` is beside them.

    Args:
        folder: where to search.
        depth: levels of folders below it that are searched.
    """
    marked = any((folder / name).is_file() for name in MARKS)
    if ((folder / RESULTS_FILE).is_file() and marked) or read_results(folder):
        return [folder]
    if not depth:
        return []
    try:
        inner = sorted(Path(e.path) for e in os.scandir(folder) if e.is_dir(follow_symlinks=False))
    except OSError:
        return []
    places = []
    for below in inner:
        places += find(below, depth - 1)
    return places


def read_results(folder: Path) -> Json:
    """Return a folder's results; empty if it has none of ours."""
    results = read_json(folder, RESULTS_FILE)
    names = results.keys() if isinstance(results, dict) else set()
    ours = any(names >= keys for keys in (COMPARISON, EVALUATION, TUNING))
    return results if ours else {}  # type: ignore[return-value]


def read_json(folder: Path, name: str) -> object:
    """
    Return the content of a JSON file in a folder.

    It is None if there is no such file, if it is not JSON, or if it is a link out of the folder.
    """
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(read_text(folder, name))
    return None


def read_lines(folder: Path, name: str) -> list[Any]:
    """
    Return the lines of a JSON Lines file in a folder, without lines that are not JSON.

    A killed run may leave half a line. Missing files and links are as in `read_json`.
    """
    lines = []
    for line in read_text(folder, name).split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return lines


def read_text(folder: Path, name: str) -> str:
    """Return the text of a file in a folder; empty if it cannot be read or lies elsewhere."""
    file = folder / name
    try:
        return file.read_text() if file.resolve().is_relative_to(folder.resolve()) else ""
    except (OSError, ValueError):
        return ""


def describe(name: str, place: Path) -> ResultsEntry:
    """Return the entry of a folder, also if its results cannot be read."""
    results = read_results(place)
    try:
        if results:
            return entry_of(name, results)
        reason = "it is truncated, or another version of eaft wrote it"
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"another version of eaft wrote it, perhaps: {type(error).__name__}, {error}"
    sentence = (
        f"{place / RESULTS_FILE} cannot be read ({reason}). Give the command that wrote it again."
    )
    return ResultsEntry(name, "broken", sentence, model=None, base=None)


def entry_of(name: str, results: Json) -> ResultsEntry:
    """Return the entry of results that can be read."""
    if "objectives" in results:
        base = results["recipe"]["train"].get("model_name_or_path")
        return ResultsEntry(name, "compare", results["sentence"], model=base, base=base)
    if "screened" in results:
        return ResultsEntry(name, "tune", results["sentence"], model=name, base=results["model"])
    sentence = results["verdict"]["sentence"] if results.get("verdict") else None
    return ResultsEntry(name, "eval", sentence, results["model"], results["base"])


def trimmed(value: Any) -> Any:
    """Return a JSON value without the lists `BY_ITEM`; NaN and infinity become None."""
    if isinstance(value, dict):
        return {k: trimmed(v) for k, v in value.items() if k not in BY_ITEM}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [trimmed(v) for v in value] if isinstance(value, list) else value


def key_of(run: Json) -> RunKey:
    """Return which run something belongs to."""
    return RunKey(
        run=run["folder"],
        objective=run["objective"],
        seed=run["seed"],
        learning_rate=run["learning_rate"],
        chosen=run["chosen"],
    )


def points(run: Json, results: Json) -> list[Point]:
    """Return the base model's point and the points of a run."""
    key, groups = key_of(run), results["groups"]
    return [point_of(key, point, groups) for point in [results["base"]["point"], *run["points"]]]


def point_of(key: RunKey, point: Json, groups: dict[str, list[str]]) -> Point:
    """
    Return a measured checkpoint.

    Args:
        key: of its run.
        point: as results.json has it.
        groups: the tasks of the groups `target` and `general`.
    """
    tasks = {task: score["mean"] for task, score in point["tasks"].items()}
    drift = point["drift"]
    return Point(
        **vars(key),
        step=point["step"],
        epoch=point["epoch"],
        nll=None if point["nll"] is None else point["nll"]["mean"],
        drift_general=drift.get("general", {}).get("mean"),
        drift_target=drift.get("target", {}).get("mean"),
        target=mean_score(tasks, groups.get("target")),
        general=mean_score(tasks, groups.get("general")),
        tasks=tasks,
    )


def mean_score(tasks: dict[str, float], names: list[str] | None) -> float | None:
    """Return the mean score of some tasks; None if one of them was not measured."""
    if not names or not set(names) <= tasks.keys():
        return None
    return sum(tasks[name] for name in names) / len(names)


def curve(place: Path, run: Json) -> Curve:
    """Return what a run has logged."""
    metrics: dict[str, list[list[float]]] = {}
    for line in read_lines(place, f"{run['folder']}/metrics.jsonl"):
        for name, value in line.items():
            if isinstance(value, int | float) and math.isfinite(value) and name != "step":
                metrics.setdefault(name, []).append([line["step"], value])
    return Curve(**vars(key_of(run)), metrics=metrics)


def chosen_step(choice: Json) -> int:
    """Return the step of the checkpoint that an objective chose."""
    steps = choice["steps"]
    return int(steps["chosen" if "chosen" in steps else "last"])


def chosen_folder(choice: Json, results: Json) -> str | None:
    """Return the folder of the run that an objective chose."""
    keys = ("objective", "seed", "learning_rate")
    for run in results["runs"]:
        if all(run[key] == choice[key] for key in keys):
            return str(run["folder"])
    return None
