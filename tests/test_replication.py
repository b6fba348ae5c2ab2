"""The replication's comparison at matched target, by hand."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "replication"))
from tables import matched


def measured(epoch, nll, drift, right):
    """Two prompts that drift by d and 3 d, and a target task of 10 items."""
    items = {"target": [1] * right + [0] * (10 - right)}
    return {"epoch": epoch, "nll": nll, "drift_per_prompt": [drift, 3 * drift], "items": items}


def run(objective, lr, *points):
    points = [measured(i + 1, *point) for i, point in enumerate(points)]
    return {"objective": objective, "learning_rate": lr, "seed": 0, "points": points}


BASE = measured(0, 2.0, 0.0, 0)


def test_both_are_read_where_both_have_learned_as_much():
    runs = [
        run("sft", 0.1, (1.0, 0.1, 4), (0.8, 0.3, 8), (1.5, 0.9, 9)),
        run("sft", 0.2, (0.9, 0.5, 6), (1.2, 0.8, 6), (1.9, 2.0, 6)),
        run("eaft", 0.1, (1.5, 0.1, 2), (0.9, 0.2, 6), (1.0, 0.4, 7)),
        run("eaft", 0.2, (1.9, 0.1, 0), (1.8, 0.2, 1), (1.7, 0.4, 2)),
        run("sft", 0.3, (0.7, 0.01, 9)),  # EAFT was not run at this learning rate
    ]
    # Held-out nll: EAFT's best is 0.9, at drift 0.2; SFT passes it half-way from 0.1 to 0.3 at the lower learning rate
    (row, difference) = matched(runs, BASE, "nll")["eaft", 0]
    assert row[:5] == ["eaft", 0, "held-out nll", "0.900", "0.4000"]
    assert difference == pytest.approx(np.array([0.2 - 0.2, 0.6 - 0.6]))
    # Target: EAFT's best is 70%, at drift 0.4; SFT passes it three quarters of the way from 0.1 to 0.3
    (row, difference) = matched(runs, BASE, "target")["eaft", 0]
    assert row[2:4] == ["target score", "70.0%"]
    assert difference == pytest.approx(np.array([0.4 - 0.25, 3 * (0.4 - 0.25)]))


def test_the_better_one_is_read_where_the_other_ends():
    runs = [run("sft", 0.1, (1.0, 0.4, 0), (1.2, 0.5, 0)), run("eaft", 0.1, (1.5, 0.1, 0), (0.5, 0.3, 0))]
    (row, difference) = matched(runs, BASE, "nll")["eaft", 0]
    assert row[3] == "1.000"
    assert difference == pytest.approx(np.array([0.2 - 0.4, 3 * (0.2 - 0.4)]))


def test_an_objective_that_learns_nothing_is_read_at_the_base():
    runs = [run("sft", 0.1, (1.0, 0.4, 5)), run("dft", 0.1, (2.5, 0.7, 0))]
    for by in ("nll", "target"):
        assert matched(runs, BASE, by)["dft", 0][1] == pytest.approx(np.zeros(2))
    del runs[1]["points"][0]["items"]["target"]
    assert matched(runs, BASE, "target") == {}  # not taken at every epoch
