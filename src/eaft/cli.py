"""The command line: `eaft COMMAND`. Each command is a module of `eaft.commands`."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
import time

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
  eaft view      look around in what `inspect`, `compare` or `eval` wrote, in the browser
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
    try:
        return importlib.import_module(f"eaft.commands.{command}").main(argv[1:]) or 0
    except EAFTError as error:
        tell(command, f"error: {error}")
        return 2
    except KeyboardInterrupt:
        resume = " with --resume_from_checkpoint true" if command == "train" else ""
        tell(command, f"interrupted: give the same command again{resume} to go on.")
        return 130
    except Exception as error:
        if (file := disk_full(error)) is None:
            raise
        where = f" ({file} could not be written)" if file else ""
        tell(
            command,
            f"error: the disk is full{where}: free some space (`eaft cache` says what is kept), and"
            " go on.",
        )
        return errno.ENOSPC if STARTED in os.environ else 2


def tell(command: str, message: str) -> None:
    """Print a message once: under a launcher every process has the same message."""
    if os.environ.get("RANK", "0") == "0":
        print(visible(f"eaft {command}: {message}"), file=sys.stderr)
    else:
        time.sleep(2)  # a launcher ends all processes when one exits: rank 0 prints first
