"""
verl: the gated loss in its SFT trainer, on the FSDP engine.

    from eaft.integrations.verl import gated
    from verl.trainer import sft_trainer

    sft_trainer.SFTTrainer = gated(sft_trainer.SFTTrainer, gate="eaft")
    sft_trainer.main()

The engine gives a loss only the log-probabilities of the tokens. For distillation, though, it first
calls the loss with the logits, and passes on a result for each token. There we compute the gate's
weights.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from verl.utils import tensordict_utils
from verl.workers.utils.losses import sft_loss

from eaft.errors import ConfigurationError
from eaft.objective.chunk import LogitTransform
from eaft.objective.fused import choose_backend
from eaft.objective.gate_spec import BoundGate
from eaft.objective.loss import gated_nll
from eaft.objective.statistics import TokenStatistics, usable_top_k
from eaft.training.gate_fields import GateFields

ROWS = 1024  # rows of logits that are copied at a time


def gated(trainer: Any, gate: str = "eaft", **fields: Any) -> Any:
    """
    Return `verl.trainer.sft_trainer.SFTTrainer`, given as `trainer`, with the gated loss.

    Args:
        trainer: the class.
        gate: as the flag of `eaft train`.
        fields: `gate_alpha`, `gate_entropy`, `gate_top_k` and `gate_kwargs`, as the flags too
            (`eaft.training.gate_fields.GateFields`).

    Raises:
        ConfigurationError: unknown gate or parameter, or a gate that needs the base model. When the
            engine is built: it does not give the loss all logits.
    """
    loss = GatedLoss(GateFields(gate, **fields).gate_spec.bind_alone())

    class GatedSFTTrainer(trainer):
        def _build_engine(self) -> None:
            super()._build_engine()
            check_engine(self.engine_config)
            client = self.training_client
            client.set_loss_fn(loss)
            client.train_batch = shows_logits(client.train_batch)

    return GatedSFTTrainer


def check_engine(config: Any) -> None:
    """Refuse an engine that gives the loss no logits, or only a part of them."""
    if config.strategy not in ("fsdp", "fsdp2"):
        raise ConfigurationError(
            f"engine.strategy={config.strategy!r}: the gated loss needs fsdp or fsdp2."
        )
    if config.use_fused_kernels:
        raise ConfigurationError(
            "model.use_fused_kernels=True keeps no logits, which a gate is made of: leave it off."
        )
    if config.ulysses_sequence_parallel_size > 1:
        raise ConfigurationError(
            f"engine.ulysses_sequence_parallel_size={config.ulysses_sequence_parallel_size}: the"
            " gated loss needs 1."
        )
    if config.pad_to_length:
        raise ConfigurationError(
            "engine.pad_to_length=True: its padding would have no logits to show: leave it off."
        )


def shows_logits(train_batch: Any) -> Any:
    """Return a `train_batch` in which the engine calls the loss with the logits."""

    @functools.wraps(train_batch)
    def with_logits(data: Any) -> Any:
        tensordict_utils.assign_non_tensor(data, distillation_use_topk=True)
        return train_batch(data=data)

    return with_logits


class GatedLoss:
    """
    A loss function for the engine. Called with logits, it returns the weights; called with the
    weights, it returns the loss.

    In validation there are no weights, and it is the host's own loss, the plain nll.
    """

    def __init__(self, gate: BoundGate) -> None:
        self.gate = gate

    def __call__(
        self,
        model_output: Any = None,
        data: Any = None,
        dp_group: Any = None,
        student_logits: Tensor | None = None,
    ) -> Any:
        """
        Return `{"gate": weights [1, N]}` from logits `[1, N, V]`; without logits, the host's
        `sft_loss` of the gated terms.
        """
        if student_logits is not None:
            return {"gate": self.weights(student_logits[0], data).unsqueeze(0)}
        if torch.is_grad_enabled():
            log_probs, weights = model_output["log_probs"], model_output["gate"]
            terms = -gated_nll(-log_probs.values(), weights.values())
            model_output = {
                "log_probs": torch.nested.nested_tensor_from_jagged(terms, log_probs.offsets())
            }
        return sft_loss(config=None, model_output=model_output, data=data, dp_group=dp_group)

    @torch.no_grad()
    def weights(self, logits: Tensor, data: Any) -> Tensor:
        """Return the weight of each token of a packed batch, 0 where there is no label."""
        input_ids = data["input_ids"]
        labels, lengths = input_ids.values().roll(-1), input_ids.offsets().diff()
        index = data["loss_mask"].values().roll(-1).nonzero().squeeze(-1)
        top_k = usable_top_k(self.gate.top_k, logits.shape[-1])
        backend = choose_backend(None, logits)
        with torch.autocast(logits.device.type, enabled=False):
            stats = TokenStatistics.cat(
                [
                    backend.score(
                        logits[rows], labels[rows], top_k, LogitTransform(), self.gate.needs_rank
                    ).statistics
                    for rows in index.split(min(ROWS, backend.block_rows(logits)))
                ]
            )
        examples = torch.arange(len(lengths), device=logits.device).repeat_interleave(lengths)
        weights = torch.zeros(len(logits), dtype=stats.log_prob.dtype, device=logits.device)
        weights[index] = self.gate.weights(replace(stats, example_ids=examples[index]))
        return weights
