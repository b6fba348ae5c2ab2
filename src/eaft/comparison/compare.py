"""
Trains with several objectives from one base, and compares what they learned and forgot.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from eaft.comparison import report
from eaft.comparison.collect import collect
from eaft.comparison.measurer import Measurer, check_before_training
from eaft.comparison.recipe import (
    HELD_OUT,
    Recipe,
    Run,
    base_model,
    check_names,
    plan_runs,
)
from eaft.comparison.results import Failure
from eaft.comparison.runs import MARK, FirstAlone, check_folder, claim, train_run
from eaft.comparison.study import Study, prune, study
from eaft.errors import ConfigurationError, EAFTError, disk_full, first_line
from eaft.evaluation.comparable import check_template_adds_nothing
from eaft.evaluation.evaluate import check_packages
from eaft.evaluation.identity import tokenizer_digest, weights_digest
from eaft.evaluation.launch import processes
from eaft.evaluation.model_settings import load_tokenizer
from eaft.evaluation.suite import Benchmark, Suite, load_suites
from eaft.models import noted_date, template_date, template_today
from eaft.processes import locked
from eaft.text import VisibleRecord, visible
from eaft.training.apart import end_with_parent, parse_flags
from eaft.training.data import load_rows
from eaft.training.held_out import Row, check_fit, check_number, prepare

logger = logging.getLogger(__name__)
OURS = {"made_by": "eaft compare"}  # in the mark of an output folder
# Flags of training that change no row's tokens or labels
LEAVES_TOKENS = (
    "output_dir",
    "dataset_name",
    "seed",
    "learning_rate",
    "gate",
    "gate_alpha",
    "gate_kwargs",
    "replay",
    "replay_loss",
)


def compare(recipe: Recipe, jobs: int = 1) -> list[Failure]:
    """
    Train and measure what is missing, and write the results.

    Args:
        jobs: how many studies (an objective with a seed) are trained and measured at a time, in
            processes of their own.

    Returns:
        what failed, on all processes; the first one writes the results.

    Raises:
        ConfigurationError: anything that is wrong before training begins.
        EAFTError: no objective could be trained and measured.
    """
    check_jobs(jobs)
    check_packages(recipe.evaluate.backend)
    day = (
        recipe.evaluate.template_date
        or noted_date(Path(recipe.output_dir) / MARK)
        or template_today()
    )
    recipe.evaluate.template_date = day
    with template_date(day):
        return compare_on_date(recipe, jobs)


def compare_on_date(recipe: Recipe, jobs: int) -> list[Failure]:
    """Compare while chat templates write the recipe's date, here and in all runs; see `compare`."""
    benchmarks, groups = load_tasks(recipe)
    runs = plan_runs(recipe, None)  # before a GGUF file is converted
    named, base = recipe.train["model_name_or_path"], base_model(recipe)
    options = recipe.evaluate.model_args
    check_before_training(recipe.evaluate, base, benchmarks)
    for path in dict.fromkeys(run.flags.get("chat_template_path") for run in runs):
        check_template_adds_nothing(path, base, "train.chat_template_path", options)
    identity = [
        weights_digest(base, options.get("revision")),
        tokenizer_digest(load_tokenizer(base, options)),
    ]
    for run in runs:
        run.identity["model"] = identity
        if run.flags["model_name_or_path"] == named:
            run.flags["model_name_or_path"] = base
    rows = prepare_held_out(recipe, runs, base)
    # Parsing the flags of training has set up its processes; measuring has its own
    AcceleratorState._reset_state(reset_partial_state=True)
    state, output_dir = processes(), Path(recipe.output_dir)
    ours = {**OURS, "template_date": recipe.evaluate.template_date}
    check_folder(output_dir, ours)
    for run in runs:
        check_folder(run.folder, run.identity)

    with locked(output_dir) if state.is_main_process else contextlib.nullcontext():
        if state.is_main_process:
            claim(output_dir, ours)
        state.wait_for_everyone()
        measurer = Measurer(recipe.evaluate, base, benchmarks, output_dir, rows)
        keep_all = recipe.keep_checkpoints == "all"
        run_each = (
            partial(one_at_a_time, output_dir, keep_all)
            if jobs == 1
            else partial(in_jobs, recipe, jobs)
        )
        studies, failed = run_all(runs, measurer, run_each)
        if not studies:
            raise EAFTError(
                "Nothing can be compared:\n  " + "\n  ".join(failure.message for failure in failed)
            )
        if not state.is_main_process:
            return failed
        results = collect(recipe, measurer, studies, groups, failed)
        text = report.write(results, output_dir)
    print(
        visible(
            f"\n{text}\nWritten to {output_dir}: results.md, results.json, pareto.png, curves.png,"
            f" fronts.png. Next: look at them with eaft view {output_dir}"
        )
    )
    return failed


