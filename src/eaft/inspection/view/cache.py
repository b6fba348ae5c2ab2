"""A cache of a function's last answers, for several threads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar, TypeVarTuple

Arguments = TypeVarTuple("Arguments")
Answer = TypeVar("Answer")


class Cache(Generic[*Arguments, Answer]):
    """
    A function that remembers its last answers.

    Several threads may call it at once. If a thread asks for an answer that another thread is
    computing, it waits for that answer.

    Args:
        function: takes hashable arguments. Callers must not change its answers.
        size: the most answers to remember.
    """

    def __init__(self, function: Callable[[*Arguments], Answer], size: int) -> None:
        self.function, self.size = function, size
        self.answers: OrderedDict[tuple[object, ...], Future[Answer]] = OrderedDict()
        self.lock = Lock()

    def __call__(self, *arguments: *Arguments) -> Answer:
        """Return the function's answer. An exception is raised and not remembered."""
        with self.lock:
            is_new = arguments not in self.answers
            answer = self.answers.setdefault(arguments, Future())
            self.answers.move_to_end(arguments)
            while len(self.answers) > self.size:
                self.answers.popitem(last=False)
        if is_new:
            try:
                answer.set_result(self.function(*arguments))
            except BaseException as error:
                answer.set_exception(error)
                with self.lock:
                    self.answers.pop(arguments, None)
        return answer.result()
