"""One objective with one seed: its runs' points, and the points it is read at."""

from __future__ import annotations

from dataclasses import dataclass

from eaft.comparison.measurer import Measurer, Point
from eaft.comparison.recipe import Run
from eaft.evaluation.launch import shared


@dataclass
class Study:
    """
    One objective with one seed.

    Attributes:
        points: each run's, in order of steps; on processes other than the first they hold no
            numbers.
        run: the one that is chosen.
        views: the points it is read at: `chosen`, by held-out nll, where there are held-out rows;
            and the `last` one.
    """

    points: dict[Run, list[Point]]
    run: Run
    views: dict[str, Point]


def study(measurer: Measurer, points: dict[Run, list[Point]], keep_all: bool) -> Study:
    """
    Choose among an objective's runs, run the tasks on the points chosen, and delete the models of
    others.

    Args:
        keep_all: delete nothing.

    Raises:
        EAFTError: a task fails.
    """
    run, chosen = choose(points)
    views = (
        {"last": points[run][-1]} if chosen is None else {"chosen": chosen, "last": points[run][-1]}
    )
    for point in views.values():
        measurer.all_tasks(run, point)
    if not keep_all:
        for other in points:
            measurer.delete(
                other, {point.step for point in views.values()} if other is run else set()
            )
    return Study(points, run, views)


def choose(points: dict[Run, list[Point]]) -> tuple[Run, Point | None]:
    """
    Return the run and the point with the lowest held-out nll; without held-out rows the only run,
    and None.
    """
    runs = list(points)

    def best() -> tuple[int, int] | None:
        nll = {
            (i, j): p.nll.sum()
            for i, run in enumerate(runs)
            for j, p in enumerate(points[run])
            if len(p.nll)
        }
        return min(nll, key=lambda place: nll[place]) if nll else None

    place = shared(best)  # all processes run the same tasks on the same point
    return (runs[0], None) if place is None else (runs[place[0]], points[runs[place[0]]][place[1]])


def prune(measurer: Measurer, run: Run, points: list[Point]) -> None:
    """Delete the checkpoints of a run that can no longer be chosen, before the next is trained."""
    _, chosen = choose({run: points})
    measurer.delete(run, {points[-1].step} | ({chosen.step} if chosen is not None else set()))
