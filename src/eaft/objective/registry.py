"""
The table of gates: what a gate is, how to register one, and how a name becomes a gate.

A gate takes `TokenStatistics` and returns a weight for each token. It is a constant in the
gradient: `gate_weights` passes detached statistics and runs without autograd. The formulas are in
`eaft.objective.gates`. To add one, there or in your own code:

    @register("confident")
    def confident(stats: TokenStatistics) -> Tensor:
        return stats.sum_sq_probs

The function's keyword arguments are the gate's parameters. A parameter without a default must be
given, unless `eaft.training.gate_measurements` knows its name: then the trainer measures it on the
training data with the base model.

A weight below 0 makes a label less likely. A gate with such weights is refused, unless it is
registered with `allow_negative=True`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from eaft.errors import ConfigurationError, EAFTError, first_line, nearest
from eaft.objective.statistics import TokenStatistics, kl_divergence
from eaft.text import summary

Weight = Callable[..., Tensor]


@dataclass(frozen=True)
class Anchor:
    """
    A term beside the gated nll that keeps the policy near a reference: coef * KL for each token,
    over the whole vocabulary, or over the vocabulary without the token's label.

    `reverse` is KL(policy || reference): it punishes probability where the reference has none.
    `forward` is KL(reference || policy): it punishes missing probability where the reference has
    some.
    """

    coef: float
    direction: Literal["forward", "reverse"]
    without_label: bool = False  # the label is removed from both, and the rest sums to 1

    def __post_init__(self) -> None:
        """Check the values."""
        if self.direction not in ("forward", "reverse"):
            raise ConfigurationError(
                f"kl_direction={self.direction!r}: expected 'forward' or 'reverse'."
            )
        if not (isinstance(self.coef, int | float) and math.isfinite(self.coef) and self.coef >= 0):
            raise ConfigurationError(f"kl_coef must be a number of at least 0, got {self.coef!r}.")

    def compared(self, logits: Tensor, labels: Tensor) -> Tensor:
        """
        Return the logits `[..., V]` of the distribution that the divergence compares. A removed
        label has -inf.
        """
        if not self.without_label:
            return logits
        return logits.scatter(-1, labels.unsqueeze(-1), -torch.inf)

    def kl(self, log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
        """Return the divergence of each token, in nats, of two log-distributions `[..., V]`."""
        if self.direction == "reverse":
            return kl_divergence(log_probs, reference_log_probs)
        return kl_divergence(reference_log_probs, log_probs)

    def kl_and_gradient(
        self, log_probs: Tensor, reference_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Return the divergence and its derivative by the policy's logits, which is p (ln p - ln q -
        KL) for `reverse`, p - q for `forward`.
        """
        kl, probs = self.kl(log_probs, reference_log_probs), log_probs.exp()
        if self.direction == "forward":
            return kl, probs - reference_log_probs.exp()
        log_ratio = torch.where(probs > 0, log_probs - reference_log_probs, 0.0)
        return kl, probs * (log_ratio - kl.unsqueeze(-1))


@dataclass(frozen=True)
class Gate:
    """A weight per token, and what the weight needs beside the statistics of its token."""

    weight: Weight
    per_token: bool = False  # a token's weight depends on no other token: chunks can be weighed
    needs_examples: bool = False  # `stats.example_ids`: which example each token is from
    needs_example_nll: bool = False  # `stats.example_nll`: the base model's mean nll of the example
    needs_old_log_prob: bool = False  # `stats.old_log_prob`: ln P(label) under the base model
    needs_rank: bool = False  # `stats.rank` and `stats.first_prob`
    # `stats.entropy` or `stats.sum_sq_probs`: the probabilities of the whole vocabulary
    needs_vocabulary: bool = False
    allow_negative: bool = False  # weights below 0 are intended
    anchor: Anchor | None = None  # a KL term, for which the loss needs a reference model

    @property
    def params(self) -> dict[str, Any]:
        """
        Its parameters with their defaults; `inspect.Parameter.empty` if there is no default.
        """
        params = {
            p.name: p.default for p in list(inspect.signature(self.weight).parameters.values())[1:]
        }
        anchor = (
            {"kl_coef": self.anchor.coef, "kl_direction": self.anchor.direction}
            if self.anchor
            else {}
        )
        return {**params, **anchor}

    @property
    def help(self) -> str:
        """Its meaning: the first paragraph of its docstring, as one line without the source."""
        return summary(self.weight.__doc__)


