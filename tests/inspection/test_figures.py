"""
The pictures: what is in them beside brute force, and that they stand in a page without an address.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from eaft.inspection.find.effects import DataGate
from eaft.inspection.find.figures import CAPTIONS, Planes, draw, svg
from eaft.inspection.find.findings import find
from eaft.inspection.find.report import write
from eaft.inspection.folder import Inspection
from eaft.inspection.summary import DATA, ROLLOUTS, TopKRow, write_summary
from tests.inspection.made import grad_norm, make_inspection

CURVE = [
    TopKRow(k, pearson=1 - 1 / k, spearman=None, seconds=0.1 * k, mib=0.2 * k) for k in (2, 20, 54)
]


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    inspection = Inspection(
        make_inspection(tmp_path_factory.mktemp("made"), examples=30, rollouts=10)
    )
    return inspection, find(inspection, CURVE)


def labelled(inspection):
    table = pq.read_table(inspection.folder / "tokens").to_pandas()
    origin = inspection.examples()["origin"].to_pandas()
    table["origin"] = origin.iloc[table["example"]].to_numpy()
    return table[table["labelled"]].astype({"log_prob": float, "sum_sq_probs": float})


def test_planes_hold_every_token_and_its_gradient(inspected):
    inspection, summary = inspected
    planes = Planes(inspection, summary.entropy_max, DataGate("dft", summary.measured))
    tokens = labelled(inspection)
    corner = (tokens["entropy"] < 0.5) & (np.exp(tokens["log_prob"]) < 0.1)
    rows, columns = planes.entropy_edges[:-1] < 0.5 - 1e-9, planes.prob_edges[:-1] < 0.1 - 1e-9
    for origin in (DATA, ROLLOUTS):
        here = tokens["origin"] == origin
        assert planes.tokens[origin].sum() == here.sum()
        assert planes.tokens[origin][np.ix_(rows, columns)].sum() == (here & corner).sum() > 0
    data = tokens[tokens["origin"] == DATA]
    prob = np.exp(data["log_prob"])
    norms = grad_norm(data["sum_sq_probs"], data["log_prob"])
    assert planes.gradient.sum() == pytest.approx(norms.sum(), rel=1e-5)
    assert planes.gated.sum() == pytest.approx((prob * norms).sum(), rel=1e-4)  # DFT's weight is p


def test_figures_stand_in_a_page(inspected):
    inspection, summary = inspected
    figures = draw(inspection, summary)
    assert figures.keys() == CAPTIONS.keys()
    page = "".join(svg(figure, name) for name, figure in figures.items())
    assert "://" not in page
    assert page.count("<svg") == page.count("</svg>") == len(CAPTIONS)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    referred = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)
    assert {a or b for a, b in referred} <= set(ids)
    assert referred


def test_only_what_there_is_something_of_is_drawn(tmp_path):
    inspection = Inspection(make_inspection(tmp_path, examples=3, rollouts=0, compared=()))
    summary = find(inspection, None)
    assert draw(inspection, summary).keys() == {
        "landscape",
        "gradient",
        "gates",
        "words",
    }
    assert draw(inspection, replace(summary, measured=None)) == {}


def test_the_gate_of_the_flags_is_beside_sft(tmp_path):
    folder = make_inspection(tmp_path, examples=4, rollouts=0, compared=())
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "config": {"gate": "dft"}}))
    inspection = Inspection(folder)
    write_summary(folder, find(inspection, None))
    write(inspection)
    page = (folder / "report.html").read_text()
    assert "dft: " in page
    assert "eaft: " not in page
