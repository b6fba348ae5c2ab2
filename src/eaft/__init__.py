"""eaft: Entropy-Adaptive Fine-Tuning (arXiv:2601.02151) for Hugging Face TRL, transformers and PEFT."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from eaft.objective import gates
from eaft.objective.fused import linear_gated_cross_entropy
from eaft.objective.loss import GatedLoss, gated_cross_entropy
from eaft.objective.statistics import TokenStatistics, token_statistics

if TYPE_CHECKING:
    from eaft.training.config import EAFTConfig
    from eaft.training.trainer import EAFTTrainer

__version__ = version("eaft")

__all__ = [
    "EAFTConfig",
    "EAFTTrainer",
    "GatedLoss",
    "TokenStatistics",
    "gated_cross_entropy",
    "gates",
    "linear_gated_cross_entropy",
    "token_statistics",
]


def __getattr__(name: str) -> Any:
    # TRL takes seconds to import, and only these need it
    modules = {"EAFTConfig": "eaft.training.config", "EAFTTrainer": "eaft.training.trainer"}
    if name in modules:
        return getattr(import_module(modules[name]), name)
    raise AttributeError(f"module 'eaft' has no attribute {name!r}")
