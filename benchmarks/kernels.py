"""
What the Triton kernels cost, without a GPU: compiled, their instructions counted, a model made of
the counts.

    .venv/bin/python benchmarks/kernels.py

Every launch of `eaft.objective.triton_backend` is recorded as the loss would make it, compiled for
an A100 and an H100, and its machine code (SASS) read with the tools in Triton's wheel. A kernel
takes, per logit, the time of its slowest limit. The loss takes the time of three matrix products,
of the kernels, and of reading and writing the head's gradient. All of it is a model: nothing here
was run on a GPU. Writes benchmarks/results/kernels.json and kernels.md.
"""

import os

# The compiler, not the interpreter; and not a warning that the default changes: every launch says
# what it wants
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from tabulate import tabulate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eaft.objective import triton_backend
from eaft.objective.chunk import LogitTransform
from eaft.objective.registry import Anchor
from eaft.provenance import environment

RESULTS = Path(__file__).parent / "results"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = ["score_kernel", "diverge_kernel", "gradient_kernel"]


@dataclass(frozen=True)
class Gpu:
    """
    Peak figures: bandwidth, SMs, boost clock and dense bf16 rate from NVIDIA's data sheets and
    white papers.

    Operations of a clock and SM are from the CUDA C++ Programming Guide, "Arithmetic Instructions".
    """

    name: str
    target: str
    bandwidth: float  # bytes a second
    sms: int
    clock: float  # Hz
    tensor: float  # FLOP a second, bf16, dense
    # additions, multiplications, fused ones; also IMAD, which moves and shifts on the same pipe
    fp32: int
    max_warps: int  # resident on an SM
    alu: int = 64  # comparisons, selections, integers, conversions
    mufu: int = 16  # exponentials, reciprocals
    lsu: int = 32  # loads, stores, shuffles
    issue: int = 128  # of any kind: 4 schedulers, a warp of 32 each
    registers: int = 65536  # of an SM


GPUS = [
    Gpu("A100 SXM 80 GB", "sm_80", 2.039e12, 108, 1.410e9, 312e12, fp32=64, max_warps=64),
    Gpu("H100 SXM", "sm_90", 3.35e12, 132, 1.755e9, 989e12, fp32=128, max_warps=64),
]
# What a program is taken to reach of a peak; assumed, from what is usual
REACHED = {
    "bandwidth": 0.9,
    "fp32": 0.8,
    "alu": 0.8,
    "mufu": 0.8,
    "lsu": 0.8,
    "issue": 0.8,
    "tensor": 0.7,
}


@dataclass(frozen=True)
class Case:
    """What the kernels are compiled for."""

    dtype: str = "bfloat16"
    vocab: int = 151936
    softcap: float | None = None
    logit_scale: float = 1.0
    direction: Literal["forward", "reverse"] = "forward"
    top_k: int = 20
    padded: bool = True


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, with what it was given."""

    name: str
    kernel: Any
    args: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record launches instead of making them."""
    launches: list[Launch] = []
    kernels = {name: getattr(triton_backend, name) for name in KERNELS}

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                names = kernels[self.name].arg_names
                given = dict(zip(names, args, strict=False)) | kwargs
                options = {name: given.pop(name) for name in set(given) - set(names)}
                launches.append(Launch(self.name, kernels[self.name], given, options, grid))

            return launch

    try:
        for name in KERNELS:
            setattr(triton_backend, name, Recorder(name))
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(triton_backend, name, kernel)


def launches(case: Case) -> dict[str, Launch]:
    """Return the launches that a chunk takes, by what they do."""
    rows, width = 2, triton.cdiv(case.vocab, 16) * 16 if case.padded else case.vocab
    projection = torch.empty((2 * rows, width), dtype=getattr(torch, case.dtype))[
        :rows, : case.vocab
    ]
    reference = torch.empty((2 * rows, width), dtype=getattr(torch, case.dtype))[
        :rows, : case.vocab
    ]
    labels, weights = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    transform = LogitTransform(case.logit_scale, case.softcap)
    with recorded_launches() as found:
        scores = triton_backend.score(projection, labels, case.top_k, transform)
        divergence = triton_backend.diverge(
            projection, reference, labels, scores, Anchor(1.0, case.direction), transform
        )
        triton_backend.gradient_(projection, labels, weights, scores, transform)
        triton_backend.gradient_(projection, labels, weights, scores, transform, divergence, 0.5)
    return dict(zip(("score", "diverge", "gradient", "gradient with KL"), found, strict=True))


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Compile a launch for a target, its arguments specialised as Triton's launcher does."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.args[parameter.name]
        divisible = False
        if parameter.is_constexpr:
            kind = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            kind = "*" + triton.runtime.jit.mangle_type(value).removeprefix("*").removesuffix("D")
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            kind = "i32"
            divisible = value % 16 == 0
        else:
            kind = "fp32"
        signature[parameter.name] = kind
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = launch.options
    if target.warp_size == 64:  # as `launch_options` has it there
        options = {**options, "num_warps": options["num_warps"] // 2}
    return triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes), target=target, options=options
    )


