"""
Turns the fields of a configuration into a gate that can be called.

Every host has the same flat fields (`gate`, `gate_alpha`, ...; `eaft.training.gate_fields`).
`spec_of` makes one `GateSpec` of them. `GateSpec.bind` checks it and returns a `BoundGate`, which
knows its parameters, what it needs and its KL term. The losses, the trainer and the integrations
only see the `BoundGate`.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from eaft.errors import ConfigurationError
from eaft.objective.registry import Anchor, Gate, GateLike, called, gate_weights, get_gate
from eaft.objective.statistics import TokenStatistics, token_statistics


@dataclass(frozen=True)
class BoundGate:
    """
    A gate with its parameters and the K of its entropy, checked. `bind_gate` makes it.

    Attributes:
        gate: the registered gate.
        label: what a message calls it, in quotes: its name, or the module and name of its function.
        params: every parameter that has a value: the given ones and the defaults.
        top_k: K of the top-K entropy.
        missing: parameters that still have to be measured on the training data.
    """

    gate: Gate
    label: str
    params: Mapping[str, Any]
    top_k: int = 20
    missing: tuple[str, ...] = ()

    @property
    def per_token(self) -> bool:
        """Whether the gate weighs each token by itself; one with a parameter `batch` does not."""
        return self.gate.per_token and "batch" not in self.params.values()

    @property
    def anchor(self) -> Anchor | None:
        """The KL term beside the gated nll, or None."""
        if self.gate.anchor is None:
            return None
        return replace(
            self.gate.anchor, coef=self.params["kl_coef"], direction=self.params["kl_direction"]
        )

    @property
    def needs_rank(self) -> bool:
        """Whether the statistics need `rank` and `first_prob`."""
        return self.gate.needs_rank

    @property
    def needs_example_nll(self) -> bool:
        """Whether the statistics need `example_nll`, which the base model gives."""
        return self.gate.needs_example_nll

    @property
    def needs_old_log_prob(self) -> bool:
        """Whether the statistics need `old_log_prob`, which the base model gives."""
        return self.gate.needs_old_log_prob

    @property
    def must_be_measured(self) -> bool:
        """Whether training must first pass over the data with the base model, by example."""
        return bool(self.missing) or self.needs_example_nll

    @property
    def needs_examples(self) -> bool:
        """Whether the gate, or its measurement, must know which example each token is from."""
        return self.gate.needs_examples or self.must_be_measured

    @property
    def needs_base_model(self) -> bool:
        """Whether the loss needs the base model beside the trained one."""
        return self.anchor is not None or self.needs_example_nll or self.needs_old_log_prob

    def weights(self, stats: TokenStatistics) -> Tensor:
        """Return the weight of each token, without gradient; see `gate_weights`."""
        return gate_weights(self.gate, stats, **self.params)

    def complete(self, measured: Mapping[str, Any]) -> BoundGate:
        """Return the gate with parameters that were measured; they are checked."""
        return bind_gate(self.gate, {**self.params, **measured}, self.top_k, label=self.label)

    def plain(self) -> BoundGate:
        """Return the gate for evaluation: weight 1, so that the loss is the nll."""
        return bind_gate("sft", top_k=self.top_k)


def bind_gate(
    gate: GateLike | BoundGate,
    params: Mapping[str, Any] | None = None,
    top_k: int = 20,
    measured: Iterable[str] = (),
    *,
    label: str | None = None,
) -> BoundGate:
    """
    Return the gate with its parameters, after trying it on a few tokens.

    Args:
        gate: as in `get_gate`; a `BoundGate` without further `params` is returned as it is.
        params: what the gate takes, e.g. `{"alpha": 2.0}`.
        top_k: K of the top-K entropy.
        measured: names of parameters that will be measured later.
        label: what messages call the gate; default: `called(gate)`.

    Raises:
        ConfigurationError: the gate is unknown, takes no such parameter, lacks one, or refuses a
            value.
    """
    params = params or {}
    if isinstance(gate, BoundGate):
        return gate.complete(params) if params else gate
    label = label or called(gate)
    gate = get_gate(gate)
    defaults = gate.params
    if unknown := sorted(set(params) - set(defaults)):
        raise ConfigurationError(
            f"gate={label} takes no {', '.join(unknown)}; it takes"
            f" {', '.join(defaults) or 'nothing'}."
        )
    values = {k: v for k, v in defaults.items() if v is not inspect.Parameter.empty}
    values |= params
    missing = tuple(name for name in defaults if name not in values)
    if lacking := sorted(set(missing) - set(measured)):
        raise ConfigurationError(
            f"gate={label} needs {', '.join(lacking)}: give a value. (EAFTTrainer measures"
            " thresholds and tau itself.)"
        )
    bound = BoundGate(gate, label, values, top_k, missing)
    try_gate(bound)
    return bound


def try_gate(bound: BoundGate) -> None:
    """
    Weigh the tokens of `probe`, with 0.5 for each parameter that is still missing.

    Raises:
        ConfigurationError: the gate refuses a value, or has a weight that is negative or not
            finite.
    """
    params = {**bound.params, **dict.fromkeys(bound.missing, 0.5)}
    try:
        weights = gate_weights(bound.gate, probe(bound.needs_rank), **params)
        _ = bound.anchor  # checks its values
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"gate={bound.label}: {error}") from error
    if not weights.isfinite().all():
        bad = weights[~weights.isfinite()][0].item()
        raise ConfigurationError(
            f"gate={bound.label} with {bound.params} gives weights that are not finite: {bad}."
        )
    if not bound.gate.allow_negative and (weights < 0).any():
        raise ConfigurationError(
            f"gate={bound.label} with {bound.params} gives negative weights"
            f" ({weights.min().item():.3g}), which make labels less likely. If that is meant,"
            " register it with allow_negative=True; else clamp it at 0."
        )


@functools.cache
def probe(ranked: bool) -> TokenStatistics:
    """
    Return statistics to try a gate on: unsure and sure tokens, with likely and unlikely labels.
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


