"""Which labelled tokens a question is about, as a request's address says it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from starlette.datastructures import QueryParams

from eaft.errors import EAFTError, nearest
from eaft.inspection.folder import BASE
from eaft.inspection.summary import DATA
from eaft.inspection.view.tables import Tables

Range = tuple[float | None, float | None]

NAMES = (
    "origin",
    "model",
    "source",
    "row",
    "nll",
    "conflict",
    "search",
    "box",
    "token",
)  # of a selection's parameters
LARGEST = 2**31 - 1  # ids and offsets are int32
MOST_CHARACTERS = 1000  # of a search


class RequestError(EAFTError):
    """A question that cannot be answered as it is put; the message says why."""


@dataclass(frozen=True)
class Selection:
    """Labelled tokens: of which examples, under which model, and where in the plane."""

    origin: str = DATA
    model: str = BASE
    sources: tuple[str, ...] = ()  # none: all
    row: int | None = None  # of the data set
    nll: Range = (None, None)  # of the example under the model: mean nll, nats; both ends are in
    conflict: Range = (
        None,
        None,
    )  # of the example under the model: share of its tokens that are conflicts
    search: str = ""  # in the example's text, whatever the case
    box: tuple[float, float, float, float] | None = (
        None  # entropy from, to (nats), probability from, to
    )
    token: int | None = None  # the label's id

    @property
    def filters_examples(self) -> bool:
        """Whether it is of certain examples, beside their origin and source."""
        return bool(self.search) or any(
            end is not None for end in (self.row, *self.nll, *self.conflict)
        )

    @property
    def whole(self) -> Selection:
        """The same examples, whatever their tokens."""
        return replace(self, box=None, token=None)


def read_selection(given: QueryParams, tables: Tables) -> Selection:
    """
    Return the selection that a request is about; raises `RequestError` for what is not in the data.
    """
    search = given.get("search", "")
    if len(search) > MOST_CHARACTERS or "\0" in search:
        raise RequestError(f"search: at most {MOST_CHARACTERS} characters of text.")
    return Selection(
        origin=one_of("origin", given.get("origin", DATA), tables.origins),
        model=one_of("model", given.get("model", BASE), tables.names),
        sources=tuple(
            sorted({one_of("source", source, tables.sources) for source in given.getlist("source")})
        ),
        row=whole("row", given["row"], 0, LARGEST) if "row" in given else None,
        nll=ends("nll", given.get("nll", ",")),
        conflict=ends("conflict", given.get("conflict", ",")),
        search=search,
        box=box(given["box"]) if "box" in given else None,
        token=whole("token", given["token"], 0, LARGEST) if "token" in given else None,
    )


def number(name: str, text: str) -> float:
    """Return a finite number; raises `RequestError`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"{name}={text[:50]!r}: expected a number.")
    return value


def whole(name: str, text: str, least: int, most: int) -> int:
    """Return a whole number within bounds; raises `RequestError`."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise RequestError(f"{name}={text[:50]!r}: expected a whole number from {least} to {most}.")
    return value


def one_of(name: str, text: str, known: Iterable[str]) -> str:
    """Return a name that is known; raises `RequestError`."""
    if text not in known:
        raise RequestError(f"{name}={text[:50]!r} is unknown.{nearest(text[:50], known)}")
    return text


def ends(name: str, text: str) -> Range:
    """
    Return the two ends of a range, `low,high`, either of which may be left out; raises
    `RequestError`.
    """
    parts = text.split(",")
    if len(parts) != 2:
        raise RequestError(
            f"{name}={text[:50]!r}: expected two numbers with a comma, either of which may be left"
            " out."
        )
    low, high = (number(name, part) if part else None for part in parts)
    return low, high


def box(text: str) -> tuple[float, float, float, float]:
    """Return a box's four sides; raises `RequestError`."""
    parts = text.split(",")
    if len(parts) != 4:
        raise RequestError(
            f"box={text[:50]!r}: expected four numbers: entropy from, to, probability from, to."
        )
    h0, h1, p0, p1 = (number("box", part) for part in parts)
    return h0, h1, p0, p1
