"""
`eaft eval --from`: two logs of another tool, matched row by row and compared as `eaft eval` does.

No model is loaded, and torch is not imported.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from eaft.errors import ConfigurationError
from eaft.evaluation.folder import (
    INPUTS_FILE,
    check_folder,
    check_installed,
    data_digest,
    folder_of,
    write_items,
    write_report,
)
from eaft.evaluation.lm_eval_logs import PROMPT
from eaft.evaluation.logged import Answered, Log, LoggedTask
from eaft.evaluation.pairs import one, worst_regressions
from eaft.evaluation.read_logs import read_log
from eaft.evaluation.results import Asked, Cut, Item, Source, TunedEvaluation
from eaft.files import FiniteNotNegative, check
from eaft.processes import locked
from eaft.provenance import software, write_json

SIDES = ("the base's log", "the tuned model's")
Items = dict[str, list[Item]]  # by task or group
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # names of the longest answer
SAME_MEAN = 1e-6  # how far a mean of scores may be off the one that the tool reports


class NotComparable(ConfigurationError):
    """Why the two logs of a task cannot be compared, as one line."""


def compare_logs(
    base: str, tuned: str, output_path: str | None = None, max_drop: float | None = None
) -> TunedEvaluation:
    """
    Compare two models by the logs that lm-eval or inspect_ai wrote of them.

    Args:
        base, tuned: the logs; see `eaft.evaluation.read_logs.read_log`.
        output_path: where results go; None: `eval/` and the name of the tuned model's log.
        max_drop: percentage points that each task may lose; see `eaft.evaluation.verdict.judge`.

    Returns:
        what `results.json` holds; `failed` says of each task that is not compared why.

    Raises:
        ConfigurationError: a log cannot be read, or no task can be compared.
    """
    check_installed("jinja2", "markdown_it", "matplotlib", "scipy", "tabulate")
    from eaft.evaluation.changes import compare_items
    from eaft.evaluation.verdict import judge

    check(FiniteNotNegative | None, max_drop, "--max_drop")
    folder = folder_of(name_of(tuned), output_path)
    inputs = {"from": [base, tuned]}
    check_folder(folder, inputs)
    logs = read_log(base), read_log(tuned)
    if logs[0].tool != logs[1].tool:
        raise ConfigurationError(
            f"--from: {base} is of {logs[0].tool} and {tuned} of {logs[1].tool}: the tools ask and"
            " grade in their own ways, so give two logs of one."
        )
    before, after, asked, failed = matched(*logs)
    if not asked:
        raise ConfigurationError(
            "--from: no task can be compared. "
            + " ".join(f"{name}: {reason}" for name, reason in failed.items())
        )
    with locked(folder, begins_with=(INPUTS_FILE, "items_before")):
        check_folder(folder, inputs)  # again: another process may just have ended
        write_json(folder / INPUTS_FILE, inputs)
        for side, items in (("items_before", before), ("items_after", after)):
            (folder / side).mkdir(exist_ok=True)
            for name in asked:
                write_items(folder / side / f"{Path(name).stem}.jsonl", items[name])
        changes = compare_items(before, after, [])
        results = TunedEvaluation(
            output_path=str(folder),
            model=logs[1].run.model,
            base=logs[0].run.model,
            suites={name: [name] for name in asked},
            protocol=None,
            environment=software(),
            kept=None,
            asked=asked,
            failed=failed,
            source=Source(
                tool=logs[0].tool,
                base=logs[0].run,
                model=logs[1].run,
                data_sha256=data_digest(after),
            ),
            **vars(changes),
            drift=None,
            worst=worst_regressions(before, after),
            verdict=judge(changes, None, failed, max_drop),
        )
        write_report(folder, results)
    return results


def name_of(log: str) -> str:
    """Return a log's name: its folder's name, or its file's name without the ending."""
    path = Path(log).expanduser().absolute()
    return path.stem if path.suffix in (".eval", ".json") else path.name


def matched(base: Log, tuned: Log) -> tuple[Items, Items, dict[str, Asked], dict[str, str]]:
    """
    Return the items of both models by task or group, in one order; how each was asked; and why the
    others cannot be compared.
    """
    before: Items = {}
    after: Items = {}
    asked: dict[str, Asked] = {}
    failed: dict[str, str] = {}
    for name, tasks in lines(base, tuned).items():
        try:
            done = {task: match_task(task, base, tuned) for task in tasks}
        except NotComparable as error:
            failed[name] = str(error)
            continue
        before[name] = [item for items, _ in done.values() for item in items]
        after[name] = [item for _, items in done.values() for item in items]
        asked[name] = how_asked(base, tasks, before[name], after[name])
    return before, after, asked, failed


