"""Tables and picture of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from tabulate import tabulate

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def evaluation(results: dict[str, Any]) -> str:
    """Return an evaluation (`eaft eval`'s results) as Markdown: tables, drift and the worst regressions."""
    name = Path(results["model"]).name
    protocol = results["protocol"]
    template = "with" if protocol["apply_chat_template"] else "without"
    note = f"Asked {template} chat template, seed {protocol['seed']}"
    note += f", at most {protocol['limit']} items a task." if protocol["limit"] else "."
    if results["base"] is None:
        rows = [
            [task, t["metric"], t["n"], f"{100 * t['score']:.1f}", f"{100 * t['low']:.1f} to {100 * t['high']:.1f}"]
            for task, t in results["tasks"].items()
        ]
        headers = ["task", "metric", "items", "score %", "95% interval"]
        return f"# {name}\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n\n{note}\n"

    means = {f"**mean: {suite}**": change for suite, change in results["means"].items()}
    rows = []
    for task, c in {**results["tasks"], **means}.items():
        known = (
            "" if c["lost_beyond_chance"] is None else f"{c['lost_beyond_chance']:.0f}, {c['gained_beyond_chance']:.0f}"
        )
        rows.append(
            [
                task,
                c["n"],
                f"{100 * c['before']:.1f}",
                f"{100 * c['after']:.1f}",
                f"{100 * c['change']:+.1f}",
                f"{100 * c['low']:+.1f} to {100 * c['high']:+.1f}",
                f"{c['p_value']:.2g}",
                f"{c['lost']}, {c['gained']}",
                known,
                f"{100 * c['smallest_drop']:.1f}",
            ]
        )
    headers = ["task", "items", "before %", "after %", "change", "95% interval", "p", "lost, gained"]
    headers += ["beyond chance", "smallest drop"]
    lines = [
        f"# {name}, beside {Path(results['base']).name}",
        tabulate(rows, headers, tablefmt="github", disable_numparse=True),
        f"{note} Change: percentage points. p: exact McNemar test, or for scores between 0 and 1 a test that swaps the "
        "models' scores. Beyond chance: items lost and gained less what guessing explains (multiple choice). Smallest "
        "drop: what this many items would show four times in five; a smaller one can be there unseen.",
    ]
    if (drift := results["drift"]) is not None:
        quantiles = ", ".join(f"{q} {value:.4f}" for q, value in drift["quantiles"].items())
        lines.append(
            f"**Drift** {drift['mean']:.4f} (95%: {drift['low']:.4f} to {drift['high']:.4f}): mean KL(base ‖ tuned), "
            f"nats per token, over {drift['tokens']} tokens of the base model's own answers to "
            f"{len(drift['per_prompt'])} prompts. Quantiles over prompts: {quantiles}."
        )
    lines += ["![Changes and drift](changes.png)", f"## The {len(results['worst'])} worst regressions"]
    for i, item in enumerate(results["worst"], 1):
        before, after = item["before"], item["after"]
        lines.append(
            f"### {i}. {item['task']}, item {item['doc_id']}: {before['score']:g} to {after['score']:g}\n\n"
            f"Prompt (its end):\n\n{quote(item['prompt'][-600:])}\n\nBefore:\n\n{quote(before['response'])}\n\n"
            f"After:\n\n{quote(after['response'])}\n\nTarget: `{str(item['target'])[-200:]}`"
        )
    return "\n\n".join(lines) + "\n"


def quote(text: Any) -> str:
    """Return text as an indented Markdown block, cut at 600 characters."""
    text = str(text)
    return (
        "\n".join("    " + line for line in (text[:600] + (" [...]" if len(text) > 600 else "")).splitlines()) or "    "
    )


def draw_changes(results: dict[str, Any], path: Path) -> None:
    """Draw every task's change with its 95% interval, and how drift is spread over prompts."""
    rows = [*results["tasks"].items(), *((f"mean: {name}", c) for name, c in results["means"].items())][::-1]
    height = max(2.2, 0.4 * len(rows) + 1.2)
    drift = results["drift"]
    figure, axes = plt.subplots(1, 1 if drift is None else 2, figsize=(10, height), layout="constrained", squeeze=False)
    axis = axes[0, 0]
    for y, (_, c) in enumerate(rows):
        sure = c["low"] > 0 or c["high"] < 0
        color = "tab:gray" if not sure else "tab:green" if c["change"] > 0 else "tab:red"
        ends = [[100 * (c["change"] - c["low"])], [100 * (c["high"] - c["change"])]]
        axis.errorbar(100 * c["change"], y, xerr=ends, fmt="o", capsize=3, color=color)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set(xlabel="change, percentage points (95% interval)", ylim=(-0.6, len(rows) - 0.4))
    axis.grid(alpha=0.3)
    if drift is not None:
        axis = axes[0, 1]
        axis.hist(drift["per_prompt"], bins=16, color="tab:blue", alpha=0.8)
        axis.axvline(drift["mean"], color="black", linewidth=0.8)
        axis.set(xlabel="drift of a prompt's answer, nats per token", ylabel="prompts")
        axis.grid(alpha=0.3)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write the picture whole or not at all."""
    staging = path.with_name(f"{path.stem}.tmp{path.suffix}")
    figure.savefig(staging, dpi=150)
    plt.close(figure)
    staging.replace(path)
