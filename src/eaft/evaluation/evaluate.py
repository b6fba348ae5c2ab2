"""`eaft eval`: what a model scores, and with a base model beside it, what it gained and what it forgot."""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eaft.errors import ConfigurationError
from eaft.evaluation.drift import PROMPTS, BaseAnswers, read_prompts
from eaft.evaluation.scores import (
    SEED,
    Item,
    Protocol,
    load,
    load_tokenizer,
    own_dtype,
    processes,
    score,
)
from eaft.evaluation.suite import Benchmark, Suite, load_suites, suites_help
from eaft.models import resolve_model
from eaft.provenance import environment, write_json

DESCRIPTION = """
Run lm-evaluation-harness tasks on a model and write every item. With --base, run the base model under the same protocol
too, and say what the fine-tuning changed: before, after, a 95% interval and a paired test, items lost and gained,
drift, and the worst regressions. Writes results.json, results.md, changes.png and the items (JSON Lines).

  eaft eval out --base Qwen/Qwen3-0.6B --suite quick
  eaft eval out --base Qwen/Qwen3-0.6B --suite general math --output_path eval/out
  eaft eval adapter_folder --base Qwen/Qwen3-0.6B --suite gsm8k my_tasks/mine.yaml --data_dir data
  accelerate launch -m eaft eval out --base Qwen/Qwen3-0.6B --suite general

suites (any lm-eval task, group or task file is one too; so is a YAML file with `suite`, `tasks` and perhaps `limit`):
"""
RESULTS_FILE = "results.json"
WORST = 20  # regressions shown


