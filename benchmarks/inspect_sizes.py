"""
What `eaft inspect` costs on 10^3 and on 10^6 rows: rows are read until the answer is known.

    .venv/bin/python -m benchmarks.inspect_sizes mmlu_stem.jsonl

Questions of MMLU (STEM) with their answers, repeated, each with a number of its own, so that no row
equals another; SmolLM2-135M-Instruct in float32, one thread, after the model is in the cache. The
file is JSON Lines. Seconds are of the clock, and of the processor (user and system time of the
process). Writes benchmarks/results/inspect_sizes.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.replication.make_data import read
from eaft.provenance import environment, write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "inspect_sizes.json"
SIZES = (10**3, 10**6)


def row(number: int, item: dict[str, Any]) -> dict[str, Any]:
    """Return a question and its answer as a row, with its number in the question."""
    choices = "; ".join(item["choices"])
    question = f"Question {number}: {item['question']}\nChoose from: {choices}"
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": item["choices"][item["answer"]]}],
    }


def measure(model: str, data: Path, folder: Path) -> dict[str, Any]:
    """Return the seconds of one `eaft inspect`, and how many rows it scored."""
    flags = ["--bf16", "false", "--use_cpu", "--output_dir", str(folder)]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "eaft", "inspect", model, str(data), *flags],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    run = json.loads((folder / "run.json").read_text())
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "sample": run["sample"]}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="mmlu_stem.jsonl")
    flags = parser.parse_args()
    find_model = [sys.executable, str(ROOT / "recipes" / "demo" / "find_model.py")]
    model = subprocess.run(find_model, capture_output=True, text=True, check=True).stdout.strip()
    items, found = read(flags.data), []
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            data = Path(folder) / f"{size}.jsonl"
            with data.open("w") as file:
                for number in range(size):
                    file.write(json.dumps(row(number, items[number % len(items)])) + "\n")
            found.append({"rows": size, "bytes": data.stat().st_size})
            found[-1] |= measure(model, data, Path(folder) / str(size))
            print(found[-1], flush=True)
            write_json(RESULTS, {"sizes": found, "environment": environment()})


if __name__ == "__main__":
    main()
