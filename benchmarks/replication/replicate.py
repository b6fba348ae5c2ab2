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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tables import Numbers, best, read_runs, report
from tqdm import tqdm

from eaft.evaluation.drift import PROMPTS, Answer, BaseAnswers, answer_log_probs, read_prompts
from eaft.evaluation.scores import Protocol, load_model, load_tokenizer, score, wrap
from eaft.evaluation.suite import load_suites
from eaft.provenance import environment, write_json
from eaft.training.train import RUN_FILE

DRIFT_TOKENS = 64  # of each of 32 answers


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
            report(flags.recipe.stem, recipe, settings.folder)
    print(report(flags.recipe.stem, recipe, settings.folder))


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
        write_json(run / "measured.json", {**about, "points": points})
        for epoch, path in checkpoints(run).items():
            if epoch not in (best(points)["epoch"], points[-1]["epoch"]):
                shutil.rmtree(path)

    runs = [
        run
        for run in read_runs(settings.recipe, settings.folder)
        if (run["objective"], run["seed"]) == (objective, seed)
    ]
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
        loaded = load_model(model, "bfloat16")
        for name in names:
            task = self.settings.recipe["tasks"][name]
            benchmarks = load_suites([task["task"]], data_dir=str(self.settings.data_dir), limit=task.get("limit"))[1]
            protocol = Protocol(True, gen_kwargs=task.get("gen_kwargs"), batch_size=task["batch_size"])
            items = score(wrap(loaded, self.tokenizer, protocol), benchmarks[task["task"]], protocol)
            found[name] = [item["score"] for item in items]
        return found


if __name__ == "__main__":
    main()
