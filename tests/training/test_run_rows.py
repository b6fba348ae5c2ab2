"""Rows of `eaft eval --held_out`: prepared as a model's run was, and refused in one line."""

import json

import pytest

from eaft import cli
from eaft.errors import ConfigurationError
from eaft.provenance import write_json
from eaft.training.apart import parse_flags
from eaft.training.data import load_rows
from eaft.training.held_out import prepare
from eaft.training.run_folder import RUN_FILE, changed_arguments
from eaft.training.run_rows import read_rows
from tests.conftest import make_rows

CHAT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "and 1?"},
    {"role": "assistant", "content": "5"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(model_dir, tmp_path):
    """A function that writes the `run.json` of a run with these flags, and returns its folder."""

    def of(**flags):
        own = {"model_name_or_path": str(model_dir), "use_cpu": True, "bf16": False}
        configs = parse_flags({**own, "report_to": "none", "output_dir": str(tmp_path), **flags})
        folder = tmp_path / "run"
        folder.mkdir()
        data = flags.get("dataset_name")
        record = {"finished": True, "dataset": data, "config": changed_arguments(configs[1])}
        write_json(folder / RUN_FILE, record)
        return str(folder), configs

    return of


@pytest.mark.parametrize(
    "flags",
    [
        {"max_length": 9, "eos_token": "!", "completion_only_loss": False},
        {"chat_template_path": "other.jinja", "assistant_only_loss": True},
    ],
)
def test_rows_are_prepared_as_by_compare(flags, run, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = (
        "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}"
    )
    (tmp_path / "other.jinja").write_text(turns + "{% endfor %}")
    chat = "assistant_only_loss" in flags
    path = write(tmp_path / "rows.jsonl", [{"messages": CHAT}] * 2 if chat else make_rows(4))
    model, configs = run(**flags)
    theirs = prepare(load_rows(path, "text", "rows"), configs, str(model_dir), "rows")
    found = read_rows(path, model, str(model_dir), {})
    assert found.rows == theirs
    assert not found.apart
    first = found.asked[0]
    asked = "user: 2+2?\n\nassistant: 4\n\nuser: and 1?" if chat else "0 plus 0"
    assert (first.text, first.target) == (asked, "5" if chat else " is 0")
    write_json(tmp_path / "run" / RUN_FILE, {"finished": True})  # nothing is known of it
    assert found.rows != read_rows(path, str(model_dir), str(model_dir), {}).rows


def test_plain_text_asks_nothing(run, model_dir, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": "two"}])
    assert read_rows(path, run()[0], str(model_dir), {}).asked == []


def test_what_cannot_be_measured_is_one_line(run, model_dir, tmp_path, capsys):
    rows = make_rows(6)
    model, _ = run(max_length=10, dataset_name=write(tmp_path / "data.jsonl", rows[:3]))
    long = {"prompt": "a long, long question", "completion": " yes"}
    cases = {
        "none.jsonl: there is no such file": None,
        "has the columns prompt; expected one of": [{"prompt": "a"}],
        "1 row: an interval needs at least two rows": rows[4:5],
        "row 1 is trained on": [rows[4], rows[2]],
        r"row 1 has no labelled token among its first 10 (max_length); 1 of 2 rows have none": [
            rows[4],
            long,
        ],
    }
    for message, held_out in cases.items():
        path = tmp_path / "none.jsonl"
        if held_out is not None:
            path = write(tmp_path / "held_out.jsonl", held_out)
        with pytest.raises(ConfigurationError) as error:
            read_rows(str(path), model, str(model_dir), {})
        assert str(error.value).startswith("--held_out: ")
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    path = write(tmp_path / "held_out.jsonl", rows[4:])
    assert read_rows(path, model, str(model_dir), {}).apart
    assert cli.main(["eval", model, "--held_out", path]) == 2
    assert "--held_out compares two models: give --base" in capsys.readouterr().err
