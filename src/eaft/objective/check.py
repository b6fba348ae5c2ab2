"""
`eaft env --check`: is the fused loss right on this machine, and how fast, in a minute or two.

Every number of the fused loss (per-token statistics and weights, the loss, the gradients of hidden
states and head) is compared with the specification (`eaft.objective.loss`) in float64. The rule:
the relative norm error ||ours - truth|| / ||truth|| is at most 1.5 times the specification's error
in the dtype that is checked, plus 8 units in the last place of the format in which the number is
returned. So the loss is as exact as plain cross-entropy in that dtype, apart from another order of
the same sums. No tolerance is chosen by hand.

Speed is printed and decides nothing: the time of three products `[N, H] x [H, V]` at the measured
rate of one, divided by the time of the loss with both gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from eaft.objective.fused import Reference, linear_gated_cross_entropy
from eaft.objective.gate_spec import bind_gate
from eaft.objective.gates import normalized_entropy
from eaft.objective.loss import example_ids_by_row, loss_terms
from eaft.objective.products import slow_bfloat16
from eaft.objective.registry import GATES, get_gate
from eaft.objective.statistics import TokenStatistics, token_statistics

MIN_TOKENS, MAX_TOKENS = 32, 16384
SECONDS = 1.0  # for the products of one float64 truth, or of one timed loss
CHUNK_BYTES = 2**28  # of logits that the specification has at a time
MEMORY_SHARE = 0.6  # of a GPU's free memory, for one case
LOSS_PER_TOKEN = (
    6  # floating-point operations per V x H: three products, each a multiplication and an addition
)


@dataclass(frozen=True)
class Case:
    """A head to check the loss with."""

    vocab: int
    width: int
    logit_scale: float = 1.0
    softcap: float | None = None
    tokens: int | None = None  # None: as many as time and memory allow
    one_chunk: bool = False  # all logits alive at a time, instead of two or three chunks of them

    def __str__(self) -> str:
        """Name it in a line of the output."""
        head = (
            "" if self.softcap is None else f" scale={self.logit_scale:g} softcap={self.softcap:g}"
        )
        return f"V={self.vocab:,} H={self.width:,}{head}"


ODD = Case(50_257, 768, 0.5, 30.0, one_chunk=True)  # rows of an odd length: GPT-2's
CPU_CASES = [Case(49_152, 576), Case(151_936, 576), ODD]
GPU_CASES = [
    Case(49_152, 576),
    Case(151_936, 2_560),
    ODD,
    Case(
        262_208, 1_152, softcap=30.0, tokens=9_363, one_chunk=True
    ),  # 8,192 labelled: more logits than an int32 counts
]
GATES_CASE = Case(50_257, 64, tokens=64)


@dataclass
class Problem:
    """
    Inputs of the loss: hidden `[N, H]`, weight `[V, H]`, labels `[N]`, and what a gate needs.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    example_nll: Tensor
    reference_hidden: Tensor
    old_log_prob: Tensor | None = None  # under the base model; `specified` sets it


