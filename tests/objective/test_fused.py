"""
The fused loss: equal to the reference in value, statistics and gradients, as exact as plain
cross-entropy.
"""

import math
import os
import time
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from eaft import gated_cross_entropy, linear_gated_cross_entropy, token_statistics
from eaft.errors import ConfigurationError
from eaft.objective import fused, products, torch_backend
from eaft.objective.chunk import Head, LogitTransform
from eaft.objective.fused import Reference
from eaft.objective.registry import GATES
from tests.objective.test_gates import GIVEN, KINDS, VARIANTS, every_gate_once

# Where there is a GPU all of this runs on it, the kernels compiled
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """
    Run through torch, or through the Triton kernels: on a GPU if there is one, else interpreted.
    """
    use(request.param, monkeypatch)
    return request.param


@pytest.fixture
def kernels(monkeypatch):
    """Run through the Triton kernels."""
    use("triton", monkeypatch)


def use(backend, monkeypatch):
    choose = fused.choose_backend
    monkeypatch.setattr(
        fused,
        "choose_backend",
        lambda name, hidden, *vocabulary: choose(
            None if hidden.dtype == torch.float64 else backend, hidden, *vocabulary
        ),
    )


class Problem:
    """Hidden states, a head and labels; everything else a gate may need beside them."""

    def __init__(self, n=11, vocab=45, width=8, dtype=torch.float64, scale=1.0, seed=0, bias=True):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = (normal(n, width) * scale).to(dtype)
        self.weight = normal(vocab, width).to(dtype)
        self.bias = normal(vocab).to(dtype) if bias else None
        self.labels = torch.randint(vocab, (n,), generator=generator)
        self.labels[torch.rand(n, generator=generator) < 0.3] = -100
        self.labels[0] = vocab - 1
        self.example_ids = torch.randint(4, (n,), generator=generator)
        self.example_nll = (normal(4).abs() + 0.1)[self.example_ids]
        reference_hidden = (self.hidden + 0.3 * normal(n, width)).to(DEVICE, dtype)
        for name, value in vars(self).items():
            setattr(self, name, None if value is None else value.to(DEVICE))
        self.reference = Reference(reference_hidden, self.weight, self.bias)

    def to(self, dtype):
        """The same numbers in another dtype."""
        other = Problem(1)
        for name, value in vars(self).items():
            if isinstance(value, Reference):
                tensors = (value.hidden, value.weight, value.bias)
                value = Reference(*(None if t is None else t.to(dtype) for t in tensors))
            elif value is not None and value.is_floating_point():
                value = value.to(dtype)
            setattr(other, name, value)
        return other

    def leaves(self):
        names = ["hidden", "weight", "bias"] if self.bias is not None else ["hidden", "weight"]
        return {name: getattr(self, name).detach().clone().requires_grad_() for name in names}

    @property
    def context(self):
        return {
            "example_ids": self.example_ids,
            "example_nll": self.example_nll,
            "old_log_prob": -self.example_nll,
        }


def capped(z, logit_scale=1.0, softcap=None):
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def plain(problem, gate="eaft", logit_scale=1.0, softcap=None, **params):
    """
    Loss, statistics and gradients by the reference function, on logits in the problem's dtype.
    """
    leaves = problem.leaves()

    def logits(hidden, weight, bias=None):
        return capped(torch.nn.functional.linear(hidden, weight, bias), logit_scale, softcap)

    z, r = logits(**leaves), problem.reference
    loss = gated_cross_entropy(
        z,
        problem.labels,
        gate,
        reference_logits=logits(r.hidden, r.weight, r.bias),
        **problem.context,
        **params,
    )
    loss.backward()
    kept = problem.labels != -100
    return (
        loss,
        token_statistics(z[kept], problem.labels[kept]).detach(),
        {k: v.grad for k, v in leaves.items()},
    )


def fuse(problem, gate="eaft", **kwargs):
    """The same by the fused function."""
    leaves = problem.leaves()
    loss, losses = linear_gated_cross_entropy(
        leaves["hidden"],
        leaves["weight"],
        problem.labels,
        gate,
        leaves.get("bias"),
        reference=problem.reference,
        return_losses=True,
        **problem.context,
        **kwargs,
    )
    loss.backward()
    return loss, losses.statistics, {k: v.grad for k, v in leaves.items()}


