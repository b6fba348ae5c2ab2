"""What the viewer says of comparisons and evaluations, and the items that it lists."""

import json
from dataclasses import asdict
from pathlib import Path

from starlette.testclient import TestClient

from eaft.inspection.view.runs import Runs
from eaft.inspection.view.server import make_app

TOKEN = "s3cret_-"
COMPARED = Path(__file__).parents[2] / "benchmarks" / "results" / "demo" / "function_calls"
EVALUATION = {
    "asked": {},
    "tasks": {"t": {"before": 0.5, "after": 0.25, "n": 4}},
    "model": "out",
    "base": "small",
    "verdict": {"sentence": "A loss is shown."},
    "drift": {"mean": 0.1, "per_prompt": [0.1], "tokens_per_prompt": [3]},
    "worst": [{"task": "t", "prompt": "<script>", "before": {"score": 1}, "after": {"score": 0}}],
}


def item(doc, score):
    hashes = {name: str(doc) for name in ("prompt_hash", "target_hash", "doc_hash")}
    return {
        "task": "t",
        "doc_id": doc,
        "metric": "exact_match,none",
        "cut": [],
        **hashes,
        "prompt": f"p{doc}",
        "target": "x",
        "response": "r",
        "score": score,
    }


def test_runs_are_what_their_files_say(tmp_path):
    results = json.loads((COMPARED / "results.json").read_text())
    compared, evaluated = tmp_path / "runs" / "demo", tmp_path / "eval" / "out"
    evaluated.mkdir(parents=True)
    (evaluated / "results.json").write_text(json.dumps(EVALUATION))
    results["groups"] = {"target": ["t"], "general": ["everyday"]}
    run = next(r for r in results["runs"] if r["objective"] == "eaft")
    step = next(c for c in results["choices"] if c["objective"] == "eaft")["steps"]["chosen"]
    for side, scores in (
        ("base/items", [1, 1, 0, 0.5]),
        (f"{run['folder']}/items/step-{step}", [1, 0, 1, 0.25]),
    ):
        (compared / side).mkdir(parents=True)
        (compared / side / "t.jsonl").write_text(
            "".join(json.dumps(item(i, s)) + "\n" for i, s in enumerate(scores))
        )
    log = [
        {"step": 1, "nll": 2.0, "mean_gate": 0.5},
        {"step": 2, "nll": 1.5},
        {"step": 2, "train_loss": 1.0},
    ]
    (compared / run["folder"] / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in log) + '{"st'
    )
    for point in [
        results["base"]["point"],
        *(point for one in results["runs"] for point in one["points"]),
    ]:
        point["tasks"] = {"t": {"mean": 0.5, "scores": [0.5]}}
    (compared / "results.json").write_text(json.dumps(results))
    (tmp_path / "eval" / "results.json").write_text(
        '{"asked": 1, "objectives": {}}'
    )  # somebody's own
    runs = Runs(tmp_path)
    assert {
        (r["name"], r["kind"], r["base"]) for r in (asdict(entry) for entry in runs.entries())
    } == {
        ("eval/out", "eval", "small"),
        ("runs/demo", "compare", results["recipe"]["train"]["model_name_or_path"]),
    }
    found = asdict(runs.run("eval/out"))
    assert found["warnings"] == [
        "Fewer than 20 items, so that the interval is not to be relied on: t.",
        "Fewer than 32 prompts: the interval is not to be relied on.",
    ]
    (lost,) = runs.items("eval/out", 0).listed("regressions")  # there are no files of items
    assert (lost.prompt, lost.before.score, lost.after.score) == ("<script>", 1, 0)
    assert found["results"]["drift"] == {"mean": 0.1}
    found = asdict(runs.run("runs/demo"))
    assert found["sentence"] == results["sentence"]
    assert len(found["points"]) == sum(1 + len(one["points"]) for one in results["runs"])
    of_run = [point for point in found["points"] if point["run"] == run["folder"]]
    assert [
        (p["step"], p["nll"], p["drift_general"], p["target"], p["general"]) for p in of_run
    ] == [
        (p["step"], p["nll"]["mean"], p["drift"]["general"]["mean"], 0.5, None)
        for p in [results["base"]["point"], *run["points"]]
    ]
    metrics = {curve["run"]: curve["metrics"] for curve in found["curves"]}
    assert metrics[run["folder"]] == {
        "nll": [[1, 2.0], [2, 1.5]],
        "mean_gate": [[1, 0.5]],
        "train_loss": [[2, 1.0]],
    }
    lost = {
        pairing["objective"]: [e.doc_id for e in runs.items("runs/demo", i).listed("regressions")]
        for i, pairing in enumerate(found["pairings"])
    }
    assert lost == {"sft": [], "eaft": [1, 3]}  # from 1 to 0 before from 0.5 to 0.25
    assert "scores" not in json.dumps(found)
    assert Runs(compared).names == ["demo"]


