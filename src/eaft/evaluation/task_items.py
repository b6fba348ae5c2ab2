"""The items of several tasks on one model; a task that fails does not stop the others."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from eaft.errors import ConfigurationError, disk_full, first_line
from eaft.evaluation.folder import write_items
from eaft.evaluation.launch import processes
from eaft.evaluation.measured_model import MeasuredModel
from eaft.evaluation.progress import Progress
from eaft.evaluation.results import Item
from eaft.evaluation.suite import Benchmark

logger = logging.getLogger(__name__)


@dataclass
class TaskItems:
    """
    One model's items.

    Attributes:
        model: the model.
        items: by task; empty on processes other than the first.
        failed: the tasks that could not be run: why.
    """

    model: MeasuredModel
    items: dict[str, list[Item]]
    failed: dict[str, str]


def run_tasks(model: MeasuredModel, benchmarks: dict[str, Benchmark], folder: Path) -> TaskItems:
    """
    Return the items of all benchmarks (on the first process), and write each benchmark's when it
    ends.

    A benchmark that fails does not stop the others. Under a launcher it does, unless it fails after
    its last forward pass.
    """
    done, progress = TaskItems(model, {}, {}), Progress(len(benchmarks))
    main = processes().is_main_process
    for name, benchmark in benchmarks.items():
        try:
            items = model.items(benchmark, progress)
        except Exception as error:
            # If one of several processes fails in the middle, the others wait for it
            if processes().num_processes > 1 and not isinstance(error, ConfigurationError):
                raise
            if disk_full(error) is not None:
                raise
            logger.exception(f"{name} failed on {model.model}")
            done.failed[name] = f"{type(error).__name__}: {first_line(error)}"
            continue
        done.items[name] = items
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            write_items(folder / f"{Path(name).stem}.jsonl", items)
    progress.close()
    return done
