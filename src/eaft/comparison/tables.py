"""The tables of a comparison: objectives, pairs, benchmarks and checkpoints."""

from __future__ import annotations

from collections.abc import Callable

from eaft.comparison.collect import LEVEL
from eaft.comparison.results import Comparison, Difference, PairResult, Spread
from eaft.comparison.wording import VIEWS, nats, points
from eaft.text import table


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
