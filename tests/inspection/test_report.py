"""The report: one file without an outside, text that stays text, opened in a real browser."""

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from eaft.inspection.find.figures import CAPTIONS
from eaft.inspection.find.findings import find
from eaft.inspection.find.report import below_zero, page, trained_prompts, write
from eaft.inspection.folder import Inspection
from eaft.inspection.summary import TopKRow, write_summary
from tests.inspection.made import make_inspection

NAMES = ["example", "end", "labelled", "entropy", "log_prob"]
CURVE = [TopKRow(k, pearson=0.9, spearman=None, seconds=0.1, mib=1.0) for k in (2, 20)]


@pytest.fixture(scope="module")
def inspection(tmp_path_factory):
    inspection = Inspection(make_inspection(tmp_path_factory.mktemp("made")))
    write_summary(inspection.folder, find(inspection, CURVE))
    write(inspection)
    return inspection


class Elements(HTMLParser):
    """Keeps tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_is_one_small_file_with_the_sentence_first(inspection):
    text = (inspection.folder / "report.html").read_text()
    assert len(text) < 1_500_000
    assert "http:" not in text
    assert "https:" not in text
    elements = Elements(text)
    assert "script" not in elements.tags
    assert elements.tags.count("svg") == len(CAPTIONS)
    assert "<script>alert(1)</script>" in elements.text  # a token of the made data
    addresses = [
        v for name, v in elements.attributes if name in ("src", "href", "xlink:href") and v
    ]
    assert all(v.startswith(("#", "data:image/png")) for v in addresses)
    advice = inspection.summary.advice.headline
    assert elements.text.index(advice) < elements.text.index("Is the data what you think?")
    names = {path.name for path in (inspection.folder / "figures").iterdir()}
    assert names == {f"{n}.png" for n in CAPTIONS}


def test_examples_open_at_the_answer_with_the_conflicts_marked(inspection):
    text = (inspection.folder / "report.html").read_text()
    examples = inspection.examples().to_pylist()
    tokens = [token for batch in inspection.batches(NAMES) for token in batch.to_pylist()]
    for example, part in zip(examples[:8], text.split("<h3>Row ")[1:], strict=True):
        its = [token for token in tokens if token["example"] == example["example"]]
        prompt = next((i for i, token in enumerate(its) if token["labelled"]), len(its))
        found = Elements(part.split("</h3>")[1])
        assert found.tags.count("details") == 1
        assert f": {prompt} tokens" in found.text
        start = its[prompt - 1]["end"]
        assert example["text"][start:] in found.text
        assert part.count('<span class="no">') == 0
        conflicts = [
            token
            for token in its[prompt:]
            if token["labelled"] and token["entropy"] < 0.5 and token["log_prob"] < np.log(0.1)
        ]
        marked = [v for name, v in found.attributes if name == "class" and v == "conflict"]
        assert len(marked) <= len(conflicts)  # those that end a character
        assert bool(marked) == bool(conflicts) == ("Conflicts: " in found.text)
        assert found.text.count("(the model wanted ") == min(6, len(conflicts))
    assert text.count('class="conflict" title="the model wanted ') > 8


def test_is_the_same_when_written_again(inspection):
    before = (inspection.folder / "report.html").read_text()
    write(inspection)
    assert (inspection.folder / "report.html").read_text() == before


def test_the_printed_page_has_the_numbers(inspection):
    text = page(inspection)
    assert text.startswith("Rows that train on tokens of the prompt: ")
    assert "\n\n" + inspection.summary.advice.text in text
    share = inspection.summary.conflicts["base"].data.nll
    assert re.search(rf"base +\| data +\|.*\| {100 * share:.0f}%", text)
    assert f"eaft view {inspection.folder}" in text
    assert "Rows without a label: 1 (row 3)" in text


def test_prompts_that_are_trained_on_come_before_the_sentence(inspection):
    (check,) = [c for c in inspection.summary.checks if c.name == "prompt_trained"]
    assert check.count
    html = Elements((inspection.folder / "report.html").read_text()).text
    for text in (html, page(inspection)):
        assert text.count(check.title) == 1
        assert text.index(check.title) < text.index(inspection.summary.advice.headline)
    fine = [replace(c, count=0, rows=[]) if c is check else c for c in inspection.summary.checks]
    assert trained_prompts(replace(inspection.summary, checks=fine)) is None


def test_a_share_below_zero_is_explained(inspection):
    effects = {e.gate: e for e in inspection.summary.gates if e.source is None}
    assert effects["mile"].nll < 0 < effects["eaft"].nll
    assert "the gate adds weight" in below_zero([effects["eaft"], effects["mile"]])
    assert below_zero([effects["eaft"]]) == ""


def test_a_folder_with_little_in_it(tmp_path):
    inspection = Inspection(
        make_inspection(tmp_path, examples=3, rollouts=0, compared=(), shards=1)
    )
    write_summary(inspection.folder, find(inspection, None))
    write(inspection)
    assert page(inspection)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium is installed")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_opens_in_a_browser_alone(inspection, width, scheme):
    playwright = pytest.importorskip("playwright.sync_api")
    said, asked = [], []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        tab.on("console", lambda message: said.append(message.text))
        tab.on("dialog", lambda dialog: said.append("a script ran"))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto((inspection.folder / "report.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.locator("svg").first.bounding_box()["height"] > 100
        browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [
        (inspection.folder / "report.html").as_uri()
    ]
