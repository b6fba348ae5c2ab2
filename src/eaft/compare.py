"""`eaft compare`: train with several objectives from one base model; show what each gained and what it forgot."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from eaft.errors import ConfigurationError, EAFTError, nearest
from eaft.evaluate import Answer, drift, load_model, read_prompts, sample_answers, score_tasks, task_manager
from eaft.gates import gates_help
from eaft.models import resolve_model
from eaft.provenance import environment, write_json
from eaft.train import RUN_FILE, last_complete_checkpoint, parse

DESCRIPTION = """
Train with several objectives from one base model, one data set and the same seeds; evaluate the base and each result on
the target tasks, on general tasks and on drift; write results.json, results.md, pareto.png and curves.png.

The recipe (YAML):

  output_dir: runs/mine
  seeds: [0, 1]
  objectives:                      # a name, and the flags of `eaft train` in which it differs
    sft: {gate: sft}
    eaft: {gate: eaft}
    sigmoid: {gate: eaft-sigmoid, gate_kwargs: {steepness: 20}}
  train:                           # flags of `eaft train` that all share
    model_name_or_path: Qwen/Qwen3-0.6B
    dataset_name: data.jsonl
    num_train_epochs: 10
  evaluate:
    target_tasks: [gsm8k]          # lm-evaluation-harness tasks; yours from task_path
    general_tasks: [mmlu, ifeval]
    task_path: my_tasks
    general_prompts: prompts.jsonl # rows with a `prompt`: drift is measured on the base model's answers to them
    target_prompts: test.jsonl

Run it again to go on after an interruption: what is finished is reused, what is not is resumed.
"""
EVALUATION_FILE = "evaluation.json"


@dataclass
class EvaluateConfig:
    """What each model is measured on; see `DESCRIPTION`."""

    target_tasks: list[str]
    general_tasks: list[str]
    general_prompts: str
    target_prompts: str
    task_path: str | None = None
    drift_prompts: int = 32  # at most so many prompts of each file
    max_new_tokens: int = 128  # of each sampled answer
    batch_size: int = 16
    apply_chat_template: bool = True


@dataclass
class Recipe:
    """A comparison; see `DESCRIPTION`."""

    output_dir: str
    objectives: dict[str, dict[str, Any]]
    train: dict[str, Any]
    evaluate: EvaluateConfig
    seeds: list[int] = field(default_factory=lambda: [0])


def main(argv: list[str]) -> None:
    """Read the recipe and the flags that override it, check both, and compare."""
    parser = argparse.ArgumentParser(
        prog="eaft compare",
        description=f"{DESCRIPTION}\ngates:\n{gates_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the recipe")
    parser.add_argument("--output_dir", help="overrides the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", help="overrides the recipe's: repeat, and show mean and spread")
    parser.add_argument("--model_name_or_path", help="overrides the recipe's")
    flags = parser.parse_args(argv)
    recipe = read_recipe(flags.config)
    recipe.output_dir = flags.output_dir or recipe.output_dir
    recipe.seeds = flags.seeds or recipe.seeds
    recipe.train["model_name_or_path"] = flags.model_name_or_path or recipe.train.get("model_name_or_path")
    compare(recipe)


def read_recipe(path: str) -> Recipe:
    """
    Read and check a recipe.

    Raises:
        ConfigurationError: it cannot be read, or a field is unknown or missing.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"--config {path}: {error}") from error
    recipe = build(Recipe, content, path)
    recipe.evaluate = build(EvaluateConfig, recipe.evaluate, f"{path}: evaluate")
    for name in recipe.objectives:
        if not re.fullmatch(r"[\w.^-]+", name):
            raise ConfigurationError(
                f"{path}: the objective {name!r} names a folder; use letters, digits, '-', '_', '.'."
            )
    return recipe


def build(cls: Any, content: Any, where: str) -> Any:
    """Make a dataclass of a mapping, naming fields that are unknown or missing."""
    if not isinstance(content, dict):
        raise ConfigurationError(f"{where}: expected a mapping, got {type(content).__name__}.")
    names = [f.name for f in fields(cls)]
    for name in content:
        if name not in names:
            raise ConfigurationError(f"{where}: {name!r} is unknown.{nearest(name, names)}")
    try:
        return cls(**content)
    except TypeError as error:
        raise ConfigurationError(f"{where}: {str(error).partition('() ')[2]}") from error


