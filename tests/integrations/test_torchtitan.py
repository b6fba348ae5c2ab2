"""torchtitan's loss, called as its trainer, and its chunks of the sequence, call it."""

from dataclasses import dataclass

import pytest
import torch

from eaft.errors import ConfigurationError

from .formula import terms


class BaseLoss:
    """What ours takes of the host's."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        pass

    def __call__(self, pred, labels, global_valid_tokens=None, **kwargs):
        loss = self.fn(pred, labels)
        return (loss if global_valid_tokens is None else loss / global_valid_tokens), {}


@pytest.fixture
def host(import_with):
    return import_with(
        "torchtitan",
        torchtitan__components__loss={"BaseLoss": BaseLoss, "IGNORE_INDEX": -100},
        torchtitan__distributed__spmd_types={"spmd_mesh_size": lambda axis: 1},
    )


def build(host, **flags):
    return host.GatedCrossEntropy(host.GatedCrossEntropy.Config(**flags), compile_config=None)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(50, (2, 6), generator=generator)
    labels[0, :3] = -100
    return (3 * torch.randn(2, 6, 50, generator=generator)).requires_grad_(), labels


@pytest.mark.parametrize("gate", ["sft", "eaft", "dft"])
def test_loss_and_gradient_are_the_formulas(host, batch, gate):
    logits, labels = batch
    valid = torch.tensor(13)
    expected = terms(logits, labels, gate).sum() / valid
    loss, metrics = build(host, gate=gate)(logits, labels, valid, positions=None)
    assert metrics == {}
    torch.testing.assert_close(loss, expected.float())
    for one, other in zip(
        *(torch.autograd.grad(value, logits) for value in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_chunks_add_up(host, batch):
    logits, labels = batch
    loss = build(host)
    chunks = zip(logits.split(2, dim=1), labels.split(2, dim=1), strict=True)
    total = sum(loss(some, of_them, torch.tensor(9))[0] for some, of_them in chunks)
    torch.testing.assert_close(total, loss(logits, labels, torch.tensor(9))[0])


def test_validation_is_the_plain_nll(host, batch):
    logits, labels = batch
    with torch.no_grad():
        found, _ = build(host, gate="eaft", gate_alpha=2.0)(logits, labels)
    torch.testing.assert_close(found, terms(logits, labels, "sft").sum().float().detach())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"gate": "psft"}, "needs the base model"),
        ({"gate": "talr"}, "weighs tokens by others"),
        (
            {"gate": "masked", "gate_kwargs": {"entropy_threshold": "batch"}},
            "weighs tokens by others",
        ),
        ({"gate": "eaft", "gate_kwargs": {"beta": 1}}, "takes no beta"),
    ],
)
def test_refuses_what_it_cannot_do(host, flags, said):
    with pytest.raises(ConfigurationError, match=said):
        build(host, **flags)


def test_refuses_a_part_of_the_vocabulary(host, batch, monkeypatch):
    monkeypatch.setattr(host, "spmd_mesh_size", {"tp": 2}.get)
    with pytest.raises(ConfigurationError, match="no tensor parallelism"):
        build(host)(*batch)
