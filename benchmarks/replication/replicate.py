"""
Every objective on one data set, over epochs and learning rates: what it learned, what it forgot, how far it drifted.

    make demo                                                        # once: finds the model, writes its folder
    python benchmarks/replication/replicate.py benchmarks/replication/gsm8k.yaml MODEL --data_dir ../shared/data

from the repository's root. Trains the runs of the recipe one after the other, measures the checkpoints of the epochs it
names, and deletes them; writes results/NAME.json, .md and .png. Stopped and started again it goes on; with --shard
0/2 and 1/2, two processes share the work, and a last call without draws. All numbers are kept, also those of single
items.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from matplotlib.lines import Line2D
from tabulate import tabulate
from tqdm import tqdm

from eaft.compare import mean_and_std
from eaft.drift import PROMPTS, Answer, BaseAnswers, answer_log_probs, read_prompts
from eaft.paired import mean_interval, paired_change
from eaft.provenance import environment, write_json
from eaft.report import cell, colors, save
from eaft.scores import load_model, load_tokenizer, score, wrap
from eaft.suite import load_suites
from eaft.train import RUN_FILE

RESULTS = Path(__file__).parent / "results"
DRIFT_TOKENS = 64  # of each of 32 answers
NLL_ROWS = 32  # held-out answers whose nll is taken


def main() -> None:
    """Train, measure, and write what there is so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("model", help="a folder or Hub id: the base model")
    parser.add_argument("--data_dir", type=Path, default=Path("."), help="holds what data the repository does not")
    parser.add_argument("--objectives", nargs="+", help="only these")
    parser.add_argument("--learning_rates", nargs="+", type=float, help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument(
        "--epochs", nargs="+", type=int, help="measured ones; a run ends with the last (default: recipe)"
    )
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="do every N-th run, from the I-th on")
    parser.add_argument("--train_only", action="store_true", help="leave the checkpoints for a later call to measure")
    flags = parser.parse_args()
    recipe = yaml.safe_load(flags.recipe.read_text())
    epochs = flags.epochs or recipe["epochs"]
    folder = Path("runs/replication") / flags.recipe.stem
    runs = [
        (objective, learning_rate, seed)
        for seed in flags.seeds or recipe["seeds"]
        for learning_rate in flags.learning_rates or recipe["learning_rates"]
        for objective in flags.objectives or recipe["objectives"]
    ]
    write_data(recipe["data"], flags.data_dir, folder)
    shard, shards = map(int, flags.shard.split("/"))
    measure = None if flags.train_only else Measure(flags.model, recipe, folder, shard, flags.data_dir)
    for objective, learning_rate, seed in tqdm(runs[shard::shards], "Runs"):
        run = folder / f"{objective}-lr{learning_rate:g}-seed{seed}"
        if (run / "measured.json").is_file():
            continue
        settings = {**recipe["train"], **recipe["objectives"][objective], "learning_rate": learning_rate, "seed": seed}
        settings |= {"model_name_or_path": flags.model, "use_cpu": flags.use_cpu, "num_train_epochs": max(epochs)}
        train(run, settings, folder, epochs)
        if measure is not None:
            points = [{"epoch": epoch, **measure(path, epoch)} for epoch, path in checkpoints(run, epochs).items()]
            about = {"objective": objective, "learning_rate": learning_rate, "seed": seed}
            write_json(run / "measured.json", {**about, "environment": environment(), "points": points})
            for path in [*run.glob("checkpoint-*"), run / "model.safetensors"]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if measure is not None and shards == 1:
        report(flags.recipe.stem, recipe, folder)


