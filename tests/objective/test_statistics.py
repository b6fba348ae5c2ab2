"""
Statistics against float64 formulas written from the definitions, with Python's own `math`, term by
term.
"""

import math

import pytest
import torch

from eaft import token_statistics
from eaft.objective.statistics import TokenStatistics, entropy_from_log_probs, kl_divergence


def softmax(row):
    top = max(row)
    weights = [math.exp(z - top) for z in row]
    return [w / math.fsum(weights) for w in weights]


def entropy(probs):
    return -math.fsum(p * math.log(p) for p in probs if p > 0)


def truth(row, label, k):
    """Every statistic of one token, from the definitions."""
    probs = softmax(row)
    top = sorted(probs, reverse=True)[:k]
    return {
        "log_prob": row[label]
        - max(row)
        - math.log(math.fsum(math.exp(z - max(row)) for z in row)),
        "entropy": entropy(probs),
        "top_k_entropy": entropy([p / math.fsum(top) for p in top]),
        "sum_sq_probs": math.fsum(p * p for p in probs),
        "is_top1": probs.index(max(probs)) == label,
        "first_choice": probs.index(max(probs)),
        "first_prob": max(probs),
        "rank": 1 + sum(z > row[label] for z in row),
    }


def cases():
    generator = torch.Generator().manual_seed(0)
    one_hot = torch.full((50,), -1e4)
    one_hot[7] = 0.0
    masked = torch.randn(50, generator=generator)
    masked[::3] = -math.inf
    few = torch.full((50,), -math.inf)
    few[:3] = torch.tensor([0.5, 0.1, 0.0])
    ties = torch.zeros(50)
    ties[10:] = -1.0
    return {
        "random": torch.randn(50, generator=generator),
        "sharp": 30 * torch.randn(50, generator=generator),
        "large": 5000 + torch.randn(50, generator=generator),
        "uniform": torch.zeros(50),
        "one-hot": one_hot,
        "masked": masked,
        "fewer finite than K": few,
        "ties at the Kth place": ties,
        "vocabulary smaller than K": torch.randn(6, generator=generator),
    }


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, d) for n in cases() for d in (torch.float64, torch.float32, torch.bfloat16)],
)
def test_statistics_are_the_definitions(name, dtype):
    logits = cases()[name].to(dtype)
    label = 1
    expected = truth(logits.double().tolist(), label, k=20)
    stats = token_statistics(logits.unsqueeze(0), torch.tensor([label]), top_k=20, ranked=True)
    # The input is given exactly; what is left is the rounding of sums of 50 terms
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for field, value in expected.items():
        got = getattr(stats, field)
        assert got.shape == (1,)
        assert got.item() == pytest.approx(value, rel=tolerance, abs=tolerance), field
    assert stats.log_prob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert stats.top_k == min(20, len(logits))


@pytest.mark.parametrize("vocab", [2, 50, 3000])
def test_the_expected_rank_is_at_least_its_bound(vocab):
    """
    From uniform to one-hot the bound is below the sorted sum, and near it where the distribution is
    sharp.
    """
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.linspace(0, 20, 60, dtype=torch.float64).unsqueeze(-1) * torch.randn(
        60, vocab, dtype=torch.float64, generator=generator
    )
    stats = token_statistics(logits, torch.zeros(60, dtype=torch.int64), ranked=True)
    exact = (logits.softmax(-1).sort(descending=True).values * torch.arange(1, vocab + 1)).sum(-1)
    assert (stats.expected_rank_bound <= exact * (1 + 1e-12)).all()
    assert (stats.expected_rank_bound >= 1).all()
    sure = stats.first_prob > 0.99
    assert sure.any()
    torch.testing.assert_close(stats.expected_rank_bound[sure], exact[sure], rtol=0.02, atol=0)


