"""The fused loss: equal to the reference in value, statistics and gradients."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from eaft import gated_cross_entropy, linear_gated_cross_entropy, token_statistics
from eaft.errors import ConfigurationError
from eaft.objective import fused, torch_backend
from eaft.objective.chunk import Head, LogitTransform
from eaft.objective.fused import Reference
from eaft.objective.registry import GATES
from tests.objective.problem import (
    CAPPED,
    DEVICE,
    Problem,
    broken,
    capped,
    flatten,
    fuse,
    plain,
    plain_without_bias,
    relative_error,
)
from tests.objective.test_gates import GIVEN, KINDS, VARIANTS, every_gate_once


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
