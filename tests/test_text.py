"""
Text of others stays text, as a Markdown parser of its own reads it, and sends a terminal nothing
but characters.
"""

import io
import logging

from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from eaft.text import VisibleRecord, block, code, markdown, markdown_strings, table, visible

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
SIGNS = st.text(st.sampled_from("\\`*_[]()<>!&#|~$+-=.:/ \t\n\r\x1b\u202e\x85a1;"), max_size=12)
WORDS = st.lists(
    st.sampled_from(
        ["<b>", "![x](y)", "&amp;", "# ", "- ", "1. ", "**b**", "_i_", "x_y", "`", "|", "\\"]
    )
)
TEXTS = st.one_of(st.text(), SIGNS, WORDS.map("".join))
ESCAPES = {
    0x1B: "\\x1b",
    0x202E: "\\u202e",
    0x7F: "\\x7f",
    0x85: "\\x85",
    0xD800: "\\ud800",
    0x2028: "\\u2028",
}


def tokens(text):
    return [token for outer in PARSER.parse(text) for token in (outer, *(outer.children or []))]


def words(text):
    """Return the text that a piece of Markdown shows, and what kinds of token it is made of."""
    found = [token for token in tokens(text) if token.type != "inline"]
    shown = "".join(
        token.content for token in found if token.type in ("text", "text_special", "code_inline")
    )
    return shown, {token.type for token in found}


@given(TEXTS)
@example("x\x1b]0;P\x07\u202e\n")
def test_markdown_shows_text_as_it_is(text):
    for around in ("{}", "- {}", "## {}", "one {} two", "**Choose {}.**"):
        plain = words(around.format("x"))[1]
        shown, kinds = words(around.format(markdown(text)))
        assert kinds <= plain | {"text", "text_special"}, around
        if around == "one {} two":
            assert " ".join(shown.split()) == " ".join(
                f"one {visible(text, lines=False)} two".split()
            )


@given(TEXTS)
def test_code_and_block(text):
    shown, kinds = words(f"Target: {code(text)}")
    assert kinds == {"paragraph_open", "paragraph_close", "text", "code_inline"}
    assert shown.strip() == f"Target: {visible(text, lines=False)}".strip()
    found = [
        token for token in tokens(f"Prompt:\n\n{block(text)}\n\nAfter") if token.type != "inline"
    ]
    assert {token.type for token in found} <= {
        "paragraph_open",
        "paragraph_close",
        "text",
        "code_block",
    }


@given(TEXTS, TEXTS)
def test_a_cell_of_a_table_stays_one_cell(one, other):
    text = table([[markdown(one), code(other), "end"]], [markdown(other), "b", "c"])
    found = [token.type for token in tokens(text)]
    assert found.count("td_open") == 3
    assert found.count("th_open") == 3
    assert found.count("tr_open") == 2


def test_common_names_are_unchanged_and_hidden_characters_shown():
    for name in (
        "gsm8k_cot",
        "exact_match,strict-match",
        "SmolLM2-135M",
        "runs/a-b.c",
        "law (5 shots)",
        "न\u200d 👩\u200d💻",
    ):
        assert markdown(name) == visible(name) == name
    for point, escape in ESCAPES.items():
        assert visible(f"a{chr(point)}\n\tb") == f"a{escape}\n\tb"
        assert visible(f"{chr(point)}\n", lines=False) == escape + "\\n"
    assert markdown_strings({"<b>": ["`", 1.5, None], "p_holm": True}) == {
        "\\<b>": ["\\`", 1.5, None],
        "p_holm": True,
    }


def test_log_messages(monkeypatch):
    monkeypatch.setattr(logging, "_logRecordFactory", VisibleRecord)
    logger, out = logging.Logger("x"), io.StringIO()
    logger.addHandler(logging.StreamHandler(out))
    try:
        raise ValueError("in \x1b[31m the error")
    except ValueError:
        logger.exception("a task \x1b[31m%s", "\u202eb")
    logger.warning("plain %d", 1)
    assert "a task \\x1b[31m\\u202eb\n" in out.getvalue()
    assert "ValueError: in \\x1b[31m the error\nplain 1\n" in out.getvalue()
    assert not {"\x1b", "\u202e"} & set(out.getvalue())
