"""The text of each token, chosen so that an example's text is the tokens' texts joined."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

# The character that byte-level BPE writes for a byte, and the byte
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # what byte fallback writes for a byte
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Pieces:
    """
    The bytes of a tokenizer's tokens.

    A token's text is what the tokenizer decodes it to after another token, which keeps a leading
    space. A token that holds part of a character has no text; its name tells its bytes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self.skip = len(self.decode(self.before))
        self.known = frozenset(tokenizer.get_vocab().values())  # ids may have gaps
        self.bytes_of = cache(self.find_bytes)
        added = tokenizer.added_tokens_decoder
        self.special = {
            *tokenizer.all_special_ids,
            *(i for i, token in added.items() if token.special),
        }

    def decode(self, ids: list[int]) -> str:
        """Return the tokenizer's text of some tokens, with special tokens."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def find_bytes(self, token_id: int) -> bytes:
        """
        Return a token's bytes, which are UTF-8 unless the token is part of a character.

        `bytes_of` is the same with a cache.
        """
        name = self.tokenizer.convert_ids_to_tokens(token_id) if token_id in self.known else None
        if name is None:  # a row of the head without a token
            return f"<id {token_id}>".encode()
        text = self.decode([*self.before, token_id])[self.skip :]
        if REPLACEMENT in text:
            if match := BYTE_TOKEN.fullmatch(name):
                return bytes([int(match[1], 16)])
            if all(character in BYTES for character in name):
                return bytes(BYTES[character] for character in name)
        return text.encode(errors="replace")

    def text(self, token_id: int) -> str:
        """Return a token's text; bytes that are no whole character are shown as `<0xE2>`."""
        return self.bytes_of(token_id).decode(errors="eaft-show")

    def join(self, ids: Iterable[int]) -> tuple[str, list[int]]:
        """
        Return the text of an example's tokens, and where each token ends in it, in characters.

        If several tokens share a character, only the last one ends after it; the others end before
        it. Bytes that are no character become U+FFFD.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        parts, ends, end = [], [], 0
        for token_id in ids:
            part = decoder.decode(self.bytes_of(token_id))
            end += len(part)
            parts.append(part)
            ends.append(end)
        if rest := decoder.decode(b"", final=True):
            parts.append(rest)
            ends[-1] += len(rest)
        return "".join(parts), ends


def show_bytes(error: UnicodeError) -> tuple[str, int]:
    """Replace bytes that cannot be decoded with `<0xE2>`."""
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<0x{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("eaft-show", show_bytes)
