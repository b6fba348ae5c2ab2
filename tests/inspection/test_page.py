"""
The viewer's page in Chromium against its server: what is shown equals what the folder's files say.
"""

import csv
import json
import os
import re
import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest
import torch
import uvicorn
from playwright import sync_api

from eaft.inspection.folder import Inspection
from eaft.inspection.run_file import NARROW, ScoredRows, write_run
from eaft.inspection.score.stopping import scored_rows
from eaft.inspection.view.queries import Queries
from eaft.inspection.view.runs import Runs
from eaft.inspection.view.serve import listen
from eaft.inspection.view.server import make_app
from eaft.inspection.view.tables import Tables
from eaft.objective.registry import gate_weights
from eaft.objective.statistics import TokenStatistics
from tests.inspection.made import (
    EMPTY_SUMMARY,
    TOP_K,
    VOCAB,
    grad_norm,
    make_inspection,
    make_tuning,
)

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
expect = sync_api.expect

MINUS = "\N{MINUS SIGN}"
COMPARISON = Path(__file__).parents[2] / "benchmarks/results/demo/function_calls/results.json"
VIEWS = ("landscape", "gates", "examples", "tokens", "runs", "checks")
ADVICE = "**A fact**: they are mostly `<<` & <b>format</b>."
SUMMARY = {
    "counts": {"data": {"examples": 120, "tokens": 4000, "labelled": 2600}, "rollouts": None},
    "measured": {"entropy_threshold": 0.2, "prob_threshold": 0.1, "tau": 2.0},
    "gates": [
        {
            "gate": "dft",
            "params": {},
            "note": None,
            "source": None,
            "tokens": 0.5,
            "nll": 0.8,
            "gradient": 0.7,
            "muted": [],
        },
        {
            **{"gate": "mile", "params": {"gamma": 1.0}, "note": None, "source": None},
            **{"tokens": -1.26, "nll": -1.59, "gradient": -1.71, "muted": []},
        },
    ],
    "checks": [
        {
            "name": "unlabelled",
            "title": "Rows without a label",
            "count": 1,
            "rows": [3],
            "text": "Not trained on.",
        },
        {
            "name": "twice",
            "title": "A template applied twice",
            "count": 0,
            "rows": [],
            "text": "None.",
        },
    ],
    "advice": {**EMPTY_SUMMARY["advice"], "kind": "format", "text": ADVICE},
}
CHANGE = {
    "n": 40,
    "before": 0.5,
    "after": 0.4,
    "change": -0.1,
    "low": -0.2,
    "high": 0.0,
    "p_value": 0.04,
    "p_holm": 0.04,
}
EVALUATION = {
    "model": "made/tuned",
    "base": "made/base",
    "asked": {},
    "failed": {},
    "tasks": {"arithmetic": CHANGE},
    "means": {},
    "drift": {"mean": 0.25, "low": 0.2, "high": 0.3, "tokens": 640, "quantiles": {}},
    "worst": [
        {
            "benchmark": "arithmetic",
            "task": "arithmetic",
            "doc_id": 1,
            "prompt": "<i>2 + 2</i>",
            "target": "4",
            "before": {"response": "four", "score": 1.0},
            "after": {"response": "a fish", "score": 0.0},
        }
    ],
    "verdict": {"sentence": "A loss is shown on arithmetic.", "tests": []},
}


