"""
Run a command, kill it at a random moment, run it again, and so on, then let it end: for
test_killed.py.

Everything is imported once, in a process of one thread, and each run is a fork of it.
"""

import json
import os
import random
import signal
import sys
import time

import lm_eval.evaluator  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import scipy.stats  # noqa: F401
import torch

import eaft.evaluation.report
import eaft.evaluation.verdict
import eaft.training.arguments
import eaft.training.train
import eaft.tuning.tune  # noqa: F401
from eaft import cli


def start(argv, log):
    if pid := os.fork():
        return pid
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        code = cli.main(argv)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    log, kills, seed, whole, disturbed = (
        sys.argv[1],
        int(sys.argv[2]),
        int(sys.argv[3]),
        *map(json.loads, sys.argv[4:]),
    )
    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(start(whole, log), 0)[1]) == 0, (
        "the undisturbed run failed"
    )
    duration = time.monotonic() - began
    rng, killed = random.Random(seed), 0
    os.environ["EAFT_CACHE"] += "-disturbed"  # what the undisturbed run kept is not to help
    for i in range(kills):
        pid = start(disturbed, log)
        time.sleep(
            duration * (i + rng.random()) / kills
        )  # later and later, since each begins where the last one was
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    code = os.waitstatus_to_exitcode(os.waitpid(start(disturbed, log), 0)[1])
    print(json.dumps({"duration": duration, "killed": killed, "code": code}))
