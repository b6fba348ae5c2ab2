"""The label of CLUEWSC 2020, in the forms it is released in."""

from typing import Any


def target(doc: dict[str, Any]) -> int:
    """Return the right choice: 0 (the pronoun stands for the noun) or 1 (it does not)."""
    label = doc["label"]
    if label not in ("true", "false", True, False, 0, 1):
        raise ValueError(f"label={label!r}: expected 'true' or 'false', or class 0 or 1.")
    if isinstance(label, str):
        return 0 if label == "true" else 1
    return int(not label) if isinstance(label, bool) else label
