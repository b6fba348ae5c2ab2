"""
`eaft eval`: what a model scores, and with a base model beside it, what it gained and what it
forgot.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import logging
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from eaft.errors import ConfigurationError, disk_full, first_line
from eaft.evaluation.drift import TOP, BaseAnswers, read_prompts, summarise
from eaft.evaluation.identity import check_weights, digest, tokenizer_digest
from eaft.evaluation.measured import MeasuredModel, shared, write_jsonl
from eaft.evaluation.progress import Progress
from eaft.evaluation.protocol import ANSWER_TOKENS, DRIFT_PROMPTS, PROMPTS, SEED, Protocol
from eaft.evaluation.scores import (
    Item,
    ask,
    asked,
    check_thinking,
    end_tokens,
    generation_config,
    load_tokenizer,
    own_dtype,
    processes,
    settled,
    source,
)
from eaft.evaluation.suite import Benchmark, Suite, load_suites, suites_help
from eaft.files import Count, FiniteNotNegative, check, read_json
from eaft.models import (
    adapter_of,
    check_vocabulary,
    loading,
    noted_date,
    resolve_model,
    template_date,
    template_today,
    vocabulary_size,
)
from eaft.processes import check_place, locked
from eaft.provenance import environment, write_json
from eaft.text import visible

DESCRIPTION = """
Run lm-evaluation-harness tasks on a model and write every item. With --base, run the base model
under the same protocol too, and say what the fine-tuning changed: whether a loss is shown; before,
after, a 95% interval and a paired test; items lost and gained; drift; the worst regressions. Writes
results.json, results.md, changes.png, items (JSON Lines).

  eaft eval out --base Qwen/Qwen3-0.6B --suite quick
  eaft eval out --base Qwen/Qwen3-0.6B --suite general math --output_path eval/out
  eaft eval out --base Qwen/Qwen3-0.6B --suite general --max_drop 2 --max_drift 0.1   exits 3 if more is lost
  eaft eval adapter_folder --base Qwen/Qwen3-0.6B --suite gsm8k my_tasks/mine.yaml --data_dir data
  eaft eval Qwen/Qwen3-0.6B --record                   only keep its answers, for drift while training
  accelerate launch -m eaft eval out --base Qwen/Qwen3-0.6B --suite general

What is measured is kept (`eaft cache`): the base model is measured once, and a run that was
stopped, or whose task failed, goes on where it was when it is started again. Exit code: 0; 1 if a
task failed; 3 if a loss beyond --max_drop or --max_drift is shown; 2 for what is wrong with the
command.

