"""
The server of `eaft view`: routes, and which requests it answers.

It answers only a browser on this machine that knows the token. The server listens on the loopback
address. The Host header must name that address, so a page of another site that resolves to
127.0.0.1 is refused. The token is in a cookie that no other site can send. Requests change nothing:
GET and HEAD only.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eaft.errors import nearest
from eaft.inspection.folder import BASE
from eaft.inspection.view.items import LISTS, Entry, ItemPage, Items
from eaft.inspection.view.queries import Queries
from eaft.inspection.view.queries.about import About
from eaft.inspection.view.queries.concordance import Concordance
from eaft.inspection.view.queries.examples import ExamplePage, WholeExample
from eaft.inspection.view.queries.gates import GateEffect
from eaft.inspection.view.queries.plane import Landscape
from eaft.inspection.view.queries.tokens import TokenPage
from eaft.inspection.view.runs import Runs
from eaft.inspection.view.selection import (
    LARGEST,
    NAMES,
    RequestError,
    Selection,
    one_of,
    read_selection,
    search_text,
    whole,
)
from eaft.inspection.view.sliders import Parameters

AT_ONCE = 4  # requests that are computed at the same time
MOST_ROWS = 200  # in one answer
PAGE = Path(__file__).parent / "page"
# Scripts and connections come from this server only. Charts set styles on their elements and save
# themselves as pictures
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
    " blob:; connect-src 'self'; font-src 'self'; base-uri 'none'; frame-ancestors 'none';"
    " form-action 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
PAGING = ("offset", "limit")
GATE = ("gate", "params")

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Folder:
    """What the server shows."""

    name: str  # the page's title
    queries: Queries | None  # of the inspection, if the folder has one
    runs: Runs  # of `eaft compare` and `eaft eval`


def make_app(name: str, queries: Queries | None, runs: Runs, port: int, token: str) -> Starlette:
    """
    Return the application.

    Args:
        name: of the folder, for the page's title.
        queries: of the inspection, if the folder has one.
        runs: of `eaft compare` and `eaft eval`, which the folder holds.
        port: of the loopback address at which the application is served.
        token: that a request must have.
    """
    turn = asyncio.Semaphore(AT_ONCE)

    def route(path: str, parameters: tuple[str, ...], answer: Callable[[Request], object]) -> Route:
        """Return a route that takes these parameters and answers in a thread."""
        return Route(f"/api/{path}", in_thread(turn, parameters, answer))

    def inspected(
        path: str, parameters: tuple[str, ...], answer: Callable[[Queries, Request], object]
    ) -> Route:
        """Return a route that needs an inspection."""

        def answer_if_inspected(request: Request) -> object:
            if queries is None:
                raise HTTPException(404, "This folder is not one of `eaft inspect`.")
            return answer(queries, request)

        return route(path, parameters, answer_if_inspected)

    folder, index = Folder(name, queries, runs), PAGE / "index.html"
    routes = [
        Route("/", lambda request: FileResponse(index)),
        route("folder", (), lambda request: about(folder)),
        inspected("landscape", NAMES, landscape),
        inspected("gates", (*NAMES, *GATE), gates),
        inspected("examples", (*NAMES, *PAGING, "sort", "order"), examples),
        inspected("example", ("example", "model", *GATE), example),
        inspected("tokens", (*NAMES, *PAGING, "group"), tokens),
        inspected("concordance", (*NAMES, *PAGING, "group"), concordance),
        inspected("export/examples.jsonl", NAMES, export_examples),
        inspected("export/tokens.csv", NAMES, export_tokens),
        route("runs", (), lambda request: runs.entries()),
        route("run", ("name",), lambda request: runs.run(run_name(runs, request))),
        route("items", ("name", "of", "list", "task", "search", *PAGING), lambda r: items(runs, r)),
        route("item", ("name", "of", "item"), lambda request: item(runs, request)),
        Mount("/page", StaticFiles(directory=PAGE, check_dir=False)),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, port=port, token=token)],
        exception_handlers={RequestError: refuse, HTTPException: refuse, Exception: fail},
    )


def in_thread(
    turn: asyncio.Semaphore, parameters: tuple[str, ...], answer: Callable[[Request], object]
) -> Endpoint:
    """
    Return an endpoint that checks the names of a request's parameters and answers in a thread.

    Args:
        turn: limits the requests that are computed at the same time.
        parameters: the names that a request may have.
        answer: computes a `Response`, or what is sent as JSON.
    """

    def respond(request: Request) -> Response:
        result = answer(request)
        return result if isinstance(result, Response) else json_response(result)

    async def endpoint(request: Request) -> Response:
        check_names(request.query_params, parameters)
        async with turn:
            # A slider asks faster than the server answers. A request that the page has given up is
            # not computed
            if await request.is_disconnected():
                return Response(status_code=204)
            return await run_in_threadpool(respond, request)

    return endpoint


def json_response(content: object) -> Response:
    """Return dataclasses, lists and maps as JSON; NaN and infinity become null."""
    return Response(to_json(content, inf_nan_mode="null"), media_type="application/json")


# Which requests are answered


class Guard:
    """Refuses requests without the token or for another host, and sets every answer's headers."""

    def __init__(self, app: ASGIApp, port: int, token: str) -> None:
        self.app, self.token, self.cookie = app, token.encode(), cookie_name(port)
        self.hosts = {f"{host}:{port}" for host in ("127.0.0.1", "localhost", "[::1]")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and answer it or pass it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # a web socket, which no route has

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refused = self.refused(scope)
        if refused is not None:
            await refused(scope, receive, with_headers)
            return

        async def with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] == "/":
                cookie = f"{self.cookie}={self.token.decode()}; HttpOnly; SameSite=Strict; Path=/"
                MutableHeaders(scope=message).append("Set-Cookie", cookie)
            await with_headers(message)

        await self.app(scope, receive, with_cookie)

    def refused(self, scope: Scope) -> Response | None:
        """Return the error that a request gets; None if it may be answered."""
        hosts = Headers(scope=scope).getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return error(
                403, "Open the address that `eaft view` printed; over ssh, forward the same port."
            )
        if scope["method"] not in ("GET", "HEAD"):
            return error(405, "Nothing can be changed here: GET and HEAD only.")
        if "\0" in scope["path"]:  # no file has such a name, and looking for one raises
            return error(404, "Not Found")
        if not self.knows_token(HTTPConnection(scope)):
            return error(
                403, "The token is missing or wrong: open the address that `eaft view` printed."
            )
        return None

    def knows_token(self, request: HTTPConnection) -> bool:
        """
        Return whether a request has the token in its address, its cookie or its Authorization
        header.
        """
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        candidates = [
            request.query_params.get("token") if request.scope["path"] == "/" else None,
            request.cookies.get(self.cookie),
            value.strip() if scheme.lower() == "token" else None,
        ]
        # The comparison's time does not tell how much of the token is right
        return any(
            hmac.compare_digest(candidate.encode("utf-8", "replace"), self.token)
            for candidate in candidates
            if candidate
        )


