"""`eaft init`: its flags and its help."""

from __future__ import annotations

import argparse
from pathlib import Path

from eaft.text import visible

DESCRIPTION = """
Write a recipe for a model and your data: YAML with a comment at each setting.

  eaft init Qwen/Qwen3-0.6B data.jsonl
  eaft init Qwen/Qwen3-0.6B data.jsonl --output recipes/first.yaml

It reads the data as training does, counts rows and tokens, and chooses epochs and max_length by
them. `eaft tune --config` and `eaft train --config` take the file; change it as you like.
"""


def main(argv: list[str]) -> None:
    """Write the recipe, and say what to do next."""
    parser = argparse.ArgumentParser(
        prog="eaft init",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a Hub id, a folder or a .gguf file")
    parser.add_argument("data", metavar="DATA", help="a Hub id, a file or a folder")
    parser.add_argument(
        "--output", type=Path, default=Path("recipe.yaml"), help="default: recipe.yaml"
    )
    flags = parser.parse_args(argv)
    from eaft.training.first_recipe import write_recipe

    facts = write_recipe(flags.model, flags.data, flags.output)
    print(
        visible(
            f"Written to {flags.output}: a recipe for {facts.rows:,} rows. Next: look at it, then"
            f" eaft tune --config {flags.output} --max_drift 0.05"
        )
    )
