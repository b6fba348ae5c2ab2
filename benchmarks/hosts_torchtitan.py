"""
torchtitan's own command line on a machine without a GPU, with a recipe of hosts.py, which runs it.

    python benchmarks/hosts_torchtitan.py RECIPE.yaml --module hosts_torchtitan --config recipe

Its calls to a GPU are answered by hand. Its attention, which has no backward pass on a CPU, is
PyTorch's here.
"""

# ruff: noqa: E402 - it asks for the device when it is imported

import json
import os
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from datasets import Dataset

os.environ.update(
    {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29655",
    }
)
torch._utils._get_available_device_type = lambda: "cpu"
ANSWERS: dict[str, Any] = {
    "set_device": None,
    "device_count": 1,
    "get_device_name": "cpu",
    "get_device_properties": SimpleNamespace(total_memory=2**33, name="cpu"),
    "reset_peak_memory_stats": None,
    "empty_cache": None,
    "memory_stats": {},
    "mem_get_info": (2**32, 2**33),
}
for name, answer in ANSWERS.items():
    setattr(torch.cpu, name, lambda *args, _answer=answer, **settings: _answer)
barrier = torch.distributed.barrier
torch.distributed.barrier = lambda *args, **settings: barrier()  # gloo takes no devices
torch.distributed.set_timeout = lambda *args, **settings: None  # type: ignore[attr-defined]

from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import default_adamw
from torchtitan.models.common import ComplexRoPE, attention
from torchtitan.models.llama3 import _build_llama3_layers, config_registry
from torchtitan.trainer import Trainer

from eaft.integrations.torchtitan import GatedCrossEntropy


def attend(
    self: Any,
    q_BLNH: torch.Tensor,
    k_BLNH: torch.Tensor,
    v_BLNH: torch.Tensor,
    *,
    scale: float | None = None,
    **settings: Any,
) -> torch.Tensor:
    """
    Return causal attention over whole rows, `[B, L, heads, head_dim]`; arguments by torchtitan's
    names.
    """
    query, key, value = (states.transpose(1, 2) for states in (q_BLNH, k_BLNH, v_BLNH))
    rows = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale
    )
    return rows.transpose(1, 2)


attention.FlexAttention.forward = attend


class Rows(BaseDataLoader):
    """Rows of tokens with labels, in order."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """`dataset_path`: a Parquet file."""

    def __init__(self, config: Config, *, local_batch_size: int, **settings: Any) -> None:
        rows = Dataset.from_parquet(config.dataset_path).with_format("torch")
        self.batches = rows.batch(local_batch_size)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for batch in self.batches:
            labels = torch.nn.functional.pad(
                batch["labels"][:, 1:], (0, 1), value=-100
            )  # shifted, as its own are
            yield {"input": batch["input_ids"]}, labels

    def state_dict(self) -> dict[str, Any]:
        """Nothing is resumed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing is resumed."""


def recipe() -> Trainer.Config:
    """
    Return the configuration: torchtitan's of a small llama3, with the recipe's model, rows,
    settings and loss.
    """
    settings = yaml.safe_load(RECIPE.read_text())
    sizes = json.loads((Path(settings["model"]) / "config.json").read_text())
    dim, vocabulary = sizes["hidden_size"], sizes["vocab_size"]
    config = config_registry.llama3_debugmodel()
    model = config.model_spec.model
    model.dim, model.vocab_size = dim, vocabulary
    model.tok_embeddings.num_embeddings, model.tok_embeddings.embedding_dim = vocabulary, dim
    model.lm_head.in_features, model.lm_head.out_features = dim, vocabulary
    model.layers = _build_llama3_layers(
        n_layers=sizes["num_hidden_layers"],
        dim=dim,
        n_heads=sizes["num_attention_heads"],
        hidden_dim=sizes["intermediate_size"],
        rope=ComplexRoPE.Config(
            dim=dim // sizes["num_attention_heads"],
            max_seq_len=sizes["max_position_embeddings"],
            theta=sizes["rope_parameters"]["rope_theta"],
        ),
        attn_backend="flex",
    )
    model.norm.normalized_shape = dim
    for norm in [
        model.norm,
        *(norm for layer in model.layers for norm in (layer.attention_norm, layer.ffn_norm)),
    ]:
        norm.eps = sizes["rms_norm_eps"]
    gate = settings["gate"]
    loss = CrossEntropyLoss.Config() if gate is None else GatedCrossEntropy.Config(gate=gate)
    config.loss = ChunkedLossWrapper.Config(loss_fn=loss)
    config.dump_folder = settings["output_dir"]
    config.hf_assets_path = settings["model"]
    config.dataloader = Rows.Config(dataset_path=settings["rows"])
    config.optimizer = default_adamw(
        lr=settings["learning_rate"], betas=(0.9, 0.999), weight_decay=0.0
    )
    config.lr_scheduler.warmup_steps, config.lr_scheduler.decay_ratio = 0, 0.0
    config.training.local_batch_size = settings["batch"]
    config.training.global_batch_size = settings["global_batch"]
    config.training.seq_len = settings["tokens"]
    config.training.steps = settings["steps"]
    config.training.mixed_precision_param = "float32"
    config.training.disable_cuda_graphs = True
    config.validator.enable = False
    config.activation_checkpoint = None
    config.metrics.disable_color_printing = True
    config.debug.seed = settings["seed"]
    config.checkpoint.enable = True
    config.checkpoint.initial_load_path, config.checkpoint.initial_load_in_hf = (
        settings["model"],
        True,
    )
    config.checkpoint.interval = 1_000
    return config


if __name__ == "__main__":
    RECIPE = Path(sys.argv.pop(1))
    sys.modules["hosts_torchtitan"] = sys.modules[
        "__main__"
    ]  # torchtitan imports it by its name: once is enough
    runpy.run_module("torchtitan.train", run_name="__main__")