def flatten(result):
    """Every number of a result by name, as float64 tensors."""
    loss, stats, gradients = result
    fields = ("log_prob", "entropy", "top_k_entropy", "sum_sq_probs")
    return {
        "loss": loss.detach().double(),
        **{field: getattr(stats, field).double() for field in fields},
        **{f"gradient of {name}": gradient.double() for name, gradient in gradients.items()},
    }


def relative_error(value, truth):
    return ((value - truth).norm() / truth.norm().clamp(min=1e-300)).item()


CAPPED = {"logit_scale": 0.4, "softcap": 2.0}


@pytest.mark.parametrize(
    ("variant", "setting"),
    every_gate_once(
        [(3, CAPPED), (3, {}), (100, CAPPED), (100, {})], VARIANTS, [(gate, {}) for gate in KINDS]
    ),
)
def test_equals_the_reference_function(variant, setting, monkeypatch):
    (gate, params), (tokens_at_a_time, head), problem = variant, setting, Problem()
    monkeypatch.setattr(torch_backend, "CACHE_BUDGET", 2 * 45 * 4 * 2)  # two rows a block
    ours = fuse(problem, gate, logits_budget=tokens_at_a_time * 45 * 8, **head, **params)
    theirs = plain(problem, gate, **head, **params)
    numbers = flatten(ours)
    for name, truth in flatten(theirs).items():
        torch.testing.assert_close(
            numbers[name], truth, rtol=1e-10, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert torch.equal(ours[1].is_top1, theirs[1].is_top1)
    assert ours[1].top_k == theirs[1].top_k


SIZES = {
    "one token": {"n": 1},
    "a last partial chunk": {"n": 29},
    "vocabulary of 3": {"n": 9, "vocab": 3},
    "vocabulary of 4099": {"n": 7, "vocab": 4099},
    "sharp": {"scale": 30.0},
    "flat": {"scale": 1e-4, "bias": False, "vocab": 300},
    "in the thousands": {"scale": 3000.0},
}


def check_as_exact_as_plain(gate, size, dtype, seeds=16, tokens_at_a_time=5):
    """
    The relative norm error of every number is at most that of the reference function in the same
    dtype.

    Over all seeds together, since one rounding is luck. The margin is half the plain error, and 8
    units in the last place of the format the number is returned in: two sums of the same terms in
    another order differ by that much.
    """
    found = {"truth": [], "plain": [], "ours": []}
    for seed in range(seeds):
        problem = Problem(**{"n": 23, "vocab": 150, "width": 16, "seed": seed, **SIZES[size]}).to(
            dtype
        )
        found["truth"].append(flatten(plain(problem.to(torch.float64), gate)))
        found["plain"].append(flatten(plain(problem, gate)))
        found["ours"].append(
            flatten(
                fuse(
                    problem,
                    gate,
                    logits_budget=tokens_at_a_time * problem.weight.shape[0] * dtype.itemsize,
                )
            )
        )
    for name in found["truth"][0]:
        truth, naive, ours = (
            torch.cat([result[name].flatten() for result in found[key]]) for key in found
        )
        # Statistics and loss are float32 whatever the inputs, but of logits that were rounded to
        # the inputs' dtype
        ulp = torch.finfo(dtype if name.startswith("gradient") else torch.float32).eps
        error, plainly = relative_error(ours, truth), relative_error(naive, truth)
        assert error <= 1.5 * plainly + 8 * ulp, f"{name}: {error:.2e}, plain {plainly:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("gate", "size"),
    every_gate_once(
        ["a last partial chunk", *(size for size in SIZES if size != "a last partial chunk")],
        ("sft", "eaft", "deft", "talr", "sft-kl", "asft", "tmkl"),
        ("eaft", "asft"),
    ),
)
def test_as_exact_as_plain_cross_entropy(gate, size, dtype):
    check_as_exact_as_plain(gate, size, dtype)


