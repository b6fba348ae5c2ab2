"""
Each gate against its paper's formula; the table's rules for every gate in it, and for one from
outside.
"""

import functools
import math
import statistics
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eaft import token_statistics
from eaft.errors import ConfigurationError
from eaft.objective.gate_spec import bind_gate
from eaft.objective.registry import (
    GATES,
    Anchor,
    gate_weights,
    get_gate,
    register,
)
from tests.objective.test_statistics import cases, softmax, truth

# Parameters that have no default, and the other ways to call a gate
GIVEN = {
    "masked": {"entropy_threshold": 0.4},
    "conflict-mask": {"entropy_threshold": 0.6, "prob_threshold": 0.05},
    "flow": {"tau": 1.3},
}
VARIANTS = [
    *((name, GIVEN.get(name, {})) for name in GATES),
    ("eaft", {"alpha": 2.0}),
    ("eaft", {"alpha": 3.0, "entropy": "exact"}),
    ("eaft-sigmoid", {"steepness": 5.0, "center": 0.5, "entropy": "exact"}),
    ("masked", {"entropy_threshold": "batch", "entropy_percentile": 40.0}),
    ("masked", {"entropy_threshold": 0.4, "entropy": "exact"}),
    (
        "conflict-mask",
        {"entropy_threshold": "batch", "prob_threshold": "batch", "prob_percentile": 50.0},
    ),
    ("profit", {"prob_threshold": 0.03}),
    ("infosft", {"max_prob": 0.8}),
    ("mile", {"gamma": 0.5}),
    ("ranktuner", {"base": "one"}),
    ("psft", {"clip": 2.0}),
    ("stm", {"perplexity_threshold": 4.0}),
    ("talr", {"tau": 1.0}),
    ("talr", {"min_weight": 0.2}),
    ("sft-kl", {"kl_coef": 2.0, "kl_direction": "forward"}),
    ("asft", {"kl_coef": 0.7, "kl_direction": "reverse"}),
    ("tmkl", {"kl_coef": 0.7, "kl_direction": "reverse"}),
]
SEEN = [pytest.param(*variant, id=f"{variant[0]}-{i}") for i, variant in enumerate(VARIANTS)]
# One gate of each kind: by the token, by the batch, with an anchor. A gate sees statistics only. So
# every gate is tried at one setting, and dtype, chunks, architecture, packing and adapters are
# varied with these
KINDS = ("eaft", "talr", "asft")


def every_gate_once(settings, gates=tuple(GATES), kinds=KINDS):
    """
    Return (gate, setting) for every gate at the first of the settings, and for one gate of each
    kind at all.
    """
    first, *others = settings
    return [(gate, first) for gate in gates] + [
        (gate, setting) for setting in others for gate in kinds
    ]


def percentile(values, percent):
    """
    Linear interpolation between the order statistics, as in numpy's default and Hyndman & Fan's
    type 7.
    """
    values, place = sorted(values), percent / 100 * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


