"""
The bounds of numeric flags: TRL and transformers check few of them before they train.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from datetime import date
from typing import Annotated, Any, Literal, get_type_hints

import torch
from pydantic import AfterValidator, Field, StrictInt
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, get_scheduler

from eaft.errors import ConfigurationError, first_line
from eaft.files import Count, Finite, FiniteNotNegative, NotNegative, Positive, Seed, Share, check


def steps(value: int) -> int:
    """Refuse 0, which transformers reads as no limit, and numbers below -1."""
    if value != -1 and value < 1:
        raise ValueError("expected at least 1, or -1 for as many as num_train_epochs gives")
    return value


TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": Count,
    "per_device_eval_batch_size": Count,
    "gradient_accumulation_steps": Count,
    "num_train_epochs": Positive,
    "max_steps": Annotated[StrictInt, AfterValidator(steps)],
    "learning_rate": FiniteNotNegative,
    "warmup_steps": FiniteNotNegative,
    "weight_decay": FiniteNotNegative,
    "adam_beta1": Share,
    "adam_beta2": Share,
    "adam_epsilon": Positive,
    "max_grad_norm": FiniteNotNegative | None,
    "label_smoothing_factor": Share,
    "neftune_noise_alpha": FiniteNotNegative | None,
    "torch_empty_cache_steps": Count | None,
    "logging_steps": FiniteNotNegative,
    "eval_steps": FiniteNotNegative | None,
    "eval_delay": FiniteNotNegative,
    "eval_accumulation_steps": Count | None,
    "save_steps": Positive,
    "save_total_limit": Count | None,
    "seed": Seed,
    "data_seed": Seed | None,
    "dataloader_num_workers": NotNegative,
    "dataloader_prefetch_factor": Count | None,
    "ddp_bucket_cap_mb": Count | None,
    "ddp_timeout": Count,
    "dataset_num_proc": Count | None,
    "max_length": Count | None,
    "router_aux_loss_coef": FiniteNotNegative | None,
    "gate_alpha": Finite,
    "gate_top_k": StrictInt,
    "replay": Share,
    "replay_loss": Literal["nll", "kl"],
    "early_stopping_patience": NotNegative,
    "forgetting_eval_steps": NotNegative,
    "forgetting_budget": FiniteNotNegative | None,
}
MODEL: dict[str, Any] = {
    "dtype": Literal["auto", "bfloat16", "float16", "float32"] | None,
    "lora_r": Count,
    "lora_alpha": Count,
    "lora_dropout": Share,
}
MIXTURE: dict[str, Any] = {"test_split_size": Annotated[Finite, Field(gt=0, lt=1)] | None}
# Flags that take text; YAML may read their value as true, false or a date
ALSO = {"resume_from_checkpoint": bool, "fsdp": bool, "template_date": date}


def check_bounds(args: Any, bounds: dict[str, Any]) -> None:
    """
    Check the numbers of a dataclass of flags.

    Raises:
        ConfigurationError: names the first flag that is outside its bounds, or NaN.
    """
    for name, kind in bounds.items():
        try:
            check(kind, getattr(args, name), "")
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{name}={getattr(args, name)!r}: {str(error).partition(', got ')[0]}."
            ) from error


# Optimizers for which transformers silently ignores parts of `optim_args` that it does not know
READ_BY_NAME = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
STEPS = 1000  # the length of a run, where it is not known yet


def check_optimizer(args: Any) -> None:
    """
    Check `optim`, `optim_args` and the learning rate's schedule on one parameter, before a model
    is loaded.

    Raises:
        ConfigurationError: the optimizer or the schedule cannot be made, the optimizer ignores a
            part of `optim_args`, or the rate of a step is negative or not finite.
    """
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = args.optim.value
    where = f"optim={optimizer!r} with optim_args={args.optim_args!r}"
    try:
        make, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        make([parameter], **settings)
        if any(isinstance(v, float) and not math.isfinite(v) for v in settings.values()):
            raise ValueError("expected finite numbers")
        parts = (args.optim_args or "").replace(" ", "").split(",")
        for part in parts if args.optim_args and optimizer in READ_BY_NAME else []:
            without = copy.copy(args)
            without.optim_args = ",".join(other for other in parts if other != part) or None
            if Trainer.get_optimizer_cls_and_kwargs(without)[1] == settings:
                raise ValueError(
                    f"this optimizer does not read {part!r}; adam_beta1, adam_beta2, adam_epsilon,"
                    " weight_decay and learning_rate are flags of their own"
                )
    except AttributeError:  # made from the model's modules
        pass
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigurationError(f"{where}: {first_line(error)}.") from error

    where = f"lr_scheduler_kwargs={args.lr_scheduler_kwargs!r}"
    if not isinstance(args.lr_scheduler_kwargs, dict | None):
        raise ConfigurationError(f"{where}: expected a map of names to values.")
    count = args.max_steps if args.max_steps > 0 else STEPS
    for name, value in (args.lr_scheduler_kwargs or {}).items():
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise ConfigurationError(f"{where}: {name}: expected a finite number of at least 0.")
    try:
        schedule = get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([parameter], lr=args.learning_rate),
            args.get_warmup_steps(count),
            count,
            copy.copy(args.lr_scheduler_kwargs) or {},
        )
        factors = schedule.lr_lambdas if isinstance(schedule, LambdaLR) else []
        rates = [args.learning_rate * f(step) for f in factors for step in range(count)]
    except (ImportError, ValueError, TypeError, AssertionError, ArithmeticError) as error:
        raise ConfigurationError(
            f"{where} with lr_scheduler_type={args.lr_scheduler_type.value!r}: {first_line(error)}."
        ) from error
    if any(not math.isfinite(rate) or rate < 0 for rate in rates):
        step = next(i for i, rate in enumerate(rates) if not math.isfinite(rate) or rate < 0)
        raise ConfigurationError(
            f"{where}: the learning rate of step {step + 1} would be {rates[step]}."
        )


@functools.cache
def types(parser_class: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields."""
    hints = get_type_hints(parser_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(parser_class)}


def check_types(content: dict[str, Any], dataclass_types: list[Any], where: str) -> None:
    """
    Check the types of flags in a YAML file, because argparse only checks texts.

    Args:
        content: the flags by their names.
        dataclass_types: the dataclasses of the flags. A name that is a field of none is not
            checked.
        where: names the file; begins the message.

    Raises:
        ConfigurationError: the first value that is not of its field's type.
    """
    for kinds in map(types, dataclass_types):
        for name in content.keys() & kinds.keys():
            value = content[name]
            # argparse also gets texts from the command line, and a list of one value may be a text
            if isinstance(value, (str, ALSO.get(name, str))):
                continue
            try:
                check(kinds[name], value, "")
            except ConfigurationError as error:
                hint = " (YAML reads yes, no, on and off as true and false: put them in quotes)"
                raise ConfigurationError(
                    f"{where}: {name}={value!r}:"
                    f" {str(error).partition(', got ')[0]}{hint * isinstance(value, bool)}."
                ) from error
