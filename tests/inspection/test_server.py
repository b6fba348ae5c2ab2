"""
The viewer's server under attack, and what it says of comparisons and evaluations; over a real
socket.
"""

import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

import pytest
import uvicorn
from starlette.testclient import TestClient

from eaft.errors import ConfigurationError
from eaft.inspection.folder import Inspection
from eaft.inspection.view import server as server_module
from eaft.inspection.view.queries import Queries
from eaft.inspection.view.queries.plane import PlaneQueries
from eaft.inspection.view.runs import Runs
from eaft.inspection.view.serve import find_inspection, listen
from eaft.inspection.view.server import make_app
from eaft.inspection.view.tables import Tables
from tests.inspection.made import make_inspection

TOKEN = "s3cret_-"
ROOT = Path(__file__).parents[2]
COMPARED = ROOT / "benchmarks" / "results" / "demo" / "function_calls"
API = [
    "folder",
    "landscape",
    "gates?gate=eaft",
    "examples",
    "example?example=0",
    "tokens",
    "concordance",
    "runs",
]
API += ["export/examples.jsonl", "export/tokens.csv"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_inspection(tmp_path_factory.mktemp("view") / "made", examples=12, rollouts=6)


@pytest.fixture(scope="module")
def port(folder, tmp_path_factory):
    page = tmp_path_factory.mktemp("page")
    (page / "index.html").write_text("<!doctype html>")
    (page / "app.js").write_text("//")
    (page / "secret").symlink_to("/etc/passwd")
    listening = listen(None)
    port = listening.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_module, "PAGE", page)
        app = make_app("made", Queries(Tables(Inspection(folder))), Runs(folder), port, TOKEN)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield port
    server.should_exit = True
    thread.join()


@pytest.fixture
def send(port):
    """
    Send a request as it is, with the token unless headers are given; return status, headers and
    body.
    """

    def send(path, method="GET", headers=None, host=None):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.putrequest(method, path, skip_host=True)
        for name in [f"127.0.0.1:{port}"] if host is None else host:
            connection.putheader("Host", name)
        for name, value in (
            {"Authorization": f"token {TOKEN}"} if headers is None else headers
        ).items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()

    return send


def test_every_answer_needs_the_token(send, port):
    paths = ["/", "/page/app.js", "/page/", *(f"/api/{path}" for path in API)]
    wrong = [
        {},
        {"Authorization": "token wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "token"},
    ]
    wrong += [
        {"Cookie": f"eaft-view-{port}=wrong"},
        {"Cookie": f"eaft-view={TOKEN}"},
        {"Authorization": "token \xe9"},
    ]
    for path in paths:
        for headers in wrong:
            status, _, body = send(path, headers=headers)
            assert status == 403
            assert "token" in json.loads(body)["error"]
    # In an address it is for the page alone: elsewhere `token` is a label, and addresses are kept
    # in histories
    assert send(f"/?token={TOKEN}x", headers={})[0] == 403
    assert send(f"/api/folder?token={TOKEN}", headers={})[0] == 403
    for path in ("/", "/page/app.js", *(f"/api/{path}" for path in API)):
        assert send(path)[0] == 200


def test_the_page_sets_a_cookie_that_other_sites_cannot_send(send, port):
    headers = send(f"/?token={TOKEN}", headers={})[1]
    cookie, *flags = headers["Set-Cookie"].split("; ")
    assert cookie == f"eaft-view-{port}={TOKEN}"
    assert {"HttpOnly", "SameSite=Strict"} <= set(flags)
    assert "Domain" not in headers["Set-Cookie"]
    assert send("/api/folder", headers={"Cookie": cookie})[0] == 200
    # Who has the cookie cannot have it, or a header, set to something else
    headers = send("/?token=x%0d%0aSet-Cookie:%20a=b", headers={"Cookie": cookie})[1]
    assert headers.get_all("Set-Cookie") == [
        f"eaft-view-{port}={TOKEN}; HttpOnly; SameSite=Strict; Path=/"
    ]


def test_only_the_loopback_address_is_a_host(send, port):
    for host in (f"localhost:{port}", f"[::1]:{port}", f"LOCALHOST:{port}"):
        assert send("/api/folder", host=[host])[0] == 200
    evil = [
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1",
        "localhost",
        f"127.0.0.1:{port + 1}",
        f"127.0.0.1:{port}.x",
    ]
    evil += [f"127.0.0.1.evil.example:{port}", f"evil@127.0.0.1:{port}", f"0.0.0.0:{port}", ""]
    for host in [*([name] for name in evil), [f"127.0.0.1:{port}", "evil.example"], []]:
        status, headers, _ = send("/api/folder", host=host)
        assert status in (400, 403)  # 400: uvicorn itself refuses two, or none
        assert "Set-Cookie" not in headers


@pytest.mark.parametrize(
    "method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND"]
)
def test_nothing_but_reading(send, method):
    assert send("/api/folder", method)[0] in (400, 405)
    assert send("/", method)[0] in (400, 405)