def formula(name, rows, labels, examples, example_nll, k=20, **params):
    """
    The weights of a batch of tokens, from the papers, in Python floats; a token's base nll is its
    example's.
    """
    stats = [truth(row, label, k) for row, label in zip(rows, labels, strict=True)]
    log_p = [t["log_prob"] for t in stats]
    p = [math.exp(x) for x in log_p]
    key = {"top-k": "top_k_entropy", "exact": "entropy"}[params.get("entropy", "top-k")]
    g = [min(1.0, t[key] / math.log(min(k, len(row)))) for t, row in zip(stats, rows, strict=True)]

    def threshold(which, values):
        given = params[f"{which}_threshold"]
        return (
            percentile(values, params.get(f"{which}_percentile", 15)) if given == "batch" else given
        )

    if name in ("sft", "sft-kl", "tmkl"):
        return [1.0] * len(rows)
    if name == "eaft":
        return [x ** params.get("alpha", 1.0) for x in g]
    if name == "eaft-sigmoid":
        return [
            1 / (1 + math.exp(-params.get("steepness", 30) * (x - params.get("center", 0.17))))
            for x in g
        ]
    if name == "masked":
        return [float(x > threshold("entropy", g)) for x in g]
    if name == "conflict-mask":
        low = [x <= threshold("entropy", g) for x in g], [x <= threshold("prob", p) for x in p]
        return [0.0 if a and b else 1.0 for a, b in zip(*low, strict=True)]
    if name in ("dft", "asft"):
        return p
    if name == "deft":
        return [x ** t["sum_sq_probs"] for x, t in zip(p, stats, strict=True)]
    if name == "psft":
        # d min(r, clip(r, 1 - 0.2, 1 + clip)) / d ln P(label), which is r, or 0 where the minimum
        # is a constant
        ratios = [math.exp(x + nll) for x, nll in zip(log_p, example_nll, strict=True)]
        return [r if r < 1 + params.get("clip", 0.28) else 0.0 for r in ratios]
    if name == "stm":
        limit = params.get("perplexity_threshold", 2.5)
        return [float(math.exp(nll) <= limit) for nll in example_nll]
    if name == "profit":
        return [float(x > params.get("prob_threshold", 0.1)) for x in p]
    if name == "infosft":
        # Where the other tokens have a probability of 0, logit(p) is infinite
        limit, others = (
            params.get("max_prob", 0.93),
            [
                math.fsum(q for j, q in enumerate(softmax(row)) if j != label)
                for row, label in zip(rows, labels, strict=True)
            ],
        )
        return [
            x * max(0.0, 1 - math.log(x / rest) / math.log(limit / (1 - limit)))
            if x * rest > 0
            else 0.0
            for x, rest in zip(p, others, strict=True)
        ]
    if name == "mile":
        return [(1 + t["entropy"]) ** params.get("gamma", 1.0) for t in stats]
    if name == "ranktuner":
        # The authors' code: their expected rank, exponent and scale
        weights = []
        for x, t in zip(p, stats, strict=True):
            bits = t["entropy"] / math.log(2)
            expected = 0.25 * 2**bits + 1 if bits >= 2 else 1 + (1 - t["first_prob"])
            exponent = 1 / math.log2(max(expected, t["rank"]) + 1) ** 2
            scale = max(x * expected, 1e-6) ** -exponent
            weights.append(scale if params.get("base") == "one" else scale * x)
        return weights
    if name == "talr":
        nlls = {
            e: [-x for x, other in zip(log_p, examples, strict=True) if other == e]
            for e in examples
        }
        tau = params.get("tau") or statistics.median(statistics.fmean(nll) for nll in nlls.values())
        return [max(math.exp(x / tau), params.get("min_weight", 0.01)) for x in log_p]
    if name == "flow":
        return [math.exp(-nll / params["tau"]) for nll in example_nll]
    raise NotImplementedError(name)


def with_examples(stats, examples, example_nll):
    example_nll = torch.tensor(example_nll, dtype=stats.log_prob.dtype)
    return replace(
        stats,
        example_ids=torch.tensor(examples),
        example_nll=example_nll,
        old_log_prob=-example_nll,
    )


def compute(logits, labels, examples, example_nll, top_k=20):
    stats = token_statistics(logits, torch.tensor(labels), top_k, ranked=True)
    return with_examples(stats, examples, example_nll)


@st.composite
def batches(draw):
    """A few tokens of a few examples: logits, labels, the examples and their base nll."""
    vocab = draw(st.integers(2, 40))
    n = draw(st.integers(1, 8))
    rows = draw(
        st.lists(
            st.lists(st.floats(-30, 30, width=32), min_size=vocab, max_size=vocab),
            min_size=n,
            max_size=n,
        )
    )
    labels = draw(st.lists(st.integers(0, vocab - 1), min_size=n, max_size=n))
    examples = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    base = draw(st.lists(st.floats(0.01, 10), min_size=4, max_size=4))
    return rows, labels, examples, [base[e] for e in examples]


def close_to_a_threshold(name, params, batch):
    """Whether rounding alone may decide on which side of its threshold a token of a mask lies."""
    if name == "ranktuner":
        bits = [
            truth(row, label, 20)["entropy"] / math.log(2)
            for row, label in zip(*batch[:2], strict=True)
        ]
        return any(abs(b - 2) < 1e-9 for b in bits)
    if name not in ("masked", "conflict-mask", "profit", "psft", "stm"):
        return False
    defaults = {
        "profit": {"prob_threshold": 0.1},
        "psft": {"clip": 0.28},
        "stm": {"perplexity_threshold": 2.5},
    }
    params = {**defaults.get(name, {}), **params}
    nudged = [
        formula(
            name,
            *batch,
            **{k: v * (1 + e) if isinstance(v, float) else v for k, v in params.items()},
        )
        for e in (-1e-9, 1e-9)
    ]
    stats = compute(torch.tensor(batch[0], dtype=torch.float64), *batch[1:])
    values = torch.cat([stats.top_k_entropy, stats.entropy, stats.prob]).sort().values
    ties = "batch" in params.values() and bool((values.diff() < 1e-9).any())
    return nudged[0] != nudged[1] or ties