# `eaft eval --held_out` without tasks
ROWS = {
    **EVALUATION,
    **{"tasks": {}, "drift": None, "worst": []},
    "held_out": {
        **{"before": 2.0, "after": 1.5, "change": -0.5, "low": -0.75, "high": -0.25, "rows": 8},
        "answers": [
            {"row": 2, "prompt": "mine?", "target": "yes", "before": "<b>no</b>", "after": "yes"}
        ],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_inspection(
        tmp_path_factory.mktemp("view") / "made", examples=120, rollouts=60, summary=SUMMARY
    )
    for name, results in (
        ("compared-runs", json.loads(COMPARISON.read_text())),
        ("evaluated", EVALUATION),
        ("rows", ROWS),
    ):
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "results.json").write_text(json.dumps(results))
    kept = folder / "runs" / "compared-runs"
    for side, answers in (
        ("base/items", ["4", "5"]),
        ("sft-seed0/items/step-20", ["4", "<b>fish</b>"]),
    ):
        (kept / side).mkdir(parents=True)
        lines = [json.dumps(item(i, text, text != "<b>fish</b>")) for i, text in enumerate(answers)]
        (kept / side / "everyday.jsonl").write_text("\n".join(lines) + "\n")
    logs = [{"step": step, "nll": 2 / step, "mean_gate": 0.5} for step in (1, 2, 3)]
    (kept / "sft-seed0" / "metrics.jsonl").write_text(
        "".join(json.dumps(log) + "\n" for log in logs)
    )
    return folder


def item(number, response, right):
    """An answer as `eaft compare` keeps it."""
    hashes = dict.fromkeys(("prompt_hash", "target_hash", "doc_hash"), f"{number}")
    asked = {"task": "everyday", "doc_id": number, "prompt": f"{number}?", "target": "4"}
    answer = {"response": response, "score": float(right), "metric": "acc,none", "cut": []}
    return {**asked, **hashes, **answer}


@contextmanager
def serve(folder):
    """Serve a folder as `eaft view` does; the address has the token."""
    listening = listen(None)
    port = listening.getsockname()[1]
    queries = Queries(Tables(Inspection(folder))) if (folder / "run.json").exists() else None
    app = make_app("made", queries, Runs(folder), port, "secret")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}/?token=secret"
    server.should_exit = True
    thread.join()
    listening.close()


@pytest.fixture(scope="module")
def address(folder):
    with serve(folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """
    Open the page with a fragment; at the end nothing may be in the console, and no other host was
    asked.
    """
    contexts, told, hosts = [], [], set()

    def visit(fragment="", width=1280, theme="light", address=address):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=theme, accept_downloads=True
        )
        context.set_default_timeout(20_000)
        context.on("console", lambda message: told.append(message.text))
        context.on("weberror", lambda error: told.append(str(error.error)))
        context.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        contexts.append(context)
        page = context.new_page()
        page.on("dialog", lambda dialog: told.append(f"a script ran: {dialog.message}"))
        page.told = told
        page.goto(f"{address}#{fragment}")
        settled(page)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert told == []
    assert all(host.startswith("127.0.0.1:") for host in hosts)


def settled(page):
    """Wait until the page has drawn all that it asks for."""
    expect(page.locator("[role=tabpanel]:not([hidden])")).to_be_visible()
    page.wait_for_timeout(200)  # lists are asked for a moment after a change
    expect(page.locator("[role=tabpanel]:not([hidden]) [aria-busy=true]")).to_have_count(0)


@pytest.fixture(scope="module")
def tokens(folder):
    """The labelled tokens with what they are of, by pandas."""
    found = ds.dataset(sorted((folder / "tokens").glob("*.parquet"))).to_table().to_pandas()
    examples = pd.read_parquet(folder / "examples.parquet")
    found = found[found.labelled].merge(examples[["example", "origin", "source"]], on="example")
    found["prob"] = np.exp(found.log_prob)
    found["conflict"] = (found.entropy < 0.5) & (found.prob < 0.1)
    return found


@pytest.fixture(scope="module")
def examples(folder):
    return pd.read_parquet(folder / "examples.parquet")


def rows(page, name):
    """Return the cells of the body of a table."""
    table = page.get_by_role("table", name=name, exact=True)
    expect(table).to_be_visible()
    return table.evaluate(
        "t => [...t.tBodies[0].rows].map(r => [...r.cells].map(c => c.innerText.trim()))"
    )


def percent(text):
    return float(text.replace(MINUS, "-").rstrip("%")) / 100


def fragment(page):
    page.wait_for_timeout(300)  # a drag's address is written a moment later
    return page.evaluate("Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")


