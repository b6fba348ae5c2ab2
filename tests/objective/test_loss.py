"""The reference loss against the paper's formula and a finite difference."""

import math

import pytest
import torch

from eaft import gated_cross_entropy
from eaft.errors import ConfigurationError
from tests.objective.test_gates import GIVEN, SEEN, every_gate_once, formula
from tests.objective.test_statistics import cases, softmax


def kl_and_gradient(row, reference, direction):
    """
    KL between two softmaxes, and its gradient by the first one's logits; -inf adds nothing where
    both have it.
    """
    p, q = softmax(row), softmax(reference)
    log_ratio = [math.log(a / b) if a > 0 and b > 0 else 0.0 for a, b in zip(p, q, strict=True)]
    if direction == "reverse":
        kl = math.fsum(a * r for a, r in zip(p, log_ratio, strict=True))
        return kl, [a * (r - kl) for a, r in zip(p, log_ratio, strict=True)]
    return -math.fsum(b * r for b, r in zip(q, log_ratio, strict=True)), [
        a - b for a, b in zip(p, q, strict=True)
    ]


def expected_loss(name, rows, labels, examples, example_nll, references, **params):
    """
    The loss and its gradient by the logits of labelled tokens, from the papers; the gate is a
    constant.
    """
    weights = formula(name, rows, labels, examples, example_nll, **params)
    coef, direction = {
        "sft-kl": (0.5, "reverse"),
        "asft": (0.1, "forward"),
        "tmkl": (1.0, "forward"),
    }.get(name, (0.0, "reverse"))
    coef, direction = params.get("kl_coef", coef), params.get("kl_direction", direction)
    total, gradients, n = 0.0, [], len(rows)
    for row, label, weight, reference in zip(rows, labels, weights, references, strict=True):
        probs = softmax(row)
        pair = row, reference
        if name == "tmkl":  # both without the label
            pair = ([*z[:label], -math.inf, *z[label + 1 :]] for z in pair)
        kl, kl_gradient = kl_and_gradient(*pair, direction) if coef else (0.0, [0.0] * len(row))
        total += weight * -math.log(probs[label]) + coef * kl
        gradients.append(
            [
                (weight * (p - (j == label)) + coef * k) / n
                for (j, p), k in zip(enumerate(probs), kl_gradient, strict=True)
            ]
        )
    return total / n, gradients