@pytest.mark.parametrize(("name", "params"), SEEN)
@settings(deadline=None, max_examples=10)
@given(batch=batches())
def test_gate_is_its_formula_and_in_its_range(name, params, batch):
    if close_to_a_threshold(name, params, batch):
        return
    logits = torch.tensor(batch[0], dtype=torch.float64, requires_grad=True)
    weights = gate_weights(name, compute(logits, *batch[1:]), **params)
    # Near g = 0 a power of g magnifies its rounding; talr divides ln p by a tau that may be tiny
    assert weights.tolist() == pytest.approx(formula(name, *batch, **params), rel=1e-6, abs=1e-9)
    assert not weights.requires_grad
    least = {"talr": params.get("min_weight", 0.01), "mile": 1.0}.get(name, 0.0)
    most = math.inf if name in ("mile", "psft") or params.get("base") == "one" else 1.0 + 1e-12
    assert all(least <= w <= most for w in weights.tolist())


@pytest.mark.parametrize(("name", "params"), SEEN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gate_is_its_formula_on_adversarial_logits(name, params, dtype):
    if "batch" in params.values():
        params = GIVEN[name]  # tokens that tie are sorted by their rounding
    rows = {case: row.to(dtype) for case, row in cases().items()}
    for row in rows.values():
        labels, examples, example_nll = [1, 2, 1], [5, 5, 9], [0.5, 0.5, 2.0]
        weights = gate_weights(
            name, compute(row.repeat(3, 1), labels, examples, example_nll), **params
        )
        expected = formula(
            name, [row.double().tolist()] * 3, labels, examples, example_nll, **params
        )
        tolerance = 1e-10 if dtype == torch.float64 else 3e-5
        assert weights.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(("name", "params"), SEEN)
def test_weights_ignore_a_constant_and_follow_the_tokens(name, params):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 30, dtype=torch.float64, generator=generator) * 3
    labels = torch.randint(30, (9,), generator=generator)
    labels[::3] = logits.argmax(-1)[::3]  # not all are unlikely
    labels = labels.tolist()
    examples, base = [0, 0, 0, 1, 1, 2, 2, 2, 2], [0.3, 0.3, 0.3, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    weights = gate_weights(name, compute(logits, labels, examples, base), **params)
    torch.testing.assert_close(
        gate_weights(name, compute(logits + 3.7, labels, examples, base), **params), weights
    )
    order = torch.randperm(9, generator=generator).tolist()
    shuffled = compute(logits[order], *([x[i] for i in order] for x in (labels, examples, base)))
    torch.testing.assert_close(gate_weights(name, shuffled, **params), weights[order])
    assert name in ("sft", "sft-kl", "tmkl") or weights.unique().numel() > 1


def falls_never(values):
    return bool((values.diff() >= 0).all())


@pytest.mark.parametrize("name", ["eaft", "eaft-sigmoid", "masked", "conflict-mask", "mile"])
@settings(deadline=None, max_examples=40)
@given(scales=st.lists(st.integers(1, 200), min_size=2, max_size=20, unique=True))
def test_weight_never_falls_as_the_entropy_rises(name, scales):
    row = torch.linspace(0, 1, 25, dtype=torch.float64)
    stats = token_statistics(
        torch.stack([row * s / 10 for s in sorted(scales, reverse=True)]),
        torch.zeros(len(scales)).long(),
    )
    assert falls_never(stats.top_k_entropy)
    # The same probability for all, so that only the entropy changes
    same = replace(stats, log_prob=torch.full_like(stats.log_prob, -5.0))
    assert falls_never(gate_weights(name, same, **GIVEN.get(name, {})))


@pytest.mark.parametrize("name", ["dft", "asft", "deft", "talr", "conflict-mask", "profit"])
@settings(deadline=None, max_examples=40)
@given(log_probs=st.lists(st.floats(-30, 0), min_size=2, max_size=20), spread=st.floats(0, 5))
def test_weight_never_falls_as_the_probability_rises(name, log_probs, spread):
    one = token_statistics(
        torch.arange(25, dtype=torch.float64).unsqueeze(0) * spread, torch.tensor([0])
    )
    n = len(log_probs)
    stats = replace(
        one,
        log_prob=torch.tensor(sorted(log_probs), dtype=torch.float64),
        **{
            f: getattr(one, f).expand(n)
            for f in ("entropy", "top_k_entropy", "sum_sq_probs", "is_top1")
        },
        example_ids=torch.arange(n) % 3,
    )
    assert falls_never(gate_weights(name, stats, **GIVEN.get(name, {})))


def test_flow_falls_with_the_base_models_nll():
    stats = compute(torch.zeros(3, 5), [0, 0, 0], [0, 1, 2], [0.1, 1.0, 5.0])
    assert falls_never(-gate_weights("flow", stats, tau=1.0))


def test_talr_takes_the_median_over_examples_not_over_tokens():
    logits = torch.tensor(
        [[0.0, 4.0], [0.0, 4.0], [0.0, 4.0], [0.0, 0.0], [0.0, -3.0]], dtype=torch.float64
    )
    examples = [7, 7, 7, 3, 5]  # three tokens of one long, hard example
    batch = (logits.tolist(), [0] * 5, examples, [1.0] * 5)
    weights = gate_weights("talr", compute(logits, *batch[1:]))
    assert weights.tolist() == pytest.approx(formula("talr", *batch))
    # tau is the nll of the example in the middle, ln 2, so that one's weight is e^-1
    assert weights[3].item() == pytest.approx(math.exp(-1))


def test_uniform_gate_is_one_and_sure_gate_is_zero():
    uniform, sure = torch.zeros(100), torch.zeros(100)
    sure[5] = 1000.0
    weights = gate_weights(
        "eaft", token_statistics(torch.stack([uniform, sure]), torch.tensor([0, 0]))
    )
    assert weights.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert weights.max() <= 1


def test_exact_entropy_is_clamped():
    stats = token_statistics(torch.zeros(1, 1000), torch.tensor([0]))  # H = ln 1000 > ln 20
    assert gate_weights("eaft", stats, entropy="exact").item() == 1


def test_a_perfectly_fitted_batch_gives_talr_no_nan():
    sure = torch.tensor([[0.0, -math.inf], [0.0, -math.inf]])
    stats = compute(sure, [0, 0], [0, 1], [1.0, 1.0])
    assert gate_weights("talr", stats).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("name", "params"), SEEN)
