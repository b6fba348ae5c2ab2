"""One model on lm-evaluation-harness tasks: a score, and every item with its own."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from eaft.errors import ConfigurationError
from eaft.evaluation.suite import Benchmark, quiet
from eaft.models import first_line

Item = dict[str, Any]
logger = logging.getLogger(__name__)
SEED = 1234  # lm-eval's own default for few-shot examples


@dataclass
class Protocol:
    """How a model is measured: what must be the same for two models to be compared."""

    apply_chat_template: bool | None = None  # None: if the tokenizer has a template
    enable_thinking: bool | None = None  # None: off where the template can turn it off, on where it cannot
    max_thinking_tokens: int = 8192  # of each generated answer, beside what the task gives the answer itself
    num_fewshot: int | None = None  # None: what each task says
    system_instruction: str | None = None
    gen_kwargs: str | None = None
    seed: int = SEED
    batch_size: int = 8
    dtype: str = "auto"  # the base model's own
    backend: str = "hf"
    model_args: dict[str, Any] = field(default_factory=dict)  # more for lm-eval's model
    drift_prompts: int = 128
    max_new_tokens: int = 64  # of each answer that drift is measured on


def processes() -> PartialState:
    """Return this launch's processes; accelerate must be told that there is no GPU to see them."""
    return PartialState(cpu=not torch.accelerator.is_available())


def load_model(model: str, dtype: str = "auto") -> Any:
    """
    Return a model, ready to be measured on this process's device.

    Args:
        model: a Hub id, a folder, or a folder with a PEFT adapter (its base model is found through it).
        dtype: `auto` is what it was saved in.

    Raises:
        ConfigurationError: the model cannot be loaded, or PEFT is needed and not installed.
    """
    device = processes().device
    loader: Any = AutoModelForCausalLM
    if Path(model, "adapter_config.json").is_file():
        if find_spec("peft") is None:
            raise ConfigurationError(f"{model} holds a PEFT adapter: pip install 'eaft[peft]'.")
        from peft import AutoPeftModelForCausalLM

        loader = AutoPeftModelForCausalLM
    try:
        return loader.from_pretrained(model, dtype=dtype).to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{model} cannot be loaded. ({first_line(error)})") from error


def own_dtype(model: str) -> str:
    """Return the dtype a model was saved in (`bfloat16`), an adapter's base model's; float32 where none is noted."""
    adapter = Path(model, "adapter_config.json")
    name = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else model
    return str(AutoConfig.from_pretrained(name).dtype or torch.float32).removeprefix("torch.")


def load_tokenizer(model: str) -> Any:
    """
    Return a model's tokenizer (an adapter's may be its base model's), padding left as generation needs it.

    Raises:
        ConfigurationError: there is none.
    """
    adapter = Path(model, "adapter_config.json")
    if adapter.is_file() and not Path(model, "tokenizer_config.json").is_file():
        model = json.loads(adapter.read_text())["base_model_name_or_path"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{model} has no tokenizer that can be loaded. ({first_line(error)})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(model: str, tokenizer: Any, protocol: Protocol) -> Any:
    """
    Return a model as lm-eval's, loaded once: `lm.model` is the torch model where the backend is `hf`.

    Args:
        model: a Hub id, a folder, or a folder with a PEFT adapter (its base model is found through it).

    Raises:
        ConfigurationError: the model cannot be loaded, or PEFT is needed and not installed.
    """
    if protocol.backend == "vllm":
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)  # vLLM reads it from disk; the template may be the other model's
            args = {"dtype": protocol.dtype, **protocol.model_args}
            return load_vllm(model, folder, protocol.batch_size, args)
    return wrap(load_model(model, protocol.dtype), tokenizer, protocol)


def ask(tokenizer: Any, prompt: Any, protocol: Protocol) -> str:
    """
    Return a prompt (a string or messages) as the text a model is asked with: by the chat template, or plainly.

    Plain text is the messages' contents, a blank line between them. A system instruction comes first.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if protocol.system_instruction:
        messages.insert(0, {"role": "system", "content": protocol.system_instruction})
    wanted = protocol.apply_chat_template
    if (tokenizer.chat_template is not None) if wanted is None else wanted:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return "\n\n".join(message["content"] for message in messages)


def score(lm: Any, benchmark: Benchmark, protocol: Protocol) -> list[Item]:
    """
    Run an lm-eval model on a benchmark and return its items (on the first process; none on others).

    An item's score is the first metric its task lists (with its first filter), which must be one number an item. It has
    `task`, `doc_id`, `prompt`, `target`, `response`, `score`, `scores` (of each filter the first metric has), `cut`
    (what of `prompt`, `answer` and `thoughts` was), where the task is multiple choice `choices` (their
    log-likelihoods, nats), and hashes of prompt, target and row, by which two models' items are matched.

    Args:
        lm: lm-eval's model, see `load` and `wrap`.
        protocol: its num_fewshot, system_instruction and gen_kwargs are as in lm-eval; None keeps what the task says,
            but that answers are cut to what fits the model's context (AIME asks for 32,768 tokens).

    Raises:
        ConfigurationError: a task whose first metric is not one number an item.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = benchmark.tasks
    limits = {
        name: list(range(min(benchmark.limit, len(task.eval_docs))))
        for name, task in tasks.items()
        if benchmark.limit is not None
    }
    for task in tasks.values():
        fit_context(task, lm)
    with quiet():
        output = simple_evaluate(
            model=lm,
            tasks=list(tasks.values()),
            task_manager=TaskManager(include_defaults=False),  # else it looks through its thousands of tasks
            samples=limits or None,
            num_fewshot=protocol.num_fewshot,
            apply_chat_template=bool(protocol.apply_chat_template),
            system_instruction=protocol.system_instruction,
            gen_kwargs=protocol.gen_kwargs,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=protocol.seed,
            numpy_random_seed=protocol.seed,
            torch_random_seed=protocol.seed,
            fewshot_random_seed=protocol.seed,
            confirm_run_unsafe_code=False,
        )
    return [] if output is None else [item for name in tasks for item in items(name, tasks[name], output)]


