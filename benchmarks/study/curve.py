"""
Put the study together: effect against dose, what it costs, why, and the rule that `eaft inspect`
gives as advice.

    python benchmarks/study/curve.py runs/study     gather what `eaft compare` and `eaft inspect`
    wrote (README.md)
                                                    into benchmarks/study/results/measured first
    python benchmarks/study/curve.py                only what has been gathered

Writes study.json, study.md and curve.png into benchmarks/study/results, and the rule into
src/eaft/inspection/find/rule.json.
"""

import argparse
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import ttest_1samp
from tabulate import tabulate

from eaft.comparison.differences import ratio_difference, score_difference
from eaft.comparison.fronts import Trajectory, compare_fronts
from eaft.comparison.results import Difference
from eaft.evaluation.measured_model import read_items
from eaft.evaluation.paired import holm
from eaft.files import read_jsonl
from eaft.inspection.find.rule import RULE_FILE, Rule
from eaft.provenance import environment, write_json

Numbers = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
MEASURED = RESULTS / "measured"
REFERENCE = "sft"
MASK = "conflict-mask"
GENERAL = "everyday"
COMMON_RATE = 3e-5  # which every condition was trained at
# the rule is tested on this data and never fitted to it: so decided before it was compared
HELD_OUT = "gsm8k-fact"


def gather(folder: Path, inspection: Path) -> Numbers:
    """
    Return all that was measured of a condition: its dose, if its data was inspected, and every
    run's points.
    """
    dose = None
    if (inspection / "summary.json").exists():
        summary = json.loads((inspection / "summary.json").read_text())
        shares, rollouts = (summary["conflicts"]["base"][origin] for origin in ("data", "rollouts"))
        dose = {
            **shares,
            "rollouts": rollouts,
            "own_entropy": summary["entropy"]["base"]["rollouts"],
        }
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
                "grad_norm": mean_grad_norm(file.parent / "metrics.jsonl"),
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
        "dose": dose,
        "prompt_tokens": results["prompts"]["general"]["tokens"],
        "held_out_tokens": results["held_out"]["tokens"],
        "base": {
            "nll": rounded(results["base"]["point"]["nll"]["sums"]),
            "general": scores(folder / "base" / "items"),
        },
        "runs": runs,
    }


def joined(kept: Numbers, measured: Numbers) -> Numbers:
    """
    Return a condition with the runs that were gathered before, on another machine, and those
    measured since.

    Raises:
        ValueError: the base model, prompts, held-out rows or epochs are other ones: no run can
            stand beside another.
    """
    for what in ("prompt_tokens", "held_out_tokens", "base"):
        if kept[what] != measured[what]:
            raise ValueError(
                f"{measured['name']}: {what} is not as gathered before: delete one of the two."
            )
    if len({run["points"][-1]["epoch"] for run in [*kept["runs"], *measured["runs"]]}) > 1:
        raise ValueError(f"{measured['name']}: runs of several lengths: delete some.")

    def key(run: Numbers) -> tuple[str, float, int]:
        return run["objective"], run["learning_rate"], run["seed"]

    runs = {key(run): run for run in [*kept["runs"], *measured["runs"]]}
    return {
        **measured,
        "dose": measured["dose"] or kept["dose"],
        "runs": [runs[k] for k in sorted(runs)],
    }


def mean_grad_norm(metrics: Path) -> float:
    """Return the mean of the gradient norms that a run logged."""
    lines = read_jsonl(metrics, dict[str, Any], "train again.")
    return round(float(np.mean([line["grad_norm"] for line in lines if "grad_norm" in line])), 4)


def rounded(sums: list[float]) -> list[float]:
    """Return sums (nats) to the thousandth: of hundreds of tokens, far below what is uncertain."""
    return [round(value, 3) for value in sums]


def scores(folder: Path) -> list[float] | None:
    """Return the scores of the general task where it was run."""
    file = folder / f"{GENERAL}.jsonl"
    return [item.score for item in read_items(file)] if file.is_file() else None