def make_problem(case: Case, tokens: int, device: torch.device, dtype: torch.dtype) -> Problem:
    """
    Return hidden states and a head about as sharp as a model: labels with probabilities near 0,
    near 1 and between.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = normal(case.vocab, case.width) * (3 / case.width**0.5)
    labels = torch.randint(case.vocab, (tokens,), generator=generator)
    # A row of the head has a norm of about 3. This raises the label's logit by 0 to 22; about 16
    # make the label likely
    hidden = normal(tokens, case.width) + weight[labels] * torch.linspace(0, 2.5, tokens).unsqueeze(
        -1
    )
    reference_hidden = hidden + 0.3 * normal(tokens, case.width)
    labels[1::8] = -100
    hidden, weight, reference_hidden = (
        t.to(device, dtype) for t in (hidden, weight, reference_hidden)
    )
    return Problem(
        hidden,
        weight,
        labels.to(device),
        torch.linspace(0.5, 2.0, tokens).to(device),
        reference_hidden,
    )


def specified(
    problem: Problem, case: Case, gate: str, dtype: torch.dtype, params: dict[str, Any]
) -> dict[str, Tensor]:
    """
    Return every number of the loss by the formulas of the specification, on logits in `dtype`, one
    chunk at a time.

    Parameters without a default are computed from these statistics and added to `params`. `margin`
    is the distance between the two largest logits.
    """
    labelled = problem.labels >= 0
    labels, hidden, reference = (
        t[labelled] for t in (problem.labels, problem.hidden, problem.reference_hidden)
    )
    hidden, reference, weight = hidden.to(dtype), reference.to(dtype), problem.weight.to(dtype)
    chunks = torch.arange(len(labels), device=labels.device).split(
        max(1, CHUNK_BYTES // (case.vocab * 8))
    )

    def logits_of(projection: Tensor) -> Tensor:
        z = projection.to(torch.promote_types(dtype, torch.float32)) * case.logit_scale
        return z if case.softcap is None else case.softcap * torch.tanh(z / case.softcap)

    parts, margins = [], []
    for rows in chunks:
        logits = logits_of(hidden[rows] @ weight.T)
        parts.append(token_statistics(logits, labels[rows], ranked=get_gate(gate).needs_rank))
        margins.append(logits.topk(2).values.diff(dim=-1).abs().squeeze(-1) / logits.abs().amax(-1))
    stats = replace(
        TokenStatistics.cat(parts),
        example_ids=example_ids_by_row(problem.labels)[labelled],
        example_nll=problem.example_nll[labelled].to(parts[0].log_prob.dtype),
    )
    # Probabilities from half to twice the present ones, so that some ratios are clipped
    if problem.old_log_prob is None:
        problem.old_log_prob = torch.zeros_like(labelled, dtype=stats.log_prob.dtype)
        apart = torch.linspace(-0.7, 0.7, len(labels), device=labels.device)
        problem.old_log_prob[labelled] = stats.log_prob + apart
    stats = replace(stats, old_log_prob=problem.old_log_prob[labelled].to(stats.log_prob.dtype))
    for name in bind_gate(gate, params, measured=REQUIRED).missing:
        params[name] = REQUIRED[name](stats)
    bound = bind_gate(gate, params)
    weights, anchor = bound.weights(stats), bound.anchor

    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(dtype, torch.float32))
    terms, kls = [], []
    for rows in chunks:
        projection = (hidden[rows] @ weight.T).requires_grad_()
        logits = logits_of(projection)
        nll = -logits.log_softmax(-1).gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1)
        kl = None
        if anchor is not None:
            pair = (logits, logits_of(reference[rows] @ weight.T))
            kl = anchor.kl(*(anchor.compared(z, labels[rows]).log_softmax(-1) for z in pair))
            kls.append(kl.detach())
        some = (
            weights[rows] * nll
            if kl is None or anchor is None
            else weights[rows] * nll + anchor.coef * kl
        )
        (gradient,) = torch.autograd.grad(some.sum() / len(labels), projection)
        grad_hidden[rows] = gradient @ weight
        grad_weight += gradient.T @ hidden[rows]
        terms.append(some.detach())
    return {
        **{
            name: getattr(stats, name)
            for name in ("log_prob", "entropy", "top_k_entropy", "sum_sq_probs", "is_top1")
        },
        "weights": weights,
        **({"kl": torch.cat(kls)} if kls else {}),
        "terms": torch.cat(terms),
        "loss": torch.cat(terms).mean(),
        "gradient of hidden": grad_hidden,
        "gradient of weight": grad_weight.to(dtype),
        "margin": torch.cat(margins),
    }


def fused(
    problem: Problem,
    case: Case,
    gate: str,
    backend: str,
    params: dict[str, Any],
    chunks: float = 2.5,
) -> dict[str, Tensor]:
    """Return the same numbers from the fused loss."""
    hidden, weight = (t.detach().clone().requires_grad_() for t in (problem.hidden, problem.weight))
    labelled = problem.labels >= 0
    anchor = bind_gate(gate, params).anchor
    loss, losses = linear_gated_cross_entropy(
        hidden,
        weight,
        problem.labels,
        gate,
        example_nll=problem.example_nll,
        old_log_prob=problem.old_log_prob,
        reference=None if anchor is None else Reference(problem.reference_hidden, problem.weight),
        logit_scale=case.logit_scale,
        softcap=case.softcap,
        logits_budget=int(len(hidden) / chunks * case.vocab * hidden.element_size()),
        return_losses=True,
        backend=backend,
        **params,
    )
    loss.backward()
    stats = losses.statistics
    return {
        **{
            name: getattr(stats, name)
            for name in ("log_prob", "entropy", "top_k_entropy", "sum_sq_probs", "is_top1")
        },
        "weights": losses.weights,
        **({} if losses.kl is None else {"kl": losses.kl}),
        "terms": loss_terms(stats, losses.weights, losses.kl, anchor),
        "loss": loss.detach(),
        "gradient of hidden": required(hidden.grad)[labelled],
        "gradient of weight": required(weight.grad),
    }


def required(tensor: Tensor | None) -> Tensor:
    """Return a gradient that must be there."""
    if tensor is None:
        raise ArithmeticError("a gradient is missing")
    return tensor


def middle_of_widest_gap(values: Tensor) -> float:
    """
    Return a threshold near the middle of the values that rounding makes no value cross.
    """
    values = values.double().sort().values[len(values) // 4 : -(len(values) // 4)]
    widest = values.diff().argmax()
    return values[widest : widest + 2].mean().item()


# Values of parameters without a default, computed from the statistics in float64
REQUIRED: dict[str, Callable[[TokenStatistics], float]] = {
    "entropy_threshold": lambda stats: middle_of_widest_gap(normalized_entropy(stats)),
    "prob_threshold": lambda stats: middle_of_widest_gap(stats.prob),
    "tau": lambda stats: 1.3,
}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Return ||value - truth|| / ||truth||, in float64 a few rows at a time."""
    difference = norm = 0.0
    for a, b in zip(value.reshape(-1).split(2**26), truth.reshape(-1).split(2**26), strict=True):
        difference += (a.double() - b.double()).square().sum().item()
        norm += b.double().square().sum().item()
    return (difference / max(norm, 1e-300)) ** 0.5


