"""How far a long measurement is."""

from __future__ import annotations

import os
import time

from tqdm.auto import tqdm

from eaft.text import visible


class Progress:
    """
    One line, `task 2 of 5, gsm8k: 120 of 1319 items, 853 tokens/s, 12:20 left`, on the first
    process.

    The time left is for this task, because the time of other tasks is unknown. Nothing is written
    where stderr is no terminal.

    Args:
        tasks: how many there will be.
    """

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks
        self.number = 0
        self.bar: tqdm | None = None

    def start(self, name: str, items: int) -> None:
        """Begin the next task, with its number of items."""
        self.close()
        self.number += 1
        self.began, self.tokens = time.monotonic(), 0
        self.bar = tqdm(
            total=items,
            desc=visible(f"task {self.number} of {self.tasks}, {name}", lines=False),
            bar_format="{desc}: {n:.0f} of {total} items{postfix}, {remaining} left",
            disable=True if os.environ.get("RANK", "0") != "0" else None,
            leave=False,
            miniters=0,  # shown by the clock: an item may take minutes
        )

    def advance(self, items: float = 0, tokens: int = 0) -> None:
        """
        Count items that are done (a choice of four is a quarter of one), and tokens read or
        written.
        """
        if self.bar is not None:
            self.tokens += tokens
            speed = self.tokens / max(time.monotonic() - self.began, 1e-9)
            self.bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
            self.bar.update(items)

    def close(self) -> None:
        """Take the line away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
