"""The texts of an inspection's tokens."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq

from eaft.inspection.folder import VOCABULARY_FILE, Inspection
from eaft.inspection.summary import NamedToken


class Vocabulary:
    """
    The texts of the token ids that occur.

    Attributes:
        texts: by token id.
        special: the ids of special tokens.
        size: all ids are below this.
    """

    def __init__(self, inspection: Inspection) -> None:
        table = pq.read_table(inspection.folder / VOCABULARY_FILE)
        columns: dict[str, list[Any]] = table.to_pydict()
        ids = columns["token_id"]
        self.texts: dict[int, str] = dict(zip(ids, columns["text"], strict=True))
        self.special: set[int] = {
            token_id
            for token_id, is_special in zip(ids, columns["special"], strict=True)
            if is_special
        }
        self.size = max(self.texts, default=-1) + 1

    def named(self, token_id: int) -> NamedToken:
        """Return a token with its text; `<id>` if the id does not occur in the folder."""
        return NamedToken(int(token_id), self.texts.get(int(token_id), f"<{token_id}>"))