suites (any lm-eval task, group or task file is one too; so is a YAML file with `suite`, `tasks` and
perhaps `limit`):
"""  # noqa: E501
RESULTS_FILE = "results.json"
INPUTS_FILE = "inputs.json"  # of the evaluation that a folder holds, finished or not
WORST = 20  # regressions shown
logger = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Parse the flags, evaluate, print the report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="eaft eval",
        description=DESCRIPTION + suites_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a Hub id, a folder (also of a PEFT adapter) or a .gguf file")
    parser.add_argument("--base", help="the model it was fine-tuned from: compare with it")
    parser.add_argument(
        "--suite", nargs="+", default=[], metavar="NAME", help="suites or tasks, as listed above"
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
        "--max_drop", type=float, metavar="POINTS", help="a task may lose so much: else exit code 3"
    )
    parser.add_argument(
        "--max_drift", type=float, metavar="NATS", help="drift may be so large: else exit code 3"
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
    parser.add_argument("--batch_size", type=int, default=8)
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
        help="at most so many; 0: no drift",
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
            "what chat templates that write the date write, as 2026-11-29 (default: today's, or"
            " that of the evaluation that is gone on with)"
        ),
    )
    flags = vars(parser.parse_args(argv))
    protocol = Protocol(**{name: flags.pop(name) for name in Protocol.__dataclass_fields__})
    if flags.pop("record"):
        if flags["base"] is not None or flags["suite"]:
            raise ConfigurationError(
                "--record only keeps MODEL's answers: leave --base and --suite out."
            )
        with template_date(protocol.template_date or template_today()):
            record(flags["model"], flags["prompts"], flags["tokenizer"], protocol)
        return 0
    if not flags["suite"]:
        raise ConfigurationError(
            "--suite is missing: name suites or tasks, as eaft eval --help lists them."
        )
    if protocol.template_date is None:
        inputs = folder_of(flags["model"], flags["output_path"]) / INPUTS_FILE
        protocol.template_date = shared(lambda: noted_date(inputs, "protocol") or template_today())
    with template_date(protocol.template_date):
        results = evaluate(protocol=protocol, **flags)
    if results is None:
        return 0
    print(visible((Path(results["output_path"]) / "results.md").read_text()))
    over_budget = results["base"] is not None and results["verdict"]["over_budget"]
    return 3 if over_budget else 1 if results["failed"] else 0


def folder_of(model: str, output_path: str | None) -> Path:
    """Return where results go."""
    return Path(output_path or Path("eval") / Path(model).name)


def evaluate(
    model: str,
    suite: list[str],
    base: str | None = None,
    output_path: str | None = None,
    data_dir: str | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    max_drop: float | None = None,
    max_drift: float | None = None,
    prompts: str = str(PROMPTS),
    tokenizer: str | None = None,
    protocol: Protocol | None = None,
) -> dict[str, Any] | None:
    """
    Evaluate a model, and compare it with `base` if that is given; see `DESCRIPTION`.

    Returns:
        what `results.json` holds, on the first process; None on others.

    Raises:
        ConfigurationError: whatever can be known to be wrong before a model is loaded.
    """
    protocol = check_protocol(protocol or Protocol())
    check(Count | None, limit, "--limit")
    folder = folder_of(model, output_path)
    inputs = {
        **{
            "model": model,
            "base": base,
            "suite": suite,
            "data_dir": data_dir,
            "include_path": include_path,
        },
        **{
            "limit": limit,
            "prompts": prompts,
            "tokenizer": tokenizer,
            "protocol": asdict(protocol),
        },
    }
    check_folder(folder, inputs)
    check_packages(protocol.backend)
    from eaft.evaluation.verdict import judge  # needs scipy, whose absence has been reported by now

    for name, budget in (("max_drop", max_drop), ("max_drift", max_drift)):
        if budget is not None and base is None:
            raise ConfigurationError(f"--{name} is of a change: give the --base it is from.")
        check(FiniteNotNegative | None, budget, f"--{name}")
    questions = (
        read_prompts(prompts, protocol.drift_prompts)
        if base is not None and protocol.drift_prompts
        else []
    )
    if max_drift is not None and not questions:
        raise ConfigurationError(
            f"--max_drift {max_drift} needs drift: leave --drift_prompts 0 out."
        )
    state = processes()
    with state.main_process_first():
        suites, benchmarks = load_suites(suite, include_path, data_dir, limit)
        tuned, original = side_by_side(model, base, protocol, bool(questions), tokenizer)
        check_measurable([tuned] if original is None else [original, tuned], benchmarks, questions)
    with contextlib.ExitStack() as stack:
        if state.is_main_process:
            stack.enter_context(
                locked(folder, begins_with=(INPUTS_FILE, "items_before", "answers.json"))
            )
            check_folder(folder, inputs)  # again: another process may just have ended
            write_json(folder / INPUTS_FILE, inputs)
        before, after, sums = measure_both(tuned, original, benchmarks, questions, folder)
        if not state.is_main_process:
            return None
        results = describe(tuned, original, suites, benchmarks, before, after)
        results.update({"output_path": str(folder), "model": model, "base": base})
        if original is not None:
            results["differs"] = differing(original.model, tuned.model, protocol.model_args)
        results["protocol"]["limit"] = limit
        if before is not None:
            results["drift"] = summarise(*sums) if sums is not None else None
            results["verdict"] = judge(results, max_drop, max_drift)
        write_report(folder, results)
        return results


def measure_both(
    tuned: MeasuredModel,
    original: MeasuredModel | None,
    benchmarks: dict[str, Benchmark],
    prompts: list[Any],
    folder: Path,
) -> tuple[Measured | None, Measured, tuple[np.ndarray, np.ndarray] | None]:
    """
    Measure the base and the model, one after the other; return the tasks of each, and drift's sums
    and tokens.
    """
    if original is None:
        return None, run_tasks(tuned, benchmarks, folder / "items"), None
    answers = original.answers(prompts) if prompts else None
    before = run_tasks(original, benchmarks, folder / "items_before")
    original.free()
    sums = None
    if answers is not None:
        sums = tuned.drift(answers)
        if processes().is_main_process:
            write_json(folder / "answers.json", read_answers(original.tokenizer, answers, *sums))
    after = run_tasks(tuned, benchmarks, folder / "items_after")
    tuned.free()
    return before, after, sums


def describe(
    tuned: MeasuredModel,
    original: MeasuredModel | None,
    suites: list[Suite],
    benchmarks: dict[str, Benchmark],
    before: Measured | None,
    after: Measured,
) -> dict[str, Any]:
    """Return of `results.json` what the tasks, and how they were asked, make of it."""
    failed = {**(before.failed if before else {}), **after.failed}
    done = {name: benchmark for name, benchmark in benchmarks.items() if name not in failed}
    results: dict[str, Any] = {
        "suites": {s.name: s.benchmarks for s in suites},
        "protocol": {**asdict(tuned.protocol), "data_sha256": data_digest(after.items)},
        "environment": environment(),
        "kept": {
            "model": tuned.kept,
            "base": original.kept if original else [],
            "folder": str(tuned.store.folder),
        },
        "asked": {
            name: facts(benchmark, tuned.protocol, before, after)
            for name, benchmark in done.items()
        },
        "failed": failed,
    }
    if before is None:
        return {**results, "tasks": {name: score_summary(after.items[name]) for name in done}}
    several = [s for s in suites if len(s.benchmarks) > 1 and not failed.keys() & set(s.benchmarks)]
    items_before, items_after = (
        {name: side.items[name] for name in done} for side in (before, after)
    )
    return {
        **results,
        **changes(items_before, items_after, several),
        "worst": worst_regressions(items_before, items_after),
    }


def check_protocol(protocol: Protocol) -> Protocol:
    """
    Return a protocol whose values are of their types and within their bounds.

    Raises:
        ConfigurationError: the first that is not.
    """
    return check(Protocol, asdict(protocol), "")


def check_folder(folder: Path, inputs: dict[str, Any]) -> None:
    """
    Refuse a folder that holds another evaluation, or a finished one: one that was stopped, or
    failed in part, goes on.

    Raises:
        ConfigurationError: as said.
    """
    way = "choose another --output_path, or delete this one."
    check_place(folder, "output_path")
    if (held := folder / INPUTS_FILE).is_file():
        old, new = read_json(held, dict[str, Any], way), json.loads(json.dumps(inputs))
        if changed := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
            raise ConfigurationError(
                f"output_path={str(folder)!r} holds another evaluation ({', '.join(changed)}"
                f" differs): {way}"
            )
    results = folder / RESULTS_FILE
    if results.is_file() and not read_json(results, dict[str, Any], way).get("failed"):
        raise ConfigurationError(f"output_path={str(folder)!r} holds results: {way}")


def check_packages(backend: str) -> None:
    """
    Find out what is not installed before anything is measured.

    Raises:
        ConfigurationError: a package is missing, or vLLM is to be started by a launcher.
    """
    for package in ("lm_eval", "matplotlib", "scipy", "tabulate"):
        if find_spec(package) is None:
            raise ConfigurationError(f"Evaluating needs {package}: pip install 'eaft[eval]'.")
    if backend == "vllm":
        if find_spec("vllm") is None:
            raise ConfigurationError(
                "backend='vllm' needs vLLM: pip install vllm, or take backend='hf'."
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigurationError(
                "backend='vllm' uses several GPUs by itself: start it without a launcher."
            )


def find_model(model: str, model_args: dict[str, Any]) -> str:
    """
    Return what can be loaded: a folder with an adapter as it is, all else as `resolve_model` finds
    it.

    Raises:
        ConfigurationError: there is no such model, or PEFT is needed and not installed.
    """
    adapter, trusted = adapter_of(model), bool(model_args.get("trust_remote_code"))
    if adapter is None:
        return resolve_model(model, trusted)
    if find_spec("peft") is None:
        raise ConfigurationError(f"{model} holds a PEFT adapter: pip install 'eaft[peft]'.")
    from peft import PeftConfig

    with loading(f"{model}: adapter_config.json cannot be used."):
        PeftConfig.from_pretrained(model)
    try:
        resolve_model(adapter["base_model_name_or_path"], trusted)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{model} is an adapter, and its base model is missing: {error}"
        ) from error
    return model


def side_by_side(
    model: str, base: str | None, protocol: Protocol, drift: bool, tokenizer: str | None = None
) -> tuple[MeasuredModel, MeasuredModel | None]:
    """
    Return a model and its base, to be asked alike: one protocol (completed here), tokenizer and
    template.

    Args:
        drift: whether it is to be measured, which needs one vocabulary.
        tokenizer: a folder or Hub id, in place of the models' own.

    Raises:
        ConfigurationError: a model is missing, or the vocabularies differ and drift is asked for.
    """
    protocol = copy.deepcopy(protocol)
    model = find_model(model, protocol.model_args)
    base = find_model(base, protocol.model_args) if base is not None else None
    if tokenizer is None:
        own, base_own = shared_tokenizer(model, base, drift, protocol.model_args)
    else:
        own = base_own = load_tokenizer(tokenizer)
    for name, its_own in ((model, own), (base, base_own)):
        if name is not None:
            check_vocabulary(name, its_own, text_config(name, protocol.model_args).vocab_size)
    protocol = settled(protocol, own)
    if protocol.dtype == "auto":
        protocol.dtype = own_dtype(base or model, protocol.model_args)
    lengths = {
        context_length(name, protocol.model_args) for name in (model, base) if name is not None
    }
    if (
        len(lengths) > 1 and "max_length" not in protocol.model_args
    ):  # what one can be asked, the other can
        protocol.model_args["max_length"] = min(lengths)
    tuned = MeasuredModel(model, own, protocol)
    return tuned, MeasuredModel(base, base_own, protocol) if base is not None else None


def shared_tokenizer(
    model: str, base: str | None, drift: bool, model_args: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """
    Return the tokenizers for model and base: the base's for both if they have one vocabulary; one
    template in any case.

    Raises:
        ConfigurationError: drift is asked for, and the vocabularies differ.
    """
    tokenizer = load_tokenizer(model, model_args)
    if base is None:
        return tokenizer, None
    base_tokenizer = load_tokenizer(base, model_args)
    if base_tokenizer.chat_template is None:
        base_tokenizer.chat_template = tokenizer.chat_template
    if tokenizer.get_vocab() == base_tokenizer.get_vocab():
        return base_tokenizer, base_tokenizer
    if drift:
        raise ConfigurationError(
            f"{model} and {base} have different vocabularies ({len(tokenizer)} and"
            f" {len(base_tokenizer)} tokens), and drift compares them token by token: leave it out"
            " with --drift_prompts 0."
        )
    tokenizer.chat_template = base_tokenizer.chat_template
    return tokenizer, base_tokenizer


def differing(base: str, model: str, model_args: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """
    Return in what else than weights two models differ that answers depend on, each as `{"base":
    ..., "model": ...}`.

    Of `end_tokens`, `generation_config` (without these), `tokenizer` and `chat_template` (a digest
    of each).
    """

    def setup(name: str) -> dict[str, Any]:
        config = generation_config(name, model_args)
        ids = (
            "eos_token_id",
            "bos_token_id",
            "pad_token_id",
            "transformers_version",
            "_from_model_config",
        )
        found: dict[str, Any] = {
            "generation_config": {
                key: value for key, value in config.to_diff_dict().items() if key not in ids
            }
        }
        try:
            tokenizer = load_tokenizer(name, model_args)
        except ConfigurationError:  # it has none, and is asked with another's
            return found
        template, tokenizer.chat_template = tokenizer.chat_template, None
        found["end_tokens"] = sorted(map(str, tokenizer.convert_ids_to_tokens(end_tokens(config))))
        return {
            **found,
            "tokenizer": tokenizer_digest(tokenizer),
            "chat_template": template and digest(template),
        }

    sides = {"base": setup(base), "model": setup(model)}
    names = ("end_tokens", "generation_config", "tokenizer", "chat_template")
    pairs = {name: {side: found.get(name) for side, found in sides.items()} for name in names}
    return {name: pair for name, pair in pairs.items() if pair["base"] != pair["model"]}


def check_measurable(
    models: list[MeasuredModel], benchmarks: dict[str, Benchmark], prompts: list[Any]
) -> None:
    """
    Check that what is to be asked can be asked of the models, and fits their contexts and the disk.

    Raises:
        ConfigurationError: a folder without weights, prompts for drift that do not fit, tasks that
            cannot be asked of a model that thinks, or no room for drift's files.
    """
    first, protocol = models[0], models[0].protocol
    for model in models:
        check_weights(model.model)
        check_thinking(benchmarks, model.tokenizer, protocol)
    if not prompts:
        return
    context = context_length(first.model, protocol.model_args)
    longest = max(
        len(first.tokenizer(ask(first.tokenizer, prompt, protocol))["input_ids"])
        for prompt in prompts
    )
    if longest + protocol.max_new_tokens > context:
        raise ConfigurationError(
            f"max_new_tokens={protocol.max_new_tokens}: with the longest prompt for drift"
            f" ({longest} tokens) it is more than the context of {context}: lower it, or give"
            " shorter --prompts."
        )
    need = len(prompts) * protocol.max_new_tokens * min(TOP, vocabulary_size(first.tokenizer)) * 8
    folder = next(
        parent for parent in (first.store.folder, *first.store.folder.parents) if parent.is_dir()
    )
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ConfigurationError(
            f"Drift keeps up to {need / 2**20:.0f} MiB in {first.store.folder}, where"
            f" {free / 2**20:.0f} MiB are free: lower --drift_prompts, or set EAFT_CACHE to a"
            " folder with room (`eaft cache --clear` empties this one)."
        )
    print(
        f"Drift: at most {need / 2**20:.0f} MiB of probabilities, kept in {first.store.folder}",
        file=sys.stderr,
    )


def context_length(model: str, model_args: dict[str, Any]) -> int:
    """
    Return how many tokens a model takes, as its configuration says; lm-eval's default where it does
    not.
    """
    if "max_length" in model_args:
        return int(model_args["max_length"])
    config = text_config(model, model_args)
    lengths = [
        getattr(config, field, None)
        for field in ("n_positions", "max_position_embeddings", "n_ctx")
    ]
    return next((length for length in lengths if length), 2048)


def text_config(model: str, model_args: dict[str, Any]) -> Any:
    """Return the configuration of a model's (an adapter's base's) language part."""
    adapter = adapter_of(model)
    name = adapter["base_model_name_or_path"] if adapter else model
    return AutoConfig.from_pretrained(name, **source(model_args)).get_text_config()


