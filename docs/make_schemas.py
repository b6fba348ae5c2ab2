"""
Write the JSON schemas of the `results.json` files of `eaft eval` and `eaft compare` from their
types.

    .venv/bin/python docs/make_schemas.py
"""

import json
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

import eaft
from eaft.comparison.results import Comparison
from eaft.evaluation.results import Results

PACKAGE = Path(eaft.__file__).parent
KINDS: dict[str, tuple[Any, str]] = {
    "evaluation": (Results, "results.json of eaft eval"),
    "comparison": (Comparison, "results.json of eaft compare"),
}


class Described(GenerateJsonSchema):
    """pydantic's schema, with the descriptions of inherited fields, and without invented titles."""

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        """Add to a dataclass's schema what pydantic reads from the class's own body only."""
        made = super().dataclass_schema(schema)
        for base in filter(is_dataclass, schema["cls"].__mro__[1:]):
            for name, inherited in TypeAdapter(base).json_schema()["properties"].items():
                if "description" in inherited:
                    made["properties"][name].setdefault("description", inherited["description"])
        return made

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Return that a field's name is title enough."""
        return False


def schema(package: str) -> str:
    """Return the schema of a package's `results.json`, as its file holds it."""
    kind, title = KINDS[package]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title}
    made = TypeAdapter(kind).json_schema(schema_generator=Described)
    return json.dumps({**head, **made}, indent=2) + "\n"


def path(package: str) -> Path:
    """Return where a package's schema is."""
    return PACKAGE / package / "results.schema.json"


if __name__ == "__main__":
    for name in KINDS:
        path(name).write_text(schema(name))
        print(path(name))
