"""`eaft cache`: its flags and its help."""

from __future__ import annotations

import argparse

from eaft.text import visible

DESCRIPTION = """
List the measurements and the converted models that are kept, or delete them.

  eaft cache            what is kept, by model, with its size
  eaft cache --clear    delete it all; what is needed again is measured or converted again

`eaft eval`, `eaft compare` and training measure each thing once. They keep items, answers and
probabilities under a digest of weights, tokenizer, task, data, protocol and versions. They also
keep the models that GGUF files were converted to. The folder of measurements is $EAFT_CACHE, by
default $HF_HOME/eaft/measured. Converted models are in $HF_HOME/eaft.
"""


def main(argv: list[str]) -> None:
    """List what is kept, or delete it."""
    parser = argparse.ArgumentParser(
        prog="eaft cache",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clear", action="store_true", help="delete everything that is kept")
    clear = parser.parse_args(argv).clear
    from eaft.evaluation.store import list_kept

    print(visible(list_kept(clear)))
    if not clear:
        print("Next: to delete all of it, eaft cache --clear")
