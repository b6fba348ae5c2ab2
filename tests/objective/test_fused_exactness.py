"""The fused loss is as exact as plain cross-entropy, and the rule that says so catches faults."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from eaft.objective import fused
from tests.objective.problem import Problem, broken, flatten, fuse, plain, relative_error
from tests.objective.test_gates import every_gate_once

SIZES = {
    "one token": {"n": 1},
    "a last partial chunk": {"n": 29},
    "vocabulary of 3": {"n": 9, "vocab": 3},
    "vocabulary of 4099": {"n": 7, "vocab": 4099},
    "sharp": {"scale": 30.0},
    "flat": {"scale": 1e-4, "bias": False, "vocab": 300},
    "in the thousands": {"scale": 3000.0},
}


def check_as_exact_as_plain(gate, size, dtype, seeds=16, tokens_at_a_time=5):
    """
    Check that no number has a larger relative error than the reference function's, in this dtype.

    Over all seeds together, since one rounding is luck. The margin is half the plain error, and 8
    units in the last place of the format the number is returned in: two sums of the same terms in
    another order differ by that much.
    """
    found = {"truth": [], "plain": [], "ours": []}
    for seed in range(seeds):
        problem = Problem(**{"n": 23, "vocab": 150, "width": 16, "seed": seed, **SIZES[size]}).to(
            dtype
        )
        found["truth"].append(flatten(plain(problem.to(torch.float64), gate)))
        found["plain"].append(flatten(plain(problem, gate)))
        found["ours"].append(
            flatten(
                fuse(
                    problem,
                    gate,
                    logits_budget=tokens_at_a_time * problem.weight.shape[0] * dtype.itemsize,
                )
            )
        )
    for name in found["truth"][0]:
        truth, naive, ours = (
            torch.cat([result[name].flatten() for result in found[key]]) for key in found
        )
        # Statistics and loss are float32 whatever the inputs, but of logits that were rounded to
        # the inputs' dtype
        ulp = torch.finfo(dtype if name.startswith("gradient") else torch.float32).eps
        error, plainly = relative_error(ours, truth), relative_error(naive, truth)
        assert error <= 1.5 * plainly + 8 * ulp, f"{name}: {error:.2e}, plain {plainly:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("gate", "size"),
    every_gate_once(
        ["a last partial chunk", *(size for size in SIZES if size != "a last partial chunk")],
        ("sft", "eaft", "deft", "talr", "sft-kl", "asft", "tmkl"),
        ("eaft", "asft"),
    ),
)
def test_as_exact_as_plain_cross_entropy(gate, size, dtype):
    check_as_exact_as_plain(gate, size, dtype)


@pytest.mark.parametrize("size", [size for size in SIZES if size != "in the thousands"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_chunk_is_as_exact(size, dtype):
    check_as_exact_as_plain("eaft", size, dtype, tokens_at_a_time=100)


@pytest.mark.parametrize("size", ["one token", "a last partial chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_as_exact_as_plain_cross_entropy(size, dtype, kernels):
    """In chunks; other sizes and scales of the logits are in test_triton_backend.py."""
    check_as_exact_as_plain("eaft", size, dtype, seeds=3)


def spoil_gate(monkeypatch, spoil):
    """Spoil the weights in the fused loss, and not in the reference function."""

    def spoilt(bound):
        weight = broken(bound.gate.weight, spoil)
        return replace(bound, gate=replace(bound.gate, weight=weight))

    monkeypatch.setattr(fused, "bind_gate", broken(fused.bind_gate, spoilt))


MUTANTS = {
    "the gate is 0": lambda m: spoil_gate(m, lambda w: 0 * w),
    "the gate is halved": lambda m: spoil_gate(m, lambda w: w / 2),
    "the gate is permuted": lambda m: spoil_gate(m, lambda w: w.flip(0)),
    "a chunk is dropped": lambda m: m.setattr(
        fused,
        "add_product",
        lambda total, a, b, dtype: (a.to(dtype) @ b.to(dtype)) if total is None else total,
    ),
    "the gradient of the weight is missing": lambda m: m.setattr(
        fused, "add_product", broken(fused.add_product, lambda product: 0 * product)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rule_of_exactness_catches(mutant, dtype, monkeypatch):
    check_as_exact_as_plain("eaft", "a last partial chunk", dtype)
    MUTANTS[mutant](monkeypatch)
    with pytest.raises(AssertionError, match=r"(loss|gradient of \w+): "):
        check_as_exact_as_plain("eaft", "a last partial chunk", dtype)


def test_the_rule_of_exactness_catches_a_gate_that_lets_gradient_through():
    problem = Problem(n=29, vocab=150, width=16).to(torch.float32)
    kept = problem.labels != -100

    def leaking(problem):
        leaves = problem.leaves()
        logits = torch.nn.functional.linear(
            **{"input": leaves["hidden"], **{k: leaves[k] for k in ("weight", "bias")}}
        )
        log_probs = logits[kept].log_softmax(-1)
        top = logits[kept].topk(20).values.log_softmax(-1)
        gate = -(top.exp() * top).sum(-1) / math.log(20)  # not detached
        (
            gate * cross_entropy(logits[kept], problem.labels[kept], reduction="none")
        ).mean().backward()
        return {name: leaf.grad.double() for name, leaf in leaves.items()}, log_probs

    truth = flatten(plain(problem.to(torch.float64)))
    naive = flatten(plain(problem))
    for name, gradient in leaking(problem)[0].items():
        plain_error = relative_error(naive[f"gradient of {name}"], truth[f"gradient of {name}"])
        assert (
            relative_error(gradient, truth[f"gradient of {name}"])
            > 1.25 * plain_error + 8 * torch.finfo(torch.float32).eps
        )
