"""
Logs of other tools as one form: what lm-eval (`--log_samples`) and inspect_ai (`.eval`) wrote.

Importing it imports neither tool. lm-eval's logs are JSON; inspect_ai's are read by its own reader.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from eaft.errors import ConfigurationError, first_line
from eaft.evaluation.results import LogRun, Part
from eaft.files import read_json, read_jsonl

Json = dict[str, Any]  # an object of a JSON file
Tool = Literal["lm-eval", "inspect_ai"]

# The results of one run of lm-eval; its samples have the same date
RESULTS = re.compile(r"_(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.json$")
SAMPLE_KEYS = ("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter")
# A task's settings that decide how an answer is made and graded. Rows and prompts are compared as
# they are
GRADING = ("filter_list", "metric_list", "output_type", "process_results", "repeats")
# A run's settings that can change every answer
RUN = ("model", "model_dtype", "batch_size", "device", "gen_kwargs", "limit", "fewshot_seed")
PROMPT = ("chat_template_sha", "system_instruction", "fewshot_as_multiturn")
# Arguments of lm-eval's models that name the model
MODEL_NAMES = ("pretrained", "peft", "delta", "model", "path", "engine")
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


@dataclass
class Answered:
    """
    One row of a task, with every answer that a model gave to it.

    Attributes:
        doc_id: the row's number in the task's data.
        row: a digest of the row's content.
        asked: digests of all that the model was asked with, one for each answer, sorted.
        prompt: what it was asked, as text.
        target: the right answer.
        responses: one for each answer.
        scores: by metric and filter (`acc,none`), one for each answer; None is no number in [0, 1].
        generation: the settings of generation.
        hashes: lm-eval's `prompt_hash`, `target_hash` and `doc_hash`.
        choices: the log-likelihood of each choice (nats), where there are any.
        cut: the parts that were cut, as far as the log says.
        problem: why the row has no score; None: it has.
    """

    doc_id: int
    row: str
    asked: list[str]
    prompt: str
    target: Any
    responses: list[Any]
    scores: dict[str, list[float | None]]
    generation: Json
    hashes: dict[str, str]
    choices: list[float] | None = None
    cut: list[Part] = field(default_factory=list)
    problem: str | None = None


@dataclass
class LoggedTask:
    """
    One task of a log.

    Attributes:
        version: the task's.
        num_fewshot: examples before each item; None: the log does not say.
        metrics: metric and filter (`acc,none`) in the task's order, where higher is better.
        means: the tool's own mean score by metric, where it is a plain mean over rows.
        grading: the settings that decide how answers are made and graded.
        items: the rows.
        counts_cuts: whether the log says which answers were cut.
    """

    version: Any
    num_fewshot: int | None
    metrics: list[str]
    means: dict[str, float]
    grading: Json
    items: list[Answered]
    counts_cuts: bool


@dataclass
class Log:
    """
    One model's log.

    Attributes:
        tool: the tool that wrote it.
        run: the model, and how it ran.
        tasks: by name.
        groups: the tasks of each group that has a score of its own, the outermost groups only.
    """

    tool: Tool
    run: LogRun
    tasks: dict[str, LoggedTask]
    groups: dict[str, list[str]]


def read_log(path: str) -> Log:
    """
    Return a log: of lm-eval a folder or a `results_*.json` in it, of inspect_ai a `.eval` file or a
    folder of them.

    Raises:
        ConfigurationError: there is no log, it is of several models, or it cannot be read.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise ConfigurationError(f"--from: there is no {path}.")
    if place.is_dir():
        results = sorted(file for file in place.rglob("*.json") if RESULTS.search(file.name))
        evals = sorted(place.rglob("*.eval"))
    else:
        results = [place] if RESULTS.search(place.name) else []
        evals = [place] if place.suffix == ".eval" else []
    if bool(results) == bool(evals):
        what = "logs of both lm-eval and inspect_ai" if results else "no log"
        raise ConfigurationError(
            f"--from: {path} holds {what}: expected lm-eval's results_DATE.json, with"
            " samples_TASK_DATE.jsonl beside it (`lm_eval --log_samples --output_path DIR`), or"
            " inspect_ai's .eval."
        )
    return read_lm_eval(path, results) if results else read_inspect(path, evals)


