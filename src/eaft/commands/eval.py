"""`eaft eval`: its flags and its help."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaft.errors import ConfigurationError
from eaft.evaluation.protocol import ANSWER_TOKENS, DRIFT_PROMPTS, PROMPTS, SEED, SHOWN, Protocol
from eaft.evaluation.suite import suites_help
from eaft.text import visible

if TYPE_CHECKING:
    from eaft.evaluation.results import Evaluation

DESCRIPTION = """
Run tasks on a model, and with --base say what the fine-tuning gained and what it forgot.

  eaft eval out --base Qwen/Qwen3-0.6B --held_out rows.jsonl --suite everyday
  eaft eval out --base Qwen/Qwen3-0.6B --suite quick
  eaft eval out --base Qwen/Qwen3-0.6B --suite general math --output_path eval/out
  eaft eval out --base Qwen/Qwen3-0.6B --suite general --max_drop 2 --max_drift 0.1
  eaft eval adapter_folder --base Qwen/Qwen3-0.6B --suite gsm8k my_tasks/mine.yaml --data_dir data
  eaft eval Qwen/Qwen3-0.6B --record              only keep its answers, for drift while training
  accelerate launch -m eaft eval out --base Qwen/Qwen3-0.6B --suite general
  eaft eval --from logs/base logs/out                 what lm-eval or inspect_ai has measured before

The tasks are lm-evaluation-harness's. With --base, the base model runs under the same
protocol, and the report has: whether a loss is shown; the score before and after with a 95%
interval and a paired test; items lost and gained; drift; the worst regressions. With --held_out it
also has the nll of your own rows before and after, and answers to the first of them side by side;
then --suite may be left out. The rows take any form that training takes, and are prepared with the
settings that MODEL was trained with. Writes report.html, results.md, results.json, changes.png, and
every item as JSON Lines. With --from, the models were asked by another tool already: its
logs of the base and of the tuned model are matched row by row, and no model is loaded.

What is measured is kept (`eaft cache`), so the base model is measured once. Give the same command
again to go on after an interruption or a failed task. Exit code: 0; 1 if a task failed (with
--from: cannot be compared); 3 if a loss beyond --max_drop or --max_drift is shown; 2 if the command
is wrong.

