"""
Write the study's data into runs/study/data: prompt and completion, JSON Lines.

    python benchmarks/study/make_rows.py ../shared/data

from the repository's root; the folder holds `gsm8k_train.jsonl` and `gsm8k_test.jsonl` (`question`, `answer`, as on the
Hub). Each seed has 32 rows of its own to train on (`gsm8k-0.jsonl`, ...). What is trained on, what chooses the
checkpoint (`held_out`), and what is scored (`test`) share no row.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SEEDS, ROWS, HELD_OUT, TEST = 5, 32, 32, 32
CHARACTERS = 240  # of a question and its answer together, at most: what two CPU cores can go over often
DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "data"


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="holds GSM8K")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/study/data"))
    flags = parser.parse_args()
    gsm8k, gsm8k_test = (short_rows(flags.data_dir / f"gsm8k_{split}.jsonl") for split in ("train", "test"))
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
        write(flags.output_dir / f"function_calls-{seed}.jsonl", random.Random(seed).sample(calls, ROWS))


def short_rows(file: Path) -> list[Row]:
    """Return GSM8K's rows that are short enough, as messages."""
    return [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in read(file)
        if len(row["question"]) + len(row["answer"]) <= CHARACTERS
    ]


def read(file: Path) -> list[Row]:
    """Return a JSON Lines file's rows."""
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def write(file: Path, rows: list[Row]) -> None:
    """Write rows as JSON Lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
