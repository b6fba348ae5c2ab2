"""
`eaft train --dry_run`: check a recipe, count its parameters and tokens, and estimate memory and
time, without the weights.

The model is built on torch's meta device from its config, so nothing of its size is loaded. The
data is prepared by the trainer itself (`eaft.training.prepare`), so what is checked and counted is
what would be trained on. Memory and time are estimates from first principles; each formula is in
its function.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, get_peft_config

from eaft.errors import ConfigurationError, first_line
from eaft.evaluation.drift import TOP
from eaft.evaluation.suite import load_suites
from eaft.models import resolve_model
from eaft.objective.fused import GPU_MEMORY_SHARE, chunk_rows
from eaft.objective.products import slow_bfloat16
from eaft.objective.registry import get_gate
from eaft.training.config import EAFTConfig
from eaft.training.forgetting import general_suite
from eaft.training.prepare import narrow_trainer
from eaft.training.replay import ANSWER_TOKENS, count_replayed

GIB = 2**30
# The memory that a program can use (GiB) and the peak dense bf16 rate (FLOP/s): about what NVIDIA's
# data sheets say
GPUS = {"A100 80 GB": (79, 312e12), "H100 80 GB": (78, 989e12), "H200 141 GB": (139, 989e12)}
UTILISATION = 0.4  # the share of the peak rate that a good run reaches
RESERVE = 1.1  # 10% for fragmentation; 1 GiB for CUDA and NCCL is added


@dataclass
class Launch:
    """
    How many processes there are, and over how many of them weights, gradients and optimizer states
    are sharded (1: not sharded).

    `offload`: weights, gradients and optimizer states wait in the machine's memory. `upcast`:
    trained weights are float32 whatever they were loaded in, as accelerate's FSDP2 makes them under
    mixed precision.
    """

    processes: int = 1
    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    offload: bool = False
    upcast: bool = False


@dataclass
class Tokens:
    """What one epoch of the prepared training data holds."""

    rows: int
    tokens: int
    labelled: int
    longest: int
    full_rows: int  # rows of max_length: truncated, packed, or just as long


def plan(
    args: EAFTConfig,
    model_args: ModelConfig,
    train_dataset: Any,
    eval_dataset: Any,
    launch_args: list[str],
    refused: str | None = None,
) -> str:
    """
    Return the plan as text.

    Args:
        refused: why `eaft train` would stop on this machine.

    Raises:
        ConfigurationError: `eaft train` would refuse the recipe, or the accelerate config cannot be
            read.
    """
    launch = read_launch(launch_args)
    if args.forgetting_eval_steps:
        general = general_suite(args, sharded=launch.optimizer > 1)
        load_suites([*general, *(args.target_suite or [])], data_dir=args.forgetting_data_dir)
    name = resolve_model(str(model_args.model_name_or_path), args.trust_remote_code)
    source = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(name, **source)
    model = meta_model(config, model_args, args)
    total, trainable = count_parameters(model)
    active = count_active(model, config)
    counted = count_tokens(name, source, args, train_dataset, eval_dataset)

    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * launch.processes
    per_epoch = math.ceil(counted.rows / batch)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    trained = counted.tokens * steps / per_epoch
    unquantized = count_unquantized(model)
    parts = memory(config, model_args, args, total, trainable, counted.longest, launch, unquantized)
    need = RESERVE * sum(parts.values()) + 1
    operations = flops(
        config, args, active, trainable == total, trained, counted.tokens / counted.rows
    )
    rows = [
        f"Recipe is complete; gate {args.gate}. Nothing was trained or written.",
        *([f"On this machine eaft train stops: {refused}"] if refused else []),
        "",
        f"Parameters   {total:,}, {trainable:,} of them trained"
        + (f", {active:,} used for each token" if active < total else ""),
        f"Data         {counted.rows:,} rows, {counted.tokens:,} tokens an epoch,"
        f" {counted.labelled:,} labelled ({counted.labelled / counted.tokens:.0%}); longest row"
        f" {counted.longest:,}, {counted.full_rows:,} rows of max_length"
        + (
            f"; not counted: {count_replayed(len(train_dataset), args)} replayed rows"
            if args.replay
            else ""
        ),
        *(
            [
                f"Disk         up to {probs_gib(len(train_dataset), args, config):.2g} GiB for the"
                " base model's probabilities of the replayed answers"
            ]
            if args.replay_loss == "kl"
            else []
        ),
        (
            f"Steps        {steps:,} of {batch} rows ({args.per_device_train_batch_size} x"
            f" {args.gradient_accumulation_steps} x {launch.processes} processes), {trained:,.0f}"
            " tokens in all"
        ),
        "",
        "Memory per GPU, estimated (GiB):",
        *(f"  {part:<44}{value:8.1f}" for part, value in parts.items()),
        f"  {'with 10% for fragmentation and 1 GiB for CUDA':<44}{need:8.1f}",
        "",
        (
            f"Time, estimated ({operations:.2g} FLOP at {UTILISATION:.0%} of the peak bf16 rate;"
            " data, evaluation and saving not counted):"
        ),
    ]
    fits = False
    for gpu, (capacity, rate) in GPUS.items():
        hours = operations / (launch.processes * rate * UTILISATION) / 3600
        verdict = "fits" if need <= capacity else "DOES NOT FIT"
        fits |= need <= capacity
        rows.append(
            f"  {launch.processes} x {gpu:<12} {hours:8.1f} h, {hours * launch.processes:8.1f}"
            f" GPU-hours   {verdict}"
        )
    if launch.processes <= max(1, torch.accelerator.device_count()):
        here, room, rate = this_machine(args)
        hours = operations / (launch.processes * rate * UTILISATION) / 3600
        verdict = "fits" if need <= room else "DOES NOT FIT"
        fits |= need <= room
        duration = f"{hours:8.1f} h" if hours >= 0.1 else f"{60 * hours:8.1f} minutes"
        rows.append(
            f"  {'this machine':<16} {duration}, {here}, {rate:.1e} FLOP/s in a matrix product now;"
            f" {verdict}"
        )
    if launch.offload:
        in_gpu = replace(launch, offload=False)
        whole = memory(
            config, model_args, args, total, trainable, counted.longest, in_gpu, unquantized
        )
        # Weights, gradients, optimizer states
        host = launch.processes * (sum(list(whole.values())[:3]) + whole.get("reference model", 0))
        rows += [
            "",
            (
                f"Offloaded: {host:.0f} GiB of the machines' own memory. The time this costs is not"
                " counted."
            ),
        ]
    if not fits:
        rows += [
            "",
            (
                "To fit: shard over more processes (FSDP2), a smaller per_device_train_batch_size"
                " or max_length,"
            ),
        ]
        rows += ["gradient_checkpointing, fsdp_offload_params, or LoRA (use_peft)."]
    return "\n".join(rows)


def probs_gib(rows: int, args: EAFTConfig, config: Any) -> float:
    """
    Return how large the probabilities of replayed answers are at most, beside so many rows of data:
    `TopProbs` of answers as long as they may be.
    """
    tokens = count_replayed(rows, args) * (ANSWER_TOKENS - 1)  # a longer one did not end
    kept = min(TOP, config.get_text_config().vocab_size)
    return tokens * 4 * (2 * kept + 1) / 2**30  # int32 ids, float32 log-probabilities and rest


def this_machine(args: EAFTConfig) -> tuple[str, float, float]:
    """
    Return this machine's device, its memory in GiB, and its rate in FLOP/s: the best of three
    timed matrix products, in the dtype that training computes in.
    """
    gpu = torch.accelerator.is_available() and not args.use_cpu
    device = torch.accelerator.current_accelerator() if gpu else torch.device("cpu")
    bf16 = args.bf16 and (gpu or not slow_bfloat16())
    dtype = torch.bfloat16 if bf16 else torch.float16 if args.fp16 and gpu else torch.float32
    size = 8192 if gpu else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(4):  # the first one warms up
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    rate = 2 * size**3 / min(seconds[1:])
    if device is not None and device.type == "cuda":
        capacity = torch.cuda.get_device_properties(device).total_memory
        name = torch.cuda.get_device_name(device)
    else:
        capacity = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        name = f"CPU, {torch.get_num_threads()} threads" if not gpu else str(device)
    return f"{name}, {str(dtype).removeprefix('torch.')}", capacity / GIB, rate


def read_launch(launch_args: list[str]) -> Launch:
    """Return the launch that the flags of `accelerate launch` and their config file describe."""
    flags = launch_command_parser().parse_args([*launch_args, "script"])
    content: dict[str, Any] = {}
    if flags.config_file:
        try:
            content = yaml.safe_load(Path(flags.config_file).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigurationError(
                f"accelerate_config={flags.config_file!r}: {first_line(error)}"
            ) from error
    n = int(flags.num_processes or content.get("num_processes") or 1)
    if n < 1:
        raise ConfigurationError(f"num_processes must be at least 1, got {n}.")
    kind = str(content.get("distributed_type", "NO")).upper()
    if kind == "FSDP" or flags.use_fsdp:
        fsdp = content.get("fsdp_config") or {}
        mixed = str(flags.mixed_precision or content.get("mixed_precision") or "no") != "no"
        upcast = int(fsdp.get("fsdp_version", 1)) == 2 and mixed
        return Launch(n, n, n, n, bool(fsdp.get("fsdp_offload_params")), upcast)
    if kind == "DEEPSPEED":
        stage = int((content.get("deepspeed_config") or {}).get("zero_stage", 2))
        return Launch(n, n if stage == 3 else 1, n if stage >= 2 else 1, n if stage >= 1 else 1)
    return Launch(n)


def meta_model(config: Any, model_args: ModelConfig, args: EAFTConfig) -> Any:
    """
    Return the model, with adapters if the recipe has some, on the meta device: shapes without
    memory.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
    model.tie_weights()
    peft_config = get_peft_config(model_args)
    if peft_config is None:
        return model
    from peft import get_peft_model

    return get_peft_model(model, peft_config)


