"""Figure 6: the top-K entropy beside the exact one."""

import math

import numpy as np
import pytest
import torch

from eaft.inspection.score.curve import top_k_curve


def entropies(logits, k):
    """The definition, in float64 and Python."""
    entropies = []
    for row in logits.double().tolist():
        top = sorted(row, reverse=True)[:k]
        weights = [math.exp(z - top[0]) for z in top]
        total = math.fsum(weights)
        entropies.append(-math.fsum(w / total * math.log(w / total) for w in weights if w > 0))
    return np.array(entropies)


def ranks(values):
    return np.argsort(np.argsort(values))


def test_correlations_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 40, generator=generator) * torch.linspace(0.2, 5, 300)[:, None]
    rows = top_k_curve(logits, ks=(2, 5, 20, 100))
    assert [row.k for row in rows] == [2, 5, 20, 40]
    exact = entropies(logits, 40)
    for row in rows:
        entropy = entropies(logits, row.k)
        assert row.pearson == pytest.approx(np.corrcoef(entropy, exact)[0, 1], abs=1e-5)
        assert row.spearman == pytest.approx(
            np.corrcoef(ranks(entropy), ranks(exact))[0, 1], abs=1e-4
        )
        assert row.seconds > 0
    assert rows[-1].pearson == pytest.approx(1)
    # As torch's profiler counts them: K values and their int64 indices; log_softmax, exp and the
    # entropy's terms
    assert rows[1].mib * 2**20 == 256 * 5 * (4 + 8)
    assert rows[-1].mib * 2**20 == 256 * 40 * 3 * 4


def test_what_does_not_vary_has_no_correlation():
    rows = top_k_curve(torch.zeros(4, 30))
    assert {row.pearson for row in rows} == {None}
    assert top_k_curve(torch.zeros(1, 30)) == []