def lines(base: Log, tuned: Log) -> dict[str, list[str]]:
    """
    Return the lines of the report, each with its tasks. The tasks of a group that has a score of
    its own are one line, if both logs have the group and the tasks have one metric.
    """
    groups = {
        name: tasks
        for name, tasks in base.groups.items()
        if tuned.groups.get(name) == tasks and one_metric([base.tasks.get(task) for task in tasks])
    }
    inside = {task for tasks in groups.values() for task in tasks}
    alone = [task for task in {**base.tasks, **tuned.tasks} if task not in inside]
    return {**groups, **{task: [task] for task in alone}}


def one_metric(tasks: list[LoggedTask | None]) -> bool:
    """Return whether tasks share their first metric."""
    return len({task.metrics[0] if task and task.metrics else None for task in tasks}) == 1


def match_task(name: str, base: Log, tuned: Log) -> tuple[list[Item], list[Item]]:
    """
    Return the items of a task for both models, row beside row, in the order of the base's numbers.

    Raises:
        NotComparable: the models were not asked or graded alike, or rows are missing.
    """
    for log, side in ((base, SIDES[0]), (tuned, SIDES[1])):
        if name not in log.tasks:
            raise NotComparable(f"task {name} is not in {side}.")
    tasks = base.tasks[name], tuned.tasks[name]
    check_settings(*tasks)
    pairs = match_rows(*tasks)
    check_asked(pairs, prompt_settings(base, tuned))
    if names := different(tasks[0].grading, tasks[1].grading):
        raise NotComparable(
            f"answers were made or graded in another way ({', '.join(names)} differs)."
        )
    metric = shared_metric(*tasks)
    for task, side in zip(tasks, SIDES, strict=True):
        check_mean(task, metric, side)
    pairs.sort(key=lambda pair: pair[0].doc_id)
    readings = same_reading(metric, *tasks)
    before = [item(name, metric, readings, b, b) for b, _ in pairs]
    after = [item(name, metric, readings, t, b) for b, t in pairs]
    return before, after


def check_settings(base: LoggedTask, tuned: LoggedTask) -> None:
    """
    Check that a task is the same in both logs, before its rows are compared.

    Raises:
        NotComparable: it has another version or number of examples.
    """
    for what, sides in (
        ("task version", (base.version, tuned.version)),
        ("number of few-shot examples", (base.num_fewshot, tuned.num_fewshot)),
    ):
        if sides[0] != sides[1]:
            raise NotComparable(
                f"the {what} is {sides[0]} in {SIDES[0]} and {sides[1]} in {SIDES[1]}."
            )


def different(base: dict[str, Any], tuned: dict[str, Any]) -> list[str]:
    """Return the names of the settings that differ."""
    return [name for name in {**base, **tuned} if base.get(name) != tuned.get(name)]


def match_rows(base: LoggedTask, tuned: LoggedTask) -> list[tuple[Answered, Answered]]:
    """
    Return the rows of both logs in pairs, by their content; rows with one content in the order of
    what was asked and of their numbers.

    Raises:
        NotComparable: a row is missing on one side, or was answered more often there.
    """
    sides = by_content(base), by_content(tuned)
    pairs: list[tuple[Answered, Answered]] = []
    only: tuple[list[Answered], list[Answered]] = [], []
    for row in {**sides[0], **sides[1]}:
        b, t = (side.get(row, []) for side in sides)
        pairs += zip(b, t, strict=False)
        only[0].extend(b[len(t) :])
        only[1].extend(t[len(b) :])
    if only[0] or only[1]:
        first = (only[0] or only[1])[0].doc_id
        raise NotComparable(
            f"{len(only[0])} items are only in {SIDES[0]} and {len(only[1])} only in {SIDES[1]}"
            f" (the first: item {first}): run both on the same rows."
        )
    for before, after in pairs:
        times = len(before.responses), len(after.responses)
        if times[0] != times[1]:
            raise NotComparable(
                f"item {before.doc_id} was answered {times[0]} times in {SIDES[0]} and {times[1]}"
                f" times in {SIDES[1]}: run both with the same number."
            )
    return pairs


def by_content(task: LoggedTask) -> dict[str, list[Answered]]:
    """Return the rows of a task by their content, in an order that does not depend on the files."""
    rows: dict[str, list[Answered]] = defaultdict(list)
    for answered in task.items:
        rows[answered.row].append(answered)
    for same in rows.values():
        same.sort(key=lambda answered: (answered.asked, str(answered.target), answered.doc_id))
    return rows


def check_asked(pairs: list[tuple[Answered, Answered]], hint: str) -> None:
    """
    Check that both models were asked the same of each row.

    Args:
        hint: the settings of prompts that differ between the runs.

    Raises:
        NotComparable: another prompt, target, or settings of generation.
    """
    for what, why, get in (
        ("prompt", hint, lambda answered: answered.asked),
        ("target", "", lambda answered: answered.target),
    ):
        if others := [b.doc_id for b, t in pairs if get(b) != get(t)]:
            raise NotComparable(
                f"{len(others)} of {len(pairs)} items have another {what} in {SIDES[1]} (the first:"
                f" item {others[0]}){why}."
            )
    for b, t in pairs:
        if names := different(b.generation, t.generation):
            told = ", ".join(
                f"{n} is {b.generation.get(n)!r} in {SIDES[0]} and {t.generation.get(n)!r} in"
                f" {SIDES[1]}"
                for n in names
            )
            raise NotComparable(f"item {b.doc_id} was generated with other settings: {told}.")