def test_a_label_that_cannot_occur_gives_no_nan(name, params):
    logits = torch.tensor([[0.0, -math.inf, 0.0], [1.0, 2.0, 3.0]])
    weights = gate_weights(name, compute(logits, [1, 1], [0, 1], [math.inf, 1.0]), **params)
    assert weights.isfinite().all()


def test_adding_a_gate_from_outside():
    @register("confident")
    def confident(stats):
        """Weight sum of squared probabilities."""
        return stats.sum_sq_probs

    try:
        stats = token_statistics(torch.zeros(2, 10, requires_grad=True), torch.tensor([0, 1]))
        assert gate_weights("confident", stats).tolist() == pytest.approx([0.1, 0.1])
        assert get_gate("confident").help == "Weight sum of squared probabilities."
        assert get_gate("confident").weight is confident
    finally:
        del GATES["confident"]


def test_a_gate_is_imported_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "own_gates.py").write_text(
        "def half(stats, share=0.5):\n    return 0 * stats.prob + share\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_gates", raising=False)
    stats = token_statistics(torch.zeros(2, 10), torch.tensor([0, 1]))
    assert gate_weights("own_gates:half", stats, share=0.25).tolist() == [0.25, 0.25]
    with pytest.raises(ConfigurationError, match="gate='own_gates:third' cannot be imported"):
        get_gate("own_gates:third")
    with pytest.raises(ConfigurationError, match="gate='no_gates:half' cannot be imported"):
        get_gate("no_gates:half")
    assert get_gate("eaft.objective.gates:talr") is GATES["talr"]  # with what it needs


def test_a_gate_cannot_leak_gradient():
    logits = torch.randn(3, 10, requires_grad=True)
    assert not gate_weights(
        lambda stats: stats.log_prob.exp() * 2, token_statistics(logits, torch.tensor([0, 1, 2]))
    ).requires_grad