def read_lm_eval(path: str, files: list[Path]) -> Log:
    """
    Return what lm-eval wrote, of one run or of several with different tasks.

    Args:
        path: as the user gave it.
        files: the results of each run.
    """
    tasks: dict[str, LoggedTask] = {}
    groups: dict[str, list[str]] = {}
    runs: list[LogRun] = []
    for file in files:
        way = "it is not what lm-eval writes."
        results = read_json(file, Json, way)
        if not {"results", "configs", "versions", "config"} <= results.keys():
            raise ConfigurationError(f"{file}: {way}")
        runs.append(lm_eval_run(path, results))
        date = RESULTS.search(file.name)
        samples = {
            name: file.with_name(f"samples_{name}_{date[1] if date else ''}.jsonl")
            for name in results["configs"]
        }
        found = {name: place for name, place in samples.items() if place.is_file()}
        if not found:
            raise ConfigurationError(
                f"{file} has no samples_*.jsonl beside it: run lm_eval with --log_samples."
            )
        check_new(path, file, found, tasks)
        tasks |= {name: lm_eval_task(name, place, results) for name, place in found.items()}
        groups |= lm_eval_groups(results)
    check_one_model(path, runs)
    return Log("lm-eval", runs[-1], tasks, groups)


def check_new(path: str, file: Path, names: Iterable[str], tasks: dict[str, LoggedTask]) -> None:
    """
    Check that no task is in two runs.

    Raises:
        ConfigurationError: one is.
    """
    for name in names:
        if name in tasks:
            raise ConfigurationError(
                f"--from: {path} holds task {name} twice: name one run's file, as {file}."
            )


def check_one_model(path: str, runs: list[LogRun]) -> None:
    """
    Check that several runs are of one model.

    Raises:
        ConfigurationError: they are of several.
    """
    if len(models := sorted({run.model for run in runs})) > 1:
        raise ConfigurationError(
            f"--from: {path} holds logs of {len(models)} models ({', '.join(models[:3])}): name one"
            " model's folder."
        )


def lm_eval_run(path: str, results: Json) -> LogRun:
    """Return how one run of lm-eval was done."""
    config = results["config"]
    args = config.get("model_args") or {}
    if isinstance(args, str):
        args = dict(part.split("=", 1) for part in args.split(",") if "=" in part)
    named = [str(args[name]) for name in ("peft", "pretrained", "model") if name in args]
    settings = {name: config[name] for name in RUN if name in config}
    settings |= {name: results[name] for name in PROMPT if name in results}
    settings |= {name: value for name, value in args.items() if name not in MODEL_NAMES}
    settings |= {"transformers": results.get("transformers_version")}
    date = results.get("date")
    return LogRun(
        path=path,
        model=named[0] if named else str(results.get("model_name") or config.get("model")),
        version=results.get("lm_eval_version"),
        date=datetime.fromtimestamp(date, UTC).isoformat(timespec="seconds") if date else None,
        settings=settings,
    )


def lm_eval_groups(results: Json) -> dict[str, list[str]]:
    """
    Return the tasks of each group with a score of its own: of the outermost such groups.

    A group without one only gathers tasks that have nothing in common.
    """
    children: dict[str, list[str]] = results.get("group_subtasks") or {}
    scored = {
        name
        for name in children
        if any("," in key for key in (results.get("groups") or {}).get(name, {}))
    }

    def leaves(name: str) -> list[str]:
        below = [leaves(child) for child in children.get(name, [])]
        return [leaf for part in below for leaf in part] if below else [name]

    def outermost(name: str) -> list[str]:
        if name in scored:
            return [name]
        below = [outermost(child) for child in children.get(name, [])]
        return [group for part in below for group in part]

    inner = {child for part in children.values() for child in part}
    tops = [outermost(name) for name in children if name not in inner]
    return {name: sorted(set(leaves(name))) for part in tops for name in part}


def lm_eval_task(name: str, file: Path, results: Json) -> LoggedTask:
    """Return one task of a run of lm-eval; `file` has its samples."""
    config, shots = results["configs"][name], results.get("n-shot", {})
    better = results.get("higher_is_better", {}).get(name, {})
    scores = results["results"].get(name, {})
    metrics = [
        key
        for key in scores
        if "," in key and "_stderr," not in key and better.get(key.partition(",")[0]) is not False
    ]
    means = {
        metric["metric"]
        for metric in config.get("metric_list") or []
        if metric.get("aggregation") == "mean" and isinstance(metric.get("metric"), str)
    }
    samples: dict[int, list[Json]] = defaultdict(list)
    for sample in read_jsonl(file, Json, "it is not what lm-eval writes."):
        if lacking := [key for key in SAMPLE_KEYS if key not in sample]:
            raise ConfigurationError(f"{file}: no {lacking[0]!r}: it is not what lm-eval writes.")
        samples[sample["doc_id"]].append(sample)
    return LoggedTask(
        version=results["versions"].get(name),
        num_fewshot=shots.get(name, config.get("num_fewshot")),
        metrics=metrics,
        means={
            key: scores[key]
            for key in metrics
            if key.partition(",")[0] in means and isinstance(scores[key], int | float)
        },
        grading={key: addressless(config[key]) for key in GRADING if key in config},
        items=[
            lm_eval_item(config.get("output_type"), samples[i], metrics) for i in sorted(samples)
        ],
        counts_cuts=False,
    )