def test_landscape_shows_the_advice_and_the_shares(visit, tokens):
    page = visit()
    assert page.url.endswith("/")  # the token is out of sight
    expect(page.locator(".advice")).to_contain_text("A fact: they are mostly << & <b>format</b>.")
    data = tokens[tokens.origin == "data"]
    (name, count, nll, _), (_, *conflicts) = rows(page, "Shares")
    assert (name, int(count.replace(",", ""))) == ("all shown", len(data))
    assert float(nll.split()[0]) == pytest.approx(-data.log_prob.mean(), abs=0.006)
    grad = grad_norm(data.sum_sq_probs, data.log_prob)
    wanted = [
        data.conflict.mean(),
        data.log_prob[data.conflict].sum() / data.log_prob.sum(),
        grad[data.conflict].sum() / grad.sum(),
    ]
    assert [percent(text) for text in conflicts] == pytest.approx(wanted, abs=0.006)
    expect(page.locator(".plane svg")).to_contain_text("confident conflicts")


def test_the_heading_says_how_many_rows_were_scored(visit, folder, tmp_path):
    expect(visit().locator("#what")).not_to_contain_text("Scored")
    sampled = shutil.copytree(folder, tmp_path / "sampled")
    sample = ScoredRows(128, 1_000_000, NARROW)
    inspection = Inspection(sampled)
    write_run(sampled, replace(inspection.run, sample=sample))
    with serve(sampled) as address:
        page = visit(address=address)
        assert page.locator("body").inner_text().count(scored_rows(sample)) == 1
        expect(page.locator("#what")).to_contain_text(f"scored by made/base. {scored_rows(sample)}")


def test_a_box_dragged_equals_the_files(visit, tokens):
    page = visit()
    overlay = page.locator(".plane .overlay").bounding_box()
    page.mouse.move(overlay["x"] + 20, overlay["y"] + 30)
    page.mouse.down()
    page.mouse.move(overlay["x"] + 150, overlay["y"] + 90)
    page.mouse.move(overlay["x"] + 300, overlay["y"] + 160)
    page.mouse.up()
    settled(page)
    assert page.locator(".plane .overlay").bounding_box() == overlay  # the plot has not moved
    h0, h1, p0, p1 = map(float, fragment(page)["box"].split(","))
    assert 0 < h0 < h1
    assert 0 < p0 < p1 < 1
    data = tokens[tokens.origin == "data"]
    inside = data[(data.entropy >= h0) & (data.entropy < h1) & (data.prob >= p0) & (data.prob < p1)]
    assert len(inside) > 20
    selected = f"{len(inside):,} tokens in {inside.example.nunique():,} examples in the box"
    expect(page.locator(".selected")).to_have_text(selected)
    assert percent(rows(page, "Shares")[2][2]) == pytest.approx(
        inside.log_prob.sum() / data.log_prob.sum(), abs=0.006
    )
    most = inside.token_id.value_counts().max()
    assert int(rows(page, "Tokens")[0][1]) == most
    expect(page.get_by_text(f"all {inside.example.nunique()} examples →")).to_be_visible()
    # By keyboard: a bin up, its corner a bin to the right; then back, and back again
    page.locator(".plane > div").focus()
    page.keyboard.press("ArrowUp")
    up = list(map(float, fragment(page)["box"].split(",")))
    assert up[0] > h0
    assert up[1] > h1
    page.keyboard.press("Shift+ArrowRight")
    wide = list(map(float, fragment(page)["box"].split(",")))
    assert wide[:3] == up[:3]
    assert wide[3] > up[3]
    page.go_back()
    page.go_back()
    expect(page.locator(".selected")).to_have_text(selected)
    # By number
    for label, value in (
        ("entropy from", 0),
        ("entropy to", 0.5),
        ("probability from", 0),
        ("probability to", 0.1),
    ):
        page.get_by_label(f"Box: {label}").fill(str(value))
        page.keyboard.press("Tab")
    expect(page.locator(".selected")).to_contain_text(f"{data.conflict.sum():,} tokens")


def test_two_landscapes_beside_each_other_and_their_difference(visit, tokens):
    page = visit()
    page.get_by_label("Beside").select_option("rollouts")
    expect(page.locator(".plane")).to_have_count(2)
    own = tokens[tokens.origin == "rollouts"]
    nll = own.log_prob[own.conflict].sum() / own.log_prob.sum()
    shown = page.locator(".plane svg").nth(1).text_content()
    assert percent(re.search(r"([\d.]+%) of nll", shown)[1]) == pytest.approx(nll, abs=0.006)
    page.get_by_role("button", name="difference").click()
    expect(page.locator(".plane")).to_have_count(1)
    expect(page.locator(".plane figcaption")).to_contain_text("minus")
    page.get_by_label("Beside").select_option("scored by tuned")
    expect(page.locator(".plane figcaption")).to_contain_text("scored by tuned")


