"""
Put the study together: effect against dose, what it costs, why, and the rule that `eaft inspect` gives as advice.

    python benchmarks/study/curve.py runs/study

reads what `eaft compare` and `eaft inspect` wrote there (see README.md) and writes study.json, study.md and curve.png
into benchmarks/study/results, and the rule into src/eaft/inspection/rule.json.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from tabulate import tabulate

from eaft.comparison.differences import ratio_difference
from eaft.comparison.fronts import Path as RunPath
from eaft.comparison.fronts import compare_fronts, relative
from eaft.evaluation.paired import holm
from eaft.inspection.rule import RULE_FILE, Rule
from eaft.provenance import environment, write_json

Numbers = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
REFERENCE = "sft"


@dataclass
class Condition:
    """One base model on one kind of data: its dose under the base model, and what `eaft compare` measured."""

    name: str
    dose: Numbers
    results: Numbers

    @property
    def kind(self) -> str:
        """What the dose is of: the data, or how conflicts were injected into it."""
        return self.name.rpartition("-")[0]

    def seeds(self, objective: str) -> list[int]:
        """Return the seeds that an objective was trained with."""
        return sorted({run["seed"] for run in self.results["runs"] if run["objective"] == objective})

    def rates(self, objective: str) -> list[float]:
        """Return the learning rates that an objective was trained with, with every seed."""
        of_seed = [
            {r["learning_rate"] for r in self.results["runs"] if (r["objective"], r["seed"]) == (objective, seed)}
            for seed in self.seeds(objective)
        ]
        return sorted(set.intersection(*of_seed))

    def paths(self, objective: str, seeds: list[int], rates: list[float]) -> list[list[RunPath]]:
        """Return an objective's paths, seed by seed, one a learning rate."""
        base = self.results["base"]["point"]
        return [
            [
                RunPath(
                    np.array([point["drift"]["general"]["sums"] for point in (base, *run["points"])]),
                    np.array([point["nll"]["sums"] for point in (base, *run["points"])]),
                )
                for run in self.results["runs"]
                if (run["objective"], run["seed"]) == (objective, seed) and run["learning_rate"] in rates
            ]
            for seed in seeds
        ]

    def compare(self, first: str, second: str, rates: tuple[list[float], list[float]] | None = None) -> Numbers | None:
        """
        Return how two objectives differ: in drift at matched held-out nll, as a share of the second's, and in best nll.

        Args:
            rates: of each; default: those that both were trained with.
        """
        seeds = [seed for seed in self.seeds(first) if seed in self.seeds(second)]
        both = [rate for rate in self.rates(first) if rate in self.rates(second)]
        of_first, of_second = rates or (both, both)
        sides = self.paths(first, seeds, of_first), self.paths(second, seeds, of_second)
        prompt_tokens = np.array(self.results["prompts"]["general"]["tokens"])
        held_out_tokens = np.array(self.results["held_out"]["tokens"])
        front = compare_fronts(*sides, prompt_tokens, held_out_tokens)
        best_first, best_second = (np.array([best_nll(paths) for paths in side]) for side in sides)
        found = {
            "first": first,
            "second": second,
            "seeds": seeds,
            "rates": {first: of_first, second: of_second},
            "best_nll": asdict(ratio_difference(best_first, best_second, held_out_tokens)),
            "drift": None,
        }
        if front is not None:
            mean_drift = float(np.mean(front["second"]))
            found["drift"] = {
                **relative(front),
                "p_value": front["mean"]["p_value"],
                "per_seed": [change / mean_drift for change in front["mean"]["per_seed"]],
                "of": mean_drift,
                "targets": [front["targets"][0], front["targets"][-1]],
            }
        return found


def best_nll(paths: list[RunPath]) -> np.ndarray:
    """Return the held-out examples' nll at the checkpoint where their sum is lowest."""
    points = np.concatenate([path.shortfall[1:] for path in paths])
    return points[points.sum(axis=1).argmin()]


