"""
The report of a comparison: what to do and how sure that is, the tables that prove it, and pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from eaft.comparison.collect import LEVEL, NLL
from eaft.comparison.fronts import relative
from eaft.comparison.results import (
    CheckpointResult,
    Choice,
    Comparison,
    Difference,
    FrontDifference,
    PairResult,
    PairVerdict,
    Spread,
)
from eaft.evaluation.report import briefly, save, settings_text
from eaft.evaluation.results import as_json
from eaft.provenance import write_json
from eaft.text import markdown_strings, table
from eaft.training.run_folder import METRICS_FILE

VIEWS = {
    "chosen": "At each objective's own choice (lowest held-out nll)",
    "last": "After the last step",
}


def write(results: Comparison, folder: Path) -> str:
    """
    Write results.md, the pictures and, last, results.json, with the sentence that is made here;
    return the Markdown.
    """
    # An earlier run's: results.json says that all files beside it are of one run
    (folder / "results.json").unlink(missing_ok=True)
    safe = markdown_strings(results)
    results.sentence = safe.sentence = headline(safe)
    for run, raw in zip(safe.runs, results.runs, strict=True):
        run.differs = raw.differs  # shown as code, which keeps text as it is
    text = markdown(safe)
    (folder / "results.md").write_text(text)
    draw_pareto(results, folder / "pareto.png")
    draw_curves(results, folder)
    draw_fronts(results, folder / "fronts.png")
    write_json(folder / "results.json", as_json(results))
    return text


# The sentence


def headline(results: Comparison) -> str:
    """Return what to do, why, and how sure that is."""
    if not results.pairs:
        return (
            "Nothing was compared: there is no `sft` and no `pairs` in the recipe, or one of each"
            " pair failed."
        )
    preferred = dict.fromkeys(v.prefer for v in results.verdicts if v.prefer is not None)
    beaten = {v.second if v.prefer == v.first else v.first for v in results.verdicts if v.prefer}
    best = [name for name in preferred if name not in beaten]
    if len(best) == 1:
        advice = f"**Choose {best[0]}.**"
    elif best:
        advice = (
            f"**Choose one of {', '.join(best)}**, none of which is shown to be better than"
            " another."
        )
    elif any(v.better for v in results.verdicts):
        advice = "**Choose by what you need: what is gained is paid for.**"
    else:
        advice = "**No objective is shown to be better than another: take the simplest.**"
    compared = dict.fromkeys(name for pair in results.pairs for name in (pair.first, pair.second))
    names = best or list(compared)
    text = [advice]
    text += beside_base(results.choices, names) if results.groups else learned(results, names)
    text += [clause(pair, v) for pair, v in zip(results.pairs, results.verdicts, strict=True)]
    if any(len(pair.seeds) == 1 for pair in results.pairs):
        text.append(
            "One seed: the intervals hold no seed-to-seed variance, and another seed may turn this"
            " round."
        )
    if results.failed:
        text.append("What failed (below) is not judged.")
    return " ".join(text)


def beside_base(choices: list[Choice], names: list[str]) -> list[str]:
    """
    Return what objectives gained and lost beside the base model, and whether that speaks against
    shipping them.
    """
    sentences = []
    for name in names:
        views = [choice.own_changes for choice in choices if choice.objective == name]
        if not views:
            continue
        change = {
            kind: np.mean([view.means[kind].change for view in views]) for kind in views[0].means
        }
        numbers = ", ".join(f"{kind} {100 * value:+.1f}" for kind, value in change.items())
        lost = [
            task
            for task in views[0].tasks
            if any(v.tasks[task].change < 0 and v.tasks[task].p_holm < LEVEL for v in views)
        ]
        said = (
            f"**do not ship it as it is, a loss is shown on {listed(lost)}**"
            if lost
            else "no loss is shown"
        )
        sentences.append(f"Beside the base model {name} has {numbers} points: {said}.")
    return sentences


def learned(results: Comparison, names: list[str]) -> list[str]:
    """Return what objectives learned and how far they drifted, of a recipe without tasks."""
    sentences = []
    for name in names:
        if (objective := results.objectives.get(name)) is None:
            continue
        at = objective.at(views_of(results)[0])
        assert at.nll is not None
        assert results.base.nll is not None
        sentences.append(
            f"{name} has a held-out nll of {at.nll.mean:.3f} (the base model"
            f" {results.base.nll:.3f}) and a drift of {at.drift_general.mean:.4f} nats per token;"
            " no tasks were asked."
        )
    return sentences


def clause(pair: PairResult, verdict: PairVerdict) -> str:
    """Return one pair's verdict, with the numbers it rests on."""
    first, second = pair.first, pair.second
    view = pair.own_choice
    if verdict.better and verdict.worse:
        said = (
            f"{first} is better than {second} in {listed(verdict.better)} and worse in"
            f" {listed(verdict.worse)}"
        )
    elif verdict.better:
        said = (
            f"{first} is better than {second} in {listed(verdict.better)}, and not shown to be"
            " worse in anything"
        )
    elif verdict.worse:
        said = (
            f"{first} is worse than {second} in {listed(verdict.worse)}, and not shown to be"
            " better in anything"
        )
    else:
        said = f"{first} and {second} cannot be told apart"
    numbers = [f"{name} {points(mean)}" for name, mean in view.means.items()]
    fronts = [(name, front.mean) for name, front in pair.fronts.items() if front is not None]
    numbers += [f"drift at equal {name} {nats(mean)}" for name, mean in fronts]
    lower = {NLL: view.nll} if fronts else {"drift": view.drift["general"], NLL: view.nll}
    numbers += [f"{name} {nats(d)}" for name, d in lower.items() if d is not None]
    of_tasks = [
        n for n in (*verdict.better, *verdict.worse) if n in view.tasks and n not in view.means
    ]
    numbers += [f"{name} {points(view.tasks[name])}" for name in of_tasks]
    return f"{said} ({first} minus {second}: {'; '.join(numbers)})."