def cookie_name(port: int) -> str:
    """
    Return the cookie's name for a port.

    Browsers keep cookies by host whatever the port, and two viewers may run at the same time.
    """
    return f"eaft-view-{port}"


# A request's parameters


def check_names(params: QueryParams, allowed: tuple[str, ...]) -> None:
    """Check that every parameter is known and occurs once; only `source` may be repeated."""
    for name in params:
        if name not in allowed:
            raise RequestError(
                f"{name[:50]!r} is not a parameter here.{nearest(name[:50], allowed)}"
            )
        if name != "source" and len(params.getlist(name)) > 1:
            raise RequestError(f"{name!r} is given twice.")


def parameter(request: Request, name: str, default: str | None = None) -> str:
    """Return a parameter; without a default it is required."""
    value = request.query_params.get(name, default)
    if value is None:
        raise RequestError(f"{name} is missing.")
    return str(value)


def selection(queries: Queries, request: Request) -> Selection:
    """Return the selection that a request is about."""
    return read_selection(request.query_params, queries.tables)


def paging(request: Request) -> tuple[int, int]:
    """Return offset and limit."""
    offset = whole("offset", parameter(request, "offset", "0"), 0, LARGEST)
    return offset, whole("limit", parameter(request, "limit", "50"), 1, MOST_ROWS)


def group(request: Request) -> str | None:
    """Return the group of tokens; None for all tokens."""
    return request.query_params.get("group") or None


def gate_params(request: Request) -> Parameters:
    """Return the gate's parameters that the request sets."""
    text = request.query_params.get("params") or "{}"
    try:
        params = json.loads(text)
    except (ValueError, RecursionError):
        params = None
    if not isinstance(params, dict):
        raise RequestError(f"params={text[:50]!r}: expected a JSON map of names to values.")
    return params


