"""
Statistics of the model's distribution at each token: log-probability, entropy, top-K entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eaft.errors import ConfigurationError

# A confident conflict: the model is sure (low entropy) of another token than the label (low
# probability)
CONFLICT_MAX_ENTROPY = 0.5  # nats
CONFLICT_MAX_PROB = 0.1
# The paper's Figure 4 follows tokens with at least, and at most, this entropy (nats)
HIGH_ENTROPY, LOW_ENTROPY = 2.0, 0.5


@dataclass(frozen=True)
class TokenStatistics:
    """
    Statistics of the next-token distribution at each labelled position, every tensor of the labels'
    shape.

    Tensors are float32 (float64 if the logits were), entropies in nats. Only `log_prob` carries a
    gradient.
    """

    log_prob: Tensor  # ln P(label)
    entropy: Tensor  # H, over the whole vocabulary
    top_k_entropy: Tensor  # H^K, of the K largest probabilities renormalised to sum to 1
    sum_sq_probs: Tensor  # sum_v p_v^2
    is_top1: Tensor  # bool: the label is the most likely token (the first of equals)
    top_k: int  # K, at most the size of the vocabulary
    # For gates that need more than the distribution
    example_ids: Tensor | None = None  # int64: which example each token is from
    example_nll: Tensor | None = None  # mean nll of that example under the base model, in nats
    old_log_prob: Tensor | None = None  # ln P(label) under the base model
    # With `ranked=True`
    first_choice: Tensor | None = None  # int64: the most likely token (of equals, any)
    first_prob: Tensor | None = None  # its probability
    rank: Tensor | None = None  # int64: 1 + how many tokens are more likely than the label

    @property
    def prob(self) -> Tensor:
        """P(label), in [0, 1]."""
        return self.log_prob.exp()

    @property
    def nll(self) -> Tensor:
        """-ln P(label), in nats: the cross-entropy of each token."""
        return -self.log_prob

    @property
    def is_conflict(self) -> Tensor:
        """Bool: a confident conflict, H < 0.5 nats and P(label) < 0.1."""
        return (self.entropy < CONFLICT_MAX_ENTROPY) & (self.prob < CONFLICT_MAX_PROB)

    @property
    def grad_norm(self) -> Tensor:
        """
        Norm of d nll / d logits = p - 1[label]: sqrt(sum_v p_v^2 - 2 P(label) + 1). A weight on
        the nll multiplies it.
        """
        # Computed as (1 - P(label))^2 + the sum of the other squares, which is at most that: near
        # P = 1 the formula above cancels
        others = -torch.expm1(self.log_prob.detach())
        squares = (
            (self.sum_sq_probs - self.prob.detach().square()).clamp(min=0).minimum(others.square())
        )
        return (others.square() + squares).sqrt()

    @property
    def expected_rank_bound(self) -> Tensor:
        """
        A lower bound on the mean rank of a token drawn from the distribution, sum_k k p_(k) with
        p_(1) >= p_(2) >= ...

        It is 2^H / 4 + 1 if H is at least 2 bits (Massey, "Guessing and entropy", 1994), else 2 -
        p_(1), which counts all other tokens as second. The sum itself needs a sorted vocabulary.
        Sorting 49,152 tokens takes torch 4 ms on one thread, as long as the three products of the
        loss with hidden states of 576. Needs `first_prob`.
        """
        if self.first_prob is None:
            raise ConfigurationError("The expected rank needs first_prob: ask for ranked=True.")
        # 2^(H in bits) = e^(H in nats)
        return torch.where(
            self.entropy >= 2 * math.log(2), self.entropy.exp() / 4 + 1, 2 - self.first_prob
        )

    def detach(self) -> TokenStatistics:
        """Return the same statistics without any gradient."""
        return replace(self, log_prob=self.log_prob.detach())

    @classmethod
    def cat(cls, chunks: Sequence[TokenStatistics]) -> TokenStatistics:
        """
        Join the statistics of consecutive chunks of tokens (1-D each, the same K), without the
        fields of `TokenContext`.
        """
        names = ["log_prob", "entropy", "top_k_entropy", "sum_sq_probs", "is_top1"]
        if chunks[0].rank is not None:
            names += ["first_choice", "first_prob", "rank"]
        joined = {name: torch.cat([getattr(chunk, name) for chunk in chunks]) for name in names}
        return cls(**joined, top_k=chunks[0].top_k)


@dataclass(frozen=True)
class TokenContext:
    """What a gate may need of each token beyond the distribution."""

    example_ids: Tensor | None = None  # (...), int64: which example each token is from
    example_nll: Tensor | None = None  # (...), nats: the base model's mean nll of that example
    old_log_prob: Tensor | None = None  # (...), nats: ln P(label) under the base model

    def select(self, choose: Callable[[Tensor], Tensor]) -> TokenContext:
        """Return the same of the tokens that `choose` takes from each tensor."""
        tensors = (self.example_ids, self.example_nll, self.old_log_prob)
        return TokenContext(*(None if x is None else choose(x) for x in tensors))

    def add_to(self, stats: TokenStatistics) -> TokenStatistics:
        """Return the statistics of the same tokens, with their context."""
        return replace(stats, **vars(self))


NO_CONTEXT = TokenContext()


def usable_top_k(top_k: int, vocab_size: int) -> int:
    """Return K, or the size of a smaller vocabulary; raises `ValueError` below 2."""
    if top_k < 2:
        raise ValueError(
            f"top_k must be at least 2 (the entropy of one token is always 0), got {top_k}."
        )
    return min(top_k, vocab_size)


def entropy_from_log_probs(log_probs: Tensor) -> Tensor:
    """
    Return -sum_v p_v ln p_v over the last dimension, in nats. A token with probability 0 (-inf)
    adds 0.
    """
    return torch.special.entr(log_probs.exp()).sum(-1)


def kl_divergence(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """
    Return KL(p || q) = sum_v p_v (ln p_v - ln q_v) over the last dimension, in nats, for two
    log-distributions.
    """
    probs = log_probs.exp()
    # A token with p = 0 adds 0. It is selected before the product, so that its -inf makes no NaN in
    # the gradient
    return (probs * torch.where(probs > 0, log_probs - other_log_probs, 0.0)).sum(-1)


def token_statistics(
    logits: Tensor, labels: Tensor, top_k: int = 20, *, ranked: bool = False
) -> TokenStatistics:
    """
    Compute the statistics every gate is a function of.

    Args:
        logits: `[..., V]`, any floating dtype; computed in float32, or in float64 for float64
            logits. -inf marks a token that cannot occur.
        labels: `[...]` int64, each in `[0, V)`; no ignored positions.
        top_k: K of the top-K entropy, at least 2 (arXiv:2601.02151 uses 20). K is at most the size
            of the vocabulary.
        ranked: also return the first choice, its probability and the label's rank.

    Raises:
        ValueError: `top_k` is below 2, or the shapes do not match.
    """
    top_k = usable_top_k(top_k, logits.shape[-1])
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need labels {tuple(logits.shape[:-1])}, got"
            f" {tuple(labels.shape)}."
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = logits.log_softmax(-1)
    log_prob = log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        first_choice = logits.argmax(-1)
        choices = {}
        if ranked:
            label_logit = logits.gather(-1, labels.unsqueeze(-1))
            choices = {
                "first_choice": first_choice,
                "first_prob": log_probs.amax(-1).exp(),
                "rank": 1 + (logits > label_logit).sum(-1),
            }
        return TokenStatistics(
            log_prob=log_prob,
            entropy=entropy_from_log_probs(log_probs),
            top_k_entropy=entropy_from_log_probs(
                logits.topk(top_k, sorted=False).values.log_softmax(-1)
            ),
            sum_sq_probs=log_probs.exp().square_().sum(-1),
            is_top1=first_choice == labels,
            top_k=top_k,
            **choices,
        )
