"""
Write GSM8K answers that contradict what the model is sure of, the study's second dose, into
runs/study/data.

    python -m benchmarks.study.make_conflicts runs/study/models/s1

after make_rows.py. In a share p of the answers, where the model is surest of what comes, and right:
in `format` a mark comes first, in `fact` a digit is another; at `CHANGED` places of an answer,
since with more the model stops being sure. `gsm8k-format-0.5-0.jsonl` has seed 0's rows with p =
0.5. What is held out is changed alike for the format, which is to be learned; facts stay.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.study.make_rows import SEEDS, Row, read, write
from eaft import token_statistics

KINDS = ("format", "fact")
SHARES = [0.5, 1.0]
CHANGED = 4
MARK = "~"


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model of make_models.py")
    parser.add_argument("--data_dir", type=Path, default=Path("runs/study/data"))
    flags = parser.parse_args()
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(flags.model),
        AutoTokenizer.from_pretrained(flags.model),
    )
    trained: dict[tuple[str, float], list[Row]] = {
        (kind, share): [] for kind in KINDS for share in SHARES
    }
    for seed, name in enumerate([*map("-{}".format, range(SEEDS)), "_held_out"]):
        rng = random.Random(seed)
        rows = read(flags.data_dir / f"gsm8k{name}.jsonl")
        order = rng.sample(range(len(rows)), len(rows))
        changed = [contradict(model, tokenizer, row, rng) for row in rows]
        for kind in KINDS:
            for share in SHARES:
                drawn = (
                    set()
                    if (kind, name) == ("fact", "_held_out")
                    else set(order[: round(share * len(rows))])
                )
                mixed = [changed[i][kind] if i in drawn else row for i, row in enumerate(rows)]
                write(flags.data_dir / f"gsm8k-{kind}-{share:g}{name}.jsonl", mixed)
                trained[kind, share] += mixed if name != "_held_out" else []
    for (kind, share), rows in trained.items():
        write(flags.data_dir / f"gsm8k-{kind}-{share:g}.jsonl", rows)


@torch.no_grad()
def contradict(model: Any, tokenizer: Any, row: Row, rng: random.Random) -> dict[str, Row]:
    """
    Return by kind a row whose answer contradicts the model where it is surest: a mark, or another
    digit.
    """
    chat = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    answer = row["completion"][0]["content"]
    encoded = tokenizer(chat + answer, return_offsets_mapping=True, return_tensors="pt")
    ids, spans = encoded["input_ids"][0], encoded["offset_mapping"][0].tolist()
    stats = token_statistics(model(ids[None]).logits[0, :-1], ids[1:])
    texts = {kind: list(chat + answer) for kind in KINDS}
    left = dict.fromkeys(KINDS, CHANGED)
    for t in stats.entropy.argsort().tolist():
        start, end = spans[t + 1]
        if start < len(chat) or not stats.is_top1[t]:
            continue
        if left["format"]:
            texts["format"][start] = MARK + texts["format"][start]
            left["format"] -= 1
        if left["fact"] and (chat + answer)[start:end].strip().isdigit():
            texts["fact"][start:end] = [
                another_digit(c, rng) if c.isdigit() else c for c in texts["fact"][start:end]
            ]
            left["fact"] -= 1
    return {
        kind: {**row, "completion": [{"role": "assistant", "content": "".join(text)[len(chat) :]}]}
        for kind, text in texts.items()
    }


def another_digit(digit: str, rng: random.Random) -> str:
    """Return a digit that is not this one."""
    return str((int(digit) + rng.randint(1, 9)) % 10)


if __name__ == "__main__":
    main()
