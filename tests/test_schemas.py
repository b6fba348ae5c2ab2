"""The JSON schemas of results.json: made from the types, and kept by what is written."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("make_schemas", ROOT / "docs" / "make_schemas.py")
make_schemas = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_schemas)


@pytest.mark.parametrize("package", list(make_schemas.KINDS))
def test_a_schema_is_made_from_its_types(package):
    assert make_schemas.path(package).read_text() == make_schemas.schema(package), (
        "old: run docs/make_schemas.py"
    )
