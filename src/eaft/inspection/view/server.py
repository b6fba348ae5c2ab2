"""
The viewer's server: routes, and who may use them.

Only a browser on this machine that knows the token is answered: the address is the loopback's, the
Host header must name it (a page of another site that resolves to 127.0.0.1 does not), the token is
in a cookie that no other site can send, and nothing can be changed: GET and HEAD only.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from eaft.inspection.view.queries import MOST_ROWS, Queries
from eaft.inspection.view.runs import Runs
from eaft.inspection.view.selection import (
    LARGEST,
    NAMES,
    RequestError,
    Selection,
    one_of,
    read_selection,
    whole,
)

AT_ONCE = 4  # requests that are computed at the same time
PAGE = Path(__file__).parent / "page"
# Scripts and connections from here alone; charts set styles on their elements and make pictures of
# themselves
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


def make_app(name: str, queries: Queries | None, runs: Runs, port: int, token: str) -> Starlette:
    """
    Return the application.

    Args:
        name: of the folder, for the page's title.
        queries: of the inspection, if the folder has one.
        runs: of `eaft compare` and `eaft eval`, that it holds.
        port: that it is served at, on the loopback address.
        token: that a request must have.
    """

    turn = asyncio.Semaphore(AT_ONCE)

    def asked(
        allowed: tuple[str, ...], answer: Callable[[Any, Request], Any]
    ) -> Callable[[Request], Any]:
        """
        Return an endpoint: it checks the names of what it is asked, and answers with JSON, in a
        thread.
        """

        def found(request: Request) -> Response:
            result = answer(queries, request)
            return result if isinstance(result, Response) else JSONResponse(result)

        async def endpoint(request: Request) -> Response:
            check_names(request.query_params, allowed)
            async with turn:
                # A slider that moves asks faster than it is answered: what the page has given up is
                # not computed
                if await request.is_disconnected():
                    return Response(status_code=204)
                return await run_in_threadpool(found, request)

        return endpoint

    def of_tokens(
        allowed: tuple[str, ...], answer: Callable[[Any, Request], Any]
    ) -> Callable[[Request], Any]:
        """Return an endpoint that needs an inspection."""

        def needs(queries: Queries | None, request: Request) -> Any:
            if queries is None:
                raise HTTPException(404, "This folder is not one of `eaft inspect`.")
            return answer(queries, request)

        return asked(allowed, needs)

    paging = (*NAMES, "offset", "limit")
    gating = ("gate", "params")
    index = PAGE / "index.html"
    routes = [
        Route("/", lambda request: FileResponse(index)),
        Route("/api/folder", asked((), lambda q, r: about(name, q, runs))),
        Route("/api/landscape", of_tokens(NAMES, lambda q, r: q.landscape(selection(q, r)))),
        Route("/api/gates", of_tokens((*NAMES, *gating), gates)),
        Route("/api/examples", of_tokens((*paging, "sort", "order"), examples)),
        Route("/api/example", of_tokens(("example", "model", *gating), example)),
        Route(
            "/api/tokens",
            of_tokens(
                (*paging, "group"), lambda q, r: q.token_table(selection(q, r), group(r), *page(r))
            ),
        ),
        Route(
            "/api/concordance",
            of_tokens(
                (*paging, "group"), lambda q, r: q.concordance(selection(q, r), group(r), *page(r))
            ),
        ),
        Route("/api/export/examples.jsonl", of_tokens(NAMES, export_examples)),
        Route("/api/export/tokens.csv", of_tokens(NAMES, export_tokens)),
        Route("/api/runs", asked((), lambda q, r: runs.list())),
        Route(
            "/api/run",
            asked(
                ("name",), lambda q, r: runs.run(one_of("name", parameter(r, "name"), runs.names))
            ),
        ),
        Mount("/page", StaticFiles(directory=PAGE, check_dir=False)),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, port=port, token=token)],
        exception_handlers={RequestError: refuse, HTTPException: refuse, Exception: fail},
    )


# Who may ask


class Guard:
    """
    Answers 403 to whoever is not the browser that was told the token, and gives every answer its
    headers.
    """

    def __init__(self, app: ASGIApp, port: int, token: str) -> None:
        self.app, self.token, self.cookie = app, token.encode(), cookie_name(port)
        self.hosts = {f"{host}:{port}" for host in ("127.0.0.1", "localhost", "[::1]")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and answer it or pass it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # a web socket: there is none

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
        """Return the answer to who may not ask; None for who may."""
        hosts = Headers(scope=scope).getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return error(
                403, "Open the address that `eaft view` printed; over ssh, forward the same port."
            )
        if scope["method"] not in ("GET", "HEAD"):
            return error(405, "Nothing can be changed here: GET and HEAD only.")
        if "\0" in scope["path"]:  # of which no file has a name, and to look for one fails
            return error(404, "Not Found")
        if not self.knows_token(HTTPConnection(scope)):
            return error(
                403, "The token is missing or wrong: open the address that `eaft view` printed."
            )
        return None

    def knows_token(self, request: HTTPConnection) -> bool:
        """
        Return whether a request has the token: in its address, its cookie, or its Authorization
        header.
        """
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        given = [
            request.query_params.get("token") if request.scope["path"] == "/" else None,
            request.cookies.get(self.cookie),
            value.strip() if scheme.lower() == "token" else None,
        ]
        # In a time that does not tell how much is right
        return any(
            hmac.compare_digest(text.encode("utf-8", "replace"), self.token)
            for text in given
            if text
        )


def cookie_name(port: int) -> str:
    """
    Return the cookie's name: browsers keep cookies by host, whatever the port, and two viewers may
    run.
    """
    return f"eaft-view-{port}"


# What is asked


def check_names(given: QueryParams, allowed: tuple[str, ...]) -> None:
    """Check that only known parameters are given, each once; `source` may be repeated."""
    for name in given:
        if name not in allowed:
            raise RequestError(f"{name[:50]!r} is not asked for here.{nearest(name[:50], allowed)}")
        if name != "source" and len(given.getlist(name)) > 1:
            raise RequestError(f"{name!r} is given twice.")


def parameter(request: Request, name: str, default: str | None = None) -> str:
    """Return a parameter that must be given, unless it has a default."""
    value = request.query_params.get(name, default)
    if value is None:
        raise RequestError(f"{name} is missing.")
    return str(value)


def selection(queries: Queries, request: Request) -> Selection:
    """Return the selection that a request is about."""
    return read_selection(request.query_params, queries.tables)


def page(request: Request) -> tuple[int, int]:
    """Return offset and limit."""
    given = request.query_params
    return whole("offset", given.get("offset", "0"), 0, LARGEST), whole(
        "limit", given.get("limit", "50"), 1, MOST_ROWS
    )


def group(request: Request) -> str | None:
    """Return the group of tokens, or None for all."""
    return request.query_params.get("group") or None


def gate_of(request: Request) -> tuple[str | None, dict[str, Any]]:
    """Return the gate's name and the parameters that are given for it."""
    text = request.query_params.get("params") or "{}"
    try:
        params = json.loads(text)
    except (ValueError, RecursionError):
        params = None
    if not isinstance(params, dict):
        raise RequestError(f"params={text[:50]!r}: expected a JSON map of names to values.")
    return request.query_params.get("gate") or None, params