def write_data(data: dict[str, Any], data_dir: Path, folder: Path) -> None:
    """Write `train.jsonl` and `test.jsonl` as prompt and completion: the first rows that are short enough."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        file = Path(data[split]["file"])
        text = (file if file.is_file() else data_dir / file).read_text()
        rows = [json.loads(line) for line in text.split("\n") if line]
        if "prompt" in data:
            rows = [
                {
                    "prompt": [{"role": "user", "content": row[data["prompt"]]}],
                    "completion": [{"role": "assistant", "content": row[data["completion"]]}],
                }
                for row in rows
            ]
        limit = data[split].get("max_chars", float("inf"))
        kept = [r for r in rows if len(r["prompt"][0]["content"]) + len(r["completion"][0]["content"]) <= limit]
        text = "".join(json.dumps(row) + "\n" for row in kept[: data[split]["rows"]])
        (folder / f"{split}.jsonl").write_text(text)


def train(run: Path, settings: dict[str, Any], folder: Path, epochs: list[int]) -> None:
    """Run `eaft train`, unless it is done, and keep the checkpoints of `epochs`."""
    if not (run / RUN_FILE).is_file() or not json.loads((run / RUN_FILE).read_text())["finished"]:
        shutil.rmtree(run, ignore_errors=True)
        config = run.parent / f"{run.name}.yaml"
        settings = {**settings, "dataset_name": str(folder / "train.jsonl"), "output_dir": str(run)}
        config.write_text(yaml.safe_dump({**settings, "disable_tqdm": True}))
        subprocess.run([sys.executable, "-m", "eaft", "train", "--config", str(config)], check=True)
    for epoch, path in checkpoints(run).items():
        if epoch not in epochs and path.is_dir():
            shutil.rmtree(path)


def checkpoints(run: Path, epochs: list[int] | None = None) -> dict[int, Path]:
    """Return a run's checkpoints by epoch."""
    found = {}
    for path in run.glob("checkpoint-*"):
        state = json.loads((path / "trainer_state.json").read_text())
        found[round(state["epoch"])] = path
    return {epoch: found[epoch] for epoch in sorted(found) if epochs is None or epoch in epochs}


class Measure:
    """
    What a checkpoint has learned and lost. The base model's part is made once.

    Returns, when called, `drift` (nats per token, with 95% interval and each prompt's own), `target_nll` (nats per
    token of held-out answers) and `items`: each task's scores, in order. A general task may be due at some epochs only.
    """

    def __init__(self, model: str, recipe: dict[str, Any], folder: Path, shard: int, data_dir: Path) -> None:
        self.tokenizer = load_tokenizer(model)
        self.tasks = {recipe["target_task"]: {}, **recipe["general_tasks"]}
        self.benchmarks = {
            name: load_suites([name], data_dir=str(data_dir), limit=settings.get("limit"))[1]
            for name, settings in self.tasks.items()
        }
        self.answers = BaseAnswers(folder / f"base-{shard}")
        base = load_model(model)
        self.answers.record(base, self.tokenizer, read_prompts(str(PROMPTS), 32), DRIFT_TOKENS, 16)
        rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()][:NLL_ROWS]
        self.held_out = []
        for row in rows:
            prompt = self.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            whole = self.tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
            self.held_out.append(Answer(prompt, whole[len(prompt) :]))
        if not (folder / "base.json").is_file():
            write_json(folder / "base.json", self.measure(base, list(self.tasks)))

    def __call__(self, checkpoint: Path, epoch: int) -> dict[str, Any]:
        """Measure a checkpoint."""
        due = [name for name, settings in self.tasks.items() if epoch in settings.get("epochs", [epoch])]
        return self.measure(load_model(str(checkpoint)), due)

    @torch.no_grad()
    def measure(self, model: Any, tasks: list[str]) -> dict[str, Any]:
        """Measure a model, on `tasks`."""
        items = {}
        for name in tasks:
            settings = self.tasks[name]
            lm = wrap(model, self.tokenizer, settings.get("batch_size", 48))
            found = score(lm, self.benchmarks[name], apply_chat_template=True, gen_kwargs=settings.get("gen_kwargs"))
            items[name] = [item["score"] for item in found[name]]
        nll = [
            -answer_log_probs(model, answer).gather(1, torch.tensor(answer.answer_ids)[:, None].to(model.device))
            for answer in self.held_out
        ]
        drift = self.answers.drift(model)
        return {
            "target_nll": torch.cat(nll).mean().item(),
            "drift": drift["mean"],
            "drift_95": [drift["low"], drift["high"]],
            "drift_per_prompt": drift["per_prompt"],
            "items": items,
        }


