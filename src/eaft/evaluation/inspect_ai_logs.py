"""What inspect_ai wrote as `.eval`, as a `Log`, read by its own reader."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eaft.errors import ConfigurationError, first_line
from eaft.evaluation.logged import (
    Answered,
    Log,
    LoggedTask,
    check_new,
    digest,
    unit,
)
from eaft.evaluation.results import LogRun

# inspect_ai's settings of generation that change no answer; sampling seeds may differ
NO_GENERATION = {
    "adaptive_connections",
    "attempt_timeout",
    "batch",
    "cache",
    "cache_prompt",
    "extra_headers",
    "fail_on_refusal",
    "logprobs",
    "max_connections",
    "max_retries",
    "prompt_logprobs",
    "seed",
    "stream_idle_timeout",
    "timeout",
    "top_logprobs",
}

LETTERS = {"C", "I", "P", "N"}  # inspect_ai's: correct, incorrect, partly, no answer
WORDS = {"yes", "no", "true", "false"}


def read_inspect(path: str, files: list[Path]) -> Log:
    """
    Return what inspect_ai wrote: one task from each file.

    Files of runs that did not end well are left out.

    Args:
        path: as the user gave it.
        files: `.eval`.
    """
    if find_spec("inspect_ai") is None:
        raise ConfigurationError(
            f"--from: {path} needs inspect_ai, which is missing: pip install 'eaft[inspect-ai]'."
        )
    from inspect_ai.log import read_eval_log

    headers = {}
    for file in files:
        with reading(file):
            headers[file] = read_eval_log(str(file), header_only=True)
    done = {
        file: log
        for file, log in headers.items()
        if log.status == "success" and not log.invalidated and log.results is not None
    }
    if not done:
        states = ", ".join(sorted({log.status for log in headers.values()}))
        raise ConfigurationError(
            f"--from: {path} has no run that ended well (status: {states}): `inspect eval-retry`"
            " continues one."
        )
    tasks: dict[str, LoggedTask] = {}
    for file, log in done.items():
        check_new(path, file, [log.eval.task], tasks)
        with reading(file):
            tasks[log.eval.task] = inspect_task(file, log)
    runs = [inspect_run(path, log) for log in done.values()]
    return Log.of_runs("inspect_ai", path, runs, tasks, {})


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """
    Turn any error of inspect_ai's reader into one line.

    Raises:
        ConfigurationError: it cannot read the file.
    """
    try:
        yield
    except Exception as error:  # its reader raises many kinds
        raise ConfigurationError(
            f"{file} cannot be read by inspect_ai {version('inspect_ai')}: {first_line(error)}"
        ) from error


def inspect_run(path: str, log: Any) -> LogRun:
    """Return how a run of inspect_ai was done."""
    spec = log.eval
    args = {k: v for k, v in spec.model_args.items() if isinstance(v, str | int | float | bool)}
    settings = {"epochs": spec.config.epochs, "limit": spec.config.limit} | args
    settings |= {f"task argument {name}": value for name, value in spec.task_args.items()}
    return LogRun(
        path=path,
        model=str(args.get("model_path") or spec.model),
        version=spec.packages.get("inspect_ai"),
        date=str(spec.created),
        settings=json.loads(json.dumps(settings, default=str)),
    )


def inspect_task(file: Path, log: Any) -> LoggedTask:
    """
    Return the task of a log of inspect_ai.

    Args:
        log: its header.
    """
    from inspect_ai.log import read_eval_log_samples

    metrics: list[str] = []
    means: dict[str, float] = {}
    for score in log.results.scores:
        if score.name != score.scorer or not score.metrics:  # a part of a score, as a dict has them
            continue
        name, metric = next(iter(score.metrics.items()))
        key = f"{name},{score.name}"
        if key not in metrics:
            metrics.append(key)
        if name in ("accuracy", "mean") and score.reducer in (None, "mean"):
            means[key] = metric.value
    samples: dict[int | str, list[Any]] = defaultdict(list)
    for sample in read_eval_log_samples(str(file), resolve_attachments=True):
        samples[sample.id].append(inspect_sample(sample, log.eval.model, metrics))
    numbered = all(isinstance(i, int) for i in samples)
    order = sorted(samples) if numbered else sorted(samples, key=str)
    return LoggedTask(
        version=log.eval.task_version,
        num_fewshot=None,
        metrics=metrics,
        means=means,
        grading={
            "scorers": [scorer.model_dump(mode="json") for scorer in log.eval.scorers or []],
            "solver": [(step.solver, step.params) for step in log.plan.steps],
        },
        items=[together(int(i) if numbered else n, samples[i]) for n, i in enumerate(order)],
        counts_cuts=True,
    )


def inspect_sample(sample: Any, model: str, metrics: list[str]) -> Answered:
    """
    Return one answer, of one epoch, to a row of inspect_ai.

    What the model was asked is read from its first call: the conversation in the log can differ
    (inspect_ai writes shuffled choices back in order).

    Args:
        model: inspect_ai's name of the model.
        metrics: see `LoggedTask`.
    """
    call = next(
        (e for e in sample.events if e.event == "model" and e.model == model and e.role is None),
        None,
    )
    before = itertools.takewhile(lambda message: message.role != "assistant", sample.messages)
    plain = [plain_message(message) for message in (call.input if call else before)]
    prompt = "\n\n".join(text for _, text in plain)
    tools = [tool.model_dump(mode="json") for tool in call.tools] if call else []
    settings = call.config.model_dump(mode="json", exclude_none=True) if call else {}
    row = [dumped(sample.input), sample.choices]
    scores = sample.scores or {}
    graded = {key: inspect_score(scores.get(key.partition(",")[2])) for key in metrics}
    stops = {choice.stop_reason for choice in sample.output.choices}
    problem = f"it ended with an error ({first_line_of(sample.error)})" if sample.error else None
    return Answered(
        doc_id=0,
        row=digest(row),
        asked=[digest([plain, tools])],
        prompt=prompt,
        target=sample.target,
        responses=[sample.output.completion],
        scores={key: [value] for key, value in graded.items()},
        generation={k: v for k, v in settings.items() if k not in NO_GENERATION},
        hashes={
            "prompt_hash": digest(prompt),
            "target_hash": digest(sample.target),
            "doc_hash": digest(row),
        },
        cut=["answer"] if stops & {"max_tokens", "model_length"} else [],
        problem=problem,
    )


def first_line_of(error: Any) -> str:
    """Return the first line of an error that a log of inspect_ai has."""
    return str(error.message).strip().partition("\n")[0]


def plain_message(message: Any) -> tuple[str, str]:
    """Return a message's role and its content as text, without the ids that each run draws anew."""
    parts = message.content if isinstance(message.content, list) else [message.content]
    texts = [part if isinstance(part, str) else json.dumps(dumped(part)) for part in parts]
    calls = getattr(message, "tool_calls", None) or []
    texts += [json.dumps([call.function, call.arguments], default=str) for call in calls]
    return message.role, "\n".join(texts)


