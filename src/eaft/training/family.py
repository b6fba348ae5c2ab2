"""
The models in one training run, without more training: base + share * (checkpoint - base).

A share of 0 is the base model, 1 is the checkpoint. At equal drift, a late checkpoint with a share
below 1 has often learned more than an early checkpoint (docs/tuning.md). Only weights are needed:

- LoRA: the share multiplies the adapter's scale. Nothing is merged. Exact.
- Full models: one tensor at a time, in float32, rounded once to the checkpoint's dtype.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.hub import cached_file

from eaft.errors import ConfigurationError
from eaft.files import read_json
from eaft.models import adapter_of, loading
from eaft.provenance import write_json
from eaft.training.gate_measurements import MEASUREMENTS_FILE
from eaft.training.replay import REPLAY_FILE
from eaft.training.run_folder import METRICS_FILE, RUN_FILE

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_config.json"
TEMPLATES = "additional_chat_templates"  # of a tokenizer that has several
AGAIN = "copy the model's folder again."
# What a checkpoint, and a run's folder, hold beside the model: the trainer's state and records, and
# model cards
TRAINERS = (
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "trainer_state.json",
    "training_args.bin",
    "README.md",
    RUN_FILE,
    METRICS_FILE,
    REPLAY_FILE,
    MEASUREMENTS_FILE,
    "events.out.tfevents*",
    "_*",
    "*.tmp",
    "*.safetensors",
    INDEX,
)
# Settings of a LoRA adapter under which what it adds is not its scale times something
NOT_SCALED = {
    "use_dora": "DoRA's magnitudes are no multiple of the scale",
    "modules_to_save": "these modules are trained whole, beside the adapter",
    "trainable_token_indices": "these embeddings are trained whole, beside the adapter",
    "layer_replication": "it changes the base model's layers",
    "lora_bias": "its biases are trained beside the adapter",
    "target_parameters": "not tested with interpolation",
    "alora_invocation_tokens": "not tested with interpolation",
    "use_qalora": "not tested with interpolation",
    "use_bdlora": "not tested with interpolation",
    "arrow_config": "not tested with interpolation",
}
# Initial values of A and B that leave the base model's weights as they are
LEAVES_BASE = (True, False, "gaussian", "eva")


def check_adapter(config: dict[str, Any]) -> None:
    """
    Check that an adapter's share can be set by its scale.

    Args:
        config: of PEFT, as `adapter_config.json` has it.

    Raises:
        ConfigurationError: it is no LoRA, or trains something that its scale does not multiply.
    """
    way = "Leave it out, or train all weights (no --use_peft)."
    kind = str(getattr(config["peft_type"], "value", config["peft_type"]))
    if kind != "LORA":
        raise ConfigurationError(f"peft_type={kind!r} cannot be interpolated, only LoRA can. {way}")
    for name, why in NOT_SCALED.items():
        if config.get(name):
            raise ConfigurationError(
                f"{name}={config[name]!r} cannot be interpolated by the adapter's scale: {why}."
                f" {way}"
            )
    if config.get("bias", "none") != "none":
        raise ConfigurationError(
            f"bias={config['bias']!r} cannot be interpolated by the adapter's scale: biases are"
            f" trained beside the adapter. {way}"
        )
    if config.get("init_lora_weights", True) not in LEAVES_BASE:
        raise ConfigurationError(
            f"init_lora_weights={config['init_lora_weights']!r} cannot be interpolated: it changes"
            f" the base model's weights. {way}"
        )


class Family:
    """
    A loaded model that becomes any member of a run's family, in place.

    Args:
        model: the base model, loaded; for adapters, the base with one of the run's adapters.
        base: the base model's folder or Hub id. Its tensors are read again from its files.
        options: `revision` and `trust_remote_code` of the base, as `from_pretrained` takes them.
    """

    def __init__(self, model: Any, base: str, options: dict[str, Any] | None = None) -> None:
        self.model, self.adapter = model, hasattr(model, "peft_config")
        self.base = None if self.adapter else SavedWeights(base, model, options)

    @torch.no_grad()
    def put(self, checkpoint: Path, share: float) -> None:
        """
        Give the model the weights base + share * (checkpoint - base).

        Full models hold what the saved model would, rounded to the dtype they are loaded in.

        Args:
            checkpoint: a folder of the run with a model or an adapter.
            share: in [0, 1].

        Raises:
            ConfigurationError: the checkpoint cannot be interpolated.
        """
        if self.adapter:
            self._put_adapter(checkpoint, share)
            return
        assert self.base is not None
        tuned = SavedWeights(str(checkpoint), self.model)
        for names, tensor in tensors(self.model):
            value = between(names[0], self.base.get(names), tuned.get(names), share, tensor.device)
            tensor.copy_(value)

    def _put_adapter(self, checkpoint: Path, share: float) -> None:
        from peft import load_peft_weights, set_peft_model_state_dict
        from peft.tuners.lora.layer import LoraLayer

        adapter = adapter_of(str(checkpoint))
        if adapter is None:
            raise ConfigurationError(f"{checkpoint} holds no adapter: {AGAIN}")
        check_adapter(adapter.config)
        name = self.model.active_adapter
        set_peft_model_state_dict(
            self.model, load_peft_weights(str(checkpoint), device="cpu"), adapter_name=name
        )
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.set_scale(name, share)


def write_member(
    base: str, checkpoint: Path, share: float, folder: Path, options: dict[str, Any] | None = None
) -> None:
    """
    Write base + share * (checkpoint - base) as a model that `from_pretrained` loads.

    An adapter stays an adapter, with its `lora_alpha` (and `alpha_pattern`) times the share. The
    tokenizer, the chat template and the generation settings are the checkpoint's.

    Args:
        base, options: see `Family`.
        folder: made here; files of the same names are replaced.

    Raises:
        ConfigurationError: the checkpoint cannot be interpolated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapter = adapter_of(str(checkpoint))
    for file in checkpoint.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in TRAINERS):
            shutil.copy2(file, folder / file.name)
    if (templates := checkpoint / TEMPLATES).is_dir():
        shutil.copytree(templates, folder / TEMPLATES, dirs_exist_ok=True)
    if adapter is not None:
        check_adapter(config := adapter.config)
        config["lora_alpha"] *= share
        config["alpha_pattern"] = {
            name: alpha * share for name, alpha in (config.get("alpha_pattern") or {}).items()
        }
        write_json(folder / ADAPTER, config)
        for file in checkpoint.glob("adapter_model*.safetensors"):
            shutil.copy2(file, folder / file.name)
        return
    trusted = {k: v for k, v in (options or {}).items() if k == "trust_remote_code"}
    with loading(f"{checkpoint} cannot be loaded."):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", **trusted)
    Family(model, base, options).put(checkpoint, share)
    model.save_pretrained(folder)
    shutil.copy2(checkpoint / "config.json", folder / "config.json")
    # FSDP2 saves a tied tensor under each of its names
    first = {name: names[0] for names, _ in tensors(model) for name in names}
    ours, theirs = (
        {first.get(name, name) for name in saved_files(place)} for place in (folder, checkpoint)
    )
    if ours != theirs:
        missing = sorted(ours ^ theirs)
        raise ConfigurationError(
            f"{checkpoint} holds tensors that AutoModelForCausalLM does not load ({missing[0]}), so"
            " that it cannot be interpolated whole. Train an adapter (--use_peft)."
        )


