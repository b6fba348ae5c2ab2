"""
The Triton backend's three doors against float64 formulas: on a GPU if there is one, else
interpreted.
"""

import math
import os

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from eaft.objective.chunk import LogitTransform
from eaft.objective.registry import Anchor
from eaft.objective.statistics import token_statistics

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")
triton_backend = pytest.importorskip("eaft.objective.triton_backend")

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(0.4),
    "turned round": LogitTransform(-0.7),
    "capped": LogitTransform(0.4, 2.0),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FIELDS = ("log_prob", "entropy", "top_k_entropy", "sum_sq_probs")


def capped(z, transform):
    z = z * transform.logit_scale
    return z if transform.softcap is None else transform.softcap * torch.tanh(z / transform.softcap)


def in_rows_of(width, values):
    """The same values, each row in memory of `width` elements, which are NaN after its end."""
    memory = torch.full((len(values), width), math.nan, dtype=values.dtype, device=values.device)
    return memory[:, : values.shape[1]].copy_(values)


def padded(values):
    return in_rows_of(-(-values.shape[1] // 16) * 16, values)


class Problem:
    """A policy's and a reference's projections of some tokens, with labels and weights."""

    def __init__(self, n=3, vocab=70, dtype=torch.float32, scale=4.0, apart=0.5, seed=0):
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(2, n, vocab, generator=generator, dtype=torch.float64)
        self.projection = padded((scale * normal[0]).to(dtype).to(DEVICE))
        self.reference = padded((self.projection.cpu() + apart * normal[1]).to(dtype).to(DEVICE))
        self.labels = torch.randint(vocab, (n,), generator=generator).to(DEVICE)
        self.labels[0] = self.projection[0].argmax()
        self.labels[-1] = vocab - 1
        self.weights = torch.rand(n, generator=generator).to(DEVICE)


FORWARD = Anchor(1.0, "forward")


def truth(problem, transform, top_k=20, kl_coef=0.0, anchor=FORWARD, dtype=torch.float64):
    """Statistics, KL and gradient by PyTorch's own functions and autograd, in `dtype`."""
    z = problem.projection.to(dtype).requires_grad_()
    logits = capped(z, transform)
    pair = logits, capped(problem.reference.to(dtype), transform)
    if anchor.without_label:
        tokens = torch.arange(z.shape[1], device=DEVICE)
        others = tokens != problem.labels.unsqueeze(-1)
        pair = (x[others].view(len(z), -1) for x in pair)
    log_probs, reference = (x.log_softmax(-1) for x in pair)
    pair = (log_probs, reference) if anchor.direction == "forward" else (reference, log_probs)
    kl = kl_div(*pair, reduction="none", log_target=True).sum(-1)
    nll = cross_entropy(logits, problem.labels, reduction="none")
    ((problem.weights * nll).sum() + kl_coef * kl.sum()).backward()
    return token_statistics(logits.detach(), problem.labels, top_k), kl.detach(), z.grad


def ours(problem, transform, top_k=20, kl_coef=0.0, anchor=FORWARD):
    """The same through the doors."""
    args = problem.projection, problem.labels
    scores = triton_backend.score(*args, top_k, transform)
    divergence = triton_backend.diverge(
        problem.projection, problem.reference, problem.labels, scores, anchor, transform
    )
    memory = padded(problem.projection)
    gradient = triton_backend.gradient_(
        memory,
        problem.labels,
        problem.weights,
        scores,
        transform,
        divergence if kl_coef else None,
        kl_coef,
    )
    assert gradient.data_ptr() == memory.data_ptr()
    assert gradient.shape == memory.shape
    return scores.statistics, divergence.kl, gradient


def relative_error(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def check_as_exact_as_plain(transform, dtype, seeds, without_label=False, **sizes):
    """
    The relative norm error of every number is at most 1.5 times that of plain float32 formulas, and
    8 ulp.

    As in `test_fused_exactness.check_as_exact_as_plain`, whose reasons hold here.
    """
    found = {"truth": [], "plain": [], "ours": []}
    for seed in range(seeds):
        problem = Problem(dtype=dtype, seed=seed, **sizes)
        settings = {
            "transform": transform,
            "kl_coef": 0.3,
            "anchor": Anchor(1.0, ("forward", "reverse")[seed % 2], without_label),
        }
        found["truth"].append(truth(problem, **settings))
        found["plain"].append(truth(problem, **settings, dtype=torch.float32))
        found["ours"].append(ours(problem, **settings))
    for name in (*FIELDS, "kl", "gradient"):
        pick = {"kl": lambda r: r[1], "gradient": lambda r: r[2]}.get(
            name, lambda r, name=name: getattr(r[0], name)
        )
        exact, plain, own = (
            torch.cat([pick(result).flatten() for result in found[key]]) for key in found
        )
        ulp = torch.finfo(dtype if name == "gradient" else torch.float32).eps
        error, plainly = relative_error(own, exact), relative_error(plain, exact)
        assert error <= 1.5 * plainly + 8 * ulp, f"{name}: {error:.2e}, plain {plainly:.2e}"
    for exact, own in zip(found["truth"], found["ours"], strict=True):
        assert torch.equal(own[0].is_top1, exact[0].is_top1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_as_exact_as_plain_formulas(transform, dtype):
    check_as_exact_as_plain(TRANSFORMS[transform], dtype, seeds=2)


@pytest.mark.parametrize(
    ("transform", "dtype"), [("capped", torch.float32), ("plain", torch.bfloat16)]
)
def test_a_divergence_without_the_label_is_as_exact(transform, dtype):
    check_as_exact_as_plain(TRANSFORMS[transform], dtype, seeds=2, without_label=True)


@pytest.mark.parametrize(
    "sizes",
    [
        {"vocab": 3},
        {"vocab": 8192, "n": 1},
        {"vocab": 8193, "n": 1},
        {"vocab": 50257, "n": 1},
        {"scale": 30.0},
        {"scale": 1e-4, "vocab": 300},
        # Nearer each other, KL would be one probability of e^-14, which `exp` gives to 14 ulp
        {"scale": 3000.0, "apart": 300.0},
        {"apart": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_plain_formulas_at_other_sizes(sizes, dtype):
    # Of a KL that cancels, both errors are chance: over few tokens one is often twice the other
    seeds = 16 if "apart" in sizes else 2
    check_as_exact_as_plain(LogitTransform(), dtype, seeds=seeds, **{"n": 3, **sizes})


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_small_divergence_keeps_its_digits(direction):
    problem = Problem(n=6, vocab=2000, apart=0.014)
    anchor = Anchor(1.0, direction)
    exact = truth(problem, LogitTransform(), anchor=anchor)[1]
    assert exact.mean().item() == pytest.approx(1e-4, rel=0.2)
    torch.testing.assert_close(
        ours(problem, LogitTransform(), anchor=anchor)[1].double(), exact, rtol=5e-3, atol=0
    )
    problem.reference = problem.projection.clone()
    assert torch.equal(
        ours(problem, LogitTransform(), anchor=anchor)[1], torch.zeros(6, device=DEVICE)
    )


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_tokens_of_probability_0_add_nothing_to_the_divergence(direction):
    problem = Problem()
    problem.projection[:, 10:30] = problem.reference[:, 10:30] = -math.inf
    problem.labels[:] = 4
    z, q = (
        x.double()[:, [*range(10), *range(30, 70)]] for x in (problem.projection, problem.reference)
    )
    anchor = Anchor(1.0, direction)
    expected = anchor.kl(z.log_softmax(-1), q.log_softmax(-1))
    _, kl, gradient = ours(problem, LogitTransform(), kl_coef=0.3, anchor=anchor)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=3e-7)
    assert gradient[:, 10:30].abs().max() == 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("transform", ["turned round", "capped"])
def test_above_128_torch_looks_for_the_top_k(transform, monkeypatch):
    problem, top_k = Problem(vocab=300), 129
    expected = truth(problem, TRANSFORMS[transform], top_k)[0].top_k_entropy
    found = triton_backend.score(
        problem.projection, problem.labels, top_k, TRANSFORMS[transform]
    ).statistics
    torch.testing.assert_close(found.top_k_entropy.double(), expected, rtol=1e-5, atol=0)
    assert found.top_k == top_k
    problem.projection[0, 3] = math.nan
    found = triton_backend.score(
        problem.projection, problem.labels, top_k, TRANSFORMS[transform]
    ).statistics
    assert found.top_k_entropy.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [2, 20])
def test_ties(top_k, dtype):
    """At the Kth place any of the equals will do; the first of equals at the top is the one."""
    levels = torch.randint(4, (6, 20000), generator=torch.Generator().manual_seed(0)).to(dtype)
    levels[1] = 1
    levels[2, 40:] = 0
    problem = Problem(n=6, vocab=20000, dtype=dtype)
    problem.projection.copy_(levels)
    problem.labels.copy_(torch.tensor([0, 0, 0, 8999, 0, 0]))
    firsts = problem.projection.float().argmax(-1)
    problem.labels[4] = firsts[4]
    problem.labels[5] = (problem.projection[5] == 3).nonzero()[1]  # a later one
    expected, found = (
        truth(problem, LogitTransform(), top_k)[0],
        ours(problem, LogitTransform(), top_k)[0],
    )
    torch.testing.assert_close(
        found.top_k_entropy.double(), expected.top_k_entropy, rtol=1e-5, atol=1e-6
    )
    assert torch.equal(found.is_top1, expected.is_top1)
    assert found.is_top1[4]
    assert not found.is_top1[5]


def test_the_top_k_may_lie_anywhere():
    """In one lane's columns, in one group, spread over all: against `torch.topk`."""
    vocab = 40000
    problem = Problem(n=4, vocab=vocab)
    problem.projection.clamp_(max=3.0)
    high = torch.linspace(4, 9, 64)
    problem.projection[0, torch.arange(64) % 4 + torch.arange(64) // 4 * 1024 + 8] = (
        high  # columns of few lanes
    )
    problem.projection[1, 1000:1064] = high
    problem.projection[2, -64:] = high
    problem.projection[3, torch.arange(64) * 600 + 7] = high
    expected = truth(problem, LogitTransform(), 20)[0].top_k_entropy
    torch.testing.assert_close(
        ours(problem, LogitTransform())[0].top_k_entropy.double(), expected, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("finite", [30, 5])
def test_logits_that_are_minus_infinity(finite):
    problem = Problem(vocab=64)
    problem.projection[:, finite:] = -math.inf
    problem.labels %= finite
    few = Problem(vocab=64)
    few.projection, few.reference = problem.projection[:, :finite], few.reference[:, :finite]
    few.labels = problem.labels
    expected, found = (
        truth(few, LogitTransform(), min(20, finite))[0],
        ours(problem, LogitTransform())[0],
    )
    for field in FIELDS:
        torch.testing.assert_close(
            getattr(found, field).double(), getattr(expected, field), rtol=1e-5, atol=1e-7
        )
    problem.labels[0] = 63
    assert ours(problem, LogitTransform())[0].log_prob[0] == -math.inf


@pytest.mark.parametrize("spoil", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("where", [0, 33, 8192, 9999])
def test_a_nan_is_never_hidden(where, spoil):
    problem = Problem(n=3, vocab=10000)
    problem.projection[1, where] = spoil
    problem.labels[:] = 5
    stats, kl, gradient = ours(problem, LogitTransform(), kl_coef=0.1)
    for field in FIELDS:
        assert getattr(stats, field).isnan().tolist() == [False, True, False], field
    assert kl.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, False]
    problem = Problem(n=3, vocab=10000)
    problem.reference[1, where] = spoil
    assert ours(problem, LogitTransform())[1].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("width", [50, 64, 67, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_stride(width, dtype):
    """
    What lies in memory between the rows is not part of them, and what lies beyond their padding
    stays.
    """
    problem = Problem(vocab=50, dtype=dtype)
    expected = ours(problem, LogitTransform(), kl_coef=0.3)
    scores = triton_backend.score(problem.projection, problem.labels, 20, LogitTransform())
    projection, reference = (
        in_rows_of(width, problem.projection),
        in_rows_of(width, problem.reference),
    )
    memory = projection.as_strided((len(projection), width), (width, 1))
    memory[:, 64:] = 7.0
    found = triton_backend.score(projection, problem.labels, 20, LogitTransform())
    divergence = triton_backend.diverge(
        projection, reference, problem.labels, found, FORWARD, LogitTransform()
    )
    for field in FIELDS:
        # In another order of their sums: an ulp or two of numbers around 4, the log-totals
        torch.testing.assert_close(
            getattr(found.statistics, field), getattr(expected[0], field), rtol=1e-6, atol=1e-6
        )
    # Two units in the last place of each of the two totals, between 1 and 2
    torch.testing.assert_close(
        divergence.kl, expected[1], rtol=1e-5, atol=4 * torch.finfo(torch.float32).eps
    )
    gradient = triton_backend.gradient_(
        projection, problem.labels, problem.weights, scores, LogitTransform(), divergence, 0.3
    )
    torch.testing.assert_close(gradient, expected[2])
    assert (memory[:, 64:] == 7.0).all()


def test_rows_are_read_by_vectors_where_their_memory_allows():
    memory = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert triton_backend.layout(memory[:, :50]) == {"VECTOR": 8, "width": 64}
    assert triton_backend.layout(memory.float()[:, :50]) == {"VECTOR": 4, "width": 64}
    assert triton_backend.layout(memory[:, :40]) == {"VECTOR": 8, "width": 48}
    one_by_one = {"VECTOR": 1, "width": 50}
    assert triton_backend.layout(memory[:, 1:51]) == one_by_one  # starts between vectors
    assert triton_backend.layout(torch.zeros(4, 50)) == one_by_one
    assert triton_backend.layout(torch.zeros(4, 72)[:, :50]) == one_by_one
    assert triton_backend.layout(memory.flatten()[48:].as_strided((3, 50), (64, 1))) == {
        "VECTOR": 8,
        "width": 64,
    }
    # The last row's padding would be behind the end of the storage
    assert (
        triton_backend.layout(memory.flatten()[:242].clone().as_strided((4, 50), (64, 1)))
        == one_by_one
    )
    assert (
        triton_backend.layout(memory[:, :50], torch.zeros(4, 50, dtype=torch.bfloat16))
        == one_by_one
    )


def test_weights_and_labels_need_not_be_contiguous():
    problem = Problem()
    problem.weights[:] = 0.7
    expected = ours(problem, LogitTransform())[2]
    problem.weights = torch.tensor(0.7, device=DEVICE).expand(
        3
    )  # as a gate of one's own may return
    torch.testing.assert_close(ours(problem, LogitTransform())[2], expected)
    problem.labels = torch.stack([problem.labels, torch.zeros_like(problem.labels)], 1)[:, 0]
    stats, _, gradient = ours(problem, LogitTransform())
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(
        stats.log_prob.double(), truth(problem, LogitTransform())[0].log_prob, rtol=1e-5, atol=0
    )


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, whatever its arguments are on."""
    problem, current, launched = Problem(), [], []

    class On:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            current.append(self.tensor)

        def __exit__(self, *error):
            current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda projection, *args, **kwargs: launched.append((current[-1:], projection))

    monkeypatch.setattr(torch.cuda, "device_of", On)
    for name in ("score_kernel", "diverge_kernel", "gradient_kernel"):
        monkeypatch.setattr(triton_backend, name, Kernel())
    ours(problem, LogitTransform())
    assert len(launched) == 3
    assert all(on and on[0] is projection for on, projection in launched)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is not used")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_the_interpreters_faster_top_k_is_tritons(dtype):
    """See tests/conftest.py; with ties, since there are few values."""
    values = torch.randint(-40, 40, (4, 64), generator=torch.Generator().manual_seed(0)).to(dtype)
    found, expected = (torch.zeros(4, 16, dtype=dtype) for _ in range(2))
    both_top_ks[(1,)](values, found, expected)
    assert torch.equal(found, expected)
    assert torch.equal(found, values.topk(16).values)


@triton.jit
def both_top_ks(values_ptr, found_ptr, expected_ptr):
    rows = tl.arange(0, 4)[:, None]
    values = tl.load(values_ptr + rows * 64 + tl.arange(0, 64)[None, :])
    out = rows * 16 + tl.arange(0, 16)[None, :]
    tl.store(found_ptr + out, tl.topk(values, 16))
    tl.store(expected_ptr + out, tl.topk.tritons(values, 16))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_second_gpu():
    problem = Problem()
    expected = ours(problem, LogitTransform(), kl_coef=0.3)
    for name in ("projection", "reference", "labels", "weights"):
        value = getattr(problem, name).to("cuda:1")
        setattr(problem, name, padded(value) if value.dim() == 2 else value)
    found = ours(problem, LogitTransform(), kl_coef=0.3)
    torch.testing.assert_close(found[1].cpu(), expected[1].cpu())
    torch.testing.assert_close(found[2].cpu(), expected[2].cpu())


def test_no_token():
    problem = Problem()
    problem.projection, problem.reference = problem.projection[:0], problem.reference[:0]
    problem.labels, problem.weights = problem.labels[:0], problem.weights[:0]
    scores = triton_backend.score(problem.projection, problem.labels, 20, LogitTransform())
    assert isinstance(scores, triton_backend.Scores)
    assert len(scores.top) == len(scores.statistics.is_top1) == 0
    assert ours(problem, LogitTransform())[2].shape == (0, 70)


@pytest.mark.parametrize("label", [-1, 40, 10_000])
def test_a_label_that_is_none_is_never_hidden(label):
    projection = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scores = triton_backend.score(
        projection, torch.tensor([3, label], device=DEVICE), 20, LogitTransform()
    )
    assert scores.statistics.log_prob.isnan().tolist() == [False, True]
    assert not scores.statistics.is_top1[1]
