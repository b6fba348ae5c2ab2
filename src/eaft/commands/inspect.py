"""`eaft inspect`: its flags and its help."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from eaft.commands.help import Flag, Formatter, add_flags, flags_of
from eaft.commands.train import COMMON, MORE
from eaft.errors import ConfigurationError
from eaft.inspection.flags import InspectArguments
from eaft.training.flags import EAFTFlags

USAGE = "eaft inspect MODEL DATA [--rollouts N] [--compare OTHER ...] [flags of eaft train]"
DESCRIPTION = """
Score data through a model, token by token, and say which tokens the model fights.

  eaft inspect MODEL DATA
  eaft inspect MODEL DATA --all                   every row, however many there are
  eaft inspect MODEL DATA --max_length 2048 --assistant_only_loss
  eaft inspect MODEL DATA --rollouts 64           also the model's own answers to 64 of the prompts
  eaft inspect MODEL DATA --compare runs/sft      also each checkpoint of a training run
  eaft inspect --config recipe.yaml               the data and model of a recipe of `eaft train`
  accelerate launch -m eaft inspect MODEL DATA
  eaft inspect MODEL DATA --all --ray_actors 16   every row, on a Ray cluster with 16 GPUs

MODEL is a Hub id, a folder (also of a PEFT adapter) or a .gguf file. DATA is a Hub id, a .jsonl,
.json, .csv or .parquet file, or a folder. The data is scored as training would see it before its
first step: every flag of `eaft train` is taken, and packing is off.

Of more than 256 rows, rows are scored in random order, until the 95% interval of the share of the
nll in conflicts is at most 4 percentage points wide (at least 128 rows, at most 4,096). The report
says how many were scored. --all scores every row: rare faults and --exclude_examples need it.

The report says how much of the data fights the model and which tokens, what each gate would do to
it, and whether the data is what you think it is. The folder has summary.json, report.html,
figures/*.png, and the statistics of every token as Parquet. `eaft view` shows it. The folder is
--output_dir; the output_dir of a recipe is not used, because it is the training's.

Give the same command again to go on after an interruption, or with --compare to add a model. For
--rollouts, the prompt of a row is its tokens before the first labelled token.
"""
OUTPUT_DIR = "inspection"
# `accelerate launch` asks for shards of the model by these. Here each process has the whole model
SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG")
OURS = ("gate_top_k", "exclude_examples", "template_date")
TRAINS = ("config", "max_length", "assistant_only_loss", "seed", "use_cpu")


def short_help() -> argparse.ArgumentParser:
    """Return the parser of `--help`: our flags, and the flags of `eaft train` that matter here."""
    parser = argparse.ArgumentParser(
        prog="eaft inspect",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=MORE.format("inspect"),
        formatter_class=Formatter,
        add_help=False,
    )
    output_dir = Flag("output_dir", "DIR", OUTPUT_DIR, "where the results go")
    add_flags(parser, "flags of eaft inspect", [output_dir, *flags_of(InspectArguments)])
    shared = [flag for flag in COMMON if flag.name in TRAINS]
    add_flags(parser, "flags of eaft train that matter here", flags_of(EAFTFlags, *OURS) + shared)
    return parser


def make_parser() -> Any:
    """Return the parser of `eaft inspect`, a `TrlParser`. It imports TRL."""
    from eaft.training.arguments import make_parser

    return make_parser(InspectArguments, prog="eaft inspect", usage=USAGE, description=DESCRIPTION)


def main(argv: list[str]) -> None:
    """Inspect; a recipe's settings for `accelerate launch` are not used."""
    if {"-h", "--help"} & set(argv):
        short_help().print_help()
        raise SystemExit(0)
    from eaft.inspection.inspect import check_packages, inspect
    from eaft.training.arguments import launch, parse
    from eaft.training.run_folder import RUN_FILE, run_date

    check_packages()
    for name in SHARDING:
        os.environ.pop(name, None)
    configs, launch_args, inspect_args = parse(named(argv), make_parser(), recipe_launches=False)
    # With Ray one process hands out the work
    if configs[-1].ray_actors or not launch("inspect", launch_args, inspect_args):
        with run_date(configs[1], Path(configs[1].output_dir) / RUN_FILE):
            inspect(*configs)


def named(argv: list[str]) -> list[str]:
    """
    Return the flags with names for MODEL and DATA, with one `--compare`, and with values for flags
    that a recipe must not set.
    """
    import torch

    flags = ["--model_name_or_path", "--dataset_name"]
    unnamed = 0
    while unnamed < min(len(flags), len(argv)) and not argv[unnamed].startswith("-"):
        unnamed += 1
    argv, rest = (
        [part for pair in zip(flags, argv[:unnamed], strict=False) for part in pair],
        argv[unnamed:],
    )
    if twice := [flag for flag in argv[::2] if flag in (part.partition("=")[0] for part in rest)]:
        raise ConfigurationError(
            f"{twice[0]} is given twice: at the beginning, where it needs no flag, and as a flag."
        )
    others: list[str] = []
    while rest:
        part, *rest = rest
        if part.partition("=")[0] != "--compare":
            argv.append(part)
            continue
        others += [part.partition("=")[2]] if "=" in part else []
        while rest and not rest[0].startswith("-"):
            others.append(rest.pop(0))
    argv += ["--compare", *others] if others else []
    names = {part.partition("=")[0].replace("-", "_") for part in argv if part.startswith("--")}
    if "__output_dir" not in names:
        argv += ["--output_dir", OUTPUT_DIR]
    if "__use_cpu" not in names and not torch.accelerator.is_available():
        argv += ["--use_cpu", "true"]  # else bf16 is refused here
    return argv
