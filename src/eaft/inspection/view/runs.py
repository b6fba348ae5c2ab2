"""
The folders of `eaft compare` and `eaft eval` that a folder holds, as the viewer's page draws them.

They are read as plain files: `results.json`, and beside it each run's `metrics.jsonl` and the items
of its tasks.

`list` has an entry for each: `name` (its path), `kind` ("compare", "eval", or "broken" for results
that cannot be read), `sentence` (what it found, or why it cannot be read), `model`, `base` (None:
none). `run` has of one of them, beside these:

    results      results.json, without its lists by item, prompt or held-out example
    points       one for each checkpoint that was measured, and the base model's before each run's
    first:
                 run, objective, seed, learning_rate, chosen (the run), step, epoch, nll,
                 drift_general, drift_target (nats per token), target, general (mean scores), tasks
                 {name: score}; null: not measured there
    curves       one for each run: run, objective, seed, learning_rate, chosen, and metrics {name:
    [[step, value]]} regressions  one for each objective and seed (`eval`: one): objective, seed,
    step, and items, the worst first, as
                 `worst` in the results of `eaft eval`: benchmark, task, doc_id, prompt, target,
                 before and after {response, score}
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from eaft.errors import EAFTError
from eaft.evaluation.pairs import worst_regressions
from eaft.evaluation.results import Item, Regression, as_json
from eaft.files import check

Answer = dict[str, Any]

RESULTS_FILE = "results.json"
MARKS = (
    "inputs.json",
    "compare.json",
)  # beside it, written first by `eaft eval` and `eaft compare`
DEPTH = 3  # folders down that are looked into
HELD = ("run", "objective", "seed", "learning_rate", "chosen")
# What tells our results from somebody else's, or from those of a version that wrote others
COMPARISON = {"asked", "recipe", "objectives", "sentence", "groups", "base", "runs", "choices"}
EVALUATION = {"asked", "model", "base", "tasks"}
BY_ITEM = ("sums", "scores", "per_prompt", "tokens_per_prompt")


class Runs:
    """
    What a folder holds of comparisons and evaluations.

    Args:
        folder: one of them, or a folder with some in it.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).resolve()
        self.found = {self.name_of(place): place for place in find(self.folder, DEPTH)}

    def name_of(self, place: Path) -> str:
        """Return a folder's path below ours; our own name if it is ours."""
        return (
            place.relative_to(self.folder).as_posix() if place != self.folder else self.folder.name
        )

    @property
    def names(self) -> list[str]:
        """The names that `run` takes."""
        return list(self.found)

    def list(self) -> list[Answer]:
        """Return an entry for each, as said above."""
        return [describe(name, place) for name, place in self.found.items()]

    def run(self, name: str) -> Answer:
        """Return one of them, as said above."""
        place = self.found[name]
        about = describe(name, place)
        if about["kind"] == "broken":
            return {**about, "results": {}, "points": [], "curves": [], "regressions": []}
        results = read_results(place)
        if about["kind"] == "eval":
            worst = [
                {"objective": None, "seed": None, "step": None, "items": results.get("worst", [])}
            ]
            return {
                **about,
                "results": trimmed(results),
                "points": [],
                "curves": [],
                "regressions": worst,
            }
        return {
            **about,
            "results": trimmed({name: value for name, value in results.items() if name != "runs"}),
            "points": [point for run in results["runs"] for point in points(run, results)],
            "curves": [curves(place, run) for run in results["runs"]],
            "regressions": [regressions(place, choice, results) for choice in results["choices"]],
        }


def find(folder: Path, depth: int) -> list[Path]:
    """
    Return the folders with results, in order; links are not followed, nor folders below one with
    results.

    Results that cannot be read count where a file beside them says that they are ours.
    """
    ours = (folder / RESULTS_FILE).is_file() and any((folder / name).is_file() for name in MARKS)
    if ours or read_results(folder):
        return [folder]
    if not depth:
        return []
    try:
        inner = sorted(Path(e.path) for e in os.scandir(folder) if e.is_dir(follow_symlinks=False))
    except OSError:
        return []
    return [place for below in inner for place in find(below, depth - 1)]


def read_results(folder: Path) -> Answer:
    """Return a folder's results; nothing if it has none of ours."""
    found = read_json(folder, RESULTS_FILE)
    names = found.keys() if isinstance(found, dict) else set()
    return found if names >= COMPARISON or names >= EVALUATION else {}


def read_json(folder: Path, name: str) -> Any:
    """
    Return what a file in a folder holds; None if it is not there, no JSON, or elsewhere when links
    are followed.
    """
    lines = read_lines(folder, name, whole=True)
    return lines[0] if lines else None


