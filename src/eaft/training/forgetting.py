"""
While it trains: how far the model has drifted and what it has lost, every N steps, and which checkpoint to keep.

The base model is the model at step 0. Its answers and its probabilities at their positions are kept in
`OUTPUT_DIR/forgetting` until training ends, and read from there when it is resumed. Where FSDP or DeepSpeed shards the
model only drift is measured, which takes forward passes alone: the answers are sampled before, by the first process.
"""

from __future__ import annotations

import contextlib
import copy
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from eaft.errors import ConfigurationError
from eaft.evaluation.drift import ANSWER_TOKENS, DRIFT_PROMPTS, Answer, BaseAnswers, Share, read_prompts, sample_answers
from eaft.evaluation.evaluate import context_length, side_by_side
from eaft.evaluation.scores import Protocol, ask, score, wrap
from eaft.evaluation.suite import load_suites
from eaft.training.config import EAFTConfig

FOLDER = "forgetting"
GENERAL = ["everyday"]  # what is measured where `forgetting_suite` names nothing


class ForgettingEval(TrainerCallback):
    """
    Measures drift, `general` and `target` (mean scores of the suites) before the first step, every N steps, and at
    the end.

    Logs them beside the loss; with `select_checkpoint`, saves the checkpoints worth keeping and leaves the trainer with
    the chosen one's weights.

    Args:
        args: the trainer's; with `select_checkpoint`, they are told to load the best model at the end.
        log: `Trainer.log`, or what else takes the measurements on every process.

    Raises:
        ConfigurationError: a suite or its data is missing, or the first measurement is already over budget.
    """

    def __init__(self, args: EAFTConfig, log: Callable[[dict[str, float]], None]) -> None:
        self.log = log
        names = [*args.forgetting_suite, *(args.target_suite or [])]
        suites, self.benchmarks = load_suites(names, data_dir=args.forgetting_data_dir)
        self.general = [name for suite in suites[: len(args.forgetting_suite)] for name in suite.benchmarks]
        self.target = [name for suite in suites[len(args.forgetting_suite) :] for name in suite.benchmarks]
        self.prompts = read_prompts(args.forgetting_prompts, PROMPTS)
        self.answers = BaseAnswers(Path(args.output_dir) / FOLDER)
        if args.select_checkpoint is not None:
            args.load_best_model_at_end = True  # of the step that this callback names

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the base model, or find what was recorded when this run began."""
        if state.global_step > 0:
            if not self.answers.recorded:
                raise ConfigurationError(
                    f"{self.answers.log_probs} is missing: it holds the base model's probabilities, which a checkpoint "
                    "no longer has. Copy it from the run's output folder, or start afresh."
                )
            return
        with measuring(args, **kwargs) as (model, tokenizer):
            if state.is_world_process_zero:
                shutil.rmtree(self.answers.folder, ignore_errors=True)
                self.answers.record(model, tokenizer, self.prompts, ANSWER_TOKENS, args.per_device_eval_batch_size)
        self.measure(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, and decide what to keep."""
        if state.global_step % args.forgetting_eval_steps and state.global_step < state.max_steps:
            return
        self.measure(args, state, control, **kwargs)
        if args.select_checkpoint is None:
            return
        points = history(state)
        chosen = select(points, args.select_checkpoint, args.forgetting_budget)
        if chosen is None:
            raise ConfigurationError(
                f"forgetting_budget={args.forgetting_budget} was passed before the first measurement (drift "
                f"{points[-1]['drift']:.4f} at step {state.global_step}): lower forgetting_eval_steps or learning_rate."
            )
        if args.select_checkpoint == "budget" and chosen["step"] != state.global_step:
            control.should_training_stop = True
        control.should_save |= chosen["step"] == state.global_step or args.select_checkpoint == "pareto"
        state.best_global_step = chosen["step"]
        # Trainer notes the path when it saves; nothing need be saved now for it to be known at the end
        state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{chosen['step']}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Under `pareto`, delete the measured checkpoints that another beats; the newest stays, to resume from."""
        if args.select_checkpoint == "pareto" and state.is_world_process_zero:
            _, *trained = history(state)
            kept = {point["step"] for point in pareto_front(trained)} | {state.global_step}
            for point in trained:
                if point["step"] not in kept:
                    shutil.rmtree(Path(args.output_dir) / f"checkpoint-{point['step']}", ignore_errors=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Free the disk."""
        if state.is_world_process_zero:
            self.answers.free()

    def measure(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the model as it is, and log it."""
        with measuring(args, **kwargs) as (model, tokenizer):
            lm = wrap(model, tokenizer, args.per_device_eval_batch_size)
            items = score(lm, self.benchmarks, apply_chat_template=tokenizer.chat_template is not None)
            metrics: list[dict[str, float]] = [{}]
            if state.is_world_process_zero:
                scores = {name: float(np.mean([item["score"] for item in found])) for name, found in items.items()}
                metrics = [{"drift": self.answers.drift(model)["mean"]}]
                for kind, names in (("general", self.general), ("target", self.target)):
                    if names:
                        metrics[0][kind] = float(np.mean([scores[name] for name in names]))
                metrics[0].update({f"score/{name}": value for name, value in scores.items()})
            if args.world_size > 1:
                broadcast_object_list(metrics)
            should_log = control.should_log
            self.log(metrics[0])  # still in evaluation mode: the training metrics' sums are left alone
            control.should_log = should_log  # whether the training metrics are due, which logging anything takes back


@contextlib.contextmanager
def measuring(args: Any, model: Any, processing_class: Any, **kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """Lend the model, in evaluation mode, and a tokenizer; the randomness of training is as if nothing had been."""
    tokenizer = copy.deepcopy(processing_class)
    tokenizer.padding_side = "left"
    devices = [args.device] if args.device.type == "cuda" else []
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - lm-eval seeds this one
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield model, tokenizer
    finally:
        model.train(was_training)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        PartialState().wait_for_everyone()


def history(state: Any) -> list[dict[str, float]]:
    """Return the measurements so far, one a step, base model first; they survive a resumption."""
    points = {log["step"]: log for log in state.log_history if "drift" in log}
    return [points[step] for step in sorted(points)]


def select(points: list[dict[str, float]], rule: str, budget: float | None) -> dict[str, float] | None:
    """
    Return the measurement whose checkpoint is to be kept, by one of `eaft.training.config.RULES`; None
    if none is within the budget.

    Args:
        points: as `history` returns them; the first is the base model, which is never chosen.
    """
    base, *trained = points
    if rule == "budget":
        assert budget is not None
        over = next((i for i, point in enumerate(trained) if point["drift"] > budget), len(trained))
        return trained[over - 1] if over else None
    if rule == "best-mean":
        return max(trained, key=mean_score)
    # The knee (Satopaa et al. 2011): where the gain, as a share of the largest, is furthest ahead of the drift
    front = pareto_front(trained)
    gain = max(max(point["target"] for point in front) - base["target"], 1e-12)
    drift = max(max(point["drift"] for point in front), 1e-12)
    return max(front, key=lambda point: (point["target"] - base["target"]) / gain - point["drift"] / drift)


def mean_score(point: dict[str, float]) -> float:
    """Return the mean over all tasks measured."""
    scores = [value for name, value in point.items() if name.startswith("score/")]
    return sum(scores) / len(scores)


def pareto_front(points: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the points that no other beats: a target at least as high, a drift at least as low, not both equal."""

    def beats(a: dict[str, float], b: dict[str, float]) -> bool:
        as_good = a["target"] >= b["target"] and a["drift"] <= b["drift"]
        return as_good and (a["target"], a["drift"]) != (b["target"], b["drift"])

    return [point for point in points if not any(beats(other, point) for other in points)]
