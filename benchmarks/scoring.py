"""
What scoring costs beside a bare forward pass of the same batches (`model(input_ids).logits`): at
most 1.15 of it.

    .venv/bin/python benchmarks/scoring.py

SmolLM2-135M-Instruct on GSM8K's first questions and answers, with answers labelled and with
everything labelled; both are timed in turn, batch by batch. Then the whole command on the same
rows: bytes a token on disk. Writes benchmarks/results/scoring.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
DATA = ROOT / "recipes" / "inspect" / "gsm8k.jsonl"
RESULTS = ROOT / "benchmarks" / "results" / "scoring.json"
ROUNDS = 3


def seconds(run: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(scorer: Any, tokens: Any, budget: int) -> dict[str, Any]:
    """Return what both take, from the median of each batch's rounds; the rounds of both in turn."""
    from eaft.inspection.score.examples import batches

    found = []
    for batch in batches(tokens, budget):
        ids = np.zeros((len(batch), int(tokens.lengths[batch].max())), np.int64)
        for row, i in enumerate(batch):
            ids[row, : tokens.lengths[i]] = tokens.ids[tokens.starts[i] :][: tokens.lengths[i]]
        inputs = torch.from_numpy(ids).to(scorer.device)

        def bare(inputs: torch.Tensor = inputs) -> None:
            with scorer.computing():
                scorer.model(input_ids=inputs, use_cache=False)

        def scored(batch: list[int] = batch) -> None:
            scorer.statistics(tokens, batch)

        rounds = [(seconds(bare), seconds(scored)) for _ in range(ROUNDS + 1)][1:]
        found.append([statistics.median(pair[i] for pair in rounds) for i in (0, 1)])
    bare_s, scored_s = (sum(pair[i] for pair in found) for i in (0, 1))
    total = int(tokens.lengths.sum())
    return {
        "tokens": total,
        "labelled": int(tokens.labelled.sum()),
        "batches": len(found),
        "bare_tokens_per_s": round(total / bare_s),
        "scored_tokens_per_s": round(total / scored_s),
        "ratio": round(scored_s / bare_s, 3),
    }


def main() -> None:
    """Measure, print and write."""
    from datasets import Dataset

    from eaft import cli
    from eaft.commands.inspect import make_parser, named
    from eaft.evaluation.model_settings import load_tokenizer
    from eaft.files import read_jsonl
    from eaft.inspection.score.examples import Examples
    from eaft.inspection.score.model import (
        BATCH_TOKENS,
        GPU_BATCH_TOKENS,
        ScoringModel,
        Settings,
    )
    from eaft.models import resolve_model
    from eaft.provenance import environment, write_json
    from eaft.training.arguments import parse
    from eaft.training.prepare import prepare_rows

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=DATA, help="rows with prompt and completion, as messages"
    )
    parser.add_argument("--rows", type=int, default=24)
    flags = parser.parse_args()
    find_model = [sys.executable, str(ROOT / "recipes" / "demo" / "find_model.py")]
    model = resolve_model(
        subprocess.run(find_model, capture_output=True, text=True, check=True).stdout.strip()
    )
    rows = read_jsonl(flags.data, dict[str, Any], "give JSON Lines.")[: flags.rows]
    configs, *_ = parse(named([model, "rows"]), make_parser())
    _, args, model_args, *_ = configs
    scorer = ScoringModel(model, Settings(args, model_args))
    budget = GPU_BATCH_TOKENS if scorer.device.type == "cuda" else BATCH_TOKENS
    results: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "rows": flags.rows,
        "batch_tokens": budget,
    }
    results["threads"] = torch.get_num_threads()
    for name, data in (
        ("answers", rows),
        ("everything", [{"messages": r["prompt"] + r["completion"]} for r in rows]),
    ):
        dataset = Dataset.from_list(data)
        examples = Examples(
            prepare_rows(load_tokenizer(model), args, dataset), dataset, "gsm8k", []
        )
        tokens = examples.tokens(range(len(dataset)))
        scorer.statistics(tokens, [0])  # the logits are checked once
        results[name] = measure(scorer, tokens, budget)
        print(name, results[name])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cli.main(["inspect", model, str(file), "--output_dir", f"{folder}/inspection"])
        size = sum(part.stat().st_size for part in Path(folder, "inspection", "tokens").iterdir())
        results["bytes_per_token"] = round(size / results["answers"]["tokens"], 1)
    print(f"{results['bytes_per_token']} bytes a token on disk")
    write_json(RESULTS, {**results, "environment": environment()})


if __name__ == "__main__":
    main()
