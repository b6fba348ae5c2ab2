"""`eaft tune`: its flags and its help."""

from __future__ import annotations

import argparse

from eaft.errors import ConfigurationError

USAGE = "eaft tune MODEL DATA --max_drift NATS [flags of eaft tune and of eaft train]"
DESCRIPTION = """
Train a model on your data, and get back the model that learned most within a forgetting budget.

  eaft tune Qwen/Qwen3-0.6B data.jsonl --max_drift 0.05
  eaft tune Qwen/Qwen3-0.6B data.jsonl --max_drift 0.05 --use_peft --learning_rate 2e-4
  eaft tune Qwen/Qwen3-0.6B data.jsonl --max_drop 2 --suite general
  eaft tune --config recipe.yaml --max_drift 0.05 --strict --output_dir tuned-strict

It trains once, with four checkpoints, and measures each checkpoint and some interpolations between
it and the base model. Held-out rows say what a model learned; drift (mean KL(base || model) per
token, on the base model's own answers) says what it forgot. Some rows and prompts choose up to
three candidates, and others, which took no part in the choice, confirm. Writes the model,
report.html, front.png and results.json.

MODEL is a Hub id, a folder or a .gguf file; DATA is a Hub id, a file or a folder. Any flag of
`eaft train` may follow (eaft train --help). The default is plain SFT (--gate sft). Give the same
command again to go on after an interruption. Exit code: 0; 3 if there is no model within the
budget; 2 if the command is wrong or training failed.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags that `eaft train` does not have."""
    parser = argparse.ArgumentParser(
        prog="eaft tune",
        usage=USAGE,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--max_drift",
        type=float,
        metavar="NATS",
        help="a budget: the largest drift, in nats per token",
    )
    parser.add_argument(
        "--max_drop",
        type=float,
        metavar="POINTS",
        help="a budget: the largest drop of any task of --suite, in percentage points",
    )
    parser.add_argument(
        "--suite",
        nargs="+",
        default=[],
        metavar="NAME",
        help="suites or tasks for --max_drop, as eaft eval --help lists them",
    )
    parser.add_argument("--data_dir", metavar="DIR", help="local data of the tasks, as eaft eval's")
    parser.add_argument(
        "--include_path", metavar="DIR", help="a folder with lm-eval task files of your own"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="at most the first N items of each lm-eval task"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="return a model only if it is shown to be within the budget",
    )
    parser.add_argument(
        "--held_out",
        metavar="FILE",
        help="rows to choose and confirm by (default: two tenths of DATA, 128 rows each at most)",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON Lines with a `prompt`, for drift (default: everyday requests)",
    )
    parser.add_argument(
        "--screening_prompts", type=int, default=64, metavar="N", help="to choose by (default: 64)"
    )
    parser.add_argument(
        "--confirmation_prompts",
        type=int,
        default=128,
        metavar="N",
        help="to confirm on (default: 128)",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=64,
        metavar="N",
        help="of the base model's answers to them (default: 64)",
    )
    parser.add_argument(
        "--output_dir", default="tuned", metavar="DIR", help="where all goes (default: tuned)"
    )
    parser.add_argument(
        "--keep_checkpoints", action="store_true", help="do not delete the run's checkpoints"
    )
    return parser


def underscored(parser: argparse.ArgumentParser, word: str) -> str:
    """Return `--output-dir` as `--output_dir`, as `eaft train` reads it too; other words as is."""
    name, *value = word.split("=", 1)
    own = name[2:].replace("-", "_")
    known = name.startswith("--") and own in vars(parser.parse_args([]))
    return "=".join([f"--{own}", *value]) if known else word


def main(argv: list[str]) -> int:
    """Read the flags, and tune; return the exit code."""
    named = []
    while argv and not argv[0].startswith("-"):
        named.append(argv[0])
        argv = argv[1:]
    if len(named) not in (0, 2):
        raise ConfigurationError(
            f"{' '.join(named)!r}: give MODEL and DATA first, as {USAGE}; or neither, and name both"
            " by --config, or by --model_name_or_path and --dataset_name."
        )
    parser = make_parser()
    flags, train_flags = parser.parse_known_args([underscored(parser, word) for word in argv])
    if named:
        train_flags = ["--model_name_or_path", named[0], "--dataset_name", named[1], *train_flags]
    # After the flags are read: it takes seconds to import, which `--help` has no use for
    from eaft.tuning.plan import Settings
    from eaft.tuning.tune import tune

    return 3 if tune(Settings(**vars(flags)), train_flags).chosen is None else 0