def addressless(setting: Any) -> Any:
    """Return a setting without the addresses of functions that lm-eval has no source of."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", json.dumps(setting, sort_keys=True))


def lm_eval_item(output_type: str | None, samples: list[Json], metrics: list[str]) -> Answered:
    """
    Return one row of a task of lm-eval.

    Args:
        samples: the row's, one for each filter.
        metrics: see `LoggedTask`.
    """
    first = samples[0]
    by_filter = {sample["filter"]: sample for sample in samples}
    # `gen_args_0: {arg_0: prompt, arg_1: a choice or settings}` and so on, one for each request
    requests = [list(request.values()) for request in first["arguments"].values()]
    prompt = requests[0][0]
    prompt = prompt if isinstance(prompt, str) else json.dumps(prompt)
    target, choices = first["target"], None
    response = first["resps"][0]
    if output_type == "multiple_choice":
        # Requests without a prompt are of acc_mutual_info, and no choices
        asked = [i for i, request in enumerate(requests) if request[0] or not requests[0][0]]
        choices = [float(first["filtered_resps"][i][0]) for i in asked]
        response = [str(requests[asked[choices.index(max(choices))]][1]).strip()]
        target = int(target) if str(target).isdecimal() else target
    generation = next((part for part in requests[0] if isinstance(part, dict)), {})
    texts = [[part for part in request if not isinstance(part, dict)] for request in requests]
    return Answered(
        doc_id=first["doc_id"],
        row=digest(first["doc"]),
        asked=[digest(texts)],
        prompt=prompt,
        target=target,
        responses=response if len(response) == 1 else [response],
        scores={key: [logged_score(by_filter, key)] for key in metrics},
        generation=generation,
        hashes={
            name: first.get(name) or digest(value)
            for name, value in (
                ("prompt_hash", prompt),
                ("target_hash", target),
                ("doc_hash", first["doc"]),
            )
        },
        choices=choices,
    )


def logged_score(by_filter: dict[str, Json], key: str) -> float | None:
    """Return the score of a row by metric and filter; None if it is no number in [0, 1]."""
    metric, _, name = key.partition(",")
    return unit(by_filter.get(name, {}).get(metric))


def unit(value: Any) -> float | None:
    """Return a number in [0, 1] as it is, and anything else as None."""
    if not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
        return None
    return float(value)


def digest(value: Any) -> str:
    """Return the SHA-256 of a text, or of a value as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def read_inspect(path: str, files: list[Path]) -> Log:
    """
    Return what inspect_ai wrote: one task from each file.

    Of a folder's files, those of runs that did not end well are left out.

    Args:
        path: as the user gave it.
        files: `.eval`.
    """
    if find_spec("inspect_ai") is None:
        raise ConfigurationError(
            f"--from: {path} is of inspect_ai, which is missing: pip install 'eaft[inspect-ai]'."
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
            f"--from: {path} is of no run that ended well (status: {states}): `inspect eval-retry`"
            " goes on with one."
        )
    tasks: dict[str, LoggedTask] = {}
    for file, log in done.items():
        check_new(path, file, [log.eval.task], tasks)
        with reading(file):
            tasks[log.eval.task] = inspect_task(file, log)
    runs = [inspect_run(path, log) for log in done.values()]
    check_one_model(path, runs)
    return Log("inspect_ai", runs[-1], tasks, {})


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """
    Make one line of whatever inspect_ai's reader raises.

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

    What the model was asked is read from its first call: the conversation that the log keeps can be
    another (inspect_ai writes shuffled choices back in order).

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
    Return a score as a number, by inspect_ai's own reading; None if it is no number in [0, 1], as
    of an answer that could not be graded.
    """
    if score is None:
        return None
    from inspect_ai.scorer import value_to_float

    value = score.value
    if isinstance(value, str):
        known = value in LETTERS or value.lower() in WORDS
        # Of another text inspect_ai makes 0
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
