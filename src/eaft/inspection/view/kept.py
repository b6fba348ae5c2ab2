"""
A function's last answers, kept; whoever asks what is being computed waits for it instead of
computing it too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Any


class Kept:
    """
    A function that remembers its last answers; may be called from several threads.

    Args:
        function: of hashable arguments; its answers are not to be changed.
        most: answers that are kept.
    """

    def __init__(self, function: Callable[..., Any], most: int) -> None:
        self.function, self.most = function, most
        self.answers: OrderedDict[tuple[Hashable, ...], Future[Any]] = OrderedDict()
        self.lock = Lock()

    def __call__(self, *asked: Hashable) -> Any:
        """Return the function's answer; an exception is raised, and not kept."""
        with self.lock:
            ours = asked not in self.answers
            answer = self.answers.setdefault(asked, Future())
            self.answers.move_to_end(asked)
            while len(self.answers) > self.most:
                self.answers.popitem(last=False)
        if ours:
            try:
                answer.set_result(self.function(*asked))
            except BaseException as error:
                answer.set_exception(error)
                with self.lock:
                    self.answers.pop(asked, None)
        return answer.result()
