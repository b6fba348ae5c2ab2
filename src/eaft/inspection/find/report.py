"""The report of an inspection: report.html, the pictures, and the page that is printed."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from eaft.evaluation.report import save
from eaft.inspection.find.advice import percent, shown
from eaft.inspection.find.figures import CAPTIONS, draw, svg
from eaft.inspection.folder import BASE, DATA, REPORT_FILE, ROLLOUTS, SUMMARY_FILE, Inspection
from eaft.inspection.labelled import Vocabulary, weighed_gates
from eaft.text import table, visible

Numbers = dict[str, Any]
FIRST_EXAMPLES, EXAMPLE_TOKENS = 8, 400  # shown in the report
TOKEN_ROWS = 15


def write(inspection: Inspection) -> None:
    """Write figures/*.png and report.html, from summary.json and the tokens."""
    folder = inspection.folder / "figures"
    folder.mkdir(exist_ok=True)
    pictures = {}
    gate = inspection.run["config"].get("gate")
    gate = gate if gate in weighed_gates() and gate != "sft" else "eaft"
    for name, figure in draw(inspection, inspection.summary, gate).items():
        pictures[name] = Markup(svg(figure, name))
        save(figure, folder / f"{name}.png")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": optional_percent,
        "shown": functools.partial(shown, leading=True),
        "nats": optional_nats,
        "code": code,
    }
    template = environment.from_string(Path(__file__).with_name("report.html").read_text())
    text = template.render(
        run=inspection.run,
        models=inspection.models,
        s=inspection.summary,
        origins=[o for o in (DATA, ROLLOUTS) if inspection.summary["counts"][o]],
        pictures=pictures,
        captions=CAPTIONS,
        examples=list(first_examples(inspection)),
        token_rows=TOKEN_ROWS,
        base=BASE,
    )
    staging = inspection.folder / f"{REPORT_FILE}.tmp"
    staging.write_text(text, errors="replace")
    os.replace(staging, inspection.folder / REPORT_FILE)


def visible_text(value: Any) -> Any:
    """Return what the template writes, with control characters shown in what is no markup."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def code(text: str) -> Markup:
    """Return text with what is in backticks as code."""
    parts = visible(text).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts)
    )


def optional_percent(share: float | None) -> str:
    """Return a share in per cent; nothing for none."""
    return "-" if share is None else percent(share) if share >= 0 else f"-{percent(-share)}"


def optional_nats(value: float | None) -> str:
    """Return nats; nothing for none."""
    return "-" if value is None else f"{value:.2f}"


def first_examples(inspection: Inspection) -> Iterator[Numbers]:
    """
    Yield the first examples: row, source, nll, conflict share, and `pieces` of text with how to
    colour them.
    """
    examples = inspection.examples(["example", "row", "source", "text", "nll", "conflict_share"])
    examples = examples.slice(0, FIRST_EXAMPLES).to_pylist()
    names = ["example", "end", "token_id", "log_prob", "entropy", "first_choice", "first_prob"]
    wanted: list[pa.RecordBatch] = []
    for batch in inspection.batches(names, rows=1 << 15):
        wanted.append(batch.filter(pc.less(batch["example"], FIRST_EXAMPLES)))
        if batch["example"][-1].as_py() >= FIRST_EXAMPLES:
            break
    tokens, vocabulary = pa.Table.from_batches(wanted), Vocabulary(inspection)
    for example in examples:
        rows = tokens.filter(pc.equal(tokens["example"], example["example"])).to_pylist()
        pieces, start = [], 0
        for row in rows[:EXAMPLE_TOKENS]:
            text, start = example["text"][start : row["end"]], row["end"]
            if not text:
                continue  # of a character whose last token shows it
            if row["log_prob"] is None:
                pieces.append({"text": text, "style": "no", "title": ""})
                continue
            prob = min(1.0, 2.718281828459045 ** row["log_prob"])
            first = shown(vocabulary.named(row["first_choice"])["text"], True)
            title = (
                f"p {prob:.3g}, H {row['entropy']:.2f}; the model: {first}"
                f" ({row['first_prob']:.2f})"
            )
            pieces.append({"text": text, "style": f"p{min(9, int(10 * prob))}", "title": title})
        yield {**example, "pieces": pieces, "more": max(0, len(rows) - EXAMPLE_TOKENS)}


def page(inspection: Inspection) -> str:
    """Return what is printed: the advice, the tables that prove it, and which files there are."""
    s = inspection.summary
    rows = [
        [
            name,
            origin,
            *(optional_percent(shares[key]) for key in ("tokens", "nll", "gradient")),
            optional_nats(s["entropy"][name][origin]),
        ]
        for name, of_model in s["conflicts"].items()
        for origin, shares in of_model.items()
        if shares is not None
    ]
    parts = [
        s["advice"]["text"],
        table(rows, ["in confident conflicts", "of", "tokens", "nll", "gradient", "mean entropy"]),
    ]
    if s["gates"]:
        rows = [
            [
                row["gate"],
                *(optional_percent(row[key]) for key in ("tokens", "nll", "gradient")),
                mutes(row),
            ]
            for row in s["gates"]
            if row["source"] is None
        ]
        parts.append(table(rows, ["gate removes", "tokens", "nll", "gradient", "mutes most"]))
    if s["tokens"]["conflict"]:
        rows = [
            [f"`{shown(row['text'], True)}`", row["count"], f"{row['lift']:.1f}", wanted(row)]
            for row in s["tokens"]["conflict"][:10]
        ]
        parts.append(table(rows, ["conflict", "tokens", "lift", "the model wanted"]))
    found = [check for check in s["checks"] if check["count"]]
    parts += [
        f"- {check['title']}: {check['count']} (row {first_rows(check)}). {check['text']}"
        for check in found
    ]
    if not found:
        parts.append(
            f"- Checked, and nothing found: {'; '.join(c['title'].lower() for c in s['checks'])}."
        )
    files = ", ".join([REPORT_FILE, "figures/landscape.png and others", SUMMARY_FILE])
    parts.append(f"In {inspection.folder}: {files}. To look around: eaft view {inspection.folder}")
    return "\n\n".join(parts) + "\n"


def first_rows(check: Numbers) -> str:
    """Return the first rows that a check found."""
    return ", ".join(map(str, check["rows"][:5])) + (", …" if check["count"] > 5 else "")


def mutes(row: Numbers) -> str:
    """Return the tokens that a gate mutes most."""
    return " ".join(f"`{shown(token['text'], True)}`" for token in row["muted"][:5])


def wanted(row: Numbers) -> str:
    """Return what the model wanted instead of a token."""
    return " ".join(
        f"`{shown(token['text'], True)}` {token['count']}" for token in row["wanted"][:3]
    )