def record(model: str, prompts: str, tokenizer: str | None, protocol: Protocol) -> None:
    """
    Keep a base model's answers to prompts: what drift is measured on, also while a sharded model is
    trained.
    """
    protocol = check_protocol(protocol)
    questions = read_prompts(prompts, protocol.drift_prompts)
    base, _ = side_by_side(model, None, protocol, True, tokenizer)
    check_measurable([base], {}, questions)
    answers = base.sampled(questions)
    if processes().is_main_process:
        print(visible(f"Kept {len(answers)} answers of {model} in {base.store.folder}"))


@dataclass
class Measured:
    """What was measured of one model."""

    items: dict[str, list[Item]]
    failed: dict[str, str]  # tasks that could not be run, and why


def run_tasks(model: MeasuredModel, benchmarks: dict[str, Benchmark], folder: Path) -> Measured:
    """
    Return the items of all benchmarks (on the first process), each written as it ends.

    One that fails does not stop the others; under a launcher only what fails after its last forward
    pass does not.
    """
    found, progress = Measured({}, {}), Progress(len(benchmarks))
    main = processes().is_main_process
    for name, benchmark in benchmarks.items():
        try:
            items = model.items(benchmark, progress)
        except Exception as error:
            # Of several processes one that fails in the middle leaves the others waiting for it
            if processes().num_processes > 1 and not isinstance(error, ConfigurationError):
                raise
            if disk_full(error) is not None:
                raise
            logger.exception(f"{name} failed on {model.model}")
            found.failed[name] = f"{type(error).__name__}: {first_line(error)}"
            continue
        found.items[name] = items
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            write_jsonl(folder / f"{Path(name).stem}.jsonl", items)
    progress.close()
    return found


