"""
Everything a measurement depends on, as digests: weights, tokenizer, template, task, data, versions,
device.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils.hub import cached_file, extract_commit_hash

from eaft.errors import ConfigurationError
from eaft.models import template_today
from eaft.provenance import versions

# The files of a model's folder that its outputs depend on; a run's folder holds many others
WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.gguf",
    "*.py",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
)
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "peft",
    "lm_eval",
    "vllm",
    "bfcl_eval",
)
CHUNK = 2**24  # bytes read at once


def digest(value: Any) -> str:
    """Return the SHA-256 of a value as canonical JSON."""

    def plain(part: Any) -> Any:
        if isinstance(part, set | frozenset):
            return sorted(map(str, part))
        text = str(part)
        return (
            type(part).__qualname__ if " at 0x" in text else text
        )  # an address is another in each process

    return hashlib.sha256(json.dumps(value, sort_keys=True, default=plain).encode()).hexdigest()


def check_weights(model: str) -> list[Path]:
    """
    Return the files that a folder's weights and configuration are in; none for a Hub id.

    Raises:
        ConfigurationError: a folder without weights.
    """
    folder = Path(model)
    if not folder.is_dir():
        return []
    files = sorted(
        {
            file
            for pattern in WEIGHTS
            for file in folder.glob(pattern)
            if file.name != "training_args.bin"
        }
    )
    if not any(file.suffix in (".safetensors", ".bin", ".gguf") for file in files):
        raise ConfigurationError(
            f"{model} holds no weights: expected *.safetensors or *.bin, as save_pretrained writes."
        )
    return files


def weights_digest(model: str, revision: str | None = None) -> str:
    """
    Return a digest of a model's weights and configuration: of a folder's files, or a Hub id's
    commit.

    The digest of an adapter includes its base model's. A folder is read whole each time (about as
    long as loading it takes), because dates and sizes do not identify the content of a file.

    Raises:
        ConfigurationError: a folder without weights.
    """
    folder = Path(model)
    if not folder.is_dir():
        return digest(
            [
                "hub",
                model,
                extract_commit_hash(cached_file(model, "config.json", revision=revision), None),
            ]
        )
    files = check_weights(model)
    parts: list[Any] = []
    with tqdm(
        total=sum(f.stat().st_size for f in files),
        desc="Reading",
        unit="B",
        unit_scale=True,
        delay=2,
        disable=None,
    ) as bar:
        for file in files:
            sha = hashlib.sha256()
            with file.open("rb") as content:
                while chunk := content.read(CHUNK):
                    sha.update(chunk)
                    bar.update(len(chunk))
            parts.append([file.name, sha.hexdigest()])
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        parts.append(weights_digest(json.loads(adapter.read_text())["base_model_name_or_path"]))
    return digest(parts)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of a tokenizer: vocabulary, how it splits, special tokens, chat template."""
    if getattr(tokenizer, "is_fast", False):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {
            k: v for k, v in content.items() if k not in ("padding", "truncation")
        }  # left by its last call
    else:
        content = tokenizer.get_vocab()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    # Some templates write the date (Llama 3.2): on another day the prompt differs
    day = template_today() if "strftime_now" in str(tokenizer.chat_template) else None
    return digest([type(tokenizer).__name__, content, special, tokenizer.chat_template, day])


def tasks_digest(tasks: dict[str, Any], limit: int | None, num_fewshot: int | None) -> str:
    """
    Return a digest of lm-eval tasks: their settings and functions, the rows that are asked, and the
    rows of the few-shot examples.

    Args:
        tasks: lm-eval's `Task` objects.
        limit: at most so many rows of each.
        num_fewshot: overrides the tasks' own.
    """
    parts: list[Any] = []
    for name, task in sorted(tasks.items()):
        config = task.config.to_dict(keep_callable=True)
        shots = num_fewshot if num_fewshot is not None else config.get("num_fewshot") or 0
        rows = task.eval_docs
        rows = [rows[i] for i in range(min(limit or len(rows), len(rows)))]
        examples = list(task.fewshot_docs() or []) if shots else []
        parts.append([name, described(config), digest(rows), digest(examples)])
    return digest(parts)


def described(value: Any) -> Any:
    """Return settings with the text of its file for each function: it may call others in it."""
    if isinstance(value, dict):
        # The place of the data, and lm-eval's notes during a run, do not change an answer
        return {
            k: described(v) for k, v in value.items() if k not in ("dataset_kwargs", "metadata")
        }
    if isinstance(value, list | tuple):
        return [described(part) for part in value]
    if callable(value):
        return source(value)
    return value


def source(function: Callable[..., Any]) -> Any:
    """Return the text of the file that a function is from, and its own name and arguments."""
    bound = getattr(function, "args", ()), getattr(function, "keywords", {})
    function = inspect.unwrap(getattr(function, "func", function))
    try:
        text = Path(inspect.getsourcefile(function) or "").read_text()
    except (OSError, TypeError):  # built in, or made at run time: only its type is known
        text = repr(type(function))
    return [getattr(function, "__qualname__", ""), text, bound]


def software() -> dict[str, str | None]:
    """Return the versions of the libraries that compute, a digest of our code, and the device."""
    here = Path(__file__).parent
    ours = [*here.glob("*.py"), here.parent / "objective" / "statistics.py"]
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else str(torch.empty(0).device)
    )
    return {
        **versions(LIBRARIES),
        "eaft": digest([file.read_text() for file in sorted(ours)]),
        "device": device,
    }
