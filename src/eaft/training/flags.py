"""
Our own flags of training, with their help, without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from eaft.evaluation.protocol import DRIFT_PROMPTS, PROMPTS
from eaft.training.gate_fields import GateFields

REPLAY_PROMPTS = Path(__file__).with_name("replay_prompts.jsonl")
RULES = {
    "budget": (
        "the last checkpoint whose drift is within --forgetting_budget; training stops when it is"
        " passed"
    ),
    "best-mean": "the best mean over all tasks of both suites, as the paper chooses",
    "pareto": (
        "every checkpoint that no other beats in both target and drift; the model is the one at the"
        " curve's knee"
    ),
}


@dataclass
class EAFTFlags(GateFields):
    """The fields of `EAFTConfig` that are not TRL's; see there."""

    exclude_examples: str | None = field(
        default=None,
        metadata={
            "help": (
                "Rows of the training data to leave out: a file of examples that `eaft view`"
                " exported."
            )
        },
    )

    replay: float = field(
        default=0.0,
        metadata={
            "help": (
                "Mix the base model's own answers to everyday requests into the training data,"
                " against forgetting, as this share of its rows: 0.05 is one in twenty. They are"
                " sampled before training; 0: none."
            )
        },
    )
    replay_loss: str = field(
        default="nll",
        metadata={
            "help": (
                "The loss on replayed answers. nll: as on the data. kl: KL(base || model) at each"
                " position, from the base model's probabilities, kept when the answer was sampled."
            )
        },
    )
    replay_prompts: str = field(
        default=str(REPLAY_PROMPTS),
        metadata={
            "help": (
                "JSON Lines with a `prompt`: the requests that replay answers (default: 64;"
                " drift is measured on others)."
            )
        },
    )

    held_out: str | None = field(
        default=None,
        metadata={
            "help": (
                "A file of rows to evaluate on, in any form that training takes, instead of"
                " --dataset_test_split."
            )
        },
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={
            "help": (
                "Stop once so many evaluations in a row have had no lower nll than the best before;"
                " 0: never. Evaluates where it saves, if eval_strategy is not given."
            )
        },
    )

    template_date: str | None = field(
        default=None,
        metadata={
            "help": (
                "The date in chat templates that write a date, as 2026-11-29 (default: today, or"
                " the date of the resumed run)."
            )
        },
    )

    forgetting_eval_steps: int = field(
        default=0,
        metadata={
            "help": ("Measure drift, forgetting_suite and target_suite every N steps; 0: never.")
        },
    )
    forgetting_suite: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Suites or lm-eval tasks of general ability (default: everyday, 120 easy"
                " questions)."
            )
        },
    )
    target_suite: list[str] | None = field(
        default=None, metadata={"help": "Suites or lm-eval tasks of the ability to be learned."}
    )
    forgetting_data_dir: str | None = field(
        default=None,
        metadata={"help": "A folder with local data for the suites, as `eaft eval --data_dir`."},
    )
    forgetting_prompts: str = field(
        default=str(PROMPTS),
        metadata={
            "help": (
                f"JSON Lines with a `prompt`; drift is measured on answers to {DRIFT_PROMPTS} of"
                " them."
            )
        },
    )
    select_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": (
                "Which checkpoint to keep. "
                + " ".join(f"{name}: {what}." for name, what in RULES.items())
            )
        },
    )
    forgetting_budget: float | None = field(
        default=None,
        metadata={
            "help": "Stop when drift (nats per token) passes this, and keep the last one within."
        },
    )


@dataclass
class DryRunArguments:
    """The flag of `eaft train` that asks for a plan."""

    dry_run: bool = field(
        default=False,
        metadata={
            "help": (
                "Check the recipe, count parameters and tokens, estimate memory and time; train"
                " nothing."
            )
        },
    )
