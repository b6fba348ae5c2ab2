"""
Errors that are the user's to mend: the command line prints their message, without a traceback, and
exits with 2.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class EAFTError(Exception):
    """Base of every error whose message alone tells the user what is wrong and what to do."""


class ConfigurationError(EAFTError, ValueError):
    """A setting, a model, a data set or an output folder that cannot be used."""


class NonFiniteError(EAFTError, ArithmeticError):
    """A loss or a gradient that is NaN or infinite; raised before it can reach the weights."""


def nearest(name: str, known: Iterable[str]) -> str:
    """
    Return `" Did you mean 'x'?"` for the known name closest to `name`, or an empty string if none
    is close.
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def disk_full(error: BaseException | None) -> str | None:
    """
    Return the file that a full disk kept from being written ("" if that is unknown); None for
    another error.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return str(error.filename or "")
        if "No space left on device" in str(
            error
        ):  # safetensors and pyarrow raise errors of their own
            return ""
        error = error.__cause__ or error.__context__
    return None
