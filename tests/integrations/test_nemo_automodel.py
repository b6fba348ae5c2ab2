"""
NeMo AutoModel's losses, called as its recipes call them
(`nemo_automodel.components.loss.utils.calculate_loss`).
"""

import pytest
import torch
from torch import nn

from eaft.errors import ConfigurationError

from ..conftest import make_model
from .formula import terms


class ChunkedCrossEntropy(nn.Module):
    """What ours takes of the host's."""

    def __init__(self, chunk_len=512, compile=True):
        super().__init__()
        assert not compile
        self.ignore_index = -100

    @staticmethod
    def materialize_lm_weight(lm_weight, *, grad_reduce_group=None):
        return lm_weight

    @staticmethod
    def validate_lm_head(lm_head, *, model_config=None):
        if model_config is not None:
            raise ValueError("ChunkedCrossEntropy does not support final_logit_softcapping")
        return lm_head


class MaskedCrossEntropy(nn.Module):
    ignore_index = -100


@pytest.fixture
def host(import_with):
    return import_with(
        "nemo_automodel",
        nemo_automodel__components__loss__chunked_ce={"ChunkedCrossEntropy": ChunkedCrossEntropy},
        nemo_automodel__components__loss__masked_ce={"MaskedCrossEntropy": MaskedCrossEntropy},
    )


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 6, 8, generator=generator).requires_grad_()
    weight = torch.randn(50, 8, generator=generator).requires_grad_()
    labels = torch.randint(50, (2, 6), generator=generator)
    labels[0, :3] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("gate", ["sft", "eaft", "dft"])
@pytest.mark.parametrize("count", [None, 13])
def test_loss_and_gradients_are_the_formulas(host, batch, gate, count):
    hidden, weight, labels = batch
    expected = terms(hidden.double() @ weight.double().T, labels, gate).sum() / (count or 1)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    linear = host.GatedCrossEntropy(gate=gate)(
        hidden_states=hidden,
        labels=labels,
        lm_weight=weight,
        num_label_tokens=count,
        grad_reduce_group=None,
        logits_dtype=torch.float32,
    )
    of_logits = host.GatedCrossEntropyFromLogits(gate=gate)(
        logits=hidden @ weight.T, labels=labels, num_label_tokens=count
    )
    for loss in (linear, of_logits):
        torch.testing.assert_close(loss, expected.float())
        torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), gradients)


def test_packed_batch(host, batch):
    hidden, weight, labels = batch
    packed = {
        "hidden_states": hidden.reshape(1, 12, 8),
        "labels": labels.flatten(),
        "lm_weight": weight,
    }
    expected = terms(hidden.double() @ weight.double().T, labels).sum() / 9
    torch.testing.assert_close(
        host.GatedCrossEntropy()(**packed, num_label_tokens=9), expected.float()
    )


def test_validation_is_the_plain_nll(host, batch):
    hidden, weight, labels = batch
    expected = terms(hidden.double() @ weight.double().T, labels, "sft").sum().float()
    with torch.no_grad():
        linear = host.GatedCrossEntropy(gate="eaft", gate_alpha=2)(hidden, labels, weight)
        of_logits = host.GatedCrossEntropyFromLogits(gate="eaft", gate_alpha=2)(
            hidden @ weight.T, labels
        )
    torch.testing.assert_close(linear, expected)
    torch.testing.assert_close(of_logits, expected)


def test_a_batch_without_labels_gives_zero_gradients(host, batch):
    hidden, weight, labels = batch
    loss = host.GatedCrossEntropy()(
        hidden, torch.full_like(labels, -100), weight, num_label_tokens=0
    )
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


def test_logits_are_scaled_and_capped_as_the_model_does(host, batch):
    hidden, weight, labels = batch
    config = make_model().config
    config.logit_scale, config.final_logit_softcapping = 0.5, 3.0
    loss = host.GatedCrossEntropy()
    head = nn.Linear(8, 50, bias=False)
    assert loss.validate_lm_head(head, model_config=config) is head
    logits = 3.0 * torch.tanh(0.5 * hidden.double() @ weight.double().T / 3.0)
    found = loss(hidden, labels, weight, num_label_tokens=9)
    torch.testing.assert_close(found, (terms(logits, labels).sum() / 9).float())


def test_another_head_is_sent_to_the_loss_from_logits(host, monkeypatch):
    def refuse(lm_head):
        raise ValueError(
            "ChunkedCrossEntropy requires a plain bias-free nn.Linear; use MaskedCrossEntropy"
        )

    monkeypatch.setattr(ChunkedCrossEntropy, "validate_lm_head", staticmethod(refuse))
    with pytest.raises(ConfigurationError, match=r"take .*GatedCrossEntropyFromLogits"):
        host.GatedCrossEntropy().validate_lm_head(nn.Linear(8, 50))


@pytest.mark.parametrize("loss", ["GatedCrossEntropy", "GatedCrossEntropyFromLogits"])
def test_refuses_what_it_cannot_do(host, loss):
    with pytest.raises(ConfigurationError, match="needs the base model"):
        getattr(host, loss)(gate="sft-kl")
    with pytest.raises(ConfigurationError, match="Did you mean 'eaft'"):
        getattr(host, loss)(gate="eatf")
    with pytest.raises(ConfigurationError, match="gate_top_k must be at least 2, got 1"):
        getattr(host, loss)(gate_top_k=1)
    with pytest.raises(ConfigurationError, match="needs entropy_threshold"):
        getattr(host, loss)(gate="masked")