def listed(names: list[str]) -> str:
    """Return names as a sentence has them."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def points(d: Difference) -> str:
    """Return a difference of scores in percentage points, with interval and adjusted p."""
    return f"{100 * d.change:+.1f} points (95%: {100 * d.low:+.1f} to {100 * d.high:+.1f}; {p(d)})"


def nats(d: Difference) -> str:
    """Return a difference of drift or nll in nats per token, with interval and adjusted p."""
    return f"{d.change:+.4f} (95%: {d.low:+.4f} to {d.high:+.4f}; {p(d)})"


def p(d: Difference) -> str:
    """Return an adjusted p."""
    return f"p {d.p_holm:.2g}" if d.p_holm >= 1e-4 else "p < 0.0001"


@dataclass
class Stretch:
    """
    A stretch of targets where two fronts can be told apart.

    Attributes:
        sign: of the difference, 1 or -1.
        start, end: its first and last target, from hard to easy.
        differences: at each of its targets, nats per token.
    """

    sign: int
    start: float
    end: float
    differences: list[float]


def told_apart(front: FrontDifference) -> list[Stretch]:
    """Return the stretches of targets where the band excludes 0."""
    stretches: list[Stretch] = []
    last = 0
    for target, difference, low, high in zip(
        front.targets, front.difference, front.low, front.high, strict=True
    ):
        sign = 1 if low > 0 else -1 if high < 0 else 0
        if sign and sign == last:
            stretches[-1].end = target
            stretches[-1].differences.append(difference)
        elif sign:
            stretches.append(Stretch(sign, target, target, [difference]))
        last = sign
    return stretches


def where(pair: PairResult, target: str) -> str:
    """Say at which targets a pair's fronts can be told apart."""
    front, first, second = pair.fronts[target], pair.first, pair.second
    if front is None:
        return (
            f"{first} and {second}: there is no {target} that both reach, with every seed, past"
            " their first checkpoint. Save checkpoints earlier, or more of them."
        )
    span = f"{shown(target, front.targets[0])} to {shown(target, front.targets[-1])}"
    on_average = (
        f"(on average {nats(front.mean)}, {100 * relative(front)['change']:+.0f}% of {second}'s)"
    )
    stretches = told_apart(front)
    if not stretches:
        return (
            f"{first} and {second} cannot be told apart at any {target} from {span} {on_average}."
        )
    said = []
    for stretch in stretches:
        sizes = sorted(abs(d) for d in stretch.differences)
        at = up_to(shown(target, stretch.start), shown(target, stretch.end))
        word = "more" if stretch.sign > 0 else "less"
        said.append(
            f"at {target} {at} {first} drifts {word}, by"
            f" {up_to(f'{sizes[0]:.4f}', f'{sizes[-1]:.4f}')}"
        )
    whole = len(stretches) == 1 and len(stretches[0].differences) == len(front.targets)
    rest = "" if whole else f"; elsewhere from {span} they cannot be told apart"
    return f"{first} and {second}: {', '.join(said)}{rest} {on_average}."


