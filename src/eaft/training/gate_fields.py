"""
The flat fields of a gate, the same in every host: flags of `eaft train`, YAML, keywords.

Importing this module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eaft.objective.gate_spec import GateSpec


@dataclass
class GateFields:
    """
    The settings of a gate in a host's configuration.

    Args:
        gate: how each token's loss is weighted: the name of a gate, or `module:function`.
        gate_alpha: exponent of the `eaft` gate; 0 is plain SFT, 2 and 3 are the paper's EAFT^2 and
            EAFT^3.
        gate_entropy: `top-k` or `exact`, for the gates that use the entropy.
        gate_top_k: K of the top-K entropy; entropies are divided by ln K.
        gate_kwargs: the other parameters of the gate, e.g. `{"steepness": 20}` for `eaft-sigmoid`.
    """

    gate: str = field(
        default="eaft",
        metadata={
            "help": (
                "How each token's loss is weighted: one of the gates listed here, or"
                " module:function of your own."
            )
        },
    )
    gate_alpha: float = field(
        default=1.0,
        metadata={"help": "Exponent of the 'eaft' gate: 0 is plain SFT, larger is stricter."},
    )
    gate_entropy: str = field(
        default="top-k",
        metadata={
            "help": (
                "Entropy of the gates that use it: 'top-k' (of the K largest probabilities,"
                " renormalised) or 'exact' (of the whole vocabulary, clamped to ln K)."
            )
        },
    )
    gate_top_k: int = field(
        default=20, metadata={"help": "K of the top-K entropy; entropies are divided by ln K."}
    )
    gate_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": (
                "Other parameters of the gate, as --help_all lists them: '{\"steepness\": 20}'"
                " (JSON, or a YAML map)."
            )
        },
    )

    @property
    def gate_spec(self) -> GateSpec:
        """The gate that the fields describe; raises `ConfigurationError` for bad JSON."""
        from eaft.objective.gate_spec import spec_of

        return spec_of(self)
