"""
The formulas of the gates: each token's weight, from the model's statistics of that token.

`eaft.objective.registry` says what a gate is and how to add one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eaft.errors import ConfigurationError
from eaft.objective.registry import Anchor, register
from eaft.objective.statistics import TokenStatistics


def normalized_entropy(stats: TokenStatistics, entropy: str = "top-k") -> Tensor:
    """
    Return g in [0, 1]: the entropy over ln K, of the K most likely tokens (`top-k`) or of all
    (`exact`, clamped to 1).

    On SmolLM2-135M one token in 20 has more exact entropy than ln 20 nats (arXiv:2601.02151, Eq. 3,
    takes top-k).
    """
    if entropy not in ("top-k", "exact"):
        raise ValueError(f"entropy={entropy!r}: expected 'top-k' or 'exact'.")
    nats = stats.top_k_entropy if entropy == "top-k" else stats.entropy
    # Rounding can put a uniform top K slightly above ln K. With one token in the vocabulary, ln K
    # is 0
    return (nats / math.log(max(stats.top_k, 2))).clamp(0, 1)


def resolve_threshold(
    threshold: float | str, values: Tensor, percentile: float, name: str
) -> float | Tensor:
    """Return a threshold: the number itself, or for `batch` the percentile of `values`."""
    if not 0 <= percentile <= 100:
        raise ValueError(f"{name}_percentile must be between 0 and 100, got {percentile}.")
    if threshold == "batch":
        return torch.quantile(values, percentile / 100) if values.numel() else 0.0
    if not isinstance(threshold, int | float):
        raise ValueError(f"{name}_threshold={threshold!r}: expected a number or 'batch'.")
    return threshold


@register("sft", per_token=True)
def sft(stats: TokenStatistics) -> Tensor:
    """Every token counts the same: weight 1."""
    return torch.ones_like(stats.log_prob)


@register("eaft", per_token=True)
def eaft(stats: TokenStatistics, alpha: float = 1.0, entropy: str = "top-k") -> Tensor:
    """
    Learn where the model is unsure: weight g^alpha, g = entropy / ln K in [0, 1]
    (arXiv:2601.02151).

    Alpha 2 and 3 are the paper's EAFT^2 and EAFT^3 (section 5.1). The authors' release in
    LLaMA-Factory divides by 3.0 where the paper's equation 3 has ln K (2.9957 for K = 20), so its
    weight is ours times (ln 20 / 3)^alpha.
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be a number of at least 0, got {alpha}.")
    return normalized_entropy(stats, entropy) ** alpha


@register("eaft-sigmoid", per_token=True)
def eaft_sigmoid(
    stats: TokenStatistics, steepness: float = 30.0, center: float = 0.17, entropy: str = "top-k"
) -> Tensor:
    """
    Learn where the model is unsure, with a soft threshold: weight sigmoid(steepness (g - center))
    (arXiv:2601.02151, section 5.1).
    """
    return torch.sigmoid(steepness * (normalized_entropy(stats, entropy) - center))


@register("masked", per_token=True)
def masked(
    stats: TokenStatistics,
    entropy_threshold: float | str,
    entropy_percentile: float = 15.0,
    entropy: str = "top-k",
) -> Tensor:
    """
    Leave out the tokens that the model is surest of: weight 0 on the tokens of lowest entropy, else
    1: Masked SFT (arXiv:2601.02151, Eq. 4).

    `entropy_threshold` is in units of g; the trainer measures it as the percentile over the
    training data under the base model. `batch` takes the percentile of the tokens given.
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
    Leave out the tokens where the model is sure of another token: weight 0 where entropy and
    P(label) are both among the lowest, else 1 (arXiv:2601.02151, section 3.2, pilot study).

    The thresholds are measured or given as in `masked`. The paper ranks by the exact entropy:
    `entropy="exact"`.
    """
    g, prob = normalized_entropy(stats, entropy), stats.prob
    sure = g <= resolve_threshold(entropy_threshold, g, entropy_percentile, "entropy")
    unlikely = prob <= resolve_threshold(prob_threshold, prob, prob_percentile, "prob")
    return 1 - (sure & unlikely).to(g.dtype)


@register("dft", per_token=True)
def dft(stats: TokenStatistics) -> Tensor:
    """Learn labels that the model already finds likely: weight P(label) (arXiv:2508.05629)."""
    return stats.prob