def prompt_settings(base: Log, tuned: Log) -> str:
    """Return in words which settings of prompts differ between two runs; empty where none does."""
    sides = [{name: log.run.settings.get(name) for name in PROMPT} for log in (base, tuned)]
    names = different(*sides)
    return f": {', '.join(names)} differs" if names else ""


def shared_metric(base: LoggedTask, tuned: LoggedTask) -> str:
    """
    Return the task's first metric, with its filter, that has numbers in [0, 1].

    Raises:
        NotComparable: there is none, or a log lacks it, for the task or for an item.
    """
    tasks = base, tuned
    scored = [
        metric
        for metric in dict.fromkeys([*base.metrics, *tuned.metrics])
        if any(has_number(row, metric) for task in tasks for row in task.items)
    ]
    if not scored:
        raise NotComparable("no metric where more is better has numbers from 0 to 1 for the items.")
    for task, side in zip(tasks, SIDES, strict=True):
        if scored[0] not in task.metrics:
            raise NotComparable(f"metric {scored[0]} is missing in {side}.")
        if lacking := [row for row in task.items if None in row.scores[scored[0]]]:
            why = lacking[0].problem or f"{scored[0]} is no number from 0 to 1"
            raise NotComparable(
                f"{len(lacking)} items have no score in {side} (the first: item"
                f" {lacking[0].doc_id}, {why})."
            )
    return scored[0]


def has_number(row: Answered, metric: str) -> bool:
    """Return whether an answer to a row has a score by a metric."""
    return any(score is not None for score in row.scores.get(metric, []))


def same_reading(metric: str, base: LoggedTask, tuned: LoggedTask) -> list[str]:
    """Return the task's metrics that read the answers for one metric, by all their filters."""
    own = metric.partition(",")[0]
    return [
        other
        for other in base.metrics
        if other.partition(",")[0] == own
        and other in tuned.metrics
        and all(None not in row.scores[other] for task in (base, tuned) for row in task.items)
    ]


def check_mean(task: LoggedTask, metric: str, side: str) -> None:
    """
    Check that the mean of a task's scores equals the mean that the tool reports, if it reports one.

    Raises:
        NotComparable: the means differ, as they do when the log has lost rows.
    """
    scores = [mean(answered.scores[metric]) for answered in task.items]
    reported = task.means.get(metric)
    if reported is not None and abs(mean(scores) - reported) > SAME_MEAN:
        raise NotComparable(
            f"the items in {side} have a mean {metric} of {mean(scores):g}, and it reports"
            f" {reported:g}: items are missing or were changed."
        )


def mean(values: list[Any]) -> float:
    """Return the mean of numbers."""
    return sum(values) / len(values)


def item(name: str, metric: str, readings: list[str], answered: Answered, base: Answered) -> Item:
    """
    Return a row as an item of `eaft eval`. Its score is the mean over its answers.

    Args:
        readings: see `same_reading`.
        base: the same row in the base's log, which gives it its number.
    """
    scores = {other.partition(",")[2]: mean(answered.scores[other]) for other in readings}
    values = [score for score in answered.scores[metric] if score is not None]
    limit = [answered.generation[key] for key in LIMITS if key in answered.generation]
    several = len(values) > 1
    return Item(
        task=name,
        doc_id=base.doc_id,
        metric=metric,
        prompt=answered.prompt,
        target=answered.target,
        response=answered.responses if several else answered.responses[0],
        score=mean(values),
        cut=answered.cut,
        **base.hashes,
        choices=answered.choices,
        max_gen_toks=limit[0] if limit and isinstance(limit[0], int) else None,
        scores=scores if len(scores) > 1 else None,
        repeats=values if several else None,
    )


def how_asked(log: Log, tasks: list[str], before: list[Item], after: list[Item]) -> Asked:
    """
    Return how a line's tasks were asked.

    Args:
        log: the base's; the tuned model's says the same.
        before, after: the line's items.
    """
    metric, _, metric_filter = before[0].metric.partition(",")
    logged = {name: log.tasks[name] for name in tasks}
    cuts = all(task.counts_cuts for task in logged.values())
    return Asked(
        version=one({name: task.version for name, task in logged.items()}),
        metric=metric,
        filter=metric_filter,
        num_fewshot=one({name: task.num_fewshot for name, task in logged.items()}),
        max_gen_toks=one({i.task: i.max_gen_toks for i in before}),
        cut={
            side: Cut(prompt=0, answer=sum("answer" in i.cut for i in items), thoughts=0)
            for side, items in (("before", before), ("after", after))
        }
        if cuts
        else {},
    )
