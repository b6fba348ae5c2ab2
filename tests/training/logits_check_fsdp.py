"""
Run in two ranks by test_logits_check.py: the check of the logits under FSDP2, wrapped as
accelerate does.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from eaft.errors import ConfigurationError
from eaft.training.head import GatedLMHead
from eaft.training.logits_check import check_logits
from tests.conftest import make_model


def gather(x):
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x)
    return torch.cat(found)


def build(mesh, scale=1.0):
    model = make_model(tie_word_embeddings=False)
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = scale * output.logits
        return output

    model.forward = scaled
    GatedLMHead(model, "eaft")
    for unit in (*model.model.layers, [model.model.norm, model.lm_head], model):
        fully_shard(unit, mesh=mesh)
    return model.train()


def gradients(model, inputs):
    model(**inputs, fused_lm_head=True).loss.backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    ids = torch.randint(3, 264, (world, 9), generator=torch.Generator().manual_seed(0))[
        rank : rank + 1
    ]
    inputs = {"input_ids": ids, "labels": ids}

    checked = build(mesh)
    check_logits(checked, inputs, gather)
    found, expected = gradients(checked, inputs), gradients(build(mesh), inputs)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, msg=lambda m, n=name: f"{n}: {m}")

    try:  # the second rank alone sees other logits
        check_logits(build(mesh, 2.0 if rank else 1.0), inputs, gather)
    except ConfigurationError as error:
        sys.stdout.write(
            f"refused: {str(error).partition(': ')[2]}\n"
        )  # at once: two processes write to one pipe
        sys.stdout.flush()
