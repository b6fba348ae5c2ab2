"""The cache remembers the last answers, and threads that ask at once compute one answer."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from eaft.inspection.view.cache import Cache


def test_the_last_answers_are_kept():
    asked = []
    cached = Cache(lambda x, y: asked.append((x, y)) or [x, y], 2)
    first = cached(1, 2)
    assert cached(1, 2) is first
    cached(3, 4)
    cached(1, 2)
    cached(5, 6)  # forgets 3, 4, which was asked for least lately
    cached(1, 2)
    cached(3, 4)
    assert asked == [(1, 2), (3, 4), (5, 6), (3, 4)]


def test_those_who_ask_at_once_get_one_answer():
    started, go, times = threading.Event(), threading.Event(), []

    def slow(x):
        times.append(x)
        started.set()
        go.wait(30)
        return object()

    cached = Cache(slow, 4)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(cached, 1)
        started.wait(30)
        others = [pool.submit(cached, 1) for _ in range(2)]
        go.set()
        assert {id(answer.result()) for answer in [first, *others]} == {id(first.result())}
    assert times == [1]


def test_an_exception_is_raised_and_not_kept():
    answers = iter([ValueError("no"), 1])

    def sometimes():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    cached = Cache(sometimes, 4)
    with pytest.raises(ValueError, match="no"):
        cached()
    assert cached() == 1
