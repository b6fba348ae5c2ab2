"""The report of an inspection: report.html, the pictures, and the page on the terminal."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from eaft.evaluation.report import save
from eaft.inspection.find.checks import PROMPT_TRAINED
from eaft.inspection.find.figures import CAPTIONS, draw, svg
from eaft.inspection.find.wording import percent, shown
from eaft.inspection.folder import BASE, REPORT_FILE, Inspection
from eaft.inspection.labelled import weighed_gates, what_is_absent
from eaft.inspection.score.stopping import scored_rows
from eaft.inspection.summary import (
    ORIGINS,
    SUMMARY_FILE,
    CheckResult,
    CountedToken,
    GateEffect,
    GroupToken,
    Shares,
    Summary,
)
from eaft.inspection.vocabulary import Vocabulary
from eaft.objective.statistics import CONFLICT_MAX_ENTROPY, CONFLICT_MAX_PROB
from eaft.text import fill_page, table, visible

# Shown in the report: examples, tokens of each from its answer on, and conflicts of each
FIRST_EXAMPLES, EXAMPLE_TOKENS, EXAMPLE_CONFLICTS = 8, 400, 6
TOKEN_ROWS = 15
COUNTED = "The numbers of this report count these tokens too."


def write(inspection: Inspection) -> None:
    """Write figures/*.png and report.html, from summary.json and the tokens."""
    folder = inspection.folder / "figures"
    folder.mkdir(exist_ok=True)
    pictures = {}
    gate = inspection.run.config.get("gate")
    gates = weighed_gates(inspection.whole_vocabulary)
    gate = gate if gate in gates and gate != "sft" else "eaft"
    for name, figure in draw(inspection, inspection.summary, gate).items():
        pictures[name] = Markup(svg(figure, name))
        save(figure, folder / f"{name}.png")
    text = fill_page(
        Path(__file__).with_name("report.html"),
        {
            "percent": optional_percent,
            "shown": functools.partial(shown, leading=True),
            "nats": optional_nats,
            "code": code,
        },
        run=inspection.run,
        sample=scored_rows(inspection.run.sample),
        prompts=trained_prompts(inspection.summary),
        counted=COUNTED,
        models=inspection.models,
        s=inspection.summary,
        origins=[o for o in ORIGINS if inspection.summary.counts.of(o) is not None],
        pictures=pictures,
        captions=CAPTIONS,
        examples=list(first_examples(inspection)),
        token_rows=TOKEN_ROWS,
        base=BASE,
        absent=what_is_absent(inspection.run),
        below_zero=below_zero(inspection.summary.gates),
    )
    staging = inspection.folder / f"{REPORT_FILE}.tmp"
    staging.write_text(text, errors="replace")
    os.replace(staging, inspection.folder / REPORT_FILE)


def code(text: str) -> Markup:
    """Return text as HTML; parts in backticks are code."""
    parts = visible(text).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts)
    )


def optional_percent(share: float | None) -> str:
    """Return a share in per cent, which may be negative; a dash for None."""
    if share is None:
        return "-"
    return percent(share) if share >= 0 else f"-{percent(-share)}"


def optional_nats(value: float | None) -> str:
    """Return nats; a dash for None."""
    return "-" if value is None else f"{value:.2f}"


@dataclass(frozen=True)
class Piece:
    """A part of an example's text, and how the report shows it."""

    text: str
    style: str  # a class of the style sheet: p0 to p9 by probability, conflict, or no label
    title: str  # what the pointer shows


@dataclass(frozen=True)
class ShownConflict:
    """A token in confident conflict, and what the model wanted."""

    label: str
    wanted: str


@dataclass(frozen=True)
class ShownExample:
    """An example as the report shows it."""

    row: int
    source: str
    nll: float | None
    conflict_share: float | None
    prompt: str  # the text before the first label
    prompt_tokens: int
    pieces: list[Piece]  # from the first label on
    conflicts: list[ShownConflict]  # the first of all
    more_conflicts: int  # that are not among them
    more: int  # tokens that are not shown


def first_examples(inspection: Inspection) -> Iterator[ShownExample]:
    """Yield the first examples."""
    columns = ["example", "row", "source", "text", "nll", "conflict_share"]
    examples = inspection.examples(columns).slice(0, FIRST_EXAMPLES).to_pylist()
    tokens, vocabulary = first_tokens(inspection), Vocabulary(inspection)
    for example in examples:
        rows = tokens.filter(pc.equal(tokens["example"], example["example"])).to_pylist()
        first = next((i for i, row in enumerate(rows) if row["log_prob"] is not None), len(rows))
        start = rows[first - 1]["end"] if first else 0
        prompt, answer, pieces = example["text"][:start], rows[first:], []
        for row in answer[:EXAMPLE_TOKENS]:
            text, start = example["text"][start : row["end"]], row["end"]
            if text:  # else a later token shows the character
                pieces.append(piece(text, row, vocabulary))
        conflicts = [row for row in answer if is_conflict(row)]
        yield ShownExample(
            row=example["row"],
            source=example["source"],
            nll=example["nll"],
            conflict_share=example["conflict_share"],
            prompt=prompt,
            prompt_tokens=first,
            pieces=pieces,
            conflicts=[
                ShownConflict(
                    vocabulary.named(row["token_id"]).text,
                    vocabulary.named(row["first_choice"]).text,
                )
                for row in conflicts[:EXAMPLE_CONFLICTS]
            ],
            more_conflicts=max(0, len(conflicts) - EXAMPLE_CONFLICTS),
            more=max(0, len(answer) - EXAMPLE_TOKENS),
        )


def is_conflict(token: dict[str, Any]) -> bool:
    """Return whether a token is in confident conflict."""
    return (
        token["log_prob"] is not None
        and token["entropy"] < CONFLICT_MAX_ENTROPY
        and math.exp(token["log_prob"]) < CONFLICT_MAX_PROB
    )


def first_tokens(inspection: Inspection) -> pa.Table:
    """Return the tokens of the first examples."""
    names = ["example", "end", "token_id", "log_prob", "first_choice", "first_prob"]
    entropy = inspection.entropy_column
    batches: list[pa.RecordBatch] = []
    for batch in inspection.batches([*names, entropy], rows=1 << 15):
        batches.append(batch.filter(pc.less(batch["example"], FIRST_EXAMPLES)))
        if batch["example"][-1].as_py() >= FIRST_EXAMPLES:
            break
    return pa.Table.from_batches(batches).rename_columns([*names, "entropy"])


def piece(text: str, token: dict[str, Any], vocabulary: Vocabulary) -> Piece:
    """Return a token's text with its colour and what the model expected."""
    if token["log_prob"] is None:
        return Piece(text, "no", "")
    prob = min(1.0, math.exp(token["log_prob"]))
    first = shown(vocabulary.named(token["first_choice"]).text, leading=True)
    title = (
        f"the model wanted {first} (p {token['first_prob']:.2f}); this token: p {prob:.3g}, entropy"
        f" {token['entropy']:.2f}"
    )
    style = "conflict" if is_conflict(token) else f"p{min(9, int(10 * prob))}"
    return Piece(text, style, title)


def page(inspection: Inspection) -> str:
    """
    Return what is printed: trained prompts if there are any, the advice, the tables behind it, the
    other checks, and the files.
    """
    summary = inspection.summary
    sample = scored_rows(inspection.run.sample)
    prompts = trained_prompts(summary)
    parts = [] if prompts is None else [f"{failure(prompts)} {COUNTED}"]
    parts += [summary.advice.text, *([sample] if sample else [])]
    parts.append(conflicts_table(summary, inspection.run.entropy_name))
    if absent := what_is_absent(inspection.run):
        parts.append(absent)
    if summary.gates:
        parts.append(gates_table(summary.gates))
    if summary.tokens.conflict:
        parts.append(tokens_table(summary.tokens.conflict))
    failed = [check for check in summary.checks if check.count]
    parts += [f"- {failure(check)}" for check in failed if check is not prompts]
    if not failed:
        titles = "; ".join(check.title.lower() for check in summary.checks)
        parts.append(f"- No row failed a check: {titles}.")
    files = ", ".join([REPORT_FILE, "figures/landscape.png and others", SUMMARY_FILE])
    parts.append(f"In {inspection.folder}: {files}. To look around: eaft view {inspection.folder}")
    return "\n\n".join(parts) + "\n"


def trained_prompts(summary: Summary) -> CheckResult | None:
    """
    Return the check of rows that train on tokens of the prompt; None if no row does.

    It comes first: with these tokens all shares are of another loss than the user may think.
    """
    checks = (check for check in summary.checks if check.name == PROMPT_TRAINED and check.count)
    return next(checks, None)


def failure(check: CheckResult) -> str:
    """Return a check that rows failed as a line."""
    return f"{check.title}: {check.count} (row {first_rows(check)}). {check.text}"


def conflicts_table(summary: Summary, entropy_name: str) -> str:
    """Return the table of shares in confident conflicts, by model and origin."""
    rows = []
    for name, by_origin in summary.conflicts.items():
        for origin in ORIGINS:
            shares = by_origin.of(origin)
            if shares is not None:
                entropy = optional_nats(summary.entropy[name].of(origin))
                rows.append([name, origin, *percents(shares), entropy])
    header = ["in confident conflicts", "of", "tokens", "nll", "gradient", f"mean {entropy_name}"]
    return table(rows, header)


def gates_table(effects: list[GateEffect]) -> str:
    """Return the table of what each gate removes from all sources."""
    rows = [
        [effect.gate, *percents(effect), muted(effect)]
        for effect in effects
        if effect.source is None
    ]
    text = table(rows, ["gate removes", "weight", "nll", "gradient", "mutes most, by nll"])
    return "\n\n".join(filter(None, [text, below_zero(effects)]))


def below_zero(effects: list[GateEffect]) -> str:
    """Return what a share below 0 means, if there is one; else nothing."""
    shares = (share for effect in effects for share in (effect.nll, effect.gradient))
    if all(share is None or share >= 0 for share in shares):
        return ""
    return "A share below 0: the gate adds weight, since it weighs some tokens by more than 1."


def tokens_table(tokens: list[GroupToken]) -> str:
    """Return the table of the most frequent tokens in conflict."""
    rows = [
        [f"`{shown(token.text, True)}`", token.count, f"{token.lift:.1f}", wanted(token.wanted)]
        for token in tokens[:10]
    ]
    return table(rows, ["conflict", "tokens", "lift", "the model wanted"])


def percents(shares: Shares) -> list[str]:
    """Return the shares of tokens, nll and gradient in per cent."""
    return [optional_percent(share) for share in (shares.tokens, shares.nll, shares.gradient)]


def first_rows(check: CheckResult) -> str:
    """Return the numbers of the first rows of a check."""
    return ", ".join(map(str, check.rows[:5])) + (", …" if check.count > 5 else "")


def muted(effect: GateEffect) -> str:
    """Return the tokens that a gate mutes most."""
    return " ".join(f"`{shown(token.text, True)}`" for token in effect.muted[:5])


def wanted(tokens: list[CountedToken]) -> str:
    """Return the model's first choices with their counts."""
    return " ".join(f"`{shown(token.text, True)}` {token.count}" for token in tokens[:3])
