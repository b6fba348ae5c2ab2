"""
The table of gates: how much each token's cross-entropy counts, from the model's own statistics of that token.

A gate takes `TokenStatistics` and returns a weight per token. It is a constant in the gradient: `gate_weights` hands it
detached statistics and runs it without autograd. To add one, from here or from your own code:

    @register("confident")
    def confident(stats: TokenStatistics) -> Tensor:
        return stats.sum_sq_probs

Its keyword arguments are its parameters. One without a default is measured on the training data with the base model, if
`eaft.training.measure` knows its name, or must be given.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from eaft.errors import ConfigurationError, nearest
from eaft.objective.statistics import TokenStatistics, kl_divergence, token_statistics

Weight = Callable[..., Tensor]


@dataclass(frozen=True)
class Anchor:
    """
    A term beside the gated nll that holds the policy near a reference: coef * KL per token, over the whole vocabulary.

    `reverse` is KL(policy || reference), which punishes putting probability where the reference has none; `forward` is
    KL(reference || policy), which punishes taking it away where the reference has some.
    """

    coef: float
    direction: Literal["forward", "reverse"]

    def __post_init__(self) -> None:
        """Check the values."""
        if self.direction not in ("forward", "reverse"):
            raise ConfigurationError(f"kl_direction={self.direction!r}: expected 'forward' or 'reverse'.")
        if not (isinstance(self.coef, int | float) and math.isfinite(self.coef) and self.coef >= 0):
            raise ConfigurationError(f"kl_coef must be a number of at least 0, got {self.coef!r}.")

    def kl(self, log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
        """Return the divergence of each token, in nats, from two log-distributions `[..., V]`."""
        if self.direction == "reverse":
            return kl_divergence(log_probs, reference_log_probs)
        return kl_divergence(reference_log_probs, log_probs)

    def kl_and_gradient(self, log_probs: Tensor, reference_log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the divergence and its derivative by the policy's logits: p (ln p - ln q - KL), or p - q forward."""
        kl, probs = self.kl(log_probs, reference_log_probs), log_probs.exp()
        if self.direction == "forward":
            return kl, probs - reference_log_probs.exp()
        log_ratio = torch.where(probs > 0, log_probs - reference_log_probs, 0.0)
        return kl, probs * (log_ratio - kl.unsqueeze(-1))


@dataclass(frozen=True)
class Gate:
    """A weight per token, and what it needs beside the statistics of each token by itself."""

    weight: Weight
    per_token: bool = False  # a token's weight depends on no other token, so a chunk of them can be weighed by itself
    needs_examples: bool = False  # `stats.example_ids`: which example each token is from
    needs_example_nll: bool = False  # `stats.example_nll`: the base model's mean nll of that example
    needs_old_log_prob: bool = False  # `stats.old_log_prob`: ln P(label) under the base model
    needs_rank: bool = False  # `stats.rank` and `stats.first_prob`
    anchor: Anchor | None = None  # a reference model

    @property
    def params(self) -> dict[str, Any]:
        """The parameters it takes, with their defaults (`inspect.Parameter.empty` where there is none)."""
        params = {p.name: p.default for p in list(inspect.signature(self.weight).parameters.values())[1:]}
        anchor = {"kl_coef": self.anchor.coef, "kl_direction": self.anchor.direction} if self.anchor else {}
        return {**params, **anchor}

    @property
    def help(self) -> str:
        """Its one-line meaning: the first line of its docstring."""
        return (self.weight.__doc__ or "").strip().partition("\n")[0]


GateLike = str | Weight | Gate  # a registered name, `module:function`, or the thing itself

GATES: dict[str, Gate] = {}


def register(name: str, **needs: Any) -> Callable[[Weight], Weight]:
    """Register the decorated function as the gate `name`; `needs` are the fields of `Gate`."""

    def add(weight: Weight) -> Weight:
        GATES[name] = Gate(weight, **needs)
        return weight

    return add


def normalized_entropy(stats: TokenStatistics, entropy: str = "top-k") -> Tensor:
    """
    Return g in [0, 1]: the entropy over ln K, of the K most likely tokens (`top-k`) or of all (`exact`, clamped to 1).

    On SmolLM2-135M one token in 20 has more exact entropy than ln 20 nats (arXiv:2601.02151, Eq. 3, takes top-k).
    """
    if entropy not in ("top-k", "exact"):
        raise ValueError(f"entropy={entropy!r}: expected 'top-k' or 'exact'.")
    nats = stats.top_k_entropy if entropy == "top-k" else stats.entropy
    # Rounding can put a uniform top K a hair above ln K; a vocabulary of one token has no entropy to divide
    return (nats / math.log(max(stats.top_k, 2))).clamp(0, 1)


