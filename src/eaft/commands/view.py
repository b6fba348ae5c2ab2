"""`eaft view`: its flags and its help."""

from __future__ import annotations

import argparse
from pathlib import Path

from eaft.inspection.view.serve import PORT, check_packages, view

DESCRIPTION = """
Show in the browser what `eaft inspect`, `eaft compare`, `eaft eval` or `eaft tune` wrote.

  eaft view inspection
  eaft view tuned                   the front of a run of eaft tune, and the model that it chose
  eaft view runs                    every comparison, evaluation and tuning below this folder

It shows tokens in the plane of entropy and probability, what each gate does to them, examples as
text, runs beside each other, and the items of an evaluation with both models' answers. The page is
served to this machine alone. To see a folder of another machine, start `eaft view FOLDER
--no_browser` there and `ssh -N -L 8765:127.0.0.1:8765 MACHINE` here. Then open the address that it
printed.
"""


def main(argv: list[str]) -> None:
    """Serve a folder until interrupted."""
    parser = argparse.ArgumentParser(
        prog="eaft view",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, help="what was written, or a folder that holds such folders"
    )
    parser.add_argument("--port", type=int, help=f"(default: {PORT}, or the next that is free)")
    parser.add_argument("--no_browser", action="store_true", help="only print the address")
    parser.add_argument(
        "--token", help="the secret part of the address (default: a new one each time)"
    )
    flags = parser.parse_args(argv)
    check_packages()
    view(flags.folder, flags.port, flags.token, not flags.no_browser)