def test_headers_of_every_answer(send):
    for path, status in (
        ("/api/folder", 200),
        ("/page/none.js", 404),
        ("/nothing", 404),
        ("/api/landscape?x=1", 400),
    ):
        found, headers, _ = send(path)
        assert found == status
        policy = dict(
            part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";")
        )
        assert (
            policy["default-src"]
            == policy["base-uri"]
            == policy["frame-ancestors"]
            == policy["form-action"]
            == "'none'"
        )
        assert policy["script-src"] == policy["connect-src"] == "'self'"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert headers.get("Access-Control-Allow-Origin") is None
    assert send("/api/folder", headers={})[1]["X-Content-Type-Options"] == "nosniff"
    assert (
        send("/api/export/tokens.csv")[1]["Content-Disposition"]
        == 'attachment; filename="tokens.csv"'
    )


@pytest.mark.parametrize("start", ["/page/", "/page//", "/", "//", "/api/", "/page/./"])
def test_no_path_leads_out_of_the_page(send, start):
    deep = "../" * 12 + "etc/passwd"
    ways = [
        "../server.py",
        "..%2fserver.py",
        "%2e%2e/server.py",
        "%2e%2e%2fserver.py",
        "..%5cserver.py",
        "..;/server.py",
    ]
    ways += [
        deep,
        quote(deep, safe=""),
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "..%00/server.py",
        "%252e%252e/server.py",
    ]
    ways += [
        "....//server.py",
        "a" * 5000,
        "%ff%fe",
        "\\..\\server.py",
        "file:///etc/passwd",
        "secret",
    ]
    for way in ways:
        status, _, body = send(start + way)
        assert status in (400, 404, 405)
        assert b"root:" not in body
        assert b"Starlette" not in body


BAD = {
    "origin": ["x", "'; DROP TABLE examples; --", "data' OR '1'='1", "rollouts\0", ""],
    "model": ["x", "../tuned", "tokens_0; DROP TABLE tokens_0", "base'", ""],
    "source": ["x", "source-0' OR 1=1 --", "source-0\0", ""],
    "row": ["x", "-1", "1.5", str(2**31), "1 OR 1=1", ""],
    "nll": ["x", "1", "1,2,3", "nan,", ",inf", "-inf,1", "1e400,", "0x1,", "1;2", "'"],
    "conflict": ["x", "nan,nan", "1,2,3", "(SELECT 1),1"],
    "search": ["a" * 1001, "a\0b"],
    "box": [
        "x",
        "1,2,3",
        "1,2,3,4,5",
        "nan,1,0,1",
        "0,inf,0,1",
        "0,1,0,1e999",
        ",,,",
        "0,1,0,1) OR (1=1",
    ],
    "token": ["x", "-1", "1.5", str(2**31), "9" * 5000, "nan", "1 OR 1=1", ""],
    "offset": ["-1", "x", str(2**31), "1e3", "nan", "9" * 5000],
    "limit": ["0", "-1", "201", "x", "1e9", "1; DROP TABLE texts"],
    "sort": [
        "x",
        "text",
        "nll; DROP TABLE examples",
        "nll DESC, (SELECT 1)",
        "NLL",
        "means.nll",
        "",
    ],
    "order": ["x", "asc; SELECT 1", "ASC", ""],
    "group": ["x", "conflict OR true", "true"],
    "gate": ["x", "os:system", "eaft.objective.gates:sft", "eaft'"],
    "params": [
        "x",
        "[1]",
        "1",
        '{"alpha": "x"}',
        '{"alpha": NaN}',
        '{"alpha": -1}',
        '{"alpha": 1e400}',
        '{"alpha": true}',
    ],
    "example": ["x", "-1", "18", str(2**31), "nan", "0 OR 1=1"],
    "name": ["x", "../made", "/etc", ".", ""],
    "nothing": ["1"],
}
BAD["params"] += [
    '{"entropy": "x"}',
    '{"alpha": null}',
    '{"alpha": [1]}',
    '{"beta": 1}',
    '{"alpha": 1' + "0" * 400 + "}",
    '{"alpha": 1' + "0" * 200 + "}",
]
BAD["params"] += ["[" * 100_000, '{"alpha": "batch"}', '{"__class__": 1}', '{"stats": 1}']
TAKES = {
    "landscape": "origin model source row nll conflict search box token",
    "gates": "origin model source row nll conflict search box token gate params",
    "examples": "origin model source row nll conflict search box token sort order offset limit",
    "example": "example model gate params",
    "tokens": "origin model source row nll conflict search box token group offset limit",
    "concordance": "origin model source row nll conflict search box token group offset limit",
    "run": "name",
    "export/examples.jsonl": "origin model source row nll conflict search box token",
    "export/tokens.csv": "origin model source row nll conflict search box token",
}
NEEDED = {"gates": {"gate": "eaft"}, "example": {"example": "0", "gate": "eaft"}}


