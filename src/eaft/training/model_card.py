"""
The model card of a trained model: base model, gate with its parameters, what was trained, recipe,
versions.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from eaft.objective.gate_spec import BoundGate
from eaft.text import markdown
from eaft.training.config import EAFTConfig

SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "packing",
    "completion_only_loss",
    "assistant_only_loss",
    "replay",
    "seed",
)
ADAPTER = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules")
BADGE = "[<img "  # how TRL's links to Weights & Biases, Trackio and Comet begin


def model_card(
    theirs: ModelCard,
    args: EAFTConfig,
    gate: BoundGate,
    model: Any,
    base_model: str | None,
    dataset_name: str | None,
    progress: dict[str, Any],
) -> ModelCard:
    """
    Return the card, from `model_card.md`.

    Args:
        theirs: TRL's card of the same model; its metadata and its links to trackers are kept.
        args: the flags of training.
        gate: the gate it was trained with, complete with measured parameters.
        model: what was trained.
        base_model: as the model's config names it. For a folder on this machine, only its name is
            written.
        dataset_name: of the data. For a file or folder on this machine, only its name is written.
        progress: how far training came: `rows`, `steps`, `epochs`.
    """
    data = theirs.data
    data.pop("licence", None)  # TRL's placeholder
    if dataset_name and Path(dataset_name).expanduser().exists():
        dataset_name = Path(dataset_name).name
        data.datasets = None
    if adapter := adapter_settings(model):
        data.library_name = "peft"
    on_hub = bool(base_model) and not Path(str(base_model)).exists()
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card.md")),
        base_model=base_model and markdown(base_model if on_hub else Path(base_model).name),
        model_name=data.model_name and markdown(data.model_name),
        dataset_name=dataset_name and markdown(dataset_name),
        gate=args.gate,
        gate_settings={**gate.params, "top_k": gate.top_k},
        gate_help=gate.gate.help,
        trained=trained_parameters(model),
        adapter=adapter,
        progress=progress,
        training={
            name: shown(value) for name in SETTINGS if (value := getattr(args, name)) is not None
        },
        links=[line for line in theirs.text.splitlines() if line.startswith(BADGE)],
        versions={name: version(name) for name in ("eaft", "trl", "transformers", "torch")},
    )


def trained_parameters(model: Any) -> str:
    """Return how many of a model's parameters were trained, in words."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, grad in sizes if grad)
    return f"all {total:,}" if trained == total else f"{trained:,} of {total:,}"


def adapter_settings(model: Any) -> dict[str, Any]:
    """Return the settings of a PEFT adapter; empty where the model itself was trained."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return {}
    config = next(iter(configs.values()))
    names = [name for name in ADAPTER if hasattr(config, name)]
    return {
        "kind": shown(config.peft_type),
        **{name: shown(getattr(config, name)) for name in names},
    }


def shown(value: Any) -> Any:
    """Return a setting as the card shows it."""
    value = getattr(value, "value", value)
    return ", ".join(sorted(value)) if isinstance(value, list | set | tuple) else value
