"""
What a gate does to tokens, and the sliders that move it. The formulas are those of
`eaft.objective.gates`.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from eaft.errors import EAFTError
from eaft.inspection.labelled import weighed_gates
from eaft.inspection.removed import Removed
from eaft.inspection.view.selection import RequestError, one_of
from eaft.objective.registry import check_gate, gate_weights, is_of_data
from eaft.objective.statistics import TokenStatistics

Answer = dict[str, Any]

MOST_MUTED = 50  # tokens that are listed
WEIGHT_BINS = 50

# A slider for every parameter of a gate that moves its weights: where it begins if the data tells
# nothing, and its ends
SLIDERS: dict[str, Answer] = {
    "alpha": {"default": 1.0, "min": 0.0, "max": 4.0, "step": 0.1},
    "steepness": {"default": 30.0, "min": 1.0, "max": 100.0, "step": 1.0},
    "center": {"default": 0.17, "min": 0.0, "max": 1.0, "step": 0.01},
    "entropy_threshold": {"default": 0.15, "min": 0.0, "max": 1.0, "step": 0.001},
    "prob_threshold": {"default": 0.15, "min": 0.0, "max": 1.0, "step": 0.001},
    "tau": {"default": 1.0, "min": 0.01, "max": 10.0, "step": 0.01},
    "gamma": {"default": 1.0, "min": 0.0, "max": 4.0, "step": 0.1},
    "base": {"default": "prob", "choices": ["prob", "one"]},
    "min_weight": {"default": 0.01, "min": 0.0, "max": 1.0, "step": 0.01},
    "entropy": {"default": "top-k", "choices": ["top-k", "exact"]},
}


def sliders(measured: dict[str, float]) -> list[Answer]:
    """
    Return every gate with its sliders: name, help, params, and whether one of these begins where
    the data says.

    Args:
        measured: parameters as they are measured on this data. A `batch`'s, which a page has none
            of, are among them.
    """
    found = []
    for name, gate in weighed_gates().items():
        params = []
        for param, default in gate.params.items():
            if slider := SLIDERS.get(param):
                whole = {
                    "name": param,
                    "choices": None,
                    "min": None,
                    "max": None,
                    "step": None,
                    **slider,
                }
                start = measured.get(param, slider["default"]) if is_of_data(default) else default
                params.append({**whole, "default": start})
        needs = any(
            param["name"] in measured and is_of_data(gate.params[param["name"]]) for param in params
        )
        found.append({"name": name, "help": gate.help, "params": params, "measured": needs})
    return found


def parameters(gate: str, given: Answer, measured: dict[str, float]) -> Answer:
    """
    Return a gate's parameters: those given, checked, the others as its sliders begin; raises
    `RequestError`.
    """
    one_of("gate", gate, weighed_gates())
    starts = next(found for found in sliders(measured) if found["name"] == gate)["params"]
    params = {param["name"]: param["default"] for param in starts} | given
    for name, value in params.items():
        choices = SLIDERS.get(name, {}).get("choices")
        if not (value in choices if choices else type(value) in (int, float) and abs(value) < 1e9):
            expected = f"one of {', '.join(choices)}" if choices else "a number"
            raise RequestError(f"params: {name}={json.dumps(value)[:50]}: expected {expected}.")
    try:
        check_gate(gate, params)
    except (EAFTError, ValueError, TypeError) as error:
        raise RequestError(str(error)) from error
    return params


def weigh(gate: str, stats: TokenStatistics, params: Answer) -> np.ndarray:
    """
    Return a gate's weights, float32; 0 where a formula has none, as at the far end of a slider.
    """
    weights: np.ndarray = gate_weights(gate, stats, **params).nan_to_num(0).numpy()
    return weights


def effect(
    weights: np.ndarray, stats: TokenStatistics, columns: dict[str, np.ndarray], sources: list[str]
) -> Answer:
    """
    Return what weights do to tokens.

    Args:
        weights: `[n]`.
        stats: of the same tokens.
        columns: `grad_norm`, `source` (a number) and `token_id` of the same tokens.
        sources: the names of sources, by number.

    Returns:
        `removed` {tokens, nll, gradient} and `by_source` (shares, of the largest sources),
        `mean_weight`, `weights` (a histogram) and `muted`: the tokens that lose the most nll, with
        how many are muted.
    """
    quantities = {
        "tokens": np.ones_like(weights),
        "nll": stats.nll.numpy(),
        "gradient": columns["grad_norm"],
    }
    removed = Removed(len(sources), int(columns["token_id"].max(initial=-1)) + 1)
    removed.add(weights, quantities, columns["source"], columns["token_id"])
    top = max(1.0, float(weights.max(initial=0)))
    counts, _ = np.histogram(weights, WEIGHT_BINS, (0.0, top))
    return {
        "removed": removed.shares(),
        "by_source": [{"source": sources[i], **removed.shares(i)} for i in removed.largest],
        "mean_weight": float(weights.mean()) if len(weights) else None,
        "weights": {"edges": np.linspace(0, top, WEIGHT_BINS + 1).tolist(), "counts": counts},
        "muted": removed.most_muted(MOST_MUTED),
    }