def report(name: str, recipe: dict[str, Any], folder: Path) -> None:
    """Write the results of all runs measured so far as JSON, Markdown and a picture."""
    runs = [json.loads(file.read_text()) for file in folder.glob("*/measured.json")]
    base = json.loads((folder / "base.json").read_text())
    order = list(recipe["objectives"])
    runs.sort(key=lambda run: (order.index(run["objective"]), run["learning_rate"], run["seed"]))
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", {"recipe": recipe, "base": base, "runs": runs})
    (RESULTS / f"{name}.md").write_text(tables(runs, base))
    draw(runs, base, RESULTS / f"{name}.png")
    print((RESULTS / f"{name}.md").read_text())


def tables(runs: list[dict[str, Any]], base: dict[str, Any]) -> str:
    """Return all measurements, and each run beside SFT: at matched target, and at equal settings, as Markdown."""
    key = ["objective", "lr", "seed"]
    tasks = ["target", *list(base["items"])[1:]]
    pairs = [(run, sft) for run in runs for sft in runs if run["objective"] != "sft" and twins(run, sft)]
    sections = {
        "Every measurement": (
            [*key, "epochs", *(f"{task} %" for task in tasks), "target nll", "drift"],
            [["base", "", "", 0, *numbers(base, base)]]
            + [[*about(run), p["epoch"], *numbers(p, base)] for run in runs for p in run["points"]],
        ),
        "Beside SFT at matched target": (
            [*key, "best epoch", "target nll", "drift", "SFT's drift there", "difference"],
            [matched(run, sft, base) for run, sft in pairs],
        ),
        "Less SFT at equal settings": (
            [*key, "epochs", *(f"{task}, points" for task in tasks), "target nll", "drift"],
            [row for run, sft in pairs for row in equal(run, sft, base)],
        ),
        "Over seeds": ([key[0], key[1], "epochs", "seeds", "target nll", "drift"], over_seeds(runs)),
    }
    return "95% intervals over items or prompts in brackets.\n\n" + "\n".join(
        f"## {title}\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n"
        for title, (headers, rows) in sections.items()
    )


def about(run: dict[str, Any]) -> list[Any]:
    """Return what tells runs apart."""
    return [run["objective"], f"{run['learning_rate']:g}", run["seed"]]


