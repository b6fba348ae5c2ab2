"""
The guarantee of `eaft tune`, on seeds that no constant was chosen by.

    python -m benchmarks.guarantee        # from the repository's root; 10 minutes on one core

`tests/tuning/test_procedure.py` checks the procedure with few trials and resamples, and the
constant `TAIL` of `eaft.tuning.search` was chosen by such simulations. This one runs the same
synthetic families (`World`) with other seeds, with the resamples that users get, and under more
conditions. Writes benchmarks/results/guarantee.json and guarantee.md after each condition, and goes
on where it was stopped.
"""

import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from scipy import stats

from eaft.evaluation.paired import RESAMPLES
from eaft.provenance import environment, write_json
from eaft.tuning.confirm import confirm
from eaft.tuning.points import Member, Sums

RESULTS = Path(__file__).parent / "results" / "guarantee.json"
TRIALS, FIRST_SEED = 2000, 2 * 10**6  # seeds from 10**6 on chose how TAIL falls
LEVEL, BUDGET = 0.05, 0.05
PROMPTS = (16, 32, 64, 128)
AT_BUDGET = PROMPTS[1:]  # with 16 prompts nothing is shown, so --strict returns nothing
ALIKE = (1.0, 0.5, 0.0)
World = importlib.import_module("tests.tuning.test_procedure").World
WHAT = {
    "bound": "the returned model's drift is above its bound",
    "nll": "the returned model's change of nll is outside its interval",
    "strict": "`--strict` returns a model over the budget",
    "at the budget": "`--strict` returns a model; most candidates are exactly at the budget",
    "three": "`--strict` returns a model; three candidates, each exactly at the budget",
}
# The hardest first
CONDITIONS = [
    *(("three", prompts, 0.0) for prompts in AT_BUDGET),
    *product(("bound",), PROMPTS, ALIKE),
    *product(("strict",), PROMPTS, ALIKE),
    *product(("at the budget",), AT_BUDGET, ALIKE),
]


@dataclass
class Rate:
    """How often a statement was wrong under one condition, of `TRIALS` trials."""

    what: str  # a key of `WHAT`
    prompts: int  # that confirm
    alike: float  # see `World`
    wrong: int
    returned: int
    low: float  # Clopper and Pearson's 95% interval of the rate
    high: float

    @classmethod
    def of(cls, what: str, prompts: int, alike: float, wrong: int, returned: int) -> "Rate":
        """Return a rate with its interval."""
        interval = stats.binomtest(wrong, TRIALS).proportion_ci(0.95, "exact")
        return cls(what, prompts, alike, wrong, returned, float(interval.low), float(interval.high))

    @property
    def over(self) -> bool:
        """Whether the rate is above its level by more than chance explains."""
        return self.low > LEVEL


def main() -> None:
    """Run all conditions that have no rates yet, and write the rates."""
    settings = {"trials": TRIALS, "first_seed": FIRST_SEED, "resamples": RESAMPLES}
    rates: list[Rate] = []
    if RESULTS.is_file():
        before = json.loads(RESULTS.read_text())
        if {name: before[name] for name in settings} == settings:
            rates = [Rate(**rate) for rate in before["rates"]]
    for what, prompts, alike in CONDITIONS:
        if any((rate.what, rate.prompts, rate.alike) == (what, prompts, alike) for rate in rates):
            continue
        rates += simulate(what, prompts, alike)
        written = [asdict(rate) for rate in rates]
        write_json(RESULTS, {**settings, "rates": written, "environment": environment()})
        RESULTS.with_suffix(".md").write_text(table(rates))
        print(what, prompts, alike, flush=True)


def simulate(what: str, prompts: int, alike: float) -> list[Rate]:
    """Return the rates of one condition."""
    if what == "bound":
        return loose(prompts, alike)
    if what == "three":
        return [three(prompts)]
    return [strict(what, prompts, alike, BUDGET if what == "at the budget" else 0.0)]


def worlds(prompts: int, alike: float, floor: float) -> Iterator[Any]:
    """Yield one synthetic family for each trial."""
    for trial in range(TRIALS):
        yield World(FIRST_SEED + trial, prompts=prompts, alike=alike, floor=floor)


def loose(prompts: int, alike: float) -> list[Rate]:
    """Return how often the bound, and the interval of nll, do not hold without `--strict`."""
    above = outside = returned = 0
    for world in worlds(prompts, alike, 0.0):
        chosen, _, _ = world.tune(BUDGET, False)
        if chosen is None:
            continue
        member = Member(chosen.step, chosen.share)
        returned += 1
        above += world.drift(member) > chosen.bound
        outside += not chosen.nll_low <= -world.gain(member) <= chosen.nll_high
    return [
        Rate.of("bound", prompts, alike, above, returned),
        Rate.of("nll", prompts, alike, outside, returned),
    ]


def strict(what: str, prompts: int, alike: float, floor: float) -> Rate:
    """Return how often `--strict` returns a model whose true drift is not below the budget."""
    wrong = returned = 0
    for world in worlds(prompts, alike, floor):
        chosen, _, _ = world.tune(BUDGET, True)
        if chosen is not None:
            returned += 1
            drift = world.drift(Member(chosen.step, chosen.share))
            wrong += drift >= BUDGET if floor else drift > BUDGET
    return Rate.of(what, prompts, alike, wrong, returned)


def three(prompts: int) -> Rate:
    """Return how often one of three candidates at the budget, of independent errors, passes."""
    members = [Member(10, share) for share in (0.3, 0.4, 0.5)]
    accepted = 0
    for world in worlds(prompts, 0.0, BUDGET):
        drawn = world.parts[1]
        base = Sums(drawn["base"] * drawn["rows"], drawn["rows"])
        accepted += confirm(members, world.measure(1), base, BUDGET, True)[0] is not None
    return Rate.of("three", prompts, 0.0, accepted, accepted)


def line(rate: Rate) -> str:
    """Return a row of the table."""
    share = f"{rate.wrong / TRIALS:.1%} ({rate.low:.1%} to {rate.high:.1%})"
    cells = [WHAT[rate.what], rate.prompts, f"{rate.alike:g}", f"{rate.returned:,}", share]
    return f"| {' | '.join(map(str, cells))} |" + (" **over**" if rate.over else "")


def table(rates: list[Rate]) -> str:
    """Return all rates as Markdown."""
    over = sum(rate.over for rate in rates)
    return (
        "# The guarantee of `eaft tune`, simulated\n\n"
        f"Written by `python -m benchmarks.guarantee`: {TRIALS:,} trials a row, seeds from"
        f" {FIRST_SEED:,} on,\n{RESAMPLES:,} resamples. No constant of the procedure was chosen by"
        f" these seeds. Each rate is to be at most\n{LEVEL:.0%}; of {len(rates)} rates, {over} are"
        " above it by more than their 95% interval. `alike` is the part of a\nprompt's drift that"
        " all models of a run share.\n\n"
        "| what is wrong | prompts | alike | models returned | rate (95% interval) |\n"
        "|---|---|---|---|---|\n" + "".join(f"{line(rate)}\n" for rate in rates)
    )


if __name__ == "__main__":
    main()