def run_tool(tool: str, *flags: str, cubin: bytes) -> str:
    """Return what one of NVIDIA's tools says about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [TOOLS / tool, *flags, file.name], capture_output=True, text=True, check=True
        ).stdout


def resources(compiled: Any) -> dict[str, int]:
    """Return registers a thread, bytes of stack, local and shared memory."""
    usage = run_tool("cuobjdump", "-res-usage", cubin=compiled.asm["cubin"])
    found = {
        name: int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL")
    }
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "local": found["LOCAL"],
        "shared": compiled.metadata.shared,
    }


@dataclass(frozen=True)
class Code:
    """
    A kernel's instructions (operation with its modifiers), in the innermost loop and outside of
    loops.
    """

    loop: list[str]
    rest: list[str]


def read_code(compiled: Any) -> Code:
    """
    Return the machine code up to its last exit.

    What comes after it is for warps that have diverged (older targets have copies of the shuffles
    there), which ours never do.
    """
    text = run_tool("cuobjdump", "-sass", cubin=compiled.asm["cubin"])
    code = [
        (int(at, 16), re.sub(r"^@!?U?P\w+\s+", "", line))
        for at, line in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text, re.M)
    ]
    last = max(i for i, (_, line) in enumerate(code) if line.startswith("EXIT"))
    code = [(at, line) for at, line in code[: last + 1] if not line.startswith("NOP")]
    loops = []
    for at, line in code:
        jump = re.match(r"BRA\b.*?0x([0-9a-f]+)", line)
        if jump and int(jump[1], 16) < at:
            loops.append(
                Code(
                    *(
                        [op(x) for at_, x in code if (int(jump[1], 16) <= at_ <= at) == inside]
                        for inside in (True, False)
                    )
                )
            )
    loops = [loop for loop in loops if any(operation.startswith("MUFU") for operation in loop.loop)]
    return min(
        loops, key=lambda loop: len(loop.loop), default=Code([], [op(line) for _, line in code])
    )


def op(line: str) -> str:
    """Return a line's operation, with its modifiers."""
    return line.split()[0]


def kind_of(operation: str) -> str:
    """Return which unit takes an instruction."""
    name = operation.split(".")[0]
    if name == "MUFU":
        return "mufu"
    if name in (
        "LDG",
        "STG",
        "LDS",
        "STS",
        "SHFL",
        "LDGSTS",
        "LD",
        "ST",
        "LDSM",
        "ATOM",
        "ATOMS",
        "RED",
    ):
        return "lsu"
    if name in ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "HFMA2", "IMAD"):
        return "fp32"
    # The scalar unit, control flow, barriers: they only take an issue slot
    if name.startswith("U") or name in (
        "BAR",
        "BRA",
        "EXIT",
        "DEPBAR",
        "LDGDEPBAR",
        "WARPSYNC",
        "S2R",
        "CS2R",
        "LDC",
    ):
        return "other"
    return "alu"


def slots(operation: str) -> int:
    """
    Return how often an instruction takes its unit: a load of 128 bits moves four times what a clock
    does.
    """
    if kind_of(operation) != "lsu" or operation.startswith("SHFL"):
        return 1
    return 4 if ".128" in operation else 2 if ".64" in operation else 1


def per_logit(launch: Launch, code: Code) -> dict[str, float]:
    """Return what a logit takes of each unit, with the parts outside the loop spread over a row."""
    vocab, block, lanes = (launch.args[name] for name in ("n_columns", "BLOCK", "LANES"))
    # The score kernel's loop takes whole blocks, its cut-off last block is outside
    turns = vocab // block if launch.name == "score_kernel" else triton.cdiv(vocab, block)
    share = vocab / lanes  # logits of a thread in a row
    if not code.loop:  # a program a block
        turns, share = 0, block / lanes * (vocab / (triton.cdiv(vocab, block) * block))

    def count(match: Any, weigh: Any = lambda operation: 1) -> float:
        sums = [
            sum(weigh(operation) for operation in part if match(operation))
            for part in (code.loop, code.rest)
        ]
        return (turns * sums[0] + sums[1]) / share

    units = {
        unit: count(lambda operation, unit=unit: kind_of(operation) == unit, slots)
        for unit in ("fp32", "alu", "mufu", "lsu")
    }
    return {
        "issue": count(lambda operation: True),
        **units,
        "loads": count(lambda operation: operation.startswith(("LDG.", "LDGSTS."))),
        "stores": count(lambda operation: operation.startswith("STG")),
        "exponentials": count(lambda operation: operation.startswith("MUFU.EX2")),
        "shuffles": count(lambda operation: operation.startswith("SHFL")),
        "barriers of a row": count(lambda operation: operation.startswith("BAR")) * share,
    }


