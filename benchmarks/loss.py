"""
The loss from hidden states: time and memory of ours and its peers, side by side.

    .venv/bin/python benchmarks/loss.py            # the sizes that this machine can run
    .venv/bin/python benchmarks/loss.py --quick    # one small size

Every contender gets hidden states `[N, H]`, a head `[V, H]` and labels; gives both gradients. Times
are taken in one process, contender after contender, several rounds, and once more in a process for
each, where memory is measured as the growth of the peak over what the inputs take. The floor is
what three matrix products on the labelled positions take at the rate this machine reaches, and what
one writing and four readings of their logits take at its copying rate. Writes
benchmarks/results/loss.json, loss.md and loss.png.
"""

import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PEERS = [
    "llamafactory==0.9.5",
    "axolotl==0.19.0",
    "omegaconf==2.3.0",
    "antlr4-python3-runtime==4.9.3",
]
CUDA_PEERS = ["liger-kernel==0.8.5", "cut-cross-entropy==25.1.1"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 10 if DEVICE == "cuda" else 2
HEADS = {  # vocabulary and width
    "SmolLM2-135M": (49152, 576),
    "Qwen3-0.6B": (151936, 1024),
    "Qwen3-4B": (151936, 2560),
    "Gemma-3-1B": (262144, 1152),
}


@dataclass(frozen=True)
class Size:
    """One line of the table."""

    head: str
    tokens: int
    labelled: float
    dtype: str


if DEVICE == "cuda":
    SIZES = [
        Size(head, n, labelled, "bfloat16")
        for head in HEADS
        for n in (1024, 4096, 16384, 32768)
        for labelled in (0.5, 1.0)
    ]
else:  # a naive step of more takes minutes, and more than 24 GB
    SIZES = [
        Size("Qwen3-0.6B", 4096, 0.5, "float32"),
        Size("Qwen3-0.6B", 4096, 0.5, "bfloat16"),
        Size("SmolLM2-135M", 4096, 0.5, "float32"),
        *(Size("SmolLM2-135M", n, 1.0, "float32") for n in (256, 1024, 2048, 8192)),
        Size("SmolLM2-135M", 2048, 1.0, "bfloat16"),
        *(Size("Qwen3-0.6B", 1024, 1.0, dtype) for dtype in ("float32", "bfloat16")),
    ]
QUICK = [Size("SmolLM2-135M", 256, 0.5, "float32")]
GPU = [  # of benchmarks/gpu.py: what fits three minutes
    Size("Qwen3-4B", 4096, 0.5, "bfloat16"),
    Size("Qwen3-4B", 16384, 1.0, "bfloat16"),
    Size("Gemma-3-1B", 8192, 1.0, "bfloat16"),
]


def make_inputs(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, head and labels whose distributions are about as sharp as a model's."""
    vocab, width = HEADS[size.head]
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, size.dtype)
    hidden = torch.randn(size.tokens, width, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (
        (torch.randn(vocab, width, generator=generator) * 3 / math.sqrt(width))
        .to(DEVICE, dtype)
        .requires_grad_()
    )
    labels = torch.randint(vocab, (size.tokens,), generator=generator)
    labels[torch.rand(size.tokens, generator=generator) >= size.labelled] = -100
    return hidden, weight, labels.to(DEVICE)


class Outputs(dict[str, Tensor]):
    """A model's outputs, as the peers read them: by key or by attribute."""

    __getattr__ = dict.__getitem__


def contenders() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Return the functions from hidden states, head and labels to the loss."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    from eaft import linear_gated_cross_entropy

    def unshifted(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """
        The peers take logits `[1, N, V]` and shift the labels, by which the last position loses its
        own.
        """

        def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            logits = (hidden @ weight.T).unsqueeze(0)
            return function(
                Outputs(logits=logits), torch.cat([labels[:1], labels[:-1]]).unsqueeze(0)
            )

        return loss

    def trl_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        kept = labels != -100
        if DEVICE == "cuda":  # as TRL's head does
            hidden, labels, kept = hidden[kept], labels[kept], kept[kept]
        log_probs, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden,
            weight,
            None,
            labels.clamp(min=0),
            1.0,
            _CHUNKED_LOGPROB_CHUNK_SIZE,
            None,
            1.0,
            OUTPUTS,
        )
        gate = (entropy.detach() / math.log(20)).clamp(max=1)
        return -(gate * log_probs * kept).sum() / kept.sum()

    def torch_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # Its default size of a chunk is many times slower at some shapes
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=TORCH_CHUNK)
        return torch.nn.functional.linear_cross_entropy(hidden, weight, labels, options=options)

    def liger_scaled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden, weight, labels, return_entropy=True
        )[:2]
        gate = (entropy.detach() / math.log(20)).clamp(max=1)
        return (gate * nll).sum() / (labels != -100).sum()

    found = {
        "eaft": lambda h, w, y: linear_gated_cross_entropy(h, w, y, "eaft"),
        "eaft, gate sft": lambda h, w, y: linear_gated_cross_entropy(h, w, y, "sft"),
        "plain cross-entropy": lambda h, w, y: cross_entropy((h @ w.T).float(), y),
        "TRL's head, gated": trl_head,
    }
    if hasattr(LOADED, "llamafactory"):  # not among the wheels that gpu.md carries
        found["LLaMA-Factory EAFT"] = unshifted(LOADED.llamafactory)
        found["Axolotl EAFT"] = unshifted(LOADED.axolotl)
    if hasattr(torch.nn.functional, "linear_cross_entropy"):  # torch 2.13
        found["torch's own"] = torch_loss
    if DEVICE == "cuda":
        from cut_cross_entropy import linear_cross_entropy
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
            LigerFusedLinearScaledCrossEntropyFunction,
        )
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        found["Liger"] = lambda h, w, y: LigerFusedLinearCrossEntropyLoss()(w, h, y)
        found["Liger DFT"] = lambda h, w, y: LigerFusedLinearCrossEntropyLoss(
            use_token_scaling=True
        )(w, h, y)
        found["Liger, exact entropy"] = liger_scaled
        found["cut-cross-entropy"] = lambda h, w, y: linear_cross_entropy(h, w, y)
    return found


