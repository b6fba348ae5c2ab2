"""`eaft env`: its flags and its help."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from dataclasses import asdict

DESCRIPTION = """
Print versions and machine as JSON, for bug reports.

  eaft env
  eaft env --check        test the loss on this machine: is it right, and how fast is it?
"""


def main(argv: list[str]) -> int:
    """Print versions and machine, or test the machine; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="eaft env",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="test the loss on this machine instead: is it right, and how fast is it?",
    )
    if parser.parse_args(argv).check:
        return importlib.import_module("eaft.objective.check").main()
    from eaft.provenance import environment

    print(json.dumps(asdict(environment()), indent=2))
    print("Next: to test the loss on this machine, eaft env --check", file=sys.stderr)
    return 0
