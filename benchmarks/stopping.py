"""
How often the interval of `eaft inspect` covers the truth, its stopping included.

    .venv/bin/python -m benchmarks.stopping

Simulated rows of six kinds: how often tokens are in conflict, and how rows differ in length and
in how many conflicts they have. Of each kind one data set is drawn, and read 1000 times as `eaft
inspect` reads it: in random order, an interval after 128 rows and at each look after that. Writes
benchmarks/results/stopping.json and stopping.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from eaft.inspection.interval import MIN_CONFLICTS, interval_of
from eaft.inspection.score.stopping import LEVEL, MOST, looks, reason_to_stop
from eaft.provenance import environment, write_json

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "stopping.json"
ROWS = 200_000  # of a data set
SEED = 2  # no constant of the rule was chosen by it

# Nll in conflicts, all nll, and conflicts of each row, `[rows]` each
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def draw(rng: np.random.Generator, per_row: float, spread: float = 0.5, alike: float = 1.0) -> Rows:
    """
    Return rows with so many conflicts each on average.

    Args:
        spread: standard deviation of the logarithm of their lengths.
        alike: shape of the gamma distribution of their rates of conflict; small: very unlike.
    """
    length = rng.lognormal(np.log(60), spread, ROWS)
    conflicts = rng.poisson(rng.gamma(alike, per_row / alike, ROWS) * length / 68)
    # A token in conflict has at least 2.3 nats
    part = 2.3 * conflicts + rng.gamma(np.maximum(conflicts, 1e-9), 2)
    return part, part + length * rng.gamma(4, 0.25, ROWS), conflicts


def mixed(rng: np.random.Generator, share: float, few: float, many: float) -> Rows:
    """Return rows of two kinds: a share of them has many conflicts."""
    has_many = rng.random(ROWS) < share
    pairs = zip(draw(rng, many), draw(rng, few), strict=True)
    part, whole, conflicts = (np.where(has_many, *pair) for pair in pairs)
    return part, whole, conflicts


KINDS: dict[str, Callable[[np.random.Generator], Rows]] = {
    "a conflict in 5 rows": lambda rng: draw(rng, 0.2),
    "a conflict a row": lambda rng: draw(rng, 1.0),
    "five conflicts a row": lambda rng: draw(rng, 5.0),
    "two a row, lengths very unlike": lambda rng: draw(rng, 2.0, spread=1.2),
    "three a row, rows very unlike": lambda rng: draw(rng, 3.0, alike=0.3),
    "eight a row in a tenth of the rows": lambda rng: mixed(rng, 0.1, 0.1, 8.0),
}


def simulate(rng: np.random.Generator, rows: Rows, trials: int) -> dict[str, float]:
    """Return how often the interval covers the share of all rows, and where scoring stops."""
    part, whole, conflicts = rows
    truth, held, stops = part.sum() / whole.sum(), [], []
    for _ in range(trials):
        chosen = rng.permutation(len(part))[:MOST]
        for look in looks(MOST):
            first = chosen[:look]
            count = int(conflicts[first].sum())
            if reason_to_stop(part[first], whole[first], count, look == MOST):
                break
        if count >= MIN_CONFLICTS:
            interval = interval_of(part[first], whole[first], LEVEL)
            held.append(interval.low <= truth <= interval.high)
        stops.append(look)
    covered = float(np.mean(held))
    return {
        "share": float(truth),
        "covered": covered,
        "standard_error": float(np.sqrt(covered * (1 - covered) / len(held))),
        "trials": len(held),
        "median_rows": float(np.median(stops)),
    }


def table(found: dict[str, dict[str, float]], resamples: int) -> str:
    """Return the results as a page of Markdown."""
    lines = [
        "# How often the interval of `eaft inspect` covers the truth, its stopping included",
        "",
        "Written by `python -m benchmarks.stopping`: of each kind one data set of"
        f" {ROWS:,} simulated rows, read in many random orders; {resamples} resamples. Orders with"
        f" fewer than {MIN_CONFLICTS} conflicts have no interval and do not count.",
        "",
        "| rows with | share of nll | covered (standard error) | orders | rows scored (median) |",
        "|---|---|---|---|---|",
    ]
    for name, kind in found.items():
        covered = f"{100 * kind['covered']:.1f}% ({100 * kind['standard_error']:.1f}%)"
        lines.append(
            f"| {name} | {100 * kind['share']:.1f}% | {covered} | {kind['trials']:,}"
            f" | {kind['median_rows']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Simulate, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=499, help="of each bootstrap")
    flags = parser.parse_args()
    from eaft.evaluation import paired

    paired.RESAMPLES = flags.resamples
    rng, found = np.random.default_rng(SEED), {}
    for name, make in KINDS.items():
        found[name] = simulate(rng, make(rng), flags.trials)
        print(name, found[name], flush=True)
        write_json(
            RESULTS,
            {
                "seed": SEED,
                "resamples": flags.resamples,
                "kinds": found,
                "environment": environment(),
            },
        )
        RESULTS.with_suffix(".md").write_text(table(found, flags.resamples))


if __name__ == "__main__":
    main()