def facts(
    benchmark: Benchmark, protocol: Protocol, before: Measured | None, after: Measured
) -> dict[str, Any]:
    """Return what a benchmark asked, and what was cut of it on each side."""
    found = asked(benchmark, protocol, after.items[benchmark.name])
    found["cut"] = {"after": found["cut"]}
    if before is not None:
        found["cut"]["before"] = asked(benchmark, protocol, before.items[benchmark.name])["cut"]
    return found


def changes(
    before: dict[str, list[Item]], after: dict[str, list[Item]], suites: list[Suite]
) -> dict[str, dict[str, Any]]:
    """
    Return `tasks`, `filters` and `means` (one a suite): each a `Change` as a mapping.

    Tasks have their `metric`, and `p_holm`: p adjusted for their number. Filters are a task's other
    ways to read the same answers (GSM8K: strict and flexible); they count in no mean and no
    adjustment.
    """
    from eaft.evaluation.paired import (
        Change,
        holm,
        mean_change,
        paired_change,
    )  # needs scipy, which comes with lm-eval

    scores: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    found: dict[str, Change] = {}
    filters: dict[str, dict[str, Any]] = {}
    for name in after:
        pairs = pair(name, before[name], after[name])
        scores[name] = (
            np.array([a["score"] for a, _ in pairs]),
            np.array([b["score"] for _, b in pairs]),
        )
        choices = np.array([len(item.get("choices", [])) for item in after[name]])
        found[name] = paired_change(
            *scores[name], num_choices=choices if choices.min() > 1 else None
        )
        others = [
            key
            for key in after[name][0].get("scores", [])
            if key != after[name][0]["metric"].partition(",")[2]
        ]
        for key in others:
            sides = (
                np.array([item["scores"][key] for item in side])
                for side in zip(*pairs, strict=True)
            )
            filters.setdefault(name, {})[key] = asdict(paired_change(*sides))
    means = {
        suite.name: mean_change(
            [found[n] for n in suite.benchmarks], [scores[n] for n in suite.benchmarks]
        )
        for suite in suites
    }
    adjusted = holm([change.p_value for change in found.values()])
    return {
        "tasks": {
            name: {"metric": after[name][0]["metric"], **asdict(change), "p_holm": p}
            for (name, change), p in zip(found.items(), adjusted, strict=True)
        },
        "filters": filters,
        "means": {name: asdict(change) for name, change in means.items()},
    }