def test_unknown_gate_names_the_nearest_and_all():
    with pytest.raises(
        ConfigurationError, match=r"gate='eaf' is unknown. Did you mean 'eaft'\? Gates: .*dft"
    ):
        bind_gate("eaf", {})
    with pytest.raises(ConfigurationError, match="gate='dft' takes no alpha; it takes nothing"):
        bind_gate("dft", {"alpha": 1.0})


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("eaft", {"alpha": -1.0}, "alpha must be a number of at least 0"),
        ("eaft", {"alpha": "two"}, "gate='eaft'"),
        ("eaft-sigmoid", {"steepness": math.nan}, "weights that are not finite"),
        ("eaft", {"entropy": "full"}, "expected 'top-k' or 'exact'"),
        ("masked", {}, "needs entropy_threshold"),
        ("masked", {"entropy_threshold": "data"}, "expected a number or 'batch'"),
        ("masked", {"entropy_threshold": "batch", "entropy_percentile": 120}, "between 0 and 100"),
        ("conflict-mask", {"entropy_threshold": 0.1}, "needs prob_threshold"),
        ("profit", {"prob_threshold": 1.5}, "prob_threshold must be between 0 and 1, got 1.5"),
        ("infosft", {"max_prob": 0.5}, "max_prob must be between 0.5 and 1, got 0.5"),
        ("mile", {"gamma": -0.5}, "gamma must be a number of at least 0, got -0.5"),
        ("ranktuner", {"base": "p"}, "base='p': expected 'prob' or 'one'"),
        ("talr", {"tau": 0.0}, "tau must be a positive number or 'batch', got 0.0"),
        ("talr", {"tau": "median"}, "tau must be a positive number or 'batch'"),
        ("flow", {"tau": -1.0}, "tau must be positive"),
        ("psft", {"clip": -0.1}, "clip must be a number of at least 0, got -0.1"),
        ("stm", {"perplexity_threshold": 0.9}, "must be a number of at least 1, got 0.9"),
        ("sft-kl", {"kl_coef": -0.5}, "kl_coef must be a number of at least 0"),
        ("asft", {"kl_direction": "sideways"}, "expected 'forward' or 'reverse'"),
        ("eaft", {"kl_coef": 0.5}, "takes no kl_coef"),
    ],
)
def test_bad_parameters_are_refused_before_anything_runs(name, params, message):
    with pytest.raises(ConfigurationError, match=message):
        bind_gate(name, params)


def test_parameters_measured_later_may_be_missing():
    assert bind_gate("flow", {}, measured=["tau"]).missing == ("tau",)


def test_missing_examples_are_named():
    stats = token_statistics(torch.zeros(1, 5), torch.tensor([0]))
    with pytest.raises(ConfigurationError, match="'talr' needs example_ids"):
        gate_weights("talr", stats)
    with pytest.raises(ConfigurationError, match="'flow' needs example_nll"):
        gate_weights("flow", stats, tau=1.0)
    for gate in ("psft", "stm"):
        with pytest.raises(ConfigurationError, match=f"'{gate}' needs old_log_prob"):
            gate_weights(gate, stats)
    with pytest.raises(ConfigurationError, match="'ranktuner' needs rank"):
        gate_weights("ranktuner", stats)


def test_wrong_shape_is_refused():
    with pytest.raises(ConfigurationError, match="returned shape"):
        gate_weights(
            lambda stats: stats.log_prob.mean(),
            token_statistics(torch.zeros(2, 5), torch.tensor([0, 1])),
        )


def test_anchors_are_the_papers():
    assert bind_gate("sft-kl").anchor == Anchor(0.5, "reverse")  # arXiv:2601.02151, appendix F.2
    assert bind_gate("asft").anchor == Anchor(
        0.1, "forward"
    )  # arXiv:2509.23753, equation 6 and the authors' default
    assert bind_gate("asft", {"kl_coef": 0.3}).anchor == Anchor(0.3, "forward")
    assert bind_gate("tmkl", {"kl_coef": 0.3}).anchor == Anchor(0.3, "forward", without_label=True)
    assert bind_gate("eaft").anchor is None


@pytest.mark.parametrize("name", sorted(GATES))
def test_every_gate_says_what_it_does_and_where_it_is_from(name):
    assert ": weight " in GATES[name].help  # plain words, then the formula
    assert name == "sft" or "arXiv:" in GATES[name].weight.__doc__


def test_partial_functions_are_gates():
    stats = token_statistics(torch.zeros(1, 40), torch.tensor([0]))
    weights = gate_weights(functools.partial(GATES["eaft"].weight, alpha=2.0), stats)
    assert weights.item() == pytest.approx(1)
