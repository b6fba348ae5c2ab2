"""
The table of gates: how much each token's cross-entropy counts, from the model's own statistics of that token.

A gate takes `TokenStatistics` and returns a weight per token. It is a constant in the gradient: `gate_weights` hands it
detached statistics and runs it without autograd. To add one, from here or from your own code:

    @register("confident")
    def confident(stats: TokenStatistics) -> Tensor:
        return stats.sum_sq_probs
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from eaft.errors import ConfigurationError, nearest
from eaft.statistics import TokenStatistics

Gate = Callable[..., Tensor]

GATES: dict[str, Gate] = {}


def register(name: str) -> Callable[[Gate], Gate]:
    """Register the decorated function as the gate `name`; its first docstring line is its one-line help."""

    def add(gate: Gate) -> Gate:
        GATES[name] = gate
        return gate

    return add


@register("sft")
def sft(stats: TokenStatistics) -> Tensor:
    """Weight 1: plain cross-entropy."""
    return torch.ones_like(stats.log_prob)


@register("eaft")
def eaft(stats: TokenStatistics, alpha: float = 1.0) -> Tensor:
    """Weight (H^K / ln K)^alpha in [0, 1]: learn where the model is uncertain (arXiv:2601.02151)."""
    if alpha < 0:
        raise ValueError(f"alpha must not be negative, got {alpha}.")
    # Rounding can put a uniform top K a hair above ln K; a vocabulary of one token has no entropy to divide
    normalized = (stats.top_k_entropy / math.log(max(stats.top_k, 2))).clamp(0, 1)
    return normalized**alpha


@register("dft")
def dft(stats: TokenStatistics) -> Tensor:
    """Weight P(label): learn what the model already finds likely (arXiv:2508.05629)."""
    return stats.prob


def get_gate(gate: str | Gate) -> Gate:
    """
    Return the gate registered as `gate`, or `gate` itself if it is a function.

    Raises:
        ConfigurationError: no gate has that name; the message lists those there are and the nearest.
    """
    if callable(gate):
        return gate
    if gate not in GATES:
        raise ConfigurationError(f"gate={gate!r} is unknown.{nearest(gate, GATES)} Gates: {', '.join(GATES)}.")
    return GATES[gate]


def gate_help(gate: str | Gate) -> str:
    """Return a gate's one-line meaning: the first line of its docstring."""
    return (get_gate(gate).__doc__ or "").strip().partition("\n")[0]


def check_gate(gate: str | Gate, params: Iterable[str] = ()) -> Gate:
    """
    Return the gate's function, after checking that it takes every parameter named in `params`.

    Raises:
        ConfigurationError: the gate is unknown, or takes no such parameter.
    """
    function = get_gate(gate)
    takes = list(inspect.signature(function).parameters)[1:]
    if unknown := sorted(set(params) - set(takes)):
        raise ConfigurationError(
            f"gate={gate!r} takes no {', '.join(unknown)}; it takes {', '.join(takes) or 'nothing'}."
        )
    return function


@torch.no_grad()
def gate_weights(gate: str | Gate, stats: TokenStatistics, **params: float) -> Tensor:
    """
    Return the weight of each token, without gradient, in the statistics' shape and dtype.

    Raises:
        ConfigurationError: the gate is unknown, does not take one of `params`, or returns another shape.
    """
    function = check_gate(gate, params)
    weights = function(stats.detach(), **params)
    if weights.shape != stats.log_prob.shape:
        raise ConfigurationError(
            f"gate={gate!r} returned shape {tuple(weights.shape)} for tokens of shape {tuple(stats.log_prob.shape)}."
        )
    return weights.to(stats.log_prob.dtype)