def pair(name: str, before: list[Item], after: list[Item]) -> list[tuple[Item, Item]]:
    """
    Return the items of two models side by side.

    Raises:
        ConfigurationError: they are not answers to the same prompts.
    """
    keys = ("task", "doc_id", "prompt_hash", "target_hash", "doc_hash")
    if [[item[key] for key in keys] for item in before] != [
        [item[key] for key in keys] for item in after
    ]:
        raise ConfigurationError(
            f"{name}: the two models were not asked the same; their items cannot be compared."
        )
    return list(zip(before, after, strict=True))


def worst_regressions(
    before: dict[str, list[Item]], after: dict[str, list[Item]]
) -> list[dict[str, Any]]:
    """
    Return the worst regressions of each benchmark in turn, so that a large one does not hide the
    others.

    Worst is the largest fall of the score, and among equals, where there are choices, of the
    likelihood of the right one.
    """
    ranked = []
    for name in after:
        lost = [(a, b) for a, b in pair(name, before[name], after[name]) if b["score"] < a["score"]]
        lost.sort(
            key=lambda items: (
                items[1]["score"] - items[0]["score"],
                margin(items[1]) - margin(items[0]),
            )
        )
        ranked.append(
            [
                {
                    "benchmark": name,
                    **{key: a[key] for key in ("task", "doc_id", "prompt", "target")},
                    "before": {"response": a["response"], "score": a["score"]},
                    "after": {"response": b["response"], "score": b["score"]},
                }
                for a, b in lost[:WORST]
            ]
        )
    return [item for rank in zip_longest(*ranked) for item in rank if item is not None][:WORST]


