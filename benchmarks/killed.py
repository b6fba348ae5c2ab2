"""
`eaft tune` killed ten times (kill -9) at random moments gives what an undisturbed run gives.

    python -m benchmarks.killed              # from the repository's root; some minutes
    python -m benchmarks.killed --seed 1     # other moments

It kills the run of `tests/test_killed.py`: a tiny model, eight steps, four checkpoints, screening
and confirmation. Each kill falls at a random share of the CPU time that the
undisturbed run took, later and later. Writes benchmarks/results/killed.md, a row for each seed.
"""

import argparse
import importlib
import os
import tempfile
from pathlib import Path

from eaft.provenance import environment

KILLS = 10
RESULT = Path(__file__).parent / "results" / "killed.md"


def main() -> None:
    """Run both, compare, and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    tests = importlib.import_module("tests.test_killed")
    conftest = importlib.import_module("tests.conftest")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        conftest.make_model().save_pretrained(model)
        conftest.make_tokenizer().save_pretrained(model)
        report = tests.tune_killed(model, folder, flags.seed, KILLS)
    row = (
        f"| {flags.seed} | {report['duration']:.0f} | {report['killed']} of {KILLS} | yes |"
        f" {environment().commit} |"
    )
    before = RESULT.read_text().splitlines() if RESULT.is_file() else []
    rows = [line for line in before if line.startswith("| ") and line[2].isdigit()]
    rows = sorted([line for line in rows if not line.startswith(f"| {flags.seed} |")] + [row])
    text = f"""# kill -9

`python -m benchmarks.killed`: `eaft tune` on a tiny model, killed at {KILLS} random moments and
started again each time, gives the results, the file names and, byte for byte, the model of an
undisturbed run.

| seed | CPU seconds, undisturbed | kills before its end | the same | commit |
|---|---|---|---|---|
"""
    text += "".join(f"{line}\n" for line in rows)
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