def refuse_base_model(bound: BoundGate) -> BoundGate:
    """
    Return the gate, for a loss that has no base model beside the trained one.

    Raises:
        ConfigurationError: the gate needs the base model.
    """
    if bound.needs_base_model:
        raise ConfigurationError(
            f"gate={bound.label} needs the base model as well; use EAFTTrainer."
        )
    return bound


@dataclass(frozen=True)
class GateSpec:
    """
    A gate as a configuration describes it. Nothing is checked before `bind`.

    Attributes:
        name: a gate's name, `module:function`, or a function of `TokenStatistics`.
        alpha: exponent of the `eaft` gate.
        entropy: `top-k` or `exact`.
        top_k: K of the top-K entropy.
        kwargs: the other parameters of the gate.
    """

    name: GateLike = "eaft"
    alpha: float = 1.0
    entropy: str = "top-k"
    top_k: int = 20
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def params(self) -> dict[str, Any]:
        """
        The gate's parameters, set or by default, without parameters that are still to be measured.

        Raises:
            ConfigurationError: the gate is unknown, or `kwargs` has a parameter that is a field.
        """
        defaults = get_gate(self.name).params
        params = {k: v for k, v in defaults.items() if v is not inspect.Parameter.empty}
        for name, value, default in (
            ("alpha", self.alpha, GateSpec.alpha),
            ("entropy", self.entropy, GateSpec.entropy),
        ):
            if name in self.kwargs:
                raise ConfigurationError(f"gate_kwargs: set {name} by gate_{name}.")
            if name in params or value != default:
                params[name] = value
        return {**params, **self.kwargs}

    @property
    def settings(self) -> dict[str, Any]:
        """The gate as it is written to files: `name`, `top_k`, and each parameter by its name."""
        return {"name": self.name, "top_k": self.top_k, **self.params}

    def bind(self, measured: Iterable[str] = ()) -> BoundGate:
        """
        Return the gate, checked; see `bind_gate`.

        Raises:
            ConfigurationError: as in `bind_gate`, or a `top_k` below 2.
        """
        if self.top_k < 2:
            raise ConfigurationError(
                f"gate_top_k must be at least 2, got {self.top_k}; the paper uses 20."
            )
        return bind_gate(self.name, self.params, self.top_k, measured)

    def bind_alone(self) -> BoundGate:
        """`bind` for a loss without the base model; raises `ConfigurationError` if it is needed."""
        return refuse_base_model(self.bind())


def spec_of(host: Any) -> GateSpec:
    """
    Return the gate of an object that has the fields of `eaft.training.gate_fields.GateFields`.

    Raises:
        ConfigurationError: `gate_kwargs` is neither a map nor the JSON of one.
    """
    kwargs = host.gate_kwargs
    if isinstance(kwargs, str):
        try:
            kwargs = json.loads(kwargs)
        except ValueError as error:
            raise ConfigurationError(f"gate_kwargs={kwargs!r} is not JSON: {error}.") from error
    if not isinstance(kwargs, dict | None):
        raise ConfigurationError(f"gate_kwargs={kwargs!r}: expected a map of names to values.")
    return GateSpec(
        host.gate, host.gate_alpha, host.gate_entropy, host.gate_top_k, dict(kwargs or {})
    )
