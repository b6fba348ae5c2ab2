"""Run under torchrun by test_distributed.py: the head under FSDP2 gives the gradients of one process, averaged."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from eaft.training.head import GatedLMHead, frozen_copy
from tests.conftest import make_model


def gradients(model, ids):
    model.train()(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def build(gate):
    model = make_model(tie_word_embeddings=False)
    reference = frozen_copy(make_model(seed=1, tie_word_embeddings=False)) if gate == "asft" else None
    GatedLMHead(model, gate, 20, {}, reference)
    return model, reference


def main(gate: str, head_alone: bool):
    dist.init_process_group("gloo")
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
        if head_alone:  # its own unit is never entered, so the weight is still sharded when the head reads it
            fully_shard(sharded.lm_head, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
    for name, grad in gradients(model, ids[rank : rank + 1]).items():
        torch.testing.assert_close(
            grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert expected["lm_head.weight"].norm() > 1e-2
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], head_alone=sys.argv[2] == "alone")
