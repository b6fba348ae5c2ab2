"""`eaft compare`: its flags, and its help with an example of a recipe."""

from __future__ import annotations

import argparse

from eaft.commands.help import gates_help
from eaft.evaluation.suite import suites_help

DESCRIPTION = """
Train with several objectives from one base model, and show what each gained and forgot.

  eaft compare --config recipe.yaml
  eaft compare --config recipe.yaml --objectives sft eaft --seeds 0 --output_dir runs/first-look
  eaft compare --config recipe.yaml --jobs 2

All objectives have the same data and seeds. Drift and held-out nll are measured on the base model
and on every checkpoint. If there are tasks, they are run on the checkpoint that each objective
chooses, and on the last. Writes results.md, which begins with what to do, results.json, pareto.png,
curves.png and fronts.png.

The recipe (YAML):

  output_dir: runs/mine
  seeds: [0, 1, 2]
  objectives:                      # a name, and the flags of `eaft train` in which it differs
    sft: {gate: sft}
    eaft: {gate: eaft}
    sigmoid: {gate: eaft-sigmoid, gate_kwargs: {steepness: 20}}
  train:                           # flags of `eaft train` that all share
    model_name_or_path: Qwen/Qwen3-0.6B
    dataset_name: data.jsonl       # a name with {seed} gives each seed its own: data-{seed}.jsonl
    num_train_epochs: 4
    save_strategy: epoch           # every checkpoint is measured
  evaluate:
    # held_out or target_tasks says what is learned. Everything else is optional. Optional too:
    # include_path, data_dir, limit, and how models are asked, as in `eaft eval`: num_fewshot,
    # apply_chat_template, enable_thinking, backend, ...
    held_out: held_out.jsonl       # rows in any form that training takes, not trained on: the
                                   # lowest nll on them chooses learning rate and checkpoint for
                                   # each objective and seed (default: the last checkpoint)
    interpolations: [0.25, 0.5, 0.75] # also measure base + share * (checkpoint - base), which needs
                                   # no training (default: none; each costs as much as measuring a
                                   # checkpoint): the fronts with and without it are compared
    target_tasks: [math]           # suites, or lm-eval tasks; your own tasks from include_path
    general_tasks: [general]
    every_checkpoint_tasks: []     # the target_tasks to run on every checkpoint: a target to match
                                   # beside the nll
    target_prompts: test.jsonl     # rows with a `prompt` or `messages`, and perhaps `tools`: drift
                                   # is also measured on the base model's answers to them
    general_prompts: prompts.jsonl # (default: everyday requests)
  learning_rates: [1.0e-5, 3.0e-5] # each objective at each (default: the one in train)
  pairs: [[eaft, sft]]             # what is compared with what (default: each objective with sft)
  keep_checkpoints: all            # chosen: delete the weights of the others once they are measured

Give the same command again to go on after an interruption: finished runs are reused, others are
resumed. If a run fails, the others go on. Exit code: 0; 1 if a run or a task failed and the
others were compared; 2 if the command is wrong or nothing could be compared.
"""


def main(argv: list[str]) -> int:
    """Read the recipe and the flags that override it, check both, and compare."""
    gates = f"gates (their parameters: eaft train --help_all):\n{gates_help()}"
    parser = argparse.ArgumentParser(
        prog="eaft compare",
        description=f"{DESCRIPTION}\nsuites:\n{suites_help()}\n\n{gates}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the recipe")
    parser.add_argument("--output_dir", metavar="DIR", help="overrides the recipe's")
    parser.add_argument("--model_name_or_path", metavar="MODEL", help="overrides the recipe's")
    parser.add_argument("--dataset_name", metavar="DATA", help="overrides the recipe's")
    parser.add_argument("--held_out", metavar="FILE", help="overrides the recipe's")
    parser.add_argument(
        "--objectives", nargs="+", metavar="NAME", help="only these of the recipe's"
    )
    parser.add_argument(
        "--learning_rates", type=float, nargs="+", metavar="RATE", help="overrides the recipe's"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED", help="overrides the recipe's"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help=(
            "train and measure so many runs at a time, each with its share of the cores (default:"
            " 1); they share the GPU, if there is one"
        ),
    )
    flags = vars(parser.parse_args(argv))
    jobs = flags.pop("jobs")
    from eaft.comparison.compare import compare
    from eaft.comparison.recipe import read_recipe

    return 1 if compare(read_recipe(flags.pop("config"), flags), jobs) else 0
