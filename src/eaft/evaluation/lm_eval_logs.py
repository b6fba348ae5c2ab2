"""What lm-eval wrote with `--log_samples`, as a `Log`."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eaft.errors import ConfigurationError
from eaft.evaluation.logged import (
    Answered,
    Json,
    Log,
    LoggedTask,
    check_new,
    digest,
    unit,
)
from eaft.evaluation.results import LogRun
from eaft.files import read_json, read_jsonl

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
        present = {name: place for name, place in samples.items() if place.is_file()}
        if not present:
            raise ConfigurationError(
                f"{file} has no samples_*.jsonl beside it: run lm_eval with --log_samples."
            )
        check_new(path, file, present, tasks)
        tasks |= {name: lm_eval_task(name, place, results) for name, place in present.items()}
        groups |= lm_eval_groups(results)
    return Log.of_runs("lm-eval", path, runs, tasks, groups)


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
    Return the tasks of each group that has a score of its own; of nested groups, the outermost.

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
    """Return a setting without the addresses of functions whose source lm-eval lacks."""
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
        # Requests without a prompt belong to acc_mutual_info; they are no choices
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