# The answers


def about(name: str, queries: Queries | None, runs: Runs) -> dict[str, Any]:
    """Return what a page is built from."""
    kind = "both" if queries and runs.names else "inspection" if queries else "runs"
    return {"name": name, "kind": kind, **(queries.about() if queries else {})}


def gates(queries: Queries, request: Request) -> Any:
    """Answer what a gate does to a selection."""
    gate, params = gate_of(request)
    return queries.gate(selection(queries, request), gate or parameter(request, "gate"), params)


def examples(queries: Queries, request: Request) -> Any:
    """Answer a page of examples."""
    order = one_of("order", parameter(request, "order", "asc"), ("asc", "desc"))
    return queries.examples(
        selection(queries, request),
        parameter(request, "sort", "example"),
        order == "desc",
        *page(request),
    )


def example(queries: Queries, request: Request) -> Any:
    """Answer one example."""
    model = one_of("model", parameter(request, "model", BASE), queries.tables.names)
    return queries.example(
        whole("example", parameter(request, "example"), 0, LARGEST), model, *gate_of(request)
    )


def export_examples(queries: Queries, request: Request) -> Response:
    """Answer with a file of examples."""
    found = queries.export_examples(selection(queries, request))
    return download(found, "examples.jsonl", "application/x-ndjson")


def export_tokens(queries: Queries, request: Request) -> Response:
    """Answer with a file of tokens."""
    return download(
        queries.export_tokens(selection(queries, request)), "tokens.csv", "text/csv; charset=utf-8"
    )


def download(lines: Any, name: str, kind: str) -> Response:
    """Return a file as it is made."""
    return StreamingResponse(
        lines, media_type=kind, headers={"Content-Disposition": f'attachment; filename="{name}"'}
    )


def error(status: int, message: str) -> Response:
    """Return an error."""
    return JSONResponse({"error": message}, status, HEADERS)


async def refuse(request: Request, found: Exception) -> Response:
    """Answer what cannot be answered."""
    if isinstance(found, HTTPException):
        return error(found.status_code, found.detail)
    return error(400, str(found))


async def fail(request: Request, found: Exception) -> Response:
    """Answer when something of ours is wrong: the terminal has the traceback."""
    return error(500, f"{type(found).__name__}: see the terminal that `eaft view` runs in.")
