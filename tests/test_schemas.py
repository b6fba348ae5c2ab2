"""The JSON schemas of results.json: made from the types, and kept by what is written."""

import importlib.util
import json
from pathlib import Path

import jsonschema
import pytest

from eaft.comparison.results import Comparison
from eaft.evaluation.results import as_json
from eaft.files import read_json

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("make_schemas", ROOT / "docs" / "make_schemas.py")
make_schemas = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_schemas)


@pytest.mark.parametrize("package", list(make_schemas.KINDS))
def test_a_schema_is_made_from_its_types(package):
    assert make_schemas.path(package).read_text() == make_schemas.schema(package), (
        "old: run docs/make_schemas.py"
    )


@pytest.mark.parametrize("file", sorted(ROOT.glob("benchmarks/**/results.json")), ids=str)
def test_committed_results_can_be_read(file):
    """They were written by an earlier version, which had no date of templates."""
    content = json.loads(file.read_text())
    content["protocol"].setdefault("template_date", None)
    jsonschema.validate(content, json.loads(make_schemas.path("comparison").read_text()))
    assert as_json(read_json(file, Comparison, "")) == content
