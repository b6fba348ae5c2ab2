"""
Errors that the user can correct: the command line prints the message without a traceback, and exits
with 2.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

# A command that another eaft command started has this variable: it ends with errno.ENOSPC instead
# of 2 if the disk is full
STARTED = "EAFT_STARTED"


class EAFTError(Exception):
    """Base class of the errors whose message tells the user what is wrong and what to do."""


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
    Return the file that could not be written because the disk is full ("" if the file is unknown).

    Return None for any other error.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return str(error.filename or "")
        # safetensors and pyarrow raise their own errors
        if "No space left on device" in str(error):
            return ""
        error = error.__cause__ or error.__context__
    return None
