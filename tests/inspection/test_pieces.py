"""
The text of tokens: characters over several tokens, bytes that are none, both ways of writing bytes
as tokens.
"""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eaft.inspection.score.pieces import Pieces
from eaft.models import vocabulary_size
from tests.conftest import make_tokenizer

TEXT = "hi 🙂 שלום\n<|im_end|>é👩‍👧 don't . , x"


def byte_fallback():
    """As sentencepiece: words begin with a mark for the space, and what has no token is bytes."""
    words = ["▁", "a", "b", "▁a", "▁ab", "h", "i", "ab"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [("▁", "a"), ("▁a", "b"), ("a", "b")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("make", [make_tokenizer, byte_fallback])
def test_text_is_that_of_the_tokens_one_after_another(make):
    tokenizer = make()
    ids = tokenizer(TEXT)["input_ids"]
    text, ends = Pieces(tokenizer).join(ids)
    assert text.lstrip(" ") == TEXT  # sentencepiece puts a space before the first word
    assert len(ends) == len(ids)
    # The end of a token: the characters that are whole once its bytes are there
    names, so_far = tokenizer.convert_ids_to_tokens(ids), 0
    for name, end in zip(names, ends, strict=True):
        is_byte = name.startswith("<0x") or (make is make_tokenizer and len(name) == 1)
        so_far += 1 if is_byte else len(name.replace("▁", " ").encode())
        assert end == len(text.encode()[:so_far].decode(errors="ignore"))


def test_bytes_that_are_no_character():
    tokenizer = make_tokenizer()
    smile, x = tokenizer("🙂")["input_ids"], tokenizer("x")["input_ids"]
    text, ends = Pieces(tokenizer).join([*smile[:2], *x, *smile[1:], 2, smile[0]])
    assert text == "�x���<|im_end|>�"
    assert ends == [0, 0, 2, 3, 4, 5, 15, 16]
    assert Pieces(tokenizer).join([]) == ("", [])


def test_one_token_shown():
    tokenizer = make_tokenizer()
    pieces = Pieces(tokenizer)
    shown = [pieces.text(i) for i in tokenizer("aé")["input_ids"]]
    assert shown == ["a", "<0xC3>", "<0xA9>"]
    assert pieces.text(2) == "<|im_end|>"
    assert {0, 1, 2} <= pieces.special
    assert pieces.text(262) == "<id 262>"  # a row of the head that no token has
    fallback = byte_fallback()
    assert [Pieces(fallback).text(i) for i in fallback("ab é")["input_ids"]] == [
        " ab",
        " ",
        "<0xC3>",
        "<0xA9>",
    ]


def test_ids_with_gaps():
    """
    As Kimi's: the highest id is above the number of tokens, and an id between them is no token's.
    """
    vocab = {
        token: i
        for i, token in enumerate(["<|pad|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    bpe = Tokenizer(models.BPE(vocab={**vocab, "<|end|>": 300, "<|tool|>": 310}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    marks = {"eos_token": "<|end|>", "additional_special_tokens": ["<|tool|>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **marks)
    pieces = Pieces(tokenizer)
    assert [pieces.text(i) for i in (300, 305, 310)] == [
        tokenizer.decode([300]),
        "<id 305>",
        tokenizer.decode([310]),
    ]
    assert vocabulary_size(tokenizer) == 311