def bytes_per_logit(what: str, launch: Launch) -> float:
    """
    Return what a logit moves to and from memory; scratch is written, and read again from the cache.
    """
    element = launch.args["projection_ptr"].element_size()
    moved = {"score": 1, "diverge": 2, "gradient": 2, "gradient with KL": 3}[what] * element
    groups = launch.args.get("groups_ptr")
    if groups is not None and groups.dim() > 1:
        moved += 4 * launch.args["LANES"] / launch.args["BLOCK"]
    return moved


def seconds_per_logit(gpu: Gpu, counts: dict[str, float], moved: float) -> dict[str, float]:
    """Return the time that each limit alone would take."""
    times = {"bandwidth": moved / (gpu.bandwidth * REACHED["bandwidth"])}
    for unit in ("issue", "fp32", "alu", "mufu", "lsu"):
        times[unit] = counts[unit] / (getattr(gpu, unit) * REACHED[unit] * gpu.sms * gpu.clock)
    return times


def warps_of_an_sm(gpu: Gpu, launch: Launch, used: dict[str, int]) -> int:
    """Return how many warps fit on an SM by their registers (given out in eights a thread)."""
    warps = launch.options["num_warps"]
    of_a_program = triton.cdiv(used["registers"], 8) * 8 * 32 * warps
    return min(gpu.registers // of_a_program * warps, gpu.max_warps)


def analyse(case: Case) -> list[dict[str, Any]]:
    """Return a line for each GPU and kernel."""
    lines = []
    for gpu in GPUS:
        for what, launch in launches(case).items():
            compiled = compile_launch(launch, TARGETS[gpu.target])
            lines.append(
                {
                    "gpu": gpu.name,
                    "kernel": what,
                    **asdict(case),
                    **cost(gpu, what, launch, compiled),
                }
            )
    return lines


def cost(gpu: Gpu, what: str, launch: Launch, compiled: Any) -> dict[str, Any]:
    """Return the counts of a compiled kernel and what they come to on a GPU."""
    code, used = read_code(compiled), resources(compiled)
    counts, moved = per_logit(launch, code), bytes_per_logit(what, launch)
    times = seconds_per_logit(gpu, counts, moved)
    limit = max(times, key=lambda name: times[name])
    return {
        **used,
        "warps_of_an_sm": warps_of_an_sm(gpu, launch, used),
        "instructions": len(code.loop) + len(code.rest),
        "loop": dict(Counter(code.loop).most_common()),
        "per_logit": counts,
        "bytes_per_logit": moved,
        "ns_per_logit": {name: time * 1e9 for name, time in times.items()},
        "limit": limit,
        "share_of_bandwidth": times["bandwidth"] / times[limit],
    }


def head_gradient_bytes(chunks: int) -> float:
    """
    Return the bytes an element of the head's gradient takes, beside the 2 that writing it in bf16
    does.

    One chunk's product is that writing. Of several, the first writes float32, others read and write
    it, the last in the backward pass; then one pass scales and casts.
    """
    return 0.0 if chunks == 1 else 4 + 8 * (chunks - 1) + 4 + 2 - 2


@dataclass(frozen=True)
class Share:
    """How the loss's time is made up, in seconds, and the share that is products."""

    gpu: str
    tokens: int  # labelled
    rows: int  # of a chunk, at most
    products: float
    kernels: float
    head_gradient: float
    share: float


def floors(
    lines: list[dict[str, Any]], chunk_rows: list[int], gradient_bytes: Callable[[int], float]
) -> list[Share]:
    """
    Return the shares of the floor of a gate without a reference in bf16, at `V` 151,936 and `H`
    2,560.
    """
    vocab, width, shares = 151936, 2560, []
    for gpu in GPUS:
        seconds = {
            line["kernel"]: max(line["ns_per_logit"].values()) * 1e-9
            for line in lines
            if (line["gpu"], line["vocab"], line["dtype"], line["softcap"])
            == (gpu.name, vocab, "bfloat16", None)
        }
        kernels = seconds["score"] + seconds["gradient"]
        for tokens in (2048, 16384):
            for rows in chunk_rows:
                element_bytes = gradient_bytes(triton.cdiv(tokens, rows))
                products = 6 * vocab * width * tokens / (gpu.tensor * REACHED["tensor"])
                traffic = element_bytes * vocab * width / (gpu.bandwidth * REACHED["bandwidth"])
                share = products / (products + kernels * vocab * tokens + traffic)
                shares.append(
                    Share(
                        gpu.name, tokens, rows, products, kernels * vocab * tokens, traffic, share
                    )
                )
    return shares


CASES = [
    Case(),
    Case(softcap=30.0),
    Case(dtype="float32"),
    Case(vocab=49152),
    Case(vocab=262208),
    Case(vocab=50257),
    Case(vocab=50257, padded=False),
]


def table(lines: list[dict[str, Any]]) -> str:
    """Return the lines as a Markdown table."""
    rows = []
    for line in lines:
        counts, times = line["per_logit"], line["ns_per_logit"]
        what = f"{line['kernel']}, {line['dtype']}, V {line['vocab']:,}"
        what += f", softcap {line['softcap']:g}" if line["softcap"] else ""
        what += "" if line["padded"] else ", rows not padded"
        rows.append(
            {
                "GPU": line["gpu"],
                "kernel": what,
                "bytes": f"{line['bytes_per_logit']:.2f}",
                "issued": f"{counts['issue']:.1f}",
                "MUFU": f"{counts['mufu']:.2f}",
                "loads": f"{counts['loads']:.3f}",
                "shuffles": f"{counts['shuffles']:.2f}",
                "barriers a row": f"{counts['barriers of a row']:.0f}",
                "registers": line["registers"],
                "warps of an SM": line["warps_of_an_sm"],
                "10^-3 ns a logit: memory": f"{1e3 * times['bandwidth']:.2f}",
                "issue": f"{1e3 * times['issue']:.2f}",
                "FP32": f"{1e3 * times['fp32']:.2f}",
                "ALU": f"{1e3 * times['alu']:.2f}",
                "exp": f"{1e3 * times['mufu']:.2f}",
                "LSU": f"{1e3 * times['lsu']:.2f}",
                "limit": line["limit"],
            }
        )
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def notes() -> str:
    """Return what the table rests on."""
    peaks = tabulate(
        [
            {
                **asdict(gpu),
                **{k: f"{getattr(gpu, k):.4g}" for k in ("bandwidth", "clock", "tensor")},
            }
            for gpu in GPUS
        ],
        headers="keys",
        tablefmt="github",
        disable_numparse=True,
    )
    reached = ", ".join(f"{name} {share:.0%}" for name, share in REACHED.items())
    return f"""A model, not a measurement: by `benchmarks/kernels.py` from machine code, on no GPU.

Time of a limit, a logit: bytes / bandwidth, or slots / (slots of a clock and SM * SMs * clock). A
kernel's time is its largest. Instructions outside the loop are spread over a row's logits, those of
branches that may not be taken too. Peaks are of NVIDIA's data sheets, slots of a clock and SM of
the CUDA C++ Programming Guide; what is reached of them is assumed: {reached}.

{peaks}
"""


def share_table(shares: list[dict[str, Any]]) -> str:
    """Return the shares of the floor as a Markdown table."""
    return tabulate(
        [
            {
                "GPU": share["gpu"],
                "labelled tokens": f"{share['tokens']:,}",
                "rows of a chunk": f"{share['rows']:,}",
                "products, ms": f"{1e3 * share['products']:.2f}",
                "kernels, ms": f"{1e3 * share['kernels']:.2f}",
                "head's gradient, ms": f"{1e3 * share['head_gradient']:.2f}",
                "share of the floor": f"{share['share']:.0%}",
            }
            for share in shares
        ],
        headers="keys",
        tablefmt="github",
        disable_numparse=True,
    )


def main() -> None:
    """Compile, count, write; what an earlier version cost is kept under `before`."""
    path = RESULTS / "kernels.json"
    before = json.loads(path.read_text()).get("before") if path.exists() else None
    lines = [line for case in CASES for line in analyse(case)]
    shares = [asdict(share) for share in floors(lines, [4096, 8192], head_gradient_bytes)]
    result: dict[str, Any] = {
        "environment": {**asdict(environment()), "triton": triton.__version__},
        "gpus": [asdict(gpu) for gpu in GPUS],
    }
    result |= {"reached": REACHED, "kernels": lines, "shares": shares, "before": before}
    path.write_text(json.dumps(result, indent=1) + "\n")
    text = (
        f"{notes()}\n{table(lines)}\n\nIn bf16, V = 151,936, H = 2,560:\n\n{share_table(shares)}\n"
    )
    if before:
        text += (
            f"\nBefore, at {before['commit']}:\n\n{table(before['kernels'])}\n\n"
            f"{share_table(before['shares'])}\n"
        )
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
