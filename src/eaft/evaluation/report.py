"""The reports of an evaluation, results.md and report.html: tables, answers and a picture."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from eaft.evaluation.paired import ALPHA, few_items, few_prompts
from eaft.evaluation.results import (
    Change,
    Changes,
    DriftSummary,
    Estimate,
    HeldOut,
    ModelEvaluation,
    RecordedProtocol,
    Regression,
    Results,
    Setting,
    Source,
    TaskChange,
    TaskScore,
    TunedEvaluation,
)
from eaft.evaluation.verdict import p_text
from eaft.text import as_html, block, code, fill_page, markdown, markdown_strings, table

PAGE = Path(__file__).with_name("report.html")
plt.rcParams["text.parse_math"] = False  # a name with dollars is no formula


def evaluation(results: Results) -> str:
    """
    Return an evaluation as Markdown: with a base model, the verdict and the numbers that prove it.
    """
    parts = [*numbers(results, "changes.png")]
    if isinstance(results, TunedEvaluation):
        if results.held_out is not None:
            parts += answers_section(results.held_out)
        parts += [*asked(results), *worst_section(results.worst)]
    else:
        parts += asked(results)
    return "\n\n".join(parts) + "\n"


def page(results: Results, folder: Path) -> str:
    """
    Return an evaluation as one page of HTML: what `evaluation` returns, with answers side by side.

    Args:
        folder: that has changes.png, if there is one.
    """
    picture = folder / "changes.png"
    address = ""
    if picture.is_file():
        address = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    held_out, worst = None, []
    if isinstance(results, TunedEvaluation):
        held_out, worst = results.held_out, results.worst
    return fill_page(
        PAGE,
        model=results.model,
        base=results.base,
        numbers=as_html("\n\n".join(numbers(results, address))),
        held_out=held_out,
        worst=worst,
        asked=as_html("\n\n".join(asked(results))),
        cut=cut,
        answers_note=answers_note,
    )


def numbers(results: Results, picture: str) -> list[str]:
    """
    Return the verdict and all tables of numbers, as Markdown.

    Args:
        picture: the address of the picture.
    """
    safe = markdown_strings(results)
    name = Path(safe.model).name
    if isinstance(results, ModelEvaluation):
        return [f"# {name}", scores_table(safe.tasks)]
    parts = [results.verdict.sentence, f"# {name}, beside {Path(safe.base).name}"]
    if results.tasks:
        parts += [
            changes_table(safe),
            *beyond_chance_table(safe),
            f"![Changes and drift]({picture})",
        ]
    if results.held_out is not None:
        parts += held_out_table(results.held_out)
    return parts + drift_text(results.drift)


def asked(results: Results) -> list[str]:
    """Return what was asked, as Markdown; see `asked_section`."""
    differs = results.differs if isinstance(results, TunedEvaluation) else None
    return asked_section(markdown_strings(results), differs)


def scores_table(tasks: dict[str, TaskScore]) -> str:
    """Return one model's scores."""
    rows = [
        [
            task,
            t.metric,
            t.n,
            f"{100 * t.score:.1f}",
            f"{100 * t.low:.1f} to {100 * t.high:.1f}",
        ]
        for task, t in tasks.items()
    ]
    return table(rows, ["task", "metric", "items", "score %", "95% interval"])


