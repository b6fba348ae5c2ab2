"""The command line: `eaft COMMAND`. Each command is a module of `eaft.commands`."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from eaft.errors import STARTED, EAFTError, disk_full
from eaft.text import VisibleRecord, visible

DESCRIPTION = """
Entropy-Adaptive Fine-Tuning: fine-tune a language model without making it worse at everything else.

  eaft init      write a recipe with comments for a model and your data
  eaft train     fine-tune with a gate on each token's loss (takes the flags and YAML of `trl sft`)
  eaft tune      train, and get back the model that learned most within a forgetting budget
  eaft eval      score a model on suites of tasks; with --base, say what it gained and forgot
  eaft compare   train with several objectives from one base, and show what each gained and forgot
  eaft inspect   score data through a model: which tokens it fights, what gates do, is it right?
  eaft view      look around in what `inspect`, `tune`, `compare` or `eval` wrote, in the browser
  eaft cache     say what has been measured and kept, or clear it
  eaft env       print versions and machine, for bug reports; with --check, test this machine

`eaft COMMAND --help` explains each.
"""

COMMANDS = ("init", "train", "eval", "tune", "compare", "inspect", "view", "cache", "env")


def main(argv: list[str] | None = None) -> int:
    """
    Run a command and return its exit code.

    An error that the user can correct prints one message and returns 2. Ctrl-C returns 130.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="eaft",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="eaft COMMAND ...",
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    command = parser.parse_args(argv[:1] or ["--help"]).command
    # A gate module in the working directory can then be imported, as under `python -m`
    sys.path.insert(0, os.getcwd())
    logging.setLogRecordFactory(VisibleRecord)
    with noted_interruption() as interrupted:
        return run(command, argv[1:], interrupted)


def run(command: str, argv: list[str], interrupted: list[int]) -> int:
    """
    Run a command and return its exit code; see `main`.

    Args:
        interrupted: is no longer empty after Ctrl-C.
    """
    try:
        return importlib.import_module(f"eaft.commands.{command}").main(argv) or 0
    except EAFTError as error:
        tell(command, f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return tell_interrupted(command)
    except Exception as error:
        if interrupted:  # a library took the interruption for an error of its own, as numpy can
            return tell_interrupted(command)
        if (file := disk_full(error)) is None:
            raise
        where = f" ({file} could not be written)" if file else ""
        tell(
            command,
            f"error: the disk is full{where}: free some space (`eaft cache` says what is kept), and"
            " go on.",
        )
        return errno.ENOSPC if STARTED in os.environ else 2


@contextmanager
def noted_interruption() -> Iterator[list[int]]:
    """
    Yield a list that Ctrl-C adds to, before it raises KeyboardInterrupt as ever.

    Ctrl-C reaches all processes of a terminal. A process that `eaft` started ends at once and
    silently: its parent tells the user. A process that ignores Ctrl-C keeps ignoring
    it.
    """
    interrupted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        interrupted.append(number)
        signal.default_int_handler(number, frame)

    usual = signal.default_int_handler
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is not usual:
        yield interrupted
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL if STARTED in os.environ else note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, usual)


def tell_interrupted(command: str) -> int:
    """Say how to go on after Ctrl-C, and return the exit code."""
    resume = " with --resume_from_checkpoint true" if command == "train" else ""
    tell(command, f"interrupted: give the same command again{resume} to go on.")
    return 130


def tell(command: str, message: str) -> None:
    """Print a message once: under a launcher every process has the same message."""
    if os.environ.get("RANK", "0") == "0":
        print(visible(f"eaft {command}: {message}"), file=sys.stderr)
    else:
        time.sleep(2)  # a launcher ends all processes when one exits: rank 0 prints first
