"""
Put the budget study together: results/table.md and results/table.png, from what `run.py` measured.

    python -m benchmarks.budget.table
"""

import json
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats
from tabulate import tabulate

from benchmarks.budget.run import BUDGETS, LOOKED_AT
from benchmarks.budget.settings import ARMS, RESULTS, SETTINGS

WAYS = ("checkpoints", "interpolation")
OTHER = (
    *("drift, tokens 0 to 64", "64 to 256", "drift, IFEval prompts"),
    *("MMLU nll, change", "PubMedQA nll, change"),
)
Run = dict[str, Any]
Runs = dict[str, dict[int, Run]]  # by arm and seed


def main() -> None:
    """Write both files."""
    runs = {name: found for name in SETTINGS if (found := load(name))}
    parts = [
        "# Held-out nll at a drift budget\n",
        "Written by `python -m benchmarks.budget.table`; [README](../README.md) has the rule. Each"
        " cell has the mean over seeds in nats per token, and the difference, paired by seed, with"
        " its 95% t interval.",
    ]
    for name, found in runs.items():
        parts += section(name, found)
    (RESULTS / "table.md").write_text("\n".join(parts) + "\n")
    draw(runs)
    print(f"Written: {RESULTS / 'table.md'}, {RESULTS / 'table.png'}")


def load(setting: str) -> Runs:
    """Return a setting's runs by arm and seed, without arms that have none."""
    runs: Runs = {}
    for arm in ARMS:
        for file in sorted((RESULTS / setting).glob(f"{arm}-[0-9].json")):
            runs.setdefault(arm, {})[int(file.stem[-1])] = json.loads(file.read_text())
    return runs


def section(setting: str, runs: Runs) -> list[str]:
    """Return the tables of a setting."""
    base = next(iter(runs["sft"].values()))["base"]["nll"]
    parts = [
        f"\n## {SETTINGS[setting].title}\n",
        f"The base model's held-out nll is {base:.3f} nats per token. Seeds: "
        + "; ".join(f"`{arm}` {len(found)}" for arm, found in runs.items())
        + ".",
    ]
    for way in WAYS:
        parts += [f"\n### {way.capitalize()}\n", outcome_table(runs, way)]
    parts += ["\n### Interpolation against checkpoints, the same runs\n", gain_table(runs)]
    if SETTINGS[setting].others:
        parts += [f"\n### The models chosen at {LOOKED_AT}, on other data\n", other_table(runs)]
        parts += ["\nInterpolation, minus `sft`:\n", other_differences(runs)]
    return parts


def chosen(run: Run, way: str, budget: float) -> dict[str, Any] | None:
    """Return the numbers of the model that a way chose within a budget; None is the base model."""
    (choice,) = (c for c in run["choices"] if (c["way"], c["budget"]) == (way, budget))
    return next((c for c in run["chosen"] if c["member"] == choice["member"]), None)


def nll(run: Run, way: str, budget: float) -> float:
    """Return the reported held-out nll (nats per token)."""
    numbers = chosen(run, way, budget)
    return run["base"]["nll"] if numbers is None else numbers["reported"]["nll"]


def drift(run: Run, way: str, budget: float) -> float:
    """Return the reported drift (nats per token)."""
    numbers = chosen(run, way, budget)
    return 0.0 if numbers is None else numbers["reported"]["drift"]


