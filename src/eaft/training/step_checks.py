"""Checks of a training step: its loss and gradient are finite, and the gradient is not 0."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import Tensor

from eaft.errors import ConfigurationError, NonFiniteError
from eaft.training.metrics import TokenMeans
from eaft.training.rows import describe_rows

logger = get_logger(__name__)


def require_finite_loss(trainer: Any, loss: Tensor, batch: dict[str, Any]) -> None:
    """
    Stop every rank with the same message, before the backward pass, if the loss of any rank is not
    finite.

    Raises:
        NonFiniteError: names the rows of the batches.
    """
    finite = torch.isfinite(loss.detach())
    if trainer.accelerator.gather(finite).all():
        return
    training, report = trainer.model.training, None
    if not finite:
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        where = (
            f"in process {trainer.accelerator.process_index} "
            if trainer.accelerator.num_processes > 1
            else ""
        )
        try:
            handler = trainer.callback_handler
            loader = handler.train_dataloader if training else handler.eval_dataloader
            dataset = getattr(loader, "dataset", None)
            rows = describe_rows(batch, tokenizer, dataset, images=trainer._is_vision_dataset)
        # An unknown kind of batch must not stop this rank: the others wait for its report
        except Exception as error:
            rows = f"of a kind that cannot be shown ({type(error).__name__}: {error})"
        report = loss.item(), f"{where}the batch's rows are {rows}"
    everywhere = [x for x in gather_object([report]) if x is not None]
    doing = f"training, step {trainer.state.global_step + 1}" if training else "evaluation"
    raise NonFiniteError(
        f"The loss is {everywhere[0][0]} in {doing};"
        f" {'; '.join(rows for _, rows in everywhere)}. The weights are those of step"
        f" {trainer.state.global_step}, and saved checkpoints are untouched. Look at these rows,"
        " or lower learning_rate."
    )


def require_finite_gradient(trainer: Any, grad_norm: Any) -> None:
    """
    Stop before the optimizer's step if the gradient is not finite. With fp16 the scaler skips such
    steps.

    Raises:
        NonFiniteError: says which step it is.
    """
    if trainer.args.fp16 or grad_norm is None or math.isfinite(grad_norm):
        return
    weights = f"The weights are those of step {trainer.state.global_step}"
    if trainer.is_deepspeed_enabled:
        weights = "DeepSpeed has taken this step, so the weights may be spoilt"
    raise NonFiniteError(
        f"The gradient's norm is {float(grad_norm)} in training, step"
        f" {trainer.state.global_step + 1}. {weights}, and saved checkpoints are untouched."
        " Lower learning_rate, or train in float32."
    )


def check_zero_gradient(trainer: Any, means: TokenMeans) -> bool:
    """
    Refuse a step that would train nothing, or warn if a gradient of 0 may be right.

    Args:
        means: over the labelled tokens since the last log.

    Returns:
        Whether the user was warned. Without labelled tokens, or with a loss of 0, a gradient of 0
        is as it should be.

    Raises:
        ConfigurationError: all weights of the gate are 0, or no trainable parameter can change.
    """
    if means.tokens == 0 or means.nll == 0:
        return False
    message = (
        f"The gradient's norm is 0 in training, step {trainer.state.global_step + 1}, so nothing"
        " would be trained. "
    )
    if means.mean_gate == 0:
        raise ConfigurationError(
            f"{message}gate={trainer.args.gate!r} gives weight 0 to each of its {means.tokens}"
            " labelled tokens: choose another gate or other parameters for it, or raise"
            " per_device_train_batch_size."
        )
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    if any(parameter.grad is not None for parameter in trainable.values()):
        message += (
            f"The loss is not 0, and each of the {len(trainable)} trainable parameters has a"
            " gradient of 0: "
        )
        if all(not parameter.any() for parameter in trainable.values()):
            raise ConfigurationError(
                f"{message}they are all 0 (an adapter whose two matrices both are 0 stays so)."
                " Initialise them again."
            )
        # The frozen weights behind an adapter may all be 0, or a layer may saturate
        logger.warning(f"{message}check the model's weights, and which layers are trained.")
        return True
    raise ConfigurationError(
        f"{message}The {len(trainable)} trainable parameters ({next(iter(trainable))}, ...)"
        " have no part in the loss, or a layer between them and the loss has no backward pass:"
        " unfreeze the parameters to be trained."
    )
