"""
Whole training steps of the real model: tokens a second and peak memory.

    .venv/bin/python benchmarks/train.py                # ours beside TRL's SFTTrainer and
    transformers' Trainer .venv/bin/python benchmarks/train.py --objectives   # every gate, full and
    LoRA, with the pass before training

SmolLM2-135M-Instruct, each run in a process of its own, round after round. Writes
benchmarks/results/train.json, or objectives.json.
"""

import argparse
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
RESULTS = ROOT / "benchmarks" / "results"
TRL = "TRL's SFTTrainer"
PLAIN, PATCHED = "transformers' Trainer", "transformers' Trainer, patch_model, gate eaft"
STEPS = 6  # the first is not timed
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "learning_rate": 1e-5,
    "bf16": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "seed": 0,
}


def rows(long: bool) -> list[dict[str, Any]]:
    """
    Return the demo's requests and calls; `long` joins eight of them into one conversation of about
    300 tokens.
    """
    lines = (ROOT / "recipes/demo/data/train.jsonl").read_text().splitlines()
    examples = [json.loads(line) for line in lines]
    if not long:
        return examples
    turns = [example["prompt"] + example["completion"] for example in examples]
    n = len(turns)
    return [{"messages": [turn for j in range(8) for turn in turns[(i + j) % n]]} for i in range(n)]


def measure(contender: str, peft: bool, long: bool) -> dict[str, Any]:
    """
    Train a few steps in this process; return the seconds of each, tokens a step, the pass's
    seconds, peak GiB.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    from eaft import EAFTConfig, EAFTTrainer, patch_model
    from eaft.models import resolve_model
    from eaft.provenance import peak_memory_gib

    class Clock(TrainerCallback):
        times: list[float] = []  # noqa: RUF012 - one instance

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

        on_train_end = on_step_begin

    find_model = [sys.executable, str(ROOT / "recipes" / "demo" / "find_model.py")]
    gguf = subprocess.run(find_model, capture_output=True, text=True, check=True).stdout.strip()
    settings = {
        **SETTINGS,
        "use_cpu": not torch.cuda.is_available(),
        "per_device_train_batch_size": 4 if long else 8,
    }
    with tempfile.TemporaryDirectory() as out:
        kwargs = {
            "train_dataset": Dataset.from_list(rows(long)),
            "peft_config": LoraConfig(r=16, target_modules="all-linear") if peft else None,
        }
        trainer: Any
        if contender in (TRL, PLAIN, PATCHED):
            trainer = SFTTrainer(resolve_model(gguf), args=SFTConfig(out, **settings), **kwargs)
            if contender != TRL:  # the same model, rows and batches
                if contender == PATCHED:
                    patch_model(trainer.model, gate="eaft")
                args = TrainingArguments(
                    out, include_num_input_tokens_seen="non_padding", **settings
                )
                trainer = Trainer(trainer.model, args, trainer.data_collator, trainer.train_dataset)
        else:
            trainer = EAFTTrainer(
                resolve_model(gguf), args=EAFTConfig(out, gate=contender, **settings), **kwargs
            )
        clock = Clock()
        trainer.add_callback(clock)
        start = time.perf_counter()
        trainer.train()
    return {
        "contender": contender,
        "peft": peft,
        "step_s": [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)],
        "tokens_per_step": (
            getattr(trainer, "_total_train_tokens", trainer.state.num_input_tokens_seen) / STEPS
        ),
        "pass_s": (
            clock.times[0] - start
            if isinstance(trainer, EAFTTrainer) and trainer.gated_lm_head.gate.must_be_measured
            else 0.0
        ),
        "peak_gib": peak_memory_gib(),
    }


def run(jobs: list[tuple[str, bool, bool]]) -> list[dict[str, Any]]:
    """Measure each in a process of its own."""
    found = []
    for contender, peft, long in tqdm(jobs):
        command = [sys.executable, __file__, "--measure", contender, str(int(peft)), str(int(long))]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.append(json.loads(output.splitlines()[-1]))
    return found


def spread(values: list[float], digits: int = 2) -> str:
    """Return the median and the range."""
    return (
        f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to"
        f" {max(values):.{digits}f})"
    )


def compare_trainers() -> None:
    """Measure ours, TRL's and transformers', three rounds of each."""
    from eaft.provenance import environment, write_json

    contenders, rounds = [TRL, "sft", "eaft", PLAIN, PATCHED], 3
    runs = run([(name, False, True) for _ in range(rounds) for name in contenders])
    table = []
    for name in contenders:
        mine = [r for r in runs if r["contender"] == name]
        rates = [r["tokens_per_step"] / seconds for r in mine for seconds in r["step_s"]]
        memory = [r["peak_gib"] for r in mine]
        label = f"EAFTTrainer, gate {name}" if name in ("sft", "eaft") else name
        table.append([label, spread(rates, 0), spread(memory)])
    print(
        tabulate(
            table, ["trainer", "tokens/s", "peak GiB"], tablefmt="github", disable_numparse=True
        )
    )
    write_json(
        RESULTS / "train.json", {"settings": SETTINGS, "runs": runs, "environment": environment()}
    )


def compare_objectives() -> None:
    """Measure every gate once, full and LoRA."""
    from eaft.objective.registry import GATES
    from eaft.provenance import environment, write_json

    runs = run([(gate, peft, False) for peft in (False, True) for gate in GATES])
    table = []
    for gate in GATES:
        mine = [r for r in runs if r["contender"] == gate]
        cells = [cell for r in mine for cell in (spread(r["step_s"]), f"{r['peak_gib']:.2f}")]
        table.append([gate, *cells, f"{max(r['pass_s'] for r in mine):.0f}"])
    headers = ["gate", "full: s/step", "peak GiB", "LoRA: s/step", "peak GiB", "pass, s"]
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))
    write_json(
        RESULTS / "objectives.json",
        {"settings": SETTINGS, "runs": runs, "environment": environment()},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--objectives", action="store_true", help="every gate, instead of ours beside TRL's"
    )
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        print(
            json.dumps(measure(flags.measure[0], *(bool(int(flag)) for flag in flags.measure[1:])))
        )
    elif flags.objectives:
        compare_objectives()
    else:
        compare_trainers()
