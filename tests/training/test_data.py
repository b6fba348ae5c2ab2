"""
Rows reach the chat template as they stand in the file, whatever their order; what is no row is
refused by line.
"""

import bz2
import gzip
import json
import lzma

import pytest
from trl import DatasetMixtureConfig, ScriptArguments

from eaft.errors import ConfigurationError
from eaft.training.config import EAFTConfig
from eaft.training.data import load_splits, to_dataset
from eaft.training.prepare import prepare_rows
from tests.conftest import make_tokenizer

TEMPLATE = "{% for m in messages %}{{ m | tojson }}{% endfor %}{{ tools | tojson }}"


def calling(arguments, **more):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}],
        **more,
    }


# Keys that others lack, mixed types, numbers that `datasets` rounds, a text that is itself JSON
ROWS = [
    calling({"city": "Paris"}, note="x"),
    calling({"lat": 0.00011778686747391669, "unit": None}, note=7),
    calling('{"city": "Paris"}'),
    calling(
        {"city": ["Paris", 1]}, tools=[{"name": "f", "parameters": {"city": {"type": "string"}}}]
    ),
    calling({"id": 12345678901234567890123, "city": {"name": "Paris"}}, tools=[{"name": "g"}]),
    {
        "messages": [
            {"role": "user", "content": "Hi", "extra": 1e-12},
            {"role": "assistant", "content": "Hello"},
        ]
    },
]
PADDING = "p" * (11 << 20)  # more than the part of a file from which `datasets` infers types


def load(path, **settings):
    return load_splits(ScriptArguments(dataset_name=str(path), **settings), DatasetMixtureConfig())[
        "train"
    ]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_kept_whatever_their_order(tmp_path, order, streaming):
    rows = ROWS[::order]
    rows = [{**rows[0], "padding": PADDING}, *rows[1:]]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    found = list(load(path, dataset_streaming=streaming))
    assert [
        {name: value for name, value in row.items() if value is not None} for row in found
    ] == rows


def test_trl_renders_what_stands_in_the_file(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for path, text in (
        (
            tmp_path / "data.jsonl",
            "".join(json.dumps(row) + "\n" for row in ROWS * 400),
        ),  # TRL maps a thousand at once
        (tmp_path / "data.json", json.dumps(ROWS, indent=1)),
    ):
        path.write_text(text)
        args = EAFTConfig(
            str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[], max_length=None
        )
        prepared = prepare_rows(tokenizer, args, load(path)).whole
        texts = tokenizer.batch_decode(prepared["input_ids"][: len(ROWS)])
        right = [
            tokenizer.apply_chat_template(r["messages"], tools=r.get("tools"), tokenize=False)
            for r in ROWS
        ]
        assert texts == right
        assert prepared["input_ids"][-len(ROWS) :] == prepared["input_ids"][: len(ROWS)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("module", [gzip, bz2, lzma], ids=["gz", "bz2", "xz"])
def test_a_packed_file_is_read(tmp_path, module, streaming):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    ending = {gzip: "gz", bz2: "bz2", lzma: "xz"}[module]
    (tmp_path / "data.jsonl").write_text(text)
    (tmp_path / f"data.jsonl.{ending}").write_bytes(module.compress(text.encode()))
    plain = load(tmp_path / "data.jsonl")
    packed = load(tmp_path / f"data.jsonl.{ending}", dataset_streaming=streaming)
    assert list(packed) == list(plain)


def test_a_mixture_of_files_keeps_their_rows(tmp_path):
    parts = []
    for number, rows in enumerate((ROWS[:3], ROWS[3:])):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        parts.append(
            {"path": "json", "data_files": str(path), "split": "train", "columns": ["messages"]}
        )
    found = load_splits(ScriptArguments(), DatasetMixtureConfig(datasets=parts))["train"]
    assert list(found) == [{"messages": row["messages"]} for row in ROWS]


def test_messages_of_from_and_value_keep_what_they_hold(tmp_path):
    def message(m):
        return {"from": m["role"], "value": m.get("content"), "calls": m.get("tool_calls")}

    rows = [{"conversations": [message(m) for m in row["messages"]]} for row in ROWS * 300]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load(path)["messages"][-len(ROWS) :]
    assert [m["calls"] for row in found for m in row] == [
        m.get("tool_calls") for r in ROWS for m in r["messages"]
    ]
    assert {key for row in found for m in row for key in m} == {"role", "content", "calls"}


def test_columns_have_the_types_that_training_needs(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"input_ids": [], "text": null, "x": 1}\n{"input_ids": [5, 6], "text": "a", "x": 0.5}\n'
    )
    features = load(path).features.arrow_schema
    assert [str(features.field(name).type) for name in ("input_ids", "text", "x")] == [
        "list<item: int64>",
        "string",
        "double",
    ]
    assert list(to_dataset(ROWS))[3]["tools"] == ROWS[3]["tools"]
    assert load(path)[0] == {"input_ids": [], "text": None, "x": 1}


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "data.jsonl"
    for text in ("first", "second"):
        path.write_text(json.dumps({"text": text}))
        assert load(path)[0] == {"text": text}


REFUSED = {
    "no JSON": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON (Expecting value"),
    "no object": (b'{"text": "a"}\n\n["b"]\n', 'line 3 is ["b"]: each row must be an object'),
    "null": (b"null\n", "line 1 is null: each row must be an object"),
    "Latin-1": ('{"text": "a"}\n{"text": "caf\xe9"}\n'.encode("latin1"), "line 2 is not UTF-8"),
    "half a character": (b'{"text": "\\ud800"}\n', "line 1 has half of a surrogate pair"),
    "a list of numbers": (b"[1, 2]", "row 0 is 1: each row must be an object"),
    "no rows": (b"\n\n", "the data set is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_row_is_refused_by_its_line(tmp_path, name):
    content, message = REFUSED[name]
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError) as refused:
        load(path)
    assert f"dataset_name={str(path)!r}, {message}" in str(refused.value)
    assert "\n" not in str(refused.value)
