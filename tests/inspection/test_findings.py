"""What an inspection finds, against pandas and NumPy in float64 on all tokens at once."""

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest

from eaft.inspection import removed
from eaft.inspection.find.findings import find
from eaft.inspection.folder import STATISTICS, Inspection
from eaft.inspection.summary import DATA
from eaft.objective.registry import GATES
from eaft.provenance import write_json
from tests.inspection.made import TOP_K, grad_norm, make_inspection

QUANTITIES = ("tokens", "nll", "gradient")


@pytest.fixture(scope="module")
def inspection(tmp_path_factory):
    return Inspection(
        make_inspection(
            tmp_path_factory.mktemp("made"), examples=60, rollouts=20, compared=("a", "b")
        )
    )


@pytest.fixture(scope="module")
def summary(inspection):
    return asdict(find(inspection, None))


def frame(inspection, model="base"):
    """All labelled tokens in float64, with their origin and source."""
    names = ["example", *(field.name for field in STATISTICS)]
    table = pa.Table.from_batches(inspection.batches(names, model)).to_pandas()
    table["token_id"] = pa.Table.from_batches(inspection.batches(["token_id"])).to_pandas()[
        "token_id"
    ]
    table = table.merge(
        inspection.examples(["example", "origin", "source"]).to_pandas(), on="example"
    )
    table["base_entropy"] = pa.Table.from_batches(inspection.batches(["entropy"])).to_pandas()[
        "entropy"
    ]
    table = table.dropna(subset="log_prob").astype({name.name: np.float64 for name in STATISTICS})
    table["p"], table["nll"], table["tokens"] = np.exp(table.log_prob), -table.log_prob, 1.0
    table["gradient"] = grad_norm(table.sum_sq_probs, table.log_prob)
    table["conflict"] = (table.entropy < 0.5) & (table.p < 0.1)
    return table


def test_conflicts_and_nll_of_every_model_and_origin(inspection, summary):
    write_json(inspection.folder / "written.json", summary)  # no NaN in it
    for model in ("base", "a", "b"):
        for origin, rows in frame(inspection, model).groupby("origin"):
            shares = summary["conflicts"][model][origin]
            for name in QUANTITIES:
                # Float32 statistics leave the gradient open where p is near 1
                expected = rows[name][rows.conflict].sum() / rows[name].sum()
                assert shares[name] == pytest.approx(
                    expected, rel=1e-4 if name == "gradient" else 1e-6
                )
            assert summary["entropy"][model][origin] == pytest.approx(rows.entropy.mean(), rel=1e-6)
            nll = summary["nll"][model][origin]
            assert nll["all"] == pytest.approx(rows.nll.mean(), rel=1e-6)
            assert nll["high_entropy"] == pytest.approx(
                rows.nll[rows.base_entropy >= 2].mean(), rel=1e-6
            )
            assert nll["low_entropy"] == pytest.approx(
                rows.nll[rows.base_entropy <= 0.5].mean(), rel=1e-6
            )


def weights(rows, measured):
    """Every gate's weight, written from the papers."""
    g = np.clip(rows.top_k_entropy / np.log(TOP_K), 0, 1)
    mean = rows.groupby("example").nll.transform("mean")
    masked = (g > measured["entropy_threshold"]).astype(float)
    conflict = 1.0 - ((g <= measured["entropy_threshold"]) & (rows.p <= measured["prob_threshold"]))
    expected = np.where(
        rows.entropy >= 2 * np.log(2), np.exp(rows.entropy) / 4 + 1, 2 - rows.first_prob
    )
    exponent = np.log2(np.maximum(expected, rows["rank"]) + 1) ** -2
    return {
        "sft": np.ones(len(rows)),
        "eaft": g,
        "eaft-sigmoid": 1 / (1 + np.exp(-30 * (g - 0.17))),
        "masked": masked,
        "conflict-mask": conflict,
        "dft": rows.p,
        "deft": rows.p**rows.sum_sq_probs,
        "profit": (rows.p > 0.1).astype(float),
        "infosft": rows.p * np.maximum(1 - np.log(rows.p / (1 - rows.p)) / np.log(93 / 7), 0),
        "mile": 1 + rows.entropy,
        "ranktuner": rows.p * np.maximum(rows.p * expected, 1e-6) ** -exponent,
        "talr": np.maximum(rows.p ** (1 / measured["tau"]), 0.01),
        "flow": np.exp(-mean / measured["tau"]),
        "sft-kl": np.ones(len(rows)),
        "asft": rows.p,
        "tmkl": np.ones(len(rows)),
    }