def compare(recipe: Recipe) -> dict[str, Any]:
    """Train and evaluate what is not done yet, and write the results; returns what `results.json` holds."""
    output_dir = Path(recipe.output_dir)
    tasks = recipe.evaluate.target_tasks + recipe.evaluate.general_tasks
    manager = task_manager(tasks, recipe.evaluate.task_path)
    from eaft import report  # needs the same extra as lm-eval, whose absence has been reported by now

    runs = check(recipe)
    output_dir.mkdir(parents=True, exist_ok=True)
    for folder, config in runs.values():
        train_run(folder, config)

    base_dir = output_dir / "base"
    base_dir.mkdir(exist_ok=True)
    base = evaluate_run(base_dir, recipe, manager)
    described = asdict(recipe)
    if Path(base_path := recipe.train["model_name_or_path"]).exists():
        described["train"]["model_name_or_path"] = Path(base_path).name  # a path of this machine tells others nothing
    results: dict[str, Any] = {
        "recipe": described,
        "environment": environment(),
        "base": summary(base),
        "runs": [],
    }
    for (objective, seed), (folder, _) in runs.items():
        run = json.loads((folder / RUN_FILE).read_text())
        trained = run["result"]
        results["runs"].append(
            {
                "objective": objective,
                "seed": seed,
                "commit": run["environment"]["commit"],
                **summary(evaluate_run(folder, recipe, manager)),
                "tokens_per_s": trained["tokens_per_s"],
                "peak_memory_gib": trained["peak_memory_gib"],
                "train_runtime_s": trained["train_runtime_s"],
            }
        )
    results["objectives"] = {
        name: spread([r for r in results["runs"] if r["objective"] == name]) for name in recipe.objectives
    }
    write_json(output_dir / "results.json", results)
    table = report.table(results)
    (output_dir / "results.md").write_text(table + "\n")
    report.draw_pareto(results, output_dir / "pareto.png")
    report.draw_curves({key: folder for key, (folder, _) in runs.items()}, output_dir / "curves.png")
    print(f"\n{table}\n\nWritten to {output_dir}: results.json, results.md, pareto.png, curves.png")
    return results


def check(recipe: Recipe) -> dict[tuple[str, int], tuple[Path, dict[str, Any]]]:
    """
    Check everything that can be wrong before anything runs; return each run's folder and its `eaft train` settings.

    Raises:
        ConfigurationError: a missing model or file, a bad flag, or a folder with another run.
    """
    if recipe.train.get("model_name_or_path") is None:
        raise ConfigurationError("train: model_name_or_path is missing.")
    recipe.train["model_name_or_path"] = resolve_model(recipe.train["model_name_or_path"])
    read_prompts(recipe.evaluate.general_prompts, 1)
    read_prompts(recipe.evaluate.target_prompts, 1)

    runs = {}
    for seed in recipe.seeds:
        for name, changes in recipe.objectives.items():
            folder = Path(recipe.output_dir) / f"{name}-seed{seed}"
            config = {**recipe.train, **changes, "seed": seed, "output_dir": str(folder)}
            flags = {k: json.dumps(v) if isinstance(v, dict) else v for k, v in config.items()}
            parse([f"--{key}={value}" for key, value in flags.items() if not isinstance(value, list)])
            config = {"train": config, "data": fingerprint(config)}
            held = folder / "compare.json"
            if held.is_file() and (old := json.loads(held.read_text())) != config:
                changed = [
                    k for k in {**old["train"], **config["train"]} if old["train"].get(k) != config["train"].get(k)
                ]
                raise ConfigurationError(
                    f"output_dir={str(folder)!r} holds another run: {', '.join(changed) or 'the data'} changed since. "
                    "Choose another output_dir, or delete this folder."
                )
            runs[name, seed] = (folder, config)
    return runs


