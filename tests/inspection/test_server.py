"""The viewer's server under attack; over a real socket."""

import http.client
import json
import threading
from urllib.parse import quote

import pytest
import uvicorn

from eaft.inspection.folder import Inspection
from eaft.inspection.view import server as server_module
from eaft.inspection.view.queries import Queries
from eaft.inspection.view.queries.plane import PlaneQueries
from eaft.inspection.view.runs import Runs
from eaft.inspection.view.serve import listen
from eaft.inspection.view.server import make_app
from eaft.inspection.view.tables import Tables
from tests.inspection.made import make_inspection

TOKEN = "s3cret_-"
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
