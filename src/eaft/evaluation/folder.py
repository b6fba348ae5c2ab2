"""
The folder of an evaluation: checks before anything is written, its items and its report.

Importing it does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eaft.errors import ConfigurationError
from eaft.evaluation.results import Item, Results, TunedEvaluation, as_json
from eaft.files import read_json
from eaft.processes import check_place
from eaft.provenance import write_json

RESULTS_FILE = "results.json"
INPUTS_FILE = "inputs.json"  # of the evaluation that a folder holds, finished or not


def folder_of(model: str, output_path: str | None) -> Path:
    """Return where results go."""
    return Path(output_path or Path("eval") / Path(model).name)


def check_folder(folder: Path, inputs: dict[str, Any]) -> None:
    """
    Check that an evaluation can be written into a folder. An evaluation that was stopped, or failed
    in part, goes on.

    Raises:
        ConfigurationError: the folder holds another evaluation, or a finished one.
    """
    way = "choose another --output_path, or delete this one."
    check_place(folder, "output_path")
    if (held := folder / INPUTS_FILE).is_file():
        old, new = read_json(held, dict[str, Any], way), json.loads(json.dumps(inputs))
        if changed := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
            raise ConfigurationError(
                f"output_path={str(folder)!r} holds another evaluation ({', '.join(changed)}"
                f" differs): {way}"
            )
    results = folder / RESULTS_FILE
    if results.is_file() and not read_json(results, dict[str, Any], way).get("failed"):
        raise ConfigurationError(f"output_path={str(folder)!r} holds results: {way}")


def check_installed(*packages: str) -> None:
    """
    Check that packages of the extra `eval` are installed.

    Raises:
        ConfigurationError: one is missing.
    """
    for package in packages:
        if find_spec(package) is None:
            raise ConfigurationError(f"Evaluating needs {package}: pip install 'eaft[eval]'.")


def write_items(file: Path, items: list[Item]) -> None:
    """Write items as JSON Lines, whole or not at all."""
    write_jsonl(file, [as_json(item) for item in items])


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON Lines, whole or not at all."""
    staging = file.with_suffix(".tmp")
    staging.write_text("".join(json.dumps(row) + "\n" for row in rows))
    staging.replace(file)


def data_digest(items: dict[str, list[Item]]) -> str:
    """
    Return a digest of the measured rows and prompts: it tells whether two results are of the same
    data.
    """
    digest = hashlib.sha256()
    for name in sorted(items):
        for item in items[name]:
            digest.update(f"{name} {item.task} {item.doc_hash} {item.prompt_hash}\n".encode())
    return digest.hexdigest()


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    staging = file.with_name(f"{file.name}.tmp")
    staging.write_text(text, errors="replace")
    os.replace(staging, file)


def write_report(folder: Path, results: Results) -> None:
    """
    Write changes.png, results.md, report.html and, last, results.json: it says that all is there.
    """
    from eaft.evaluation import report

    if isinstance(results, TunedEvaluation) and results.tasks:
        report.draw_changes(results, folder / "changes.png")
    write_text(folder / "results.md", report.evaluation(results))
    write_text(folder / "report.html", report.page(results, folder))
    write_json(folder / RESULTS_FILE, as_json(results))