@dataclass
class Condition:
    """One base model on one kind of data, as `gather` returns it."""

    measured: Numbers

    @property
    def name(self) -> str:
        """Its data and its model."""
        return self.measured["name"]

    @property
    def seeds(self) -> list[int]:
        """The seeds that anything was trained with."""
        return sorted({run["seed"] for run in self.measured["runs"]})

    @property
    def kind(self) -> str:
        """Its data, whatever share of its answers was made to contradict the model."""
        return re.sub(r"(-[\d.]+)?-s[\d.]+$", "", self.name)

    def rates(self, objective: str, seed: int) -> set[float]:
        """Return the learning rates that an objective was trained with, with a seed."""
        return {run["learning_rate"] for run in self.runs(objective, seed)}

    def runs(self, objective: str, seed: int) -> list[Numbers]:
        """Return the runs of an objective with a seed, one a learning rate."""
        return [
            run
            for run in self.measured["runs"]
            if (run["objective"], run["seed"]) == (objective, seed)
        ]

    def compare(
        self, first: str, second: str, rates: set[float], beside: set[float] | None = None
    ) -> Numbers:
        """
        Return how two objectives differ: in drift at matched held-out nll, as a share of the
        second's, and in best nll.

        Each over its runs at these learning rates (the second at those `beside`, if they are
        others), with the seeds that both have at all of them.
        """
        asked_of = ((first, rates), (second, beside or rates))
        seeds = [
            seed
            for seed in self.seeds
            if all(of <= self.rates(name, seed) for name, of in asked_of)
        ]
        sides = [
            {
                seed: [run for run in self.runs(name, seed) if run["learning_rate"] in of]
                for seed in seeds
            }
            for name, of in asked_of
        ]
        paths = [[[self.path(run) for run in side[seed]] for seed in seeds] for side in sides]
        tokens = [np.array(self.measured[name]) for name in ("prompt_tokens", "held_out_tokens")]
        best = [[best_point(side[seed]) for seed in seeds] for side in sides]
        nll = [np.array([point["nll"] for point in of_side]) for of_side in best]
        asked = [[point["general"] for point in of_side] for of_side in best]
        general = None
        if all(scores is not None for of_side in asked for scores in of_side):
            general = unadjusted(score_difference([(np.array(asked[0]), np.array(asked[1]))]))
        found: Numbers = {
            "first": first,
            "second": second,
            "seeds": seeds,
            "learning_rates": sorted(rates),
            "beside": sorted(beside or rates),
            "grad_norm": relative_length(*sides),
            "best_nll": unadjusted(ratio_difference(nll[0], nll[1], tokens[1])),
            "general": general,
            "drift": None,
        }
        front = compare_fronts(paths[0], paths[1], tokens[0], tokens[1])
        if front is not None:
            mean, mean_drift = front.mean, float(np.mean(front.second))
            found["drift"] = {
                "change": mean.change / mean_drift,
                "low": mean.low / mean_drift,
                "high": mean.high / mean_drift,
                "p_value": mean.p_value,
                "per_seed": [change / mean_drift for change in mean.per_seed],
                "of": mean_drift,
                "targets": [front.targets[0], front.targets[-1]],
            }
        return found

    def pairs(self) -> list[Numbers]:
        """
        Return every objective beside SFT at each learning rate and, where some seeds have several,
        at its best.

        And SFT at lower learning rates beside SFT, what else there is beside EAFT, and the mask
        beside the random one.
        """
        lower = {
            rate
            for seed in self.seeds
            for rate in self.rates(REFERENCE, seed)
            if rate < COMMON_RATE
        }
        found = [
            self.compare(REFERENCE, REFERENCE, {rate}, {COMMON_RATE}) for rate in sorted(lower)
        ]
        for name in dict.fromkeys(run["objective"] for run in self.measured["runs"]):
            if name == REFERENCE:
                continue
            common = [
                frozenset(self.rates(name, seed) & self.rates(REFERENCE, seed))
                for seed in self.seeds
            ]
            sets = {*common, *(frozenset([rate]) for rates in common for rate in rates)} - {
                frozenset()
            }
            pairs = [self.compare(name, REFERENCE, set(rates)) for rates in sets]
            found += sorted(
                pairs, key=lambda pair: (-len(pair["seeds"]), -len(pair["learning_rates"]))
            )
        tried = {run["objective"] for run in self.measured["runs"]}
        beside = [(MASK, "eaft"), (MASK, "random-mask"), ("replay", "eaft"), ("sft-kl", "eaft")]
        return found + [
            self.compare(*pair, {COMMON_RATE}) for pair in beside if tried.issuperset(pair)
        ]

    def path(self, run: Numbers) -> Trajectory:
        """Return a run's path, from the base model on."""
        base = {
            "drift": [0.0] * len(self.measured["prompt_tokens"]),
            "nll": self.measured["base"]["nll"],
        }
        points = [base, *run["points"]]
        return Trajectory(
            np.array([p["drift"] for p in points]), np.array([p["nll"] for p in points])
        )


def unadjusted(difference: Difference) -> Numbers:
    """Return a difference for study.json, which adjusts the p of drift alone."""
    return {name: value for name, value in asdict(difference).items() if name != "p_holm"}


