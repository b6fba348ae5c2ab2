"""
The table of gates: what a gate is, how one is found by its name, and how it is checked and applied.

A gate takes `TokenStatistics` and returns a weight for each token. It is a constant in the
gradient: `gate_weights` passes detached statistics and runs without autograd. The formulas are in
`eaft.objective.gates`. To add one, there or in your own code:

    @register("confident")
    def confident(stats: TokenStatistics) -> Tensor:
        return stats.sum_sq_probs

Its keyword arguments are its parameters. A parameter without a default must be given, unless
`eaft.training.measure` knows its name: then the trainer measures it on the training data with the
base model.

A weight below 0 makes its label less likely. A gate with such weights is refused, unless it is
registered with `allow_negative=True`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from eaft.errors import ConfigurationError, EAFTError, first_line, nearest
from eaft.objective.statistics import TokenStatistics, kl_divergence, token_statistics

Weight = Callable[..., Tensor]


@dataclass(frozen=True)
class Anchor:
    """
    A term beside the gated nll that holds the policy near a reference: coef * KL per token, over
    the whole vocabulary.

    `reverse` is KL(policy || reference), which punishes putting probability where the reference has
    none; `forward` is KL(reference || policy), which punishes taking it away where the reference
    has some.
    """

    coef: float
    direction: Literal["forward", "reverse"]

    def __post_init__(self) -> None:
        """Check the values."""
        if self.direction not in ("forward", "reverse"):
            raise ConfigurationError(
                f"kl_direction={self.direction!r}: expected 'forward' or 'reverse'."
            )
        if not (isinstance(self.coef, int | float) and math.isfinite(self.coef) and self.coef >= 0):
            raise ConfigurationError(f"kl_coef must be a number of at least 0, got {self.coef!r}.")

    def kl(self, log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
        """Return the divergence of each token, in nats, from two log-distributions `[..., V]`."""
        if self.direction == "reverse":
            return kl_divergence(log_probs, reference_log_probs)
        return kl_divergence(reference_log_probs, log_probs)

    def kl_and_gradient(
        self, log_probs: Tensor, reference_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Return the divergence and its derivative by the policy's logits: p (ln p - ln q - KL), or p
        - q forward.
        """
        kl, probs = self.kl(log_probs, reference_log_probs), log_probs.exp()
        if self.direction == "forward":
            return kl, probs - reference_log_probs.exp()
        log_ratio = torch.where(probs > 0, log_probs - reference_log_probs, 0.0)
        return kl, probs * (log_ratio - kl.unsqueeze(-1))


@dataclass(frozen=True)
class Gate:
    """A weight per token, and what it needs beside the statistics of each token by itself."""

    weight: Weight
    # a token's weight depends on no other token, so a chunk of them can be weighed by itself
    per_token: bool = False
    needs_examples: bool = False  # `stats.example_ids`: which example each token is from
    needs_example_nll: bool = (
        False  # `stats.example_nll`: the base model's mean nll of that example
    )
    needs_old_log_prob: bool = False  # `stats.old_log_prob`: ln P(label) under the base model
    needs_rank: bool = False  # `stats.rank` and `stats.first_prob`
    allow_negative: bool = (
        False  # a weight below 0 makes its label less likely: refused, unless it is meant
    )
    anchor: Anchor | None = None  # a reference model

    @property
    def params(self) -> dict[str, Any]:
        """
        The parameters it takes, with their defaults (`inspect.Parameter.empty` where there is
        none).
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
        """Its one-line meaning: the first line of its docstring."""
        return (self.weight.__doc__ or "").strip().partition("\n")[0]


GateLike = str | Weight | Gate  # a registered name, `module:function`, or the thing itself

GATES: dict[str, Gate] = {}


def called(gate: GateLike) -> str:
    """Return what a message calls a gate: its name, or the module and the name of its function."""
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
    Return the gate registered as `gate`, or imported if it is `module:function`, or made of it if
    it is a function.

    Raises:
        ConfigurationError: no gate has that name, with those there are and the nearest; or the
            import fails.
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
            found = getattr(importlib.import_module(module), name)
        if not callable(found):
            raise ConfigurationError(
                f"gate={gate!r} is {found!r}: expected a function of a token's statistics."
            )
        return next((known for known in GATES.values() if known.weight is found), Gate(found))
    if gate not in GATES:
        raise ConfigurationError(
            f"gate={gate!r} is unknown.{nearest(gate, GATES)} Gates: {', '.join(GATES)}."
        )
    return GATES[gate]


@contextlib.contextmanager
def own_code(what: str) -> Iterator[None]:
    """
    Say in one line what a user's own code raised, and where; also `sys.exit`, which would end the
    command as a success.

    Args:
        what: begins the message.

    Raises:
        ConfigurationError: whatever was raised, but for errors of ours.
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


