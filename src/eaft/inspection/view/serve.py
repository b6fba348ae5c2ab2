"""Serves the page of `eaft view` to this machine."""

from __future__ import annotations

import contextlib
import secrets
import socket
import sys
import webbrowser
from importlib.util import find_spec
from pathlib import Path

from eaft.errors import ConfigurationError

PORT = 8765
TRIED = 100  # ports from `PORT` on


def view(
    folder: Path, port: int | None = None, token: str | None = None, browser: bool = True
) -> None:
    """
    Serve a folder until Ctrl-C.

    Args:
        folder: that `eaft inspect`, `compare`, `eval` or `tune` wrote, or that has such folders
            below it.
        port: None for the first free one from `PORT` on.
        token: that the address must have; None for a new one.
        browser: whether to open the browser.

    Raises:
        ConfigurationError: the folder has nothing to show, or the port is taken.
    """
    import torch
    import uvicorn

    from eaft.inspection.folder import Inspection
    from eaft.inspection.view.queries import Queries
    from eaft.inspection.view.runs import Runs
    from eaft.inspection.view.server import make_app
    from eaft.inspection.view.tables import Tables

    torch.set_num_threads(1)  # requests are threads already, and DuckDB has all cores
    token = token or secrets.token_urlsafe()
    if not (token.isascii() and token.replace("-", "").replace("_", "").isalnum()):
        raise ConfigurationError(
            "--token: use only letters, digits, - and _, since it is part of an address."
        )
    if not folder.is_dir():
        raise ConfigurationError(f"{str(folder)!r} is not a folder.")
    runs, inspected = Runs(folder), find_inspection(folder)
    if inspected is None and not runs.names:
        raise ConfigurationError(
            f"{str(folder)!r} holds nothing that `eaft inspect`, `compare`, `eval` or `tune` wrote:"
            " give the folder that one of them wrote."
        )
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(listen(port))
        queries = None
        if inspected is not None:
            tables = stack.enter_context(
                contextlib.closing(Tables(Inspection(inspected), progress))
            )
            queries = Queries(tables)
        port = listening.getsockname()[1]
        app = make_app(folder.resolve().name, queries, runs, port, token)
        # The log would show the token
        config = uvicorn.Config(
            app,
            access_log=False,
            log_level="warning",
            server_header=False,
            ws="none",
            proxy_headers=False,
        )
        address = f"http://127.0.0.1:{port}/?token={token}"
        print(f"\nOpen {address}\n(Ctrl-C ends it.)", flush=True)
        if browser:
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def find_inspection(folder: Path) -> Path | None:
    """
    Return the inspection in a folder or up to two levels below it; None if there is none.

    Raises:
        ConfigurationError: there are several.
    """
    home = folder.resolve()
    if (home / "tokens").is_dir():  # `Inspection` says if it is not finished
        return home

    def look(pattern: str) -> list[Path]:
        """Return the inspections at a pattern, without links that lead out of the folder."""
        places = [file.resolve().parent for file in folder.glob(f"{pattern}examples.parquet")]
        return sorted(
            place for place in places if place.is_relative_to(home) and (place / "tokens").is_dir()
        )

    inspections = look("*/") + look("*/*/")
    if len(inspections) > 1:
        names = ", ".join(place.relative_to(home).as_posix() for place in inspections)
        raise ConfigurationError(
            f"{str(folder)!r} holds several inspections ({names}): give one of them."
        )
    return inspections[0] if inspections else None


def check_packages() -> None:
    """
    Check that the packages of the viewer are installed.

    Raises:
        ConfigurationError: a package is missing.
    """
    for package in ("duckdb", "starlette", "uvicorn"):
        if find_spec(package) is None:
            raise ConfigurationError(f"Viewing needs {package}: pip install 'eaft[inspect]'.")


def listen(port: int | None) -> socket.socket:
    """
    Return a socket that listens on the loopback address.

    Args:
        port: None for the first free one from `PORT` on.

    Raises:
        ConfigurationError: the port is taken, or none is free.
    """
    for candidate in range(PORT, PORT + TRIED) if port is None else [port]:
        # With IPPROTO_TCP, asyncio turns Nagle's algorithm off, which delays small answers by 40 ms
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", candidate))
            listening.listen()
            return listening
        except (OSError, OverflowError) as error:
            listening.close()
            problem = error
    raise ConfigurationError(f"--port {candidate} cannot be used ({problem}): choose another.")


def progress(line: str) -> None:
    """Show a line in the place of the last one, if this is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