def between(
    name: str, base: Tensor, tuned: Tensor, share: float, device: torch.device | str = "cpu"
) -> Tensor:
    """
    Return base + share * (tuned - base), in the tuned tensor's dtype, rounded once.

    Raises:
        ConfigurationError: the shapes differ, or integers do.
    """
    if base.shape != tuned.shape:
        raise ConfigurationError(
            f"{name} is {list(base.shape)} in the base model and {list(tuned.shape)} in the tuned"
            " one, so that nothing lies between them. Train without adding tokens."
        )
    base, tuned = base.to(device), tuned.to(device)
    if not tuned.is_floating_point():
        if not torch.equal(base, tuned):
            raise ConfigurationError(
                f"{name} holds {tuned.dtype} values that training changed, and nothing lies between"
                " them. Train an adapter (--use_peft)."
            )
        return tuned
    exact = torch.promote_types(tuned.dtype, torch.float32)
    return torch.lerp(base.to(exact), tuned.to(exact), share).to(tuned.dtype)


def tensors(model: Any) -> list[tuple[tuple[str, ...], Tensor]]:
    """Return each tensor that a model saves, once, with all its names: tied ones have several."""
    names: dict[int, list[str]] = defaultdict(list)
    by_id = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)].append(name)
        by_id[id(tensor)] = tensor
    return [(tuple(names[key]), tensor) for key, tensor in by_id.items()]


class SavedWeights:
    """
    A saved model's tensors by the names that they have in the loaded model, read one at a time.

    Where the files use other names (transformers renames or fuses tensors of some models while it
    loads them), or are not safetensors, the whole model is loaded beside the other one.

    Args:
        source: a folder or a Hub id.
        model: a loaded model of the same architecture.
        options: as `from_pretrained` takes them.
    """

    def __init__(self, source: str, model: Any, options: dict[str, Any] | None = None) -> None:
        options = options or {}
        folder = Path(source)
        if not folder.is_dir():
            place = {k: v for k, v in options.items() if k in ("revision", "subfolder")}
            folder = Path(cached_file(source, "config.json", **place)).parent
        self.files = saved_files(folder)
        self.loaded: dict[str, Tensor] = {}
        self.handles: dict[Path, Any] = {}
        if not all(set(names) & self.files.keys() for names, _ in tensors(model)):
            with loading(f"{source} cannot be loaded."):
                whole = AutoModelForCausalLM.from_pretrained(source, dtype="auto", **options)
            self.loaded = whole.state_dict()

    def get(self, names: tuple[str, ...]) -> Tensor:
        """Return the tensor that has one of these names."""
        if self.loaded:
            return self.loaded[names[0]]
        name = next(name for name in names if name in self.files)
        file = self.files[name]
        if file not in self.handles:
            self.handles[file] = safe_open(file, "pt")
        return self.handles[file].get_tensor(name)


def saved_files(folder: Path) -> dict[str, Path]:
    """Return the safetensors file that each of a saved model's tensors is in; empty for others."""
    if (index := folder / INDEX).is_file():
        content = read_json(index, dict[str, Any], AGAIN)
        return {name: folder / file for name, file in content["weight_map"].items()}
    if not (file := folder / WEIGHTS).is_file():
        return {}
    with safe_open(file, "pt") as opened:
        return dict.fromkeys(opened.keys(), file)
