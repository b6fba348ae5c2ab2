"""
The plugin for Axolotl, with the flags of `eaft train` in its YAML:

    plugins: [eaft.integrations.axolotl.EAFTPlugin]
    gate: eaft
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from eaft.errors import ConfigurationError
from eaft.training.patch import GateCallback


class EAFTArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration; see `GateCallback`."""

    gate: str = "eaft"
    gate_alpha: float = 1.0
    gate_entropy: str = "top-k"
    gate_top_k: int = 20
    gate_kwargs: dict[str, Any] | None = None


class EAFTPlugin(BasePlugin):  # type: ignore[misc]
    """Trains with the gated loss, without full logits."""

    def get_input_args(self) -> str:
        """Return the name of the class that describes our flags."""
        return f"{__name__}.EAFTArgs"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """
        Return the callback that patches the model.

        Raises:
            ConfigurationError: Axolotl's own EAFT is switched on too.
        """
        if cfg.use_eaft:
            raise ConfigurationError("use_eaft: true is Axolotl's own EAFT: leave it out, the plugin's `gate` is ours.")
        return [GateCallback(**{name: getattr(cfg, name) for name in EAFTArgs.model_fields})]
