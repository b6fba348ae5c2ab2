"""The README's Python runs as it stands, but for the model and the data."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from .conftest import make_rows

ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["TRL", "Trainer"])
def test_snippet_runs(snippet, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    tokenized = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 8)
    code = snippet.replace("Qwen/Qwen3-0.6B", str(model_dir)).replace('("out"', '("out", use_cpu=True, report_to=[]')
    exec(code, {"tokenized": tokenized})
    assert list((tmp_path / "out").glob("checkpoint-*/model.safetensors"))


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in ("demo", "test", "check"))
