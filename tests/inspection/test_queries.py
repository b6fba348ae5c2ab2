"""Every answer of the viewer, asked over HTTP, beside pandas on the folder's files."""

import csv
import io
import json
import math
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

from eaft.inspection.folder import Inspection
from eaft.inspection.run_file import InspectedRun
from eaft.inspection.view.queries import Queries, database, exports, gates
from eaft.inspection.view.queries.about import train_command
from eaft.inspection.view.selection import Selection
from eaft.inspection.view.tables import Tables
from tests.inspection.made import TOP_K, VOCAB, grad_norm, make_client, make_inspection

MEASURED = {"entropy_threshold": 0.2, "prob_threshold": 0.3, "tau": 2.5}
MEANS = ["nll", "entropy", "conflict_share", "conflict_nll_share"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_inspection(
        tmp_path_factory.mktemp("view") / "made",
        examples=60,
        rollouts=30,
        shards=3,
        summary={"measured": MEASURED},
    )


@pytest.fixture(scope="module")
def ask(folder):
    client = make_client(folder)

    def get(path, **params):
        answer = client.get(f"/api/{path}", params=params)
        assert answer.status_code == 200, answer.text
        return answer.text if path.startswith("export") else answer.json()

    return get


@pytest.fixture(scope="module")
def everything(folder):
    """
    Labelled tokens with their examples, by model, and the examples, each with its means under the
    model.
    """
    examples = pd.read_parquet(folder / "examples.parquet")
    places = pd.concat(
        map(pd.read_parquet, sorted((folder / "tokens").glob("*.parquet"))), ignore_index=True
    )
    places["start"] = places.groupby("example")["end"].shift(fill_value=0)
    compared = pd.concat(
        map(pd.read_parquet, sorted((folder / "compared/tuned").glob("*.parquet"))),
        ignore_index=True,
    )
    found = {}
    for model, table in {"base": places, "tuned": places.assign(**compared)}.items():
        tokens = table[table["labelled"]].astype(
            {"log_prob": float, "entropy": float, "sum_sq_probs": float}
        )
        tokens = tokens.astype({"rank": int, "first_choice": int, "top_k_entropy": float})
        tokens["nll"], tokens["prob"] = -tokens["log_prob"], np.exp(tokens["log_prob"])
        tokens["gradient"] = grad_norm(tokens["sum_sq_probs"], tokens["log_prob"])
        tokens["conflict"] = (tokens["entropy"] < 0.5) & (tokens["prob"] < 0.1)
        grouped = tokens.assign(lost=tokens["nll"] * tokens["conflict"]).groupby("example")
        means = grouped.agg(
            nll=("nll", "mean"), entropy=("entropy", "mean"), conflict_share=("conflict", "mean")
        )
        means["conflict_nll_share"] = grouped["lost"].sum() / grouped["nll"].sum()
        of_model = examples.drop(columns=MEANS).join(means, on="example")
        named = of_model.rename(columns={name: f"example_{name}" for name in MEANS}).drop(
            columns=["tokens", "labelled"]
        )
        found[model] = tokens.merge(named, on="example"), of_model
    return found


SELECTIONS = {
    "all": {},
    "rollouts": {"origin": "rollouts"},
    "tuned": {"model": "tuned"},
    "one source": {"source": "source-1"},
    "two sources": {"source": ["source-1", "source-0"]},
    "hard examples": {"nll": "2.5,"},
    "easy examples of tuned": {"model": "tuned", "nll": ",2.2", "conflict": "0.02,0.5"},
    "search": {"search": "pARIS 42"},
    "search for markup": {"search": "<SCRIPT>"},
    "search in Hebrew": {"search": "שלום w1"},
    "search for a wildcard": {"search": "%"},
    "a box": {"box": "0.1,1.3,0.02,0.6"},
    "the corner": {"box": "0,0.5,0,0.1"},
    "to the ends": {"box": "0.5,99,0.25,1"},
    "no token": {"box": "3,1,0,1"},
    "one token": {"token": 3},
    "one row": {"row": 7},
    "one row of the rollouts": {"row": 7, "origin": "rollouts"},
    "together": {
        **{
            "model": "tuned",
            "origin": "rollouts",
            "source": "source-0",
            "nll": "0.1,9",
            "conflict": ",0.9",
        },
        **{"search": "W1", "box": "0,2,0,0.9", "token": 3},
    },
}


def numbers(text):
    return [
        float(part) if part else default
        for part, default in zip(text.split(","), (-math.inf, math.inf), strict=True)
    ]


def expected(everything, asked, box=True):
    """
    The tokens and examples of a selection; examples of a box or a token are those that have one.
    """
    tokens, examples = everything[asked.get("model", "base")]
    chosen = examples["origin"] == asked.get("origin", "data")
    if "source" in asked:
        chosen &= examples["source"].isin(np.atleast_1d(asked["source"]))
    for name, column in (("nll", "nll"), ("conflict", "conflict_share")):
        if name in asked:
            chosen &= examples[column].between(*numbers(asked[name]))
    if "row" in asked:
        chosen &= examples["row"] == asked["row"]
    if "search" in asked:
        chosen &= examples["text"].map(lambda text: asked["search"].lower() in text.lower())
    examples = examples[chosen]
    tokens = tokens[tokens["example"].isin(examples["example"])]
    if "token" in asked:
        tokens = tokens[tokens["token_id"] == asked["token"]]
    if "box" in asked and box:
        h0, h1, p0, p1 = (float(part) for part in asked["box"].split(","))
        inside = (tokens["entropy"] >= h0) & (tokens["entropy"] < h1)
        inside &= (tokens["prob"] >= p0) & ((tokens["prob"] < p1) | (p1 == 1))
        tokens = tokens[inside]
    if "token" in asked or ("box" in asked and box):
        examples = examples[examples["example"].isin(tokens["example"])]
    return tokens, examples


def same(found, wanted):
    """Whether two mappings have the same values, floats within 1e-5; None where pandas has NaN."""
    wanted = {name: None if pd.isna(value) else value for name, value in wanted.items()}
    floats = {name: value for name, value in wanted.items() if isinstance(value, float)}
    return found.keys() == wanted.keys() and all(
        found[name] == (pytest.approx(value, rel=1e-5, abs=1e-9) if name in floats else value)
        for name, value in wanted.items()
    )


def sums(tokens):
    found = {
        "tokens": len(tokens),
        "nll": tokens["nll"].sum(),
        "gradient": tokens["gradient"].sum(),
    }
    return pytest.approx(found, rel=1e-5, abs=2e-3)


@pytest.mark.parametrize("name", SELECTIONS)
def test_landscape(ask, everything, name):
    asked = SELECTIONS[name]
    found = ask("landscape", **asked)
    of_grid, _ = expected(everything, asked, box=False)
    tokens, _ = expected(everything, asked)
    edges = [np.array(found["entropy_edges"]), np.array(found["prob_edges"])]
    assert edges[0][-1] >= max(table["entropy"].max() for table, _ in everything.values())
    for measure, weights in (
        ("tokens", None),
        ("nll", of_grid["nll"]),
        ("gradient", of_grid["gradient"]),
    ):
        grid, *_ = np.histogram2d(of_grid["entropy"], of_grid["prob"], bins=edges, weights=weights)
        np.testing.assert_allclose(
            found[measure], grid, rtol=1e-5, atol=2e-3
        )  # float32 loses near p = 1
    assert found["total"] == sums(of_grid)
    assert found["corner"] == sums(of_grid[of_grid["conflict"]])
    assert found["selected"].pop("examples") == tokens["example"].nunique()
    assert found["selected"] == sums(tokens)


def test_a_box_of_whole_bins_has_what_its_bins_have(ask):
    grid = np.array(ask("landscape")["tokens"])
    edges = [ask("landscape")[f"{axis}_edges"] for axis in ("entropy", "prob")]
    for h0, h1, p0, p1 in (
        (0, 20, 0, 25),
        (3, 41, 17, 60),
        (20, len(edges[0]) - 1, 25, len(edges[1]) - 1),
    ):
        box = ",".join(map(str, (edges[0][h0], edges[0][h1], edges[1][p0], edges[1][p1])))
        assert ask("landscape", box=box)["selected"]["tokens"] == grid[h0:h1, p0:p1].sum()


def test_a_box_ends_before_its_upper_side(ask, everything):
    tokens, _ = expected(everything, {})
    for entropy in tokens["entropy"].sample(3, random_state=0):
        below = ask("landscape", box=f"0,{entropy!r},0,1")["selected"]["tokens"]
        above = ask("landscape", box=f"{entropy!r},99,0,1")["selected"]["tokens"]
        assert below == (tokens["entropy"] < entropy).sum()
        assert above == (tokens["entropy"] >= entropy).sum()


G = {"eaft": lambda t, alpha=1: (t["top_k_entropy"] / math.log(TOP_K)).clip(0, 1) ** alpha}
WEIGHTS = {
    ("sft", "{}"): lambda t: t["tokens"],
    ("eaft", '{"alpha": 2.5}'): lambda t: G["eaft"](t, 2.5),
    ("eaft", '{"entropy": "exact"}'): lambda t: (t["entropy"] / math.log(TOP_K)).clip(0, 1),
    ("masked", "{}"): lambda t: 1.0 * (G["eaft"](t) > MEASURED["entropy_threshold"]),
    ("conflict-mask", '{"prob_threshold": 0.5}'): lambda t: (
        1 - 1.0 * ((G["eaft"](t) <= 0.2) & (t["prob"] <= 0.5))
    ),
    ("deft", "{}"): lambda t: t["prob"] ** t["sum_sq_probs"],
    ("talr", "{}"): lambda t: (t["prob"] ** (1 / MEASURED["tau"])).clip(lower=0.01),
    ("flow", '{"tau": 1.5}'): lambda t: np.exp(-t["base_nll"] / 1.5),
}


def with_base(everything, tokens):
    return tokens.assign(
        base_nll=everything["base"][1].set_index("example")["nll"].loc[tokens["example"]].to_numpy()
    )


@pytest.mark.parametrize(("gate", "params"), WEIGHTS)
@pytest.mark.parametrize("name", ["all", "easy examples of tuned", "a box", "no token"])
def test_gates(ask, everything, gate, params, name):
    tokens = with_base(everything, expected(everything, SELECTIONS[name])[0]).assign(tokens=1.0)
    weights = WEIGHTS[gate, params](tokens)
    found = ask("gates", gate=gate, params=params, **SELECTIONS[name])
    measures = ["tokens", "nll", "gradient"]

    def removed(weights, tokens):
        return {
            m: 1 - (weights * tokens[m]).sum() / tokens[m].sum() if len(tokens) else None
            for m in measures
        }

    assert (found["count"], found["sampled"]) == (len(tokens), None)
    assert found["removed"] == pytest.approx(removed(weights, tokens), abs=1e-5)
    assert sum(found["weights"]["counts"]) == len(tokens)
    of_source = {source.pop("source"): source for source in found["by_source"]}
    assert of_source == {
        source: pytest.approx(removed(weights[of.index], of), abs=1e-5)
        for source, of in tokens.groupby("source")
    }
    edges = [found["entropy_edges"], found["prob_edges"]]
    grid, *_ = np.histogram2d(
        tokens["entropy"], tokens["prob"], bins=edges, weights=weights * tokens["gradient"]
    )
    np.testing.assert_allclose(found["gradient"], grid, rtol=1e-4, atol=1e-3)
    lost = ((1 - weights) * tokens["nll"]).groupby(tokens["token_id"]).sum()
    lost = lost[lost > 1e-9].sort_values(ascending=False)
    assert len(found["muted"]) == min(len(lost), 50)
    for muted in found["muted"]:
        of = tokens["token_id"] == muted["token_id"]
        assert muted["count"] == (of & (weights < 0.5)).sum()
        assert muted["text"] == VOCAB[muted["token_id"]]
        assert muted["nll_removed"] == pytest.approx(lost[muted["token_id"]], rel=1e-4, abs=1e-6)
    assert [m["nll_removed"] for m in found["muted"]] == pytest.approx(
        lost[:50].tolist(), rel=1e-4, abs=1e-6
    )
    if len(tokens):
        assert found["mean_weight"] == pytest.approx(weights.mean(), rel=1e-5)
        assert np.histogram(weights, found["weights"]["edges"])[0].sum() == len(tokens)


def test_a_gate_on_more_tokens_than_time_allows_is_a_fixed_sample(folder, monkeypatch):
    monkeypatch.setattr(gates, "SAMPLE_TOKENS", 600)
    queries, again = (Queries(Tables(Inspection(folder))) for _ in range(2))
    sample = queries.gates.effect(Selection(), "eaft", {})
    assert 500 < sample.sampled < 700 < sample.count
    assert sample == again.gates.effect(Selection(), "eaft", {})
    monkeypatch.setattr(gates, "SAMPLE_TOKENS", 10**6)
    exact = Queries(queries.tables).gates.effect(Selection(), "eaft", {})
    assert exact.sampled is None
    # 600 tokens: 0.015 standard error
    assert vars(sample.removed) == pytest.approx(vars(exact.removed), abs=0.05)
    assert sum(sample.weights.counts) == pytest.approx(exact.count, rel=0.02)
    assert np.sum(sample.gradient) == pytest.approx(np.sum(exact.gradient), rel=0.1)


@pytest.mark.parametrize("name", SELECTIONS)
def test_examples(ask, everything, name):
    asked = SELECTIONS[name]
    _, examples = expected(everything, asked)
    columns = [*("example", "origin", "source", "row", "tokens", "labelled", "cut"), *MEANS]
    for sort, order in (
        ("example", "asc"),
        ("nll", "desc"),
        ("conflict_share", "asc"),
        ("tokens", "desc"),
    ):
        keys = examples.assign(by=examples[sort].round(5)).sort_values(
            ["by", "example"], ascending=[order == "asc", True], na_position="last"
        )
        pages = [
            ask("examples", sort=sort, order=order, offset=at, limit=17, **asked)
            for at in range(0, 95, 17)
        ]
        rows = [row for page in pages for row in page["rows"]]
        assert {page["total"] for page in pages} == {len(examples)}
        values = [math.nan if row[sort] is None else row[sort] for row in rows]
        assert values == pytest.approx(keys[sort].tolist(), rel=1e-5, nan_ok=True)
        assert sorted(row["example"] for row in rows) == sorted(examples["example"])
    by_example = examples.set_index("example", drop=False)
    for row in rows:
        snippet = row.pop("snippet")
        assert snippet in by_example.loc[row["example"], "text"]
        assert asked.get("search", "").lower() in snippet.lower()
        assert same(row, by_example.loc[row["example"], columns])


@pytest.mark.parametrize("model", ["base", "tuned"])
def test_an_example(ask, everything, folder, model):
    tokens, examples = everything[model]
    tokens = with_base(everything, tokens)
    whole = pd.concat(map(pd.read_parquet, sorted((folder / "tokens").glob("*.parquet"))))
    for number in (0, 3, 17, 41, 89):  # 3 has no label
        found = ask("example", example=number, model=model, gate="flow", params='{"tau": 1.5}')
        row, rows = examples.iloc[number], whole[whole["example"] == number]
        assert found["text"] == row["text"] == "".join(token["text"] for token in found["tokens"])
        assert found["messages"] == json.loads(row["messages"])
        assert (found["nll"], found["digest"]) == (
            pytest.approx(None if pd.isna(row["nll"]) else row["nll"]),
            row["digest"],
        )
        assert [(t["token_id"], t["end"], t["labelled"]) for t in found["tokens"]] == list(
            zip(rows["token_id"], rows["end"], rows["labelled"], strict=True)
        )
        assert all(t["token"] == VOCAB[t["token_id"]] for t in found["tokens"])
        scored = tokens[tokens["example"] == number].set_index("position")
        base = everything["base"][0]
        base = base[base["example"] == number].set_index("position")["log_prob"]
        for token in found["tokens"]:
            names = [
                "log_prob",
                "prob",
                "entropy",
                "nll",
                "rank",
                "first_choice",
                "first_prob",
                "conflict",
            ]
            if token["position"] not in scored.index:
                assert {
                    token[name] for name in [*names, "weight", "first_text", "base_log_prob"]
                } == {None}
                continue
            of = scored.loc[token["position"]]
            assert {name: token[name] for name in names} == pytest.approx(
                {name: of[name] for name in names}, rel=1e-5
            )
            assert token["first_text"] == VOCAB[of["first_choice"]]
            assert token["weight"] == pytest.approx(math.exp(-of["base_nll"] / 1.5), rel=1e-5)
            assert token["base_log_prob"] == (
                None if model == "base" else pytest.approx(base[token["position"]])
            )
    assert (
        "🙂" in examples["text"].str.cat()
    )  # split over three tokens, of which only the last has text


GROUPS = {
    "conflict": lambda t: t["conflict"],
    "high_entropy": lambda t: t["entropy"] >= 2,
    "low_entropy": lambda t: t["entropy"] <= 0.5,
}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", ["all", "together", "two sources"])
def test_tokens_and_their_places(ask, everything, group, name):
    tokens, _ = expected(everything, SELECTIONS[name])
    of_group = tokens[GROUPS[group](tokens)]
    counts = of_group["token_id"].value_counts()
    pages = [
        ask("tokens", group=group, offset=at, limit=20, **SELECTIONS[name]) for at in (0, 20, 40)
    ]
    rows = [row for page in pages for row in page["rows"]]
    assert {page["total"] for page in pages} == {len(counts)} == {len(rows)}
    assert [row["count"] for row in rows] == sorted(counts, reverse=True)
    for row in rows:
        of_token = of_group[of_group["token_id"] == row["token_id"]]
        share = len(of_token) / len(of_group)
        assert row["count"] == len(of_token)
        assert row["share"] == pytest.approx(share)
        assert row["lift"] == pytest.approx(share / (tokens["token_id"] == row["token_id"]).mean())
        assert row["nll"] == pytest.approx(of_token["nll"].mean(), rel=1e-5)
        wanted = of_token["first_choice"].value_counts()
        assert [w["count"] for w in row["wanted"]] == sorted(wanted, reverse=True)[:5]
        assert all(wanted[w["token_id"]] == w["count"] for w in row["wanted"])
    for row in rows[:3]:
        where = {**SELECTIONS[name], "token": row["token_id"], "group": group}
        found = ask("concordance", limit=200, **where)
        places = of_group[of_group["token_id"] == row["token_id"]].sort_values(
            ["example", "position"]
        )
        assert found["total"] == len(found["rows"]) == len(places)
        for place, (_, of) in zip(found["rows"], places.iterrows(), strict=True):
            assert (place["example"], place["position"]) == (of["example"], of["position"])
            assert (place["prob"], place["nll"]) == pytest.approx((of["prob"], of["nll"]), rel=1e-5)
            start, end, text = of["start"], of["end"], of["text"]
            assert place["left"] == text[:start][-80:]
            assert place["right"] == text[end:][:80]
            assert place["text"] == (text[start:end] or VOCAB[of["token_id"]])
        assert ask("concordance", offset=1, limit=1, **where)["rows"] == found["rows"][1:2]


@pytest.mark.parametrize("name", SELECTIONS)
def test_exports(ask, everything, folder, name, monkeypatch):
    monkeypatch.setattr(exports, "EXAMPLES_AT_ONCE", 7)
    monkeypatch.setattr(database, "ROWS_AT_ONCE", 3)
    tokens, examples = expected(everything, SELECTIONS[name])
    lines = [
        json.loads(line)
        for line in ask("export/examples.jsonl", **SELECTIONS[name]).split("\n")[:-1]
    ]
    assert [line["example"] for line in lines] == examples["example"].tolist()
    for line, (_, row) in zip(lines, examples.iterrows(), strict=True):
        assert line.pop("messages") == json.loads(row["messages"])
        assert same(line, row.drop("messages"))
    rows = list(csv.DictReader(io.StringIO(ask("export/tokens.csv", **SELECTIONS[name]))))
    ordered = tokens.sort_values(["example", "position"])
    assert [(int(r["example"]), int(r["position"])) for r in rows] == list(
        zip(ordered["example"], ordered["position"], strict=True)
    )
    for row, (_, of) in zip(rows, ordered.iterrows(), strict=True):
        assert float(row["log_prob"]) == pytest.approx(of["log_prob"], rel=1e-6)
        assert float(row["grad_norm"]) == pytest.approx(of["gradient"], abs=1e-3)
        assert json.loads(row["text"]) == VOCAB[of["token_id"]]
        assert json.loads(row["first_text"]) == VOCAB[of["first_choice"]]
        assert not any(
            cell[:1] in "=+@\t\r" for cell in row.values()
        )  # no formula; a minus begins a number


def test_what_a_page_is_built_from(ask, everything):
    found = ask("folder")
    assert (found["name"], found["kind"], found["top_k"]) == ("made", "inspection", TOP_K)
    assert found["origins"] == ["data", "rollouts"]
    assert found["sources"] == ["source-0", "source-1"]
    assert [(m["name"], m["step"]) for m in found["models"]] == [("base", None), ("tuned", 10)]
    assert found["entropy_max"] == max(tokens["entropy"].max() for tokens, _ in everything.values())
    gates = {gate["name"]: gate for gate in found["gates"]}
    starts = {
        name: {p["name"]: p["default"] for p in gate["params"]} for name, gate in gates.items()
    }
    assert starts["masked"] == {
        "entropy_threshold": MEASURED["entropy_threshold"],
        "entropy": "top-k",
    }
    assert starts["eaft-sigmoid"] == {"steepness": 30.0, "center": 0.17, "entropy": "top-k"}
    assert starts["flow"] == {"tau": MEASURED["tau"]}
    assert [name for name, gate in gates.items() if gate["measured"]] == [
        "masked",
        "conflict-mask",
        "talr",
        "flow",
    ]
    assert (
        found["train"]
        == "eaft train --model_name_or_path made/base --dataset_name made.jsonl --exclude_examples"
        " examples.jsonl"
    )
    for name, gate in gates.items():  # each is answered as it starts
        assert ask("gates", gate=name)["params"] == starts[name]
        assert all(p["choices"] or p["min"] <= p["default"] <= p["max"] for p in gate["params"])


def test_the_command_is_safe_to_paste():
    run = InspectedRun(
        scored=True,
        models=[],
        top_k=20,
        model="a b'; touch x; '",
        dataset="$(id).jsonl",
        config={"output_dir": "inspection", "max_length": 512, "assistant_only_loss": True},
    )
    flags = {
        "model_name_or_path": run.model,
        "dataset_name": run.dataset,
        "max_length": "512",
    }
    flags |= {"assistant_only_loss": "true", "exclude_examples": "examples.jsonl"}
    words = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {train_command(run)}"], capture_output=True, text=True
    ).stdout
    assert words.split("\0")[:-1] == [
        "eaft",
        "train",
        *(word for n, v in flags.items() for word in (f"--{n}", v)),
    ]


def test_several_who_ask_at_once_get_their_own_answers(folder):
    selections = [
        Selection(
            nll=(low / 10, None), box=(0.0, 1.0 + low / 10, 0.0, 0.9), search="w1" * (low % 2)
        )
        for low in range(24)
    ]
    one, many = (Queries(Tables(Inspection(folder))) for _ in range(2))
    alone = [one.plane.landscape(selection) for selection in selections]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(many.plane.landscape, selections * 3))
    for a, b in zip(alone * 3, together, strict=True):
        assert vars(a.selected) == pytest.approx(vars(b.selected))
        assert a.tokens == b.tokens
    assert len({answer.selected.tokens for answer in alone}) > 12