def resolve_threshold(threshold: float | str, values: Tensor, percentile: float, name: str) -> float | Tensor:
    """Return a threshold that is a number as it is; for `batch`, the percentile of `values`."""
    if not 0 <= percentile <= 100:
        raise ValueError(f"{name}_percentile must be between 0 and 100, got {percentile}.")
    if threshold == "batch":
        return torch.quantile(values, percentile / 100) if values.numel() else 0.0
    if not isinstance(threshold, int | float):
        raise ValueError(f"{name}_threshold={threshold!r}: expected a number or 'batch'.")
    return threshold


@register("sft", per_token=True)
def sft(stats: TokenStatistics) -> Tensor:
    """Weight 1: plain cross-entropy."""
    return torch.ones_like(stats.log_prob)


@register("eaft", per_token=True)
def eaft(stats: TokenStatistics, alpha: float = 1.0, entropy: str = "top-k") -> Tensor:
    """
    Weight g^alpha, g = entropy / ln K in [0, 1]: learn where the model is uncertain (arXiv:2601.02151).

    Alpha 2 and 3 are the paper's EAFT^2 and EAFT^3 (section 5.1). The authors' release in LLaMA-Factory divides by 3.0
    where the paper's equation 3 has ln K (2.9957 for K = 20), so its weight is ours times (ln 20 / 3)^alpha.
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be a number of at least 0, got {alpha}.")
    return normalized_entropy(stats, entropy) ** alpha


@register("eaft-sigmoid", per_token=True)
def eaft_sigmoid(
    stats: TokenStatistics, steepness: float = 30.0, center: float = 0.17, entropy: str = "top-k"
) -> Tensor:
    """Weight sigmoid(steepness (g - center)): a soft threshold on the entropy (arXiv:2601.02151, section 5.1)."""
    return torch.sigmoid(steepness * (normalized_entropy(stats, entropy) - center))


@register("masked", per_token=True)
def masked(
    stats: TokenStatistics,
    entropy_threshold: float | str,
    entropy_percentile: float = 15.0,
    entropy: str = "top-k",
) -> Tensor:
    """
    Weight 0 on the tokens of lowest entropy, else 1: Masked SFT (arXiv:2601.02151, Eq. 4).

    `entropy_threshold` is in units of g; the trainer measures it as the percentile over the training data under the
    base model. `batch` takes the percentile of the tokens given.
    """
    g = normalized_entropy(stats, entropy)
    return (g > resolve_threshold(entropy_threshold, g, entropy_percentile, "entropy")).to(g.dtype)


@register("conflict-mask", per_token=True)
def conflict_mask(
    stats: TokenStatistics,
    entropy_threshold: float | str,
    prob_threshold: float | str,
    entropy_percentile: float = 15.0,
    prob_percentile: float = 15.0,
    entropy: str = "top-k",
) -> Tensor:
    """
    Weight 0 where entropy and P(label) are both among the lowest, else 1 (arXiv:2601.02151, section 3.2, pilot study).

    The thresholds are measured or given as in `masked`. The paper ranks by the exact entropy: `entropy="exact"`.
    """
    g, prob = normalized_entropy(stats, entropy), stats.prob
    sure = g <= resolve_threshold(entropy_threshold, g, entropy_percentile, "entropy")
    unlikely = prob <= resolve_threshold(prob_threshold, prob, prob_percentile, "prob")
    return 1 - (sure & unlikely).to(g.dtype)


@register("dft", per_token=True)
def dft(stats: TokenStatistics) -> Tensor:
    """Weight P(label): learn what the model already finds likely (arXiv:2508.05629)."""
    return stats.prob


@register("deft", per_token=True)
def deft(stats: TokenStatistics) -> Tensor:
    """
    Weight P(label)^a, a = sum of squared probabilities: sft where unsure, dft where sure (arXiv:2602.11424).

    The authors' loss is (1 - p^a) / (a + 1e-6): another value, and a gradient that is ours times a / (a + 1e-6), which
    is less than ours only near a uniform distribution over a large vocabulary.
    """
    return (stats.sum_sq_probs * stats.log_prob).exp()


@register("profit", per_token=True)
def profit(stats: TokenStatistics, prob_threshold: float = 0.1) -> Tensor:
    """
    Weight 1 if P(label) > prob_threshold, else 0: unlikely labels are not learnt (arXiv:2601.09195).

    The authors' default; their code keeps a P(label) that equals the threshold, too. As there the loss is divided by
    the number of all response tokens.
    """
    if not 0 <= prob_threshold <= 1:
        raise ValueError(f"prob_threshold must be between 0 and 1, got {prob_threshold}.")
    return (stats.prob > prob_threshold).to(stats.prob.dtype)


@register("mile", per_token=True)
def mile(stats: TokenStatistics, gamma: float = 1.0) -> Tensor:
    """
    Weight (1 + H)^gamma, H = entropy in nats: learn more where the model is uncertain (MiLe, arXiv:2310.19531).

    Never below 1, so the loss is larger than the cross-entropy. The authors' code divides by the mean of the weights
    over all positions of the batch, prompts and padding too; their entropy is detached, as ours, and takes no
    probability as less than 1e-8.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma must be a number of at least 0, got {gamma}.")
    return (1 + stats.entropy) ** gamma


