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
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from tabulate import tabulate
from tqdm import tqdm

from eaft.drift import PROMPTS, Answer, BaseAnswers, answer_log_probs, read_prompts
from eaft.paired import paired_change
from eaft.provenance import environment, write_json
from eaft.report import colors, save
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
    parser.add_argument("--data_dir", type=Path, default=Path("."), help="where the recipe's data files are")
    parser.add_argument("--objectives", nargs="+", help="only these")
    parser.add_argument("--learning_rates", nargs="+", type=float, help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="do every N-th run, from the I-th on")
    parser.add_argument("--train_only", action="store_true", help="leave the checkpoints for a later call to measure")
    flags = parser.parse_args()
    recipe = yaml.safe_load(flags.recipe.read_text())
    folder = Path("runs/replication") / flags.recipe.stem
    runs = [
        (objective, learning_rate, seed)
        for seed in flags.seeds or recipe["seeds"]
        for learning_rate in flags.learning_rates or recipe["learning_rates"]
        for objective in flags.objectives or recipe["objectives"]
    ]
    write_data(recipe["data"], flags.data_dir, folder)
    shard, shards = map(int, flags.shard.split("/"))
    measure = None if flags.train_only else Measure(flags.model, recipe, folder, shard)
    for objective, learning_rate, seed in tqdm(runs[shard::shards], "Runs"):
        run = folder / f"{objective}-lr{learning_rate:g}-seed{seed}"
        if (run / "measured.json").is_file():
            continue
        settings = {**recipe["train"], **recipe["objectives"][objective], "learning_rate": learning_rate, "seed": seed}
        train(run, {**settings, "model_name_or_path": flags.model, "use_cpu": flags.use_cpu}, folder, recipe["epochs"])
        if measure is not None:
            points = [{"epoch": epoch, **measure(path)} for epoch, path in checkpoints(run, recipe["epochs"]).items()]
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
        rows = [json.loads(line) for line in (data_dir / data[split]["file"]).read_text().split("\n") if line]
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

    Returns, when called, `drift` (nats per token, with 95% interval), `general` (mean score), `target_nll` (nats per
    token of held-out answers), `target` (share of generated answers that are right), and `items`: every item's score,
    in order.
    """

    def __init__(self, model: str, recipe: dict[str, Any], folder: Path, shard: int) -> None:
        self.tokenizer = load_tokenizer(model)
        _, self.benchmarks = load_suites([recipe["target_task"], *recipe["general_tasks"]])
        self.target = recipe["target_task"]
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
            write_json(folder / "base.json", self.measure(base))

    def __call__(self, checkpoint: Path) -> dict[str, Any]:
        """Measure a checkpoint."""
        return self.measure(load_model(str(checkpoint)))

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, Any]:
        """Measure a model."""
        found = score(wrap(model, self.tokenizer, 48), self.benchmarks, apply_chat_template=True)
        items = {name: [item["score"] for item in items] for name, items in found.items()}
        means = {name: sum(scores) / len(scores) for name, scores in items.items()}
        general = [means[name] for name in means if name != self.target]
        nll = [
            -answer_log_probs(model, answer).gather(1, torch.tensor(answer.answer_ids)[:, None].to(model.device))
            for answer in self.held_out
        ]
        drift = self.answers.drift(model)
        return {
            "target": means[self.target],
            "target_nll": torch.cat(nll).mean().item(),
            "general": sum(general) / len(general),
            "drift": drift["mean"],
            "drift_95": [drift["low"], drift["high"]],
            "items": items,
        }


def report(name: str, recipe: dict[str, Any], folder: Path) -> None:
    """Write the results of all runs measured so far as JSON, Markdown and a picture."""
    files = sorted(folder.glob("*/measured.json"))
    runs = [json.loads(file.read_text()) for file in files]
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
    rows = [["base", "", "", 0, *numbers(base)]]
    rows += [[*about(run), p["epoch"], *numbers(p)] for run in runs for p in run["points"]]
    headers = ["objective", "lr", "seed", "epochs", "target %", "target nll", "general %", "drift (95% over prompts)"]
    sections = {"Every measurement": (headers, rows)}
    pairs = [(run, sft) for run in runs for sft in runs if run["objective"] != "sft" and twins(run, sft)]
    headers = ["objective", "lr", "seed", "best epoch", "target nll", "drift", "SFT's drift there", "difference"]
    sections["Beside SFT at matched target"] = (headers, [matched(run, sft, base) for run, sft in pairs])
    headers = [
        "objective",
        "lr",
        "seed",
        "epochs",
        "target, points (95%)",
        "general, points (95%)",
        "target nll",
        "drift",
    ]
    rows = [row for run, sft in pairs for row in equal(run, sft)]
    sections["Less SFT at equal settings"] = (headers, rows)
    return "\n".join(
        f"## {title}\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n"
        for title, (headers, rows) in sections.items()
    )


def about(run: dict[str, Any]) -> list[Any]:
    """Return what tells runs apart."""
    return [run["objective"], f"{run['learning_rate']:g}", run["seed"]]


def numbers(p: dict[str, Any]) -> list[str]:
    """Return a measurement's cells."""
    return [
        f"{100 * p['target']:.1f}",
        f"{p['target_nll']:.3f}",
        f"{100 * p['general']:.1f}",
        f"{p['drift']:.4f} ({p['drift_95'][0]:.4f} to {p['drift_95'][1]:.4f})",
    ]