SCORES = ([1, 1, 0, 0.5], [0, 1, 1, 0.25])


def written(folder, name, lines):
    """Write lines, or what stands for one, as a file of items."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / f"{name}.jsonl").write_text("\n".join(texts) + "\n")


def without(record, *names):
    return {name: value for name, value in record.items() if name not in names}


def test_every_item_can_be_listed_searched_and_opened(tmp_path):
    out = tmp_path / "out"
    before, after = ([item(i, s) for i, s in enumerate(scores)] for scores in SCORES)
    after[1]["response"] = "A Fish"
    # Items of an older version lack fields that are not shown; hashes may be missing on both sides
    for side in (before, after):
        side[0] = without(side[0], "metric", "cut")
        side[2] = without(side[2], "prompt_hash", "target_hash", "doc_hash", "doc_id")
    before.append(item(4, 1))
    after.append({**item(4, 1), "prompt_hash": "another"})
    written(out / "items_before", "t", before)
    written(out / "items_after", "t", [*after, '{"half', {"prompt": "no score"}])
    (out / "answers.json").write_text(
        json.dumps([{"prompt": "p", "answer": "a", "drift": d, "tokens": 3} for d in (0.1, 0.4)])
    )
    row = {"row": 7, "prompt": "mine?", "target": "yes", "before": "no", "after": "yes"}
    held_out = {"rows": 40, "answers": [row]}
    (out / "results.json").write_text(json.dumps({**EVALUATION, "held_out": held_out}))
    app = make_app("made", None, Runs(out), 80, TOKEN)
    headers = {"Authorization": f"token {TOKEN}", "Host": "127.0.0.1:80"}
    with TestClient(app, headers=headers) as asks:
        page = asks.get("/api/items?name=out").json()
        assert page["which"] == "regressions"
        counts = {"regressions": 2, "gains": 1, "all": 4, "answers": 1, "drift": 2}
        assert page["counts"] == counts
        assert [(row["number"], row["before"], row["after"]) for row in page["rows"]] == [
            (0, 1, 0),
            (3, 0.5, 0.25),
        ]
        assert page["notes"] == [
            "items_after/t.jsonl: 2 of 7 lines are no items, and are not shown.",
            "t: 2 answers are not shown, since the other model was not asked the same.",
        ]
        page = asks.get("/api/items?name=out&list=all&search=a+fish&task=t").json()
        assert [row["number"] for row in page["rows"]] == [1]
        assert asks.get("/api/items?name=out&list=all&task=other").json()["total"] == 0
        opened = asks.get("/api/item?name=out&item=1").json()
        assert (opened["prompt"], opened["before"]["response"]) == ("p1", "r")
        assert opened["after"] == {
            **dict.fromkeys(("choices", "scores")),
            **{"response": "A Fish", "score": 1, "cut": []},
        }
        (row,) = asks.get("/api/items?name=out&list=answers").json()["rows"]
        assert (row["doc_id"], row["snippet"], row["before"]) == (7, "mine?", None)
        drift = asks.get("/api/items?name=out&list=drift").json()["rows"]
        assert [row["drift"] for row in drift] == [0.4, 0.1]
        for wrong in ("items?name=out&list=lost", "item?name=out&item=9", "items?name=out&of=1"):
            assert asks.get(f"/api/{wrong}").status_code == 400
        # A file that changes is read again
        written(out / "items_after", "t", [{**after[0], "score": 1}])
        assert asks.get("/api/items?name=out&list=regressions").json()["total"] == 0
    # One model alone
    (out / "results.json").write_text(json.dumps({**EVALUATION, "base": None}))
    written(out / "items", "t", before)
    entries = Runs(out).items("out", 0).listed("all")
    assert [(entry.before, entry.after.score) for entry in entries] == [
        (None, line["score"]) for line in before
    ]


def test_one_broken_result_does_not_empty_the_list(tmp_path):
    good = {"asked": {}, "model": "tuned", "base": None, "tasks": {}}
    contents = {
        "good": json.dumps(good),
        "cut": '{"model": ',
        "list": "[]",
        "other": json.dumps({**good, "verdict": 5}),
    }
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "inputs.json").write_text("{}")
        (tmp_path / name / "results.json").write_text(content)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "results.json").write_text("[]")
    runs = Runs(tmp_path)
    assert {run["name"]: run["kind"] for run in (asdict(entry) for entry in runs.entries())} == {
        **{"good": "eval", "cut": "broken", "list": "broken", "other": "broken"}
    }
    assert "results.json cannot be read (it is truncated" in runs.run("cut").sentence
