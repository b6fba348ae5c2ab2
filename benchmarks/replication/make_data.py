"""
Write the data of the replication's recipes into runs/replication/data: prompt and completion, JSON
Lines.

    python benchmarks/replication/make_data.py ../shared/data

from the repository's root; the folder holds `gsm8k_train.jsonl` and `gsm8k_test.jsonl` (`question`,
`answer`, as on the Hub). What is trained on, what chooses the checkpoint (`held_out`), and what is
scored share no row.
"""

import argparse
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CHARACTERS = (
    240  # of a question and its answer together, at most: what two CPU cores can go over often
)
DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "data"


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_dir", type=Path, help="holds GSM8K")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/replication/data"))
    flags = parser.parse_args()
    train, test = (gsm8k(flags.data_dir / f"gsm8k_{split}.jsonl") for split in ("train", "test"))
    demo = {split: read(DEMO / f"{split}.jsonl") for split in ("train", "test")}
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in {
        "gsm8k_train": train[:32],
        "gsm8k_held_out": train[32:96],
        "gsm8k_test": test[:50],
        "function_calls_train": demo["train"][:48],
        "function_calls_held_out": demo["test"][68:],
        "function_calls_test": demo["test"][:68],
    }.items():
        (flags.output_dir / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )


def gsm8k(file: Path, characters: int = CHARACTERS) -> list[Row]:
    """Return GSM8K's rows that are short enough, as messages."""
    return [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in read(file)
        if len(row["question"]) + len(row["answer"]) <= characters
    ]


def read(file: Path) -> list[Row]:
    """Return a JSON Lines file's rows."""
    return [json.loads(line) for line in file.read_text().split("\n") if line]


if __name__ == "__main__":
    main()
