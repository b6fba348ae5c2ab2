"""Sharded heads: FSDP2 over two gloo processes. (DDP is tested through `eaft train` in test_train_command.py.)"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("head", ["in the root's unit", "alone"])
@pytest.mark.parametrize("gate", ["eaft", "asft"])  # asft: with a reference model, sharded as well
def test_fsdp2_gives_the_gradients_of_one_process(gate, head):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command += ["-m", "tests.training.fsdp_check", gate, head]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