@dataclass(frozen=True)
class Verdict:
    """
    One line: what was checked, and its number that is nearest to, or farthest above, the allowed
    error.
    """

    what: str
    ok: bool
    numbers: str

    def __str__(self) -> str:
        """Return the line."""
        return f"{'ok' if self.ok else 'FAIL':5} {self.what}: {self.numbers}"


def judge(
    what: str, ours: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]
) -> Verdict:
    """
    Apply the rule to every number; `plain` is the specification in the dtype that is checked.
    """
    errors: dict[str, tuple[float, float]] = {}
    eps = torch.finfo(ours["gradient of weight"].dtype).eps
    for name in [name for name in truth if name not in ("margin", "is_top1")]:
        plainly = relative_error(plain[name], truth[name])
        if name == "loss":  # errors in one sum may cancel by chance
            plainly = max(plainly, relative_error(plain["terms"], truth["terms"]))
        ulp = eps if name.startswith("gradient") else torch.finfo(torch.float32).eps
        errors[name] = relative_error(ours[name], truth[name]), 1.5 * plainly + 8 * ulp
    # If two logits are nearly equal, rounding decides which is the largest
    clear = truth["margin"] > 4 * eps
    errors["is_top1"] = (
        (ours["is_top1"] != truth["is_top1"])[clear].double().mean().nan_to_num().item(),
        0.0,
    )
    # A NaN is not below the bound
    bad = [name for name, (error, allowed) in errors.items() if not error <= allowed]
    shown = bad or [max(errors, key=lambda name: errors[name][0] / (errors[name][1] or 1))]
    numbers = (f"{name} {errors[name][0]:.1e} (allowed {errors[name][1]:.1e})" for name in shown)
    return Verdict(what, not bad, ", ".join(numbers))


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def best_seconds(run: Callable[[], Any], device: torch.device, rounds: int = 4) -> float:
    """Return the shortest time of several runs, in seconds."""
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def product_rate(
    tokens: int, vocab: int, width: int, dtype: torch.dtype, device: torch.device
) -> float:
    """
    Return the floating-point operations per second of a product `[tokens, width] x [width, vocab]`
    of numbers of a dtype, in float32 on a CPU where bfloat16 is slower.
    """
    if dtype == torch.bfloat16 and device.type == "cpu" and slow_bfloat16():
        dtype = torch.float32
    hidden = torch.randn(tokens, width).to(device, dtype)
    weight = torch.randn(vocab, width).to(device, dtype)
    product = torch.zeros(tokens, vocab, device=device, dtype=dtype)
    return (
        2
        * tokens
        * vocab
        * width
        / best_seconds(lambda: torch.mm(hidden, weight.T, out=product), device)
    )


