"""One model on lm-evaluation-harness tasks: a score, and every item with its own."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import random
import tempfile
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from jinja2 import TemplateError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from eaft.errors import ConfigurationError, first_line
from eaft.evaluation.pairs import one
from eaft.evaluation.progress import Progress
from eaft.evaluation.protocol import Protocol
from eaft.evaluation.results import Asked, Cut, Item, Part
from eaft.evaluation.suite import Benchmark, quiet
from eaft.evaluation.thinking import NONE, SWITCHES, Thinking, decide, find_thinking
from eaft.models import adapter_of, check_finite, loading, source

logger = logging.getLogger(__name__)
CUTS: tuple[Part, ...] = ("prompt", "answer", "thoughts")


def settled(protocol: Protocol, tokenizer: Any) -> Protocol:
    """
    Return the protocol with what it leaves to the chat template decided: `apply_chat_template`,
    `enable_thinking`.

    Raises:
        ConfigurationError: the template is asked for and missing, or cannot do what is asked of
            thinking.
    """
    for name in SWITCHES:
        if name in {**protocol.model_args, **protocol.model_args.get("chat_template_args", {})}:
            raise ConfigurationError(
                f"model_args: {name} is a setting of its own (--enable_thinking)."
            )
    chat = (
        tokenizer.chat_template is not None
        if protocol.apply_chat_template is None
        else protocol.apply_chat_template
    )
    if chat and tokenizer.chat_template is None:
        raise ConfigurationError(
            "apply_chat_template=True: the model has no chat template. Leave it out."
        )
    if not chat and protocol.enable_thinking:
        raise ConfigurationError(
            "enable_thinking=True: a model thinks when it is asked by its chat template only."
        )
    thinks = chat and decide(
        tokenizer, protocol.enable_thinking, protocol.model_args, protocol.system_instruction
    )
    return replace(protocol, apply_chat_template=chat, enable_thinking=thinks)


def thinking_of(tokenizer: Any, protocol: Protocol) -> Thinking:
    """Return how a model thinks, asked by this protocol."""
    if not protocol.apply_chat_template:
        return NONE
    return find_thinking(tokenizer, protocol.model_args, protocol.system_instruction)


def check_thinking(benchmarks: dict[str, Benchmark], tokenizer: Any, protocol: Protocol) -> None:
    """
    Refuse tasks that cannot be asked of a model that always thinks: those that read the likelihood
    of choices.

    Where thinking can be turned off, it is for such tasks; a task that itself begins the answer
    leaves no thoughts.

    Raises:
        ConfigurationError: such a task; also what `settled` raises.
    """
    protocol = settled(protocol, tokenizer)
    thinking = thinking_of(tokenizer, protocol)
    if not protocol.enable_thinking or (thinking.off and not thinking.opens):
        return
    refused = [
        name
        for name, benchmark in benchmarks.items()
        if any(
            task.OUTPUT_TYPE != "generate_until" and not task.config.gen_prefix
            for task in benchmark.tasks.values()
        )
    ]
    if refused:
        raise ConfigurationError(
            f"{', '.join(refused)}: the likelihood of the choices is read where the answer begins,"
            " and there this model's chat template begins thoughts, which it cannot turn off."
            " Leave these tasks out, or take tasks that are answered in words."
        )


def processes() -> PartialState:
    """Return this launch's processes; accelerate must be told that there is no GPU to see them."""
    return PartialState(cpu=not torch.accelerator.is_available())


def own_dtype(model: str, model_args: dict[str, Any] | None = None) -> str:
    """
    Return the dtype a model (an adapter's base model) was saved in, as `bfloat16`; float32 where
    none is noted.
    """
    adapter = adapter_of(model)
    config = AutoConfig.from_pretrained(
        adapter["base_model_name_or_path"] if adapter else model, **source(model_args)
    )
    return str(config.dtype or torch.float32).removeprefix("torch.")


