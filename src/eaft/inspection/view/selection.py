"""A selection of labelled tokens, as a request's address says it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from starlette.datastructures import QueryParams

from eaft.errors import EAFTError, nearest
from eaft.inspection.folder import BASE
from eaft.inspection.summary import DATA
from eaft.inspection.view.tables import Tables

Name = TypeVar("Name", bound=str)
Range = tuple[float | None, float | None]

# The parameters of a selection
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
)
LARGEST = 2**31 - 1  # ids and offsets are int32
MOST_CHARACTERS = 1000  # of a search


class RequestError(EAFTError):
    """A request that cannot be answered; the message says why."""


@dataclass(frozen=True)
class Selection:
    """Labelled tokens of some examples, under one model, in a part of the plane."""

    origin: str = DATA
    model: str = BASE
    sources: tuple[str, ...] = ()  # empty: all sources
    row: int | None = None  # of the data set
    # The example's mean nll under the model, nats; a range includes both ends
    nll: Range = (None, None)
    # The share of the example's tokens that are conflicts under the model
    conflict: Range = (None, None)
    search: str = ""  # in the example's text; capitals do not matter
    # Entropy from, to (nats), probability from, to
    box: tuple[float, float, float, float] | None = None
    token: int | None = None  # the label's id

    @property
    def filters_examples(self) -> bool:
        """Whether it selects examples by more than their origin and source."""
        return bool(self.search) or any(
            end is not None for end in (self.row, *self.nll, *self.conflict)
        )

    @property
    def whole(self) -> Selection:
        """The selection of all tokens of the same examples."""
        return replace(self, box=None, token=None)


def read_selection(params: QueryParams, tables: Tables) -> Selection:
    """
    Return the selection that a request is about.

    Raises:
        RequestError: a value has another form, or names what the data does not have.
    """
    sources = {one_of("source", source, tables.sources) for source in params.getlist("source")}
    return Selection(
        origin=one_of("origin", params.get("origin", DATA), tables.origins),
        model=one_of("model", params.get("model", BASE), tables.names),
        sources=tuple(sorted(sources)),
        row=whole("row", params["row"], 0, LARGEST) if "row" in params else None,
        nll=ends("nll", params.get("nll", ",")),
        conflict=ends("conflict", params.get("conflict", ",")),
        search=search_text(params.get("search", "")),
        box=box(params["box"]) if "box" in params else None,
        token=whole("token", params["token"], 0, LARGEST) if "token" in params else None,
    )


def search_text(text: str) -> str:
    """Return a text to search for; raises `RequestError` if it is too long or has a NUL."""
    if len(text) > MOST_CHARACTERS or "\0" in text:
        raise RequestError(f"search: at most {MOST_CHARACTERS} characters of text.")
    return text


def number(name: str, text: str) -> float:
    """Return a finite number; raises `RequestError` for other text."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"{name}={text[:50]!r}: expected a number.")
    return value


def whole(name: str, text: str, least: int, most: int) -> int:
    """Return a whole number from `least` to `most`; raises `RequestError` for other text."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise RequestError(f"{name}={text[:50]!r}: expected a whole number from {least} to {most}.")
    return value


def one_of(name: str, text: str, known: Iterable[Name]) -> Name:
    """Return a known name; raises `RequestError` for other text."""
    for candidate in known:
        if candidate == text:
            return candidate
    raise RequestError(f"{name}={text[:50]!r} is unknown.{nearest(text[:50], known)}")


def ends(name: str, text: str) -> Range:
    """
    Return the two ends of a range `low,high`; either may be left out.

    Raises:
        RequestError: the text has another form.
    """
    parts = text.split(",")
    if len(parts) != 2:
        raise RequestError(
            f"{name}={text[:50]!r}: expected two numbers with a comma between them; either may be"
            " left out."
        )
    low, high = (number(name, part) if part else None for part in parts)
    return low, high


def box(text: str) -> tuple[float, float, float, float]:
    """Return a box's four sides; raises `RequestError` for other text."""
    parts = text.split(",")
    if len(parts) != 4:
        raise RequestError(
            f"box={text[:50]!r}: expected four numbers: entropy from, to, probability from, to."
        )
    h0, h1, p0, p1 = (number("box", part) for part in parts)
    return h0, h1, p0, p1