suites (also: `everyday`, 120 easy questions that need no download; any lm-eval task, group or task
file; a YAML file with `suite`, `tasks` and perhaps `limit`):
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `eaft eval`."""
    parser = argparse.ArgumentParser(
        prog="eaft eval",
        description=f"{DESCRIPTION}\n{suites_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", help="a Hub id, a folder (also of a PEFT adapter) or a .gguf file"
    )
    parser.add_argument(
        "--from",
        nargs=2,
        metavar=("BASE", "TUNED"),
        help=(
            "compare two logs: of lm-eval the folders that `lm_eval --log_samples --output_path`"
            " wrote, of inspect_ai .eval files (needs `inspect-ai`)"
        ),
    )
    parser.add_argument("--base", help="the model it was fine-tuned from: compare with it")
    parser.add_argument(
        "--suite", nargs="+", default=[], metavar="NAME", help="suites or tasks, as listed above"
    )
    parser.add_argument(
        "--held_out", metavar="FILE", help="rows of your own that MODEL was not trained on"
    )
    parser.add_argument(
        "--held_out_answers",
        type=int,
        default=SHOWN,
        metavar="N",
        help=f"show answers to the first N of them (default: {SHOWN})",
    )
    parser.add_argument(
        "--record", action="store_true", help="only keep the model's answers, as the base of drift"
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="a folder or Hub id (default: the base model's own)"
    )
    parser.add_argument(
        "--output_path", metavar="DIR", help="where results go (default: eval/MODEL)"
    )
    parser.add_argument(
        "--data_dir", metavar="DIR", help="local data: TASK.jsonl or TASK_test.jsonl, as on the Hub"
    )
    parser.add_argument(
        "--include_path", metavar="DIR", help="a folder with lm-eval task files of your own"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="at most the first N items of each lm-eval task"
    )
    parser.add_argument(
        "--max_drop", type=float, metavar="POINTS", help="what a task may lose; more: exit code 3"
    )
    parser.add_argument(
        "--max_drift", type=float, metavar="NATS", help="how large drift may be; more: exit code 3"
    )
    parser.add_argument(
        "--num_fewshot",
        type=int,
        metavar="N",
        help="examples before each item (default: the task's)",
    )
    parser.add_argument(
        "--apply_chat_template",
        action=argparse.BooleanOptionalAction,
        help=(
            "ask as a chat (default: if the base model, or without one the model, has a chat"
            " template)"
        ),
    )
    parser.add_argument(
        "--enable_thinking",
        action=argparse.BooleanOptionalAction,
        help=(
            "let models think before they answer (default: no, where the chat template can turn it"
            " off)"
        ),
    )
    parser.add_argument(
        "--max_thinking_tokens",
        type=int,
        default=Protocol.max_thinking_tokens,
        help="room for it, beside the answer's",
    )
    parser.add_argument(
        "--system_instruction", metavar="TEXT", help="a system message before each item"
    )
    parser.add_argument(
        "--gen_kwargs", metavar="K=V,...", help="generation settings for all tasks, as lm-eval's"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=SEED,
        help=f"of few-shot examples and sampling (default: {SEED})",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=8,
        help="items at a time; prompts for drift, four times as many (default: 8)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        help="float32, bfloat16, ... (default: what the base was saved in)",
    )
    parser.add_argument(
        "--backend", choices=["hf", "vllm"], default="hf", help="lm-eval's model (default: hf)"
    )
    parser.add_argument(
        "--model_args",
        type=json.loads,
        default={},
        metavar="JSON",
        help="more for lm-eval's model, as '{\"parallelize\": true}'",
    )
    parser.add_argument(
        "--prompts",
        default=str(PROMPTS),
        metavar="FILE",
        help="JSON Lines with a `prompt`, for drift",
    )
    parser.add_argument(
        "--drift_prompts",
        type=int,
        default=DRIFT_PROMPTS,
        metavar="N",
        help="at most N prompts; 0: no drift",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=ANSWER_TOKENS,
        help="of the base model's answers to them",
    )
    parser.add_argument(
        "--template_date",
        metavar="DATE",
        help=(
            "the date in chat templates that write a date, as 2026-11-29 (default: today, or the"
            " date of an evaluation that goes on)"
        ),
    )
    return parser


def main(argv: list[str]) -> int:
    """Evaluate, and print the report; return the exit code."""
    parser = make_parser()
    flags = vars(parser.parse_args(argv))
    if logs := flags.pop("from"):
        return from_logs(logs, flags, parser)
    if flags["model"] is None:
        raise ConfigurationError("MODEL is missing: name a model, or give logs by --from.")
    from eaft.evaluation.evaluate import evaluate, record
    from eaft.evaluation.folder import INPUTS_FILE, folder_of
    from eaft.evaluation.launch import shared
    from eaft.evaluation.results import TunedEvaluation
    from eaft.models import noted_date, template_date, template_today

    protocol = Protocol(**{name: flags.pop(name) for name in Protocol.__dataclass_fields__})
    if flags.pop("record"):
        if flags["base"] is not None or flags["suite"] or flags["held_out"]:
            raise ConfigurationError(
                "--record only keeps MODEL's answers: leave --base, --suite and --held_out out."
            )
        with template_date(protocol.template_date or template_today()):
            record(flags["model"], flags["prompts"], flags["tokenizer"], protocol)
        return 0
    if protocol.template_date is None:
        inputs = folder_of(flags["model"], flags["output_path"]) / INPUTS_FILE
        protocol.template_date = shared(lambda: noted_date(inputs, "protocol") or template_today())
    if flags["held_out"] is not None:
        if flags["base"] is None:
            raise ConfigurationError("--held_out compares two models: give --base, too.")
        from eaft.training.run_rows import read_rows

        flags["held_out"] = read_rows(
            flags["held_out"], flags["model"], flags["base"], protocol.model_args
        )
    with template_date(protocol.template_date):
        results = evaluate(protocol=protocol, **flags)
    if results is None:
        return 0
    over_budget = isinstance(results, TunedEvaluation) and results.verdict.over_budget
    return tell(results, over_budget)


def from_logs(logs: list[str], flags: dict[str, Any], parser: argparse.ArgumentParser) -> int:
    """
    Compare two logs, and print the report; return the exit code.

    Args:
        logs: of the base and of the tuned model.
        flags: the other flags; a flag that says how to ask a model is refused.
    """
    kept = {name: flags.pop(name) for name in ("output_path", "max_drop")}
    refused = [name for name, value in flags.items() if value != parser.get_default(name)]
    if refused:
        names = ", ".join("MODEL" if name == "model" else f"--{name}" for name in refused)
        raise ConfigurationError(
            f"--from asks no model, so that {names} would do nothing: leave it out."
        )
    from eaft.evaluation.matched import compare_logs

    results = compare_logs(logs[0], logs[1], **kept)
    return tell(results, results.verdict.over_budget)


def tell(results: Evaluation, over_budget: bool) -> int:
    """Print the report of an evaluation; return the exit code."""
    folder = Path(results.output_path)
    print(visible((folder / "results.md").read_text()))
    print(visible(f"Written to {folder}. Next: open {folder / 'report.html'}"))
    return 3 if over_budget else 1 if results.failed else 0