@register("ranktuner", per_token=True, needs_rank=True)
def ranktuner(stats: TokenStatistics, base: str = "prob") -> Tensor:
    """
    Weight w (P(label) E)^-K, K = 1 / log2(1 + max(R, E))^2: learn what ranks low for its entropy (arXiv:2602.01745).

    R is the label's rank and E a bound on the rank to expect (`expected_rank_bound`). w is P(label), the paper's choice
    for mathematics and the authors' code, or with `base="one"` 1, the paper's choice for other data.

    The paper's Relative Scale is 2^(f(E[R]) - f(R)), f(x) = 1 / log2(1 + x), for which the vocabulary must be sorted.
    Its authors train, as we do, with a closed form of it that has bounds in their places: E for the expected rank E[R],
    1 / P(label) for R. Where the model is sure of another token, that is much the larger of the two. As in their code
    P(label) E counts as at least 1e-6; there R counts also the other tokens that are as likely as the label.
    """
    if base not in ("prob", "one"):
        raise ValueError(f"base={base!r}: expected 'prob' or 'one'.")
    if stats.rank is None:
        raise ConfigurationError("gate='ranktuner' needs rank: ask for ranked=True.")
    expected = stats.expected_rank_bound
    exponent = torch.maximum(expected, stats.rank.to(expected.dtype)).add(1).log2() ** -2
    scale = (stats.prob * expected).clamp(min=1e-6) ** -exponent
    return scale * stats.prob if base == "prob" else scale


@register("talr", per_token=True, needs_examples=True)
def talr(stats: TokenStatistics, tau: float | str = "batch", min_weight: float = 0.01) -> Tensor:
    """
    Weight max(P(label)^(1/tau), min_weight), tau = median of the sequences' mean nll (arXiv:2509.20758).

    With `tau="batch"` the median is over the sequences of a device's batch, at the current step; a number fixes it.
    """
    temperature = median_example_nll(stats) if tau == "batch" else tau
    if isinstance(temperature, str) or temperature <= 0:
        raise ValueError(f"tau must be a positive number or 'batch', got {tau!r}.")
    return (stats.log_prob / temperature).exp().clamp(min=min_weight)


@register("flow", per_token=True, needs_example_nll=True)
def flow(stats: TokenStatistics, tau: float) -> Tensor:
    """
    Weight exp(-l / tau), l = the base model's mean nll of the example: learn the easy examples (arXiv:2502.02797).

    The trainer measures l and tau, the median of l over the training data, once before training. As in the authors'
    code the loss is divided by the number of tokens, not by the sum of the weights.
    """
    if tau <= 0:
        raise ValueError(f"tau must be positive, got {tau}.")
    if stats.example_nll is None:
        raise ConfigurationError("gate='flow' needs example_nll: the base model's mean nll of each token's example.")
    return (-stats.example_nll / tau).exp()


