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

# Of a model's folder, what its outputs depend on; a run's folder holds much else
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
    Return the files that a folder's weights and configuration are in; none of a Hub id.

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

    An adapter's has its base model's in it. A folder is read whole each time (about as long as
    loading it takes): a date or a size says nothing sure of what is in a file.

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
    # Some templates write the date (Llama 3.2): on another day another question is asked
    day = template_today() if "strftime_now" in str(tokenizer.chat_template) else None
    return digest([type(tokenizer).__name__, content, special, tokenizer.chat_template, day])


def tasks_digest(tasks: dict[str, Any], limit: int | None, num_fewshot: int | None) -> str:
    """
    Return a digest of lm-eval tasks: their settings and functions, the rows asked, and those of the
    examples.

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
    """Return settings with each function as the source of its file: it may call its neighbours."""
    if isinstance(value, dict):
        # Where data lies, and what lm-eval notes while it runs, says nothing of what it holds
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
    except (OSError, TypeError):  # built in, or made on the way: its name must do
        text = repr(type(function))
    return [getattr(function, "__qualname__", ""), text, bound]


def software() -> dict[str, str | None]:
    """Return the versions of what computes, a digest of our own part of it, and the device."""
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
