"""
Write the study's data into runs/study/data: prompt and completion, JSON Lines.

    python -m benchmarks.study.make_rows ../shared/data

from the repository's root; the folder holds `gsm8k_train.jsonl` and `gsm8k_test.jsonl` (`question`,
`answer`, as on the Hub). Each seed has 32 rows of its own to train on (`gsm8k-0.jsonl`, ...). What
is trained on, what chooses the checkpoint (`held_out`), and what is scored (`test`) share no row.
`--demo` writes the demo's GSM8K rows into its folder
instead: the next ones, which no seed trains on or chooses by.
"""

import argparse
import json
import random
from pathlib import Path

from benchmarks.replication.make_data import DEMO, Row, read
from benchmarks.replication.make_data import gsm8k as gsm8k_rows

SEEDS, ROWS, HELD_OUT, TEST = 5, 32, 32, 32


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_dir", type=Path, help="holds GSM8K")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/study/data"))
    parser.add_argument("--demo", action="store_true", help="the demo's rows, and no others")
    flags = parser.parse_args()
    gsm8k, gsm8k_test = (
        gsm8k_rows(flags.data_dir / f"gsm8k_{split}.jsonl") for split in ("train", "test")
    )
    if flags.demo:
        used = SEEDS * ROWS + HELD_OUT
        write(DEMO / "gsm8k_train.jsonl", gsm8k[used:][:ROWS])
        write(DEMO / "gsm8k_held_out.jsonl", gsm8k[used + ROWS :][:HELD_OUT])
        return
    write(flags.output_dir / "gsm8k_held_out.jsonl", gsm8k[SEEDS * ROWS :][:HELD_OUT])
    write(flags.output_dir / "gsm8k_test.jsonl", gsm8k_test[:TEST])
    calls, calls_test = (read(DEMO / f"{split}.jsonl") for split in ("train", "test"))
    write(flags.output_dir / "function_calls_held_out.jsonl", calls_test[-HELD_OUT:])
    write(flags.output_dir / "function_calls_test.jsonl", calls_test[:TEST])
    # All that any seed trains on, to measure the dose of
    write(flags.output_dir / "gsm8k.jsonl", gsm8k[: SEEDS * ROWS])
    write(flags.output_dir / "function_calls.jsonl", calls)
    for seed in range(SEEDS):
        write(flags.output_dir / f"gsm8k-{seed}.jsonl", gsm8k[seed * ROWS :][:ROWS])
        # Of 80 requests each seed draws some: a few are in several seeds'
        write(
            flags.output_dir / f"function_calls-{seed}.jsonl",
            random.Random(seed).sample(calls, ROWS),
        )


def write(file: Path, rows: list[Row]) -> None:
    """Write rows as JSON Lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
