"""Each gate against its paper's formula; the table's rules for every gate in it, and for one from outside."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eaft import gates, token_statistics
from eaft.errors import ConfigurationError
from eaft.gates import GATES, check_gate, gate_help, gate_weights, get_gate, register

from .test_statistics import truth


def formula(name, row, label, k=20, alpha=1.0):
    """The weight of one token, from the papers."""
    t = truth(row, label, k)
    return {
        "sft": 1.0,
        "eaft": (t["top_k_entropy"] / math.log(min(k, len(row)))) ** alpha,
        "dft": math.exp(t["log_prob"]),
    }[name]


logit_rows = st.lists(st.floats(-30, 30), min_size=2, max_size=40)


@settings(deadline=None, max_examples=50)
@given(logit_rows, st.sampled_from(sorted(GATES)), st.data())
def test_gate_is_its_formula_and_in_unit_interval(row, name, data):
    label = data.draw(st.integers(0, len(row) - 1))
    stats = token_statistics(torch.tensor([row], dtype=torch.float64), torch.tensor([label]))
    weight = gate_weights(name, stats)
    assert weight.item() == pytest.approx(formula(name, row, label), abs=1e-10)
    assert 0 <= weight.item() <= 1
    assert not weight.requires_grad


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_alpha_is_the_exponent(alpha):
    row = [2.0, 1.0, 0.5, -1.0, 0.0] * 6
    stats = token_statistics(torch.tensor([row], dtype=torch.float64), torch.tensor([3]))
    assert gate_weights("eaft", stats, alpha=alpha).item() == pytest.approx(formula("eaft", row, 3, alpha=alpha))


@pytest.mark.parametrize("name", sorted(GATES))
def test_weights_ignore_a_constant_and_follow_the_tokens(name):
    logits, labels = torch.randn(7, 30, dtype=torch.float64), torch.randint(30, (7,))
    weights = gate_weights(name, token_statistics(logits, labels))
    torch.testing.assert_close(gate_weights(name, token_statistics(logits + 3.7, labels)), weights)
    order = torch.randperm(7)
    torch.testing.assert_close(gate_weights(name, token_statistics(logits[order], labels[order])), weights[order])


def test_uniform_gate_is_one_and_sure_gate_is_zero():
    uniform, sure = torch.zeros(100), torch.zeros(100)
    sure[5] = 1000.0
    weights = gate_weights("eaft", token_statistics(torch.stack([uniform, sure]), torch.tensor([0, 0])))
    assert weights.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert weights.max() <= 1


def test_adding_a_gate_from_outside():
    @register("confident")
    def confident(stats):
        """Weight sum of squared probabilities."""
        return stats.sum_sq_probs

    try:
        stats = token_statistics(torch.zeros(2, 10, requires_grad=True), torch.tensor([0, 1]))
        assert gates.gate_weights("confident", stats).tolist() == pytest.approx([0.1, 0.1])
        assert gate_help("confident") == "Weight sum of squared probabilities."
        assert get_gate("confident") is confident
    finally:
        del GATES["confident"]


def test_a_gate_cannot_leak_gradient():
    logits = torch.randn(3, 10, requires_grad=True)
    assert not gate_weights(
        lambda stats: stats.log_prob.exp() * 2, token_statistics(logits, torch.tensor([0, 1, 2]))
    ).requires_grad


def test_unknown_gate_names_the_nearest_and_all():
    with pytest.raises(ConfigurationError, match=r"gate='eaf' is unknown. Did you mean 'eaft'\? Gates: .*dft"):
        check_gate("eaf")
    with pytest.raises(ConfigurationError, match="gate='dft' takes no alpha"):
        check_gate("dft", ["alpha"])


def test_wrong_shape_is_refused():
    with pytest.raises(ConfigurationError, match="returned shape"):
        gate_weights(lambda stats: stats.log_prob.mean(), token_statistics(torch.zeros(2, 5), torch.tensor([0, 1])))


def test_negative_alpha_is_refused():
    with pytest.raises(ValueError, match="alpha must not be negative"):
        gate_weights("eaft", token_statistics(torch.zeros(1, 5), torch.tensor([0])), alpha=-1.0)