def test_a_gate_moved_equals_gate_weights(visit, tokens):
    page = visit("view=gates")
    data = tokens[tokens.origin == "data"]
    column = {
        name: torch.from_numpy(data[name].to_numpy().copy())
        for name in ("log_prob", "entropy", "top_k_entropy", "sum_sq_probs")
    }
    stats = TokenStatistics(
        **column, is_top1=torch.tensor((data["rank"] == 1).tolist()), top_k=TOP_K
    )

    def check(**params):
        settled(page)
        weights = gate_weights("eaft", stats, **params).double()
        for row, x in zip(
            rows(page, "What the gate removes"),
            (torch.ones_like(weights), stats.nll, stats.grad_norm),
            strict=True,
        ):
            assert percent(row[1]) == pytest.approx(
                1 - float((weights * x).sum() / x.sum()), abs=0.006
            )
        lost = (
            pd.Series(((1 - weights) * stats.nll).numpy()).groupby(data.token_id.to_numpy()).sum()
        )
        assert float(rows(page, "Muted tokens")[0][2]) == pytest.approx(lost.max(), abs=0.06)

    check(alpha=1.0)
    before = rows(page, "What the gate removes")
    page.get_by_role("slider", name="alpha").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    expect(page.get_by_label("alpha, as a number")).to_have_value("1.5")
    expect(page.locator(".removed")).not_to_contain_text(before[0][1])
    check(alpha=1.5)
    assert json.loads(fragment(page)["params"]) == {"alpha": 1.5}
    page.get_by_label("alpha, as a number").fill("3")
    page.keyboard.press("Tab")
    expect(page.get_by_role("slider", name="alpha")).to_have_value("3")
    check(alpha=3.0)
    page.get_by_role("button", name="dft").click()
    expect(page.locator(".plane figcaption").nth(1)).to_have_text("dft")


def test_a_gates_numbers_are_of_the_box_beside_them(visit, tokens):
    page = visit("view=gates")
    assert rows(page, "Every gate")[1] == ["mile\ngamma 1", "adds 126%", "adds 159%", "adds 171%"]
    overlay = page.locator(".plane .overlay").first.bounding_box()
    x, y = overlay["x"], overlay["y"]
    page.mouse.move(x + 20, y + 30)
    page.mouse.down()
    page.mouse.move(x + 150, y + 90)
    page.mouse.up()
    settled(page)
    assert page.locator(".plane .overlay").first.bounding_box() == overlay
    expect(page.locator(".plane .selection:visible")).to_have_count(2)
    h0, h1, p0, p1 = map(float, fragment(page)["box"].split(","))
    data = tokens[tokens.origin == "data"]
    inside = data[(data.entropy >= h0) & (data.entropy < h1) & (data.prob >= p0) & (data.prob < p1)]
    heading = f"From the {len(inside):,} tokens in the box it removes"
    expect(page.get_by_role("heading", name=heading)).to_be_visible()
    expect(page.get_by_role("table", name="Every gate")).to_have_count(0)
    page.get_by_role("button", name="Show all of the data").click()
    expect(page.get_by_role("heading", name=f"From all {len(data):,} tokens")).to_be_visible()
    expect(page.get_by_role("table", name="Every gate")).to_be_visible()