@register("psft", per_token=True, needs_old_log_prob=True)
def psft(stats: TokenStatistics, clip: float = 0.28) -> Tensor:
    """
    Weight r = P(label) / P_base(label) if r <= 1 + clip, else 0: no label moves far from the base (arXiv:2508.17784).

    The gradient of the paper's loss -min(r, clip(r, 1 - clip_low, 1 + clip)), whose value is another; clip_low does
    not matter, since below 1 - clip_low the minimum is r. The default is the authors' upper clip.

    The trainer measures P_base of each token once before training. The authors measure it anew for every batch, of 64
    examples, which they then go over in 8 optimizer steps: theirs bounds how far a label moves in 8 steps, and ours in
    all of training.
    """
    if not (math.isfinite(clip) and clip >= 0):
        raise ValueError(f"clip must be a number of at least 0, got {clip}.")
    if stats.old_log_prob is None:
        raise ConfigurationError("gate='psft' needs old_log_prob: ln P(label) of each token under the base model.")
    ratio = (stats.log_prob - stats.old_log_prob).exp()
    return torch.where(ratio <= 1 + clip, ratio, 0.0)


@register("sft-kl", per_token=True, anchor=Anchor(0.5, "reverse"))
def sft_kl(stats: TokenStatistics) -> Tensor:
    """
    Weight 1, plus kl_coef * KL(policy || reference): cross-entropy, held near the base model.

    The coefficient is that of arXiv:2601.02151, appendix F.2.
    """
    return sft(stats)


@register("asft", per_token=True, anchor=Anchor(0.1, "forward"))
def asft(stats: TokenStatistics) -> Tensor:
    """
    Weight P(label), plus kl_coef * KL(reference || policy): dft, held near the base model (arXiv:2509.23753, Eq. 6).

    LLaMA-Factory's ASFT ignores `num_items_in_batch`: accumulated micro-batches are averaged each by itself and added.
    """
    return dft(stats)


def median_example_nll(stats: TokenStatistics) -> Tensor:
    """Return the median over examples of their mean nll, in nats; kept from 0 and infinity, so that it can divide."""
    if stats.example_ids is None:
        raise ConfigurationError("gate='talr' needs example_ids: which sequence each token is from.")
    _, index, counts = stats.example_ids.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros_like(counts, dtype=stats.log_prob.dtype).index_add_(0, index, stats.nll)
    limits = torch.finfo(sums.dtype)
    means = (sums / counts).clamp(limits.tiny, limits.max)
    return means.quantile(0.5) if means.numel() else means.new_tensor(1.0)


def gates_help() -> str:
    """Return the table of gates as text: name, one-line meaning, parameters with their defaults."""
    lines = []
    for name, gate in GATES.items():
        lines.append(f"  {name:14}{gate.help}")
        params = {k: "measured" if v is inspect.Parameter.empty else v for k, v in gate.params.items()}
        if params:
            lines.append(f"{'':16}({', '.join(f'{k}: {v}' for k, v in params.items())})")
    return "\n".join(lines) + "\n"


def get_gate(gate: GateLike) -> Gate:
    """
    Return the gate registered as `gate`, or imported if it is `module:function`, or made of it if it is a function.

    Raises:
        ConfigurationError: no gate has that name, with those there are and the nearest; or the import fails.
    """
    if isinstance(gate, Gate):
        return gate
    if not isinstance(gate, str):
        return Gate(gate)
    if gate not in GATES and ":" in gate:
        module, _, name = gate.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ConfigurationError(f"gate={gate!r} cannot be imported. ({error})") from error
        return next((known for known in GATES.values() if known.weight is found), Gate(found))
    if gate not in GATES:
        raise ConfigurationError(f"gate={gate!r} is unknown.{nearest(gate, GATES)} Gates: {', '.join(GATES)}.")
    return GATES[gate]


def params_of_flags(gate: GateLike, alpha: float, entropy: str, others: dict[str, Any] | None) -> dict[str, Any]:
    """
    Return a gate's parameters from `gate_alpha`, `gate_entropy` and `gate_kwargs`, or by default; not the missing ones.

    Raises:
        ConfigurationError: `gate_kwargs` has what has a flag of its own.
    """
    params = {k: v for k, v in get_gate(gate).params.items() if v is not inspect.Parameter.empty}
    given = dict(others or {})
    for name, value, default in (("alpha", alpha, 1.0), ("entropy", entropy, "top-k")):
        if name in given:
            raise ConfigurationError(f"gate_kwargs: set {name} by gate_{name}.")
        if name in params or value != default:
            given[name] = value
    return {**params, **given}


