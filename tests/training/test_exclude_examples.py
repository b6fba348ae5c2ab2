"""
`--exclude_examples`: the rows that a file names are left out; a file that was not made of this data
is refused.
"""

import json

import pytest
from datasets import Dataset, IterableDataset

from eaft.errors import ConfigurationError
from eaft.training.arguments import parse
from eaft.training.data import exclude_rows, load_data, row_digest
from eaft.training.run_folder import changed_arguments
from tests.conftest import make_rows

ROWS = make_rows()


def line(row, /, **changes):
    return (
        json.dumps({"row": row, "digest": row_digest(ROWS[row]), "origin": "data", **changes})
        + "\n"
    )


def write(folder, *lines):
    path = folder / "examples.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("in_yaml", [False, True])
def test_rows_are_left_out_of_what_is_trained_on_and_of_nothing_else(tmp_path, in_yaml):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in ROWS)
        )
    file = write(tmp_path, line(5), line(0), line(5))
    settings = {
        "model_name_or_path": "m",
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
    }
    settings |= {"eval_strategy": "epoch", "use_cpu": "true", "exclude_examples": file}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    if in_yaml:
        (tmp_path / "c.yaml").write_text(
            "".join(f"{name}: {value}\n" for name, value in settings.items())
        )
        flags = ["--config", str(tmp_path / "c.yaml")]
    (*configs, _), _, _ = parse(flags)
    train, held_out = load_data(*configs)
    assert list(train) == [row for i, row in enumerate(ROWS) if i not in (0, 5)]
    assert list(held_out) == ROWS
    assert changed_arguments(configs[1])["exclude_examples"] == str(file)


BAD = {
    "another row": ([line(0), line(1, row=2)], "line 2: row 2 of this data"),
    "no such row": ([line(1, row=len(ROWS))], f"row {len(ROWS)} of this data ({len(ROWS)} rows)"),
    "counted from the end": ([line(len(ROWS) - 1, row=-1)], "row -1 of this data"),
    "true is no number": ([line(1, row=True)], "row True of this data"),
    "no digest": (['{"row": 1}\n'], "line 1: expected a JSON map with `row` and `digest`"),
    "no JSON": ([line(1), "\n", "row 1\n"], "line 3: expected a JSON map"),
    "a list": (["[1]\n"], "line 1: expected a JSON map"),
    "a rollout": (
        [line(1, origin="rollouts")],
        "no row of the data but the model's own answer (rollouts)",
    ),
    "every row": ([line(i) for i in range(len(ROWS))], f"names all {len(ROWS)} rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_of_other_data_is_refused(tmp_path, name):
    lines, message = BAD[name]
    with pytest.raises(ConfigurationError) as error:
        exclude_rows(Dataset.from_list(ROWS), str(write(tmp_path, *lines)))
    assert message in str(error.value)
    assert "exclude_examples=" in str(error.value)


def test_streams_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="leave dataset_streaming out"):
        exclude_rows(
            IterableDataset.from_generator(lambda: iter(ROWS)), str(write(tmp_path, line(1)))
        )
    with pytest.raises(ConfigurationError, match="cannot be read"):
        exclude_rows(Dataset.from_list(ROWS), str(tmp_path / "none.jsonl"))
