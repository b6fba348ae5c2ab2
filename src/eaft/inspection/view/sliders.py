"""The sliders of each gate, and the parameters that they set."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from eaft.errors import EAFTError
from eaft.inspection.labelled import weighed_gates
from eaft.inspection.summary import MeasuredParameters
from eaft.inspection.view.selection import RequestError, one_of
from eaft.objective.gate_spec import bind_gate
from eaft.objective.registry import is_of_data

Parameters = dict[str, Any]  # a gate's parameters by name: numbers or names


@dataclass(frozen=True)
class Slider:
    """A control of one parameter of a gate: a range of numbers, or names to choose from."""

    name: str
    default: Any  # where it begins, if neither the gate nor the data says so
    min: float | None = None
    max: float | None = None
    step: float | None = None
    choices: list[str] | None = None


@dataclass(frozen=True)
class GateControls:
    """A gate with its sliders."""

    name: str
    help: str
    params: list[Slider]
    measured: bool  # whether a slider begins at a value that was measured on this data


# Every parameter that changes a gate's weights
SLIDERS = {
    slider.name: slider
    for slider in (
        Slider("alpha", 1.0, 0.0, 4.0, 0.1),
        Slider("steepness", 30.0, 1.0, 100.0, 1.0),
        Slider("center", 0.17, 0.0, 1.0, 0.01),
        Slider("entropy_threshold", 0.15, 0.0, 1.0, 0.001),
        Slider("prob_threshold", 0.15, 0.0, 1.0, 0.001),
        Slider("tau", 1.0, 0.01, 10.0, 0.01),
        Slider("max_prob", 0.93, 0.51, 0.99, 0.01),
        Slider("gamma", 1.0, 0.0, 4.0, 0.1),
        Slider("base", "prob", choices=["prob", "one"]),
        Slider("min_weight", 0.01, 0.0, 1.0, 0.01),
        Slider("entropy", "top-k", choices=["top-k", "exact"]),
    )
}


def gate_controls(
    measured: MeasuredParameters | None, whole_vocabulary: bool = True
) -> list[GateControls]:
    """
    Return the sliders of every gate.

    Args:
        whole_vocabulary: whether the inspection has statistics of the whole vocabulary. Without
            them the entropy cannot be chosen: it is the top-K entropy.
        measured: parameters that were measured on this data, if any were. Training measures some
            of them on each batch; their sliders begin at the value for all the data.
    """
    values = {} if measured is None else vars(measured)
    controls = []
    for name, gate in weighed_gates(whole_vocabulary).items():
        params, begins_at_measured = [], False
        for param, default in gate.params.items():
            slider = SLIDERS.get(param)
            if slider is None or (param == "entropy" and not whole_vocabulary):
                continue
            if not is_of_data(default):
                params.append(replace(slider, default=default))
            elif param in values:
                params.append(replace(slider, default=values[param]))
                begins_at_measured = True
            else:
                params.append(slider)
        controls.append(GateControls(name, gate.help, params, begins_at_measured))
    return controls


def parameters(gate: str, chosen: Parameters, gates: list[GateControls]) -> Parameters:
    """
    Return all parameters of a gate: the chosen ones, and the others where their sliders begin.

    Args:
        gate: its name.
        chosen: values by name.
        gates: all gates that there are.

    Raises:
        RequestError: no such gate or parameter, or a value that the gate does not take.
    """
    by_name = {controls.name: controls for controls in gates}
    one_of("gate", gate, by_name)
    controls = by_name[gate]
    params = {slider.name: slider.default for slider in controls.params} | chosen
    for name, value in params.items():
        choices = SLIDERS[name].choices if name in SLIDERS else None
        if choices is not None:
            if value not in choices:
                raise bad_parameter(name, value, f"one of {', '.join(choices)}")
        elif type(value) not in (int, float) or not abs(value) < 1e9:  # NaN is not below
            raise bad_parameter(name, value, "a number")
    try:
        bind_gate(gate, params)
    except (EAFTError, ValueError, TypeError) as error:
        raise RequestError(str(error)) from error
    return params


def bad_parameter(name: str, value: Any, expected: str) -> RequestError:
    """Return the error that a parameter has a value of another kind."""
    return RequestError(f"params: {name}={json.dumps(value)[:50]}: expected {expected}.")