GateLike = str | Weight | Gate  # a registered name, `module:function`, or the thing itself

GATES: dict[str, Gate] = {}


def called(gate: GateLike) -> str:
    """Return a gate's name in a message, quoted: its own, or its function's with the module."""
    function = gate.weight if isinstance(gate, Gate) else gate
    if isinstance(function, str):
        return repr(function)
    return repr(
        f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', function)}"
    )


def register(name: str, **needs: Any) -> Callable[[Weight], Weight]:
    """Register the decorated function as the gate `name`; `needs` are the fields of `Gate`."""

    def add(weight: Weight) -> Weight:
        GATES[name] = Gate(weight, **needs)
        return weight

    return add


def get_gate(gate: GateLike) -> Gate:
    """
    Return the gate with a registered name, from a `module:function` to import, or of a function.

    Raises:
        ConfigurationError: no gate has that name (the message lists all gates and the nearest
            one), or the import fails.
    """
    if isinstance(gate, Gate):
        return gate
    if not isinstance(gate, str):
        return Gate(gate)
    if gate not in GATES and ":" in gate:
        module, _, name = gate.partition(":")
        if not module or not name:
            raise ConfigurationError(f"gate={gate!r}: expected module:function.")
        with own_code(f"gate={gate!r} cannot be imported"):
            weight = getattr(importlib.import_module(module), name)
        if not callable(weight):
            raise ConfigurationError(
                f"gate={gate!r} is {weight!r}: expected a function of a token's statistics."
            )
        return next((known for known in GATES.values() if known.weight is weight), Gate(weight))
    if gate not in GATES:
        raise ConfigurationError(
            f"gate={gate!r} is unknown.{nearest(gate, GATES)} Gates: {', '.join(GATES)}."
        )
    return GATES[gate]


@contextlib.contextmanager
def own_code(what: str) -> Iterator[None]:
    """
    Turn an exception in a user's own code into one line that says what was raised and where. This
    includes `sys.exit`, which would end the command with success.

    Args:
        what: begins the message.

    Raises:
        ConfigurationError: for any exception that is not an `EAFTError`.
    """
    try:
        yield
    except EAFTError:
        raise
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = (
            ""
            if isinstance(error, ImportError | SyntaxError)
            else f", {frame.filename}, line {frame.lineno}"
        )
        message = first_line(error)
        if isinstance(error, SyntaxError):
            message = f"{error.msg}, {error.filename}, line {error.lineno}"
        raise ConfigurationError(f"{what}. ({type(error).__name__}: {message}{where})") from error


def is_of_data(default: Any) -> bool:
    """
    Return whether a parameter with this default is measured on data: no default, or `batch`.
    """
    return default is inspect.Parameter.empty or default == "batch"


@torch.no_grad()
def gate_weights(gate: GateLike, stats: TokenStatistics, **params: Any) -> Tensor:
    """
    Return the weight of each token, without gradient, in the statistics' shape and dtype.

    Raises:
        ConfigurationError: the gate is unknown, raises, or does not return a tensor of the same
            shape.
    """
    params = {
        name: value for name, value in params.items() if name not in ("kl_coef", "kl_direction")
    }
    weight = get_gate(gate).weight
    ours = getattr(weight, "__module__", None) == "eaft.objective.gates"
    with contextlib.nullcontext() if ours else own_code(f"gate={called(gate)} failed"):
        weights = weight(stats.detach(), **params)
    if not isinstance(weights, Tensor) or weights.is_complex():
        what = (
            f"a tensor of {weights.dtype}"
            if isinstance(weights, Tensor)
            else type(weights).__name__
        )
        raise ConfigurationError(
            f"gate={called(gate)} returned {what}: expected a real tensor, one weight a token."
        )
    if weights.shape != stats.log_prob.shape:
        raise ConfigurationError(
            f"gate={called(gate)} returned shape {tuple(weights.shape)} for tokens of shape "
            f"{tuple(stats.log_prob.shape)}."
        )
    return weights.to(stats.log_prob.dtype)