def interval(values: list[float]) -> str:
    """Return a mean with its 95% t interval over seeds."""
    mean = np.mean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def paired(first: dict[int, float], second: dict[int, float]) -> str:
    """Return how two arms differ in a number, over the seeds that both have."""
    return interval([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def outcome_table(runs: Runs, way: str) -> str:
    """Return the nll and the drift of each arm, and its difference from SFT."""
    rows = []
    for arm, by_seed in runs.items():
        row = [f"`{arm}`"]
        for budget in BUDGETS:
            nlls = {seed: nll(run, way, budget) for seed, run in by_seed.items()}
            drifts = [drift(run, way, budget) for run in by_seed.values()]
            row.append(f"{np.mean(list(nlls.values())):.3f} (drift {np.mean(drifts):.3f})")
            sft = {seed: nll(run, way, budget) for seed, run in runs["sft"].items()}
            row.append("" if arm == "sft" else paired(nlls, sft))
        rows.append(row)
    headers = ["arm"]
    for budget in BUDGETS:
        headers += [f"budget {budget}", "minus `sft`"]
    return tabulate(rows, headers, tablefmt="github")


def gain_table(runs: Runs) -> str:
    """Return what interpolation adds to the checkpoints of the same runs."""
    rows = []
    for arm, by_seed in runs.items():
        row = [f"`{arm}`"]
        for budget in BUDGETS:
            changes = [
                nll(run, "interpolation", budget) - nll(run, "checkpoints", budget)
                for run in by_seed.values()
            ]
            row.append(interval(changes))
        rows.append(row)
    return tabulate(rows, ["arm", *(f"budget {b}" for b in BUDGETS)], tablefmt="github")


def other_table(runs: Runs) -> str:
    """Return drift by position, and what was forgotten on other data; means over seeds."""
    rows = []
    for way in WAYS:
        for arm, by_seed in runs.items():
            found = [numbers for run in by_seed.values() if (numbers := other(run, way))]
            if found:
                means = np.mean(found, axis=0)
                cells = [f"{m:.3f}" if i < 3 else f"{m:+.3f}" for i, m in enumerate(means)]
                rows.append([f"`{arm}`", way, len(found), *cells])
    return tabulate(rows, ["arm", "way", "seeds", *OTHER], tablefmt="github", disable_numparse=True)


def other_differences(runs: Runs) -> str:
    """Return how the arms differ from SFT on other data, each interpolated; paired by seed."""

    def column(arm: str, i: int) -> dict[int, float]:
        found = {seed: other(run, "interpolation") for seed, run in runs[arm].items()}
        return {seed: numbers[i] for seed, numbers in found.items() if numbers is not None}

    rows = [
        [f"`{arm}`", *(paired(column(arm, i), column("sft", i)) for i in range(len(OTHER)))]
        for arm in runs
        if arm != "sft"
    ]
    return tabulate(rows, ["arm", *OTHER], tablefmt="github", disable_numparse=True)


def other(run: Run, way: str) -> list[float] | None:
    """Return the numbers of `OTHER` of the model chosen at `LOOKED_AT`; None for the base model."""
    numbers, base = chosen(run, way, LOOKED_AT), run["base"]
    if numbers is None:
        return None
    drifts = [numbers["by_position"][part] for part in ("to_64", "to_256")]
    mmlu, pubmedqa = numbers["other"]["nll"] - base["mmlu"], numbers["pubmedqa"] - base["pubmedqa"]
    return [*drifts, numbers["other"]["drift"], mmlu, pubmedqa]


def draw(settings: dict[str, Runs]) -> None:
    """
    Draw reported held-out nll against the budget: dashed for checkpoints, solid interpolated.

    Arms of one or two seeds are left out.
    """
    figure, panels = plt.subplots(
        1, len(settings), figsize=(4.5 * len(settings), 4.5), squeeze=False, layout="constrained"
    )
    colours = {arm: f"C{i}" for i, arm in enumerate(ARMS)}
    for axes, (name, runs) in zip(panels[0], settings.items(), strict=True):
        for arm, by_seed in runs.items():
            if len(by_seed) < 3:
                continue
            for way, style in zip(WAYS, ("--", "-"), strict=True):
                means = [np.mean([nll(run, way, b) for run in by_seed.values()]) for b in BUDGETS]
                label = arm if way == "interpolation" else None
                axes.plot(BUDGETS, means, style, marker="o", color=colours[arm], label=label)
        axes.set_title(SETTINGS[name].title, fontsize=10)
        axes.set_xlabel("drift budget (nats per token)")
        axes.set_ylabel("held-out nll (nats per token)")
        axes.legend(fontsize=8)
    figure.suptitle("dashed: best checkpoint; solid: with interpolation")
    figure.savefig(RESULTS / "table.png", dpi=120)


if __name__ == "__main__":
    main()