def test_examples_are_sorted_filtered_and_searched(visit, examples):
    data = examples[(examples.origin == "data") & examples.nll.notna()]
    page = visit("view=examples")

    def shown():
        settled(page)
        return [int(row[0]) for row in rows(page, "Examples")]

    assert (
        shown()
        == data.sort_values(
            ["conflict_nll_share", "example"], ascending=[False, True]
        ).row.tolist()[:50]
    )
    page.get_by_role("button", name="nll", exact=True).click()
    assert shown()[0] == data.sort_values("nll").row.iloc[-1]
    page.get_by_role("button", name="nll ↓").focus()
    page.keyboard.press("Enter")
    assert shown() == data.sort_values("nll").row.tolist()[:50]
    page.keyboard.press("]")
    assert shown() == data.sort_values("nll").row.tolist()[50:100]
    page.get_by_text("Filter", exact=True).click()
    page.get_by_label("nll of the example, from").fill("3")
    page.get_by_label("nll of the example, to").fill("5")
    page.keyboard.press("Tab")
    between = data[data.nll.between(3, 5)]
    expect(page.locator(".pager")).to_contain_text(f"{len(between)} examples")
    page.get_by_label("Add a source").select_option("source-1")
    both = between[between.source == "source-1"]
    expect(page.locator(".pager")).to_contain_text(f"{len(both)} examples")
    assert shown() == both.sort_values("nll").row.tolist()[:50]
    page.get_by_role("button", name="clear all").click()
    page.keyboard.press("/")
    page.keyboard.type("paris")
    found = examples[(examples.origin == "data") & examples.text.str.lower().str.contains("paris")]
    expect(page.locator(".pager")).to_contain_text(f"{len(found)} examples")


def test_an_opened_example_shows_its_tokens(visit, folder, examples, tokens):
    found = ds.dataset(sorted((folder / "tokens").glob("*.parquet"))).to_table().to_pandas()
    # One with a labelled emoji, markup and Hebrew
    emoji = set(found[(found.token_id == len(VOCAB) - 1) & found.labelled].example)
    chosen = next(
        row
        for row in examples.itertuples()
        if row.example in emoji and "<script>" in row.text and "שלום" in row.text
    )
    page = visit(f"view=examples&origin={chosen.origin}&example={chosen.example}")
    text = page.locator(".text")
    assert text.text_content() == chosen.text
    assert text.evaluate(
        "t => [getComputedStyle(t).unicodeBidi, t.querySelectorAll('script').length]"
    ) == [
        "plaintext",
        0,
    ]
    mine = found[found.example == chosen.example]
    unlabelled = "".join(page.locator(".text .unlabelled").all_text_contents())
    assert unlabelled == chosen.text[: mine[~mine.labelled].end.max()]
    colour = "e => getComputedStyle(e).backgroundColor"
    assert page.locator(".text .unlabelled").first.evaluate(colour) == "rgba(0, 0, 0, 0)"
    # Strength of the colour: 1 - p; a conflict is underlined
    labelled = mine[mine.labelled].set_index("position")
    parts = page.locator(".text .labelled").evaluate_all(
        """all => all.map(e => [
            Number(e.dataset.at), Number(e.style.getPropertyValue('--strength')),
            e.className, e.textContent])"""
    )
    grouped = 0
    for at, strength, names, shown in parts:
        token = labelled.loc[at]
        if shown == "🙂":
            grouped += 1
            group = labelled.loc[at : at + 2]
            assert strength == pytest.approx(1 - np.exp(group.log_prob).min(), abs=1e-3)
            continue
        assert shown == VOCAB[int(token.token_id)]
        assert strength == pytest.approx(1 - np.exp(token.log_prob), abs=1e-3)
        assert ("conflict" in names) == (token.entropy < 0.5 and np.exp(token.log_prob) < 0.1)
    assert grouped == (labelled.token_id == len(VOCAB) - 1).sum()
    strongest, weakest = (pick(parts, key=lambda part: part[1])[0] for pick in (max, min))
    shades = [
        page.locator(f".text [data-at='{at}']").evaluate(colour) for at in (strongest, weakest)
    ]
    assert shades[0] != shades[1]
    # What the model expected
    page.locator(f".text [data-at='{strongest}']").hover()
    wanted = labelled.loc[strongest]
    tip = page.locator("#tip")
    expect(tip).to_contain_text(
        "the model expected " + VOCAB[int(wanted.first_choice)].replace(" ", "␣")
    )
    expect(tip).to_contain_text(f"{wanted.entropy:.2f} nats")
    expect(tip).to_contain_text(f"{-wanted.log_prob:.2f} nats")
    # The emoji's tooltip lists its three tokens
    page.locator(".text .labelled", has_text="🙂").first.hover()
    for name in VOCAB[-3:]:
        expect(tip).to_contain_text(name)
    # Other colours
    page.get_by_role("button", name="change after training").click()
    settled(page)
    expect(page.locator(".text.paint-change")).to_be_visible()
    tuned = (
        ds.dataset(sorted((folder / "compared" / "tuned").glob("*.parquet"))).to_table().to_pandas()
    )
    tuned = tuned[tuned.example == chosen.example].set_index("position")
    change = (tuned.log_prob - mine.set_index("position").log_prob).loc[weakest]
    shown = page.locator(f".text [data-at='{weakest}']")
    assert float(shown.evaluate("e => e.style.getPropertyValue('--strength')")) == pytest.approx(
        min(abs(change) / 3, 1), abs=1e-3
    )
    assert ("less" in shown.get_attribute("class")) == (change < 0)
    page.get_by_role("button", name="gate's weight").click()
    settled(page)
    expect(page.locator(".text.paint-weight")).to_be_visible()