def load_tasks(recipe: Recipe) -> tuple[dict[str, Benchmark], list[Suite]]:
    """Return the recipe's benchmarks, and the groups `target` and `general` that have some."""
    config = recipe.evaluate
    suites, benchmarks = load_suites(
        config.target_tasks + config.general_tasks,
        config.include_path,
        config.data_dir,
        config.limit,
    )
    count = len(config.target_tasks)
    groups = [
        Suite(kind, [name for suite in part for name in suite.benchmarks])
        for kind, part in (("target", suites[:count]), ("general", suites[count:]))
        if part
    ]
    target = groups[0].benchmarks if config.target_tasks else []
    check_names("evaluate.every_checkpoint_tasks", config.every_checkpoint_tasks, target)
    return benchmarks, groups


def prepare_held_out(recipe: Recipe, runs: list[Run], base: str) -> list[Row]:
    """
    Return the recipe's held-out rows as all runs prepare their training data; none without
    `held_out`.

    Rows without a labelled token are left out, as training leaves them out.

    Raises:
        ConfigurationError: they cannot be prepared or measured, too few are left, or two runs
            prepare them differently.
    """
    path = recipe.evaluate.held_out
    if path is None:
        return []
    known: dict[str, tuple[Run, list[Row]]] = {}
    for run in runs:
        flags = {name: value for name, value in run.flags.items() if name not in LEAVES_TOKENS}
        key = json.dumps(flags, sort_keys=True, default=str)
        if key in known:
            continue
        configs = parse_flags(run.flags)
        held_out = load_rows(path, configs[1].dataset_text_field, HELD_OUT)
        known[key] = run, prepare(held_out, configs, base, HELD_OUT)
        first, rows = next(iter(known.values()))
        check_alike(first, rows, *known[key])
    rows = next(rows for _, rows in known.values())
    check_fit(rows, base, recipe.evaluate.model_args, HELD_OUT)
    labelled = [row for row in rows if row["input_ids"]]
    if len(labelled) < len(rows):
        left_out = [str(i) for i, row in enumerate(rows) if not row["input_ids"]]
        logger.warning(
            f"evaluate.held_out: row {', '.join(left_out)} has no labelled token left, and is not"
            " measured, as such rows are not trained on."
        )
    check_number(HELD_OUT, len(labelled))
    return labelled


def check_alike(first: Run, rows: list[Row], second: Run, others: list[Row]) -> None:
    """
    Check that two runs prepare the same tokens, since nlls of different tokens cannot be compared.

    Raises:
        ConfigurationError: they do not; names the flags in which they differ.
    """
    if (
        i := next((i for i, (a, b) in enumerate(zip(rows, others, strict=True)) if a != b), None)
    ) is not None:
        names = [name for name in {**first.flags, **second.flags} if name not in LEAVES_TOKENS]
        names = [name for name in names if first.flags.get(name) != second.flags.get(name)]
        raise ConfigurationError(
            f"evaluate.held_out: {first.name} and {second.name} make different tokens or labels of"
            f" row {i} (by {', '.join(names)}), so their nlls cannot be compared. Give all"
            " objectives the same (in train), or leave held_out out."
        )


def check_jobs(jobs: int) -> None:
    """
    Check the number of jobs.

    Raises:
        ConfigurationError: fewer than one, or several in a launch of several processes, which work
            together on each.
    """
    if jobs < 1:
        raise ConfigurationError(f"--jobs={jobs}: expected at least 1.")
    if jobs > 1 and processes().num_processes > 1:
        raise ConfigurationError(
            f"--jobs={jobs} goes with a single process: drop it, or the launcher."
        )


Work = list[Run]  # of one objective with one seed, one a learning rate


