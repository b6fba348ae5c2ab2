"""Reads logs of other tools: lm-eval (`--log_samples`), inspect_ai (`.eval`); imports neither."""

from __future__ import annotations

from pathlib import Path

from eaft.errors import ConfigurationError
from eaft.evaluation.inspect_ai_logs import read_inspect
from eaft.evaluation.lm_eval_logs import RESULTS, read_lm_eval
from eaft.evaluation.logged import Log


def read_log(path: str) -> Log:
    """
    Return a log: of lm-eval a folder or a `results_*.json` in it, of inspect_ai a `.eval` file or a
    folder of them.

    Raises:
        ConfigurationError: there is no log, it is of several models, or it cannot be read.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise ConfigurationError(f"--from: there is no {path}.")
    if place.is_dir():
        results = sorted(file for file in place.rglob("*.json") if RESULTS.search(file.name))
        evals = sorted(place.rglob("*.eval"))
    else:
        results = [place] if RESULTS.search(place.name) else []
        evals = [place] if place.suffix == ".eval" else []
    if bool(results) == bool(evals):
        what = "logs of both lm-eval and inspect_ai" if results else "no log"
        raise ConfigurationError(
            f"--from: {path} holds {what}: expected lm-eval's results_DATE.json, with"
            " samples_TASK_DATE.jsonl beside it (`lm_eval --log_samples --output_path DIR`), or"
            " inspect_ai's .eval."
        )
    return read_lm_eval(path, results) if results else read_inspect(path, evals)
