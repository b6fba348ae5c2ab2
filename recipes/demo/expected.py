"""
Put what `eaft inspect` expected beside what `eaft compare` found, in demo.md and demo.png.

    python recipes/demo/expected.py runs/demo

`make demo` runs both before it.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from tabulate import tabulate

from eaft.comparison.fronts import relative
from eaft.comparison.results import Comparison
from eaft.files import read_json

Numbers = dict[str, Any]
CASES = {
    "gsm8k": "GSM8K answers, by SmolLM2-135M-Instruct sharpened (logits x 2)",
    "function_calls": "function calls, by SmolLM2-135M-Instruct as it is",
}


def main() -> None:
    """Read both, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where both wrote")
    folder = parser.parse_args().folder
    cases = [read(folder / "inspect" / name, folder / name, about) for name, about in CASES.items()]
    text = report(cases)
    (folder / "demo.md").write_text(text)
    draw(cases, folder / "demo.png")
    print(
        f"\n{text}\nWritten to {folder}: demo.md, demo.png; what is behind them, in folders beside."
    )


def read(inspected: Path, compared: Path, about: str) -> Numbers:
    """Return a case: the share of the nll in conflicts, what was expected, and what was found."""
    facts = json.loads((inspected / "summary.json").read_text())["advice"]["facts"]
    way = "run `eaft compare` again."
    results: Comparison = read_json(compared / "results.json", Comparison, way)
    (pair,) = results.pairs
    front, nll = pair.fronts["held-out nll"], pair.views["chosen"].nll
    if front is None:
        raise SystemExit(f"{compared}: there is no held-out nll that both objectives reach.")
    found = relative(front)
    return {
        "about": about,
        "share": facts["nll"],
        "expected": facts["expected"],
        "found": found,
        "came_true": facts["expected"]["low"] <= found["change"] <= facts["expected"]["high"],
        "nll": asdict(nll),
    }


def report(cases: list[Numbers]) -> str:
    """Return the table, and what its words mean."""
    rows = [
        [
            case["about"],
            f"{100 * case['share']:.1f}%",
            percent(case["expected"]),
            percent(case["found"]),
            "yes" if case["came_true"] else "no",
            "{change:+.3f} ({low:+.3f} to {high:+.3f})".format(**case["nll"]),
        ]
        for case in cases
    ]
    headers = [
        "data and model",
        "nll in conflicts",
        "expected",
        "found",
        "as expected",
        "best held-out nll",
    ]
    return (
        tabulate(rows, headers, tablefmt="github", disable_numparse=True)
        + "\n\nExpected and found: EAFT's drift minus SFT's at the same held-out nll, as a share of"
        " SFT's, with its 95% interval (expected: of\none run; found: over prompts and held-out"
        " answers, with one seed). As expected: what was found lies in the interval\nthat was"
        " expected. Best held-out nll: EAFT's minus SFT's, in nats.\n"
    )


def percent(change: Numbers) -> str:
    """Return a change with its interval."""
    return "{change:+.0%} ({low:+.0%} to {high:+.0%})".format(**change)


def draw(cases: list[Numbers], file: Path) -> None:
    """
    Draw, for each case, what was expected as a band and what was found as a point with its
    interval.
    """
    figure, axis = plt.subplots(figsize=(8, 2.8), layout="constrained")
    for y, case in enumerate(cases):
        expected, found = (
            {k: 100 * v for k, v in case[name].items()} for name in ("expected", "found")
        )
        first = y == 0
        axis.barh(
            y,
            expected["high"] - expected["low"],
            left=expected["low"],
            height=0.5,
            color="0.85",
            label="expected before training (95%)" if first else None,
        )
        axis.plot([expected["change"]] * 2, [y - 0.25, y + 0.25], color="0.4")
        axis.errorbar(
            found["change"],
            y,
            xerr=[[found["change"] - found["low"]], [found["high"] - found["change"]]],
            fmt="o",
            capsize=3,
            color="C0",
            label="found (95%)" if first else None,
        )
    axis.axvline(0, color="black", lw=0.8, ls=":")
    names = [case["about"].replace(", by ", ",\n").replace(" made", "\nmade") for case in cases]
    axis.set_yticks(range(len(cases)), names)
    axis.invert_yaxis()
    axis.set(xlabel="better  ←  EAFT's drift minus SFT's at the same held-out nll, % of SFT's")
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