def dumped(value: Any) -> Any:
    """Return an input of inspect_ai as JSON values without ids: a text, messages or a part."""
    if isinstance(value, list):
        return [dumped(part) for part in value]
    if hasattr(value, "role"):
        return plain_message(value)
    return (
        value.model_dump(mode="json", exclude_none=True) if hasattr(value, "model_dump") else value
    )


def inspect_score(score: Any) -> float | None:
    """
    Return a score as a number, as inspect_ai reads it; None if it is no number in [0, 1], for
    example if the answer could not be graded.
    """
    if score is None:
        return None
    from inspect_ai.scorer import value_to_float

    value = score.value
    if isinstance(value, str):
        known = value in LETTERS or value.lower() in WORDS
        # inspect_ai reads any other text as 0
        value = value_to_float()(value) if known or is_number(value) else None
    return unit(value)


def is_number(text: str) -> bool:
    """Return whether a text is a number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def together(doc_id: int, epochs: list[Answered]) -> Answered:
    """Return the answers of several epochs to one row as one, in the order of their content."""
    epochs = sorted(epochs, key=lambda e: (e.asked, str(e.responses), str(e.scores)))
    first = epochs[0]
    return Answered(
        doc_id=doc_id,
        row=first.row if len({e.row for e in epochs}) == 1 else digest([e.row for e in epochs]),
        asked=[e.asked[0] for e in epochs],
        prompt=first.prompt,
        target=first.target,
        responses=[e.responses[0] for e in epochs],
        scores={key: [e.scores[key][0] for e in epochs] for key in first.scores},
        generation=first.generation,
        hashes=first.hashes,
        cut=["answer"] if any(e.cut for e in epochs) else [],
        problem=next((e.problem for e in epochs if e.problem), None),
    )
