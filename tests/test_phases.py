"""The phases on stderr: a line each where it is no terminal, a bar where it is one."""

import io

import pytest

from eaft import phases
from eaft.phases import Phases


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(monkeypatch, stderr, seconds=(), shown=True):
    """Two phases, the second of ten units of work, one at each of these times."""
    clock = iter([0.0, *seconds, 100.0])
    monkeypatch.setattr(phases.sys, "stderr", stderr)
    monkeypatch.setattr(phases.time, "monotonic", lambda: next(clock))
    two = Phases(shown)
    two.begin("the data\r")
    two.count = 2
    with two.counted("scoring", 10, "tokens") as advance:
        for _ in seconds:
            advance(1)
    return stderr.getvalue()


@pytest.mark.parametrize(
    ("seconds", "time"),
    [((90.0, 92.0, 96.0, 99.0), "about 00:21 left"), ((1.0, 2.0), "done in 01:40")],
)
def test_a_log_has_one_line_a_phase_with_the_time_left(seconds, time, monkeypatch):
    lines = show(monkeypatch, io.StringIO(), seconds)
    assert "\r" not in lines
    assert lines.splitlines()[1:] == [f"Phase 2 of 2: scoring: 10 tokens, {time}"]
    assert lines.startswith("Phase 1: the data")


def test_a_terminal_has_a_bar_and_other_processes_have_nothing(monkeypatch):
    lines = show(monkeypatch, Terminal(), [])
    assert "Phase 2 of 2: scoring:   0%" in lines
    less = show(monkeypatch, Terminal(), [90.0, 92.0])  # of ten that there could have been
    assert "Phase 2 of 2: scoring: 100%" in less
    assert show(monkeypatch, io.StringIO(), [], shown=False) == ""
