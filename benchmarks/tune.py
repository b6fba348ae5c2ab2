"""
What `eaft tune` costs beside a plain training run with one evaluation, and beside `eaft compare` of
four objectives: CPU seconds and peak memory, as ratios.

    python benchmarks/tune.py                    # from the repository's root; 15 minutes
    python benchmarks/tune.py --rows 80 --no_compare     # as many rows as `make demo` trains on

All train on the same short rows of GSM8K, for the same epochs, and measure the same held-out rows
and as many drift prompts. CPU seconds, since other processes do not change them much. Nothing is
kept from one to the next: each has a cache of its own. Writes benchmarks/results/tune_ROWS.json
after each command.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from eaft.provenance import environment, write_json

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "recipes" / "demo"
WORK = ROOT / "runs" / "benchmark-tune"
BUDGET = "0.05"
EPOCHS, HELD_OUT = 2, 16  # held-out rows
PROMPTS, TOKENS = 8, 16  # of each part of tune; eval and compare have the prompts of both
OBJECTIVES = {"sft": {"gate": "sft"}, "eaft": {"gate": "eaft"}, "dft": {"gate": "dft"}}
OBJECTIVES["replay"] = {"gate": "sft", "replay": 0.1}  # type: ignore[dict-item]


def main() -> None:
    """Run all, and write the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32, help="to train on, up to 84")
    parser.add_argument("--no_compare", action="store_true", help="leave eaft compare out")
    flags = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    found = subprocess.run(
        [sys.executable, DEMO / "find_model.py"], check=True, capture_output=True, text=True
    )
    model = found.stdout.strip()
    rows = (DEMO / "data" / "gsm8k.jsonl").read_text().splitlines(keepends=True)
    rows = sorted(rows, key=len)[: flags.rows + HELD_OUT]
    (WORK / "train.jsonl").write_text("".join(rows[HELD_OUT:]))
    (WORK / "held_out.jsonl").write_text("".join(rows[:HELD_OUT]))
    config = str(WORK / "config.yaml")
    recipe = yaml.safe_load((DEMO / "tune.yaml").read_text())
    Path(config).write_text(yaml.safe_dump({**recipe, "num_train_epochs": EPOCHS}))
    train = ["train", "--model_name_or_path", model, "--dataset_name", str(WORK / "train.jsonl")]
    train += ["--config", config, "--gate", "sft", "--output_dir", str(WORK / "out")]
    eval_ = ["eval", str(WORK / "out"), "--base", model]
    eval_ += ["--held_out", str(WORK / "held_out.jsonl"), "--output_path", str(WORK / "eval")]
    eval_ += ["--drift_prompts", str(2 * PROMPTS), "--max_new_tokens", str(TOKENS)]
    tune = ["tune", model, str(WORK / "train.jsonl"), "--max_drift", BUDGET, "--config", config]
    tune += ["--held_out", str(WORK / "held_out.jsonl"), "--output_dir", str(WORK / "tuned")]
    tune += ["--screening_prompts", str(PROMPTS), "--confirmation_prompts", str(PROMPTS)]
    tune += ["--max_new_tokens", str(TOKENS)]
    measured: dict[str, dict[str, float]] = {}
    commands = [("train", "plain", train), ("eval", "plain", eval_), ("tune", "tune", tune)]
    if not flags.no_compare:
        commands.append(("compare", "compare", ["compare", "--config", str(write_recipe(model))]))
    for name, cache, arguments in commands:
        measured[name] = run(cache, arguments)
        settings = {"rows": flags.rows, "epochs": EPOCHS, "held_out": HELD_OUT}
        settings |= {"prompts": 2 * PROMPTS, "tokens": TOKENS}
        result = {"settings": settings, "measured": measured, "ratios": ratios_of(measured)}
        file = ROOT / "benchmarks" / "results" / f"tune_{flags.rows}.json"
        write_json(file, {**result, "environment": environment()})
    for name, ratio in ratios_of(measured).items():
        print(f"{name}: {ratio:.2f}")


def ratios_of(measured: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the ratios of what has been measured."""
    if "tune" not in measured:
        return {}
    tune, train, plain = measured["tune"], measured["train"], 0.0
    plain = train["cpu_seconds"] + measured["eval"]["cpu_seconds"]
    # The part of `tune` that training more would not change
    rest = tune["cpu_seconds"] - train["cpu_seconds"] - 1.3 * measured["eval"]["cpu_seconds"]
    ratios = {
        "tune / (train + eval), CPU time": tune["cpu_seconds"] / plain,
        "tune / train, peak memory": tune["peak_gib"] / train["peak_gib"],
        "training, as a multiple of this one, at which tune is 1.3 (train + eval)": max(
            rest / (0.3 * train["cpu_seconds"]), 0
        ),
    }
    if "compare" in measured:
        ratio = tune["cpu_seconds"] / measured["compare"]["cpu_seconds"]
        ratios["tune / compare of four, CPU time"] = ratio
    return ratios


def write_recipe(model: str) -> Path:
    """Write the recipe of `eaft compare` and return its path."""
    train = yaml.safe_load((WORK / "config.yaml").read_text())
    train |= {"model_name_or_path": model, "dataset_name": str(WORK / "train.jsonl")}
    train |= {"save_strategy": "steps", "save_steps": 0.25, "save_only_model": True}
    recipe = {
        "output_dir": str(WORK / "compare"),
        "seeds": [0],
        "objectives": OBJECTIVES,
        "train": train,
        "evaluate": {
            "held_out": str(WORK / "held_out.jsonl"),
            "drift_prompts": 2 * PROMPTS,
            "max_new_tokens": TOKENS,
        },
    }
    file = WORK / "compare.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def run(cache: str, arguments: list[str]) -> dict[str, float]:
    """Run a command of eaft, and return its CPU seconds, with those of the processes it started,
    and the peak memory (GiB) of the largest process."""
    print("eaft", " ".join(arguments), flush=True)
    own = {**os.environ, "EAFT_CACHE": str(WORK / f"cache-{cache}"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, "-m", "eaft", *arguments], env=own, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"eaft {arguments[0]} failed")
    return {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gib": usage.ru_maxrss / 2**20,
    }


if __name__ == "__main__":
    main()