def is_per_token(gate: GateLike, params: dict[str, Any]) -> bool:
    """
    Return whether the gate weighs each token by itself; one with a parameter set to `batch` does
    not.
    """
    found = get_gate(gate)
    return found.per_token and "batch" not in {**found.params, **params}.values()


def is_of_data(default: Any) -> bool:
    """
    Return whether a parameter with this default is found from the data: it has none, or `batch`.
    """
    return default is inspect.Parameter.empty or default == "batch"


def missing_params(gate: GateLike, params: Iterable[str]) -> list[str]:
    """Return the parameters that have no default and are not among `params`."""
    defaults = get_gate(gate).params
    return [
        name
        for name, default in defaults.items()
        if default is inspect.Parameter.empty and name not in params
    ]


def check_gate(gate: GateLike, params: dict[str, Any], measured: Iterable[str] = ()) -> Gate:
    """
    Return the gate, after trying it with these parameters.

    Args:
        gate: as in `get_gate`.
        params: what the gate takes, e.g. `{"alpha": 2.0}`.
        measured: names of parameters that will be known later.

    Raises:
        ConfigurationError: the gate is unknown, takes no such parameter, lacks one, or refuses a
            value.
    """
    found = get_gate(gate)
    takes = list(found.params)
    if unknown := sorted(set(params) - set(takes)):
        raise ConfigurationError(
            f"gate={gate!r} takes no {', '.join(unknown)}; it takes"
            f" {', '.join(takes) or 'nothing'}."
        )
    missing = missing_params(found, params)
    if lacking := sorted(set(missing) - set(measured)):
        raise ConfigurationError(
            f"gate={gate!r} needs {', '.join(lacking)}: give a value. (EAFTTrainer measures"
            " thresholds and tau itself.)"
        )
    try:
        weights = gate_weights(
            gate, probe(found.needs_rank), **params, **dict.fromkeys(missing, 0.5)
        )
        get_anchor(found, **params)
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"gate={called(gate)}: {error}") from error
    if not weights.isfinite().all():
        bad = weights[~weights.isfinite()][0].item()
        raise ConfigurationError(
            f"gate={called(gate)} with {params} gives weights that are not finite: {bad}."
        )
    if not found.allow_negative and (weights < 0).any():
        raise ConfigurationError(
            f"gate={called(gate)} with {params} gives negative weights"
            f" ({weights.min().item():.3g}), which make labels less likely. If that is meant,"
            " register it with allow_negative=True; else clamp it at 0."
        )
    return found


@functools.cache
def probe(ranked: bool) -> TokenStatistics:
    """
    Return statistics to try a gate on: of unsure and sure tokens, with likely and unlikely labels.
    """
    sharpness, tokens, vocabulary = 8, 4, 32
    order = torch.linspace(1, 0, vocabulary)
    logits = torch.linspace(0, 40, sharpness).repeat_interleave(tokens).unsqueeze(-1) * order
    labels = torch.tensor([0, 1, vocabulary // 2, vocabulary - 1]).repeat(sharpness)
    n = sharpness * tokens
    return replace(
        token_statistics(logits, labels, ranked=ranked),
        example_ids=torch.arange(n),
        example_nll=torch.ones(n),
        old_log_prob=torch.full((n,), -1.5),
    )


def check_gate_by_itself(gate: GateLike, params: dict[str, Any]) -> Gate:
    """
    `check_gate` for a loss that has no base model beside the trained one; a gate that needs one is
    refused.
    """
    found = check_gate(gate, params)
    if found.anchor is not None or found.needs_example_nll or found.needs_old_log_prob:
        raise ConfigurationError(f"gate={gate!r} needs the base model as well; use EAFTTrainer.")
    return found


def get_anchor(gate: GateLike, **params: Any) -> Anchor | None:
    """
    Return the gate's KL term, with `kl_coef` and `kl_direction` of `params`; None for a gate that
    has none.
    """
    anchor = get_gate(gate).anchor
    if anchor is None:
        return None
    return Anchor(params.get("kl_coef", anchor.coef), params.get("kl_direction", anchor.direction))


@torch.no_grad()
def gate_weights(gate: GateLike, stats: TokenStatistics, **params: Any) -> Tensor:
    """
    Return the weight of each token, without gradient, in the statistics' shape and dtype.

    Raises:
        ConfigurationError: the gate is unknown, raises, or returns no tensor, or one of another
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
