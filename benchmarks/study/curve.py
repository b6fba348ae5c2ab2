"""
Put the study together: effect against dose, what it costs, why, and the rule that `eaft inspect` gives as advice.

    python benchmarks/study/curve.py runs/study     gather what `eaft compare` and `eaft inspect` wrote (README.md)
                                                    into benchmarks/study/results/measured first
    python benchmarks/study/curve.py                only what has been gathered

Writes study.json, study.md and curve.png into benchmarks/study/results, and the rule into
src/eaft/inspection/rule.json.
"""

import argparse
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from tabulate import tabulate

from eaft.comparison.differences import ratio_difference, score_difference
from eaft.comparison.fronts import Path as RunPath
from eaft.comparison.fronts import compare_fronts, relative
from eaft.evaluation.measured import read_jsonl
from eaft.evaluation.paired import holm
from eaft.inspection.rule import RULE_FILE, Rule
from eaft.provenance import environment, write_json

Numbers = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
MEASURED = RESULTS / "measured"
REFERENCE = "sft"
GENERAL = "everyday"


def gather(folder: Path, inspection: Path) -> Numbers:
    """Return all that was measured of a condition: its dose under the base model, and every run's points."""
    summary = json.loads((inspection / "summary.json").read_text())
    shares, rollouts = (summary["conflicts"]["base"][origin] for origin in ("data", "rollouts"))
    results = json.loads((folder / "results.json").read_text())
    runs = []
    for file in sorted(folder.glob("*/points.json")):
        trained = json.loads((file.parent / "run.json").read_text())
        points = {int(step): point for step, point in json.loads(file.read_text()).items()}
        if max(points) != trained["result"]["steps"]:
            continue  # it is being measured
        runs.append(
            {
                "objective": file.parent.name.partition("-lr")[0],
                "learning_rate": float(trained["config"]["learning_rate"]),
                "seed": trained["seed"],
                "commit": trained["environment"]["commit"],
                "points": [
                    {
                        "epoch": point["epoch"],
                        "drift": rounded(point["drift"]["general"]),
                        "nll": rounded(point["nll"]),
                        "general": scores(file.parent / "items" / f"step-{step}"),
                    }
                    for step, point in sorted(points.items())
                ],
            }
        )
    return {
        "name": folder.name,
        "dose": {**shares, "rollouts": rollouts, "own_entropy": summary["entropy"]["base"]["rollouts"]},
        "prompt_tokens": results["prompts"]["general"]["tokens"],
        "held_out_tokens": results["held_out"]["tokens"],
        "base": {"nll": rounded(results["base"]["point"]["nll"]["sums"]), "general": scores(folder / "base" / "items")},
        "runs": runs,
    }


def rounded(sums: list[float]) -> list[float]:
    """Return sums (nats) to the thousandth: of hundreds of tokens, far below what is uncertain."""
    return [round(value, 3) for value in sums]


def scores(folder: Path) -> list[float] | None:
    """Return the scores of the general task where it was run."""
    file = folder / f"{GENERAL}.jsonl"
    return [item["score"] for item in read_jsonl(file)] if file.is_file() else None


