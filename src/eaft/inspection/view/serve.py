"""
`eaft view`: a page on this machine to look around in what `inspect`, `compare` or `eval` wrote.
"""

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
TRIED = 100  # ports, from that one on


def view(
    folder: Path, port: int | None = None, token: str | None = None, browser: bool = True
) -> None:
    """
    Serve a folder until interrupted.

    Raises:
        ConfigurationError: nothing can be looked at in the folder, or the port is taken.
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
            "--token: letters, digits, - and _ only, since it is part of an address."
        )
    if not folder.is_dir():
        raise ConfigurationError(f"{str(folder)!r} is no folder.")
    runs, inspected = Runs(folder), find_inspection(folder)
    if inspected is None and not runs.names:
        raise ConfigurationError(
            f"{str(folder)!r} holds nothing that `eaft inspect`, `compare` or `eval` wrote."
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
    Return the inspection that a folder is, or holds; None if there is none.

    Raises:
        ConfigurationError: it holds several.
    """
    home = folder.resolve()
    if (home / "tokens").is_dir():  # even if it is not finished, which is then said
        return home

    def look(pattern: str) -> list[Path]:
        """Return the folders in it; links that lead out of it are not followed."""
        found = [file.resolve().parent for file in folder.glob(f"{pattern}examples.parquet")]
        return sorted(
            place for place in found if place.is_relative_to(home) and (place / "tokens").is_dir()
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
    Find out what is not installed.

    Raises:
        ConfigurationError: a package is missing.
    """
    for package in ("duckdb", "starlette", "uvicorn"):
        if find_spec(package) is None:
            raise ConfigurationError(f"Viewing needs {package}: pip install 'eaft[inspect]'.")


def listen(port: int | None) -> socket.socket:
    """
    Return a socket that listens on the loopback address: at a port, or the first that is free from
    `PORT` on.

    Raises:
        ConfigurationError: there is none, or that one is taken.
    """
    for candidate in range(PORT, PORT + TRIED) if port is None else [port]:
        # Named TCP, so that asyncio turns Nagle's algorithm off: it would hold small answers back
        # for 40 ms
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
    """Show how far the reading is, on one line of the terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