def test_tokens_and_their_places_lead_to_the_example(visit, tokens):
    page = visit("view=tokens")
    conflicts = tokens[(tokens.origin == "data") & tokens.conflict]
    counts = conflicts.token_id.value_counts()
    shown = rows(page, "Tokens")
    assert len(shown) == len(counts)
    assert [int(row[1]) for row in shown] == sorted(counts, reverse=True)
    named = {row[0]: int(row[1]) for row in shown}
    assert named["<script>alert(1)</script>"] == counts[VOCAB.index("<script>alert(1)</script>")]
    assert named["↵"] == counts[VOCAB.index("\n")]
    page.get_by_role("table", name="Tokens").get_by_role(
        "button", name="␣Paris", exact=True
    ).click()
    settled(page)
    paris = conflicts[conflicts.token_id == VOCAB.index(" Paris")].sort_values(
        ["example", "position"]
    )
    assert len(rows(page, "Places in context")) == min(len(paris), 50)
    expect(page.get_by_role("button", name="Remove the filter: token ␣Paris")).to_be_visible()
    page.get_by_role("table", name="Places in context").get_by_role("button").first.click()
    settled(page)
    first = paris.iloc[0]
    assert fragment(page)["example"] == str(first.example)
    expect(page.locator(f".text [data-at='{first.position}']")).to_be_focused()
    expect(page.locator("#tip")).to_contain_text("confident conflict")


def test_runs_and_checks(visit):
    page = visit("view=runs")
    expect(page.locator(".lead")).to_contain_text("Choose sft.")
    assert page.locator("figure svg").count() >= 5
    page.get_by_label("Metric").select_option("mean_gate")
    expect(page.get_by_role("img", name="mean_gate")).to_be_visible()
    page.get_by_label("Model").select_option("sft, seed 0, step 20")
    assert [row[:3] for row in rows(page, "Items")] == [["1", "1", "0"]]
    page.get_by_role("button", name="1?").click()
    expect(page.locator(".said.lost")).to_have_text("<b>fish</b>")
    target = json.loads(COMPARISON.read_text())["pairs"][0]["views"]["chosen"]["means"]["target"]
    # The page rounds halves away from 0
    points = [
        Decimal(100 * target[name]).quantize(Decimal("0.1"), ROUND_HALF_UP)
        for name in ("change", "low", "high")
    ]
    change, low, high = (f"{value:+}".replace("-", MINUS) for value in points)
    assert ["target", f"{change} {low} to {high}", "points", f"{target['p_holm']:.2g}"] in rows(
        page, "eaft minus sft"
    )
    page.get_by_label("Run", exact=True).select_option("runs/evaluated (eaft eval)")
    expect(page.locator(".lead")).to_have_text("A loss is shown on arithmetic.")
    assert rows(page, "Tasks")[0][:4] == [
        "arithmetic",
        "50%",
        "40%",
        "-10.0 -20.0 to +0.0".replace("-", MINUS),
    ]
    page.get_by_role("button", name="<i>2 + 2</i>").click()
    expect(page.locator(".said.prompt")).to_have_text("<i>2 + 2</i>")
    page.go_back()
    page.go_back()
    page.get_by_label("Run", exact=True).select_option("runs/rows (eaft eval)")
    expect(page.get_by_text("Held-out nll 2.000 before and 1.500 after")).to_be_visible()
    expect(page.locator(".warning").first).to_contain_text("Fewer than 32 rows")
    page.get_by_role("button", name="mine?").click()
    expect(page.locator("#view-runs .said")).to_have_text(["mine?", "yes", "<b>no</b>", "yes"])
    page.go_back()
    page.go_back()
    expect(page.locator(".lead")).to_contain_text("Choose sft.")
    expect(page.get_by_label("Run", exact=True)).to_have_value("runs/compared-runs")
    page.get_by_role("tab", name="Checks 1").click()
    page.get_by_role("button", name="3", exact=True).click()
    expect(page.get_by_role("heading", name="Row 3")).to_be_visible()
    expect(page.locator(".raw pre")).to_be_hidden()
    page.get_by_text("The row as it was").click()
    expect(page.locator(".raw pre")).to_contain_text('"completion":')
    assert "raw=open" in page.url