def twins(run: dict[str, Any], sft: dict[str, Any]) -> bool:
    """Return whether the second is the SFT run of the first's settings."""
    return sft["objective"] == "sft" and about(sft)[1:] == about(run)[1:]


def matched(run: dict[str, Any], sft: dict[str, Any], base: dict[str, Any]) -> list[Any]:
    """
    Return a run's best epoch (lowest held-out nll) beside the drift at which SFT reaches that nll on its way down.

    SFT's drift is interpolated between its measurements, from the base model on; if it never gets there, that is said.
    """
    best = min(run["points"], key=lambda p: p["target_nll"])
    there = drift_at(best["target_nll"], [{**base, "drift": 0.0}, *sft["points"]])
    cells = [*about(run), best["epoch"], f"{best['target_nll']:.3f}", f"{best['drift']:.4f}"]
    return [*cells, *(["not reached", ""] if there is None else [f"{there:.4f}", f"{best['drift'] - there:+.4f}"])]


def equal(run: dict[str, Any], sft: dict[str, Any]) -> list[list[Any]]:
    """Return a run less SFT after the same epochs; target and general with the interval of the paired items."""
    rows = []
    for p in run["points"]:
        for q in sft["points"]:
            if p["epoch"] == q["epoch"]:
                changes = [
                    paired_change(np.array(q["items"][name]), np.array(scores)) for name, scores in p["items"].items()
                ]
                cells = [f"{100 * c.change:+.1f} ({100 * c.low:+.1f} to {100 * c.high:+.1f})" for c in changes[:2]]
                differences = [f"{p[k] - q[k]:+.{digits}f}" for k, digits in (("target_nll", 3), ("drift", 4))]
                rows.append([*about(run), p["epoch"], *cells, *differences])
    return rows


def drift_at(nll: float, points: list[dict[str, Any]]) -> float | None:
    """Return the drift at which a run first reaches a held-out nll, linear between epochs; None if it never does."""
    previous = None
    for p in points:
        if p["target_nll"] <= nll:
            if previous is None:
                return float(p["drift"])
            share = (previous["target_nll"] - nll) / (previous["target_nll"] - p["target_nll"])
            return float(previous["drift"] + share * (p["drift"] - previous["drift"]))
        previous = p
    return None


def draw(runs: list[dict[str, Any]], base: dict[str, Any], path: Path) -> None:
    """Draw target and general ability against drift, every run a line through its epochs."""
    panels = {"target_nll": "nll of held-out answers (nats)", "target": "target (%)", "general": "general (%)"}
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    palette = colors(list(dict.fromkeys(run["objective"] for run in runs)))
    for axis, (quantity, label) in zip(axes, panels.items(), strict=True):
        scale = 1 if quantity == "target_nll" else 100
        drawn = set()
        for run in runs:
            points = [{"drift": 0.0, **{k: base[k] for k in panels}}, *run["points"]]
            name = run["objective"]
            axis.plot(
                [p["drift"] for p in points],
                [scale * p[quantity] for p in points],
                marker=".",
                color=palette[name],
                alpha=0.8,
                label=None if name in drawn else name,
            )
            drawn.add(name)
        axis.set(xlabel="drift, KL(base ‖ tuned), nats per token", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    save(figure, path)


if __name__ == "__main__":
    main()