@pytest.mark.parametrize("path", TAKES)
def test_no_parameter_breaks_anything(send, path):
    """
    Every bad value of every parameter is refused with a reason, and afterwards all is as before.
    """
    before = send("/api/landscape")[2]
    for name in [*TAKES[path].split(), "nothing"]:
        for value in BAD[name]:
            asked = {**NEEDED.get(path, {}), name: value}
            query = "&".join(f"{key}={quote(text, safe='')}" for key, text in asked.items())
            if len(query) > 60_000:  # uvicorn refuses longer addresses itself
                query = query[:60_000]
            status, _, body = send(f"/api/{path}?{query}")
            assert status == 400, (name, value[:50], status, body[:300])
            assert json.loads(body)["error"]
    assert send(f"/api/{path}?origin=data&origin=data")[0] == 400
    assert send("/api/landscape")[2] == before


def test_odd_values_that_mean_something_are_answered(send):
    text = quote(
        "'; DROP TABLE texts; -- \" % _ \\ \ud83d\ude42".encode("utf-16", "surrogatepass").decode(
            "utf-16"
        )
    )
    assert json.loads(send(f"/api/examples?search={text}")[2]) == {"total": 0, "rows": []}
    assert (
        json.loads(send("/api/landscape?box=-1e300,1e300,-1e300,1e300")[2])["selected"]["tokens"]
        > 0
    )
    assert json.loads(send("/api/landscape?box=3,-3,1,0")[2])["selected"]["tokens"] == 0
    assert json.loads(send("/api/examples?offset=2147483647")[2])["rows"] == []
    assert send("/api/folder", "HEAD")[2] == b""
    for params in ('{"alpha": 1e8}', '{"entropy": "exact", "alpha": 0}'):
        assert send(f"/api/gates?gate=eaft&params={quote(params)}")[0] == 200


def test_what_the_page_has_given_up_is_not_computed(send, port, monkeypatch):
    go, computed = threading.Event(), []

    def slow(self, selection):
        computed.append(selection.token)
        go.wait(30)
        return {}

    monkeypatch.setattr(PlaneQueries, "landscape", slow)

    def ask(token):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request(
            "GET", f"/api/landscape?token={token}", headers={"Authorization": f"token {TOKEN}"}
        )
        return connection

    running = [ask(token) for token in range(server_module.AT_ONCE)]
    while len(computed) < len(running):
        send("/page/app.js")
    for connection in [ask(token) for token in range(100, 120)]:
        send("/page/app.js")  # it has arrived, and waits for its turn
        connection.close()
    wanted = ask(200)
    for _ in range(5):
        send("/page/app.js")
    go.set()
    assert [connection.getresponse().status for connection in [*running, wanted]] == [200] * (
        len(running) + 1
    )
    assert computed[-1] == 200
    assert len(computed) == len(running) + 1


def test_links_that_lead_out_are_not_followed(folder, tmp_path):
    copy = make_inspection(tmp_path / "copy", examples=3, rollouts=0)
    file = copy / "tokens" / "00000.parquet"
    file.rename(tmp_path / "elsewhere.parquet")
    file.symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(ConfigurationError, match="is a link that leads out of its folder"):
        Tables(Inspection(copy))
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "other").symlink_to(folder)
    (tmp_path / "held" / "run").mkdir()
    (tmp_path / "held" / "run" / "results.json").symlink_to(COMPARED / "results.json")
    assert find_inspection(tmp_path / "held") is None
    assert Runs(tmp_path / "held").names == []
    # Nor from a comparison to somebody's answers and logs
    (tmp_path / "held" / "run" / "results.json").unlink()
    compared = shutil.copytree(COMPARED, tmp_path / "held" / "compared")
    for side in ("base/items", "eaft-seed0/items/step-20"):
        (tmp_path / "out" / side).mkdir(parents=True)
        line = json.dumps(item(0, float(side.startswith("base"))))
        (tmp_path / "out" / side / "everyday.jsonl").write_text(line)
    (tmp_path / "out" / "eaft-seed0" / "metrics.jsonl").write_text('{"step": 1, "nll": 2.0}')
    (compared / "base").symlink_to(tmp_path / "out" / "base")
    (compared / "eaft-seed0").mkdir()
    for name in ("items", "metrics.jsonl"):
        (compared / "eaft-seed0" / name).symlink_to(tmp_path / "out" / "eaft-seed0" / name)
    found = asdict(Runs(tmp_path / "held").run("compared"))
    assert not any(curve["metrics"] for curve in found["curves"])
    ours = next(i for i, pair in enumerate(found["pairings"]) if pair["objective"] == "eaft")
    items = Runs(tmp_path / "held").items("compared", ours)
    assert items.entries == []
    assert "eaft-seed0/items/step-20/everyday.jsonl" in items.notes[0]


