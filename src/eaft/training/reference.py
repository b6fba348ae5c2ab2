"""The reference model of a gate with a KL term: the base model, while the policy is trained."""

from __future__ import annotations

from typing import Any

from accelerate.utils import fsdp2_prepare_model, is_peft_model

from eaft.errors import ConfigurationError
from eaft.training.head import frozen_copy


def make_reference(trainer: Any) -> Any:
    """
    Return the reference model for the head of an `EAFTTrainer`: the PEFT model around the policy,
    or a frozen copy of the policy.

    Raises:
        ConfigurationError: the copy cannot be sharded, or switching the adapters off does not give
            the base model.
    """
    if is_peft_model(trainer.model):
        if trainer.model.active_peft_config.is_prompt_learning:
            raise ConfigurationError(
                f"gate={trainer.args.gate!r} does not go with prompt learning: use LoRA."
            )
        check_adapters_off_is_base(trainer)
        return trainer.model
    state = trainer.accelerator.state
    zero3 = trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3
    if zero3 or (trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version == 1):
        raise ConfigurationError(
            f"gate={trainer.args.gate!r} keeps a copy of the base model, which it can shard with"
            " FSDP2 but not with ZeRO-3 or FSDP1: use FSDP2, or LoRA."
        )
    reference = frozen_copy(trainer.model)
    if trainer.is_fsdp_enabled:
        # Layer by layer, like the policy
        return fsdp2_prepare_model(trainer.accelerator, reference)
    return reference.to(trainer.args.device) if trainer.place_model_on_device else reference


def check_adapters_off_is_base(trainer: Any) -> None:
    """Refuse adapters that change the base model's weights (findings/peft_adapter_off.sh)."""
    config = trainer.model.active_peft_config
    start, bias = getattr(config, "init_lora_weights", True), getattr(config, "bias", "none")
    if isinstance(start, str) and start.lower().startswith(
        ("pissa", "olora", "corda", "loftq", "lora_ga")
    ):
        raise ConfigurationError(
            f"init_lora_weights={start!r} changes the base weights, so that the model without"
            f" its adapter is not the base model, which gate={trainer.args.gate!r} needs: use"
            " init_lora_weights=True."
        )
    if bias != "none":
        raise ConfigurationError(
            f"bias={bias!r} trains the base model's own biases, so that the model without its"
            f" adapter is not the base model, which gate={trainer.args.gate!r} needs: use"
            " bias='none'."
        )
