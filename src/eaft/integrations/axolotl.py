"""
Axolotl with a gate: `plugins: [eaft.integrations.axolotl.EAFTPlugin]` in its YAML, and the flags of
`eaft train`.
"""

from __future__ import annotations

from typing import Any, Self, get_type_hints

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, create_model, model_validator

from eaft.errors import ConfigurationError
from eaft.training.gate_fields import GateFields
from eaft.training.patch import GateCallback

SEAMS = (
    "labels at the seams between processes would be lost, and their number guessed: set it to 1."
)
# Fields of Axolotl that bypass the model's loss, or give it a part of each row, with advice
REFUSED = {
    "use_eaft": (
        "it computes a loss of its own, from full logits: leave it out, the plugin applies EAFT."
    ),
    "use_dft": "it computes a loss of its own, from full logits: set gate: dft instead.",
    "rl": "preference and reinforcement losses have no gate: leave it out, or take the plugin out.",
    "reward_model": "its loss is not over tokens: leave it out, or take the plugin out.",
    "process_reward_model": (
        "its loss is not over a vocabulary: leave it out, or take the plugin out."
    ),
    "context_parallel_size": SEAMS,
    "sequence_parallel_degree": SEAMS,
    "tensor_parallel_size": (
        "a process would see a part of the head: set it to 1, or use `eaft train`."
    ),
}


class CheckedArgs(BaseModel):
    """Refuses a gate that is wrong, and fields of Axolotl that keep the gate from the loss."""

    @model_validator(mode="after")
    def check_gate_reaches_the_loss(self) -> Self:
        """Check the gate, and Axolotl's own fields: Axolotl adds ours to its own."""
        config: Any = self
        make_callback(config)
        for name, why in REFUSED.items():
            value = getattr(config, name, None)
            if value is True or value not in (None, False, 1):
                raise ConfigurationError(
                    f"{name}: {value} does not go with gate: {config.gate}: {why}"
                )
        return self


# What the plugin reads from Axolotl's YAML: names, types and defaults of `eaft train`'s flags
FIELDS: dict[str, Any] = {
    name: (kind, getattr(GateFields, name)) for name, kind in get_type_hints(GateFields).items()
}
EAFTArgs = create_model("EAFTArgs", __base__=CheckedArgs, __module__=__name__, **FIELDS)


def make_callback(config: Any) -> GateCallback:
    """Return the callback that a configuration asks for."""
    return GateCallback(**{name: getattr(config, name) for name in FIELDS})


class EAFTPlugin(BasePlugin):
    """Makes the model that Axolotl trains return the gated loss (`eaft.patch_model`)."""

    def get_input_args(self) -> str:
        """Return the import path of our fields."""
        return f"{EAFTArgs.__module__}.{EAFTArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[GateCallback]:
        """Return the callback that patches the model after the trainer is made."""
        return [make_callback(cfg)]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """
        Divide the loss by the labels of all accumulated micro-batches, as `eaft train` does.
        """
        # Axolotl 0.19 looks for the count in the backbone's signature. It is not there, so Axolotl
        # would average the means of the micro-batches. 0.21 looks in the signature of the model's
        # `loss_function`, which our loss does not go through
        trainer.model_accepts_loss_kwargs = True