def test_a_folder_of_runs_alone(visit, folder):
    with serve(folder / "runs") as address:
        page = visit(address=address)
        expect(page.get_by_role("tab")).to_have_text(["Runs"])
        expect(page.locator(".lead")).to_contain_text("Choose sft.")
        expect(page.get_by_text("Export")).to_have_count(0)
        page.close()


def test_a_tuning_is_a_front_whose_points_can_be_chosen(visit, tmp_path):
    with serve(make_tuning(tmp_path / "tuned")) as address:
        page = visit(address=address, width=1600)
        expect(page.locator(".lead")).to_have_text("The held-out nll fell.")
        point = page.get_by_role("region", name="The chosen point")
        expect(point).to_contain_text("the returned model")
        expect(point).to_contain_text("0.0400 95%: 0.0300 to 0.0600")
        expect(point).to_contain_text("0.0410 at most 0.0490")
        page.get_by_role("button", name="checkpoint of step 8: nll 1.200, drift 0.1200").click()
        expect(point).to_contain_text("the lowest held-out nll of all")
        expect(point.locator("dd").last).to_have_text("over")
        assert fragment(page)["point"] == "8,1"
        expect(page.locator("figcaption")).to_contain_text("cross: did not pass")
        nll = ["1.550", f"{MINUS}0.450 {MINUS}0.700 to {MINUS}0.200"]
        assert rows(page, "Confirmation") == [
            ["step 8, share 0.600", *nll, "0.0520", "0.0600", "over"],
            ["step 8, share 0.500 returned", *nll, "0.0410", "0.0490", "kept"],
        ]
        page.get_by_role("button", name="2 + 2?").click()
        expect(page.locator(".answers .said")).to_have_text(["five", "<b>four</b>"])
        page.get_by_role("button", name="drift 1").click()
        page.get_by_role("button", name="Hello").click()
        expect(page.locator("#view-runs .opened")).to_contain_text("<i>Good day</i>")
        page.set_viewport_size({"width": 420, "height": 800})
        settled(page)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.close()


def test_exports_are_what_is_filtered(visit, examples, tokens, tmp_path):
    page = visit("source=source-1&nll=3,&box=0,0.5,0,0.1")
    page.get_by_text("Export", exact=True).click()
    kept = examples[
        (examples.origin == "data") & (examples.source == "source-1") & (examples.nll >= 3)
    ]
    wanted = tokens[tokens.conflict & tokens.example.isin(kept.example)]
    for name in ("examples.jsonl", "tokens.csv"):
        with page.expect_download() as download:
            page.get_by_role("link", name=name).click()
        download.value.save_as(tmp_path / name)
    lines = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert [(line["row"], line["digest"]) for line in lines] == [
        (row.row, row.digest) for row in kept[kept.example.isin(wanted.example)].itertuples()
    ]
    with (tmp_path / "tokens.csv").open(newline="") as file:
        found = [(int(row["example"]), int(row["position"])) for row in csv.DictReader(file)]
    assert found == list(zip(wanted.example, wanted.position, strict=True))
    expect(page.locator(".command")).to_have_text(
        re.compile("made.jsonl --exclude_examples examples.jsonl$")
    )


