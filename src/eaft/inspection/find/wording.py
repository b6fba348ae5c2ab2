"""Numbers and tokens as the report's sentences and tables write them."""

from __future__ import annotations

from eaft.text import visible

MOST_CHARACTERS = 24  # of a token's text
# A line's end in a token would break a table and a word cloud
SYMBOLS = str.maketrans(
    {"\n": "⏎", "\r": "⇤", "\t": "⇥", "`": "'"}
    | dict.fromkeys("\v\f\x1c\x1d\x1e\x85\u2028\u2029", "↓")
)


def shown(text: str, leading: bool = False) -> str:
    """
    Return a token's text with white space as symbols, cut to `MOST_CHARACTERS`.

    Args:
        text: of the token.
        leading: whether to show a leading space, which tells ` the` from `the` in a table.
    """
    if leading and text.startswith(" ") and not text.isspace():
        return f"␣{shown(text[1:])}"
    stripped = text.replace(" ", "␣") if text.isspace() else text.strip()
    text = visible(stripped.translate(SYMBOLS), lines=False)
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"


def percent(share: float) -> str:
    """Return a share in per cent: whole numbers from 10% on, one decimal below."""
    return f"{100 * share:.0f}%" if share >= 0.0995 or share == 0 else f"{100 * share:.1f}%"
