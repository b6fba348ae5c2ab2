"""The phases of a long command on stderr: which one, how far, and how long it will take."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import datasets
import transformers
from tqdm.auto import tqdm

from eaft.text import visible

SETTLED = 5.0  # seconds after which a phase's speed says how long it will take


class Phases:
    """
    Shows the phases of a command one after another.

    On a terminal a phase is a bar with the remaining time. Elsewhere it is one line, which is
    written when the remaining time is known. There the bars of other packages are switched off.

    Args:
        shown: whether anything is written; false on all processes but the first.

    Attributes:
        count: how many phases there will be; None if that is not known yet.
    """

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        self.count: int | None = None
        self.number = 0
        self.terminal = sys.stderr.isatty()
        if not self.terminal:
            datasets.disable_progress_bars()
            transformers.utils.logging.disable_progress_bar()

    def begin(self, name: str) -> None:
        """Begin a phase whose length is not known."""
        title = self.title(name)
        if self.shown:
            self.write(title)

    @contextlib.contextmanager
    def counted(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """
        Begin a phase that lasts as long as the context; yield what to call with work that is done.

        Args:
            name: of the phase.
            total: work in all.
            unit: of the work.
        """
        title = self.title(name)
        if not self.shown:
            yield lambda done: None
        elif self.terminal:
            with tqdm(total=total, desc=title, unit=f" {unit}", unit_scale=True) as bar:
                yield bar.update
                bar.total = bar.n  # less was needed than there could have been
        else:
            line = Line(title, total, unit, self.write)
            yield line.advance
            line.end()

    def title(self, name: str) -> str:
        """Return the next phase's number and name."""
        self.number += 1
        number = f"{self.number}" if self.count is None else f"{self.number} of {self.count}"
        return visible(f"Phase {number}: {name}", lines=False)

    def write(self, text: str) -> None:
        """Write a line."""
        print(text, file=sys.stderr, flush=True)


class Line:
    """The one line of a phase, written when the remaining time is known or the phase is over."""

    def __init__(self, title: str, total: int, unit: str, write: Callable[[str], None]) -> None:
        self.title, self.total, self.unit, self.write = title, total, unit, write
        self.began, self.done, self.written = time.monotonic(), 0, False
        self.first: tuple[float, int] | None = None  # when the first part was done, and its work

    def advance(self, done: int) -> None:
        """
        Count work that is done.

        The speed is that after the first part, which has the loading of the model in it.
        """
        self.done += done
        now = time.monotonic()
        if self.first is None:
            self.first = now, self.done
        since, before = self.first
        if not self.written and self.done > before and now - since >= SETTLED:
            left = (now - since) * (self.total - self.done) / (self.done - before)
            self.say(f"about {tqdm.format_interval(left)} left")

    def end(self) -> None:
        """Write the line if it is not written yet."""
        if not self.written:
            self.say(f"done in {tqdm.format_interval(time.monotonic() - self.began)}")

    def say(self, time_: str) -> None:
        """Write the line with a time."""
        self.written = True
        self.write(f"{self.title}: {self.total:,} {self.unit}, {time_}")