def test_a_link_shows_the_same(visit):
    page = visit()
    page.keyboard.press("3")
    page.get_by_role("button", name="rollouts").click()
    page.keyboard.press("/")
    page.keyboard.type("<script>")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Remove the filter: “<script>”")).to_be_visible()
    settled(page)
    page.keyboard.press("j")
    settled(page)
    page.get_by_role("button", name="entropy", exact=True).last.click()
    settled(page)
    shown = page.locator("main").inner_text()
    other = visit(page.url.partition("#")[2])
    assert other.locator("main").inner_text() == shown
    expect(other.locator(".text.paint-entropy")).to_be_visible()
    page.go_back()
    expect(page.locator(".text.paint-prob")).to_be_visible()


def test_it_works_by_keyboard(visit):
    page = visit()
    for key, view in zip("23456", VIEWS[1:], strict=True):
        page.keyboard.press(key)
        expect(page.locator(f"#tab-{view}")).to_have_attribute("aria-selected", "true")
    page.locator("#tab-checks").focus()
    page.keyboard.press("ArrowRight")  # around the end
    expect(page.locator("#tab-landscape")).to_be_focused()
    page.keyboard.press("3")
    settled(page)
    page.keyboard.press("j")
    settled(page)
    first = page.locator("#view-examples .opened h2").inner_text()
    page.keyboard.press("j")
    expect(page.locator("#view-examples .opened h2")).not_to_have_text(first)
    page.keyboard.press("k")
    expect(page.locator("#view-examples .opened h2")).to_have_text(first)
    settled(page)
    # From token to token, each with its tooltip
    page.locator(".text .labelled[tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".text .labelled").nth(1)).to_be_focused()
    expect(page.locator("#tip")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#view-examples .opened")).to_be_hidden()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Help")).to_be_visible()
    page.keyboard.press("Escape")
    # Everything that can be clicked can be reached
    page.keyboard.press("1")
    settled(page)
    reached = set()
    page.locator("#tab-landscape").focus()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.ariaLabel ||"
                " document.activeElement.innerText.split('\\n')[0]"
            )
        )
    assert {
        "Scored by",
        "rollouts",
        "Filter",
        "Search the text of the examples",
        "nll",
        "Beside",
        "Box: entropy from",
    } <= reached
    assert any(name.startswith("Entropy-probability plane") for name in reached)


@pytest.mark.parametrize("width", [1280, 390])
def test_both_themes_and_widths(visit, width):
    papers = set()
    for theme in ("light", "dark"):
        page = visit("example=1", width, theme)
        for key in "123456":
            page.keyboard.press(key)
            settled(page)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (theme, key)
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.keyboard.press("t")  # from what the system says to dark, to light
        page.keyboard.press("t")
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2


def test_no_column_vanishes_on_a_narrow_screen(visit):
    page = visit("", 420)
    assert page.locator(".plane").bounding_box()["y"] < page.locator(".advice").bounding_box()["y"]
    for key in "345":
        page.keyboard.press(key)
        settled(page)
        cells = page.locator("[role=tabpanel]:not([hidden]) td:not(:empty)")
        assert cells.count() > 10
        assert cells.evaluate_all("all => all.every(td => td.getClientRects().length)")


def test_nothing_selected_is_no_error(visit):
    page = visit("search=nosuchtext&example=3")
    expect(page.locator(".selected")).to_have_text("0 tokens in 0 examples shown")
    for key in "2345":
        page.keyboard.press(key)
        settled(page)
    expect(page.locator("[role=alert]")).to_have_count(0)


def test_errors_are_said_in_words(visit):
    page = visit()
    page.context.set_offline(True)
    page.keyboard.press("4")
    problem = page.locator("[role=alert]").first
    expect(problem).to_contain_text("The server does not answer")
    page.context.set_offline(False)
    problem.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("table", name="Tokens")).to_be_visible()
    page.told.clear()  # the browser's own line about the request
    page = visit("search=" + "x" * 1001)
    expect(page.locator("[role=alert]").first).to_contain_text("at most 1000 characters")
    page.told.clear()