@register("deft", per_token=True, needs_vocabulary=True)
def deft(stats: TokenStatistics) -> Tensor:
    """
    Like sft where the model is unsure, like dft where it is sure: weight P(label)^a, a = sum of
    squared probabilities (arXiv:2602.11424).

    The authors' loss is (1 - p^a) / (a + 1e-6). Its value differs. Its gradient is ours times a /
    (a + 1e-6), which is less than ours only near a uniform distribution over a large vocabulary.
    """
    return (stats.sum_sq_probs * stats.log_prob).exp()


@register("profit", per_token=True)
def profit(stats: TokenStatistics, prob_threshold: float = 0.1) -> Tensor:
    """
    Leave out unlikely labels: weight 1 if P(label) > prob_threshold, else 0 (arXiv:2601.09195).

    The default is the authors'. Their code also keeps a P(label) that equals the threshold. As in
    their code, the loss is divided by the number of all response tokens.
    """
    if not 0 <= prob_threshold <= 1:
        raise ValueError(f"prob_threshold must be between 0 and 1, got {prob_threshold}.")
    return (stats.prob > prob_threshold).to(stats.prob.dtype)


@register("infosft", per_token=True)
def infosft(stats: TokenStatistics, max_prob: float = 0.93) -> Tensor:
    """
    Learn labels of medium probability: weight p [1 - logit(p) / logit(max_prob)]+, p = P(label),
    logit(p) = ln(p / (1 - p)) (arXiv:2605.14967).

    The weight is at most 0.51, at p = 0.56, and 0 from max_prob on. The paper's weight is
    proportional to p [logit(max_prob) - logit(p)]+. Like the authors' code we divide that by
    logit(max_prob), which is 2.59, and the loss by the number of all response tokens.
    """
    if not 0.5 < max_prob < 1:
        raise ValueError(f"max_prob must be between 0.5 and 1, got {max_prob}.")
    logit = stats.log_prob - (-torch.expm1(stats.log_prob)).log()
    limit = math.log(max_prob / (1 - max_prob))
    return torch.where(stats.prob == 0, 0.0, stats.prob * (1 - logit / limit).clamp(min=0))


