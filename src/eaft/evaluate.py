"""Measure a model: scores on lm-evaluation-harness tasks, and drift from the base model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from eaft.errors import ConfigurationError, nearest
from eaft.statistics import kl_divergence


def load_model(model: str) -> tuple[Any, Any]:
    """Return a model, in the dtype it was saved in and ready to be measured, and its tokenizer (padding left)."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return loaded, tokenizer


def task_manager(tasks: list[str], task_path: str | None) -> Any:
    """
    Return an lm-eval registry that knows `tasks`: those of the folder `task_path`, and lm-eval's own if need be.

    Raises:
        ConfigurationError: lm-eval is not installed, or has no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigurationError("Evaluating needs lm-evaluation-harness: pip install 'eaft[compare]'.") from error
    if task_path is not None and not Path(task_path).is_dir():
        raise ConfigurationError(f"task_path={task_path!r}: there is no such folder.")
    # Indexing lm-eval's own thousands of tasks takes seconds
    manager = TaskManager(include_path=task_path, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=task_path)
    for task in tasks:
        if task not in manager.all_tasks:
            raise ConfigurationError(
                f"lm-eval knows no task {task!r}.{nearest(task, manager.all_tasks)} Your own go into task_path."
            )
    return manager


def score_tasks(
    model: Any, tokenizer: Any, tasks: list[str], manager: Any, batch_size: int, apply_chat_template: bool
) -> dict[str, dict[str, Any]]:
    """
    Run lm-eval tasks and return, for each, its score and its items.

    The score is the first metric the task lists (with its first filter), a mean over items in [0, 1]. Each item has
    `doc_id`, `target`, `response` and `score`, so that two models can be compared item by item.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    output = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=tasks,
        task_manager=manager,
        apply_chat_template=apply_chat_template,
        log_samples=True,
        bootstrap_iters=0,
    )
    scores = {}
    for task in tasks:
        result = output["results"][task]
        key = next(key for key in result if "," in key and "_stderr" not in key)
        metric, metric_filter = key.split(",")
        items = [
            {
                "doc_id": sample["doc_id"],
                "target": sample["target"],
                "response": sample["filtered_resps"],
                "score": sample[metric],
            }
            for sample in output["samples"][task]
            if sample["filter"] == metric_filter
        ]
        scores[task] = {"metric": key, "score": result[key], "n": len(items), "items": items}
    return scores


@dataclass(frozen=True)
class Answer:
    """A prompt and a model's own answer to it, as token ids."""

    prompt_ids: list[int]
    answer_ids: list[int]


def read_prompts(path: str, n: int) -> list[Any]:
    """
    Return the first `n` prompts (strings or messages) of a JSON Lines file with a `prompt` column.

    Raises:
        ConfigurationError: there is no such file, or a row without a prompt.
    """
    if not Path(path).is_file():
        raise ConfigurationError(f"{path}: there is no such file of prompts.")
    rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    if not rows or any("prompt" not in row for row in rows):
        raise ConfigurationError(f"{path}: expected JSON Lines with a `prompt` in every row.")
    return [row["prompt"] for row in rows[:n]]


@torch.no_grad()
def sample_answers(
    model: Any, tokenizer: Any, prompts: list[Any], max_new_tokens: int, seed: int = 0, batch_size: int = 16
) -> list[Answer]:
    """
    Sample one answer to each prompt from the model's own distribution: temperature 1, nothing cut off.

    Only then is the mean KL over the answers' positions an estimate of the divergence between the two models'
    distributions over answers (chain rule), and not between their behaviours on text neither would write.
    """
    answers = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(prompts), batch_size), desc="Sampling the base model's answers"):
            texts = [
                prompt
                if isinstance(prompt, str)
                else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
                for prompt in prompts[start : start + batch_size]
            ]
            # A chat template has written its own special tokens
            add_special = isinstance(prompts[start], str)
            batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=add_special).to(model.device)
            output = model.generate(
                **batch, max_new_tokens=max_new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
            )
            width = batch["input_ids"].shape[1]
            eos = model.generation_config.eos_token_id
            eos_ids = set(eos if isinstance(eos, list) else [eos])
            for row, mask in zip(output, batch["attention_mask"], strict=True):
                answer = row[width:].tolist()
                ends = [i for i, token in enumerate(answer) if token in eos_ids]
                answers.append(Answer(row[:width][mask.bool()].tolist(), answer[: ends[0] + 1] if ends else answer))
    return answers


@torch.no_grad()
def drift(base: Any, tuned: Any, answers: list[Answer]) -> dict[str, Any]:
    """
    Return mean KL(base || tuned) in nats per token over the base model's answers.

    Returns:
        `mean` (over all tokens), `tokens`, and `per_prompt` (each answer's own mean).
    """
    sums, counts = [], []
    for answer in tqdm(answers, desc="Drift"):
        ids = torch.tensor([answer.prompt_ids + answer.answer_ids], device=base.device)
        keep = len(answer.answer_ids) + 1  # the position before the answer predicts its first token
        log_probs = [model(ids, logits_to_keep=keep).logits[0, :-1].float().log_softmax(-1) for model in (base, tuned)]
        sums.append(kl_divergence(*log_probs).sum().item())
        counts.append(len(answer.answer_ids))
    return {
        "mean": sum(sums) / sum(counts),
        "tokens": sum(counts),
        "per_prompt": [s / n for s, n in zip(sums, counts, strict=True)],
    }