def fingerprint(config: dict[str, Any]) -> str | None:
    """Return a digest of local training files, so that changed data is noticed; None for data from the Hub."""
    path = Path(config.get("dataset_name") or "")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest() if files else None


def train_run(folder: Path, config: dict[str, Any]) -> None:
    """
    Train in a process of its own, so that its peak memory is its own; reuse a finished run, resume an interrupted one.

    Raises:
        EAFTError: training failed; its message is above.
    """
    run_file = folder / RUN_FILE
    if run_file.is_file() and json.loads(run_file.read_text())["finished"]:
        print(f"{folder}: already trained")
        return
    flags = dict(config["train"])
    if folder.is_dir():
        if checkpoint := last_complete_checkpoint(folder):
            flags["resume_from_checkpoint"] = checkpoint
        else:
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "compare.json", config)
    (folder / "train.yaml").write_text(yaml.safe_dump(flags, sort_keys=False))
    print(
        f"{folder}: training"
        + (f" from {flags['resume_from_checkpoint']}" if "resume_from_checkpoint" in flags else "")
    )
    command = [sys.executable, "-m", "eaft", "train", "--config", str(folder / "train.yaml")]
    if code := subprocess.run(command).returncode:
        raise EAFTError(f"{folder}: training ended with exit code {code}; see its message above.")


def evaluate_run(folder: Path, recipe: Recipe, manager: Any) -> dict[str, Any]:
    """
    Evaluate the model in a run's folder (`base`: the base model), or return the evaluation made before.

    Writes `evaluation.json` (scores and drift), and the items of each task as JSON Lines.
    """
    config, base_path = recipe.evaluate, recipe.train["model_name_or_path"]
    inputs = {**asdict(config), "model": base_path}
    file = folder / EVALUATION_FILE
    if file.is_file() and (done := json.loads(file.read_text()))["inputs"] == inputs:
        return done
    is_base = folder.name == "base"
    print(f"{folder}: evaluating")
    model, tokenizer = load_model(base_path if is_base else str(folder))
    tasks = list(dict.fromkeys(config.target_tasks + config.general_tasks))
    scores = score_tasks(model, tokenizer, tasks, manager, config.batch_size, config.apply_chat_template)
    for task, score in scores.items():
        items = score.pop("items")
        (folder / f"items_{task}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    result: dict[str, Any] = {"inputs": inputs, "environment": environment(), "tasks": scores}

    answers_file = folder.parent / "base" / "answers.json"
    if is_base:
        answers = {
            kind: sample_answers(
                model,
                tokenizer,
                read_prompts(path, config.drift_prompts),
                config.max_new_tokens,
                batch_size=config.batch_size,
            )
            for kind, path in (("general", config.general_prompts), ("target", config.target_prompts))
        }
        write_json(answers_file, {kind: [asdict(a) for a in sampled] for kind, sampled in answers.items()})
        result["drift"] = {kind: {"mean": 0.0} for kind in answers}
    else:
        base, _ = load_model(base_path)
        result["drift"] = {
            kind: drift(base, model, [Answer(**answer) for answer in sampled])
            for kind, sampled in json.loads(answers_file.read_text()).items()
        }
    for kind, names in (("target", config.target_tasks), ("general", config.general_tasks)):
        result[kind] = statistics.mean(scores[name]["score"] for name in names)
    write_json(file, result)
    return result


def summary(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation's headline numbers: scores in [0, 1], drift in nats per token."""
    return {
        "target": evaluation["target"],
        "general": evaluation["general"],
        "drift_general": evaluation["drift"]["general"]["mean"],
        "drift_target": evaluation["drift"]["target"]["mean"],
        "tasks": {name: task["score"] for name, task in evaluation["tasks"].items()},
    }


def spread(runs: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return mean and sample standard deviation (None for one seed) of each number over an objective's seeds."""
    numbers = [name for name, value in runs[0].items() if isinstance(value, float)]
    return {
        name: {
            "mean": statistics.mean(run[name] for run in runs),
            "std": statistics.stdev(run[name] for run in runs) if len(runs) > 1 else None,
        }
        for name in numbers
    }
