"""
The CPU seconds of the whole `eaft inspect`, beside another build of it.

    .venv/bin/python -m benchmarks.inspect_cost pubmedqa_labeled.jsonl --other OTHER/bin/python

60 questions of PubMedQA with the authors' conclusions, SmolLM2-135M-Instruct in each build's own
default dtype, 6 rollouts, one thread each. The builds run in turn, each in a process of its own,
after the model is in the cache. CPU seconds are user and system time of the process and its
children. Writes benchmarks/results/inspect_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.budget.settings import pubmedqa_row
from benchmarks.replication.make_data import read
from eaft.provenance import environment, write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "inspect_cost.json"
ROWS, ROLLOUTS = 60, 6


def cpu_seconds(python: str, model: str, data: Path, folder: Path) -> float:
    """Return the CPU seconds of one `eaft inspect` with a build's Python."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    flags = ["--rollouts", str(ROLLOUTS), "--output_dir", str(folder)]
    subprocess.run(
        [python, "-m", "eaft", "inspect", model, str(data), *flags],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="pubmedqa_labeled.jsonl")
    parser.add_argument("--other", help="the Python of another build's environment")
    flags = parser.parse_args()
    find_model = [sys.executable, str(ROOT / "recipes" / "demo" / "find_model.py")]
    model = subprocess.run(find_model, capture_output=True, text=True, check=True).stdout.strip()
    builds = {"this": sys.executable} | ({"other": flags.other} if flags.other else {})
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        rows = [pubmedqa_row(row) for row in read(flags.data)[:ROWS]]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, python in builds.items():
            found[name] = round(cpu_seconds(python, model, data, Path(folder) / name), 1)
            print(name, found[name])
    write_json(RESULTS, {"cpu_seconds": found, "rows": ROWS, "environment": environment()})


if __name__ == "__main__":
    main()
