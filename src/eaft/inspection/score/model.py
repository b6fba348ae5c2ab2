"""A model, loaded as training loads it, that computes the statistics of tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor
from trl import ModelConfig, get_quantization_config

from eaft.errors import ConfigurationError, first_line
from eaft.evaluation.model_settings import generation_config
from eaft.inspection.folder import STATISTICS
from eaft.inspection.score.examples import Tokens
from eaft.models import adapter_of, check_finite, loading, resolve_model
from eaft.objective.gate_spec import bind_gate
from eaft.objective.statistics import TokenStatistics
from eaft.training.config import EAFTConfig
from eaft.training.head import GatedLMHead
from eaft.training.logits_check import check_logits
from eaft.training.train import model_init_kwargs
from eaft.training.trl_internals import create_model_from_path

# The most tokens of a batch, with padding. On a CPU small batches are faster: less padding, and
# what a layer computes stays in the cache
BATCH_TOKENS, GPU_BATCH_TOKENS = 2**10, 2**14


@dataclass(frozen=True)
class Settings:
    """The flags that say how models compute."""

    args: EAFTConfig
    model_args: ModelConfig

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of training's autocast; None without autocast."""
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None


class ScoringModel:
    """
    A model that scores examples as the first step of training sees them.

    It is loaded as `eaft train` loads it.

    Args:
        model: a Hub id, a folder, or a folder with a PEFT adapter.
        settings: how it computes.
        is_base: whether the flag `model_revision` is of this model.

    Raises:
        ConfigurationError: it cannot be loaded, or `GatedLMHead` computes other logits.
    """

    columns = tuple(field.name for field in STATISTICS)

    def __init__(self, model: str, settings: Settings, is_base: bool = True) -> None:
        self.name, self.settings = model, settings
        self.device = settings.args.device
        self.batch_tokens = GPU_BATCH_TOKENS if self.device.type == "cuda" else BATCH_TOKENS
        self.model = load(model, settings, is_base).eval()
        self.base_model = (
            self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        )
        self.head = GatedLMHead(self.base_model, bind_gate("sft", top_k=settings.args.gate_top_k))
        self.vocab_size = self.base_model.get_input_embeddings().weight.shape[0]
        self.checked = False

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Compute without gradient, in training's dtype."""
        dtype = self.settings.autocast
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None),
        ):
            yield

    def statistics(
        self, tokens: Tokens, batch: list[int]
    ) -> tuple[TokenStatistics, NDArray[np.integer]]:
        """Return the statistics of some examples' tokens; see `Scorer`."""
        width = int(tokens.lengths[batch].max())
        # Padding is on the right, where causal attention does not see it
        ids, labels = np.zeros((len(batch), width), np.int64), np.full((len(batch), width), -100)
        places = []
        for row, i in enumerate(batch):
            part = slice(tokens.starts[i], tokens.starts[i] + tokens.lengths[i])
            ids[row, : tokens.lengths[i]] = tokens.ids[part]
            labels[row, : tokens.lengths[i]] = np.where(
                tokens.labelled[part], tokens.ids[part], -100
            )
            places.append(np.flatnonzero(tokens.labelled[part]) + part.start)
        inputs = {
            "input_ids": torch.from_numpy(ids).to(self.device),
            "labels": torch.from_numpy(labels),
        }
        inputs["labels"] = inputs["labels"].to(self.device)
        with self.computing():
            if not self.checked:
                shortest = {
                    name: tensor[-1:, : tokens.lengths[batch[-1]]]
                    for name, tensor in inputs.items()
                }
                check_logits(self.model, shortest, lambda inputs: inputs)
                self.checked = True
            return self.head.statistics(self.base_model, **inputs), np.concatenate(places)

    def logits(self, ids: list[int], positions: NDArray[np.integer]) -> Tensor:
        """
        Return the logits that predict some tokens of an example.

        Args:
            ids: of the example.
            positions: `[n]`, of the tokens.

        Returns:
            `[n, V]`, float32, on the CPU.
        """
        chosen = torch.zeros(1, len(ids), dtype=torch.bool)
        chosen[0, positions - 1] = True
        with self.computing():
            return self.head.logits(
                self.base_model, chosen, input_ids=torch.tensor([ids], device=self.device)
            ).cpu()


def load(model: str, settings: Settings, is_base: bool) -> Any:
    """Return a model on its device; if the folder has an adapter, around its base model."""
    args, adapter = settings.args, adapter_of(model)
    options = model_init_kwargs(args, settings.model_args)
    options["quantization_config"] = get_quantization_config(settings.model_args)
    if PartialState().num_processes > 1:
        options["device_map"] = None  # each process has its own device
    if not is_base:
        options["revision"] = None
    name = model
    if adapter is not None:
        name = resolve_model(adapter.base_model, args.trust_remote_code)
        options["revision"] = adapter.revision
    options = {
        key: value for key, value in options.items() if value is not None or key == "device_map"
    }
    try:
        with loading(f"{model} cannot be loaded."):
            loaded = create_model_from_path(name, **options)
            if adapter is not None:
                loaded = with_adapter(loaded, model)
                loaded.get_base_model().generation_config = generation_config(model)
    except (ValueError, RuntimeError) as error:  # TRL's, of its arguments; PEFT's
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"{model} cannot be loaded. ({first_line(error)})") from error
    check_finite(loaded, model)
    placed = hasattr(loaded, "hf_device_map") or options.get("quantization_config") is not None
    return loaded if placed else loaded.to(args.device)


def with_adapter(base: Any, folder: str) -> Any:
    """
    Return a model with the PEFT adapter of a folder.

    Raises:
        ConfigurationError: the adapter adds tokens to the prompt.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = PeftModel.from_pretrained(base, folder)
    if model.active_peft_config.is_prompt_learning:
        raise ConfigurationError(
            f"{folder} adds tokens to the prompt instead of changing weights, which `eaft inspect`"
            " does not support: merge it, or inspect its base model."
        )
    head = model.get_base_model().get_output_embeddings()
    if isinstance(head, BaseTunerLayer):  # `GatedLMHead` reads the head's weight alone
        layer = head.get_base_layer()
        # The embedding may share this weight
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        head.merge()
    return model
