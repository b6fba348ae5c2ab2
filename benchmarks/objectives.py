"""
What each objective costs: seconds a step, peak memory, and the pass before training, on the real model.

    .venv/bin/python benchmarks/objectives.py

SmolLM2-135M-Instruct on the demo's rows, full fine-tuning and LoRA, each in a process of its own. Writes
benchmarks/results/objectives.json.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
STEPS = 6  # the first is not timed
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-5,
    "bf16": True,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "seed": 0,
}


def measure(gate: str, peft: bool) -> dict[str, Any]:
    """Train a few steps in this process; return the step times in seconds, the pass's, and the peak memory in GiB."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback

    from eaft import EAFTConfig, EAFTTrainer
    from eaft.models import resolve_model
    from eaft.provenance import peak_memory_gib
    from eaft.trainer import must_be_measured

    class Clock(TrainerCallback):
        times: list[float] = []  # noqa: RUF012 - one instance

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

        on_train_end = on_step_begin

    find_model = [sys.executable, str(ROOT / "recipes" / "demo" / "find_model.py")]
    gguf = subprocess.run(find_model, capture_output=True, text=True, check=True).stdout.strip()
    rows = [json.loads(line) for line in (ROOT / "recipes/demo/data/train.jsonl").read_text().splitlines()]
    with tempfile.TemporaryDirectory() as out:
        trainer = EAFTTrainer(
            resolve_model(gguf),
            args=EAFTConfig(out, gate=gate, **SETTINGS),
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(r=16, target_modules="all-linear") if peft else None,
        )
        clock = Clock()
        trainer.add_callback(clock)
        start = time.perf_counter()
        trainer.train()
        before = clock.times[0] - start if must_be_measured(trainer.args) else 0.0
    steps = [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
    return {"gate": gate, "peft": peft, "step_s": steps, "pass_s": before, "peak_gib": peak_memory_gib()}


def main() -> None:
    """Measure every gate, print a table, write the results."""
    from eaft.gates import GATES
    from eaft.provenance import environment, write_json

    jobs = [(gate, peft) for peft in (False, True) for gate in GATES]
    runs = []
    for gate, peft in tqdm(jobs):
        command = [sys.executable, __file__, gate, str(int(peft))]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        runs.append(json.loads(output.splitlines()[-1]))
    write_json(
        ROOT / "benchmarks" / "results" / "objectives.json",
        {"settings": SETTINGS, "runs": runs, "environment": environment()},
    )
    table = []
    for gate in GATES:
        row = [gate]
        for run in runs:
            if run["gate"] == gate:
                times = run["step_s"]
                row.append(f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})")
                row.append(f"{run['peak_gib']:.2f}")
        table.append([*row, f"{max(run['pass_s'] for run in runs if run['gate'] == gate):.1f}"])
    headers = ["gate", "full: s/step", "peak GiB", "LoRA: s/step", "peak GiB", "pass, s"]
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(json.dumps(measure(sys.argv[1], bool(int(sys.argv[2])))))