def up_to(low: str, high: str) -> str:
    """Return a range in words, or its only value."""
    return low if low == high else f"{low} to {high}"


def shown(target: str, shortfall: float) -> str:
    """Return a target as users read it: the nll as it is, a score in %."""
    return f"{shortfall:.3f}" if target == NLL else f"{100 * (1 - shortfall):.1f}%"


# The tables


def markdown(results: Comparison) -> str:
    """Return the whole report."""
    seeds = results.recipe["seeds"]
    lines = [results.sentence]
    if results.failed:
        lines += [
            "## What failed",
            "\n".join(f"- {failure.message}" for failure in results.failed),
        ]
    lines += [
        "## Gained and forgotten",
        f"Seeds: {', '.join(map(str, seeds))}"
        + ("; mean ± standard deviation over them" if len(seeds) > 1 else "")
        + ". Drift: mean KL(base ‖ tuned), nats per token, over the base model's own answers.",
    ]
    views = views_of(results)
    for view in views:
        lines += [f"### {VIEWS[view]}", objectives_table(results, view)]
    if results.pairs:
        lines += ["## Objective against objective", how_tested(results.pairs)]
        lines += [
            part
            for view in views
            for part in (f"### {VIEWS[view]}", pairs_table(results.pairs, view))
        ]
        if targets := list(results.pairs[0].fronts):
            lines += ["## Drift at a matched target", MATCHED]
            lines += [
                "\n".join(
                    f"- {where(pair, target)}" for target in targets for pair in results.pairs
                )
            ]
            lines += ["![The fronts, and their differences](fronts.png)"]
    if results.groups:
        lines += ["## Every benchmark", table_1(results, views[0])]
    lines += ["## What was asked", *asked_section(results)]
    lines += ["## Every checkpoint", checkpoints_table(results)]
    lines += ["![What was learned against what was kept](pareto.png)", "![Training](curves.png)"]
    return "\n\n".join(lines) + "\n"


MATCHED = (
    "The least drift with which each objective, at any of its learning rates and checkpoints, has a"
    " target at least so good; linear between checkpoints. The band is simultaneous: in about 95%"
    " of comparisons it holds the whole true curve. It carries the uncertainty of drift (prompts),"
    " of the target (held-out examples or items) and of seeds."
)


def how_tested(pairs: list[PairResult]) -> str:
    """Return how the pairs were tested."""
    several = "items (or prompts) and seeds both count (Cochran and Cox's t)"
    one = "one seed, so items (or prompts) alone count, as in `eaft eval`"
    counts = {len(pair.seeds) > 1 for pair in pairs}
    how = (
        several
        if counts == {True}
        else one
        if counts == {False}
        else f"{several}; where there is {one}"
    )
    return (
        f"First minus second, on the same items. 95% intervals; {how}. p is adjusted by Holm's"
        " method over the pairs and, together, means, drift and nll; or single tasks. **Bold**:"
        f" adjusted p < {LEVEL}."
    )


def views_of(results: Comparison) -> list[str]:
    """Return the views that there are; `chosen` takes held-out rows."""
    chosen = any(objective.chosen is not None for objective in results.objectives.values())
    return ["chosen", "last"] if chosen else ["last"]


def cell(
    spread: Spread | None, scale: float = 1, digits: int = 1, minus: float | None = None
) -> str:
    """Return a mean, or its difference from `minus`, with its spread over seeds if there is one."""
    if spread is None:
        return ""
    mean, std = spread.mean, spread.std
    text = (
        f"{scale * mean:.{digits}f}" if minus is None else f"{scale * (mean - minus):+.{digits}f}"
    )
    return text if std is None else f"{text} ± {scale * std:.{digits}f}"


