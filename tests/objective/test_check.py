"""
`eaft env --check` at small sizes: a right loss passes, and a backend that is wrong in one number is
found.
"""

import pytest
import torch

from eaft.objective import check, registry
from eaft.objective.fused import linear_gated_cross_entropy
from eaft.objective.loss import gated_cross_entropy
from tests.objective.test_gates import every_gate_once

SMALL = [check.Case(101, 8), check.Case(67, 8, logit_scale=0.5, softcap=5.0, one_chunk=True)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """On the CPU, with gates at a small size too."""
    monkeypatch.setattr(check, "devices", lambda: [torch.device("cpu")])
    monkeypatch.setattr(check, "GATES_CASE", check.Case(101, 8, tokens=64))


def spoil(monkeypatch, change):
    """Let the fused loss return what `change` makes of its numbers."""
    right = check.fused
    monkeypatch.setattr(check, "fused", lambda *args: change(right(*args)))


def test_a_right_loss_passes(capsys):
    assert check.main(SMALL, seconds=0) == 0
    lines = capsys.readouterr().out.splitlines()
    verdicts = [line for line in lines if line.startswith("ok ")]
    assert len(verdicts) == len(SMALL) * 2 + len(registry.GATES)  # two dtypes
    assert all(any(f"gate={gate} " in line for line in verdicts) for gate in registry.GATES)
    assert sum(line.startswith("speed ") and "TFLOP/s" in line for line in lines) == 2
    assert lines[-1].startswith(f"{len(verdicts)} of {len(verdicts)} checks ok, 0 failed")


def scaled(name, factor):
    return lambda numbers: {**numbers, name: numbers[name] * factor}


def without_last_chunk(numbers):
    spoiled = numbers["gradient of hidden"].clone()
    spoiled[-3:] = 0
    return {**numbers, "gradient of hidden": spoiled}


MUTANTS = {
    "entropy": scaled("entropy", 1.03),
    "top_k_entropy": scaled("top_k_entropy", 0.97),
    "weights": lambda numbers: {**numbers, "weights": numbers["weights"].roll(1)},
    "loss": scaled("loss", 1.05),
    "gradient of weight": scaled("gradient of weight", 1.03),
    "gradient of hidden": without_last_chunk,
    "is_top1": lambda numbers: {**numbers, "is_top1": ~numbers["is_top1"]},
    "log_prob": lambda numbers: {**numbers, "log_prob": numbers["log_prob"] * torch.nan},
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_number_fails(name, monkeypatch, capsys):
    spoil(monkeypatch, MUTANTS[name])
    monkeypatch.setattr(check, "GATES", ["eaft"])
    assert check.main(SMALL, seconds=0) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL ")]
    assert any(f"gate=eaft V=101 H=8 N=32: {name} " in line for line in failed)


def test_a_wrong_gradient_of_the_backend_fails(monkeypatch, capsys):
    """Inside the loss: the head's gradient loses what hangs on the last labelled token."""

    def forgetful(hidden, weight, labels, *args, **kwargs):
        kept = hidden.clone()
        kept[-1] = kept[-1].detach()
        return linear_gated_cross_entropy(kept, weight, labels, *args, **kwargs)

    monkeypatch.setattr(check, "linear_gated_cross_entropy", forgetful)
    monkeypatch.setattr(check, "GATES", ["sft"])
    assert check.main(SMALL, seconds=0) == 1
    assert (
        "FAIL  cpu torch float32 gate=sft V=101 H=8 N=64: gradient of hidden"
        in capsys.readouterr().out
    )


def test_an_error_is_a_failure_and_the_rest_goes_on(monkeypatch, capsys):
    right = check.fused

    def breaks(problem, case, gate, *args):
        if gate == "dft":
            raise RuntimeError("no such kernel")
        return right(problem, case, gate, *args)

    monkeypatch.setattr(check, "fused", breaks)
    monkeypatch.setattr(check, "GATES", ["dft", "sft"])
    assert check.main(SMALL[:1], seconds=0) == 1
    out = capsys.readouterr().out
    assert "gate=dft V=101 H=8 N=64: RuntimeError: no such kernel" in out
    assert "3 of 4 checks ok, 1 failed" in out


CAPPED, FIVE_TOKENS = {"logit_scale": 0.5, "softcap": 5.0}, 101 * 8 * 5


@pytest.mark.parametrize(
    ("gate", "setting"),
    every_gate_once([(CAPPED, FIVE_TOKENS), ({}, FIVE_TOKENS), (CAPPED, 2**30), ({}, 2**30)]),
)
def test_the_truth_is_the_reference_function(gate, setting, monkeypatch):
    """
    What the check compares with, in chunks or at once, is `gated_cross_entropy` differentiated by
    autograd.
    """
    head, chunk_bytes = setting
    monkeypatch.setattr(check, "CHUNK_BYTES", chunk_bytes)
    case, params = check.Case(101, 8, **head), {}
    problem = check.make_problem(case, 24, torch.device("cpu"), torch.float64)
    truth = check.specified(problem, case, gate, torch.float64, params)
    hidden, weight = (t.clone().requires_grad_() for t in (problem.hidden, problem.weight))

    def logits(states, head):
        z = states @ head.T * case.logit_scale
        return z if case.softcap is None else case.softcap * torch.tanh(z / case.softcap)

    loss = gated_cross_entropy(
        logits(hidden, weight),
        problem.labels,
        gate,
        example_nll=problem.example_nll,
        old_log_prob=problem.old_log_prob,
        reference_logits=logits(problem.reference_hidden, problem.weight),
        **params,
    )
    loss.backward()
    torch.testing.assert_close(truth["loss"], loss.detach())
    torch.testing.assert_close(truth["gradient of hidden"], hidden.grad[problem.labels >= 0])
    torch.testing.assert_close(truth["gradient of weight"], weight.grad)


def test_a_measured_threshold_lies_between_values():
    values = torch.tensor([9.0, 1.0, 2.0, 2.1, 5.0, 5.1, 8.0, 0.0])
    assert check.middle_of_widest_gap(values) == pytest.approx(3.55)