def changes_table(changes: Changes) -> str:
    """
    Return what changed: a row for each task, its other filters beneath it, and the suites' means;
    and a legend.
    """
    several = len(changes.tasks) > 1
    rows = []
    for task, task_change in changes.tasks.items():
        rows.append(changes_row(task, task_change, several))
        for other, reading in changes.filters.get(task, {}).items():
            rows.append(changes_row(f"… {other}", reading, several))
    rows += [
        changes_row(f"mean: {suite}", change, several) for suite, change in changes.means.items()
    ]
    headers = [
        "task",
        "items",
        "base %",
        "tuned %",
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
    if changes.filters:
        note += (
            " Rows with …: the same answers, read by another filter; they count in no mean and no"
            " adjustment."
        )
    if few := few_items({task: change.n for task, change in changes.tasks.items()}):
        note += f" {few}"
    return f"{table(rows, headers)}\n\n{note}"


def changes_row(name: str, c: Change, several: bool) -> list[Any]:
    """Return a row of `changes_table`; only tasks have an adjusted p."""
    change = f"{100 * c.change:+.1f}"
    adjusted = [p_text(c.p_holm) if isinstance(c, TaskChange) else ""] if several else []
    return [
        name,
        c.n,
        f"{100 * c.before:.1f}",
        f"{100 * c.after:.1f}",
        f"**{change}**" if shown(c) else change,
        f"{100 * c.low:+.1f} to {100 * c.high:+.1f}",
        p_text(c.p_value),
        *adjusted,
        f"{c.lost}, {c.gained}",
        f"{100 * c.smallest_drop:.1f}",
    ]


def shown(change: Change) -> bool:
    """
    Return whether a change is shown: a task's by its adjusted p, a mean's or a filter's by its own.
    """
    return (change.p_holm if isinstance(change, TaskChange) else change.p_value) < ALPHA


def beyond_chance_table(changes: Changes) -> list[str]:
    """
    Return what was known and lost, or learned, of the multiple-choice tasks, if there are any.
    """

    def cell(e: Estimate) -> str:
        if e.high < 0:
            return "none: they guess alike"
        return f"{e.estimate:.0f} ({e.low:.0f} to {e.high:.0f})"

    means = {f"mean: {name}": change for name, change in changes.means.items()}
    rows = [
        [name, c.n, cell(c.lost_beyond_chance), cell(c.gained_beyond_chance)]
        for name, c in {**changes.tasks, **means}.items()
        if c.lost_beyond_chance is not None and c.gained_beyond_chance is not None
    ]
    note = (
        "Items that the base knows and the tuned model lost, or learned, beyond what guessing"
        " explains, with 95% intervals, if each model either knows an item or guesses anew. Models"
        " that guess alike lose fewer items by luck, so that these are lower bounds."
    )
    return (
        [table(rows, ["multiple choice", "items", "known and lost", "learned"]), note]
        if rows
        else []
    )


def held_out_table(held_out: HeldOut) -> list[str]:
    """Return the nll of the held-out rows before and after, and which rows they are."""
    change = f"{held_out.change:+.4f}"
    row = [
        held_out.rows,
        held_out.tokens,
        f"{held_out.before:.4f}",
        f"{held_out.after:.4f}",
        f"**{change}**" if held_out.p_value < ALPHA else change,
        f"{held_out.low:+.4f} to {held_out.high:+.4f}",
        p_text(held_out.p_value),
    ]
    headers = ["held-out rows", "tokens", "base nll", "tuned nll", "change", "95% interval", "p"]
    note = (
        f"The nll of the labelled tokens of {markdown(held_out.file)}, in nats per token; lower is"
        f" better. The rows were prepared {markdown(held_out.prepared)}. "
        + (
            "None of their prompts is in the run's training data."
            if held_out.apart
            else "Whether the model was trained on them was not checked: its training data is not"
            " known, or cannot be read here."
        )
    )
    if few := few_prompts(held_out.rows, "rows"):
        note += f" {few}"
    return [table([row], headers), note]


def drift_text(drift: DriftSummary | None) -> list[str]:
    """Return the drift and its distribution, if it was measured."""
    if drift is None:
        return []
    quantiles = ", ".join(f"{q} {value:.4f}" for q, value in drift.quantiles.items())
    prompts = len(drift.per_prompt)
    text = (
        f"**Drift** {drift.mean:.4f} (95%: {drift.low:.4f} to {drift.high:.4f}): mean"
        f" KL(base ‖ tuned), nats per token, over {drift.tokens} tokens of the base model's own"
        f" answers to {prompts} prompts. Quantiles over prompts: {quantiles}."
    )
    if few := few_prompts(prompts):
        text += f" {few}"
    return [text]


def differs_text(differs: dict[str, Setting] | None) -> list[str]:
    """Return the settings, beside the weights, in which the two models differ."""
    if not differs:
        return []
    return [
        f"**The models differ in more than weights**: {settings_text(differs)}. Both were asked"
        " with one chat template, and with one tokenizer where they have one vocabulary; each"
        " stops and generates as its own folder says."
    ]


def settings_text(differs: dict[str, Setting]) -> str:
    """Return the settings in which two models differ, and their values where they can be read."""

    def values(pair: Setting) -> str:
        base, tuned = (
            json.dumps(side, sort_keys=True, ensure_ascii=False) for side in (pair.base, pair.model)
        )
        return f" (base {code(base)}, tuned {code(tuned)})"

    told = ("end_tokens", "generation_config")  # the others are digests
    return ", ".join(
        name.replace("_", " ") + (values(pair) if name in told else "")
        for name, pair in differs.items()
    )


def asked_section(results: Results, differs: dict[str, Setting] | None) -> list[str]:
    """
    Return how the tasks were asked, what was cut, what failed, and what was not measured anew.

    Args:
        results: with names that are Markdown already.
        differs: the settings that differ, as they are.
    """
    how = [] if results.protocol is None else [protocol_text(results.protocol)]
    how += [] if results.source is None else source_text(results.source)
    section = ["## What was asked", *how, *differs_text(differs)]
    sides = ["after"] if results.base is None else ["before", "after"]
    counted = all(a.cut for a in results.asked.values())
    rows = [
        [
            *(
                task,
                briefly(a.version),
                a.metric,
                a.filter,
                briefly(a.num_fewshot),
                briefly(a.max_gen_toks),
            ),
            *(
                ", ".join(str(getattr(a.cut[side], part)) for side in sides)
                for part in (("prompt", "answer", "thoughts") if counted else ())
            ),
        ]
        for task, a in results.asked.items()
    ]
    headers = ["task", "version", "metric", "filter", "examples", "answer tokens"]
    headers += ["prompts cut", "answers cut", "thoughts cut"] if counted else []
    if rows:
        section.append(table(rows, headers))
    if rows and counted:
        section.append(
            "Cut to fit the context or the limit: items"
            + (", base and tuned." if len(sides) > 1 else ".")
        )
    if kept := results.kept:
        names = {"the base model": kept.base, "this model": kept.model}
        read = [f"{model}: {', '.join(measured)}" for model, measured in names.items() if measured]
        if read:
            section.append(
                f"Not measured anew, but read from {kept.folder}: of {'; of '.join(read)}."
            )
    if results.failed:
        section += [
            "## Failed",
            "\n".join(f"- {task}: {message}" for task, message in results.failed.items()),
        ]
    return section


def protocol_text(protocol: RecordedProtocol) -> str:
    """Return how the models were asked, as a sentence."""
    thinking = {True: "thinking on", False: "thinking off", None: "thinking as the template has it"}
    parts = [
        (
            "with the chat template"
            if protocol.apply_chat_template
            else "in plain text, without a chat template"
        ),
        *([thinking[protocol.enable_thinking]] if protocol.apply_chat_template else []),
        f"in {protocol.dtype}",
        f"seed {protocol.seed}",
        *([f"at most {protocol.limit} items of each lm-eval task"] if protocol.limit else []),
    ]
    return f"Asked {', '.join(parts)}."


def source_text(source: Source) -> list[str]:
    """
    Return which logs the results were read from, and in which settings the two runs differ.

    Args:
        source: with names that are Markdown already.
    """
    runs = {"base": source.base, "tuned": source.model}
    read = "; ".join(
        f"{name} {run.path}, by version {run.version or 'unknown'}, {run.date or 'no date'}"
        for name, run in runs.items()
    )
    section = [f"Asked by {source.tool}, and read from its logs: {read}."]
    base, tuned = source.base.settings, source.model.settings
    differs = [
        f"{name} (base {base.get(name)}, tuned {tuned.get(name)})"
        for name in {**base, **tuned}
        if base.get(name) != tuned.get(name)
    ]
    if differs:
        section.append(f"**The two runs differ in**: {'; '.join(differs)}.")
    return section


def briefly(value: Any) -> str:
    """Return what the tasks of a benchmark have, each value once; empty where it does not apply."""
    values = value.values() if isinstance(value, dict) else [value]
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def worst_section(worst: list[Regression]) -> list[str]:
    """Return the worst regressions: prompt, the base model's answer, the tuned model's."""
    section = [f"## Worst regressions ({len(worst)})"] if worst else []
    for i, item in enumerate(worst, 1):
        base, tuned = item.before, item.after
        section.append(
            f"### {i}. {markdown(item.task)}, item {item.doc_id}: {base.score:g} to"
            f" {tuned.score:g}\n\n"
            f"Prompt (its end):\n\n{quote(item.prompt[-600:])}\n\n"
            f"Base model:\n\n{quote(base.response)}\n\n"
            f"Tuned model:\n\n{quote(tuned.response)}\n\n"
            f"Target: {code(str(item.target)[-200:])}"
        )
    return section


def answers_section(held_out: HeldOut) -> list[str]:
    """Return the answers before and after to the held-out rows that are shown."""
    if not held_out.answers:
        return []
    section = ["## Answers before and after", answers_note(held_out)]
    for answer in held_out.answers:
        section.append(
            f"### Row {answer.row}\n\n"
            f"Prompt (its end):\n\n{quote(answer.prompt[-600:])}\n\n"
            f"The row's own answer:\n\n{quote(answer.target)}\n\n"
            f"Base model:\n\n{quote(answer.before)}\n\n"
            f"Tuned model:\n\n{quote(answer.after)}"
        )
    return section


def answers_note(held_out: HeldOut) -> str:
    """Return how the answers were made."""
    return (
        f"The first {len(held_out.answers)} held-out rows that fit. Each model's likeliest answer"
        f" (greedy), at most {held_out.max_new_tokens} tokens."
    )


def quote(text: Any) -> str:
    """Return text as a Markdown block of code, cut at 600 characters."""
    return block(cut(text))


def cut(text: Any) -> str:
    """Return text, cut at 600 characters."""
    text = str(text)
    return text[:600] + (" [...]" if len(text) > 600 else "")


def draw_changes(results: TunedEvaluation, path: Path) -> None:
    """
    Draw every task's change with its 95% interval, coloured if it is shown, and how drift is spread
    over prompts.
    """
    rows = [
        *results.tasks.items(),
        *((f"mean: {name}", c) for name, c in results.means.items()),
    ][::-1]
    height = max(2.2, 0.4 * len(rows) + 1.2)
    drift = results.drift
    figure, axes = plt.subplots(
        1, 1 if drift is None else 2, figsize=(10, height), layout="constrained", squeeze=False
    )
    axis = axes[0, 0]
    for y, (_, c) in enumerate(rows):
        color = "tab:gray" if not shown(c) else "tab:green" if c.change > 0 else "tab:red"
        ends = [[100 * (c.change - c.low)], [100 * (c.high - c.change)]]
        axis.errorbar(100 * c.change, y, xerr=ends, fmt="o", capsize=3, color=color)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set(
        xlabel="change, percentage points (95%; grey: not shown)", ylim=(-0.6, len(rows) - 0.4)
    )
    axis.grid(alpha=0.3)
    if drift is not None:
        axis = axes[0, 1]
        axis.hist(drift.per_prompt, bins=16, color="tab:blue", alpha=0.8)
        axis.axvline(drift.mean, color="black", linewidth=0.8)
        axis.set(xlabel="drift of a prompt's answer, nats per token", ylabel="prompts")
        axis.grid(alpha=0.3)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write the picture whole or not at all."""
    staging = path.with_name(f"{path.stem}.tmp{path.suffix}")
    figure.savefig(staging, dpi=150)
    plt.close(figure)
    staging.replace(path)