def objectives_table(results: Comparison, view: str) -> str:
    """Return one row an objective: target, general, drift, held-out nll, cost."""
    base, groups = results.base, list(results.groups)
    rows = [["base"]]
    for group in groups:
        rows[0] += [f"{100 * getattr(base, group):.1f}", ""]
    rows[0] += ["0", "0", "" if base.nll is None else f"{base.nll:.3f}", "", ""]
    for name, objective in results.objectives.items():
        at, training = objective.at(view), objective.training
        rows.append([name])
        for group in groups:
            rows[-1].append(cell(getattr(at, group), 100))
            rows[-1].append(cell(getattr(at, group), 100, minus=getattr(base, group)))
        rows[-1] += [
            cell(at.drift_general, digits=4),
            cell(at.drift_target, digits=4),
            cell(at.nll, digits=3),
            cell(training["tokens_per_s"], digits=0),
            cell(training["peak_memory_gib"], digits=2),
        ]
    headers = ["objective"]
    for group in groups:
        headers += [f"{group} %", "change"]
    headers += ["drift, general", "drift, target", "held-out nll", "tokens/s", "peak GiB"]
    return table(rows, headers)


def pairs_table(pairs: list[PairResult], view: str) -> str:
    """Return one row a pair: every difference, with interval and adjusted p."""
    rows = []
    for pair in pairs:
        at = pair.views[view]
        rows.append(
            [
                f"{pair.first} minus {pair.second}",
                len(pair.seeds),
                *(bold(mean, points) for mean in at.means.values()),
                *(bold(difference, nats) for difference in at.drift.values()),
                *([] if at.nll is None else [bold(at.nll, nats)]),
                *(bold(difference, points) for difference in at.tasks.values()),
            ]
        )
    first = pairs[0].views[view]
    headers = ["pair", "seeds", *first.means, *(f"drift, {kind}" for kind in first.drift)]
    headers += [] if first.nll is None else ["held-out nll"]
    return table(rows, [*headers, *first.tasks])


def bold(d: Difference, form: Callable[[Difference], str]) -> str:
    """Return a difference, in bold if it is significant."""
    return f"**{form(d)}**" if d.p_holm < LEVEL else form(d)


def table_1(results: Comparison, view: str) -> str:
    """
    Return the comparison laid out as the paper's Table 1: every benchmark, the averages, and their
    change.
    """
    base, groups = results.base, results.groups
    headers = ["method"]
    rows = [["base"], *([name] for name in results.objectives)]
    for group in sorted(groups):  # general, target
        headers += [*groups[group], f"{group} avg.", "change"]
        rows[0] += [
            *(f"{100 * base.tasks[name]:.1f}" for name in groups[group]),
            f"{100 * getattr(base, group):.1f}",
            "",
        ]
        for row, objective in zip(rows[1:], results.objectives.values(), strict=True):
            at = objective.at(view)
            average: Spread = getattr(at, group)
            row += [cell(at.tasks[name], 100) for name in groups[group]]
            row += [cell(average, 100), cell(average, 100, minus=getattr(base, group))]
    note = (
        f"{VIEWS[view]}. All in %, laid out as Table 1 of arXiv:2601.02151; tests against the base:"
        " results.json."
    )
    return table(rows, headers) + "\n\n" + note


def asked_section(results: Comparison) -> list[str]:
    """Return how the tasks were asked, what was cut, and what was not measured anew."""
    protocol = results.protocol
    template = (
        "with the chat template"
        if protocol.apply_chat_template
        else "in plain text, without a chat template"
    )
    thinking = {True: ", thinking on", False: ", thinking off", None: ""}[protocol.enable_thinking]
    thinking = thinking if protocol.apply_chat_template else ""
    limit = f", at most {protocol.limit} items of each task" if protocol.limit else ""
    rows = []
    for task, a in results.asked.items():
        cut = [
            f"{model}: {', '.join(f'{n} {part}s' for part, n in vars(parts).items() if n)}"
            for model, parts in a.cut.items()
            if any(vars(parts).values())
        ]
        about = (briefly(a.version), a.metric, a.filter, briefly(a.num_fewshot))
        rows.append([task, *about, "; ".join(cut) or "nothing"])
    kept = {model: what for model, what in results.kept.models.items() if what}
    read = (
        "Not measured anew, but kept from before (`eaft cache` says where): what there is of"
        f" {len(kept)} models."
    )
    return [
        (
            f"Asked {template}{thinking}, in {protocol.dtype}, seed {protocol.seed}{limit}."
            " Cut: items, over all seeds, to fit the context or the limit of an answer."
        ),
        *(
            [table(rows, ["task", "version", "metric", "filter", "examples", "cut"])]
            if rows
            else []
        ),
        *([read] if kept else []),
        *differs_lines(results),
    ]


