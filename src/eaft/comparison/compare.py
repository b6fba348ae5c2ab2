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
from eaft.evaluation.drift import PROMPTS, BaseAnswers, read_prompts
from eaft.evaluation.evaluate import Protocol, changes, measure, read_items, shared_tokenizer, write_items
from eaft.evaluation.scores import SEED, own_dtype
from eaft.evaluation.suite import Benchmark, Suite, load_suites, suites_help
from eaft.models import resolve_model
from eaft.objective.gates import gates_help
from eaft.provenance import environment, write_json
from eaft.training.train import RUN_FILE, last_complete_checkpoint, parse

DESCRIPTION = """
Train with several objectives from one base model, one data set and the same seeds; evaluate the base and each result on
the target tasks, on general tasks and on drift, item by item beside the base; write results.json, results.md (with the
paper's Table 1 layout), pareto.png and curves.png.

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
    target_tasks: [math]           # suites, or lm-evaluation-harness tasks; yours from include_path
    general_tasks: [general]
    # all else may be left out: include_path, data_dir, limit, num_fewshot, apply_chat_template, system_instruction,
    # gen_kwargs, seed, batch_size and dtype as in `eaft eval`, and what drift is measured on:
    target_prompts: test.jsonl     # rows with a `prompt`: the base model's answers to them
    general_prompts: prompts.jsonl # (default: 32 everyday requests)

Run it again to go on after an interruption: what is finished is reused, what is not is resumed.
"""
EVALUATION_FILE = "evaluation.json"


@dataclass
class EvaluateConfig:
    """What each model is measured on; see `DESCRIPTION`."""

    target_tasks: list[str]
    general_tasks: list[str]
    general_prompts: str = str(PROMPTS)
    target_prompts: str | None = None
    include_path: str | None = None
    data_dir: str | None = None
    limit: int | None = None
    drift_prompts: int = 32  # at most so many prompts of each file
    max_new_tokens: int = 128  # of each sampled answer
    batch_size: int = 16
    apply_chat_template: bool | None = None  # None: if the base model has a template
    num_fewshot: int | None = None
    system_instruction: str | None = None
    gen_kwargs: str | None = None
    seed: int = SEED
    dtype: str = "auto"

    @property
    def protocol(self) -> Protocol:
        """How each model is measured."""
        return Protocol(**{name: getattr(self, name) for name in vars(self) if name in Protocol.__dataclass_fields__})

    @property
    def prompts(self) -> dict[str, list[Any]]:
        """The prompts whose answers drift is measured on, by kind."""
        files = {"general": self.general_prompts, "target": self.target_prompts}
        return {kind: read_prompts(file, self.drift_prompts) for kind, file in files.items() if file is not None}


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
        description=f"{DESCRIPTION}\nsuites:\n{suites_help()}\n\ngates:\n{gates_help()}",
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
    config = recipe.evaluate
    names = config.target_tasks + config.general_tasks
    found, benchmarks = load_suites(names, config.include_path, config.data_dir, config.limit)
    groups = [
        Suite(kind, [name for suite in part for name in suite.benchmarks])
        for kind, part in (
            ("target", found[: len(config.target_tasks)]),
            ("general", found[len(config.target_tasks) :]),
        )
    ]
    from eaft.comparison import report  # needs the same extra as lm-eval, whose absence has been reported by now

    runs = check(recipe)
    output_dir.mkdir(parents=True, exist_ok=True)
    for folder, settings in runs.values():
        train_run(folder, settings)

    folders = {key: folder for key, (folder, _) in runs.items()}
    evaluations = evaluate_runs(recipe, folders, benchmarks, groups)
    described = asdict(recipe)
    if Path(base_path := recipe.train["model_name_or_path"]).exists():
        described["train"]["model_name_or_path"] = Path(base_path).name  # a path of this machine tells others nothing
    described["evaluate"]["general_prompts"] = Path(config.general_prompts).name
    first = next(iter(evaluations.values()))
    results: dict[str, Any] = {
        "recipe": described,
        "environment": environment(),
        "groups": {group.name: group.benchmarks for group in groups},
        "base": {
            **{group.name: first["means"][group.name]["before"] for group in groups},
            **{f"drift_{kind}": 0.0 for kind in first["drift"]},
            "tasks": {name: task["before"] for name, task in first["tasks"].items()},
        },
        "runs": [],
    }
    for (objective, seed), folder in folders.items():
        run, evaluation = json.loads((folder / RUN_FILE).read_text()), evaluations[objective, seed]
        trained = run["result"]
        results["runs"].append(
            {
                "objective": objective,
                "seed": seed,
                "commit": run["environment"]["commit"],
                **{name: mean["after"] for name, mean in evaluation["means"].items()},
                **{f"drift_{kind}": drift["mean"] for kind, drift in evaluation["drift"].items()},
                "tasks": {name: task["after"] for name, task in evaluation["tasks"].items()},
                "changes": {**evaluation["tasks"], **evaluation["means"]},
                "tokens_per_s": trained["tokens_per_s"],
                "peak_memory_gib": trained["peak_memory_gib"],
                "train_runtime_s": trained["train_runtime_s"],
            }
        )
    results["objectives"] = {
        name: spread([r for r in results["runs"] if r["objective"] == name]) for name in recipe.objectives
    }
    table = report.table(results) + "\n\n" + report.table_1(results)
    (output_dir / "results.md").write_text(table + "\n")
    report.draw_pareto(results, output_dir / "pareto.png")
    report.draw_curves(folders, output_dir / "curves.png")
    write_json(output_dir / "results.json", results)
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
    _ = recipe.evaluate.prompts  # read, so that a missing file is found now

    runs = {}
    for seed in recipe.seeds:
        for name, flags in recipe.objectives.items():
            folder = Path(recipe.output_dir) / f"{name}-seed{seed}"
            config = {**recipe.train, **flags, "seed": seed, "output_dir": str(folder)}
            values = {k: json.dumps(v) if isinstance(v, dict) else v for k, v in config.items()}
            parse([f"--{key}={value}" for key, value in values.items() if not isinstance(value, list)])
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


