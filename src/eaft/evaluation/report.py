"""Tables and picture of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from eaft.evaluation.paired import ALPHA, FEWEST_ITEMS, FEWEST_PROMPTS
from eaft.evaluation.verdict import p_text
from eaft.text import block, code, markdown, markdown_strings, table

plt.rcParams["text.parse_math"] = False  # a name with dollars is no formula

Result = dict[str, Any]


def evaluation(results: Result) -> str:
    """
    Return an evaluation (`eaft eval`'s results) as Markdown: with a base model, the verdict and
    what proves it.
    """
    as_they_are = ("verdict", "worst", "differs")  # Markdown already, and what goes into code
    safe = markdown_strings(
        {key: value for key, value in results.items() if key not in as_they_are}
    )
    results = safe | {key: results[key] for key in as_they_are if key in results}
    name = Path(results["model"]).name
    if results["base"] is None:
        parts = [f"# {name}", scores_table(results["tasks"])]
    else:
        parts = [results["verdict"]["sentence"], f"# {name}, beside {Path(results['base']).name}"]
        if results["tasks"]:
            parts += [
                changes_table(results),
                *beyond_chance_table(results),
                "![Changes and drift](changes.png)",
            ]
        parts += drift_text(results["drift"])
    parts += asked_section(results)
    if results["base"] is not None:
        parts += worst_section(results["worst"])
    return "\n\n".join(parts) + "\n"


def scores_table(tasks: Result) -> str:
    """Return one model's scores."""
    rows = [
        [
            task,
            t["metric"],
            t["n"],
            f"{100 * t['score']:.1f}",
            f"{100 * t['low']:.1f} to {100 * t['high']:.1f}",
        ]
        for task, t in tasks.items()
    ]
    return table(rows, ["task", "metric", "items", "score %", "95% interval"])


def changes_table(results: Result) -> str:
    """
    Return what changed: a row for each task, its other filters beneath it, and the suites' means;
    and a legend.
    """
    several = len(results["tasks"]) > 1
    rows = []
    for task, change in results["tasks"].items():
        rows.append(changes_row(task, change, several))
        for other, reading in results["filters"].get(task, {}).items():
            rows.append(changes_row(f"… {other}", reading, several))
    rows += [
        changes_row(f"mean: {suite}", change, several) for suite, change in results["means"].items()
    ]
    headers = [
        "task",
        "items",
        "before %",
        "after %",
        "change",
        "95% interval",
        "p",
        "Holm's p",
        "lost, gained",
    ]
    headers = [h for h in headers if several or h != "Holm's p"] + ["smallest drop"]
    note = (
        "Change: percentage points; **bold** where it is shown: "
        + (
            "p, adjusted for the number of tasks (Holm), is below 0.05"
            if several
            else "p is below 0.05"
        )
        + ". p: exact McNemar test, or for scores between 0 and 1 a test that swaps the models'"
        " scores. Smallest drop: what this many items would show four times in five; a smaller"
        " one can be there unseen."
    )
    if results["filters"]:
        note += (
            " Rows with …: the same answers, read by another filter; they count in no mean and no"
            " adjustment."
        )
    if few := [task for task, t in results["tasks"].items() if t["n"] < FEWEST_ITEMS]:
        note += (
            f" Fewer than {FEWEST_ITEMS} items, so that the interval is not to be relied on:"
            f" {', '.join(few)}."
        )
    return f"{table(rows, headers)}\n\n{note}"


def changes_row(name: str, c: Result, several: bool) -> list[Any]:
    """Return a row of `changes_table`; only tasks have an adjusted p."""
    change = f"{100 * c['change']:+.1f}"
    adjusted = [p_text(c["p_holm"]) if "p_holm" in c else ""] if several else []
    return [
        name,
        c["n"],
        f"{100 * c['before']:.1f}",
        f"{100 * c['after']:.1f}",
        f"**{change}**" if shown(c) else change,
        f"{100 * c['low']:+.1f} to {100 * c['high']:+.1f}",
        p_text(c["p_value"]),
        *adjusted,
        f"{c['lost']}, {c['gained']}",
        f"{100 * c['smallest_drop']:.1f}",
    ]


def shown(change: Result) -> bool:
    """
    Return whether a change is shown: a task's by its adjusted p, a mean's or a filter's by its own.
    """
    p: float = change["p_holm" if "p_holm" in change else "p_value"]
    return p < ALPHA


def beyond_chance_table(results: Result) -> list[str]:
    """
    Return what was known and lost, or learned, of the multiple-choice tasks, if there are any.
    """

    def cell(e: Result) -> str:
        return f"{e['estimate']:.0f} ({e['low']:.0f} to {e['high']:.0f})"

    rows = [
        [name, c["n"], cell(c["lost_beyond_chance"]), cell(c["gained_beyond_chance"])]
        for name, c in [
            *results["tasks"].items(),
            *((f"mean: {n}", c) for n, c in results["means"].items()),
        ]
        if c["lost_beyond_chance"] is not None
    ]
    note = (
        "Items known before and lost, or learned, beyond what guessing explains, with 95%"
        " intervals, if an item is either known or guessed anew by each. Models that guess alike"
        " lose fewer items by luck, so that these are lower bounds; an interval below 0 says that"
        " they do."
    )
    return (
        [table(rows, ["multiple choice", "items", "known and lost", "learned"]), note]
        if rows
        else []
    )


def drift_text(drift: Result | None) -> list[str]:
    """Return the drift and its distribution, if it was measured."""
    if drift is None:
        return []
    quantiles = ", ".join(f"{q} {value:.4f}" for q, value in drift["quantiles"].items())
    prompts = len(drift["per_prompt"])
    text = (
        f"**Drift** {drift['mean']:.4f} (95%: {drift['low']:.4f} to {drift['high']:.4f}): mean"
        f" KL(base ‖ tuned), nats per token, over {drift['tokens']} tokens of the base model's own"
        f" answers to {prompts} prompts. Quantiles over prompts: {quantiles}."
    )
    if prompts < FEWEST_PROMPTS:
        text += f" Fewer than {FEWEST_PROMPTS} prompts: the interval is not to be relied on."
    return [text]


def differs_text(differs: Result | None) -> list[str]:
    """Return in what else than weights the two models differ, if they do."""
    if not differs:
        return []

    def values(pair: Result) -> str:
        shown = [
            json.dumps(pair[side], sort_keys=True, ensure_ascii=False) for side in ("base", "model")
        ]
        return f" (base {code(shown[0])}, this model {code(shown[1])})"

    told = ("end_tokens", "generation_config")  # the others are digests
    parts = [
        name.replace("_", " ") + (values(pair) if name in told else "")
        for name, pair in differs.items()
    ]
    return [
        f"**The models differ in more than weights**: {', '.join(parts)}. Both were asked with one"
        " chat template, and with one tokenizer where they have one vocabulary; each stops and"
        " generates as its own folder says."
    ]


def asked_section(results: Result) -> list[str]:
    """
    Return how the tasks were asked, what was cut, what failed, and what was not measured anew.
    """
    protocol = results["protocol"]
    thinking = {True: "thinking on", False: "thinking off", None: "thinking as the template has it"}
    parts = [
        (
            "with the chat template"
            if protocol["apply_chat_template"]
            else "in plain text, without a chat template"
        ),
        *([thinking[protocol["enable_thinking"]]] if protocol["apply_chat_template"] else []),
        f"in {protocol['dtype']}",
        f"seed {protocol['seed']}",
        *([f"at most {protocol['limit']} items of each lm-eval task"] if protocol["limit"] else []),
    ]
    found = [
        "## What was asked",
        f"Asked {', '.join(parts)}.",
        *differs_text(results.get("differs")),
    ]
    sides = ["after"] if results["base"] is None else ["before", "after"]
    rows = [
        [
            *(
                task,
                briefly(a["version"]),
                a["metric"],
                a["filter"],
                briefly(a["num_fewshot"]),
                briefly(a["max_gen_toks"]),
            ),
            *(
                ", ".join(str(a["cut"][side][part]) for side in sides)
                for part in ("prompt", "answer", "thoughts")
            ),
        ]
        for task, a in results["asked"].items()
    ]
    headers = ["task", "version", "metric", "filter", "examples", "answer tokens"]
    headers += ["prompts cut", "answers cut", "thoughts cut"]
    if rows:
        found += [
            table(rows, headers),
            "Cut to fit the context or the limit: items"
            + (", before and after." if len(sides) > 1 else "."),
        ]
    kept = results["kept"]
    names = {"base": "the base model", "model": "this model"}
    read = [f"{names[side]}: {', '.join(kept[side])}" for side in names if kept[side]]
    if read:
        found.append(f"Not measured anew, but read from {kept['folder']}: of {'; of '.join(read)}.")
    if results["failed"]:
        found += [
            "## Failed",
            "\n".join(f"- {task}: {message}" for task, message in results["failed"].items()),
        ]
    return found


def briefly(value: Any) -> str:
    """Return what the tasks of a benchmark have, each value once; empty where it does not apply."""
    values = value.values() if isinstance(value, dict) else [value]
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def worst_section(worst: list[Result]) -> list[str]:
    """Return the worst regressions: prompt, before, after."""
    found = [f"## The {len(worst)} worst regressions"] if worst else []
    for i, item in enumerate(worst, 1):
        before, after = item["before"], item["after"]
        found.append(
            f"### {i}. {markdown(item['task'])}, item {item['doc_id']}: {before['score']:g} to"
            f" {after['score']:g}\n\n"
            f"Prompt (its end):\n\n{quote(item['prompt'][-600:])}\n\n"
            f"Before:\n\n{quote(before['response'])}\n\n"
            f"After:\n\n{quote(after['response'])}\n\n"
            f"Target: {code(str(item['target'])[-200:])}"
        )
    return found


def quote(text: Any) -> str:
    """Return text as a Markdown block of code, cut at 600 characters."""
    text = str(text)
    return block(text[:600] + (" [...]" if len(text) > 600 else ""))


def draw_changes(results: Result, path: Path) -> None:
    """
    Draw every task's change with its 95% interval, coloured if it is shown, and how drift is spread
    over prompts.
    """
    rows = [
        *results["tasks"].items(),
        *((f"mean: {name}", c) for name, c in results["means"].items()),
    ][::-1]
    height = max(2.2, 0.4 * len(rows) + 1.2)
    drift = results["drift"]
    figure, axes = plt.subplots(
        1, 1 if drift is None else 2, figsize=(10, height), layout="constrained", squeeze=False
    )
    axis = axes[0, 0]
    for y, (_, c) in enumerate(rows):
        color = "tab:gray" if not shown(c) else "tab:green" if c["change"] > 0 else "tab:red"
        ends = [[100 * (c["change"] - c["low"])], [100 * (c["high"] - c["change"])]]
        axis.errorbar(100 * c["change"], y, xerr=ends, fmt="o", capsize=3, color=color)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set(
        xlabel="change, percentage points (95%; grey: not shown)", ylim=(-0.6, len(rows) - 0.4)
    )
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
