"""The processes of this launch, and what all of them must agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def processes() -> PartialState:
    """Return this launch's processes; accelerate must be told that there is no GPU to see them."""
    return PartialState(cpu=not torch.accelerator.is_available())


def shared(find: Callable[[], T]) -> T:
    """Return on all processes the value that `find` returns on the first."""
    state = processes()
    values = [find() if state.is_main_process else None]
    if state.num_processes > 1:
        broadcast_object_list(values)
    return values[0]  # type: ignore[return-value]