@dataclass
class Condition:
    """One base model on one kind of data, as `gather` returns it."""

    measured: Numbers

    @property
    def name(self) -> str:
        """Its data and its model."""
        return self.measured["name"]

    @property
    def kind(self) -> str:
        """Its data, whatever share of its answers was made to contradict the model."""
        return re.sub(r"(-[\d.]+)?-s[\d.]+$", "", self.name)

    def seeds(self, objective: str) -> set[int]:
        """Return the seeds that an objective was trained with."""
        return {run["seed"] for run in self.measured["runs"] if run["objective"] == objective}

    def runs(self, objective: str, seed: int) -> list[Numbers]:
        """Return the runs of an objective with a seed, one a learning rate."""
        return [run for run in self.measured["runs"] if (run["objective"], run["seed"]) == (objective, seed)]

    def compare(self, first: str, second: str, only: float | None = None) -> Numbers | None:
        """
        Return how two objectives differ: in drift at matched held-out nll, as a share of the second's, and in best nll.

        Over the seeds that both were trained with, and the learning rates that all of these have, or `only` one of
        them; None if none.
        """
        sides = [{seed: self.runs(name, seed) for seed in self.seeds(name)} for name in (first, second)]
        seeds = sorted(sides[0].keys() & sides[1].keys())
        rates = [{run["learning_rate"] for run in side[seed]} for side in sides for seed in seeds]
        rates = sorted(set.intersection(*rates)) if rates else []
        rates = [rate for rate in rates if only in (None, rate)]
        if not rates:
            return None
        sides = [{seed: [r for r in side[seed] if r["learning_rate"] in rates] for seed in seeds} for side in sides]
        paths = [[[self.path(run) for run in side[seed]] for seed in seeds] for side in sides]
        tokens = [np.array(self.measured[name]) for name in ("prompt_tokens", "held_out_tokens")]
        best = [[best_point(side[seed]) for seed in seeds] for side in sides]
        nll = [np.array([point["nll"] for point in of_side]) for of_side in best]
        asked = [[point["general"] for point in of_side] for of_side in best]
        general = None
        if all(scores is not None for of_side in asked for scores in of_side):
            general = asdict(score_difference([(np.array(asked[0]), np.array(asked[1]))]))
        found: Numbers = {
            "first": first,
            "second": second,
            "seeds": seeds,
            "learning_rates": rates,
            "best_nll": asdict(ratio_difference(nll[0], nll[1], tokens[1])),
            "general": general,
            "drift": None,
        }
        front = compare_fronts(paths[0], paths[1], tokens[0], tokens[1])
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

    def pairs(self) -> list[Numbers]:
        """Return every objective beside SFT, over all learning rates and then at each by itself."""
        found = []
        for name in dict.fromkeys(run["objective"] for run in self.measured["runs"]):
            if name != REFERENCE and (pair := self.compare(name, REFERENCE)) is not None:
                found.append({**pair, "at_each": [self.compare(name, REFERENCE, r) for r in pair["learning_rates"]]})
        return found

    def path(self, run: Numbers) -> RunPath:
        """Return a run's path, from the base model on."""
        base = {"drift": [0.0] * len(self.measured["prompt_tokens"]), "nll": self.measured["base"]["nll"]}
        points = [base, *run["points"]]
        return RunPath(np.array([p["drift"] for p in points]), np.array([p["nll"] for p in points]))


def best_point(runs: list[Numbers]) -> Numbers:
    """Return the checkpoint with the lowest held-out nll, of all learning rates."""
    return min((point for run in runs for point in run["points"]), key=lambda point: sum(point["nll"]))


def main() -> None:
    """Read, put together, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study_dir", type=Path, nargs="?", help="where eaft compare and eaft inspect wrote")
    flags = parser.parse_args()
    if flags.study_dir is not None:
        MEASURED.mkdir(parents=True, exist_ok=True)
        for file in sorted(flags.study_dir.glob("*/results.json")):
            name = file.parent.name
            write_json(MEASURED / f"{name}.json", gather(file.parent, flags.study_dir / "inspect" / name))
    conditions = [Condition(json.loads(file.read_text())) for file in sorted(MEASURED.glob("*.json"))]
    found: Numbers = {
        "environment": environment(),
        "conditions": [
            {
                "name": condition.name,
                "kind": condition.kind,
                "dose": condition.measured["dose"],
                "commits": sorted({run["commit"] for run in condition.measured["runs"]}),
                "pairs": condition.pairs(),
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
    write_json(RESULTS / "study.json", found)
    (RESULTS / "study.md").write_text(report(found))
    draw(found, RESULTS / "curve.png")
    if found["rule"] is not None:
        write_json(RULE_FILE, {"rule": found["rule"], "points": points})
    print(report(found))


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
            ", ".join(f"{rate:g}" for rate in pair["learning_rates"]),
            shown(pair["drift"], percent=True) if pair["drift"] else "no target that both reach",
            shown(pair["best_nll"]),
            shown(pair["general"], percent=True).replace("%", "") if pair["general"] else "",
        ]
        for condition in found["conditions"]
        for of_all in condition["pairs"]
        for pair in (of_all, *(of_all["at_each"] if len(of_all["at_each"]) > 1 else []))
    ]
    headers = [
        "condition",
        "nll in conflicts",
        "own entropy",
        "objective",
        "seeds",
        "learning rates",
        "drift less SFT's",
        "best nll less SFT's",
        f"{GENERAL} less SFT's, points",
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
