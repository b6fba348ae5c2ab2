"""
eaft: Entropy-Adaptive Fine-Tuning (arXiv:2601.02151) for Hugging Face TRL, transformers and PEFT.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eaft.objective import gates
    from eaft.objective.fused import linear_gated_cross_entropy
    from eaft.objective.loss import gated_cross_entropy
    from eaft.objective.statistics import TokenStatistics, token_statistics
    from eaft.training.config import EAFTConfig
    from eaft.training.patch import GateCallback, patch_model
    from eaft.training.trainer import EAFTTrainer

__version__ = version("eaft")

__all__ = [
    "EAFTConfig",
    "EAFTTrainer",
    "GateCallback",
    "TokenStatistics",
    "gated_cross_entropy",
    "gates",
    "linear_gated_cross_entropy",
    "patch_model",
    "token_statistics",
]

MODULES = {
    "EAFTConfig": "training.config",
    "EAFTTrainer": "training.trainer",
    "GateCallback": "training.patch",
    "TokenStatistics": "objective.statistics",
    "gated_cross_entropy": "objective.loss",
    "linear_gated_cross_entropy": "objective.fused",
    "patch_model": "training.patch",
    "token_statistics": "objective.statistics",
}


def __getattr__(name: str) -> Any:
    # torch and TRL take seconds to import, so each name imports what it needs; `eaft --help`
    # imports neither
    if name == "gates":
        return import_module("eaft.objective.gates")
    if name in MODULES:
        return getattr(import_module(f"eaft.{MODULES[name]}"), name)
    raise AttributeError(f"module 'eaft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
