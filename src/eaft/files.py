"""
Read files and settings that users or earlier runs wrote, and check them; an error is one line.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    StrictInt,
    TypeAdapter,
    ValidationError,
)

from eaft.errors import ConfigurationError, nearest


def no_bool(value: Any) -> Any:
    """Refuse true and false, which Python and pydantic accept as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def no_nul(value: str) -> str:
    """Refuse an empty text, and NUL, which no path may contain."""
    if not value.strip() or "\0" in value:
        raise ValueError("expected a text that is not empty")
    return value


# Types of fields. `StrictInt` refuses 1.0 and true
Count = Annotated[StrictInt, Field(ge=1)]
NotNegative = Annotated[StrictInt, Field(ge=0)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**32)]  # NumPy's range of seeds
# Also accepts "3e-5", which YAML reads as text
Finite = Annotated[float, BeforeValidator(no_bool), Field(allow_inf_nan=False)]
FiniteNotNegative = Annotated[Finite, Field(ge=0)]
Positive = Annotated[Finite, Field(gt=0)]
Share = Annotated[Finite, Field(ge=0, lt=1)]
Text = Annotated[str, AfterValidator(no_nul)]
Flag = StrictBool
adapter = functools.cache(TypeAdapter)


def check(kind: Any, value: Any, where: str) -> Any:
    """
    Return a value as pydantic converts it to `kind`: a type with bounds, or a dataclass of such
    types.

    Args:
        where: the file or setting that begins the message; empty for flags, whose names are the
            names of the fields.

    Raises:
        ConfigurationError: the value is not of this kind. The message names the first wrong field,
            its value, and the expected kind.
    """
    try:
        return adapter(kind).validate_python(value)
    except ValidationError as error:
        raise ConfigurationError(explain(error, kind, where)) from error


def explain(error: ValidationError, kind: Any, where: str) -> str:
    """Return the first problem that pydantic reports, as one line."""
    unknown, begin = (
        ("unexpected_keyword_argument", "extra_forbidden"),
        f"{where}: " if where else "",
    )
    # An unknown name first: it is often a misspelt name of a field that is then missing
    problem = min(
        error.errors(include_url=False), key=lambda problem: problem["type"] not in unknown
    )
    # pydantic adds the tags of a union's members to the path, and the user did not write them
    place = ".".join(str(part) for part in problem["loc"] if not str(part).endswith(("]", ")")))
    if problem["type"] in unknown:
        name = str(problem["loc"][-1])
        inside = "".join(f"{part}: " for part in problem["loc"][:-1])
        return (
            f"{begin}{inside}{name!r} is"
            f" unknown.{nearest(name, field_names(kind, problem['loc'][:-1]))}"
        )
    if problem["type"] in ("missing", "missing_argument"):
        return f"{begin}{place} is missing."
    reason = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    reason = reason.replace("List should have", "expected a list of").replace(
        "Dictionary should have", "expected"
    )
    got = short(problem["input"])
    return f"{begin}{place}={got}: {reason}." if place else f"{begin}{reason}, got {got}."


def field_names(kind: Any, path: tuple[Any, ...]) -> list[str]:
    """Return the fields' names of a dataclass, or of the dataclass at `path` inside it."""
    for part in path:
        kind = get_type_hints(kind).get(part)
    return list(getattr(kind, "__dataclass_fields__", {}))


def short(value: Any) -> str:
    """Return a value's text, cut to at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class UniqueKeys(yaml.SafeLoader):
    """
    PyYAML's safe loader, except that a duplicate key is an error, as YAML says.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Return a mapping; see the class."""
        seen: set[Any] = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in seen and name is not None:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_text(path: str | Path, where: str) -> str:
    """
    Return a text file's content.

    Raises:
        ConfigurationError: there is no such file, or it is not UTF-8.
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigurationError(f"{where}: there is no such file.") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{where} is not UTF-8 (byte {error.start}): save it as UTF-8."
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{where} cannot be read. ({error})") from error


def read_yaml(path: str | Path, where: str) -> dict[str, Any]:
    """
    Return the content of a YAML file, which must be a mapping.

    Raises:
        ConfigurationError: the file cannot be read, has a key twice, or is no mapping.
    """
    text = read_text(path, where)
    try:
        content = yaml.load(text, Loader=UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigurationError(f"{where}{line}: {problem}.") from error
    if not isinstance(content, dict):
        what = "nothing" if content is None else type(content).__name__
        raise ConfigurationError(f"{where}: expected a mapping, as `name: value`, got {what}.")
    for name in content:
        if not isinstance(name, str):
            raise ConfigurationError(f"{where}: {name!r} is no name: put it in quotes.")
    return content


def read_json(path: Path, kind: Any, way: str) -> Any:
    """
    Return the content of a JSON file that eaft wrote.

    Args:
        kind: the type of the content, as in `check`.
        way: what the user can do if the file cannot be used.

    Raises:
        ConfigurationError: the file is truncated, is not JSON, or has another form: another version
            of eaft or another program wrote it.
    """
    return parsed(read_text(path, str(path)), kind, str(path), way)


def read_jsonl(path: Path, kind: Any, way: str) -> list[Any]:
    """
    Return the lines of a JSON Lines file, each read and checked as by `read_json`. Empty lines are
    skipped.
    """
    # `splitlines` would also split at separators that JSON allows inside a string
    lines = read_text(path, str(path)).removeprefix("\ufeff").split("\n")
    return [
        parsed(line, kind, f"{path}, line {n}", way)
        for n, line in enumerate(lines, 1)
        if line.strip()
    ]


def parsed(text: str, kind: Any, where: str, way: str) -> Any:
    """Return the content of JSON text; see `read_json`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{where} is truncated or no JSON ({error}): {way}") from error
    try:
        return adapter(kind).validate_python(content)
    except ValidationError as error:
        raise ConfigurationError(
            f"{explain(error, kind, where).removesuffix('.')}: {way}"
        ) from error