def margin(item: Item) -> float:
    """
    Return by how many nats the right choice leads the likeliest wrong one; 0 where there are no
    choices.
    """
    choices, target = item.get("choices"), item["target"]
    if not choices or not isinstance(target, int) or len(choices) < 2:
        return 0.0
    return choices[target] - max(choice for i, choice in enumerate(choices) if i != target)


def score_summary(items: list[Item]) -> dict[str, Any]:
    """Return one model's score on one task with its 95% interval."""
    from eaft.evaluation.paired import mean_interval

    scores = np.array([item["score"] for item in items])
    low, high = mean_interval(scores)
    return {
        "metric": items[0]["metric"],
        "n": len(scores),
        "score": float(scores.mean()),
        "low": low,
        "high": high,
    }


def data_digest(items: dict[str, list[Item]]) -> str:
    """
    Return a digest of the rows and prompts measured, so that two results can be told to be of the
    same data.
    """
    digest = hashlib.sha256()
    for name in sorted(items):
        for item in items[name]:
            digest.update(
                f"{name} {item['task']} {item['doc_hash']} {item['prompt_hash']}\n".encode()
            )
    return digest.hexdigest()


def read_answers(
    tokenizer: Any, answers: BaseAnswers, sums: np.ndarray, counts: np.ndarray
) -> list[dict[str, Any]]:
    """
    Return the base model's answers as text, each with its drift (nats per token) and its number of
    tokens.
    """
    return [
        {
            "prompt": tokenizer.decode(answer.prompt_ids),
            "answer": tokenizer.decode(answer.answer_ids),
            "drift": float(kl / tokens),
            "tokens": int(tokens),
        }
        for answer, kl, tokens in zip(answers.answers, sums, counts, strict=True)
    ]


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Write results.md, changes.png and, last, results.json, which says that all is there."""
    from eaft.evaluation import report

    text = report.evaluation(results)
    staging = folder / "results.md.tmp"
    staging.write_text(text)
    os.replace(staging, folder / "results.md")
    if results["base"] is not None and results["tasks"]:
        report.draw_changes(results, folder / "changes.png")
    write_json(folder / RESULTS_FILE, results)