def read_lines(folder: Path, name: str, whole: bool = False) -> list[Any]:
    """Return what the lines of a file hold, or the file as one; nothing as in `read_json`."""
    file = folder / name
    try:
        if not file.resolve().is_relative_to(folder.resolve()):
            return []
        text = file.read_text()
    except (OSError, ValueError):
        return []
    found = []
    for part in [text] if whole else text.split("\n"):
        with contextlib.suppress(ValueError, RecursionError):  # a killed run leaves half a line
            found.append(json.loads(part))
    return found


def describe(name: str, place: Path) -> Answer:
    """Return what `list` says of a folder, also of results that cannot be read."""
    results = read_results(place)
    try:
        if results:
            return entry(name, results)
        reason = "it is truncated, or another version of eaft wrote it"
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"another version of eaft wrote it, perhaps: {type(error).__name__}, {error}"
    sentence = (
        f"{place / RESULTS_FILE} cannot be read ({reason}). Give the command that wrote it again."
    )
    return {"name": name, "kind": "broken", "sentence": sentence, "model": None, "base": None}


def entry(name: str, results: Answer) -> Answer:
    """Return what `list` says of one."""
    if "objectives" in results:
        base = results["recipe"]["train"].get("model_name_or_path")
        return {
            "name": name,
            "kind": "compare",
            "sentence": results["sentence"],
            "model": base,
            "base": base,
        }
    sentence = results["verdict"]["sentence"] if results.get("verdict") else None
    return {
        "name": name,
        "kind": "eval",
        "sentence": sentence,
        "model": results["model"],
        "base": results["base"],
    }


def trimmed(value: Any) -> Any:
    """Return results without their lists by item; None for what is no number in JSON."""
    if isinstance(value, dict):
        return {k: trimmed(v) for k, v in value.items() if k not in BY_ITEM}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [trimmed(v) for v in value] if isinstance(value, list) else value


def points(run: Answer, results: Answer) -> list[Answer]:
    """Return the base model's point and a run's."""
    held = {"run": run["folder"], **{name: run[name] for name in HELD[1:]}}
    found = []
    for point in [results["base"]["point"], *run["points"]]:
        tasks = {task: value["mean"] for task, value in point["tasks"].items()}
        means = {
            group: sum(tasks[name] for name in names) / len(names)
            if set(names) <= tasks.keys()
            else None
            for group, names in results["groups"].items()
        }
        drift = {
            f"drift_{kind}": point["drift"].get(kind, {}).get("mean")
            for kind in ("general", "target")
        }
        nll = None if point["nll"] is None else point["nll"]["mean"]
        found.append(
            {
                **held,
                "step": point["step"],
                "epoch": point["epoch"],
                "nll": nll,
                **drift,
                **means,
                "tasks": tasks,
            }
        )
    return found


def curves(place: Path, run: Answer) -> Answer:
    """Return what a run has logged, by metric."""
    metrics: dict[str, list[list[float]]] = {}
    for line in read_lines(place, f"{run['folder']}/metrics.jsonl"):
        for name, value in line.items():
            if isinstance(value, int | float) and math.isfinite(value) and name != "step":
                metrics.setdefault(name, []).append([line["step"], value])
    return {"run": run["folder"], **{name: run[name] for name in HELD[1:]}, "metrics": metrics}


def regressions(place: Path, choice: Answer, results: Answer) -> Answer:
    """Return the worst regressions of what an objective chose, from the items that were kept."""
    view = "chosen" if "chosen" in choice["steps"] else "last"
    step = choice["steps"][view]
    keys = ("objective", "seed", "learning_rate")
    run = next(
        (r["folder"] for r in results["runs"] if all(r[key] == choice[key] for key in keys)), None
    )
    base: dict[str, list[Item]] = {}
    tuned: dict[str, list[Item]] = {}
    for name in [name for names in results["groups"].values() for name in names] if run else []:
        file = f"{Path(name).stem}.jsonl"
        folders = "base/items", f"{run}/items/step-{step}"
        sides = [read_lines(place, f"{folder}/{file}") for folder in folders]
        if len(sides[0]) == len(sides[1]) > 0:
            with contextlib.suppress(EAFTError):  # another version's
                base[name], tuned[name] = (check(list[Item], side, file) for side in sides)
    worst: list[Regression] = []
    with contextlib.suppress(EAFTError):  # the items are of two evaluations
        worst = worst_regressions(base, tuned)
    items = as_json(worst)
    return {"objective": choice["objective"], "seed": choice["seed"], "step": step, "items": items}