def differs_lines(results: Comparison) -> list[str]:
    """Return in what else than weights the runs' models differ from the base model, if they do."""
    folders: dict[str, list[str]] = {}
    for run in results.runs:
        if run.differs:
            folders.setdefault(settings_text(run.differs), []).append(run.folder)
    return [
        f"**{', '.join(names)}: differs from the base model in more than weights**: {settings}. All"
        " models were asked with one chat template and one tokenizer; each stops and generates as"
        " its own folder says."
        for settings, names in folders.items()
    ]


def checkpoints_table(results: Comparison) -> str:
    """Return held-out nll and drift after every checkpoint of every run."""
    rows = []
    for run in results.runs:
        for point in run.points:
            nll = "" if point.nll is None else f"{point.nll.mean:.3f}"
            rows.append(
                [
                    run.folder,
                    f"{point.epoch:g}",
                    point.step,
                    nll,
                    f"{point.drift['general'].mean:.4f}",
                ]
            )
    return table(rows, ["run", "epochs", "steps", "held-out nll", "drift"])


# The pictures


def colors(results: Comparison) -> dict[str, Any]:
    """Return one colour for each objective, the same in every picture."""
    names = list(results.objectives)
    palette = plt.get_cmap(
        "tab10" if len(names) <= 10 else "tab20"
    )  # the latter in pairs that are hard to tell apart
    return {name: palette(i % palette.N) for i, name in enumerate(names)}


@dataclass(frozen=True)
class Axis:
    """
    A quantity on an axis of a picture.

    Attributes:
        name: a field of `Means` and `Spreads`.
        scale: that it is multiplied by.
        label: what it is; the arrow says where it is better.
        falls: whether less is better, so that the axis is turned round.
    """

    name: str
    scale: float
    label: str
    falls: bool


TARGET = Axis("target", 100, "target (%)  →  better", False)
LEARNED = Axis("nll", 1, "held-out nll, nats per token  →  better", True)
GENERAL = Axis("general", 100, "general ability (%)  →  better", False)
DRIFT = Axis("drift_general", 1, "drift, KL(base ‖ tuned), nats per token  →  better", True)