def asked(benchmark: Benchmark, protocol: Protocol, items: list[Item]) -> dict[str, Any]:
    """Return what a benchmark asked and how much of it was cut, for the report."""
    metric, _, metric_filter = items[0]["metric"].partition(",")
    versions = {str(task.VERSION) for task in benchmark.tasks.values()}
    fewshot = {task.config.num_fewshot for task in benchmark.tasks.values()}
    return {
        "version": ", ".join(sorted(versions)),
        "metric": metric,
        "filter": metric_filter,
        "num_fewshot": fewshot.pop() if len(fewshot) == 1 else None,
        "cut": {kind: sum(kind in item["cut"] for item in items) for kind in ("prompt", "answer", "thoughts")},
    }


def fit_context(task: Any, lm: Any) -> None:
    """Let a task ask for no longer answers than three quarters of the model's context; lm-eval would fail midway."""
    wanted = (task.config.generation_kwargs or {}).get("max_gen_toks", 0)
    most = 3 * getattr(lm, "max_length", wanted * 2) // 4
    if wanted > most:
        logger.warning(f"{task.config.task}: answers are cut at {most} tokens instead of {wanted}, to fit the context.")
        task.set_config(key="generation_kwargs", value={"max_gen_toks": most}, update=True)


def items(name: str, task: Any, output: dict[str, Any]) -> list[Item]:
    """Return one task's items from what lm-eval gives back, in the order of its rows."""
    key = metric_of(name, output)
    metric, metric_filter = key.split(",")
    found = []
    for sample in sorted(output["samples"][name], key=lambda sample: sample["doc_id"]):
        if sample["filter"] != metric_filter:
            continue
        value = sample[metric]
        if not isinstance(value, int | float | bool) or not math.isfinite(value):
            raise ConfigurationError(
                f"{name}: its first metric, {metric}, is not one finite number an item: {value!r}."
            )
        item = {"task": name, "doc_id": sample["doc_id"], "metric": key, "prompt": sample["arguments"][0][0]}
        if task.OUTPUT_TYPE == "multiple_choice":
            choices = [response[0] for response in sample["filtered_resps"]][: len(sample["arguments"])]
            item["choices"] = choices
            item["response"] = sample["arguments"][choices.index(max(choices))][1].strip()
        else:
            item["response"] = plain(sample["resps"][0][0])
        item.update(target=plain(sample["target"]), score=float(value), scores={metric_filter: float(value)}, cut=[])
        item.update({f"{part}_hash": sample[f"{part}_hash"] for part in ("prompt", "target", "doc")})
        found.append(item)
    return found


def metric_of(name: str, output: dict[str, Any]) -> str:
    """Return the key of a task's first metric with its first filter, as lm-eval writes it (`acc,none`)."""
    return next(key for key in output["results"][name] if "," in key and "_stderr" not in key)


def plain(value: Any) -> Any:
    """Return a value JSON can hold."""
    return json.loads(json.dumps(value, default=str))


def wrap(model: Any, tokenizer: Any, protocol: Protocol) -> Any:
    """Return a loaded model as lm-eval's `hf` model, sharing the items among this launch's processes."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)  # it warns of what is set right below
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=protocol.batch_size)
    state = processes()
    if state.num_processes > 1:
        lm._rank, lm._world_size, lm.accelerator = state.process_index, state.num_processes, Accelerator()
    return lm


def load_vllm(model: str, tokenizer: str, batch_size: int, model_args: dict[str, Any]) -> Any:
    """Return lm-eval's `vllm` model; a PEFT adapter runs on its base as vLLM's LoRA."""
    from lm_eval.api.registry import get_model

    return get_model("vllm").create_from_arg_obj(
        vllm_args(model, tokenizer, model_args), {"batch_size": batch_size, "device": "cuda"}
    )


def vllm_args(model: str, tokenizer: str, model_args: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of lm-eval's `vllm` model for a model or an adapter."""
    args: dict[str, Any] = {"pretrained": model, "tokenizer": tokenizer}
    config = Path(model, "adapter_config.json")
    if config.is_file():
        adapter = json.loads(config.read_text())
        args.update(pretrained=adapter["base_model_name_or_path"], lora_local_path=model, max_lora_rank=adapter["r"])
    return {**args, **model_args}
