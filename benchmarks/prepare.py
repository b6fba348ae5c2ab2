"""
Preparing the training data: what following every token's example costs beside TRL's own
preparation, at scale.

    .venv/bin/python benchmarks/prepare.py --rows 10000 100000 1000000        # rows of 200 tokens
    .venv/bin/python benchmarks/prepare.py --rows 10000 --tokens 2000 --append

Synthetic prompts and completions, a vocabulary of words. Every run is a process of its own with an
empty cache, TRL's and ours in turn. `TRL` is `SFTTrainer._prepare_dataset`; `talr` is ours for a
gate that must know each token's example; `flow` for one that is also measured, whose bookkeeping is
timed with a model that does nothing: collating, sums, histograms and the fingerprint. Seconds of
the processor, which neighbours disturb less, and by the clock. Memory is the peak of the process
and its workers, beside what the trainer took before: anonymous memory, since files that are mapped
(Arrow's) can be dropped at any time. Writes benchmarks/results/prepare.json and prepare.md.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false"
)

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from tabulate import tabulate
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from eaft import EAFTConfig, EAFTTrainer, TokenStatistics
from eaft.provenance import environment
from eaft.training.gate_measurements import MeasureGate, fingerprint

RESULTS = Path(__file__).parent / "results"
WORDS = [f"word{i}" for i in range(5000)]
CONTENDERS = ["TRL", "talr", "flow"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every word is a token."""
    vocab = {word: i for i, word in enumerate(["<unk>", "<pad>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=10**9,
    )


def make_data(path: Path, rows: int, tokens: int) -> None:
    """
    Write prompts and completions, a quarter and three quarters of about `tokens` (half to one and a
    half of it).
    """
    generator, words = np.random.default_rng(0), np.array(WORDS, dtype=object)
    schema = pa.schema({"prompt": pa.string(), "completion": pa.string()})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for start in range(0, rows, 1000):
            lengths = generator.integers(tokens // 2, tokens * 3 // 2, min(1000, rows - start))
            texts = [words[generator.integers(len(words), size=n)] for n in lengths]
            prompts = [" ".join(text[: len(text) // 4]) + " " for text in texts]
            completions = [" ".join(text[len(text) // 4 :]) + " " for text in texts]
            writer.write_table(pa.table([prompts, completions], schema=schema))


class Watch(threading.Thread):
    """Takes time and memory from now on, of this process and its workers."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done, self.before, self.peak = threading.Event(), self.memory(), 0.0
        self.cpu, self.clock = sum(os.times()[:4]), time.perf_counter()
        self.start()

    def memory(self) -> float:
        """Return the anonymous memory used now, in MiB; what processes share is counted once."""
        me, total = os.getpid(), 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if me in (int(folder.name), parent):
                    lines = (folder / "smaps_rollup").read_text().splitlines()
                    total += int(
                        next(line for line in lines if line.startswith("Pss_Anon")).split()[1]
                    )
            except (OSError, StopIteration):  # it has ended
                continue
        return total / 1024

    def run(self) -> None:
        """Sample until told to stop."""
        while not self.done.wait(0.3):
            self.peak = max(self.peak, self.memory())

    def stop(self, name: str) -> dict[str, float]:
        """Return seconds by the clock and of the processor, and the memory's growth to its peak."""
        clock, cpu = time.perf_counter() - self.clock, sum(os.times()[:4]) - self.cpu
        self.done.set()
        self.join()
        growth = max(self.peak, self.memory()) - self.before
        return {f"{name}_clock_s": clock, f"{name}_cpu_s": cpu, f"{name}_mib": max(growth, 0)}


class Idle:
    """A model that does nothing; the head finds statistics that were there before."""

    def __init__(self, head: Any) -> None:
        self.head = head
        values = torch.rand(2, 2**18, generator=torch.Generator().manual_seed(0))
        self.log_prob, self.entropy = values[0].log(), values[1] * 2.9

    def __call__(self, labels: torch.Tensor, **kwargs: Any) -> None:
        """Leave as many statistics as there are labels."""
        n = int((labels[:, 1:] != -100).sum())
        log_prob, entropy = self.log_prob[:n], self.entropy[:n]
        stats = TokenStatistics(log_prob, entropy, entropy, entropy, entropy > 0, top_k=20)
        self.head.losses = SimpleNamespace(statistics=stats)

    def eval(self) -> None:
        """Do nothing."""

    train = eval


def run_one(
    contender: str, packing: bool, tokens: int, workers: int, folder: Path
) -> dict[str, float]:
    """Prepare the data in `folder` and return seconds and MiB."""
    found: dict[str, float] = {}

    class Timed(SFTTrainer if contender == "TRL" else EAFTTrainer):  # type: ignore[misc]
        """Times the preparation, and nothing else of the trainer."""

        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            watch = Watch()
            prepared = super()._prepare_dataset(*args, **kwargs)
            found.update(watch.stop("prepare"))
            return prepared

    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "max_length": tokens * 2,
        "packing": packing,
        "dataset_num_proc": workers,
        "shuffle_dataset": True,
    }
    args = SFTConfig(**settings) if contender == "TRL" else EAFTConfig(gate=contender, **settings)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=5003,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    data = Dataset.from_file(str(folder / "data.arrow"))
    trainer = Timed(model, args=args, train_dataset=data, processing_class=make_tokenizer())
    if contender == "flow":
        gate = next(c for c in trainer.callback_handler.callbacks if isinstance(c, MeasureGate))
        gate.model = lambda: Idle(gate.head)
        watch = Watch()
        fingerprint(gate.dataset)
        _, counts, _, _ = gate.run_base_model(args.per_device_eval_batch_size)
        found.update(watch.stop("measure"), labelled_tokens=int(counts.sum()))
    return found


def measure(
    rows: int,
    tokens: int,
    workers: int,
    repeats: int,
    work: Path,
    contenders: list[str],
    packings: list[str],
) -> list[dict[str, Any]]:
    """Run the contenders `repeats` times, in turn, and return a line for each."""
    source = work / f"{rows}x{tokens}.arrow"
    make_data(source, rows, tokens)
    runs: dict[tuple[bool, str], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for packing in (choice == "yes" for choice in packings):
            for contender in contenders:
                folder = work / "run"
                folder.mkdir()
                os.link(source, folder / "data.arrow")
                command = [
                    sys.executable,
                    __file__,
                    "--one",
                    contender,
                    str(int(packing)),
                    str(tokens),
                    str(workers),
                ]
                environ = {**os.environ, "TMPDIR": str(folder), "HF_HOME": str(folder)}
                done = subprocess.run(
                    [*command, str(folder)], env=environ, capture_output=True, text=True
                )
                if done.returncode:
                    raise RuntimeError(done.stderr[-3000:])
                found = json.loads(done.stdout.splitlines()[-1])
                disk = sum(
                    f.stat().st_size
                    for f in folder.rglob("*")
                    if f.is_file() and f.name != "data.arrow"
                )
                runs.setdefault((packing, contender), []).append(
                    {**found, "disk_mib": disk / 2**20}
                )
                print(
                    rows,
                    tokens,
                    packing,
                    contender,
                    {k: round(v, 1) for k, v in found.items()},
                    flush=True,
                )
                shutil.rmtree(folder)
    source.unlink()
    return [
        {
            "rows": rows,
            "tokens": tokens,
            "workers": workers,
            "packing": p,
            "contender": c,
            "runs": found,
        }
        for (p, c), found in runs.items()
    ]


def table(lines: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: medians over the runs, and the range of times."""

    def total(run: dict[str, float], kind: str) -> float:
        return run[f"prepare_{kind}"] + run.get(f"measure_{kind}", 0)

    def seconds(runs: list[dict[str, float]], key: str) -> str:
        times = [run[key] for run in runs if key in run]
        if not times:
            return ""
        text = f"{statistics.median(times):,.1f}"
        return text if len(times) == 1 else f"{text} ({min(times):,.1f}-{max(times):,.1f})"

    def median(runs: list[dict[str, float]], key: str) -> str:
        return f"{statistics.median(run[key] for run in runs):,.0f}" if key in runs[0] else ""

    trls = {
        (x["rows"], x["tokens"], x["packing"]): x["runs"] for x in lines if x["contender"] == "TRL"
    }
    cells = []
    for x in sorted(lines, key=lambda x: (x["rows"] * x["tokens"], x["rows"], x["packing"])):
        runs = x["runs"]
        # Run by run: both had the same neighbours
        pairs = list(zip(runs, trls[x["rows"], x["tokens"], x["packing"]], strict=True))
        ratios = {
            k: statistics.median(total(run, k) / total(trl, k) for run, trl in pairs)
            for k in ("cpu_s", "clock_s")
        }
        cells.append(
            {
                "rows": f"{x['rows']:,}",
                "tokens a row": x["tokens"],
                "packed": "yes" if x["packing"] else "no",
                "": x["contender"],
                "preparing, CPU s": seconds(runs, "prepare_cpu_s"),
                "measuring, CPU s": seconds(runs, "measure_cpu_s"),
                "all / TRL, CPU": f"{ratios['cpu_s']:.2f}",
                "by the clock": f"{ratios['clock_s']:.2f}",
                "preparing, MiB": median(runs, "prepare_mib"),
                "measuring, MiB": median(runs, "measure_mib"),
                "disk, MiB": median(runs, "disk_mib"),
                "runs": len(runs),
            }
        )
    return tabulate(cells, headers="keys", tablefmt="pipe", disable_numparse=True)


def main() -> None:
    """Measure, or with `--one` be one measured process."""
    if sys.argv[1:2] == ["--one"]:
        contender, packing, tokens, workers, folder = sys.argv[2:]
        print(
            json.dumps(run_one(contender, packing == "1", int(tokens), int(workers), Path(folder)))
        )
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--tokens", type=int, default=200, help="tokens a row, on average")
    parser.add_argument("--workers", type=int, default=2, help="dataset_num_proc")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS, help="TRL is one of them"
    )
    parser.add_argument("--packing", nargs="+", default=["no", "yes"], choices=["no", "yes"])
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/eaft-prepare"), help="scratch folder; is emptied"
    )
    parser.add_argument("--append", action="store_true", help="keep the lines that are there")
    parser.add_argument(
        "--note", default="", help="written into the results: what else ran meanwhile"
    )
    flags = parser.parse_args()
    file = RESULTS / "prepare.json"
    lines = json.loads(file.read_text())["lines"] if flags.append else []
    for rows in flags.rows:
        shutil.rmtree(flags.work, ignore_errors=True)
        flags.work.mkdir(parents=True)
        lines += measure(
            rows,
            flags.tokens,
            flags.workers,
            flags.repeats,
            flags.work,
            flags.contenders,
            flags.packing,
        )
        machine = environment()
        found = {
            "date": date.today().isoformat(),
            "environment": asdict(machine),
            "note": flags.note,
            "lines": lines,
        }
        file.write_text(json.dumps(found, indent=1) + "\n")
        head = (
            f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib} GiB;"
            f" {flags.workers} workers. "
        )
        note = f"{flags.note}\n" if flags.note else ""
        (RESULTS / "prepare.md").write_text(
            f"{head}{note}\n{table(lines)}\n\nSee `benchmarks/prepare.py`.\n"
        )
    shutil.rmtree(flags.work, ignore_errors=True)


if __name__ == "__main__":
    main()