MESSAGES = {
    "missing": "is missing",
    "cut": "cannot be read",
    "other rows": "its rows differ from those of",
}


@pytest.mark.parametrize("damage", MESSAGES)
def test_a_damaged_folder_is_refused(tmp_path, damage):
    copy = make_inspection(tmp_path / "copy", examples=4, rollouts=0)
    first, second = sorted((copy / "tokens").glob("*.parquet"))
    if damage == "missing":
        (copy / "vocabulary.parquet").unlink()
    elif damage == "cut":
        first.write_bytes(first.read_bytes()[:-100])
    else:
        os.replace(second, copy / "compared" / "tuned" / "00000.parquet")
        second.write_bytes(first.read_bytes())
    with pytest.raises(ConfigurationError, match=MESSAGES[damage]):
        Tables(Inspection(copy)).number("tuned")


# Runs

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


# The command


def test_the_command_serves_a_folder_of_both(tmp_path):
    folder = make_inspection(tmp_path / "all" / "inspected", examples=3, rollouts=0)
    (tmp_path / "all" / "out").mkdir()
    (tmp_path / "all" / "out" / "results.json").write_text(json.dumps(EVALUATION))
    with listen(None) as taken:  # so that the first port is not free
        command = [sys.executable, "-m", "eaft", "view", str(folder.parent), "--no_browser"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            address = next(line for line in server.stdout if "http://" in line).split()[1]
            start, _, token = address.partition("/?token=")
            assert start.rpartition(":")[2] != str(taken.getsockname()[1])
            assert len(token) >= 40
            request = urllib.request.Request(
                f"{start}/api/folder", headers={"Authorization": f"token {token}"}
            )
            about = json.loads(
                urllib.request.urlopen(request, timeout=30).read()
            )  # it listens already
            assert (about["name"], about["kind"]) == ("all", "both")
            # No other interface of this machine
            sockets = Path("/proc/net/tcp")
            if sockets.exists():
                ours = f"{int(start.rpartition(':')[2]):04X}"
                lines = [line.split() for line in sockets.read_text().splitlines()[1:]]
                bound = {
                    line[1] for line in lines if line[1].endswith(f":{ours}") and line[3] == "0A"
                }
                assert bound == {f"0100007F:{ours}"}
        finally:
            server.terminate()
            server.wait()


def test_what_cannot_be_served_is_one_message(tmp_path, capsys, monkeypatch):
    from eaft import cli
    from eaft.inspection.view import serve

    folder = make_inspection(tmp_path / "a", examples=3, rollouts=0)
    make_inspection(tmp_path / "b", examples=3, rollouts=0)
    (tmp_path / "empty").mkdir()
    unfinished = tmp_path / "c"
    (unfinished / "tokens").mkdir(parents=True)
    (unfinished / "run.json").write_text('{"scored": false}')
    with listen(None) as taken:
        port = str(taken.getsockname()[1])
        for flags, message in (
            ([tmp_path / "none"], "is not a folder"),
            (
                [tmp_path / "empty"],
                "holds nothing that `eaft inspect`, `compare`, `eval` or `tune` wrote",
            ),
            ([tmp_path], "holds several inspections (a, b): give one of them"),
            ([unfinished], "give its `eaft inspect` command again"),
            ([folder, "--port", port], f"--port {port} cannot be used"),
            ([folder, "--port", "99999"], "--port 99999 cannot be used"),
            ([folder, "--token", "a&b"], "--token: use only letters, digits"),
        ):
            assert cli.main(["view", *map(str, flags)]) == 2
            assert message in capsys.readouterr().err
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "duckdb" else name)
    assert cli.main(["view", str(folder)]) == 2
    assert "Viewing needs duckdb: pip install 'eaft[inspect]'" in capsys.readouterr().err


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
