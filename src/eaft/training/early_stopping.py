"""Early stopping: end training once the nll of the evaluation's rows no longer falls."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

NLL = "eval_nll"


class EarlyStopping(TrainerCallback):
    """
    Stops training once so many evaluations in a row have had no lower nll than the best before.

    transformers' `EarlyStoppingCallback` counts afresh in a resumed run. This one counts in the
    trainer's log, which every checkpoint holds, so a resumed run stops where it would have.

    Args:
        patience: how many evaluations.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop a run that was killed after the checkpoint that ended it."""
        control.should_training_stop |= stopped_after(state, self.patience) is not None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop, if this evaluation was the last that was waited for."""
        control.should_training_stop |= stopped_after(state, self.patience) is not None


def stopped_after(state: Any, patience: int) -> int | None:
    """
    Return the step of the lowest nll if `patience` evaluations or more have followed it; None if
    training is to go on.
    """
    found = {log["step"]: log[NLL] for log in state.log_history if NLL in log}
    if not found:
        return None
    best = min(found, key=lambda step: (found[step], step))
    later = sum(step > best for step in found)
    return best if later >= patience else None


def stopped_early(state: Any, patience: int) -> str | None:
    """
    Return why training ended before its last step, as a sentence; None if it did not, or for
    another reason.

    Args:
        patience: as it was set; 0 if training was not to stop early.
    """
    best = stopped_after(state, patience) if patience else None
    if best is None or state.global_step >= state.max_steps:
        return None
    return (
        f"Training stopped early, after {state.global_step:,} of {state.max_steps:,} steps: the"
        f" held-out nll was lowest at step {best:,} (early_stopping_patience={patience})."
    )