def tokens_for(case: Case, rate: float, seconds: float, device: torch.device) -> int:
    """
    Return the number of tokens whose three products take `seconds`, and whose logits fit in memory.
    """
    if case.tokens is not None:
        return case.tokens
    tokens = int(seconds * rate / (LOSS_PER_TOKEN * case.vocab * case.width))
    if device.type != "cpu":  # at most two copies of one chunk of logits are alive
        tokens = min(tokens, int(MEMORY_SHARE / 4 * free_memory(device) / (case.vocab * 4)))
    return min(max(tokens, MIN_TOKENS), MAX_TOKENS)


def free_memory(device: torch.device) -> int:
    """Return a GPU's free bytes."""
    return torch.get_device_module(device).mem_get_info(device)[0]


def fits(case: Case, device: torch.device) -> bool:
    """
    Return whether a GPU has room for the head, its gradients in float64 and in the dtype, and the
    chunks of logits.
    """
    if device.type == "cpu":
        return True
    logits = (case.tokens or 0) * case.vocab * 4 if case.one_chunk else 0
    return 32 * case.vocab * case.width + logits + 6 * CHUNK_BYTES < MEMORY_SHARE * free_memory(
        device
    )


def devices() -> list[torch.device]:
    """Return every GPU that torch sees, or the CPU if there is none."""
    present = []
    for kind in ("cuda", "xpu"):  # ROCm is called cuda; Apple's mps has no float64
        module = getattr(torch, kind)
        present += [
            torch.device(kind, i)
            for i in range(module.device_count() if module.is_available() else 0)
        ]
    return present or [torch.device("cpu")]


def backends(device: torch.device) -> list[str]:
    """Return the backends of the fused loss that run on a device (not Triton's interpreter)."""
    return (
        ["torch", "triton"]
        if device.type == "cuda" and find_spec("triton") is not None
        else ["torch"]
    )


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name without its module's."""
    return str(dtype).removeprefix("torch.")


def check_case(
    device: torch.device, dtype: torch.dtype, case: Case, gate: str, seconds: float, rate: float
) -> Iterator[Verdict]:
    """Check one head, dtype and gate with each backend of the device."""
    tokens = tokens_for(case, rate, seconds, device)
    problem = make_problem(case, tokens, device, dtype)
    params: dict[str, Any] = {}
    truth: dict[str, Tensor] = {}
    for backend in backends(device):
        what = f"{device} {backend} {name_of(dtype)} gate={gate} {case} N={tokens:,}"
        try:
            if not truth:
                truth = specified(problem, case, gate, torch.float64, params)
                plain = specified(problem, case, gate, dtype, params)
            yield judge(
                what,
                fused(problem, case, gate, backend, params, 1 if case.one_chunk else 2.5),
                plain,
                truth,
            )
        except Exception as error:  # one backend fails, and the other checks go on
            yield Verdict(what, False, f"{type(error).__name__}: {error}".strip())


