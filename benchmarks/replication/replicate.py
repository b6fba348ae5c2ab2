"""
Every objective on one data set, over epochs and learning rates: what it learned, what it forgot, how far it drifted.

    make demo                                                        # once: installs, and finds the model
    python benchmarks/replication/replicate.py benchmarks/replication/gsm8k.yaml MODEL --data_dir ../shared/data

from the repository's root. For each objective and seed: trains with every learning rate, takes held-out nll and drift
after each epoch the recipe names, and runs the recipe's tasks on two checkpoints of the learning rate whose best epoch
has the lowest held-out nll: that epoch's and the last. Every method is so read at its own best, by one rule, on data
that is neither trained on nor scored. Stopped and started again it goes on. Writes results/NAME.json (all numbers, also
those of single items), .md and .png.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from tabulate import tabulate
from tqdm import tqdm

from eaft.drift import PROMPTS, Answer, BaseAnswers, answer_log_probs, read_prompts
from eaft.paired import bootstrap_interval, paired_change
from eaft.provenance import environment, write_json
from eaft.report import colors, save
from eaft.scores import load_model, load_tokenizer, score, wrap
from eaft.suite import load_suites
from eaft.train import RUN_FILE

RESULTS = Path(__file__).parent / "results"
DRIFT_TOKENS = 64  # of each of 32 answers

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is run, and on what."""

    recipe_file: Path
    model: str
    data_dir: Path
    learning_rates: tuple[float, ...]
    use_cpu: bool

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe."""
        return yaml.safe_load(self.recipe_file.read_text())

    @property
    def folder(self) -> Path:
        """Where runs are."""
        return Path("runs/replication") / self.recipe_file.stem

    def run_folder(self, objective: str, learning_rate: float, seed: int) -> Path:
        """Where one run is."""
        return self.folder / f"{objective}-lr{learning_rate:g}-seed{seed}"


def main() -> None:
    """Train, measure, and write what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("model", help="a folder or Hub id: the base model")
    parser.add_argument("--data_dir", type=Path, default=Path("."), help="holds what data the repository does not")
    parser.add_argument("--objectives", nargs="*", help="only these; none: write what has been measured")
    parser.add_argument("--learning_rates", nargs="+", type=float, help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument("--jobs", type=int, default=1, help="objectives under way at once, sharing the cores")
    parser.add_argument("--use_cpu", action="store_true")
    flags = parser.parse_args()
    recipe = yaml.safe_load(flags.recipe.read_text())
    learning_rates = tuple(flags.learning_rates or recipe["learning_rates"])
    settings = Settings(flags.recipe, flags.model, flags.data_dir, learning_rates, flags.use_cpu)
    objectives = recipe["objectives"] if flags.objectives is None else flags.objectives
    studies = [(settings, name, seed) for seed in flags.seeds or recipe["seeds"] for name in objectives]
    write_data(settings)
    Measure(settings).base()
    workers = ProcessPoolExecutor(
        flags.jobs, multiprocessing.get_context("spawn"), share_cores, ((os.cpu_count() or 1) // flags.jobs,)
    )
    with workers:
        for _ in tqdm(workers.map(study, studies), "Objectives", len(studies)):
            report(settings)
    report(settings)
    print((RESULTS / f"{flags.recipe.stem}.md").read_text())


def share_cores(threads: int) -> None:
    """Let this worker, and what it starts, compute with so many threads: more than there are cores slow each other."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def write_data(settings: Settings) -> None:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl` as prompt and completion: rows that are short enough."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    data = settings.recipe["data"]
    for split in ("train", "validation", "test"):
        part, file = data[split], Path(data[split]["file"])
        text = (file if file.is_file() else settings.data_dir / file).read_text()
        rows = [json.loads(line) for line in text.split("\n") if line]
        if "prompt" in data:
            rows = [
                {
                    "prompt": [{"role": "user", "content": row[data["prompt"]]}],
                    "completion": [{"role": "assistant", "content": row[data["completion"]]}],
                }
                for row in rows
            ]
        limit, skip = part.get("max_chars", float("inf")), part.get("skip", 0)
        kept = [r for r in rows if len(r["prompt"][0]["content"]) + len(r["completion"][0]["content"]) <= limit]
        lines = [json.dumps(row) + "\n" for row in kept[skip : skip + part["rows"]]]
        (settings.folder / f"{split}.jsonl").write_text("".join(lines))


def study(task: tuple[Settings, str, int]) -> None:
    """Train one objective with one seed at every learning rate, and measure it; what has been done is not repeated."""
    settings, objective, seed = task
    measure, tasks = worker_measure(settings), settings.recipe["tasks"]
    every_epoch = [name for name in tasks if tasks[name].get("every_epoch")]
    for learning_rate in settings.learning_rates:
        run = settings.run_folder(objective, learning_rate, seed)
        if (run / "measured.json").is_file():
            continue
        train(settings, objective, learning_rate, seed)
        points = []
        for epoch, path in checkpoints(run).items():
            if epoch in settings.recipe["epochs"]:
                point = {"epoch": epoch, **measure.held_out(load_model(str(path)))}
                points.append({**point, "items": measure.tasks(str(path), every_epoch)})
        about = {"objective": objective, "learning_rate": learning_rate, "seed": seed, "environment": environment()}
        about["trained"] = json.loads((run / RUN_FILE).read_text())["result"]
        keep = {best(points)["epoch"], points[-1]["epoch"]}
        for epoch, path in checkpoints(run).items():
            if epoch not in keep:
                shutil.rmtree(path)
        write_json(run / "measured.json", {**about, "points": points})

    runs = [run for run in read_runs(settings) if (run["objective"], run["seed"]) == (objective, seed)]
    chosen = min(runs, key=lambda run: best(run["points"])["nll"])
    run = settings.run_folder(objective, chosen["learning_rate"], seed)
    for point in (best(chosen["points"]), chosen["points"][-1]):
        if due := [name for name in tasks if name not in point["items"]]:
            point["items"].update(measure.tasks(str(checkpoints(run)[point["epoch"]]), due))
    write_json(run / "measured.json", chosen)
    for other in runs:
        run = settings.run_folder(objective, other["learning_rate"], seed)
        for path in [*run.glob("checkpoint-*"), *run.glob("model*.safetensors")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def train(settings: Settings, objective: str, learning_rate: float, seed: int) -> None:
    """Run `eaft train`, unless it is done."""
    recipe, run = settings.recipe, settings.run_folder(objective, learning_rate, seed)
    if (run / RUN_FILE).is_file() and json.loads((run / RUN_FILE).read_text())["finished"]:
        return
    shutil.rmtree(run, ignore_errors=True)
    config = {**recipe["train"], **recipe["objectives"][objective], "learning_rate": learning_rate, "seed": seed}
    config.update(
        model_name_or_path=settings.model,
        dataset_name=str(settings.folder / "train.jsonl"),
        num_train_epochs=max(recipe["epochs"]),
        output_dir=str(run),
        use_cpu=settings.use_cpu,
        disable_tqdm=True,
    )
    file = run.parent / f"{run.name}.yaml"  # not with_suffix: a learning rate has a dot
    file.write_text(yaml.safe_dump(config))
    subprocess.run([sys.executable, "-m", "eaft", "train", "--config", str(file)], check=True)


def checkpoints(run: Path) -> dict[int, Path]:
    """Return a run's checkpoints by epoch."""
    found = {}
    for path in run.glob("checkpoint-*"):
        found[round(json.loads((path / "trainer_state.json").read_text())["epoch"])] = path
    return {epoch: found[epoch] for epoch in sorted(found)}


def best(points: list[Numbers]) -> Numbers:
    """Return the epoch with the lowest held-out nll."""
    return min(points, key=lambda p: p["nll"])


@functools.cache
def worker_measure(settings: Settings) -> Measure:
    """Return this worker's `Measure`, made once."""
    return Measure(settings)


class Measure:
    """Measures checkpoints. The base model's part is made once and kept in the recipe's folder."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = load_tokenizer(settings.model)
        self.answers = BaseAnswers(settings.folder / "base")
        self.validation = []
        for line in (settings.folder / "validation.jsonl").read_text().splitlines():
            row = json.loads(line)
            prompt = self.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            whole = self.tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
            self.validation.append(Answer(prompt, whole[len(prompt) :]))

    def base(self) -> None:
        """Measure the base model, unless it has been."""
        file = self.settings.folder / "base.json"
        if file.is_file() and self.answers.recorded:
            return
        model, tasks = load_model(self.settings.model), self.settings.recipe["tasks"]
        self.answers.record(model, self.tokenizer, read_prompts(str(PROMPTS), 32), DRIFT_TOKENS, 16)
        write_json(file, {"epoch": 0, **self.held_out(model), "items": self.tasks(self.settings.model, list(tasks))})

    @torch.no_grad()
    def held_out(self, model: Any) -> Numbers:
        """Return `nll` of the validation answers and `drift` (nats per token), with 95% interval and by prompt."""
        nll = [
            -answer_log_probs(model, answer).gather(1, torch.tensor(answer.answer_ids)[:, None].to(model.device))
            for answer in self.validation
        ]
        drift = self.answers.drift(model)
        return {
            "nll": torch.cat(nll).mean().item(),
            "drift": drift["mean"],
            "drift_95": [drift["low"], drift["high"]],
            "drift_per_prompt": drift["per_prompt"],
        }

    def tasks(self, model: str, names: list[str]) -> dict[str, list[float]]:
        """Return the named tasks' scores, item by item, of a model in bfloat16."""
        found: dict[str, list[float]] = {}
        if not names:
            return found
        lm = wrap(load_model(model, "bfloat16"), self.tokenizer, 1)
        for name in names:
            task = self.settings.recipe["tasks"][name]
            benchmarks = load_suites([task["task"]], data_dir=str(self.settings.data_dir), limit=task.get("limit"))[1]
            lm.batch_size_per_gpu = task["batch_size"]
            items = score(lm, benchmarks, apply_chat_template=True, gen_kwargs=task.get("gen_kwargs"))
            found[name] = [item["score"] for item in items[task["task"]]]
        return found


def read_runs(settings: Settings) -> list[Numbers]:
    """Return what has been measured, in the recipe's order."""
    runs = [json.loads(file.read_text()) for file in settings.folder.glob("*/measured.json")]
    order = list(settings.recipe["objectives"])
    return sorted(runs, key=lambda run: (run["seed"], order.index(run["objective"]), run["learning_rate"]))


def report(settings: Settings) -> None:
    """Write the results of all runs measured so far as JSON, Markdown and a picture."""
    runs = read_runs(settings)
    base = json.loads((settings.folder / "base.json").read_text())
    file = RESULTS / f"{settings.recipe_file.stem}.json"
    RESULTS.mkdir(exist_ok=True)
    write_json(file, {"recipe": settings.recipe, "base": base, "runs": runs})
    file.with_suffix(".md").write_text(tables(runs, base))
    draw(runs, base, file.with_suffix(".png"))


def tables(runs: list[Numbers], base: Numbers) -> str:
    """Return all measurements, and each objective beside the base model and beside SFT, as Markdown."""
    tasks, epochs = list(base["items"]), sorted({p["epoch"] for run in runs for p in run["points"]})
    key, scored = ["objective", "seed", "lr"], fully_scored(runs, base)
    scores = [*key, "epochs", "held-out nll", "drift", *(f"{task} % ({len(base['items'][task])})" for task in tasks)]
    sections = {
        "At the best epoch": (
            scores,
            [["base", "", "", 0, *numbers(base, base)]]
            + [[*about(run), best(run["points"])["epoch"], *numbers(best(run["points"]), base)] for run in scored],
        ),
        "After the last epoch": (
            scores,
            [[*about(run), run["points"][-1]["epoch"], *numbers(run["points"][-1], base)] for run in scored],
        ),
        "Beside SFT at matched target": (
            ["objective", "seed", "matched on", "both reach", "drift", "SFT's drift", "difference"],
            [row for by in ("nll", "target") for row, _ in matched(runs, base, by).values()],
        ),
        "Drift less SFT's, at equal settings": (
            [*key, *(f"epoch {epoch}" for epoch in epochs)],
            [
                [
                    *about(run),
                    *(difference(drift(p) - drift(q)) for p, q in zip(run["points"], sft["points"], strict=True)),
                ]
                for run in runs
                for sft in runs
                if run["objective"] != "sft" == sft["objective"] and about(run)[1:] == about(sft)[1:]
            ],
        ),
        "Every measurement: held-out nll, drift": (
            [*key, *(f"epoch {epoch}" for epoch in epochs)],
            [["base", "", "", f"0: {base['nll']:.3f}, 0"]]
            + [[*about(run), *(f"{p['nll']:.3f}, {p['drift']:.4f}" for p in run["points"])] for run in runs],
        ),
    }
    return (
        "In brackets 95% intervals, over items or prompts. Each objective at the learning rate whose best epoch has "
        "the lowest held-out nll. Tasks: score, and change from the base model in points.\n\n"
    ) + "\n".join(
        f"## {title}\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n"
        for title, (headers, rows) in sections.items()
    )


def about(run: Numbers) -> list[Any]:
    """Return what tells runs apart."""
    return [run["objective"], run["seed"], f"{run['learning_rate']:g}"]


def drift(point: Numbers) -> np.ndarray:
    """Return a measurement's drift, prompt by prompt."""
    return np.array(point["drift_per_prompt"])


def numbers(p: Numbers, base: Numbers) -> list[str]:
    """Return a measurement's cells; tasks that were not run stay empty."""
    low, high = p["drift_95"]
    cells = [f"{p['nll']:.3f}", f"{p['drift']:.4f} ({low:.4f} to {high:.4f})"]
    for task, scores in base["items"].items():
        if task not in p.get("items", {}):
            cells.append("")
        elif p is base:
            cells.append(f"{100 * np.mean(scores):.1f}")
        else:
            c = paired_change(np.array(scores), np.array(p["items"][task]))
            cells.append(f"{100 * c.after:.1f}, {100 * c.change:+.1f} ({100 * c.low:+.1f} to {100 * c.high:+.1f})")
    return cells


def fully_scored(runs: list[Numbers], base: Numbers) -> list[Numbers]:
    """Return the runs, one for each objective and seed, on whose last checkpoint all tasks were run."""
    return [run for run in runs if run["points"][-1]["items"].keys() == base["items"].keys()]


def shortfall(point: Numbers, by: str) -> float:
    """Return what training lowers: the held-out nll, or by how much the target task's score falls short of 1."""
    return point["nll"] if by == "nll" else 1 - float(np.mean(point["items"][by]))


def matched(runs: list[Numbers], base: Numbers, by: str) -> dict[tuple[str, int], tuple[list[Any], np.ndarray]]:
    """
    Return each objective beside SFT where both have learned as much: a table's row, and the paired differences of
    their drift by prompt.

    Learned by the held-out nll, or by the `target` task's score where that was taken at every epoch. Both sides are
    read at the best value that both reach, each at the learning rate that reaches it with the least drift,
    interpolated between epochs.
    """
    groups: dict[tuple[str, int], list[list[Numbers]]] = defaultdict(list)
    for run in runs:
        if by == "nll" or all(by in p["items"] for p in run["points"]):
            groups[run["objective"], run["seed"]].append([base, *run["points"]])
    found = {}
    for (objective, seed), curves in groups.items():
        if objective == "sft" or ("sft", seed) not in groups:
            continue
        sft = groups["sft", seed]
        level = max(min(shortfall(p, by) for points in side for p in points) for side in (curves, sft))
        ours, theirs = drift_at(level, curves, by), drift_at(level, sft, by)
        where = ["held-out nll", f"{level:.3f}"] if by == "nll" else ["target score", f"{100 * (1 - level):.1f}%"]
        cells = [*where, f"{ours.mean():.4f}", f"{theirs.mean():.4f}", difference(ours - theirs)]
        found[objective, seed] = ([objective, seed, *cells], ours - theirs)
    return found


def drift_at(level: float, curves: list[list[Numbers]], by: str) -> np.ndarray:
    """Return the least drift, prompt by prompt, with which one of the curves first gets down to a shortfall."""
    reached = []
    for points in curves:
        if shortfall(points[0], by) <= level:
            reached.append(drift(points[0]))
            continue
        for p, q in pairwise(points):
            if shortfall(q, by) <= level:
                share = (shortfall(p, by) - level) / (shortfall(p, by) - shortfall(q, by))
                reached.append((1 - share) * drift(p) + share * drift(q))
                break
    return min(reached, key=np.mean)


def difference(values: np.ndarray) -> str:
    """Return the mean of paired differences, with its interval."""
    low, high = bootstrap_interval(values)
    return f"{values.mean():+.4f} ({low:+.4f} to {high:+.4f})"


def draw(runs: list[Numbers], base: Numbers, path: Path) -> None:
    """Draw held-out nll against drift, drift beside SFT's at matched target, and what the tasks gained and lost."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    names = list(dict.fromkeys(run["objective"] for run in runs))
    palette = colors(names)
    scored = fully_scored(runs, base)
    for run in scored:
        points = [base, *run["points"]]
        first = run is next(r for r in scored if r["objective"] == run["objective"])
        axes[0].plot(
            [p["drift"] for p in points],
            [p["nll"] for p in points],
            marker=".",
            color=palette[run["objective"]],
            label=run["objective"] if first else None,
        )
    axes[0].set(xlabel="drift, KL(base ‖ tuned), nats per token", ylabel="nll of held-out answers (nats)")
    axes[0].set_title("Epoch by epoch, at the best learning rate", fontsize=10)
    axes[0].legend(fontsize=8)
    by = "target" if matched(runs, base, "target") else "nll"
    rows = [(f"{name}, seed {seed}", values) for (name, seed), (_, values) in matched(runs, base, by).items()][::-1]
    bars(axes[1], [(name, values.mean(), *bootstrap_interval(values)) for name, values in rows])
    what = {"target": "highest target score", "nll": "lowest held-out nll"}[by]
    axes[1].set(xlabel="drift less SFT's, nats per token", title=f"At the {what} that both reach")
    target, general = list(base["items"])[:2]
    for task, shift in ((target, 0.15), (general, -0.15)):
        changes = []
        for run in scored[::-1]:
            c = paired_change(np.array(base["items"][task]), np.array(run["points"][-1]["items"][task]))
            changes.append((f"{run['objective']}, seed {run['seed']}", 100 * c.change, 100 * c.low, 100 * c.high))
        bars(axes[2], changes, shift, task)
    axes[2].set(xlabel="change from the base model, points", title="After the last epoch")
    axes[2].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.title.set_fontsize(10)
    save(figure, path)


def bars(axis: Any, rows: list[tuple[str, float, float, float]], shift: float = 0, label: str | None = None) -> None:
    """Draw values with their intervals, one below the other, beside zero."""
    values, low, high = (np.array([row[i] for row in rows]) for i in (1, 2, 3))
    places = np.arange(len(rows)) + shift
    axis.errorbar(values, places, xerr=[values - low, high - values], fmt="o", capsize=3, label=label)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [row[0] for row in rows])


if __name__ == "__main__":
    main()
