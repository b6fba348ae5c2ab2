"""
What `eaft tune` costs beside a plain training run with one evaluation, and beside `eaft compare` of
four objectives: wall time and peak memory, as ratios, all in one run.

    python benchmarks/tune.py                    # from the repository's root; about half an hour
    python benchmarks/tune.py --no_compare       # without the four objectives: a third of that

All train on the same rows of GSM8K, for the same epochs, and measure the same held-out rows and
drift prompts. Nothing is kept from one to the next: each has a cache of its own. Writes
benchmarks/results/tune.json.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from eaft.provenance import environment, write_json

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "recipes" / "demo"
WORK = ROOT / "runs" / "benchmark-tune"
BUDGET = "0.05"
OBJECTIVES = {"sft": {"gate": "sft"}, "eaft": {"gate": "eaft"}, "dft": {"gate": "dft"}}
OBJECTIVES["replay"] = {"gate": "sft", "replay": 0.1}  # type: ignore[dict-item]


def main() -> None:
    """Run all, and write the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no_compare", action="store_true", help="leave eaft compare out")
    flags = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    found = subprocess.run(
        [sys.executable, DEMO / "find_model.py"], check=True, capture_output=True, text=True
    )
    model = found.stdout.strip()
    rows = (DEMO / "data" / "gsm8k.jsonl").read_text().splitlines(keepends=True)
    held_out = len(rows) // 5
    (WORK / "train.jsonl").write_text("".join(rows[held_out:]))
    (WORK / "held_out.jsonl").write_text("".join(rows[:held_out]))
    config = str(DEMO / "tune.yaml")
    train = ["train", "--model_name_or_path", model, "--dataset_name", str(WORK / "train.jsonl")]
    train += ["--config", config, "--gate", "sft", "--output_dir", str(WORK / "out")]
    eval_ = ["eval", str(WORK / "out"), "--base", model]
    eval_ += ["--held_out", str(WORK / "held_out.jsonl"), "--output_path", str(WORK / "eval")]
    tune = ["tune", model, str(WORK / "train.jsonl"), "--max_drift", BUDGET, "--config", config]
    tune += ["--held_out", str(WORK / "held_out.jsonl"), "--output_dir", str(WORK / "tuned")]
    measured = {
        "train": run("plain", train),
        "eval": run("plain", eval_),
        "tune": run("tune", tune),
    }
    if not flags.no_compare:
        recipe = write_recipe(model)
        measured["compare"] = run("compare", ["compare", "--config", str(recipe)])
    plain = measured["train"]["seconds"] + measured["eval"]["seconds"]
    ratios = {
        "tune / (train + eval), time": measured["tune"]["seconds"] / plain,
        "tune / train, peak memory": measured["tune"]["peak_gib"] / measured["train"]["peak_gib"],
    }
    if "compare" in measured:
        ratio = measured["tune"]["seconds"] / measured["compare"]["seconds"]
        ratios["tune / compare of four, time"] = ratio
    result = {"measured": measured, "ratios": ratios, "environment": environment()}
    write_json(ROOT / "benchmarks" / "results" / "tune.json", result)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")


def write_recipe(model: str) -> Path:
    """Write the recipe of `eaft compare` and return its path."""
    train = yaml.safe_load((DEMO / "tune.yaml").read_text())
    train |= {"model_name_or_path": model, "dataset_name": str(WORK / "train.jsonl")}
    train |= {"save_strategy": "steps", "save_steps": 0.25, "save_only_model": True}
    recipe = {
        "output_dir": str(WORK / "compare"),
        "seeds": [0],
        "objectives": OBJECTIVES,
        "train": train,
        "evaluate": {"held_out": str(WORK / "held_out.jsonl")},
    }
    file = WORK / "compare.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def run(cache: str, arguments: list[str]) -> dict[str, Any]:
    """Run a command of eaft, and return its wall time (s) and the peak memory (GiB) of the largest
    process."""
    print("eaft", " ".join(arguments), flush=True)
    own = {**os.environ, "EAFT_CACHE": str(WORK / f"cache-{cache}"), "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "eaft", *arguments], env=own, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"eaft {arguments[0]} failed")
    return {"seconds": time.monotonic() - began, "peak_gib": usage.ru_maxrss / 2**20}


if __name__ == "__main__":
    main()
