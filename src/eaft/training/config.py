"""`EAFTConfig`: TRL's `SFTConfig` with a gate, and with measurements while it trains."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging
from trl import SFTConfig

from eaft.errors import ConfigurationError, first_line
from eaft.models import read_date
from eaft.objective.products import slow_bfloat16
from eaft.training.bounds import TRAINING, check_bounds, check_optimizer
from eaft.training.flags import RULES, EAFTFlags
from eaft.training.gate_measurements import MEASURED_PARAMETERS
from eaft.training.trl_internals import get_config_model_id

logger = logging.get_logger(__name__)


@dataclass
class EAFTConfig(EAFTFlags, SFTConfig):
    """
    `SFTConfig` plus the gate.

    One default differs from `SFTConfig`: `bf16` is False on a CPU that multiplies bfloat16 more
    slowly than float32.

    Args:
        gate: how each token's loss is weighted; one of `eaft.objective.registry.GATES`, or
            `module:function`.
        gate_alpha: exponent of the `eaft` gate; 0 is plain SFT, 2 and 3 are the paper's EAFT^2 and
            EAFT^3.
        gate_entropy: `top-k` or `exact`, for the gates that use the entropy.
        gate_top_k: K of the top-K entropy, and of the ln K that entropies are divided by.
        gate_kwargs: the other parameters of the gate, e.g. `{"steepness": 20}` for `eaft-sigmoid`.
        exclude_examples: JSON Lines with the `row` and `digest` of rows of the training data to
            leave out, as `eaft view` exports them. Only `eaft train` reads it; a trainer in your
            own code gets its data as it is.
        replay: share of the training rows that are the base model's own answers to everyday
            requests, mixed in against forgetting (`eaft train` samples them; see
            `eaft.training.replay`).
        replay_loss: the loss on replayed answers: `nll`, as on the data, or `kl`, KL(base || model)
            at each position, without a gate (see `eaft.training.replay_kl`).
        replay_prompts: JSON Lines with a `prompt`: the requests that the base model answers.
        held_out: a file of rows to evaluate on. Only `eaft train` reads it; a trainer in your own
            code takes `eval_dataset`.
        early_stopping_patience: training stops once so many evaluations in a row have had no lower
            nll than the best before (0: never). It needs evaluations: without an `eval_strategy`
            they are made where checkpoints are saved.
        template_date: the date in chat templates that write today's date, as 2026-11-29. `eaft
            train` records it, so that a resumed run has the same date.
        forgetting_eval_steps: measure drift and the suites every N steps (0: never); see
            `eaft.training.forgetting`.
        forgetting_suite: suites or tasks of general ability, as `eaft eval --suite` takes them
            (default: `everyday`; none if the model is sharded).
        target_suite: suites or tasks of the ability that is being learned.
        forgetting_data_dir: a folder with local data for them.
        forgetting_prompts: JSON Lines with a `prompt`. Drift is measured on answers to the first
            128 prompts.
        select_checkpoint: which checkpoint to keep: `budget`, `best-mean` or `pareto`
            (`RULES`).
        forgetting_budget: the drift (nats per token) at which training stops.

    Raises:
        ConfigurationError: unknown gate, a parameter it does not take or refuses, `gate_top_k` < 2,
            a `replay` that is no share, `replay_loss='kl'` without `replay`, `held_out` without
            evaluations, a TRL option with a
            loss of its own (`loss_type`, `label_smoothing_factor`) that no gate would reach, or
            incomplete settings of `select_checkpoint`.
    """

    def __post_init__(self) -> None:
        """Check our fields, then TRL's."""
        check_bounds(self, TRAINING)
        spec = self.gate_spec
        spec.bind(MEASURED_PARAMETERS)
        if self.gate_kwargs is not None:  # JSON is read once
            self.gate_kwargs = dict(spec.kwargs)
        if self.loss_type == "dft":
            raise ConfigurationError(
                "loss_type='dft' does not go with a gate; use gate='dft' instead."
            )
        if self.loss_type not in ("nll", "chunked_nll"):  # TRL's own alias
            raise ConfigurationError(
                f"loss_type={self.loss_type!r} is unknown: a gate weighs the 'nll'. Leave it out."
            )
        if self.label_smoothing_factor:
            raise ConfigurationError(
                "label_smoothing_factor does not go with a gate; leave it at 0."
            )
        if self.replay_loss == "kl" and not self.replay:
            raise ConfigurationError(
                "replay_loss='kl' is the loss on replayed answers, and replay=0 asks for none: set"
                " replay, e.g. to 0.1, or leave replay_loss out."
            )
        given = self.__dict__
        if self.early_stopping_patience and given["eval_strategy"] == "no":
            if given["save_strategy"] not in ("steps", "epoch"):
                raise ConfigurationError(
                    f"early_stopping_patience={self.early_stopping_patience} needs evaluations: set"
                    " eval_strategy to steps or epoch."
                )
            given.update(eval_strategy=given["save_strategy"], eval_steps=given["save_steps"])
        if self.held_out is not None and given["eval_strategy"] == "no":
            raise ConfigurationError(
                f"held_out={self.held_out!r} is never evaluated on: set eval_strategy to steps or"
                " epoch, or early_stopping_patience."
            )
        if self.template_date is not None:
            self.template_date = read_date(str(self.template_date)).isoformat()  # YAML reads a date
        chosen = vars(self)["bf16"] is not None or self.fp16
        if self.use_cpu and not chosen and slow_bfloat16():
            logger.warning_once(
                "bf16=False: this CPU multiplies bfloat16 more slowly than float32 (bf16=True: all"
                " the same)."
            )
            self.bf16 = False
        try:
            with warnings.catch_warnings():
                # The default of TRL's configuration; users cannot change this line
                warnings.filterwarnings("ignore", "`gradient_checkpointing` is dep", FutureWarning)
                super().__post_init__()
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RuntimeError,
            ImportError,
        ) as error:  # of its flags
            if isinstance(error, ConfigurationError):
                raise
            if "use_cpu" in str(error):
                raise ConfigurationError(
                    "use_cpu=False, and no GPU for bf16 was found: to train on the CPU, add"
                    " --use_cpu (in Python: use_cpu=True)."
                ) from error
            raise ConfigurationError(first_line(error)) from error
        check_optimizer(self)
        check_selection(self)

    @property
    def gate_params(self) -> dict[str, Any]:
        """
        The gate's parameters, set or by default, without parameters that are still to be measured.
        """
        return self.gate_spec.params


def check_selection(args: EAFTConfig) -> None:
    """
    Complete and check the settings of `select_checkpoint`.

    Raises:
        ConfigurationError: settings that are missing or do not go together.
    """
    if args.forgetting_budget is not None and args.select_checkpoint is None:
        args.select_checkpoint = "budget"
    rule = args.select_checkpoint
    if rule is None:
        return
    if rule not in RULES:
        raise ConfigurationError(
            f"select_checkpoint={rule!r} is unknown; choose one of {', '.join(RULES)}."
        )
    if args.forgetting_eval_steps < 1:
        raise ConfigurationError(
            f"select_checkpoint={rule!r} needs measurements: set forgetting_eval_steps."
        )
    if (rule == "budget") != (args.forgetting_budget is not None):
        raise ConfigurationError(
            "forgetting_budget goes with select_checkpoint='budget': give both, or neither."
        )
    if rule != "budget" and not args.target_suite:
        raise ConfigurationError(
            f"select_checkpoint={rule!r} weighs target against forgetting: set target_suite."
        )
    if rule == "pareto" and args.save_total_limit is not None:
        raise ConfigurationError(
            "select_checkpoint='pareto' keeps the whole curve: leave save_total_limit out."
        )
    if args.load_best_model_at_end:
        raise ConfigurationError(
            "select_checkpoint and load_best_model_at_end both choose a checkpoint: set one."
        )
    if str(args.save_strategy.value) not in ("steps", "epoch"):
        raise ConfigurationError(
            f"select_checkpoint={rule!r} keeps checkpoints: set save_strategy to steps or epoch."
        )


def eaft_config(args: Any, model: Any) -> EAFTConfig:
    """
    Return `args` as an `EAFTConfig`. Other training arguments are completed with our defaults, as
    TRL does with transformers' arguments.

    Raises:
        ConfigurationError: `args` are no training arguments, or a value does not go with a gate.
    """
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return EAFTConfig(f"{name.split('/')[-1]}-EAFT")
    if isinstance(args, EAFTConfig):
        return args
    if not isinstance(args, TrainingArguments):
        raise ConfigurationError(
            f"args must be an EAFTConfig, or TRL's SFTConfig; got {type(args).__name__}."
        )
    values = args.to_dict()
    # `to_dict` hides these values
    values |= {name: getattr(args, name) for name in values if name.endswith("_token")}
    known = {field.name for field in fields(EAFTConfig)}
    config = EAFTConfig(**{name: value for name, value in values.items() if name in known})
    for name in values.keys() - known:  # fields of a user's own class, for the user's own code
        setattr(config, name, getattr(args, name))
    return config
