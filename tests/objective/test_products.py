"""The matrix products of the fused loss: what is rounded, when, and in which dtype."""

import time

import pytest
import torch

from eaft.objective import products
from tests.objective.problem import relative_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bit_products_are_not_rounded(dtype, monkeypatch):
    monkeypatch.setattr(products, "CAST_BUDGET", 100 * 4 * 70)  # in three blocks
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((250, 70), (70, 33)))
    before = torch.backends.mkldnn.matmul.fp32_precision
    once = products.add_product(None, a, b, torch.float32)
    truth = a.double() @ b.double()
    assert relative_error(once.double(), truth) < 4 * torch.finfo(torch.float32).eps
    twice = products.add_product(once.clone(), a, b, torch.float32)
    assert relative_error(twice.double(), 2 * truth) < 4 * torch.finfo(torch.float32).eps
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
def test_products_after_a_cast_are_the_products(dtype, biased, monkeypatch):
    """Blocks that do not divide the vocabulary; sums are rounded once, at their end."""
    monkeypatch.setattr(products, "CAST_BUDGET", 100 * 4 * 20)
    monkeypatch.setattr(products, "cast_first", lambda matrix: True)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((30, 20), (250, 20), (250,))
    )
    project = products.Projector(hidden, weight, bias if biased else None, dtype, 30)
    found, truth = project(slice(0, 30)), hidden.double() @ weight.double().T
    truth += bias.double() * biased
    assert_rounded_once(found, truth)
    grad_logits, out = found.clone(), torch.empty_like(hidden)
    assert project.multiply(grad_logits, out) is out
    assert_rounded_once(out, grad_logits.double() @ weight.double())
    product = products.add_product(None, grad_logits.T, hidden, dtype)
    assert_rounded_once(product, grad_logits.double().T @ hidden.double())


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_which_products_are_slow(slow, monkeypatch):
    def product(a, b, mm=torch.mm):
        if a.dtype == slow:
            time.sleep(0.02)
        return mm(a, b)

    monkeypatch.setattr(torch, "mm", product)
    assert products.slow_bfloat16.__wrapped__() == (slow == torch.bfloat16)


def assert_rounded_once(value, truth):
    """Half a unit in the last place, and what a float32 sum is off by."""
    allowed = 0.5 * torch.finfo(value.dtype).eps * truth.abs() + 1e-4
    assert ((value.double() - truth).abs() <= allowed).all()


def test_a_factor_is_not_rounded_to_the_gradients_dtype():
    gradient = torch.randn(300, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    factor = torch.tensor(1 / 3.01)
    expected = (gradient.double() * factor.double()).to(torch.bfloat16)
    assert not torch.equal(expected, gradient * factor.to(torch.bfloat16))
    assert torch.equal(products.scaled(gradient, factor, torch.bfloat16), expected)
