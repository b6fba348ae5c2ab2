"""A vocabulary that is sharded over two ranks against the whole one in each of them."""

from dataclasses import fields

import pytest
import torch
import torch.distributed as dist

from eaft import linear_gated_cross_entropy
from eaft.errors import ConfigurationError
from eaft.objective.chunk import Head, LogitTransform
from eaft.objective.fused import Reference, linear_token_statistics
from eaft.objective.vocabulary import shard_vocabulary
from tests.processes import run_ranks

TOKENS, HIDDEN, V = 23, 8, 37  # top-K takes more than a rank's 19 or 18 rows
SHARDS = (slice(0, 19), slice(19, V))
PLAIN, CAPPED = {}, {"logit_scale": -0.5, "softcap": 3.0}
# A gate of each need: none, the top-K entropy, the rank, all tokens before any weight
CASES = [("sft", CAPPED), ("eaft", PLAIN), ("infosft", PLAIN), ("talr", PLAIN)]


def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = 2 * torch.randn(V, HIDDEN, generator=generator, dtype=torch.float64)
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    bias[5] = -torch.inf  # a token that cannot occur
    weight[30] = weight[2]  # the first of equals counts, on whichever rank
    bias[30] = bias[2] = 9.0
    labels = torch.randint(6, V, (TOKENS,), generator=generator)
    labels[3] = -100
    return [x.requires_grad_() for x in (hidden, weight, bias)], labels


def loss_and_gradients(tensors, labels, **options):
    """The loss in chunks of a few tokens, its parts, and the gradients of a multiple of it."""
    loss, losses = linear_gated_cross_entropy(
        tensors[0], tensors[1], labels, bias=tensors[2], logits_budget=1500, return_losses=True,
        **options,
    )  # fmt: skip
    return loss, losses, torch.autograd.grad(3 * loss, tensors)


def same(actual, expected):
    for field in fields(expected):
        value = getattr(expected, field.name)
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(actual, field.name), value, msg=field.name)


def in_each_rank():
    dist.init_process_group("gloo")
    mine = SHARDS[dist.get_rank()]
    (hidden, weight, bias), labels = inputs()
    own = [x.detach().clone().requires_grad_() for x in (hidden, weight[mine], bias[mine])]
    for gate, transform in CASES:
        loss, losses, gradients = loss_and_gradients(
            [hidden, weight, bias], labels, gate=gate, **transform
        )
        sharded = loss_and_gradients(
            own, labels, gate=gate, vocab_group=dist.group.WORLD, **transform
        )
        torch.testing.assert_close(sharded[0], loss)
        torch.testing.assert_close(sharded[1].weights, losses.weights)
        same(sharded[1].statistics, losses.statistics)
        expected = (gradients[0], gradients[1][mine], gradients[2][mine])
        torch.testing.assert_close(sharded[2], expected)
    labelled = labels != -100
    vocabulary = shard_vocabulary(dist.group.WORLD, len(own[1]), own[1].device)
    same(
        linear_token_statistics(
            own[0][labelled], Head(own[1], own[2], LogitTransform(), vocabulary), labels[labelled]
        ),
        linear_token_statistics(hidden[labelled], Head(weight, bias), labels[labelled]),
    )
    beyond = labels.where(labels != labels[0], V)
    assert loss_and_gradients(own, beyond, vocab_group=dist.group.WORLD)[0].isnan()
    reference = Reference(hidden.detach(), weight.detach())
    for options, message in [
        ({"gate": "sft-kl", "reference": reference}, "gate='sft-kl' has a KL term"),
        ({"backend": "triton"}, "backend='triton' does not shard the vocabulary"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            loss_and_gradients(own, labels, vocab_group=dist.group.WORLD, **options)
    dist.destroy_process_group()


def test_two_ranks_equal_one():
    run_ranks(in_each_rank)