def gate_of_flags(
    gate: GateLike, alpha: float, entropy: str, top_k: int, others: dict[str, Any] | None
) -> tuple[Gate, dict[str, Any]]:
    """Return the gate of `gate`, `gate_alpha`, ..., and its parameters, for a loss without a base model beside it."""
    check_top_k(top_k)
    params = params_of_flags(gate, alpha, entropy, others)
    return check_gate_by_itself(gate, params), params


def check_top_k(top_k: int) -> None:
    """Raise `ConfigurationError` for a K whose entropy is always 0."""
    if top_k < 2:
        raise ConfigurationError(f"gate_top_k must be at least 2, got {top_k}; the paper uses 20.")


def is_per_token(gate: GateLike, params: dict[str, Any]) -> bool:
    """Return whether the gate weighs each token by itself; one with a parameter set to `batch` does not."""
    found = get_gate(gate)
    return found.per_token and "batch" not in {**found.params, **params}.values()


def is_of_data(default: Any) -> bool:
    """Return whether a parameter with this default is found from the data: it has none, or `batch`."""
    return default is inspect.Parameter.empty or default == "batch"


def missing_params(gate: GateLike, params: Iterable[str]) -> list[str]:
    """Return the parameters that have no default and are not among `params`."""
    defaults = get_gate(gate).params
    return [name for name, default in defaults.items() if default is inspect.Parameter.empty and name not in params]


def check_gate(gate: GateLike, params: dict[str, Any], measured: Iterable[str] = ()) -> Gate:
    """
    Return the gate, after trying it with these parameters.

    Args:
        gate: as in `get_gate`.
        params: what the gate takes, e.g. `{"alpha": 2.0}`.
        measured: names of parameters that will be known later.

    Raises:
        ConfigurationError: the gate is unknown, takes no such parameter, lacks one, or refuses a value.
    """
    found = get_gate(gate)
    takes = list(found.params)
    if unknown := sorted(set(params) - set(takes)):
        raise ConfigurationError(
            f"gate={gate!r} takes no {', '.join(unknown)}; it takes {', '.join(takes) or 'nothing'}."
        )
    missing = missing_params(found, params)
    if lacking := sorted(set(missing) - set(measured)):
        raise ConfigurationError(
            f"gate={gate!r} needs {', '.join(lacking)}: give a value. (EAFTTrainer measures thresholds and tau itself.)"
        )
    stats = replace(
        token_statistics(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), ranked=found.needs_rank),
        example_ids=torch.arange(2),
        example_nll=torch.ones(2),
        old_log_prob=torch.full((2,), -1.5),
    )
    try:
        weights = gate_weights(found, stats, **params, **dict.fromkeys(missing, 0.5))
        get_anchor(found, **params)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"gate={gate!r}: {error}") from error
    if not weights.isfinite().all():
        raise ConfigurationError(f"gate={gate!r} with {params} gives weights that are not finite: {weights.tolist()}.")
    return found


def check_gate_by_itself(gate: GateLike, params: dict[str, Any]) -> Gate:
    """`check_gate` for a loss that has no base model beside the trained one; a gate that needs one is refused."""
    found = check_gate(gate, params)
    if found.anchor is not None or found.needs_example_nll or found.needs_old_log_prob:
        raise ConfigurationError(f"gate={gate!r} needs the base model as well; use EAFTTrainer.")
    return found


def get_anchor(gate: GateLike, **params: Any) -> Anchor | None:
    """Return the gate's KL term, with `kl_coef` and `kl_direction` of `params`; None for a gate that has none."""
    anchor = get_gate(gate).anchor
    if anchor is None:
        return None
    return Anchor(params.get("kl_coef", anchor.coef), params.get("kl_direction", anchor.direction))


@torch.no_grad()
def gate_weights(gate: GateLike, stats: TokenStatistics, **params: Any) -> Tensor:
    """
    Return the weight of each token, without gradient, in the statistics' shape and dtype.

    Raises:
        ConfigurationError: the gate is unknown, or returns another shape.
    """
    params = {name: value for name, value in params.items() if name not in ("kl_coef", "kl_direction")}
    weights = get_gate(gate).weight(stats.detach(), **params)
    if weights.shape != stats.log_prob.shape:
        raise ConfigurationError(
            f"gate={gate!r} returned shape {tuple(weights.shape)} for tokens of shape {tuple(stats.log_prob.shape)}."
        )
    return weights.to(stats.log_prob.dtype)