def draw_pareto(results: Comparison, path: Path) -> None:
    """
    Draw the target (without target tasks, the held-out nll) against general ability and against
    drift: every seed a dot, the mean with its spread on top.
    """
    up = TARGET if "target" in results.groups else LEARNED
    across = [GENERAL, DRIFT] if "general" in results.groups else [DRIFT]
    figure, axes = plt.subplots(
        1,
        len(across),
        figsize=(5 * len(across), 4.2),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    view = views_of(results)[0]
    base = results.base
    for axis, along in zip(axes[0], across, strict=True):
        axis.scatter(
            along.scale * getattr(base, along.name),
            up.scale * getattr(base, up.name),
            marker="*",
            s=160,
            color="black",
            label="base",
            zorder=3,
        )
        for name, color in colors(results).items():
            seeds = [c.numbers[view] for c in results.choices if c.objective == name]
            axis.scatter(
                [along.scale * getattr(s, along.name) for s in seeds],
                [up.scale * getattr(s, up.name) for s in seeds],
                s=16,
                alpha=0.5,
                color=color,
            )
            at = results.objectives[name].at(view)
            x, y = getattr(at, along.name), getattr(at, up.name)
            axis.errorbar(
                along.scale * x.mean,
                up.scale * y.mean,
                up.scale * (y.std or 0),
                along.scale * (x.std or 0),
                fmt="o",
                markersize=8,
                capsize=3,
                color=color,
                label=name,
            )
        axis.set_xlabel(along.label)
        axis.grid(alpha=0.3)
        if along.falls:
            axis.invert_xaxis()  # so that up and right is better in all
    if up.falls:
        axes[0, 0].invert_yaxis()
    axes[0, 0].set_ylabel(up.label)
    axes[0, 0].legend()
    figure.suptitle(VIEWS[view], fontsize=10)
    save(figure, path)


def draw_curves(results: Comparison, folder: Path) -> None:
    """
    Draw the plain nll of training and held-out tokens, and the mean gate, over the steps of the
    chosen runs.
    """
    runs = [run for run in results.runs if run.chosen]
    logs = []
    for run in runs:
        lines = (folder / run.folder / METRICS_FILE).read_text().splitlines()
        log = [json.loads(line) for line in lines]
        logs.append(
            log + [{"step": p.step, NLL: p.nll.mean} for p in run.points if p.nll is not None]
        )
    titles = {
        "nll": "training nll (nats)",
        "eval_nll": "evaluation nll (nats)",
        NLL: "held-out nll (nats)",
        "mean_gate": "mean gate, training",
    }
    panels = {
        m: title for m, title in titles.items() if any(m in line for log in logs for line in log)
    }
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3.8), layout="constrained", squeeze=False
    )
    palette, labelled = colors(results), set()
    for run, log in zip(runs, logs, strict=True):
        for axis, metric in zip(axes[0], panels, strict=True):
            drawn = [(line["step"], line[metric]) for line in log if metric in line]
            label = None if run.objective in labelled else run.objective
            if drawn:
                axis.plot(
                    *zip(*drawn, strict=True),
                    color=palette[run.objective],
                    alpha=0.8,
                    label=label,
                )
        labelled.add(run.objective)
    for axis, (metric, title) in zip(axes[0], panels.items(), strict=True):
        axis.set(
            xlabel="step",
            title=title,
            **({"ylim": (0, None)} if metric == "mean_gate" else {"yscale": "log"}),
        )
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    save(figure, folder / "curves.png")


def draw_fronts(results: Comparison, path: Path) -> None:
    """
    Draw, for each pair and target, both fronts over all checkpoints, and their difference with its
    band.
    """
    drawn = [
        (pair, target, front)
        for pair in results.pairs
        for target, front in pair.fronts.items()
        if front is not None
    ]
    rows = max(len(drawn), 1)
    figure, axes = plt.subplots(
        rows, 2, figsize=(10, 3.6 * rows), layout="constrained", squeeze=False
    )
    palette = colors(results)
    for (left, right), (pair, target, front) in zip(axes, drawn, strict=False):
        x = [t if target == NLL else 100 * (1 - t) for t in front.targets]
        for side in ("first", "second"):
            name = getattr(pair, side)
            left.plot(x, getattr(front, side), color=palette[name], label=name)
            at = [
                measured(point, target)
                for run in results.runs
                if run.objective == name
                for point in run.points
            ]
            left.scatter(*zip(*at, strict=True), color=palette[name], s=12, alpha=0.5)
        right.plot(x, front.difference, color="black")
        right.fill_between(
            x, front.low, front.high, color="black", alpha=0.15, label="95%, whole curve"
        )
        right.axhline(0, color="black", linewidth=0.8)
        left.set(ylabel="drift, nats per token", title="The least drift at a target so good")
        right.set(ylabel="drift, nats per token", title=f"{pair.first} minus {pair.second}")
        for axis in (left, right):
            axis.set_xlabel(f"{target} (nats)" if target == NLL else f"{target} (%)")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
            if target == NLL:
                axis.invert_xaxis()  # so that right is better, whatever the target
    if not drawn:
        for axis in axes[0]:
            axis.set_axis_off()
        axes[0, 0].set_title("No two fronts could be compared")
    save(figure, path)


def measured(point: CheckpointResult, target: str) -> tuple[float, float]:
    """Return a point's target, as it is drawn, and its drift."""
    if target == NLL:
        assert point.nll is not None
        return point.nll.mean, point.drift["general"].mean
    return 100 * point.tasks[target].mean, point.drift["general"].mean