def numbers(p: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """Return a measurement's cells; a task that was not due is left empty."""
    scores = [p["items"].get(task) for task in base["items"]]
    cells = ["" if score is None else f"{percent(score):.1f}" for score in scores]
    low, high = p["drift_95"]
    return [*cells, f"{p['target_nll']:.3f}", f"{p['drift']:.4f} ({low:.4f} to {high:.4f})"]


def percent(scores: list[float]) -> float:
    """Return the mean of items' scores, in percent."""
    return 100 * sum(scores) / len(scores)


def twins(run: dict[str, Any], sft: dict[str, Any]) -> bool:
    """Return whether the second is the SFT run of the first's settings."""
    return sft["objective"] == "sft" and about(sft)[1:] == about(run)[1:]


def matched(run: dict[str, Any], sft: dict[str, Any], base: dict[str, Any]) -> list[Any]:
    """
    Return a run's best epoch (lowest held-out nll) beside the drift at which SFT reaches that nll on its way down.

    SFT's drift is interpolated between its measurements, from the base model on; if it never gets there, that is said.
    """
    best = min(run["points"], key=lambda p: p["target_nll"])
    drift = np.array(best["drift_per_prompt"])
    there = drift_at(best["target_nll"], [base, *sft["points"]])
    cells = [*about(run), best["epoch"], f"{best['target_nll']:.3f}", f"{drift.mean():.4f}"]
    return [*cells, *(["not reached", ""] if there is None else [f"{there.mean():.4f}", difference(drift - there)])]


def drift_at(nll: float, points: list[dict[str, Any]]) -> np.ndarray | None:
    """Return the drift, prompt by prompt, at which a run first reaches an nll, linear between epochs; None: never."""
    for previous, p in pairwise(points):
        if p["target_nll"] <= nll:
            share = (previous["target_nll"] - nll) / (previous["target_nll"] - p["target_nll"])
            return (1 - share) * np.array(previous["drift_per_prompt"]) + share * np.array(p["drift_per_prompt"])
    return None


def difference(values: np.ndarray) -> str:
    """Return the mean of paired differences, with its interval."""
    low, high = mean_interval(values)
    return f"{values.mean():+.4f} ({low:+.4f} to {high:+.4f})"


def equal(run: dict[str, Any], sft: dict[str, Any], base: dict[str, Any]) -> list[list[Any]]:
    """Return a run less SFT after the same epochs, item by item and prompt by prompt."""
    rows = []
    for p, q in ((p, q) for p in run["points"] for q in sft["points"] if p["epoch"] == q["epoch"]):
        cells = [*about(run), p["epoch"]]
        for task in base["items"]:
            if task in p["items"] and task in q["items"]:
                c = paired_change(np.array(q["items"][task]), np.array(p["items"][task]))
                cells.append(f"{100 * c.change:+.1f} ({100 * c.low:+.1f} to {100 * c.high:+.1f})")
            else:
                cells.append("")
        drift = np.array(p["drift_per_prompt"]) - np.array(q["drift_per_prompt"])
        rows.append([*cells, f"{p['target_nll'] - q['target_nll']:+.3f}", difference(drift)])
    return rows


def over_seeds(runs: list[dict[str, Any]]) -> list[list[Any]]:
    """Return mean ± standard deviation over the seeds of every setting that has several."""
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        for p in run["points"]:
            settings.setdefault((*about(run)[:2], p["epoch"]), []).append(p)
    rows = []
    for setting, points in settings.items():
        if len(points) > 1:
            found = {name: mean_and_std([p[name] for p in points]) for name in ("target_nll", "drift")}
            rows.append([*setting, len(points), *(cell(found, name, digits=4) for name in found)])
    return rows


def draw(runs: list[dict[str, Any]], base: dict[str, Any], path: Path) -> None:
    """Draw target and general ability against drift, every run a line through its epochs."""
    target, general = list(base["items"])[:2]
    panels: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("nll of held-out answers (nats)", lambda p: p["target_nll"]),
        ("target (%)", lambda p: percent(p["items"][target])),
        (f"{general} (%)", lambda p: percent(p["items"][general])),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    palette = colors(list(dict.fromkeys(run["objective"] for run in runs)))
    styles = dict(zip(sorted({run["learning_rate"] for run in runs}), ("--", "-", ":", "-."), strict=False))
    for axis, (label, value) in zip(axes, panels, strict=True):
        for run in runs:
            points = [base, *run["points"]]
            axis.plot(
                [p["drift"] for p in points],
                [value(p) for p in points],
                styles[run["learning_rate"]],
                marker=".",
                color=palette[run["objective"]],
                alpha=0.8,
            )
        axis.set(xlabel="drift, KL(base ‖ tuned), nats per token", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(handles=[Line2D([], [], color=color, label=name) for name, color in palette.items()], fontsize=7)
    rates = [Line2D([], [], color="gray", linestyle=style, label=f"lr {rate:g}") for rate, style in styles.items()]
    axes[1].legend(handles=rates, fontsize=7)
    save(figure, path)


if __name__ == "__main__":
    main()