@pytest.mark.parametrize(("gate", "params"), SEEN)
@pytest.mark.parametrize("vocab", [7, 45])
def test_value_and_gradient_are_the_formula(gate, params, vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits, references = 3 * torch.randn(2, 6, vocab, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    labels = torch.tensor([0, 3, -100, 6, -100, 2])
    examples, example_nll = (
        torch.tensor([0, 0, 0, 1, 1, 2]),
        torch.tensor([0.4, 0.4, 0.4, 1.7, 1.7, 3.0]),
    )
    loss = gated_cross_entropy(
        logits,
        labels,
        gate,
        example_ids=examples,
        example_nll=example_nll.double(),
        old_log_prob=-example_nll.double(),
        reference_logits=references,
        **params,
    )
    loss.backward()

    kept = labels != -100
    batch = (x[kept].tolist() for x in (logits, labels, examples, example_nll.double(), references))
    value, gradients = expected_loss(gate, *batch, **params)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    for row, expected in zip(logits.grad[kept].tolist(), gradients, strict=True):
        assert row == pytest.approx(expected, abs=1e-12)
    assert torch.equal(logits.grad[~kept], torch.zeros(2, vocab))


@pytest.mark.parametrize(
    ("gate", "dtype"), every_gate_once([torch.float32, torch.float64, torch.bfloat16])
)
@pytest.mark.parametrize("case", cases())
def test_value_and_gradient_on_adversarial_logits(gate, dtype, case):
    params = GIVEN.get(gate, {})
    row = cases()[case].to(dtype)
    reference = torch.where(
        row.isfinite(), torch.randn(row.shape, generator=torch.Generator().manual_seed(1)), row
    )
    logits = row.repeat(3, 1).requires_grad_()
    labels, examples, example_nll = [1, 2, 1], [0, 0, 1], [0.5, 0.5, 2.0]
    loss = gated_cross_entropy(
        logits,
        torch.tensor(labels),
        gate,
        example_ids=torch.tensor(examples),
        example_nll=torch.tensor(example_nll, dtype=torch.float64),
        old_log_prob=-torch.tensor(example_nll, dtype=torch.float64),
        reference_logits=reference.to(dtype).repeat(3, 1),
        **params,
    )
    loss.backward()
    rows, references = [row.double().tolist()] * 3, [reference.to(dtype).double().tolist()] * 3
    if (
        min(softmax(rows[0])[label] for label in labels) < 1e-300
    ):  # one-hot: the formula's own logarithm is of 0
        assert loss.isfinite()
        assert logits.grad.isfinite().all()
        return
    value, gradients = expected_loss(
        gate, rows, labels, examples, example_nll, references, **params
    )
    # A gradient is returned in the logits' dtype; bfloat16 has 8 bits
    rounding = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 2**-8}[dtype]
    assert loss.item() == pytest.approx(value, rel=min(rounding, 3e-5), abs=min(rounding, 3e-5))
    for got, expected in zip(logits.grad.tolist(), gradients, strict=True):
        assert got == pytest.approx(expected, rel=rounding, abs=min(rounding, 3e-5))


@pytest.mark.parametrize(("low", "clip"), [(0.2, 0.28), (0.5, 0.5)], ids=["PSFT", "OPC-SFT"])
def test_gradient_of_psft_is_that_of_the_papers_loss(low, clip):
    logits = torch.randn(
        40, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    labels, old = torch.arange(40) % 9, torch.linspace(-5.0, -0.2, 40, dtype=torch.float64)
    ratio = (logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1) - old).exp()
    assert (ratio < 1 - low).any()
    assert (ratio > 1 + clip).any()
    (expected,) = torch.autograd.grad(
        -torch.minimum(ratio, ratio.clamp(1 - low, 1 + clip)).mean(), logits
    )
    (gradient,) = torch.autograd.grad(
        gated_cross_entropy(logits, labels, "psft", old_log_prob=old, clip=clip), logits
    )
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("gate", ["sft-kl", "asft", "tmkl"])
def test_gradient_of_an_anchor_is_the_finite_difference(gate):
    logits, references = torch.randn(
        2, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.tensor([1, 2, 3, 4])

    def kl_part(logits):
        # The gated nll cancels: what is left is differentiated by autograd's own numeric check
        loss = gated_cross_entropy(logits, labels, gate, reference_logits=references, kl_coef=1.0)
        return loss - gated_cross_entropy(
            logits, labels, gate, reference_logits=references, kl_coef=0.0
        )

    assert torch.autograd.gradcheck(kl_part, logits.requires_grad_())
    assert kl_part(references).abs() < 1e-15


def test_a_closed_gate_shuts_out_an_infinite_nll():
    logits = torch.tensor([[0.0, -math.inf, -math.inf], [1.0, 2.0, 3.0]], requires_grad=True)
    labels = torch.tensor([1, 1])
    for gate in ("eaft", "dft", "deft", "profit", "ranktuner"):
        loss = gated_cross_entropy(logits, labels, gate)
        assert loss.item() == pytest.approx(
            gated_cross_entropy(logits[1:], labels[1:], gate, num_items=2).item()
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all()
        assert gradient[0].abs().max() == 0
    assert gated_cross_entropy(logits, labels, "sft").isinf()


@pytest.mark.parametrize(("gate", "params"), SEEN)
def test_a_nan_is_never_hidden(gate, params):
    logits = torch.tensor([[1.0, math.nan, 0.0], [1.0, 2.0, 3.0]])
    nll, reference = torch.ones(2), torch.zeros(2, 3)
    loss = gated_cross_entropy(
        logits,
        torch.tensor([1, 1]),
        gate,
        example_nll=nll,
        old_log_prob=-nll,
        reference_logits=reference,
        **params,
    )
    assert loss.isnan()


def test_what_a_gate_needs_is_asked_for():
    logits, labels = torch.zeros(2, 5), torch.tensor([0, 1])
    with pytest.raises(ConfigurationError, match="needs reference_logits"):
        gated_cross_entropy(logits, labels, "asft")
    with pytest.raises(ConfigurationError, match="needs example_nll"):
        gated_cross_entropy(logits, labels, "flow", tau=1.0)
    with pytest.raises(ConfigurationError, match="needs old_log_prob"):
        gated_cross_entropy(logits, labels, "psft")
    with pytest.raises(ConfigurationError, match="needs entropy_threshold"):
        gated_cross_entropy(logits, labels, "masked")


def test_rows_are_the_examples_unless_said_otherwise():
    logits, labels = torch.randn(3, 4, 9), torch.randint(9, (3, 4))
    rows = torch.arange(3).unsqueeze(1).expand(3, 4)
    by_row = gated_cross_entropy(logits, labels, "talr", example_ids=rows)
    torch.testing.assert_close(gated_cross_entropy(logits, labels, "talr"), by_row)
    flat = gated_cross_entropy(logits.view(12, 9), labels.view(12), "talr")
    torch.testing.assert_close(
        flat, gated_cross_entropy(logits, labels, "talr", example_ids=torch.zeros_like(labels))
    )
    assert (flat - by_row).abs() > 1e-4


def test_num_items_divides():
    logits, labels = torch.randn(4, 30, dtype=torch.float64), torch.tensor([1, -100, 2, 3])
    mean = gated_cross_entropy(logits, labels)
    assert gated_cross_entropy(logits, labels, num_items=12).item() == pytest.approx(
        mean.item() * 3 / 12
    )
    assert gated_cross_entropy(logits, labels, num_items=torch.tensor(12)).item() == pytest.approx(
        mean.item() * 3 / 12
    )


def test_ignore_index_is_honoured():
    logits = torch.randn(3, 30)
    expected = gated_cross_entropy(logits[:2], torch.tensor([1, 2]))
    torch.testing.assert_close(
        gated_cross_entropy(logits, torch.tensor([1, 2, 0]), ignore_index=0), expected
    )


@pytest.mark.parametrize(("gate", "params"), SEEN)
def test_no_labelled_token_is_a_connected_zero(gate, params):
    logits = torch.randn(3, 30, requires_grad=True)
    labels, none = torch.full((3,), -100), torch.zeros(3)
    context = {"example_nll": none, "old_log_prob": none, "reference_logits": torch.randn(3, 30)}
    loss = gated_cross_entropy(logits, labels, gate, **context, **params)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(3, 30))


def test_bfloat16_logits_are_computed_in_float32():
    logits, labels = torch.randn(50, 300).bfloat16(), torch.randint(300, (50,))
    loss = gated_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        gated_cross_entropy(logits.double(), labels).item(), rel=1e-6
    )


def test_unknown_parameter_is_refused():
    with pytest.raises(ConfigurationError, match="takes no alpha"):
        gated_cross_entropy(torch.zeros(1, 5), torch.tensor([0]), "sft", alpha=2.0)