def run_name(runs: Runs, request: Request) -> str:
    """Return the name of a comparison or an evaluation that the folder holds."""
    return one_of("name", parameter(request, "name"), runs.names)


# The answers


@dataclass(frozen=True)
class Page:
    """What the page of a folder without an inspection is built from."""

    name: str
    kind: Literal["inspection", "runs", "both"]


@dataclass(frozen=True)
class InspectionPage(About, Page):
    """What the page of an inspection is built from."""


def about(folder: Folder) -> Page:
    """Return what the page is built from."""
    if folder.queries is None:
        return Page(folder.name, "runs")
    kind: Literal["inspection", "both"] = "both" if folder.runs.names else "inspection"
    return InspectionPage(folder.name, kind, **vars(folder.queries.about.about()))


def landscape(queries: Queries, request: Request) -> Landscape:
    """Return the plane of a selection."""
    return queries.plane.landscape(selection(queries, request))


def gates(queries: Queries, request: Request) -> GateEffect:
    """Return what a gate does to a selection."""
    params = gate_params(request)
    gate = request.query_params.get("gate")
    if not gate:
        raise RequestError("gate is missing.")
    return queries.gates.effect(selection(queries, request), gate, params)


def examples(queries: Queries, request: Request) -> ExamplePage:
    """Return a page of examples."""
    order = one_of("order", parameter(request, "order", "asc"), ("asc", "desc"))
    sort = parameter(request, "sort", "example")
    return queries.examples.page(
        selection(queries, request), sort, order == "desc", *paging(request)
    )


def example(queries: Queries, request: Request) -> WholeExample:
    """Return one example with all its tokens."""
    model = one_of("model", parameter(request, "model", BASE), queries.tables.names)
    number = whole("example", parameter(request, "example"), 0, LARGEST)
    gate = request.query_params.get("gate") or None
    return queries.examples.whole(number, model, gate, gate_params(request))


def tokens(queries: Queries, request: Request) -> TokenPage:
    """Return a page of the table of tokens."""
    return queries.tokens.page(selection(queries, request), group(request), *paging(request))


def concordance(queries: Queries, request: Request) -> Concordance:
    """Return a page of the places of tokens."""
    return queries.concordance.page(selection(queries, request), group(request), *paging(request))


def all_items(runs: Runs, request: Request) -> Items:
    """Return the items that a request is about."""
    pairing = whole("of", parameter(request, "of", "0"), 0, LARGEST)
    try:
        return runs.items(run_name(runs, request), pairing)
    except IndexError:
        raise RequestError(f"of={pairing}: there are fewer.") from None


def items(runs: Runs, request: Request) -> ItemPage:
    """Return a page of a list of items."""
    name = request.query_params.get("list")
    which = one_of("list", name, LISTS) if name else None
    found, task = all_items(runs, request), request.query_params.get("task", "")
    text = search_text(request.query_params.get("search", ""))
    return found.page(which, task, text, *paging(request))


def item(runs: Runs, request: Request) -> Entry:
    """Return one item with both answers."""
    entries = all_items(runs, request).entries
    number = whole("item", parameter(request, "item"), 0, LARGEST)
    if number >= len(entries):
        raise RequestError(f"item={number}: there are {len(entries)}.")
    return entries[number]


def export_examples(queries: Queries, request: Request) -> Response:
    """Return the examples of a selection as a file."""
    lines = queries.exports.examples(selection(queries, request))
    return download(lines, "examples.jsonl", "application/x-ndjson")


def export_tokens(queries: Queries, request: Request) -> Response:
    """Return the tokens of a selection as a file."""
    lines = queries.exports.tokens(selection(queries, request))
    return download(lines, "tokens.csv", "text/csv; charset=utf-8")


def download(lines: Iterator[str], name: str, media_type: str) -> Response:
    """Return a file that is sent while it is made."""
    return StreamingResponse(
        lines,
        media_type=media_type,
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


def error(status: int, message: str) -> Response:
    """Return an error."""
    return JSONResponse({"error": message}, status, HEADERS)


async def refuse(request: Request, exception: Exception) -> Response:
    """Answer a request that cannot be answered as it is."""
    if isinstance(exception, HTTPException):
        return error(exception.status_code, exception.detail)
    return error(400, str(exception))


async def fail(request: Request, exception: Exception) -> Response:
    """Answer when the server has a fault; the terminal has the traceback."""
    return error(500, f"{type(exception).__name__}: see the terminal that `eaft view` runs in.")