def relative_length(
    first: dict[int, list[Numbers]], second: dict[int, list[Numbers]]
) -> float | None:
    """
    Return the mean gradient norm, before clipping, of the one's runs as a share of the other's,
    where kept.
    """
    pairs = [
        (a.get("grad_norm"), b.get("grad_norm"))
        for seed in first
        for a, b in zip(first[seed], second[seed], strict=True)
    ]
    kept = [(a, b) for a, b in pairs if a is not None and b is not None]
    return sum(a for a, _ in kept) / sum(b for _, b in kept) if kept else None


def best_point(runs: list[Numbers]) -> Numbers:
    """Return the checkpoint with the lowest held-out nll, of all learning rates."""
    return min(
        (point for run in runs for point in run["points"]), key=lambda point: sum(point["nll"])
    )


def main() -> None:
    """Read, put together, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "study_dir", type=Path, nargs="?", help="where eaft compare and eaft inspect wrote"
    )
    flags = parser.parse_args()
    if flags.study_dir is not None:
        MEASURED.mkdir(parents=True, exist_ok=True)
        for file in sorted(flags.study_dir.glob("*/results.json")):
            name = file.parent.name
            measured, kept = (
                gather(file.parent, flags.study_dir / "inspect" / name),
                MEASURED / f"{name}.json",
            )
            together = (
                joined(json.loads(kept.read_text()), measured) if kept.is_file() else measured
            )
            if together["dose"] is None:
                raise SystemExit(f"{name}: inspect its data first (run.sh), for the dose.")
            write_json(kept, together)
    conditions = [
        Condition(json.loads(file.read_text())) for file in sorted(MEASURED.glob("*.json"))
    ]
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
        (c, pair) for c in found["conditions"] if (pair := main_pair(c)) is not None
    ]  # of the curve, and the rule
    for (_, pair), p in zip(
        of_eaft, holm([pair["drift"]["p_value"] for _, pair in of_eaft]), strict=True
    ):
        pair["drift"]["p_holm"] = p
    fitted = [(c, pair) for c, pair in of_eaft if c["kind"] != HELD_OUT]
    rule = fit(fitted)
    found["rule"] = None if rule is None else asdict(rule)
    found["tests"] = [
        test
        for kind in dict.fromkeys(c["kind"] for c, _ in of_eaft)
        for test in left_out(kind, of_eaft)
    ]
    found["dose_response"] = dose_response(of_eaft)
    write_json(RESULTS / "study.json", found)
    (RESULTS / "study.md").write_text(report(found))
    draw(found, RESULTS / "curve.png")
    if found["rule"] is not None:
        changes = {
            c["name"]: {"dose": c["dose"]["nll"], "changes": pair["drift"]["per_seed"]}
            for c, pair in fitted
        }
        write_json(
            RULE_FILE, {"rule": found["rule"], "learning_rate": COMMON_RATE, "fitted_to": changes}
        )
    print(report(found))


def main_pair(condition: Numbers) -> Numbers | None:
    """
    Return EAFT beside SFT at the learning rate that all conditions have; None if no target was
    reached by both.
    """
    pairs = [
        p
        for p in condition["pairs"]
        if (p["first"], p["learning_rates"]) == ("eaft", [COMMON_RATE])
    ]
    return pairs[0] if pairs and pairs[0]["drift"] else None


def fit(of_eaft: list[tuple[Numbers, Numbers]]) -> Rule | None:
    """Return the rule through every seed of every condition; None with fewer than three doses."""
    runs = [
        (condition["dose"]["nll"], change)
        for condition, pair in of_eaft
        for change in pair["drift"]["per_seed"]
    ]
    doses, changes = ([run[i] for run in runs] for i in range(2))
    return Rule.fit(doses, changes) if len(set(doses)) > 2 else None


def left_out(kind: str, of_eaft: list[tuple[Numbers, Numbers]]) -> list[Numbers]:
    """
    Return how well the rule predicts the conditions of one kind of data when it is not fitted to
    them.
    """
    rule = fit(
        [
            (condition, pair)
            for condition, pair in of_eaft
            if condition["kind"] not in (kind, HELD_OUT)
        ]
    )
    if rule is None:
        return []
    found = []
    for condition, pair in of_eaft:
        if condition["kind"] == kind:
            expected, changes = rule.expect(condition["dose"]["nll"]), pair["drift"]["per_seed"]
            inside = sum(expected.low <= change <= expected.high for change in changes)
            found.append(
                {
                    "name": condition["name"],
                    **asdict(expected),
                    "seeds": len(changes),
                    "inside": inside,
                }
            )
    return found


def dose_response(of_eaft: list[tuple[Numbers, Numbers]]) -> list[Numbers]:
    """
    Return for each kind of data with three doses or more how a seed's change goes with the dose,
    over its seeds.

    A seed has the same rows at every dose, so that what its rows are like falls out of its slope:
    that of the line through its changes (least squares), per tenth of the base model's nll. The
    interval is Student's over seeds.
    """
    found = []
    for kind in dict.fromkeys(condition["kind"] for condition, _ in of_eaft):
        mine = [
            (c["dose"]["nll"], dict(zip(p["seeds"], p["drift"]["per_seed"], strict=True)))
            for c, p in of_eaft
            if c["kind"] == kind
        ]
        seeds = sorted(set.intersection(*(set(changes) for _, changes in mine)))
        if len(mine) < 3 or len(seeds) < 3:
            continue
        doses = [10 * dose for dose, _ in mine]
        slopes = [
            float(np.polyfit(doses, [changes[seed] for _, changes in mine], 1)[0]) for seed in seeds
        ]
        test = ttest_1samp(slopes, 0)
        low, high = test.confidence_interval()
        interval = {"change": float(np.mean(slopes)), "low": float(low), "high": float(high)}
        found.append(
            {
                "kind": kind,
                "seeds": seeds,
                **interval,
                "p_value": float(test.pvalue),
                "per_seed": slopes,
            }
        )
    return found


def report(found: Numbers) -> str:
    """Return the tables."""
    rows = [
        [
            condition["name"],
            f"{condition['dose']['nll']:.0%}",
            f"{condition['dose']['own_entropy']:.2f}",
            pair["first"] + ("" if pair["second"] == REFERENCE else f" less {pair['second']}"),
            len(pair["seeds"]),
            ", ".join(f"{rate:g}" for rate in pair["learning_rates"])
            + (
                "" if pair["beside"] == pair["learning_rates"] else f" beside {pair['beside'][0]:g}"
            ),
            "" if pair["grad_norm"] is None else f"{pair['grad_norm']:.0%}",
            shown(pair["drift"], percent=True) if pair["drift"] else "no target that both reach",
            shown(pair["best_nll"]),
            shown(pair["general"], percent=True).replace("%", "") if pair["general"] else "",
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
        "learning rates",
        "gradients before clipping, share",
        "drift minus SFT's",
        "best nll minus SFT's",
        f"{GENERAL} minus SFT's, points",
    ]
    tests = [
        [
            test["name"],
            f"{test['change']:+.0%}",
            f"{test['low']:+.0%} to {test['high']:+.0%}",
            f"{test['inside']} of {test['seeds']}",
        ]
        for test in found["tests"]
    ]
    parts = [tabulate(rows, headers, tablefmt="github", disable_numparse=True)]
    if tests:
        headers = ["its kind of data left out", "foretold", "95% of runs", "inside"]
        parts.append(tabulate(tests, headers, tablefmt="github", disable_numparse=True))
    if found["dose_response"]:
        slopes = [
            [
                slope["kind"],
                len(slope["seeds"]),
                (
                    f"{100 * slope['change']:+.1f} ({100 * slope['low']:+.1f} to"
                    f" {100 * slope['high']:+.1f})"
                ),
                f"{slope['p_value']:.2g}",
                ", ".join(f"{100 * of_seed:+.1f}" for of_seed in slope["per_seed"]),
            ]
            for slope in found["dose_response"]
        ]
        headers = [
            "data",
            "seeds",
            "drift minus SFT's, points a tenth of the nll more in conflicts",
            "p",
            "per seed",
        ]
        parts.append(tabulate(slopes, headers, tablefmt="github", disable_numparse=True))
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
            100 * doses, low, high, color="black", alpha=0.08, lw=0, label="the rule: 95% of runs"
        )
    for color, kind in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], kinds, strict=False):
        points = [
            (
                100 * c["dose"]["nll"],
                *(100 * pair["drift"][name] for name in ("change", "low", "high")),
            )
            for c in found["conditions"]
            if c["kind"] == kind and (pair := main_pair(c)) is not None
        ]
        if points:
            x, y, low, high = np.array(points).T
            label = f"{kind}, not fitted" if kind == HELD_OUT else kind
            axes.errorbar(
                x, y, yerr=[y - low, high - y], fmt="o", color=color, capsize=3, label=label
            )
    axes.axhline(0, color="black", lw=0.8, ls=":")
    axes.set(
        xlabel="share of the base model's nll in confident conflicts (%)",
        ylabel="EAFT's drift minus SFT's, % of SFT's\n(same held-out nll)  ←  better",
        title="When does EAFT help?",
    )
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
