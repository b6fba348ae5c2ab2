"""
Everything that has to be measured on a GPU, in one command of at most ten minutes.

    python3 benchmarks/gpu.py --wheels .wheels --out "$OUT"      # on the GPU machine
    .venv/bin/python benchmarks/gpu.py --rehearse --out /tmp/gpu # the parts that a CPU can run

gpu.md says which wheels the machine needs and how to carry them. Each part runs in a process of its
own with a limit of time. A part that fails is reported, and the next one begins. After each part
gpu.json and the part's log are written to --out, so that a run that is stopped leaves what it has.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = [
    f"tests/objective/test_{name}.py" for name in ("triton_backend", "fused", "fused_exactness")
]
SHOWN = 4000  # characters of a log that are printed


@dataclass(frozen=True)
class Part:
    """A command, its limit in seconds, and its form for a machine without a GPU (None: none)."""

    name: str
    command: list[str]
    limit: int
    rehearsal: list[str] | None = None


@dataclass
class Outcome:
    """What became of a part: its exit code (None: the limit was passed) and its seconds."""

    name: str
    code: int | None
    seconds: float


def parts() -> list[Part]:
    """Return the parts in order of importance, with limits that add up to nine minutes."""
    return [
        Part("check", ["-m", "eaft", "env", "--check"], 100, ["-m", "eaft", "env"]),
        Part(
            "loss",
            ["benchmarks/loss.py", "--gpu"],
            200,
            ["benchmarks/loss.py", "--quick"],
        ),
        Part("tests", ["-m", "pytest", "-q", "-n", "4", "-p", "no:cacheprovider", *TESTS], 130),
        Part(
            "steps",
            ["benchmarks/gpu.py", "--steps"],
            110,
            ["benchmarks/gpu.py", "--steps", "--tiny"],
        ),
    ]


def install(wheels: Path) -> None:
    """Install the carried wheels and this checkout, without an index."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    files = sorted(str(file) for file in wheels.glob("*.whl"))
    subprocess.run([*pip, *files], check=True)
    subprocess.run([*pip, "--no-build-isolation", "-e", str(ROOT)], check=True)


def run(part: Part, command: list[str], out: Path) -> Outcome:
    """Run a part, keep its log, and print the log's end."""
    log = out / f"{part.name}.log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=part.limit,
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    outcome = Outcome(part.name, code, round(time.monotonic() - began, 1))
    print(f"== {outcome}\n{log.read_text(errors='replace')[-SHOWN:]}", flush=True)
    return outcome


def training_steps(tiny: bool) -> None:
    """Print tokens a second and peak memory of training steps, ours beside TRL's, in turn."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    from eaft import EAFTConfig, EAFTTrainer

    # Qwen3-0.6B's sizes; random weights, since nothing can be downloaded
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    vocab, length, batch = (151_936, 2048, 4) if not tiny else (512, 64, 2)
    if tiny:
        shape |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = Qwen3Config(vocab_size=vocab, tie_word_embeddings=True, **shape, **heads)
    words = {"<eos>": 0, "<unk>": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        eos_token="<eos>",
        pad_token="<eos>",
    )
    ids = torch.randint(2, vocab, (64, length), generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"input_ids": ids.tolist()})
    on_gpu = torch.cuda.is_available()
    contenders: list[tuple[str, Any, Any, dict[str, str]]] = [
        ("TRL", SFTTrainer, SFTConfig, {}),
        ("eaft sft", EAFTTrainer, EAFTConfig, {"gate": "sft"}),
        ("eaft", EAFTTrainer, EAFTConfig, {"gate": "eaft"}),
    ]
    for name, trainer_of, config_of, gate in contenders:
        seconds = []
        for steps in (3, 11):  # the difference leaves the start out
            torch.manual_seed(0)
            args = config_of(
                "/tmp/eaft-gpu-steps",
                max_steps=steps,
                per_device_train_batch_size=batch,
                max_length=length,
                bf16=on_gpu,
                use_cpu=not on_gpu,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                **gate,
            )
            trainer = trainer_of(
                Qwen3ForCausalLM(config), args=args, train_dataset=rows, processing_class=tokenizer
            )
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            seconds.append(trainer.train().metrics["train_runtime"])
        rate = 8 * batch * length / (seconds[1] - seconds[0])
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
        print(f"{name}: {rate:,.0f} tokens/s, peak {peak:.2f} GiB", flush=True)


def beside_the_model(results: Path) -> None:
    """Print the share of the floor that the cost model expects, beside what was measured."""
    expected = json.loads((ROOT / "benchmarks" / "results" / "kernels.json").read_text())["shares"]
    for result in json.loads((results / "loss_gpu.json").read_text())["results"]:
        size, floor = result["size"], result["floor"]
        labelled = round(size["tokens"] * size["labelled"])
        best = floor["products_s"] + floor["passes_s"]
        share = best / statistics.median(result["times"]["eaft"])
        model = [s["share"] for s in expected if s["tokens"] == labelled and "H100" in s["gpu"]]
        text = f"model (H100, products alone) {max(model):.0%}" if model else "model: none"
        print(f"{size['head']}, {labelled} labelled: floor / time {share:.0%}; {text}")


def main() -> None:
    """Run every part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install first")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="where logs and gpu.json go")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.steps:
        training_steps(flags.tiny)
        return
    flags.out.mkdir(parents=True, exist_ok=True)
    if flags.wheels:
        install(flags.wheels)
    outcomes = []
    for part in parts():
        command = part.rehearsal if flags.rehearse else part.command
        if command is None:
            continue
        outcomes.append(asdict(run(part, command, flags.out)))
        (flags.out / "gpu.json").write_text(json.dumps(outcomes, indent=2) + "\n")
    results = ROOT / "benchmarks" / "results"
    for file in results.glob("loss_gpu.*"):
        (flags.out / file.name).write_bytes(file.read_bytes())
    if (results / "loss_gpu.json").is_file():
        beside_the_model(results)
    print(f"Written to {flags.out}: gpu.json, logs, and loss_gpu.* if the loss was measured.")


if __name__ == "__main__":
    main()