def main() -> None:
    """Read, put together, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study_dir", type=Path, help="where eaft compare and eaft inspect wrote")
    flags = parser.parse_args()
    conditions = [read(file.parent, flags.study_dir) for file in sorted(flags.study_dir.glob("*/results.json"))]
    found: Numbers = {
        "environment": environment(),
        "conditions": [
            {
                "name": condition.name,
                "kind": condition.kind,
                "dose": condition.dose,
                "commits": sorted({run["commit"] for run in condition.results["runs"]}),
                "pairs": [
                    condition.compare(name, REFERENCE) for name in condition.results["objectives"] if name != REFERENCE
                ],
            }
            for condition in conditions
        ],
    }
    of_eaft = [
        (c, pair) for c in found["conditions"] for pair in c["pairs"] if pair["first"] == "eaft" and pair["drift"]
    ]
    for (_, pair), p in zip(of_eaft, holm([pair["drift"]["p_value"] for _, pair in of_eaft]), strict=True):
        pair["drift"]["p_holm"] = p
    points = {c["name"]: (c["dose"]["nll"], pair["drift"]["change"]) for c, pair in of_eaft}
    found["rule"] = asdict(Rule.fit(*map(list, zip(*points.values(), strict=True)))) if len(points) > 2 else None
    found["tests"] = [left_out(kind, of_eaft) for kind in dict.fromkeys(c["kind"] for c, _ in of_eaft)]
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "study.json", found)
    (RESULTS / "study.md").write_text(report(found))
    draw(found, RESULTS / "curve.png")
    if found["rule"] is not None:
        write_json(RULE_FILE, {"rule": found["rule"], "points": points})
    print(report(found))


def read(folder: Path, study_dir: Path) -> Condition:
    """Return a condition, from its comparison and the inspection of the same name."""
    summary = json.loads((study_dir / "inspect" / folder.name / "summary.json").read_text())
    shares, rollouts = (summary["conflicts"]["base"][origin] for origin in ("data", "rollouts"))
    dose = {**shares, "rollouts": rollouts, "own_entropy": summary["entropy"]["base"]["rollouts"]}
    return Condition(folder.name, dose, json.loads((folder / "results.json").read_text()))


def left_out(kind: str, of_eaft: list[tuple[Numbers, Numbers]]) -> Numbers:
    """Return how well the rule foretells one kind of data when it is fitted to the others."""
    others = [(c["dose"]["nll"], pair["drift"]["change"]) for c, pair in of_eaft if c["kind"] != kind]
    found: Numbers = {"kind": kind, "fitted_to": len(others), "conditions": []}
    if len({dose for dose, _ in others}) < 3:
        return found
    rule = Rule.fit(*map(list, zip(*others, strict=True)))
    for condition, pair in of_eaft:
        if condition["kind"] == kind:
            expected = rule.expect(condition["dose"]["nll"])
            inside = expected.low <= pair["drift"]["change"] <= expected.high
            found["conditions"].append({"name": condition["name"], **asdict(expected), "inside": inside})
    return found


def report(found: Numbers) -> str:
    """Return the tables."""
    rows = [
        [
            condition["name"],
            f"{condition['dose']['nll']:.0%}",
            f"{condition['dose']['own_entropy']:.2f}",
            pair["first"],
            len(pair["seeds"]),
            shown(pair["drift"], percent=True) if pair["drift"] else "no target that both reach",
            shown(pair["best_nll"]),
        ]
        for condition in found["conditions"]
        for pair in condition["pairs"]
    ]
    headers = [
        "condition",
        "nll in conflicts",
        "own entropy",
        "objective",
        "seeds",
        "drift less SFT's",
        "best nll less SFT's",
    ]
    tests = [
        [c["name"], f"{c['change']:+.0%}", f"{c['low']:+.0%} to {c['high']:+.0%}", "yes" if c["inside"] else "no"]
        for test in found["tests"]
        for c in test["conditions"]
    ]
    parts = [tabulate(rows, headers, tablefmt="github", disable_numparse=True)]
    if tests:
        parts.append(
            tabulate(tests, ["left out", "foretold", "95%", "inside"], tablefmt="github", disable_numparse=True)
        )
    return "\n\n".join(parts) + "\n"


def shown(difference: Numbers, percent: bool = False) -> str:
    """Return a difference with its interval."""
    numbers = [difference[name] for name in ("change", "low", "high")]
    change, low, high = (f"{100 * x:+.0f}%" if percent else f"{x:+.3f}" for x in numbers)
    return f"{change} ({low} to {high})"


def draw(found: Numbers, file: Path) -> None:
    """Draw effect against dose, a colour for each kind of data, with the rule and its interval."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    kinds = list(dict.fromkeys(c["kind"] for c in found["conditions"]))
    if found["rule"] is not None:
        rule = Rule(**found["rule"])
        doses = np.linspace(rule.lowest, rule.highest, 50)
        expected = [rule.expect(dose) for dose in doses]
        axes.plot(100 * doses, [100 * e.change for e in expected], color="black", lw=1)
        low, high = ([100 * getattr(e, end) for e in expected] for end in ("low", "high"))
        axes.fill_between(
            100 * doses, low, high, color="black", alpha=0.08, lw=0, label="the rule, for one more condition"
        )
    for color, kind in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], kinds, strict=False):
        points = [
            (100 * c["dose"]["nll"], *(100 * pair["drift"][name] for name in ("change", "low", "high")))
            for c in found["conditions"]
            for pair in c["pairs"]
            if c["kind"] == kind and pair["first"] == "eaft" and pair["drift"]
        ]
        if points:
            x, y, low, high = np.array(points).T
            axes.errorbar(x, y, yerr=[y - low, high - y], fmt="o", color=color, capsize=3, label=kind)
    axes.axhline(0, color="black", lw=0.8, ls=":")
    axes.set(
        xlabel="share of the base model's nll in confident conflicts (%)",
        ylabel="EAFT's drift less SFT's, % of SFT's\n(same held-out nll)  ←  better",
        title="When does EAFT help?",
    )
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
