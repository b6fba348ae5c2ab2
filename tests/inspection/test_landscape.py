"""The bins of the entropy-probability plane."""

import numpy as np
import pytest
import torch

from eaft.inspection.landscape import bin_indices, bin_sums, entropy_edges, prob_edges
from eaft.objective.statistics import HIGH_ENTROPY, token_statistics


@pytest.mark.parametrize("maximum", [0.0, 2.9, 8.0, 11.93])
def test_the_borders_are_edges_and_all_is_covered(maximum):
    entropies, probs = entropy_edges(maximum), prob_edges()
    assert {0.0, 0.5, HIGH_ENTROPY} <= set(entropies)
    assert {0.0, 0.1, 1.0} <= set(probs)
    assert entropies[-1] >= maximum > entropies[-2] or maximum < 3
    widths = np.diff(np.sqrt(probs))
    assert (np.diff(entropies) > 0).all()
    np.testing.assert_allclose(widths, widths[0], rtol=0.07)


def test_sums_are_those_of_a_loop_and_the_corner_holds_the_conflicts():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(4000, 30, generator=generator)
    stats = token_statistics(logits, torch.randint(30, (4000,), generator=generator))
    entropy, prob, nll = stats.entropy.numpy(), stats.prob.numpy(), stats.nll.numpy()
    edges = entropy_edges(float(entropy.max())), prob_edges()
    shape = len(edges[0]) - 1, len(edges[1]) - 1
    bins = bin_indices(entropy, edges[0]), bin_indices(prob, edges[1])
    counts, sums = bin_sums(*bins, shape), bin_sums(*bins, shape, nll)
    expected, expected_nll = np.zeros(shape), np.zeros(shape)
    for h, p, x in zip(entropy.tolist(), prob.tolist(), nll.tolist(), strict=True):
        i = max(i for i in range(shape[0]) if edges[0][i] <= h)
        j = max(j for j in range(shape[1]) if edges[1][j] <= p)
        expected[i, j] += 1
        expected_nll[i, j] += x
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_allclose(sums, expected_nll)
    corner = (edges[0][:-1] < 0.5)[:, None] & (edges[1][:-1] < 0.1)[None]
    assert counts[corner].sum() == stats.is_conflict.sum() > 0


def test_ends_belong_to_the_outer_bins():
    edges = prob_edges()
    assert bin_indices(np.array([-1.0, 0.0, 1.0, 2.0]), edges).tolist() == [0, 0, 78, 78]
    assert bin_indices(np.array([0.1, np.nextafter(0.1, 0)]), edges).tolist() == [25, 24]