def run_all(
    runs: list[Run],
    measurer: Measurer,
    run_each: Callable[[list[Work], Measurer], Iterator[Study | Exception]],
) -> tuple[dict[tuple[str, int], Study], list[Failure]]:
    """
    Train and measure every objective with every seed; one that fails does not stop the others.

    Args:
        run_each: yields the outcome of each, in their order.

    Returns:
        what was measured, by objective and seed; and what failed.
    """
    studies: dict[tuple[str, int], Study] = {}
    failed: list[Failure] = []
    keys = list(dict.fromkeys((run.objective, run.seed) for run in runs))
    all_work = [[run for run in runs if (run.objective, run.seed) == key] for key in keys]
    for (objective, seed), done in zip(keys, run_each(all_work, measurer), strict=True):
        if isinstance(done, Study):
            studies[objective, seed] = done
            continue
        logger.error(f"{objective}, seed {seed}, failed", exc_info=done)
        failed.append(Failure(objective=objective, seed=seed, message=first_line(done)))
    failed += [
        Failure(objective=None, seed=None, message=f"{name} failed on the base model: {reason}")
        for name, reason in measurer.failed.items()
    ]
    return studies, failed


def one_at_a_time(
    output_dir: Path, keep_all: bool, all_work: list[Work], measurer: Measurer
) -> Iterator[Study | Exception]:
    """Yield the outcome of each piece of work, which all processes of this launch do together."""
    first_alone = FirstAlone(output_dir)
    for work in all_work:
        try:
            yield run_study(
                work, measurer, lambda run: first_alone(partial(train_run, run)), keep_all
            )
        except Exception as error:
            # If one of several processes fails in the middle, the others wait for it
            if processes().num_processes > 1 and not isinstance(error, EAFTError):
                raise
            if disk_full(error) is not None:
                raise
            yield error
    first_alone.close()


def in_jobs(
    recipe: Recipe, jobs: int, all_work: list[Work], measurer: Measurer
) -> Iterator[Study | Exception]:
    """
    Yield the outcome of each piece of work, done by processes that share the cores.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    base_kept = []
    with ProcessPoolExecutor(
        jobs, get_context("spawn"), start_worker, (recipe, measurer.folder, threads, measurer.rows)
    ) as pool:
        with interruptions_ignored():  # inherited by the processes that begin here
            keep_all = recipe.keep_checkpoints == "all"
            futures = [pool.submit(work_apart, work, keep_all) for work in all_work]
        for future in futures:
            try:
                done, kept = future.result()
            except KeyboardInterrupt:
                for process in active_children():  # also a process that has just begun
                    process.terminate()
                raise
            except BrokenProcessPool:
                yield EAFTError(
                    f"one of {jobs} jobs was killed, perhaps for its memory, and all stopped: run"
                    " the command again to go on, with fewer --jobs."
                )
                continue
            except Exception as error:
                if disk_full(error) is not None:
                    pool.shutdown(wait=False, cancel_futures=True)  # work that has not begun
                    raise
                yield error
                continue
            measurer.begin(done.run)  # finds in the store what the worker measured
            base_kept.append(kept.pop("base"))
            # The first worker measured the base model, so it read the least from the store
            measurer.kept.update({**kept, "base": min(base_kept, key=len)})
            yield done


@contextlib.contextmanager
def interruptions_ignored() -> Iterator[None]:
    """Ignore Ctrl-C for a moment."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def start_worker(recipe: Recipe, folder: Path, threads: int, rows: list[Row]) -> None:
    """
    Prepare a process to train and measure; it and the processes that it starts share some cores.
    """
    global WORKER
    end_with_parent()
    logging.setLogRecordFactory(VisibleRecord)
    # Ctrl-C reaches all processes. A worker that took it for a failure would begin the next piece
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    assert recipe.evaluate.template_date is not None
    template_date(recipe.evaluate.template_date).__enter__()  # as long as this process lives
    benchmarks, _ = load_tasks(recipe)
    WORKER = Measurer(recipe.evaluate, base_model(recipe), benchmarks, folder, rows)


WORKER: Measurer  # of a process that `in_jobs` started


def work_apart(work: Work, keep_all: bool) -> tuple[Study, dict[str, list[str]]]:
    """Return a study, and which of its measurements were in the store before."""
    before = set(WORKER.kept) - {"base"}
    done = run_study(work, WORKER, train_run, keep_all)
    return done, {name: kept for name, kept in WORKER.kept.items() if name not in before}


def run_study(
    work: Work, measurer: Measurer, train: Callable[[Run], str | None], keep_all: bool
) -> Study:
    """
    Train one objective with one seed at each learning rate, and measure it.

    Args:
        train: returns None, or what went wrong.

    Raises:
        EAFTError: training or measuring failed.
    """
    points = {}
    for run in work:
        if (message := train(run)) is not None:
            raise EAFTError(f"{run.name}: {message}")
        measurer.begin(run)
        points[run] = measurer.points(run)
        if not keep_all:
            prune(measurer, run, points[run])
    return study(measurer, points, keep_all)