def evaluate_runs(
    recipe: Recipe, folders: dict[tuple[str, int], Path], benchmarks: dict[str, Benchmark], groups: list[Suite]
) -> dict[tuple[str, int], dict[str, Any]]:
    """
    Evaluate the base model and every run that has not been yet; return each run's evaluation.

    Writes `evaluation.json` (changes from the base by task and group, drift) and the items into each run's folder.
    """
    config, base, base_dir = recipe.evaluate, recipe.train["model_name_or_path"], Path(recipe.output_dir) / "base"
    inputs = {**asdict(config), "model": base}

    def done(folder: Path) -> dict[str, Any] | None:
        file = folder / EVALUATION_FILE
        found = json.loads(file.read_text()) if file.is_file() else None
        return found if found is not None and found["inputs"] == inputs else None

    answers = {kind: BaseAnswers(base_dir / f"drift_{kind}") for kind in config.prompts}
    if all(done(folder) for folder in folders.values()):
        return {key: done(folder) or {} for key, folder in folders.items()}

    protocol = config.protocol
    if protocol.dtype == "auto":
        protocol.dtype = own_dtype(base)
    _, tokenizer = shared_tokenizer(base, base, drift=True)
    if protocol.apply_chat_template is None:
        protocol.apply_chat_template = tokenizer.chat_template is not None

    def record(model: Any) -> None:
        for kind, prompts in config.prompts.items():
            answers[kind].record(model, tokenizer, prompts, protocol.max_new_tokens, protocol.batch_size)

    if done(base_dir) is None or not all(a.recorded for a in answers.values()):
        print(f"{base_dir}: evaluating")
        shutil.rmtree(base_dir, ignore_errors=True)
        before = measure(base, tokenizer, benchmarks, protocol, record)
        write_items(base_dir / "items", before)
        write_json(base_dir / EVALUATION_FILE, {"inputs": inputs, "environment": environment()})
    before = read_items(base_dir / "items", list(benchmarks))
    for folder in folders.values():
        if done(folder) is not None:
            continue
        print(f"{folder}: evaluating")
        drift: dict[str, Any] = {}

        def compare_with_base(model: Any, drift: dict[str, Any] = drift) -> None:
            drift.update({kind: a.drift(model) for kind, a in answers.items()})

        after = measure(str(folder), tokenizer, benchmarks, protocol, compare_with_base)
        write_items(folder / "items", after)
        evaluation = {"inputs": inputs, "environment": environment(), **changes(before, after, groups), "drift": drift}
        write_json(folder / EVALUATION_FILE, evaluation)
    for a in answers.values():
        a.free()
    return {key: done(folder) or {} for key, folder in folders.items()}


def spread(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and sample standard deviation (None for one seed) of each number over an objective's seeds."""
    numbers = [name for name, value in runs[0].items() if isinstance(value, float)]
    found: dict[str, Any] = {name: mean_and_std([run[name] for run in runs]) for name in numbers}
    found["tasks"] = {name: mean_and_std([run["tasks"][name] for run in runs]) for name in runs[0]["tasks"]}
    return found


def mean_and_std(values: list[float]) -> dict[str, float | None]:
    """Return a mean and a sample standard deviation, None for a single value."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