@pytest.mark.parametrize("size", [size for size in SIZES if size != "in the thousands"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_chunk_is_as_exact(size, dtype):
    check_as_exact_as_plain("eaft", size, dtype, tokens_at_a_time=100)


@pytest.mark.parametrize("size", ["one token", "a last partial chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_as_exact_as_plain_cross_entropy(size, dtype, kernels):
    """In chunks; other sizes and scales of the logits are in test_triton_backend.py."""
    check_as_exact_as_plain("eaft", size, dtype, seeds=3)


@pytest.mark.parametrize(
    ("variant", "head"), every_gate_once([CAPPED, {}], VARIANTS, [(gate, {}) for gate in KINDS])
)
def test_the_kernels_equal_the_reference_function(variant, head, kernels):
    (gate, params), problem = variant, Problem(n=5, dtype=torch.float32)
    ours, theirs = (flatten(f(problem, gate, **head, **params)) for f in (fuse, plain))
    for name, number in theirs.items():
        torch.testing.assert_close(
            ours[name], number, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def broken(function, spoil):
    return lambda *args, **kwargs: spoil(function(*args, **kwargs))


def spoil_gate(monkeypatch, spoil):
    """Spoil the weights in the fused loss, and not in the reference function."""

    def spoilt(bound):
        weight = broken(bound.gate.weight, spoil)
        return replace(bound, gate=replace(bound.gate, weight=weight))

    monkeypatch.setattr(fused, "bind_gate", broken(fused.bind_gate, spoilt))


MUTANTS = {
    "the gate is 0": lambda m: spoil_gate(m, lambda w: 0 * w),
    "the gate is halved": lambda m: spoil_gate(m, lambda w: w / 2),
    "the gate is permuted": lambda m: spoil_gate(m, lambda w: w.flip(0)),
    "a chunk is dropped": lambda m: m.setattr(
        fused,
        "add_product",
        lambda total, a, b, dtype: (a.to(dtype) @ b.to(dtype)) if total is None else total,
    ),
    "the gradient of the weight is missing": lambda m: m.setattr(
        fused, "add_product", broken(fused.add_product, lambda product: 0 * product)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rule_of_exactness_catches(mutant, dtype, monkeypatch):
    check_as_exact_as_plain("eaft", "a last partial chunk", dtype)
    MUTANTS[mutant](monkeypatch)
    with pytest.raises(AssertionError, match=r"(loss|gradient of \w+): "):
        check_as_exact_as_plain("eaft", "a last partial chunk", dtype)


def test_the_rule_of_exactness_catches_a_gate_that_lets_gradient_through():
    problem = Problem(n=29, vocab=150, width=16).to(torch.float32)
    kept = problem.labels != -100

    def leaking(problem):
        leaves = problem.leaves()
        logits = torch.nn.functional.linear(
            **{"input": leaves["hidden"], **{k: leaves[k] for k in ("weight", "bias")}}
        )
        log_probs = logits[kept].log_softmax(-1)
        top = logits[kept].topk(20).values.log_softmax(-1)
        gate = -(top.exp() * top).sum(-1) / math.log(20)  # not detached
        (
            gate * cross_entropy(logits[kept], problem.labels[kept], reduction="none")
        ).mean().backward()
        return {name: leaf.grad.double() for name, leaf in leaves.items()}, log_probs

    truth = flatten(plain(problem.to(torch.float64)))
    naive = flatten(plain(problem))
    for name, gradient in leaking(problem)[0].items():
        plain_error = relative_error(naive[f"gradient of {name}"], truth[f"gradient of {name}"])
        assert (
            relative_error(gradient, truth[f"gradient of {name}"])
            > 1.25 * plain_error + 8 * torch.finfo(torch.float32).eps
        )


def test_ties_at_the_kth_place(backend):
    weight = torch.eye(50, device=DEVICE)
    hidden = torch.zeros(3, 50, device=DEVICE)
    hidden[:, 10:] = -1.0
    labels = torch.tensor([0, 20, 49], device=DEVICE)
    _, losses = linear_gated_cross_entropy(hidden, weight, labels, return_losses=True)
    expected = token_statistics(hidden, labels)
    torch.testing.assert_close(losses.statistics.top_k_entropy, expected.top_k_entropy)
    assert torch.equal(losses.statistics.is_top1, expected.is_top1)


def test_logits_that_are_minus_infinity(backend):
    for finite in (30, 5):
        bias = torch.full((64,), -math.inf)
        bias[:finite] = torch.randn(finite, generator=torch.Generator().manual_seed(0))
        problem = Problem(vocab=64, dtype=torch.float32)
        problem.bias, problem.labels = (
            bias.to(DEVICE),
            problem.labels.where(problem.labels < 0, problem.labels % finite),
        )
        problem.reference = Reference(problem.reference.hidden, problem.weight, problem.bias)
        for gate in ("eaft", "asft", "sft-kl", "tmkl"):
            ours, theirs = flatten(fuse(problem, gate)), flatten(plain(problem, gate))
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_a_nan_is_never_hidden(backend):
    problem = Problem(dtype=torch.float32)
    problem.weight[3, 0] = math.nan
    for gate in ("sft", "eaft", "masked"):
        assert fuse(problem, gate, **GIVEN.get(gate, {}))[0].isnan()


def test_a_closed_gate_shuts_out_an_infinite_nll():
    weight, hidden = torch.eye(3), torch.tensor([[0.0, -math.inf, -math.inf], [1.0, 2.0, 3.0]])
    hidden.requires_grad_()
    bias = torch.zeros(3)
    # -inf * 0 is NaN in a product, so the projection is given as it is
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fused.Projector, "__call__", lambda p, rows: p.memory[:2].copy_(p.hidden[rows])
        )
        loss = linear_gated_cross_entropy(hidden, weight, torch.tensor([1, 1]), "eaft", bias)
    expected = gated_cross_entropy(hidden.detach()[1:], torch.tensor([1]), "eaft", num_items=2)
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    assert hidden.grad[0].abs().max() == 0


def test_no_labelled_token_is_a_zero_with_zero_gradients(backend):
    problem = Problem(dtype=torch.float32)
    problem.labels[:] = -100
    for gate in GATES:
        loss, stats, gradients = fuse(problem, gate, **GIVEN.get(gate, {}))
        assert loss.item() == 0
        assert len(stats.nll) == 0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients.values())


def test_labels_of_any_shape_and_their_context():
    problem = Problem(n=12)
    shaped = Problem(n=12)
    shaped.hidden, shaped.labels = problem.hidden.view(3, 4, 8), problem.labels.view(3, 4)
    shaped.reference = Reference(
        problem.reference.hidden.view(3, 4, 8), problem.weight, problem.bias
    )
    shaped.example_ids, shaped.example_nll = (
        problem.example_ids.view(3, 4),
        problem.example_nll.view(3, 4),
    )
    for gate in ("eaft", "talr", "flow", "psft", "ranktuner", "asft", "tmkl"):
        a, b = (flatten(fuse(p, gate, **GIVEN.get(gate, {}))) for p in (problem, shaped))
        assert a["loss"] == b["loss"]
        assert torch.equal(a["gradient of hidden"].view(3, 4, 8), b["gradient of hidden"])
    rows = linear_gated_cross_entropy(shaped.hidden, shaped.weight, shaped.labels, "talr")
    ids = torch.arange(3).unsqueeze(1).expand(3, 4)
    assert rows == linear_gated_cross_entropy(
        shaped.hidden, shaped.weight, shaped.labels, "talr", example_ids=ids
    )


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_what_is_frozen_costs_no_product(frozen, monkeypatch, backend):
    problem, products = Problem(dtype=torch.float32), []
    monkeypatch.setattr(
        fused, "add_product", broken(fused.add_product, lambda p: products.append(p) or p)
    )
    mm, outs = (
        torch.mm,
        [],
    )  # widths of what is multiplied into memory that is there: logits, and hidden states

    def spy(*args, **kwargs):
        if "out" in kwargs:
            outs.append(kwargs["out"].shape[1])
        return mm(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", spy)
    leaves = problem.leaves()
    leaves[frozen].requires_grad_(False)
    linear_gated_cross_entropy(leaves["hidden"], leaves["weight"], problem.labels).backward()
    expected = flatten(plain_without_bias(problem))
    for name in {"weight", "hidden"} - {frozen}:
        torch.testing.assert_close(
            leaves[name].grad.double(), expected[f"gradient of {name}"], rtol=1e-4, atol=1e-6
        )
    assert leaves[frozen].grad is None
    assert len(products) == (0 if frozen == "weight" else 1)
    assert outs.count(8) == (0 if frozen == "hidden" else 1)


def plain_without_bias(problem):
    problem.bias = None
    problem.reference = Reference(problem.reference.hidden, problem.weight)
    return plain(problem)


def test_without_gradients_only_the_statistics_are_computed(monkeypatch, backend):
    problem = Problem(dtype=torch.float32)
    leaves = problem.leaves()
    monkeypatch.setattr(fused, "add_product", None)
    for doors in (torch_backend.TorchBackend, fused.triton_backend):
        monkeypatch.setattr(doors, "gradient_", None)
    with torch.no_grad():
        loss = linear_gated_cross_entropy(leaves["hidden"], leaves["weight"], problem.labels)
    assert not loss.requires_grad
    torch.testing.assert_close(
        loss.double(), flatten(plain_without_bias(problem))["loss"], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (-0.7, 3.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_statistics_with_ranks_and_without_a_loss(scale, softcap, dtype, monkeypatch, backend):
    monkeypatch.setattr(torch_backend, "CACHE_BUDGET", 2 * 45 * 4 * 2)  # two rows a block
    problem = Problem(n=30).to(dtype)
    labels = problem.labels.where(problem.labels >= 0, 3)
    hidden, weight, bias = (
        t.requires_grad_() for t in (problem.hidden, problem.weight, problem.bias)
    )
    options = {"logit_scale": scale, "softcap": softcap}
    budget = 7 * 45 * dtype.itemsize  # seven rows a chunk
    found = fused.linear_token_statistics(
        hidden, Head(weight, bias, LogitTransform(scale, softcap)), labels, logits_budget=budget
    )
    with torch.no_grad():
        z = capped(torch.addmm(bias, hidden, weight.T).double(), **options)
    truth = token_statistics(z, labels, ranked=True)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for name in ("log_prob", "entropy", "top_k_entropy", "sum_sq_probs", "first_prob"):
        got = getattr(found, name)
        assert not got.requires_grad
        torch.testing.assert_close(
            got.double(), getattr(truth, name), rtol=tolerance, atol=tolerance
        )
    assert torch.equal(found.rank, truth.rank)
    # bfloat16 has ties, of which any is the first choice
    assert torch.equal(z.gather(-1, found.first_choice.unsqueeze(-1)).squeeze(-1), z.amax(-1))
    assert found.rank.unique().numel() > 5
    empty = fused.linear_token_statistics(hidden[:0], Head(weight, bias), labels[:0])
    assert empty.rank.shape == (0,)


@pytest.mark.parametrize("width", [5, 64, 130, 1000])
def test_the_largest_are_found_as_torch_finds_them(width):
    logits = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    logits[::4] = logits[::4].round()  # with ties
    logits[1, 1:] = -math.inf
    logits[2, width // 2] = math.nan
    for k in {2, min(20, width), width}:
        top, first, largest = torch_backend.find_largest(logits, k)
        expected, index = logits.max(-1, keepdim=True)
        torch.testing.assert_close(top, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(first, index)
        expected = logits.topk(k).values
        torch.testing.assert_close(
            largest.sort(descending=True).values, expected, rtol=0, atol=0, equal_nan=True
        )


def test_a_second_backward_pass_is_refused():
    problem = Problem()
    leaves = problem.leaves()
    loss = linear_gated_cross_entropy(leaves["hidden"], leaves["weight"], problem.labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_a_derivative_of_the_gradient_is_refused():
    problem = Problem()
    leaves = problem.leaves()
    loss = linear_gated_cross_entropy(leaves["hidden"], leaves["weight"], problem.labels)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaves["hidden"], create_graph=True)


def test_the_gradient_follows_what_the_loss_is_multiplied_by():
    problem = Problem()
    for factor in (1.0, -3.5):
        leaves = problem.leaves()
        (
            factor
            * linear_gated_cross_entropy(
                leaves["hidden"], leaves["weight"], problem.labels, num_items=7
            )
        ).backward()
        truth = plain_without_bias(problem)[2]["weight"] * (problem.labels != -100).sum() / 7
        torch.testing.assert_close(leaves["weight"].grad, factor * truth)


def test_under_autocast_the_products_are_in_its_dtype():
    problem = Problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = fuse(problem)
    rounded = fuse(problem.to(torch.bfloat16))
    assert ours[0].item() == rounded[0].item()
    assert all(g.dtype == torch.float32 for g in ours[2].values())
    # The weight's gradient is accumulated in float32 and not rounded on its return
    torch.testing.assert_close(
        ours[2]["weight"], rounded[2]["weight"].float(), rtol=2**-7, atol=1e-4
    )


def test_in_a_compiled_model_and_under_activation_checkpointing():
    problem = Problem(dtype=torch.float32)
    expected = fuse(problem)

    def loss(hidden, weight, bias):
        return linear_gated_cross_entropy(2 * hidden / 2, weight, problem.labels, "eaft", bias)

    for run in (
        torch.compile(loss, backend="eager"),
        lambda *args: checkpoint(loss, *args, use_reentrant=False),
        lambda *args: checkpoint(loss, *args, use_reentrant=True),
    ):
        leaves = problem.leaves()
        value = run(leaves["hidden"], leaves["weight"], leaves["bias"])
        value.backward()
        assert value.item() == expected[0].item()
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, expected[2][name])


def test_what_a_gate_needs_is_asked_for():
    hidden, weight, labels = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 1])
    with pytest.raises(ConfigurationError, match="needs reference"):
        linear_gated_cross_entropy(hidden, weight, labels, "asft")
    with pytest.raises(ValueError, match="top_k must be at least 2"):
        linear_gated_cross_entropy(hidden, weight, labels, top_k=1)
    with pytest.raises(ConfigurationError, match="takes no beta"):
        linear_gated_cross_entropy(hidden, weight, labels, "eaft", beta=1.0)


def test_a_gate_that_looks_at_the_batch_gives_the_same_in_chunks_of_any_size():
    problem = Problem(n=29)

    def relative(stats):  # registered by nobody, so nothing is known of it
        return stats.prob / stats.prob.sum()

    one, many = (flatten(fuse(problem, relative, logits_budget=size * 45 * 8)) for size in (100, 2))
    for name in one:
        torch.testing.assert_close(one[name], many[name], rtol=1e-10, atol=1e-14)


def test_a_gate_may_return_one_number_for_all(backend):
    problem = Problem(dtype=torch.float32)

    def half(stats):
        return torch.tensor(0.5).expand(stats.nll.shape)

    ours, theirs = (
        flatten(fuse(problem, gate))
        for gate in (half, lambda stats: torch.full_like(stats.nll, 0.5))
    )
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(
    ("n", "vocab_size", "budget", "rows"),
    [
        (0, 100, 2**20, 1),
        (1, 100, 2**20, 1),
        (2000, 151_936, 2**33, 2000),  # a single chunk
        (9000, 151_936, 2**33, 4608),  # 9000 > 8192: two of equal size, in 256s
        (16_384, 151_936, 2**33, 8192),
        (4096, 151_936, 3 * 2**28, 2048),  # 2650 fit: 2560, and two chunks are 2048 each
        (1000, 151_936, 2**25, 100),  # 110 fit: ten of 100
    ],
)
def test_chunks_are_equal_and_in_whole_tiles(n, vocab_size, budget, rows):
    assert fused.chunk_rows(n, vocab_size, 2, budget) == rows
    assert rows * vocab_size * 2 <= max(budget, vocab_size * 2)


@pytest.mark.parametrize(
    ("dtype", "n", "gate", "rows"),
    [
        ("float32", 2000, "eaft", 512),
        ("float32", 20, "eaft", 20),
        ("bfloat16", 800, "eaft", 800),  # 512 fit. 288 more take no more than a float32 sum
        ("bfloat16", 900, "eaft", 512),
        ("bfloat16", 800, "sft-kl", 512),  # the reference's projection has 288 more, too
        ("bfloat16", 600, "sft-kl", 600),
    ],
)
def test_a_cpu_has_the_chunks_that_need_least_memory(dtype, n, gate, rows, monkeypatch):
    """How many rows are projected at a time into a vocabulary of 100 from a width of 150."""
    monkeypatch.setattr(fused, "LOGITS_BUDGET", 600 * 100 * (4 if dtype == "float32" else 2))
    sizes = []

    class Spy(fused.Projector):
        def __init__(self, hidden, weight, bias, dtype, size):
            sizes.append(size)
            super().__init__(hidden, weight, bias, dtype, size)

    monkeypatch.setattr(fused, "Projector", Spy)
    hidden, weight = (torch.zeros(k, 150, dtype=getattr(torch, dtype)) for k in (n, 100))
    reference = Reference(hidden, weight) if gate == "sft-kl" else None
    labels = torch.zeros(n, dtype=torch.long)
    linear_gated_cross_entropy(
        hidden, weight.requires_grad_(), labels, gate, reference=reference, backend="torch"
    )
    assert set(sizes) == {rows}


@pytest.mark.parametrize(
    ("tokens_at_a_time", "dtypes"), [(100, [torch.bfloat16]), (6, 4 * [torch.float32])]
)
def test_a_single_chunk_needs_no_float32_sum_of_the_heads_gradient(
    tokens_at_a_time, dtypes, monkeypatch
):
    problem, found = Problem(n=25).to(torch.bfloat16), []
    assert (problem.labels != -100).sum() == 21
    monkeypatch.setattr(
        fused, "add_product", broken(fused.add_product, lambda p: found.append(p.dtype) or p)
    )
    fuse(problem, logits_budget=tokens_at_a_time * 45 * 2)
    assert found == dtypes


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


def test_a_backend_that_cannot_be_had_is_refused(monkeypatch):
    arguments = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 1])
    with pytest.raises(ConfigurationError, match="backend='cuda': expected 'torch' or 'triton'"):
        linear_gated_cross_entropy(*arguments, backend="cuda")
    with pytest.raises(ConfigurationError, match="does not compute in float64"):
        linear_gated_cross_entropy(arguments[0].double(), *arguments[1:], backend="triton")
    monkeypatch.setattr(fused, "triton_backend", None)
    with pytest.raises(ConfigurationError, match="Triton is not installed"):
        linear_gated_cross_entropy(*arguments, backend="triton")


@pytest.mark.parametrize("gate", ["sft-kl", "asft", "tmkl"])
def test_a_model_does_not_diverge_from_itself(gate, backend):
    """Over a vocabulary in which a difference between two ways of rounding would add up."""
    problem = Problem(n=12, vocab=20_000, width=16).to(torch.float32)
    reference = Reference(problem.hidden, problem.weight, problem.bias)
    _, losses = linear_gated_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.labels,
        gate,
        problem.bias,
        reference=reference,
        return_losses=True,
    )
    assert torch.equal(losses.kl, torch.zeros_like(losses.kl))


@pytest.mark.parametrize("tokens_at_a_time", [10_000, 700])
def test_float16_does_not_overflow_before_it_is_divided(tokens_at_a_time):
    """
    4,096 tokens with one label: the sum of their gradients is beyond float16, their mean is not.
    """
    hidden = torch.full((4096, 8), 50.0, dtype=torch.float16)
    weight = torch.randn(45, 8, generator=torch.Generator().manual_seed(0)).to(torch.float16) / 100
    labels = torch.full((4096,), 3)
    leaves = [weight.clone().requires_grad_() for _ in range(2)]
    linear_gated_cross_entropy(
        hidden, leaves[0], labels, "sft", logits_budget=tokens_at_a_time * 90
    ).backward()
    gated_cross_entropy(hidden.double() @ leaves[1].double().T, labels, "sft").backward()
    assert (
        relative_error(leaves[0].grad.double(), leaves[1].grad.double())
        < 4 * torch.finfo(torch.float16).eps
    )


@pytest.mark.parametrize("tokens_at_a_time", [100, 3])
@pytest.mark.parametrize(
    ("hidden", "weight"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
    ],
)
def test_hidden_states_and_head_of_two_dtypes(hidden, weight, tokens_at_a_time):
    """The products are in the hidden states' dtype; each gradient comes back in its own."""
    problem = Problem().to(torch.bfloat16)
    problem.hidden, problem.weight = problem.hidden.to(hidden), problem.weight.to(weight)
    problem.bias, problem.reference = None, None
    ours = fuse(problem, logits_budget=tokens_at_a_time * 45 * 4)
    assert (ours[2]["hidden"].dtype, ours[2]["weight"].dtype) == (hidden, weight)
    problem.weight = problem.weight.to(hidden)
    truth, plainly = (
        {k: v.double() for k, v in fuse(p)[2].items()} for p in (problem.to(torch.float64), problem)
    )
    for name, gradient in ours[2].items():
        ulp = max(torch.finfo(dtype).eps for dtype in (hidden, weight))
        allowed = 1.5 * relative_error(plainly[name], truth[name]) + 2 * ulp
        assert relative_error(gradient.double(), truth[name]) <= allowed, name


def test_tensors_that_do_not_belong_together_are_refused():
    labels = torch.zeros(3, 4, dtype=torch.int64)
    with pytest.raises(
        ConfigurationError, match=r"labels \[3, 4\] do not go with a tensor \[4, 3, 8\]"
    ):
        linear_gated_cross_entropy(torch.zeros(4, 3, 8), torch.zeros(5, 8), labels)
    with pytest.raises(
        ConfigurationError, match=r"labels \[3, 4\] do not go with a tensor \[4, 3\]"
    ):
        linear_gated_cross_entropy(
            torch.zeros(3, 4, 8), torch.zeros(5, 8), labels, example_ids=labels.T
        )