@register("mile", per_token=True, needs_vocabulary=True)
def mile(stats: TokenStatistics, gamma: float = 1.0) -> Tensor:
    """
    Learn more where the model is unsure, and no token less: weight (1 + H)^gamma, H = entropy in
    nats (MiLe, arXiv:2310.19531).

    The weight is never below 1, so the loss is larger than the cross-entropy. The authors' code
    divides by the mean of the weights over all positions of the batch, with prompts and padding.
    Their entropy is detached, like ours, and no probability counts as less than 1e-8.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma must be a number of at least 0, got {gamma}.")
    return (1 + stats.entropy) ** gamma


@register("ranktuner", per_token=True, needs_rank=True, needs_vocabulary=True)
def ranktuner(stats: TokenStatistics, base: str = "prob") -> Tensor:
    """
    Learn labels that rank low for their entropy: weight w (P(label) E)^-K, K = 1 / log2(1 + max(R,
    E))^2 (arXiv:2602.01745).

    R is the label's rank, and E is a lower bound on the expected rank (`expected_rank_bound`). w is
    P(label), the paper's choice for mathematics and the choice of the authors' code. With
    `base="one"` w is 1, the paper's choice for other data.

    The paper's Relative Scale is 2^(f(E[R]) - f(R)), f(x) = 1 / log2(1 + x), for which the
    vocabulary must be sorted. The authors train, as we do, with a closed form that has bounds in
    place of the ranks: E for the expected rank E[R], 1 / P(label) for R. If the model is sure of
    another token, 1 / P(label) is much larger than R. As in their code, P(label) E counts as at
    least 1e-6. In their code R also counts the other tokens that are as likely as the label.
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
    Learn likely labels, least strictly where the data is hard: weight max(P(label)^(1/tau),
    min_weight), tau = median of the sequences' mean nll (arXiv:2509.20758).

    With `tau="batch"` the median is over the sequences of a device's batch, at the current step. A
    number fixes tau.
    """
    temperature = median_example_nll(stats) if tau == "batch" else tau
    if isinstance(temperature, str) or temperature <= 0:
        raise ValueError(f"tau must be a positive number or 'batch', got {tau!r}.")
    return (stats.log_prob / temperature).exp().clamp(min=min_weight)


@register("flow", per_token=True, needs_example_nll=True)
def flow(stats: TokenStatistics, tau: float) -> Tensor:
    """
    Learn the examples that the base model finds easy: weight exp(-l / tau), l = the base model's
    mean nll of the example (arXiv:2502.02797).

    The trainer measures l and tau, the median of l over the training data, once before training. As
    in the authors' code the loss is divided by the number of tokens, not by the sum of the weights.
    """
    if tau <= 0:
        raise ValueError(f"tau must be positive, got {tau}.")
    if stats.example_nll is None:
        raise ConfigurationError(
            "gate='flow' needs example_nll: the base model's mean nll of each token's example."
        )
    return (-stats.example_nll / tau).exp()


@register("psft", per_token=True, needs_old_log_prob=True)
def psft(stats: TokenStatistics, clip: float = 0.28) -> Tensor:
    """
    Stop learning a label that has moved far from the base model: weight r = P(label) /
    P_base(label) if r <= 1 + clip, else 0 (arXiv:2508.17784).

    The gradient equals the gradient of the paper's loss -min(r, clip(r, 1 - clip_low, 1 + clip));
    the value differs. clip_low does not matter, since below 1 - clip_low the minimum is r. The
    default is the authors' upper clip.

    The trainer measures P_base of each token once before training. The authors measure it again for
    every batch of 64 examples, on which they take 8 optimizer steps. Their gate bounds how far a
    label moves in 8 steps; ours bounds how far it moves in all of training.

    With a clip of 0.5 it is OPC-SFT ("Clipping Low-Probability Tokens in SFT", ICML 2026), whose
    loss is the same.
    """
    if not (math.isfinite(clip) and clip >= 0):
        raise ValueError(f"clip must be a number of at least 0, got {clip}.")
    ratio = (stats.log_prob - base_log_prob(stats, "psft")).exp()
    return torch.where(ratio <= 1 + clip, ratio, 0.0)


@register("stm", per_token=True, needs_old_log_prob=True)
def stm(stats: TokenStatistics, perplexity_threshold: float = 2.5) -> Tensor:
    """
    Leave out labels that the base model finds unlikely: weight 1 if 1 / P_base(label) is at most
    perplexity_threshold, else 0: Selective Token Masking (arXiv:2501.14315).

    The mask stays the same in all of training. The default is the authors'. Their loss is the mean
    over the labels that are left. Ours is divided by the number of all response tokens.
    """
    if not perplexity_threshold >= 1:
        raise ValueError(
            f"perplexity_threshold must be a number of at least 1, got {perplexity_threshold}."
        )
    likely = base_log_prob(stats, "stm") >= -math.log(perplexity_threshold)
    return likely.to(stats.log_prob.dtype)


@register("sft-kl", per_token=True, anchor=Anchor(0.5, "reverse"))
def sft_kl(stats: TokenStatistics) -> Tensor:
    """
    Every token counts the same, and the model is held near the base model: weight 1, plus kl_coef *
    KL(policy || reference).

    The default coefficient is from arXiv:2601.02151, appendix F.2.
    """
    return sft(stats)


@register("asft", per_token=True, anchor=Anchor(0.1, "forward"))
def asft(stats: TokenStatistics) -> Tensor:
    """
    Like dft, and the model is held near the base model: weight P(label), plus kl_coef *
    KL(reference || policy) (arXiv:2509.23753, Eq. 6).

    LLaMA-Factory's ASFT ignores `num_items_in_batch`: it averages each accumulated micro-batch by
    itself and adds the means.
    """
    return dft(stats)


@register("tmkl", per_token=True, anchor=Anchor(1.0, "forward", without_label=True))
def tmkl(stats: TokenStatistics) -> Tensor:
    """
    Every token counts the same, and the other tokens are held near the base model: weight 1, plus
    kl_coef * KL(reference || policy) over the tokens other than the label (arXiv:2605.29498).

    The label is removed from both distributions, and the rest is renormalised to sum to 1. So the
    divergence does not depend on the label's logit.

    The direction and the coefficient are ours, because only the paper's abstract could be read.
    """
    return sft(stats)


def base_log_prob(stats: TokenStatistics, gate: str) -> Tensor:
    """Return ln P(label) under the base model, which the gate asks for."""
    if stats.old_log_prob is None:
        raise ConfigurationError(
            f"gate={gate!r} needs old_log_prob: ln P(label) of each token under the base model."
        )
    return stats.old_log_prob


def median_example_nll(stats: TokenStatistics) -> Tensor:
    """
    Return the median over examples of their mean nll, in nats. It is clamped away from 0 and
    infinity, so that it can be a divisor.
    """
    if stats.example_ids is None:
        raise ConfigurationError(
            "gate='talr' needs example_ids: which sequence each token is from."
        )
    _, index, counts = stats.example_ids.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros_like(counts, dtype=stats.log_prob.dtype).index_add_(0, index, stats.nll)
    limits = torch.finfo(sums.dtype)
    means = (sums / counts).clamp(limits.tiny, limits.max)
    return means.quantile(0.5) if means.numel() else means.new_tensor(1.0)