def test_log_prob_gradient_is_one_hot_minus_probabilities():
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    logits_masked = logits.masked_fill(torch.arange(9) == 8, -math.inf)
    labels = torch.tensor([0, 3, 3, 7])
    token_statistics(logits_masked, labels).log_prob.sum().backward()
    for row, label, grad in zip(
        logits.tolist(), labels.tolist(), logits.grad.tolist(), strict=True
    ):
        probs = [*softmax(row[:8]), 0.0]
        assert grad == pytest.approx(
            [(j == label) * 1.0 - p for j, p in enumerate(probs)], abs=1e-12
        )


def test_only_log_prob_has_a_gradient():
    stats = token_statistics(torch.randn(3, 30, requires_grad=True), torch.tensor([1, 2, 3]))
    assert stats.log_prob.requires_grad
    assert not any(
        getattr(stats, f).requires_grad
        for f in ("entropy", "top_k_entropy", "sum_sq_probs", "is_top1")
    )
    assert not stats.detach().log_prob.requires_grad


def test_conflicts_are_sure_and_wrong():
    def stats(entropy, prob):
        one = torch.ones(1)
        return TokenStatistics(
            torch.tensor([math.log(prob)]), one * entropy, one, one, one.bool(), 20
        )

    assert stats(0.49, 0.09).is_conflict
    assert not stats(0.51, 0.09).is_conflict
    assert not stats(0.49, 0.11).is_conflict


def test_shapes_follow_the_labels():
    logits, labels = torch.randn(2, 5, 30), torch.randint(30, (2, 5))
    assert token_statistics(logits, labels).entropy.shape == (2, 5)
    assert token_statistics(torch.zeros(0, 30), labels[:0, 0]).entropy.shape == (0,)


def test_bad_arguments():
    with pytest.raises(ValueError, match="top_k must be at least 2"):
        token_statistics(torch.zeros(1, 5), torch.zeros(1, dtype=torch.long), top_k=1)
    with pytest.raises(ValueError, match="need labels"):
        token_statistics(torch.zeros(2, 5), torch.zeros(1, dtype=torch.long))


def test_kl_divergence_is_the_definition():
    p_logits, q_logits = torch.randn(2, 6, 40, dtype=torch.float64)
    p_logits[:, 3] = -math.inf  # what p never does adds nothing, whatever q thinks of it
    got = kl_divergence(p_logits.log_softmax(-1), q_logits.log_softmax(-1))
    for row_p, row_q, value in zip(p_logits.tolist(), q_logits.tolist(), got.tolist(), strict=True):
        p, q = softmax(row_p), softmax(row_q)
        assert value == pytest.approx(
            math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0), rel=1e-12
        )
    assert kl_divergence(p_logits.log_softmax(-1), p_logits.log_softmax(-1)).abs().max() == 0


def test_entropy_of_uniform_is_log_of_size():
    assert entropy_from_log_probs(
        torch.zeros(8, dtype=torch.float64).log_softmax(-1)
    ).item() == pytest.approx(math.log(8))


def test_grad_norm_is_that_of_autograd():
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(40, 30, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(30, (40,), generator=generator)
    stats = token_statistics(logits, labels)
    stats.nll.sum().backward()
    torch.testing.assert_close(stats.grad_norm, logits.grad.norm(dim=-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("gap", [4, 8, 12, 16, 30, 200])
def test_grad_norm_where_the_label_is_nearly_certain(gap):
    """
    Float32 loses the others' probabilities beside the label's; the norm stays within sqrt(2) of the
    true one.
    """
    logits = torch.full((1, 30), -float(gap))
    logits[0, 0] = 0.0
    other = math.exp(-gap) / (1 + 29 * math.exp(-gap))
    truth = math.sqrt((29 * other) ** 2 + 29 * other**2)
    found = token_statistics(logits, torch.tensor([0])).grad_norm.item()
    assert 0 <= found <= 1.42 * truth + 2**-22
    assert found >= 0.7 * truth - 2**-22
