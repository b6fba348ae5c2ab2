"""
Processes without the seconds of their imports: each is a fork of a server that imported everything
once.

What a launcher does beside the imports is done here: the variables of each rank, and the store at
which ranks meet. Two tests of test_train_command.py start real launchers.
"""

import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from eaft import cli
from eaft.comparison import compare, runs
from eaft.tuning import tune

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
# matplotlib, scipy and lm_eval are imported when they are used, deepspeed where it is installed
SERVER.set_forkserver_preload(
    [
        *("lm_eval.evaluator", "matplotlib.pyplot", "scipy.stats", "peft"),
        *("eaft.evaluation.report", "eaft.evaluation.verdict", "eaft.evaluation.evaluate"),
        *("eaft.training.arguments", "eaft.training.train", "eaft.training.trainer"),
        *("eaft.comparison.compare", "eaft.tuning.tune", "eaft.inspection.inspect"),
        *("tests.conftest", "tests.processes"),
    ]
)
# Of the server, before it imports. One thread: threads are not forked
FIRST = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def eaft(*argv):
    """The command line, as a function for `start` and `run_ranks`."""
    return cli.main([str(part) for part in argv])


def eaft_training_itself(*argv):
    """`eaft`, whose training is no process of its own: a kill ends both, without a new Python."""
    runs.train_apart = lambda config: cli.main(["train", "--config", str(config)])
    tune.run_train = lambda arguments, folder: cli.main(["train", *arguments])
    return eaft(*argv)


def eaft_in_forks(*argv):
    """The same with `--jobs`, each of which is a fork."""
    compare.get_context = lambda kind: multiprocessing.get_context("fork")
    return eaft_training_itself(*argv)


def start(function, *args, log, environment=None):
    """
    Return a process that calls a function; its exit code is what the function returns, or 1.

    Args:
        log: the file that what it prints is added to.
        environment: its variables, by default those of this process.
    """
    environment = {**(os.environ if environment is None else environment), "OMP_NUM_THREADS": "1"}
    process = SERVER.Process(target=enter, args=(str(log), environment, function, args))
    with pytest.MonkeyPatch.context() as patch:  # the first process starts the server
        for name, value in (FIRST | {"PYTHONPATH": str(ROOT)}).items():
            patch.setenv(name, value)
        process.start()
    return process


def enter(log, environment, function, args):
    """Run in the new process, and leave it at once: gloo's threads now and then abort at exit."""
    gc.freeze()  # see conftest.py
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server ignores
    try:
        code = function(*args) or 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def run_ranks(function, *args, ranks=2, environment=None, timeout=300):
    """
    Call a function in ranks as torchrun starts them, and return what they printed.

    Raises:
        AssertionError: a rank ended with another exit code than 0, or not in time.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {
        **(os.environ if environment is None else environment),
        **{"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"},
        **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)},
        **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"},
    }
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        started = []
        for rank in map(str, range(ranks)):
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            started.append(start(function, *args, log=log, environment=own))
        running = {process.sentinel: process for process in started}
        try:
            while running and all(process.exitcode in (None, 0) for process in started):
                ended = wait(running, timeout)
                for sentinel in ended or running.copy():
                    del running[sentinel]
            codes = [process.exitcode for process in started]
        finally:
            for process in started:  # one that failed leaves the other waiting
                process.kill()
                process.join()
        printed = log.read_text()
    assert set(codes) == {0}, f"{codes}: {printed[-3000:]}"
    return printed