def count_parameters(model: Any) -> tuple[int, int]:
    """
    Return how many parameters a model has, and how many of them are trained. A tied parameter
    counts once.
    """
    parameters = list({id(p): p for p in model.parameters()}.values())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def count_unquantized(model: Any) -> int:
    """
    Return how many parameters `load_in_4bit` and `load_in_8bit` leave as they are: all but the
    weights of `nn.Linear`.

    These are the embeddings, the head, the adapters, and the experts of a mixture: since
    transformers 5 they are no `nn.Linear` (findings/bitsandbytes_moe_experts.sh).
    """
    head = model.get_output_embeddings()
    linear = (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    return count_parameters(model)[0] - sum(
        m.weight.numel() for m in linear if not m.weight.requires_grad
    )


def experts_per_token(config: Any) -> int | None:
    """
    Return how many experts a token goes through, or None without experts. Model families name the
    field differently.
    """
    text = config.get_text_config()
    names = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")
    return next((largest(value) for name in names if (value := getattr(text, name, None))), None)


def largest(value: Any) -> int:
    """Return a number, or the largest if a model family has one for each layer."""
    return max(value) if isinstance(value, list | tuple) else value


def count_active(model: Any, config: Any) -> int:
    """
    Return how many parameters take part in one token. An expert takes part if the token is routed
    to it.

    transformers keeps a layer's experts in a module `experts`, as a list, or stacked along the
    first dimension.
    """
    active, _ = count_parameters(model)
    per_token = experts_per_token(config)
    for name, module in model.named_modules():
        if per_token and name.endswith(".experts"):
            parameters = list(module.parameters())
            number = (
                len(module) if isinstance(module, torch.nn.ModuleList) else parameters[0].shape[0]
            )
            size = sum(p.numel() for p in parameters)
            active -= size - size * min(per_token, number) // number
    return active


def count_tokens(
    name: str, source: dict[str, Any], args: EAFTConfig, train_dataset: Any, eval_dataset: Any
) -> Tokens:
    """Let the trainer prepare the data as it does for training, and count the tokens."""
    trainer = narrow_trainer(
        AutoTokenizer.from_pretrained(name, **source), args, train_dataset, eval_dataset
    )
    lengths, labelled = [], 0
    for row in trainer.train_dataset:
        lengths.append(len(row["input_ids"]))
        labelled += int((np.asarray(row["labels"][1:]) != -100).sum())
    full = sum(length == args.max_length for length in lengths)
    return Tokens(len(lengths), sum(lengths), labelled, max(lengths), full)


def memory(
    config: Any,
    model_args: ModelConfig,
    args: EAFTConfig,
    total: int,
    trainable: int,
    longest: int,
    launch: Launch,
    unquantized: int = 0,
) -> dict[str, float]:
    """
    Return what each part takes on one GPU at the peak of a step, in GiB.

    - Weights, gradients and AdamW's two states have the dtype that the model is loaded in, or are
      float32 (`Launch.upcast`). bf16 autocast keeps bf16 copies of all weights, the head's too.
    - With sharding, two layers at a time and the head are whole. DDP copies gradients to buckets.
    - Activations of one layer, at 2 bytes an element, as Korthikanti et al. 2022 count them
      (arXiv:2205.05198, Sec. 4.1) for a gated MLP and attention that stores no scores. Elements of
      a token: five times the hidden size (norms, residuals), queries and attention output, keys
      and values, and four times the intermediate size of the experts that it goes through. With
      checkpointing: the input of each layer, and one layer. The batch counts as padded to the
      longest row, and every token as labelled.
    - The head (`eaft.objective.fused`): the logits of one chunk, and the gradient of the weight, in
      float32 if there are several chunks.
    - A KL term: a second chunk, the reference's hidden states, and its head if it is gathered or
      cast. Without LoRA also the reference model, sharded as the model is, in the dtype that it is
      loaded in.
    """
    text = config.get_text_config()
    hidden, layers, head = (
        text.hidden_size,
        text.num_hidden_layers,
        text.vocab_size * text.hidden_size,
    )
    heads, intermediate = (
        text.num_attention_heads,
        largest(getattr(text, "intermediate_size", None) or 4 * hidden),
    )
    if per_token := experts_per_token(config):
        intermediate = per_token * largest(
            getattr(text, "moe_intermediate_size", None) or intermediate
        )
    width = (getattr(text, "head_dim", None) or hidden // heads) * heads
    keys = 2 * width // heads * (getattr(text, "num_key_value_heads", None) or heads)
    width_of = {"bfloat16": 2.0, "float16": 2.0, "float32": 4.0, "float64": 8.0}
    dtype = str(model_args.dtype or "float32").removeprefix("torch.")
    if dtype == "auto":
        dtype = str(config.dtype or "float32").removeprefix("torch.")
    loaded = width_of[dtype]
    if quantized := model_args.load_in_4bit or model_args.load_in_8bit:
        # Bytes a weight, on average
        small = 0.5 if model_args.load_in_4bit else 1.0
        loaded = (small * (total - unquantized) + loaded * unquantized) / total
    full, sharded, anchor = trainable == total, launch.weights > 1, get_gate(args.gate).anchor
    weight = 4.0 if launch.upcast and full else loaded
    computed = 2 if args.bf16 or args.fp16 else max(2, loaded)
    trained = 4 if quantized or launch.upcast else weight
    optim = str(getattr(args.optim, "value", args.optim))
    states = 2 if "8bit" in optim else 0 if "adafactor" in optim or "sgd" in optim else 2 * trained

    layer = 2 * (5 * hidden + 2 * width + keys + 4 * intermediate)
    tokens = args.per_device_train_batch_size * longest
    kept = layers * 2 * hidden + layer if args.gradient_checkpointing else layers * layer
    budget = min(capacity for capacity, _ in GPUS.values()) * GIB // GPU_MEMORY_SHARE
    rows = chunk_rows(tokens, text.vocab_size, int(computed), budget)
    chunk = rows * text.vocab_size * computed
    on_gpu = not launch.offload
    parts: dict[str, float] = {
        "weights": on_gpu * total * weight / launch.weights,
        "gradients": on_gpu * trainable * trained / launch.gradients,
        f"optimizer states ({optim})": on_gpu * trainable * states / launch.optimizer,
        f"activations of {tokens:,} tokens": tokens * kept,
        "head: logits of a chunk, gradient sum": (
            chunk + head * (4 if tokens > rows else trained) * full
        ),
    }
    if sharded:
        parts["gathered layers and head"] = (
            total * 2 / layers * min(weight, computed) + head * computed
        )
    elif weight > computed:
        parts["copies of weights in 16 bit"] = total * computed
    if launch.processes > launch.gradients:
        parts["DDP's buckets of gradients"] = trainable * trained
    if anchor:
        cast = sharded or loaded > computed
        parts["KL term: second chunk, reference's output"] = (
            chunk + tokens * hidden * max(2, loaded) + head * computed * cast
        )
    if anchor and full:
        parts["reference model"] = on_gpu * total * loaded / launch.weights
    return {name: value / GIB for name, value in parts.items()}


def flops(
    config: Any, args: EAFTConfig, active: int, full: bool, tokens: float, length: float
) -> float:
    """
    Return a run's floating-point operations, as Kaplan et al. 2020 count them (arXiv:2001.08361,
    Sec. 2.1).

    For each token, a parameter that takes part (`count_active`) needs 2 in the forward and 4 in the
    backward pass, or 2 in the backward pass if weights are frozen (`full` is False). Checkpointing
    adds a forward pass, and so does a reference model. Causal attention adds 2 * layers * width *
    length to a forward pass.
    """
    text = config.get_text_config()
    width = (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    ) * text.num_attention_heads
    forward = 2 * active + 2 * text.num_hidden_layers * width * length
    passes = 3 if full else 2
    passes += bool(args.gradient_checkpointing) + bool(get_gate(args.gate).anchor)
    return tokens * forward * passes
