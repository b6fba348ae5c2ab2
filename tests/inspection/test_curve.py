"""The top-K entropy beside the exact one, over K."""

import numpy as np
import pytest
import torch
from scipy.special import entr, log_softmax
from scipy.stats import pearsonr, spearmanr

from eaft.inspection.curve import top_k_curve


def test_correlations_are_those_of_float64():
    logits = 3 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    rows = top_k_curve(logits, ks=(2, 10, 99))
    assert [row["k"] for row in rows] == [2, 10, 50]
    exact = entr(np.exp(log_softmax(logits.double().numpy(), -1))).sum(-1)
    for row in rows:
        largest = np.sort(logits.double().numpy(), -1)[:, -row["k"] :]
        entropy = entr(np.exp(log_softmax(largest, -1))).sum(-1)
        assert row["pearson"] == pytest.approx(pearsonr(entropy, exact).statistic, rel=1e-4)
        assert row["spearman"] == pytest.approx(spearmanr(entropy, exact).statistic, rel=1e-3)
        assert row["seconds"] > 0
        assert row["mib"] > 0
    assert rows[-1]["pearson"] == pytest.approx(1)


def test_no_correlation_where_nothing_varies():
    rows = top_k_curve(torch.zeros(3, 8), ks=(2,))
    assert [row["pearson"] for row in rows] == [None, None]
