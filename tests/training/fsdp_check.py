"""
Run in two ranks by test_distributed.py: gradients under FSDP2, and how much of the reference is
ever whole.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from eaft import EAFTConfig, EAFTTrainer
from eaft.training.head import GatedLMHead, frozen_copy
from tests.conftest import make_model, make_rows, make_tokenizer
from tests.training import fsdp_on_cpu
from tests.training.deepspeed_check import train


def gradients(model, ids):
    model.train()(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def build(gate):
    model = make_model(tie_word_embeddings=False)
    reference = (
        frozen_copy(make_model(seed=1, tie_word_embeddings=False)) if gate == "asft" else None
    )
    GatedLMHead(model, gate, reference)
    return model, reference


def check_gradients(gate: str, head_alone: bool):
    """Each rank's gradients, averaged, are those that one process computes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ids = torch.randint(3, 264, (world, 9), generator=torch.Generator().manual_seed(0))

    expected = {}
    for row in ids:  # what each rank alone would compute
        for name, grad in gradients(build(gate)[0], row.unsqueeze(0)).items():
            expected[name] = expected.get(name, 0) + grad / world

    mesh = init_device_mesh("cpu", (world,))
    model, reference = build(gate)
    for sharded in (model, reference) if reference else (model,):
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        if (
            head_alone
        ):  # its own unit is never entered, so the weight is still sharded when the head reads it
            fully_shard(sharded.lm_head, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
    for name, grad in gradients(model, ids[rank : rank + 1]).items():
        torch.testing.assert_close(
            grad.full_tensor(),
            expected[name],
            rtol=1e-4,
            atol=1e-6,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    assert expected["lm_head.weight"].norm() > 1e-2


def check_reference(out: str):
    """At no time is more of the reference whole than its largest unit; after a step, nothing is."""
    arguments = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    trainer = EAFTTrainer(
        make_model(num_hidden_layers=4, tie_word_embeddings=False),
        EAFTConfig(out, gate="sft-kl", max_steps=1, gradient_checkpointing=False, **arguments),
        train_dataset=Dataset.from_list(make_rows()),
        processing_class=make_tokenizer(),
    )
    reference = trainer.gated_lm_head.reference
    whole = []

    def whole_now(*_):
        whole.append(sum(p.numel() for p in reference.parameters() if not isinstance(p, DTensor)))

    # Each layer's parts are asked once it is gathered: FSDP2's own hooks stand first
    parts = [module for module in reference.modules() if not list(module.children())]
    for module in parts:
        module.register_forward_pre_hook(whole_now)
    trainer.train()
    assert isinstance(trainer.model, FSDPModule)
    layer, head = reference.model.layers[0], reference.lm_head.weight
    sizes = [
        sum(p.numel() for p in layer.parameters()),
        head.numel() + reference.model.norm.weight.numel(),
    ]
    assert len(whole) == len(parts) - 1  # the head is read, not called
    assert max(whole) == max(sizes), (whole, sizes)
    whole_now()
    assert whole[-1] == 0


def main(model_dir: str, out: str) -> None:
    """Check as one rank of several."""
    fsdp_on_cpu.make_fsdp_on_cpu()
    PartialState(cpu=True)
    for gate in ("eaft", "asft"):  # asft: with a reference model, sharded as well
        for head_alone in (True, False):
            check_gradients(gate, head_alone)
    check_reference(out)
    logs = train(model_dir, out, "sft-kl", True)
    if dist.get_rank() == 0:
        Path(out, "logs.json").write_text(json.dumps(logs))
