"""
The model card of a trained model: base model, gate with its parameters, recipe, versions.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from eaft.objective.gate_spec import BoundGate
from eaft.text import markdown
from eaft.training.config import EAFTConfig

SETTINGS = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "seed",
)


def model_card(
    args: EAFTConfig,
    gate: BoundGate,
    base_model: str | None,
    model_name: str | None,
    dataset_name: str | None,
    tags: list[str],
) -> ModelCard:
    """
    Return the card, from `model_card.md`.

    Args:
        args: the flags of training.
        gate: the gate it was trained with, complete with measured parameters.
        base_model: as the model's config names it. For a folder on this machine, only its name is
            written.
        model_name, dataset_name: names on the Hub, if they will be there.
        tags: more tags for the Hub.
    """
    on_hub = bool(base_model) and not Path(str(base_model)).exists()
    return ModelCard.from_template(
        ModelCardData(
            base_model=base_model if on_hub else None,
            library_name="transformers",
            model_name=model_name,
            tags=["generated_from_trainer", *tags],
        ),
        template_path=str(Path(__file__).with_name("model_card.md")),
        base_model=base_model and markdown(base_model if on_hub else Path(base_model).name),
        dataset_name=dataset_name and markdown(dataset_name),
        gate=args.gate,
        gate_settings={**gate.params, "top_k": gate.top_k},
        gate_help=gate.gate.help,
        training={name: getattr(args, name) for name in SETTINGS},
        versions={name: version(name) for name in ("eaft", "trl", "transformers", "torch")},
    )
