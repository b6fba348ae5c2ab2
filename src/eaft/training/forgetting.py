"""
Forgetting while training: drift and scores every N steps, and which checkpoint to keep.

The base model is the model at step 0. Its answers, and its probabilities at their positions, are
kept in `OUTPUT_DIR/forgetting` until training ends, and read from there if training is resumed. If
FSDP or DeepSpeed shards the model, only drift is measured, which needs forward passes only. Then
the first process samples the answers before the model is sharded.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from eaft.errors import ConfigurationError
from eaft.evaluation.asking import ask
from eaft.evaluation.comparable import comparable_models
from eaft.evaluation.drift import Answer, BaseAnswers, Share, read_prompts, sample_answers
from eaft.evaluation.launch import shared
from eaft.evaluation.lm_eval_models import wrap
from eaft.evaluation.protocol import Protocol
from eaft.evaluation.scores import score
from eaft.evaluation.suite import load_suites
from eaft.models import template_today
from eaft.processes import without_launcher
from eaft.training.config import EAFTConfig

FOLDER = "forgetting"
PREFIX = "eval_"  # begins the logged names, so that trackers show them beside `eval_loss`
GENERAL = ["everyday"]  # the default of `forgetting_suite`


class ForgettingEval(TrainerCallback):
    """
    Measures drift, `general` and `target` (mean scores of the suites) before the first step, every
    N steps, and at the end.

    Logs them beside the loss, as `eval_drift`, ...; with `select_checkpoint`, saves the checkpoints
    worth keeping and leaves the trainer with the chosen one's weights.

    Args:
        args: the trainer's arguments. With `select_checkpoint`, `load_best_model_at_end` is set.
        log: `Trainer.log`, or another function that takes the measurements on every process.
        answers: for a model that will be sharded: the result of `answers_before_sharding`.
        wrapped: for a model that will be sharded: returns the model as the trainer wraps it.

    Raises:
        ConfigurationError: a suite or its data is missing, or the first measurement is already over
            budget.
    """

    def __init__(
        self,
        args: EAFTConfig,
        log: Callable[[dict[str, float]], None],
        answers: list[Answer] | None = None,
        wrapped: Callable[[], Any] | None = None,
    ) -> None:
        self.log, self.answers, self.wrapped = log, answers, wrapped
        general = general_suite(args, sharded=answers is not None)
        suites, self.benchmarks = load_suites(
            [*general, *(args.target_suite or [])], data_dir=args.forgetting_data_dir
        )
        self.general = [name for suite in suites[: len(general)] for name in suite.benchmarks]
        self.target = [name for suite in suites[len(general) :] for name in suite.benchmarks]
        self.folder = Path(args.output_dir) / FOLDER
        self.base: BaseAnswers
        if args.select_checkpoint is not None:
            args.load_best_model_at_end = True  # of the step that this callback names

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the base model; in a resumed run, read the record of its beginning."""
        share = Share(PartialState().process_index, PartialState().num_processes)
        kwargs = self.with_wrapped_model(kwargs)
        if state.global_step > 0:
            if args.select_checkpoint == "budget" and (points := history(state)):
                chosen = select(points, "budget", args.forgetting_budget)
                control.should_training_stop = chosen is not None and chosen.step != points[-1].step
            # Otherwise all is measured: the run was stopped while it saved the model
            if state.global_step < state.max_steps and not control.should_training_stop:
                self.base = shared(self.read)
            return
        with measuring(args, **kwargs) as (model, tokenizer):
            answers = self.answers
            if is_deepspeed_zero3_enabled():
                tell_zero3_of_the_head(model.module)
            if answers is None:
                answers = sample(model, tokenizer, args, share)
            self.base = BaseAnswers.record(model, answers, share)
        if state.is_world_process_zero:
            staging = self.folder.with_name(f"{FOLDER}.tmp")
            for folder in (staging, self.folder):
                shutil.rmtree(folder, ignore_errors=True)
            staging.mkdir(parents=True)
            self.base.save(staging)
            staging.rename(self.folder)
        self.measure(args, state, control, **kwargs)

    def with_wrapped_model(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a callback, with the model as DeepSpeed or FSDP wraps it."""
        return kwargs if self.wrapped is None else {**kwargs, "model": self.wrapped()}

    def read(self) -> BaseAnswers:
        """
        Return the record of the base model from the beginning of this run.

        Raises:
            ConfigurationError: the record no longer exists.
        """
        if not self.folder.is_dir():
            raise ConfigurationError(
                f"{self.folder} is missing: it holds the base model's probabilities, which a"
                " checkpoint no longer has. Copy it from the run's output folder, or start afresh."
            )
        return BaseAnswers.load(self.folder)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, and decide which checkpoint to keep."""
        if state.global_step % args.forgetting_eval_steps and state.global_step < state.max_steps:
            return
        self.measure(args, state, control, **kwargs)
        if args.select_checkpoint is None:
            return
        points = history(state)
        chosen = select(points, args.select_checkpoint, args.forgetting_budget)
        if chosen is None:
            raise ConfigurationError(
                f"forgetting_budget={args.forgetting_budget} was passed before the first"
                f" measurement (drift {points[-1].drift:.4f} at step {state.global_step}): lower"
                " forgetting_eval_steps or learning_rate."
            )
        if args.select_checkpoint == "budget" and chosen.step != state.global_step:
            control.should_training_stop = True
        control.should_save |= (
            chosen.step == state.global_step or args.select_checkpoint == "pareto"
        )
        state.best_global_step = chosen.step
        # Trainer sets this path when it saves. It must also be known at the end without a save now
        state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{chosen.step}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """
        Under `pareto`, delete measured checkpoints that another checkpoint beats. The newest stays,
        for a resumption.
        """
        if args.select_checkpoint == "pareto" and state.is_world_process_zero:
            _, *trained = history(state)
            kept = {point.step for point in pareto_front(trained)} | {state.global_step}
            for point in trained:
                if point.step not in kept:
                    shutil.rmtree(
                        Path(args.output_dir) / f"checkpoint-{point.step}", ignore_errors=True
                    )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Free the disk."""
        if state.is_world_process_zero:
            shutil.rmtree(self.folder, ignore_errors=True)

    def measure(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the current model, and log the measurements."""
        kwargs = self.with_wrapped_model(kwargs)
        with measuring(args, **kwargs) as (model, tokenizer):
            protocol = protocol_of(args, tokenizer)
            items = {}
            if self.benchmarks:
                lm = wrap(model, tokenizer, protocol)
                items = {
                    name: score(lm, benchmark, protocol)
                    for name, benchmark in self.benchmarks.items()
                }
            sums, counts = self.base.drift(
                model, Share(PartialState().process_index, PartialState().num_processes)
            )
            metrics: dict[str, float] = {}
            if state.is_world_process_zero:
                scores = {
                    name: float(np.mean([item.score for item in answered]))
                    for name, answered in items.items()
                }
                metrics["drift"] = float(sums.sum() / counts.sum())
                for kind, names in (("general", self.general), ("target", self.target)):
                    if names:
                        metrics[kind] = float(np.mean([scores[name] for name in names]))
                metrics.update({f"score/{name}": value for name, value in scores.items()})
            metrics = shared(lambda: {f"{PREFIX}{name}": value for name, value in metrics.items()})
            should_log = control.should_log
            self.log(metrics)  # still in evaluation mode: the training metrics' sums are left alone
            control.should_log = should_log  # any log resets it, also if training metrics are due


def general_suite(args: EAFTConfig, sharded: bool) -> list[str]:
    """
    Return the suites and tasks of general ability that are measured.

    Raises:
        ConfigurationError: suites for a sharded model, because the ranks would make different
            numbers of forward passes.
    """
    if sharded and (args.forgetting_suite or args.target_suite):
        raise ConfigurationError(
            "forgetting_suite and target_suite need the whole model on each process: with FSDP or"
            " DeepSpeed only drift is measured while training. Leave them out, save checkpoints,"
            " and run `eaft eval` on them."
        )
    return [] if sharded else GENERAL if args.forgetting_suite is None else args.forgetting_suite


def protocol_of(args: EAFTConfig, tokenizer: Any) -> Protocol:
    """Return the protocol for the model in training: the defaults of `eaft eval`."""
    return Protocol(
        apply_chat_template=tokenizer.chat_template is not None,
        batch_size=args.per_device_eval_batch_size,
    )


def sample(model: Any, tokenizer: Any, args: EAFTConfig, share: Share) -> list[Answer]:
    """Sample the base model's answers to `forgetting_prompts`."""
    protocol = protocol_of(args, tokenizer)
    prompts = read_prompts(args.forgetting_prompts, protocol.drift_prompts)
    return sample_answers(
        model,
        tokenizer,
        [ask(tokenizer, prompt, protocol) for prompt in prompts],
        protocol.max_new_tokens,
        add_special_tokens=not protocol.apply_chat_template,
        batch_size=protocol.answer_batch,
        share=share,
    )


def answers_before_sharding(model: Any, tokenizer: Any, args: EAFTConfig) -> list[Answer]:
    """
    Return the base model's answers for a model that will be sharded and then cannot generate.

    They are the answers that `eaft eval MODEL --record` has kept. If there are none, that command
    runs now, in one more process.

    Raises:
        ConfigurationError: the model is not given by its name, or does not fit on the device.
    """
    if not isinstance(model, str):
        raise ConfigurationError(
            "forgetting_eval_steps: before FSDP or DeepSpeed shards a model, its answers are"
            " sampled from the whole one: give the model by its name or folder."
        )
    answers = None
    if PartialState().is_main_process:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            base, _ = comparable_models(
                model, None, protocol_of(args, tokenizer), drift=True, tokenizer=folder
            )
            prompts = read_prompts(args.forgetting_prompts, base.protocol.drift_prompts)
            if base.find_sampled(prompts) is None:
                flags = ["--tokenizer", folder, "--prompts", args.forgetting_prompts]
                flags += [
                    "--batch_size",
                    str(base.protocol.batch_size),
                    "--template_date",
                    template_today(),
                ]
                command = [sys.executable, "-m", "eaft", "eval", model, "--record", *flags]
                subprocess.run(command, env=without_launcher())
            answers = base.find_sampled(prompts)
    if (answers := shared(lambda: answers)) is None:
        day = (
            f" --template_date {template_today()}"
            if "strftime_now" in str(tokenizer.chat_template)
            else ""
        )
        raise ConfigurationError(
            f"forgetting_eval_steps: the answers of {model} could not be sampled (see above). If"
            f" it is too large for one device, run eaft eval {model} --record --model_args"
            f" '{{\"parallelize\": true}}'{day}, and start again{day and f' with{day}'}."
        )
    return answers


def tell_zero3_of_the_head(model: Any) -> None:
    """
    Register the parameters of the head, which the gated head uses outside of the head's module,
    before any forward pass.

    ZeRO-3 records the order in which a pass fetches parameters. The gated head would add the head's
    parameters later, and the order recorded while measuring would be wrong.
    """
    from deepspeed.runtime.zero import register_external_parameter

    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    for parameter in model.get_output_embeddings().parameters():
        register_external_parameter(model, parameter)


@contextlib.contextmanager
def measuring(
    args: Any, model: Any, processing_class: Any, **kwargs: Any
) -> Iterator[tuple[Any, Any]]:
    """
    Give the model in evaluation mode, and a tokenizer. Afterwards the model's mode and the random
    number generators are as before.
    """
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


@dataclass(frozen=True)
class ForgettingPoint:
    """
    What was measured at one step.

    Attributes:
        step: 0 for the base model.
        drift: nats per token.
        target: the mean score of the target suites; NaN without any.
        scores: by task.
    """

    step: int
    drift: float
    target: float
    scores: dict[str, float]


def history(state: Any) -> list[ForgettingPoint]:
    """Return the measurements so far, one per step, base model first; also after a resumption."""
    logs = {log["step"]: log for log in state.log_history if f"{PREFIX}drift" in log}
    score = f"{PREFIX}score/"
    return [
        ForgettingPoint(
            step,
            drift=log[f"{PREFIX}drift"],
            target=log.get(f"{PREFIX}target", math.nan),
            scores={k.removeprefix(score): v for k, v in log.items() if k.startswith(score)},
        )
        for step, log in sorted(logs.items())
    ]


def select(
    points: list[ForgettingPoint], rule: str, budget: float | None
) -> ForgettingPoint | None:
    """
    Return the measurement of the checkpoint to keep, by one of `eaft.training.config.RULES`; None
    if no checkpoint is within the budget.

    Args:
        points: as `history` returns them; the first is the base model, which is never chosen.
    """
    base, *trained = points
    if rule == "budget":
        assert budget is not None
        over = next((i for i, point in enumerate(trained) if point.drift > budget), len(trained))
        return trained[over - 1] if over else None
    if rule == "best-mean":
        return max(trained, key=mean_score)
    # The knee (Satopaa et al. 2011): the largest difference between gain and drift, each as a share
    # of its largest value
    front = pareto_front(trained)
    gain = max(max(point.target for point in front) - base.target, 1e-12)
    drift = max(max(point.drift for point in front), 1e-12)
    return max(front, key=lambda point: (point.target - base.target) / gain - point.drift / drift)


def mean_score(point: ForgettingPoint) -> float:
    """Return the mean score over all measured tasks."""
    return sum(point.scores.values()) / len(point.scores)


def pareto_front(points: list[ForgettingPoint]) -> list[ForgettingPoint]:
    """
    Return the points that no other point beats. A point beats another if its target is at least as
    high and its drift at least as low, and not both are equal.
    """

    def beats(a: ForgettingPoint, b: ForgettingPoint) -> bool:
        as_good = a.target >= b.target and a.drift <= b.drift
        return as_good and (a.target, a.drift) != (b.target, b.drift)

    return [point for point in points if not any(beats(other, point) for other in points)]
