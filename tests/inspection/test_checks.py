"""The checks of the data, on rows made to fail each."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eaft.inspection.find import checks
from eaft.inspection.folder import BASE, EXAMPLES, TOKENS, VOCABULARY, Inspection

VOCAB = ["<|start|>", "<|end|>", "user", "assistant", "\n", " hi", " yes", " no"]


def chat(*messages):
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def write(folder, rows):
    """Write rows of (row, tokens as texts, which are labelled, other columns)."""
    tokens, examples = {name: [] for name in TOKENS.names}, []
    for index, (row, texts, labelled, others) in enumerate(rows):
        end = 0
        for position, text in enumerate(texts):
            end += len(text)
            scored = 1.0 if position in labelled else None
            values = {
                "example": index,
                "position": position,
                "token_id": VOCAB.index(text),
                "end": end,
            }
            for name in TOKENS.names:
                tokens[name].append(
                    {**values, "labelled": position in labelled}.get(name, scored and -1.0)
                )
        columns = {
            "example": index,
            "origin": "data",
            "source": "s",
            "row": 100 + index,
            "digest": str(index),
        }
        counts = {"tokens": len(texts), "labelled": len(labelled), "cut": 0, "cut_labelled": 0}
        examples.append(
            {**columns, "text": "".join(texts), "messages": json.dumps(row), **counts, **others}
        )
    (folder / "tokens").mkdir()
    arrays = [pa.array(tokens[field.name]).cast(field.type) for field in TOKENS]
    pq.write_table(
        pa.table(arrays, schema=TOKENS), folder / "tokens" / "00000.parquet", row_group_size=7
    )
    pq.write_table(pa.Table.from_pylist(examples, EXAMPLES), folder / "examples.parquet")
    special = [text.startswith("<|") for text in VOCAB]
    table = {"token_id": range(len(VOCAB)), "text": VOCAB, "special": special}
    pq.write_table(pa.table(table, VOCABULARY), folder / "vocabulary.parquet")
    run = {"scored": True, "top_k": 4, "models": [{"name": BASE, "model": "m"}]}
    (folder / "run.json").write_text(json.dumps(run))
    return Inspection(folder)


HEAD = ["<|start|>", "user", " hi", "<|end|>", "<|start|>", "assistant"]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("unlabelled", (chat(("user", "hi"), ("assistant", "no")), [*HEAD, " no"], [], {})),
        (
            "truncated",
            (
                chat(("user", "hi"), ("assistant", "no")),
                [*HEAD, " no"],
                [6],
                {"cut": 3, "cut_labelled": 2},
            ),
        ),
        ("prompt_trained", (chat(("user", "hi"), ("assistant", "no")), [*HEAD, " no"], [2, 6], {})),
        (
            "prompt_trained",
            ({"prompt": "user hi", "completion": " no"}, ["user", " hi", " no"], [1, 2], {}),
        ),
        (
            "template_twice",
            (chat(("user", "hi"), ("assistant", "no")), ["<|start|>", *HEAD, " no"], [7], {}),
        ),
        (
            "special_in_text",
            (chat(("user", "hi<|end|>"), ("assistant", "no")), [*HEAD, " no"], [6], {}),
        ),
    ],
)
def test_each_check_finds_its_row_alone(tmp_path, name, row):
    # Good ones: the user's words again in the answer, a plain prompt, an answer that the template
    # shortens, whose rest the user says again, a prompt that the answer repeats
    turns = ("user", "hi"), ("assistant", "hm no"), ("user", "no"), ("assistant", "yes")
    again = ["<|end|>", "<|start|>", "user", " no", "<|end|>", "<|start|>", "assistant"]
    good = [
        (chat(("user", "hi"), ("assistant", "hi")), [*HEAD, " hi", "<|end|>"], [6, 7], {}),
        ({"prompt": "user", "completion": " hi"}, ["user", " hi"], [1], {}),
        (chat(*turns), [*HEAD, " no", *again, " yes"], [6, 14], {}),
        (
            {"prompt": " no", "completion": " hi no yes"},
            [" hi", " no", " yes"],
            [1, 2],
            {},
        ),  # its prompt is cut off
    ]
    results = checks.check(write(tmp_path, [*good, row]))
    assert {c.name: c.rows for c in results if c.count} == {name: [100 + len(good)]}
    assert [c.name for c in results] == list(checks.CHECKS)


def test_a_template_in_the_messages_and_duplicates(tmp_path):
    plain = (chat(("user", "hi"), ("assistant", "yes")), [*HEAD, " yes"], [6], {})
    twice = (chat(("user", "<|start|>user hi"), ("assistant", "no")), [*HEAD, " no"], [6], {})
    rollout = (*plain[:3], {"origin": "rollouts"})
    results = checks.check(write(tmp_path, [plain, twice, plain, rollout, plain]))
    rows = {c.name: (c.count, c.rows) for c in results if c.count}
    assert rows == {
        "template_twice": (1, [101]),
        "special_in_text": (1, [101]),
        "duplicates": (2, [102, 104]),
    }