def check_device(
    device: torch.device, first: bool, cases: Sequence[Case], seconds: float
) -> Iterator[Verdict]:
    """
    Check a device: the first of the machine with every case, the others with one case, which shows
    faults that depend on the device of a tensor.
    """
    dtypes = [torch.float32, torch.bfloat16]
    if device.type != "cpu":
        dtypes.append(torch.float16)
    if not first:
        yield from check_case(device, torch.bfloat16, GATES_CASE, "eaft", seconds, 0)
        return
    rate = product_rate(MIN_TOKENS, cases[0].vocab, cases[0].width, torch.float64, device)
    for case in cases:
        for dtype in dtypes:
            if fits(case, device):
                yield from check_case(device, dtype, case, "eaft", seconds, rate)
    for gate in GATES:
        yield from check_case(device, torch.float32, GATES_CASE, gate, seconds, rate)


def measure_speed(
    device: torch.device, dtype: torch.dtype, case: Case, seconds: float
) -> Iterator[str]:
    """Time the loss with both gradients beside a product of the same shapes and dtype."""
    rate = product_rate(MIN_TOKENS, case.vocab, case.width, dtype, device)
    tokens = tokens_for(case, rate, seconds, device)
    rate = product_rate(min(tokens, 1024), case.vocab, case.width, dtype, device)
    problem = make_problem(case, tokens, device, dtype)
    leaves = [t.requires_grad_() for t in (problem.hidden, problem.weight)]
    labelled = int((problem.labels >= 0).sum())
    floor = LOSS_PER_TOKEN * labelled * case.vocab * case.width / rate
    for backend in backends(device):

        def step(backend: str = backend) -> None:
            for leaf in leaves:
                leaf.grad = None
            linear_gated_cross_entropy(
                problem.hidden, problem.weight, problem.labels, "eaft", backend=backend
            ).backward()

        what = f"speed {device} {backend} {name_of(dtype)} {case} N={labelled:,}"
        try:
            took = best_seconds(step, device)
            share = f"{floor / took:.0%} of the rate of three products"
            yield f"{what}: {1000 * took:.3g} ms, {share} ({rate / 1e12:.3g} TFLOP/s)"
        except Exception as error:
            yield f"{what}: {type(error).__name__}: {error}"


def main(cases: Sequence[Case] | None = None, seconds: float = SECONDS) -> int:
    """
    Check this machine, print a line for each verdict, and return the exit code: 0, or 1 if a check
    failed.

    Args:
        cases: heads to check; default: `CPU_CASES`, or `GPU_CASES` where there is a GPU.
        seconds: for the products of one case.
    """
    start, verdicts = time.perf_counter(), []
    for i, device in enumerate(devices()):
        chosen = cases or (CPU_CASES if device.type == "cpu" else GPU_CASES)
        for verdict in check_device(device, i == 0, chosen, seconds):
            print(verdict, flush=True)
            verdicts.append(verdict)
    device = devices()[0]
    chosen = cases or (CPU_CASES if device.type == "cpu" else GPU_CASES)
    fitting = [case for case in chosen if fits(case, device)]
    for case in chosen:
        if case not in fitting:
            print(f"skip  {device} {case}: too little free memory")
    for dtype in (torch.float32, torch.bfloat16) if fitting else ():
        for line in measure_speed(device, dtype, fitting[min(1, len(fitting) - 1)], seconds):
            print(line, flush=True)
    failed = sum(not verdict.ok for verdict in verdicts)
    took = time.perf_counter() - start
    print(
        f"{len(verdicts) - failed} of {len(verdicts)} checks ok, {failed} failed, in {took:.0f} s"
    )
    return 1 if failed else 0
