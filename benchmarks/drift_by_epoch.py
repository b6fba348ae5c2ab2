"""
When in training does the demo's model drift, and what has it learned by then?

One SFT and one EAFT run of the demo's recipe, measured after some of its epochs.

    make demo                                  # gives runs/demo, whose base answers this uses
    .venv/bin/python benchmarks/drift_by_epoch.py

Writes benchmarks/results/drift_by_epoch.json and .png.
"""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import yaml

from eaft.compare import read_recipe
from eaft.evaluate import Answer, drift, load_model, score_tasks, task_manager
from eaft.provenance import environment, write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SEED = 0
EPOCHS = (1, 2, 3, 4, 8)


def main() -> None:
    """Train both, measure each epoch's checkpoint, write and draw."""
    recipe = read_recipe(str(ROOT / "recipes" / "demo" / "compare.yaml"))
    demo = ROOT / "runs" / "demo"
    answers_file = demo / "base" / "answers.json"
    if not answers_file.is_file():
        sys.exit(f"{answers_file} is missing: run make demo first.")
    answers = [Answer(**answer) for answer in json.loads(answers_file.read_text())["general"]]
    base_path = yaml.safe_load((demo / "sft-seed0" / "train.yaml").read_text())["model_name_or_path"]
    base, _ = load_model(base_path)
    manager = task_manager(recipe.evaluate.target_tasks, recipe.evaluate.task_path)

    runs = []
    for name, flags in recipe.objectives.items():
        folder = ROOT / "runs" / "drift_by_epoch" / name
        config = {**recipe.train, **flags, "seed": SEED, "output_dir": str(folder), "model_name_or_path": base_path}
        config.update(save_strategy="epoch", save_total_limit=None, save_only_model=True)
        config_file = folder.with_suffix(".yaml")
        config_file.parent.mkdir(parents=True, exist_ok=True)
        config_file.write_text(yaml.safe_dump(config))
        run_file = folder / "run.json"
        if not run_file.is_file() or not json.loads(run_file.read_text())["finished"]:
            subprocess.run([sys.executable, "-m", "eaft", "train", "--config", str(config_file)], check=True)
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        for epoch in EPOCHS:
            checkpoint = checkpoints[epoch - 1]
            model, tokenizer = load_model(str(checkpoint))
            scores = score_tasks(
                model,
                tokenizer,
                recipe.evaluate.target_tasks,
                manager,
                recipe.evaluate.batch_size,
                recipe.evaluate.apply_chat_template,
            )
            target = sum(score["score"] for score in scores.values()) / len(scores)
            runs.append(
                {"objective": name, "epoch": epoch, "target": target, "drift": drift(base, model, answers)["mean"]}
            )
            print(runs[-1], flush=True)

    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "drift_by_epoch.json", {"environment": environment(), "seed": SEED, "runs": runs})
    figure, axis = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for name in recipe.objectives:
        points = [(run["drift"], 100 * run["target"], run["epoch"]) for run in runs if run["objective"] == name]
        axis.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=name)
        for x, y, epoch in points:
            axis.annotate(str(epoch), (x, y), textcoords="offset points", xytext=(4, -9), fontsize=7)
    axis.set(xlabel="drift, KL(base ‖ tuned), nats per token", ylabel="target (%)", title="after each epoch")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(RESULTS / "drift_by_epoch.png", dpi=150)


if __name__ == "__main__":
    main()