TORCH_CHUNK = 512  # rows
LOADED = SimpleNamespace()
OUTPUTS = ("entropy", "is_top1")  # of TRL's head, as its trainer asks for them


def load_peers(folder: str) -> None:
    """Import the peers' functions from the scratch folder."""
    import trl

    os.environ["DISABLE_VERSION_CHECK"] = (
        "1"  # LLaMA-Factory's, of libraries its loss functions do not use
    )
    sys.path.insert(0, folder)
    if not (Path(folder) / "llamafactory").is_dir():
        return
    vars(trl).setdefault(
        "AutoModelForCausalLMWithValueHead", None
    )  # LLaMA-Factory imports it from an older TRL
    LOADED.llamafactory = importlib.import_module("llamafactory.train.trainer_utils").eaft_loss_func
    LOADED.axolotl = importlib.import_module("axolotl.monkeypatch.loss.eaft").eaft_loss


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def step(function: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Return the seconds that one loss with its gradients takes."""
    inputs[0].grad = inputs[1].grad = None
    synchronize()
    start = time.perf_counter()
    function(*inputs).backward()
    synchronize()
    return time.perf_counter() - start


def measure_times(size: Size) -> dict[str, list[float]]:
    """
    Return each contender's seconds, interleaved; what a first call costs is spent on another size
    before.
    """
    functions, inputs = contenders(), make_inputs(size)
    times: dict[str, list[float]] = {name: [] for name in functions}
    warm_up = inputs if DEVICE == "cuda" else make_inputs(QUICK[0])
    for function in functions.values():
        step(function, warm_up)
    for _ in range(ROUNDS if size.tokens * HEADS[size.head][0] < 5e8 else 1):
        for name, function in functions.items():
            times[name].append(step(function, inputs))
    return times


def measure_memory(size: Size, name: str) -> tuple[float, float]:
    """Return by how many GiB one step raises this process's peak, and its seconds."""
    function = contenders()[name]
    inputs = make_inputs(size)
    step(function, make_inputs(QUICK[0]))  # libraries' own start-up
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = step(function, inputs)
        return (torch.cuda.max_memory_allocated() - before) / 2**30, seconds
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    seconds = step(function, inputs)
    return (status("VmHWM") - before) / 2**20, seconds


def status(field: str) -> int:
    """Return a field of this process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def floor(size: Size) -> dict[str, float]:
    """
    Return the seconds of the three products, at the measured rate, and of the passes over the
    logits.
    """
    from eaft.objective.check import best_seconds, product_rate

    vocab, width = HEADS[size.head]
    n = round(size.tokens * size.labelled)
    dtype = getattr(torch, size.dtype)
    device = torch.device(DEVICE)
    big = torch.zeros(2**27 if DEVICE == "cpu" else 2**29, dtype=torch.uint8, device=device)
    copy = torch.zeros_like(big)
    rate = product_rate(min(n, 1024), vocab, width, dtype, device)
    copied = 2 * big.nbytes / best_seconds(lambda: copy.copy_(big), device)
    return {
        "products_s": 3 * 2 * n * vocab * width / rate,
        "passes_s": 5 * n * vocab * dtype.itemsize / copied,
        "rate_tflops": rate / 1e12,
        "copy_gb_s": copied / 1e9,
    }


def worker(request: dict[str, Any]) -> Any:
    """Do one measurement in this process."""
    load_peers(request["peers"])
    size = Size(**request["size"])
    if request["what"] == "times":
        found: dict[str, Any] = {"times": measure_times(size), "floor": floor(size)}
        if DEVICE == "cuda":  # a CPU's peak is a process's, and needs one for each contender
            found["memory_gib"] = {name: measure_memory(size, name)[0] for name in found["times"]}
        return found
    return measure_memory(size, request["what"])


def ask(**request: Any) -> Any:
    """Do one measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(request)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def measure(sizes: list[Size], install: bool) -> Iterator[dict[str, Any]]:
    """Measure every size; `install` fetches the peers, else those are measured that are there."""
    from tqdm import tqdm

    with tempfile.TemporaryDirectory() as peers:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", peers]
        if install:
            subprocess.run([*pip, *PEERS, *(CUDA_PEERS if DEVICE == "cuda" else [])], check=True)
        for size in tqdm(sizes):
            found = ask(what="times", size=asdict(size), peers=peers)
            if "memory_gib" not in found:
                found["memory_gib"] = {}
                for name in found["times"]:
                    memory, seconds = ask(what=name, size=asdict(size), peers=peers)
                    found["memory_gib"][name] = memory
                    found["times"][name].append(seconds)
            yield {"size": asdict(size), **found}


def table(results: list[dict[str, Any]]) -> str:
    """Return a row for each size and contender: time and memory, and both over ours."""
    rows = []
    for result in results:
        size, best = result["size"], sum(result["floor"][k] for k in ("products_s", "passes_s"))
        ours = statistics.median(result["times"]["eaft"])
        for name, times in result["times"].items():
            median = statistics.median(times)
            memory = result["memory_gib"][name]
            rows.append(
                [
                    (
                        f"{size['head']}, {size['tokens']} tokens, {size['labelled']:.0%} labelled,"
                        f" {size['dtype']}"
                    ),
                    name,
                    f"{median:.3g} ({min(times):.3g} to {max(times):.3g})",
                    f"{ours / median:.2f}",
                    f"{best / median:.0%}",
                    f"{memory:.2f}",
                    f"{result['memory_gib']['eaft'] / memory:.2f}",
                ]
            )
            if name != "eaft":
                rows[-1][0] = ""
        floor_s = result["floor"]
        rows[-len(result["times"]) + 1][0] = (
            f"floor: products {floor_s['products_s']:.3g} s, passes {floor_s['passes_s']:.3g} s"
        )
    headers = [
        "size",
        "loss",
        "seconds",
        "eaft's / its time",
        "floor / time",
        "peak GiB",
        "eaft's / its memory",
    ]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory of every contender, a group of bars for each size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(11, 7), layout="constrained", sharex=True)
    names = list(results[0]["times"])
    for i, name in enumerate(names):
        places = [j + (i - len(names) / 2) * 0.8 / len(names) for j in range(len(results))]
        for axis, values in (
            (axes[0], [statistics.median(r["times"][name]) for r in results]),
            (axes[1], [r["memory_gib"][name] for r in results]),
        ):
            axis.bar(places, values, 0.8 / len(names), label=name, color=plt.get_cmap("tab10")(i))
    floors = [sum(r["floor"][k] for k in ("products_s", "passes_s")) for r in results]
    left, right = ([j + d for j in range(len(results))] for d in (-0.5, 0.4))
    axes[0].hlines(floors, left, right, "black", "dotted")
    sizes = [Size(**r["size"]) for r in results]
    axes[1].set_xticks(
        range(len(results)),
        [f"{s.head}\n{s.tokens} tokens, {s.labelled:.0%}\n{s.dtype}" for s in sizes],
        fontsize=8,
    )
    for axis, label in zip(
        axes, ("seconds (dotted: floor)", "peak memory beside the inputs, GiB"), strict=True
    ):
        axis.set(ylabel=label, yscale="log")
        axis.grid(axis="y", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, write."""
    from eaft.provenance import commit, environment, write_json

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small size; nothing is written")
    parser.add_argument(
        "--only",
        default="",
        help="sizes that contain this, as in bfloat16; results of others are kept",
    )
    parser.add_argument(
        "--gpu", action="store_true", help="benchmarks/gpu.py's sizes, into loss_gpu.*; no download"
    )
    flags = parser.parse_args()
    sizes = QUICK if flags.quick else GPU if flags.gpu else SIZES
    chosen = [size for size in sizes if flags.only in str(size)]
    file = RESULTS / ("loss_gpu.json" if flags.gpu else "loss.json")
    found = {}
    if flags.only and file.is_file():
        found = {
            str(Size(**result["size"])): result
            for result in json.loads(file.read_text())["results"]
        }
    for result in measure(chosen, install=not flags.gpu):
        found[str(Size(**result["size"]))] = {**result, "commit": commit()}
        results = [found[str(size)] for size in sizes if str(size) in found]
        print(table(results), flush=True)
        if not flags.quick:
            write_json(file, {"results": results, "environment": environment()})
            file.with_suffix(".md").write_text(table(results) + "\n")
            draw(results, file.with_suffix(".png"))


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(json.dumps(worker(json.loads(sys.argv[1]))))
    else:
        main()
