"""
`eaft` under FSDP2 on the CPU, in the environment that `accelerate launch` makes.

accelerate 1.15 sets up FSDP on accelerators only (`AcceleratorState.__init__`): of two CPU
processes it makes DDP, without a word, whatever the config file says. Here it does for them what it
does for GPUs; nothing else is changed.
"""

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from eaft import cli

original = AcceleratorState.__init__


def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def make_fsdp_on_cpu() -> None:
    """Change accelerate in this process."""
    AcceleratorState.__init__ = with_fsdp


def main(*argv: Any) -> int:
    """Run `eaft` as one rank of several."""
    make_fsdp_on_cpu()
    code = cli.main([str(part) for part in argv])
    assert AcceleratorState().distributed_type == DistributedType.FSDP
    return code
