"""`eaft train`: its flags and its help."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from eaft.commands.help import Flag, Formatter, add_flags, flags_of, gates_help
from eaft.errors import ConfigurationError
from eaft.text import visible
from eaft.training.flags import DryRunArguments, EAFTFlags

USAGE = "eaft train --model_name_or_path MODEL --dataset_name DATA --output_dir DIR [flags]"
DESCRIPTION = """
Fine-tune a language model with a gate on each token's loss.

  eaft train --model_name_or_path Qwen/Qwen3-0.6B --dataset_name data.jsonl --output_dir out
  eaft train --config recipe.yaml --gate sft --output_dir out-sft
  eaft train --config recipe.yaml --gate eaft-sigmoid --gate_kwargs '{"steepness": 20}'
  eaft train --config recipe.yaml --dry_run
  torchrun --nproc_per_node 8 -m eaft train --config recipe.yaml
  accelerate launch --config_file fsdp2.yaml -m eaft train --config recipe.yaml

It takes every flag of `trl sft`, and the flags of eaft. A flag overrides the same key in the YAML
file. Flags of `accelerate launch` start the training through it.
"""
COMMON = [
    Flag("model_name_or_path", "MODEL", None, "a Hub id, a folder or a .gguf file"),
    Flag(
        "dataset_name",
        "DATA",
        None,
        "a Hub id, a .jsonl, .json, .csv or .parquet file, or a folder",
    ),
    Flag("output_dir", "DIR", None, "where the model, its card, metrics.jsonl and run.json go"),
    Flag("config", "FILE", None, "a YAML file with any of the flags as keys"),
    Flag("learning_rate", "RATE", 2e-05, "the largest learning rate"),
    Flag("num_train_epochs", "N", 3.0, "how often each row is trained on"),
    Flag("per_device_train_batch_size", "N", 8, "rows per process and forward pass"),
    Flag("gradient_accumulation_steps", "N", 1, "forward passes per optimizer step"),
    Flag("max_length", "TOKENS", 1024, "longer rows are cut off"),
    Flag("packing", None, False, "put several rows into one sequence of max_length"),
    Flag("assistant_only_loss", None, False, "train on the assistant's messages only"),
    Flag("use_peft", None, False, "train a LoRA adapter"),
    Flag("lora_r", "R", 16, "rank of the adapter"),
    Flag("save_strategy", "WHEN", "steps", "when checkpoints are written: no, steps or epoch"),
    Flag("eval_strategy", "WHEN", "no", "when the test split is evaluated: no, steps or epoch"),
    Flag("logging_steps", "N", 10, "steps between two lines of metrics.jsonl"),
    Flag("seed", "SEED", 42, "of shuffling, dropout and sampling"),
    Flag("use_cpu", None, False, "train on the CPU"),
    Flag(
        "resume_from_checkpoint",
        "true",
        None,
        "go on with the run in output_dir; or name one of its checkpoints",
    ),
]
MORE = "all flags, and the parameters of each gate: eaft {} --help_all"


def short_help() -> argparse.ArgumentParser:
    """Return the parser of `--help`: our flags, and the flags of TRL that most runs need."""
    parser = argparse.ArgumentParser(
        prog="eaft train",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=f"gates (--gate):\n{gates_help()}\n\n{MORE.format('train')}",
        formatter_class=Formatter,
        add_help=False,
    )
    add_flags(parser, "flags of eaft", flags_of(DryRunArguments) + flags_of(EAFTFlags))
    add_flags(parser, "flags of TRL and transformers that most runs need", COMMON)
    return parser


def make_parser() -> Any:
    """Return the parser of `eaft train`, a `TrlParser`. It imports TRL."""
    from eaft.objective.gate_flags import gates_help
    from eaft.training.arguments import make_parser

    gates = "gates, each with its parameters (docs/gates.md has the formulas):\n"
    return make_parser(usage=USAGE, description=f"{DESCRIPTION}\n{gates}{gates_help()}")


def main(argv: list[str]) -> None:
    """Train, or only plan it with `--dry_run`."""
    if {"-h", "--help"} & set(argv):
        short_help().print_help()
        raise SystemExit(0)
    import torch

    from eaft.training.arguments import launch, parse
    from eaft.training.run_folder import RUN_FILE, run_date
    from eaft.training.train import dry_run, train

    refused = None
    if {"--dry_run", "--dry-run"} & set(argv) and not torch.accelerator.is_available():
        # A plan can be made here for a GPU elsewhere
        try:
            parsed = parse(argv, make_parser())
        except ConfigurationError as error:
            precision = ["--bf16", "true"] if "bf16" in str(error) else []  # as on that GPU
            parsed = parse([*argv, "--use_cpu", "true", *precision], make_parser())
            refused = str(error)
            if "--use_cpu" not in refused:
                refused += " No GPU was found: to train on the CPU, add --use_cpu."
    else:
        parsed = parse(argv, make_parser())
    (*configs, dry), launch_args, train_args = parsed
    if dry.dry_run:
        print(visible(dry_run(configs, launch_args, refused)))
    elif not launch("train", launch_args, train_args):
        args = configs[1]
        resume = str(args.resume_from_checkpoint or "false")
        folder = Path(args.output_dir) if resume.lower() == "true" else Path(resume).parent
        with run_date(args, folder / RUN_FILE if resume.lower() != "false" else None):
            train(*configs)