def main(argv: list[str]) -> None:
    """Parse the flags, evaluate, and print the report."""
    parser = argparse.ArgumentParser(
        prog="eaft eval",
        description=DESCRIPTION + suites_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a Hub id, a folder (also of a PEFT adapter) or a .gguf file")
    parser.add_argument("--base", help="the model it was fine-tuned from: compare with it")
    parser.add_argument("--suite", nargs="+", required=True, metavar="NAME", help="suites or tasks, as listed above")
    parser.add_argument("--output_path", metavar="DIR", help="where results go (default: eval/MODEL)")
    parser.add_argument("--data_dir", metavar="DIR", help="local data: TASK.jsonl or TASK_test.jsonl, as on the Hub")
    parser.add_argument("--include_path", metavar="DIR", help="a folder with lm-eval task files of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="at most the first N items of each lm-eval task")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="examples before each item (default: the task's)")
    parser.add_argument(
        "--apply_chat_template",
        action=argparse.BooleanOptionalAction,
        help="ask as a chat (default: if the base model, or without one the model, has a chat template)",
    )
    parser.add_argument("--system_instruction", metavar="TEXT", help="a system message before each item")
    parser.add_argument("--gen_kwargs", metavar="K=V,...", help="generation settings for all tasks, as lm-eval's")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of few-shot examples and sampling (default: {SEED})")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: the wider of the two saved)")
    parser.add_argument("--backend", choices=["hf", "vllm"], default="hf", help="lm-eval's model (default: hf)")
    parser.add_argument("--model_args", type=json.loads, default={}, metavar="JSON", help="more for the vllm backend")
    parser.add_argument("--prompts", default=str(PROMPTS), metavar="FILE", help="JSON Lines with a `prompt`, for drift")
    parser.add_argument("--drift_prompts", type=int, default=32, metavar="N", help="at most so many; 0: no drift")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="of the base model's answers to them")
    flags = vars(parser.parse_args(argv))
    protocol = Protocol(**{name: flags.pop(name) for name in Protocol.__dataclass_fields__ if name in flags})
    results = evaluate(protocol=protocol, drift_prompts=protocol.drift_prompts, **flags)
    if results is not None:
        print((Path(results["output_path"]) / "results.md").read_text())


def evaluate(
    model: str,
    suite: list[str],
    base: str | None = None,
    output_path: str | None = None,
    data_dir: str | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    prompts: str = str(PROMPTS),
    drift_prompts: int = 32,
    protocol: Protocol | None = None,
) -> dict[str, Any] | None:
    """
    Evaluate a model, and compare it with `base` if that is given; see `DESCRIPTION`.

    Returns:
        what `results.json` holds, on the first process; None on others.

    Raises:
        ConfigurationError: a missing model, task or data set, or an output folder that holds results.
    """
    protocol = protocol or Protocol()
    folder = Path(output_path or Path("eval") / Path(model).name)
    if (folder / RESULTS_FILE).is_file():
        raise ConfigurationError(f"output_path={str(folder)!r} holds results: choose another folder, or delete it.")
    if protocol.backend == "vllm":
        if find_spec("vllm") is None:
            raise ConfigurationError("backend='vllm' needs vLLM: pip install vllm, or take backend='hf'.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigurationError("backend='vllm' uses several GPUs by itself: start it without a launcher.")
    questions = read_prompts(prompts, drift_prompts) if base is not None and drift_prompts else []
    state = processes()
    with state.main_process_first():
        model, base = find_model(model), find_model(base) if base is not None else None
        tokenizer, base_tokenizer = shared_tokenizer(model, base, bool(questions))
        if protocol.dtype == "auto" and base is not None:
            protocol.dtype = own_dtype(base)
        suites, benchmarks = load_suites(suite, include_path, data_dir, limit)
    if protocol.apply_chat_template is None:
        protocol.apply_chat_template = tokenizer.chat_template is not None

    before = drift = None
    if base is None:
        after = measure(model, tokenizer, benchmarks, protocol)
    else:
        answers, found = BaseAnswers(folder), {}

        def record(loaded: Any) -> None:
            answers.record(loaded, base_tokenizer, questions, protocol.max_new_tokens, protocol.batch_size)

        def compare(loaded: Any) -> None:
            found.update(answers.drift(loaded))
            answers.free()

        before = measure(base, base_tokenizer, benchmarks, protocol, record if questions else None)
        if state.is_main_process:
            write_items(folder / "items_before", before)
        after = measure(model, tokenizer, benchmarks, protocol, compare if questions else None)
        drift = found or None
    if not state.is_main_process:
        return None

    results: dict[str, Any] = {
        "output_path": str(folder),
        "model": model,
        "base": base,
        "suites": {s.name: s.benchmarks for s in suites},
        "protocol": {**asdict(protocol), "limit": limit, "data_sha256": data_digest(after)},
        "environment": environment(),
    }
    write_items(folder / ("items_after" if base else "items"), after)
    if before is None:
        results["tasks"] = {name: score_summary(found) for name, found in after.items()}
    else:
        several = [s for s in suites if len(s.benchmarks) > 1]
        results.update(changes(before, after, several), drift=drift, worst=worst_regressions(before, after))
    from eaft.evaluation import report  # needs the same extra as lm-eval, whose absence has been reported by now

    (folder / "results.md").write_text(report.evaluation(results))
    if before is not None:
        report.draw_changes(results, folder / "changes.png")
    write_json(folder / RESULTS_FILE, results)
    return results


def find_model(model: str) -> str:
    """Return what `load` takes: a folder with an adapter as it is, all else as `resolve_model` finds it."""
    return model if Path(model, "adapter_config.json").is_file() else resolve_model(model)


def shared_tokenizer(model: str, base: str | None, drift: bool) -> tuple[Any, Any]:
    """
    Return the tokenizers for model and base: the base's for both if they have one vocabulary; one template in any case.

    Raises:
        ConfigurationError: drift is asked for, and the vocabularies differ.
    """
    tokenizer = load_tokenizer(model)
    if base is None:
        return tokenizer, None
    base_tokenizer = load_tokenizer(base)
    if base_tokenizer.chat_template is None:
        base_tokenizer.chat_template = tokenizer.chat_template
    if tokenizer.get_vocab() == base_tokenizer.get_vocab():
        return base_tokenizer, base_tokenizer
    if drift:
        raise ConfigurationError(
            f"{model} and {base} have different vocabularies ({len(tokenizer)} and {len(base_tokenizer)} tokens), and "
            "drift compares them token by token: leave it out with --drift_prompts 0."
        )
    tokenizer.chat_template = base_tokenizer.chat_template
    return tokenizer, base_tokenizer


def measure(
    model: str,
    tokenizer: Any,
    benchmarks: dict[str, Benchmark],
    protocol: Protocol,
    prepare: Callable[[Any], Any] | None = None,
) -> dict[str, list[Item]]:
    """
    Return a model's items (on the first process; empty on others).

    Args:
        model: see `eaft.evaluation.scores.load`.
        prepare: what else to do with the loaded model, on the first process: drift.
    """
    state = processes()
    lm = load(model, tokenizer, protocol)
    if prepare and state.is_main_process:
        prepare(lm.model)
    state.wait_for_everyone()
    found = {name: score(lm, benchmark, protocol) for name, benchmark in benchmarks.items()}
    del lm
    free_memory()
    return found


def free_memory() -> None:
    """Give back what deleted models held, so that the next one finds it free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def changes(
    before: dict[str, list[Item]], after: dict[str, list[Item]], suites: list[Suite]
) -> dict[str, dict[str, Any]]:
    """Return `tasks` and `means` (one a suite): each a `Change` as a mapping, tasks with their `metric`."""
    from eaft.evaluation.paired import mean_change, paired_change  # needs scipy, which comes with lm-eval

    scores: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    found = {}
    for name in after:
        pairs = pair(name, before[name], after[name])
        scores[name] = (np.array([a["score"] for a, _ in pairs]), np.array([b["score"] for _, b in pairs]))
        choices = np.array([len(item.get("choices", [])) for item in after[name]])
        found[name] = paired_change(*scores[name], num_choices=choices if choices.min() > 1 else None)
    means = {
        suite.name: mean_change([found[n] for n in suite.benchmarks], [scores[n] for n in suite.benchmarks])
        for suite in suites
    }
    return {
        "tasks": {name: {"metric": after[name][0]["metric"], **asdict(change)} for name, change in found.items()},
        "means": {name: asdict(change) for name, change in means.items()},
    }


def pair(name: str, before: list[Item], after: list[Item]) -> list[tuple[Item, Item]]:
    """
    Return the items of two models side by side.

    Raises:
        ConfigurationError: they are not answers to the same prompts.
    """
    keys = ("task", "doc_id", "prompt_hash", "target_hash", "doc_hash")
    if [[item[key] for key in keys] for item in before] != [[item[key] for key in keys] for item in after]:
        raise ConfigurationError(f"{name}: the two models were not asked the same; their items cannot be compared.")
    return list(zip(before, after, strict=True))


def worst_regressions(before: dict[str, list[Item]], after: dict[str, list[Item]]) -> list[dict[str, Any]]:
    """
    Return the worst regressions of each benchmark in turn, so that a large one does not hide the others.

    Worst is the largest fall of the score, and among equals, where there are choices, of the likelihood of the right
    one.
    """
    ranked = []
    for name in after:
        lost = [(a, b) for a, b in pair(name, before[name], after[name]) if b["score"] < a["score"]]
        lost.sort(key=lambda items: (items[1]["score"] - items[0]["score"], margin(items[1]) - margin(items[0])))
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
    """Return by how many nats the right choice leads the likeliest wrong one; 0 where there are no choices."""
    choices, target = item.get("choices"), item["target"]
    if not choices or not isinstance(target, int) or len(choices) < 2:
        return 0.0
    return choices[target] - max(choice for i, choice in enumerate(choices) if i != target)


def score_summary(items: list[Item]) -> dict[str, Any]:
    """Return one model's score on one task with its 95% interval."""
    from eaft.evaluation.paired import mean_interval

    scores = np.array([item["score"] for item in items])
    low, high = mean_interval(scores)
    return {"metric": items[0]["metric"], "n": len(scores), "score": float(scores.mean()), "low": low, "high": high}


def data_digest(items: dict[str, list[Item]]) -> str:
    """Return a digest of the rows and prompts measured, so that two results can be told to be of the same data."""
    digest = hashlib.sha256()
    for name in sorted(items):
        for item in items[name]:
            digest.update(f"{name} {item['task']} {item['doc_hash']} {item['prompt_hash']}\n".encode())
    return digest.hexdigest()


def write_items(folder: Path, items: dict[str, list[Item]]) -> None:
    """Write each benchmark's items as JSON Lines, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in items.items():
        file = folder / f"{Path(name).stem}.jsonl"
        staging = file.with_suffix(".tmp")
        staging.write_text("".join(json.dumps(item) + "\n" for item in found))
        os.replace(staging, file)


def read_items(folder: Path, names: list[str]) -> dict[str, list[Item]]:
    """Return what `write_items` wrote."""
    return {
        name: [json.loads(line) for line in (folder / f"{Path(name).stem}.jsonl").read_text().splitlines()]
        for name in names
    }