def load_tokenizer(model: str, model_args: dict[str, Any] | None = None) -> Any:
    """
    Return a model's tokenizer (an adapter's may be its base model's), padding left as generation
    needs it.

    Raises:
        ConfigurationError: there is none.
    """
    adapter = adapter_of(model)
    if adapter is not None and not Path(model, "tokenizer_config.json").is_file():
        model = adapter["base_model_name_or_path"]
    with loading(f"{model} has no tokenizer that can be loaded."):
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", **source(model_args))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def generation_config(model: str, model_args: dict[str, Any] | None = None) -> GenerationConfig:
    """
    Return what a model generates by: what is saved beside its weights, an adapter's too.

    An adapter that was saved without it has its base model's, and stops at its own tokenizer's end
    token as well, as a whole model does that was trained with this tokenizer (transformers'
    `Trainer` aligns them).
    """
    adapter = adapter_of(model)
    own = Path(model, "generation_config.json").is_file()
    name, options = model, source(model_args)
    if adapter is not None and not own:
        name = adapter["base_model_name_or_path"]
        options = {"revision": adapter.get("revision") or "main", **options}
    try:
        place = {key: value for key, value in options.items() if key != "trust_remote_code"}
        config = GenerationConfig.from_pretrained(name, **({} if own else place))
    except OSError:  # saved without one
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(name, **options))
    if adapter is not None and not own and Path(model, "tokenizer_config.json").is_file():
        end, ends = load_tokenizer(model, model_args).eos_token_id, end_tokens(config)
        if end is not None and end not in ends:
            config.eos_token_id = [end, *ends]
    return config


def end_tokens(config: GenerationConfig) -> list[int]:
    """Return the ids that end an answer."""
    ends = config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]


def load(model: str, tokenizer: Any, protocol: Protocol) -> Any:
    """
    Return a model as lm-eval's, loaded once: with the backend `hf`, `lm.model` is the torch model.

    All of lm-eval's arguments work (`model_args`): `parallelize`, `tp_plan`, `revision`,
    `trust_remote_code`, ... Started by a launcher, each process loads the model and takes its share
    of the items; under `tp_plan` the processes hold one model together and all do all items, so
    that each must call what runs the model.

    Args:
        model: a Hub id, a folder, or a folder with a PEFT adapter (which names its base model).
        tokenizer: see `load_tokenizer`.

    Raises:
        ConfigurationError: the model cannot be loaded, or PEFT is needed and not installed.
    """
    adapter = adapter_of(model)
    if adapter is not None and protocol.backend == "hf" and find_spec("peft") is None:
        raise ConfigurationError(f"{model} holds a PEFT adapter: pip install 'eaft[peft]'.")
    from eaft.evaluation.engine import HFModel, WatchedVLLM

    hint = f", with model_args={protocol.model_args}" if protocol.model_args else ""
    own = ("think_start_token", "think_end_token")  # ours: lm-eval knows the second alone
    protocol = replace(
        protocol, model_args={k: v for k, v in protocol.model_args.items() if k not in own}
    )
    try:
        with quiet(), loading(f"{model} cannot be loaded{hint}."):
            if protocol.backend == "vllm":
                return load_vllm(WatchedVLLM, model, tokenizer, protocol)
            args: dict[str, Any] = {"pretrained": model}
            if adapter is not None:
                args.update(pretrained=adapter["base_model_name_or_path"], peft=model)
                args.update(revision=adapter.get("revision") or "main")
            args.update(dtype=protocol.dtype, device=str(processes().device), backend="causal")
            lm = HFModel(
                tokenizer=tokenizer,
                batch_size=protocol.batch_size,
                **{**args, **protocol.model_args},
            )
            if adapter is not None:
                lm.model.get_base_model().generation_config = generation_config(
                    model, protocol.model_args
                )
    except (OSError, ValueError, RuntimeError, TypeError, ImportError, AssertionError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            f"{model} cannot be loaded{hint}. ({first_line(error)})"
        ) from error
    check_finite(lm.model, model)
    return lm if protocol.model_args.get("tp_plan") else share_items(lm)


def wrap(model: Any, tokenizer: Any, protocol: Protocol) -> Any:
    """
    Return a loaded model as lm-eval's `hf` model, sharing the items among this launch's processes.
    """
    from eaft.evaluation.engine import HFModel

    with quiet():  # it warns of what `share_items` sets
        return share_items(
            HFModel(pretrained=model, tokenizer=tokenizer, batch_size=protocol.batch_size)
        )


def share_items(lm: Any) -> Any:
    """
    Let each of this launch's processes take its share of the items; lm-eval does so on several GPUs
    only.
    """
    state = processes()
    if state.num_processes > 1:
        lm._rank, lm._world_size, lm.accelerator = (
            state.process_index,
            state.num_processes,
            Accelerator(),
        )
    return lm