def test_what_gates_remove(inspection, summary):
    rows, measured = frame(inspection), summary["measured"]
    rows = rows[rows.origin == DATA]
    assert measured["entropy_threshold"] == pytest.approx(
        np.percentile(np.clip(rows.top_k_entropy / np.log(TOP_K), 0, 1), 15), rel=1e-4
    )
    assert measured["prob_threshold"] == pytest.approx(np.percentile(rows.p, 15), rel=1e-4)
    assert measured["tau"] == pytest.approx(rows.groupby("example").nll.mean().median(), rel=1e-6)
    expected = weights(rows, measured)
    assert (
        set(expected) == set(GATES) - {"psft", "stm"} == {row["gate"] for row in summary["gates"]}
    )
    assert len(summary["gates"]) == 3 * len(expected)
    for row in summary["gates"]:
        here = rows.source == row["source"] if row["source"] else rows.tokens > 0
        removed = 1 - expected[row["gate"]]
        for name in QUANTITIES:
            share = (removed * rows[name])[here].sum() / rows[name][here].sum()
            assert row[name] == pytest.approx(share, rel=1e-4, abs=1e-6)
        if row["source"] is None and row["gate"] != "sft":
            by_token = (
                (removed * rows.nll).groupby(rows.token_id).sum().sort_values(ascending=False)
            )
            for muted in row["muted"]:
                assert muted["nll"] == pytest.approx(by_token[muted["token_id"]], rel=1e-4)
                assert (
                    muted["count"] == ((removed > 0.5) & (rows.token_id == muted["token_id"])).sum()
                )
            assert [m["nll"] for m in row["muted"]] == pytest.approx(
                by_token[by_token > 0][:12].tolist(), rel=1e-4
            )


def test_of_many_sources_the_largest_have_rows(inspection, monkeypatch):
    monkeypatch.setattr(removed, "MOST_SOURCES", 1)
    rows = frame(inspection)
    largest = rows[rows.origin == DATA].source.value_counts().index[0]
    assert {row["source"] for row in asdict(find(inspection, None))["gates"]} == {None, largest}


def test_tokens_of_each_group(inspection, summary):
    rows = frame(inspection)
    rows = rows[rows.origin == DATA]
    groups = {
        "high_entropy": rows.entropy >= 2,
        "low_entropy": rows.entropy <= 0.5,
        "conflict": rows.conflict,
    }
    for name, mask in groups.items():
        group = rows[mask]
        assert sum(row["count"] for row in summary["tokens"][name]) == len(group)
        for row in summary["tokens"][name]:
            here = group[group.token_id == row["token_id"]]
            assert row["count"] == len(here)
            frequency = (rows.token_id == row["token_id"]).mean()
            assert row["lift"] == pytest.approx(len(here) / len(group) / frequency)
            wanted = here.first_choice[here.first_choice != row["token_id"]].value_counts()
            assert [w["count"] for w in row["wanted"]] == wanted[:5].tolist()
            assert all(wanted[w["token_id"]] == w["count"] for w in row["wanted"])


def test_without_a_label_there_is_advice_but_no_number(tmp_path):
    folder = make_inspection(tmp_path, examples=4, rollouts=0, compared=())
    inspection = Inspection(folder)
    for file in inspection.files():
        table = pa.parquet.read_table(file)
        for name in (field.name for field in STATISTICS):
            index = table.schema.get_field_index(name)
            table = table.set_column(
                index, name, pa.nulls(len(table), table.schema.field(name).type)
            )
        pa.parquet.write_table(table, file)
    summary = asdict(find(inspection, None))
    assert summary["advice"]["kind"] == "none"
    assert summary["gates"] == []
    json.dumps(summary, allow_nan=False)
