"""Scores of one model on lm-evaluation-harness tasks, item by item."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import random
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from eaft.errors import ConfigurationError
from eaft.evaluation.asking import check_thinking, settled, thinking_of
from eaft.evaluation.launch import processes
from eaft.evaluation.pairs import one
from eaft.evaluation.progress import Progress
from eaft.evaluation.protocol import Protocol
from eaft.evaluation.results import Asked, Cut, Item, Part
from eaft.evaluation.suite import Benchmark, quiet

logger = logging.getLogger(__name__)

CUTS: tuple[Part, ...] = ("prompt", "answer", "thoughts")


def score(
    lm: Any, benchmark: Benchmark, protocol: Protocol, progress: Progress | None = None
) -> list[Item]:
    """
    Run an lm-eval model on a benchmark and return its items (on the first process; none on others).

    An item's score is the first metric its task lists (with its first filter), which must be one
    number an item. Two models' items are matched by the hashes of prompt, target and row.

    Args:
        lm: lm-eval's model, see `load` and `wrap`.
        protocol: its num_fewshot, system_instruction and gen_kwargs are as in lm-eval; None keeps
            the task's own. Answers are cut to fit the model's context (AIME asks for 32,768
            tokens).
        progress: shows how far it is.

    Raises:
        ConfigurationError: the first metric of a task is not one number an item; or as in
            `check_thinking`.
    """
    tokenizer = getattr(lm, "tokenizer", None)
    if tokenizer is None:  # not a model that we loaded
        protocol = replace(
            protocol, apply_chat_template=bool(protocol.apply_chat_template), enable_thinking=False
        )
    else:
        check_thinking({benchmark.name: benchmark}, tokenizer, protocol)
        protocol = settled(protocol, tokenizer)
    tasks = benchmark.tasks
    sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    samples = None
    if benchmark.limit is not None:
        sizes = {name: min(benchmark.limit, size) for name, size in sizes.items()}
        samples = {name: list(range(size)) for name, size in sizes.items()}
    lm.progress = progress
    if progress is not None:
        progress.start(benchmark.name, sum(sizes.values()))
    by_task: dict[str, list[Item]] = {}
    for thinking in (False, True):
        part = {name: task for name, task in tasks.items() if thinks(task, protocol) == thinking}
        if part:
            output = run(lm, part, samples, protocol, thinking)
            by_task.update(
                {name: items(name, task, output, lm) for name, task in part.items()}
                if output
                else {}
            )
    return [item for name in tasks for item in by_task.get(name, [])]


def thinks(task: Any, protocol: Protocol) -> bool:
    """
    Return whether a model thinks before it answers this task: if it thinks, and answers in words.
    """
    return bool(protocol.enable_thinking) and task.OUTPUT_TYPE == "generate_until"


def run(
    lm: Any,
    tasks: dict[str, Any],
    samples: dict[str, list[int]] | None,
    protocol: Protocol,
    thinking: bool,
) -> Any:
    """
    Return lm-eval's results of each task's `samples` (row numbers; None: all rows); None on
    processes other than the first.
    """
    from eaft.evaluation.lm_eval_internals import evaluate

    if hasattr(lm, "think"):
        lm.think(thinking, thinking_of(lm.tokenizer, protocol))
    random.seed(protocol.seed)
    np.random.seed(protocol.seed)  # noqa: NPY002 - as lm-eval does
    torch.manual_seed(protocol.seed)
    with quiet(), contextlib.ExitStack() as stack:
        for task in tasks.values():
            stack.enter_context(settings(task, lm, protocol, thinking))
        output = evaluate(
            lm,
            {"tasks": tasks},
            samples=samples,
            apply_chat_template=protocol.apply_chat_template,
            fewshot_as_multiturn=True,
            system_instruction=protocol.system_instruction,
            log_samples=True,
            bootstrap_iters=0,
        )
    cuts = [cuts for cuts in lm.gather_object(getattr(lm, "cuts", {}), dst=0) or [] if cuts]
    # Under tp_plan every process has it all
    return {**output, "cuts": dict(ChainMap(*cuts))} if processes().is_main_process else None


@contextlib.contextmanager
def settings(task: Any, lm: Any, protocol: Protocol, thinking: bool) -> Iterator[None]:
    """
    Give a task the protocol's settings while the block runs, by lm-eval's own rules: a task without
    examples keeps none.

    Answers, with room for thoughts, are cut at three quarters of the model's context; lm-eval would
    fail in the middle.
    """
    own = copy.deepcopy((task.config.num_fewshot, task.config.generation_kwargs))
    task.set_config("num_fewshot", num_fewshot(task, protocol))
    task.set_fewshot_seed(protocol.seed)
    if task.OUTPUT_TYPE == "generate_until":
        task.set_config("generation_kwargs", generation_settings(task, lm, protocol, thinking))
    try:
        yield
    finally:
        task.set_config("num_fewshot", own[0])
        task.set_config("generation_kwargs", own[1])


def num_fewshot(task: Any, protocol: Protocol) -> int:
    """Return how many examples an item of this task is asked with."""
    own = task.config.num_fewshot
    return (own or 0) if protocol.num_fewshot is None or own == 0 else protocol.num_fewshot


def generation_settings(task: Any, lm: Any, protocol: Protocol, thinking: bool) -> dict[str, Any]:
    """
    Return a task's `generation_kwargs` for lm-eval, with `max_gen_toks` (thoughts and answer) that
    fit the model's context.
    """
    from eaft.evaluation.lm_eval_internals import (
        normalize_gen_kwargs,
        simple_parse_args_string,
    )

    settings = {
        **(task.config.generation_kwargs or {}),
        **simple_parse_args_string(protocol.gen_kwargs),
    }
    with quiet():
        wanted = normalize_gen_kwargs(settings, getattr(lm, "max_gen_toks", 256))["max_gen_toks"]
    wanted += protocol.max_thinking_tokens if thinking else 0
    most = 3 * getattr(lm, "max_length", wanted * 2) // 4
    if wanted > most:
        logger.warning(
            f"{task.config.task}: answers are cut at {most} tokens instead of {wanted}, to fit the"
            " context."
        )
    return {**settings, "max_gen_toks": min(wanted, most)}


def asked(benchmark: Benchmark, protocol: Protocol, items: dict[str, list[Item]]) -> Asked:
    """
    Return how a benchmark was asked, and how many items were cut.

    Args:
        items: by model, whose names become the keys of `cut`. All models were asked the same.
    """
    first = next(iter(items.values()))
    metric, _, metric_filter = first[0].metric.partition(",")
    return Asked(
        version=one({name: task.VERSION for name, task in benchmark.tasks.items()}),
        metric=metric,
        filter=metric_filter,
        num_fewshot=one(
            {name: num_fewshot(task, protocol) for name, task in benchmark.tasks.items()}
        ),
        max_gen_toks=one({item.task: item.max_gen_toks for item in first}),
        cut={model: count_cuts(answered) for model, answered in items.items()},
    )


def count_cuts(items: list[Item]) -> Cut:
    """Return for each part how many items had it cut."""
    return Cut(**{part: sum(part in item.cut for item in items) for part in CUTS})


def items(name: str, task: Any, output: dict[str, Any], lm: Any) -> list[Item]:
    """Return one task's items from lm-eval's results, in the order of its rows."""
    key = metric_of(name, output)
    metric, metric_filter = key.split(",")
    samples: dict[int, dict[str, Any]] = {}
    scores: dict[int, dict[str, float]] = {}
    for sample in output["samples"][name]:
        if metric not in sample:
            continue
        value = sample[metric]
        if not isinstance(value, int | float | bool) or not math.isfinite(value):
            raise ConfigurationError(
                f"{name}: its first metric, {metric}, is not one finite number an item: {value!r}."
            )
        scores.setdefault(sample["doc_id"], {})[sample["filter"]] = float(value)
        if sample["filter"] == metric_filter:
            samples[sample["doc_id"]] = sample
    return [item(name, key, task, samples[i], scores[i], output, lm) for i in sorted(samples)]


def item(
    name: str,
    metric: str,
    task: Any,
    sample: dict[str, Any],
    scores: dict[str, float],
    output: dict[str, Any],
    lm: Any,
) -> Item:
    """
    Return one item.

    Args:
        metric: with its filter, as lm-eval writes it: `acc,none`.
        sample: lm-eval's record of the row, for this filter.
        scores: by filter.
    """
    choices = None
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = [response[0] for response in sample["filtered_resps"]]
        choices = choices[: len(sample["arguments"])]
        response = sample["arguments"][choices.index(max(choices))][1].strip()
    else:
        response = plain(sample["resps"][0][0])
    generates = task.OUTPUT_TYPE == "generate_until"
    return Item(
        task=name,
        doc_id=sample["doc_id"],
        metric=metric,
        prompt=sample["arguments"][0][0],
        target=plain(sample["target"]),
        response=response,
        score=scores[metric.partition(",")[2]],
        cut=cut(name, sample, output, lm),
        prompt_hash=sample["prompt_hash"],
        target_hash=sample["target_hash"],
        doc_hash=sample["doc_hash"],
        choices=choices,
        max_gen_toks=sample["arguments"][0][1]["max_gen_toks"] if generates else None,
        scores=scores if len(scores) > 1 else None,
    )


def cut(name: str, sample: dict[str, Any], output: dict[str, Any], lm: Any) -> list[Part]:
    """
    Return the parts of an item that were cut: any of its prompts on the left, its answer or its
    thoughts at the limit.
    """
    parts = set(output["cuts"].get((name, sample["doc_id"]), ()))
    cuts_prompt = getattr(lm, "cuts_prompt", lambda *arguments: False)
    if any(cuts_prompt(*arguments[:2]) for arguments in sample["arguments"]):
        parts.add("prompt")
    return [part for part in CUTS if part in parts]


def metric_of(name: str, output: dict[str, Any]) -> str:
    """
    Return the key of a task's first metric with its first filter, as lm-eval writes it
    (`acc,none`).
    """
    return next(key for key in output["results"][name] if "," in key and "_stderr" not in key)


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    return json.loads(json.dumps(value, default=str))
