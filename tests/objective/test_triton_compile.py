"""
The Triton kernels compiled for real GPUs, none of which is needed: what their machine code holds,
and does not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip(
    "triton.backends.nvidia", reason="this Triton has no compiler for NVIDIA's GPUs"
)

ROOT = Path(__file__).parents[2]
ALL = ("score", "diverge", "gradient", "gradient with KL")
# All kernels of a chunk on the commonest target; elsewhere those that hold most. A kernel takes
# seconds to compile
CASES = [
    ("sm_90", {"dtype": "bfloat16", "vocab": 151936}, ALL),
    (
        "sm_80",
        {"dtype": "float32", "vocab": 49152, "softcap": 30.0, "direction": "reverse"},
        (ALL[0], ALL[3]),
    ),
    ("sm_90", {"dtype": "float16", "vocab": 50257, "logit_scale": 0.125}, ALL[:1]),
    ("sm_100", {"dtype": "bfloat16", "vocab": 262208, "softcap": 30.0}, (ALL[0], ALL[3])),
    ("gfx942", {"dtype": "bfloat16", "vocab": 151936}, (ALL[0], ALL[3])),
    ("sm_90", {"dtype": "bfloat16", "vocab": 50257, "padded": False}, ("gradient",)),
]
# Run where there is a compiler: in this process, without a GPU, Triton interprets
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from benchmarks.kernels import TARGETS, Case, compile_launch, launches, read_code, resources
found = []
for target, case, kernels in json.loads(sys.argv[2]):
    for name, launch in launches(Case(**case)).items():
        if name not in kernels:
            continue
        compiled = compile_launch(launch, TARGETS[target])
        if target.startswith("sm"):
            code = read_code(compiled)
            found.append([target, case, name, resources(compiled), code.loop, code.rest])
        else:
            found.append([target, case, name, compiled.asm["amdgcn"]])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, str(ROOT), json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def for_nvidia(compiled):
    kernels = [
        kernel
        for kernel in compiled
        if kernel[0].startswith("sm") and kernel[1].get("padded", True)
    ]
    assert len(kernels) == 4 + 2 + 1 + 2
    return kernels


def test_the_loop_spills_nothing(for_nvidia):
    for target, case, name, used, loop, _ in for_nvidia:
        assert not [operation for operation in loop if operation.startswith(("STL", "LDL"))], (
            target,
            case,
            name,
        )
        assert used["local"] == 0, (target, case, name)
        # Triton 3.7's ptxas keeps two of a thread's numbers there beside the loop of one kernel;
        # 3.6's and 3.9's none
        assert used["stack"] <= (8 if (target, name) == ("sm_100", "score") else 0), (
            target,
            case,
            name,
        )
        # So that two programs of 256 threads, or three, fit on an SM with its 65,536 registers
        assert used["registers"] <= (128 if name == "score" else 80), (target, case, name)
        assert used["shared"] <= 48 * 1024, (target, case, name)


def test_memory_moves_in_vectors(for_nvidia):
    for target, case, name, _, loop, rest in for_nvidia:
        vectors = [
            operation for operation in loop or rest if operation.startswith(("LDG.", "LDGSTS."))
        ]
        long = [operation for operation in vectors if ".128" in operation]
        # A gradient's program also loads its token's numbers and the label
        others = {"gradient": 5, "gradient with KL": 8}.get(name, 0)
        size = 4 if case["dtype"] == "float32" else 2
        per_thread = (
            {"score": 8192, "diverge": 8192, "gradient": 4096, "gradient with KL": 8192}[name]
            * size
            // 256
            // 16
        )
        assert len(long) == per_thread, (target, case, name, vectors)
        assert len(vectors) - len(long) <= others, (target, case, name, vectors)
        if name.startswith("gradient"):
            stores = [operation for operation in rest if operation.startswith("STG")]
            assert len(stores) == 4096 * size // 256 // 16, (target, case, name)
            assert all(".128" in operation for operation in stores), (target, case, name)


def test_a_logit_costs_one_exponential_and_crosses_no_lanes(for_nvidia):
    for target, case, name, _, loop, rest in for_nvidia:
        code = loop or rest
        logits = (8192 if name == "score" else 4096) // 256
        exponentials = sum(operation.startswith("MUFU.EX2") for operation in code)
        of_pair = 2 if name in ("diverge", "gradient with KL") else 1
        capped = of_pair if "softcap" in case else 0
        reverse = (
            name == "gradient with KL" and case.get("direction") == "reverse"
        )  # q is not needed
        # A lane's sums are rescaled once a block
        assert exponentials <= logits * (of_pair - reverse + capped) + 2, (target, case, name)
        assert not [
            operation
            for operation in code
            if operation.startswith(("SHFL", "DADD", "DMUL", "DFMA"))
        ]
        assert sum(operation.startswith("BAR") for operation in code) <= 2  # of the pipeline


def test_it_compiles_for_amd(compiled):
    pytest.importorskip("triton.backends.amd", reason="this Triton has no compiler for AMD's GPUs")
    kernels = [kernel for kernel in compiled if kernel[0] == "gfx942"]
    assert len(kernels) == 2
    for _, _, name, assembly in kernels:
        assert "global_load_dwordx4" in assembly or "buffer_load_dwordx4" in assembly, name
        assert ".private_segment_fixed_size: 0" in assembly, name


def test_rows_that_are_not_padded_are_read_one_by_one(compiled):
    """Which shows that the test of vectors can fail."""
    ((*_, rest),) = (kernel for kernel in compiled if not kernel[1].get("padded", True))
    assert not [
        operation
        for operation in rest
        if operation.startswith(("LDG", "STG")) and ".128" in operation
    ]