def load_vllm(watched: type, model: str, tokenizer: Any, protocol: Protocol) -> Any:
    """Return lm-eval's `vllm` model; a PEFT adapter runs on its base as vLLM's LoRA."""
    from eaft.evaluation.lm_eval_internals import get_model

    folder = (
        tempfile.TemporaryDirectory()
    )  # vLLM reads the tokenizer from disk; the template may be the other model's
    tokenizer.save_pretrained(folder.name)
    generation_config(model, protocol.model_args).to_json_file(
        Path(folder.name, "generation_config.json")
    )
    args = {"dtype": protocol.dtype, "batch_size": protocol.batch_size, **protocol.model_args}
    lm = type("VLLMModel", (watched, get_model("vllm")), {})(**vllm_args(model, folder.name, args))
    lm.tokenizer_folder = folder  # deleted with the model
    return lm


def vllm_args(model: str, folder: str, model_args: dict[str, Any]) -> dict[str, Any]:
    """
    Return the arguments of lm-eval's `vllm` model for a model or an adapter; `folder` says how it
    is asked.
    """
    args: dict[str, Any] = {"pretrained": model, "tokenizer": folder}
    if adapter := adapter_of(model):
        args["generation_config"] = folder  # vLLM's own is the base model's
        args.update(
            pretrained=adapter["base_model_name_or_path"],
            lora_local_path=model,
            max_lora_rank=adapter["r"],
        )
    return {**args, **model_args}


def ask(tokenizer: Any, prompt: Any, protocol: Protocol) -> str:
    """
    Return a prompt as the text a model is asked with, as lm-eval does for tasks.

    By the chat template, thinking or not, or as plain text: the messages' contents, a blank line
    between them. A system instruction comes first; a template that knows no system message does
    without.

    Args:
        prompt: a string or messages; or a mapping with a `prompt`, `tools` (a list, or its JSON)
            and `chat_template_kwargs`, for a chat template only.

    Raises:
        ConfigurationError: see `settled`.
    """
    protocol = settled(protocol, tokenizer)
    row = prompt if isinstance(prompt, dict) else {"prompt": prompt}
    asked, tools = row["prompt"], row.get("tools")
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    if protocol.system_instruction:
        messages.insert(0, {"role": "system", "content": protocol.system_instruction})
    if not protocol.apply_chat_template:
        return "\n\n".join(message["content"] for message in messages)
    thinking = thinking_of(tokenizer, protocol)
    settings = {
        **protocol.model_args.get("chat_template_args", {}),
        **(thinking.on if protocol.enable_thinking else thinking.off),
    }
    settings |= {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **row.get("chat_template_kwargs", {}),
    }
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **settings
        )
    except TemplateError:
        messages = [message for message in messages if message["role"] != "system"]
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **settings
        )


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
            what the task says, but that answers are cut to what fits the model's context (AIME asks
            for 32,768 tokens).
        progress: shows how far it is.

    Raises:
        ConfigurationError: a task whose first metric is not one number an item; also what
            `check_thinking` raises.
    """
    tokenizer = getattr(lm, "tokenizer", None)
    if tokenizer is None:  # a model that is none of ours
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
    Return lm-eval's results of each task's rows of these numbers (None: all); None on other
    processes.
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
    Lend a task the protocol's settings, by lm-eval's own rules: what a task says of no examples
    stays.

    Answers, with room for thoughts, are cut at three quarters of the model's context; lm-eval would
    fail midway.
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
    Return a task's generation settings, with `max_gen_toks` (thoughts and answer) that fit the
    model's context.
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
        items: by model; the keys are those of `cut`. All models were asked the same.
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
    """Return of how many items each part was cut."""
    return Cut(**{part: sum(part in item.cut for item in items) for part in CUTS})


def items(name: str, task: Any, output: dict[str, Any], lm: Any) -> list[Item]:
    """Return one task's items from what lm-eval gives back, in the order of its rows."""
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
        sample: lm-eval's, of this filter.
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
    Return what of an item was cut: any of its prompts on the left, its answer or its thoughts at
    the limit.
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
    """Return a value JSON can hold."""
    return json.loads(json.dumps(value, default=str))
