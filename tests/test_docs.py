"""
The README and the docs: their Python runs as it stands, but for the model and the data; their flags
exist.
"""

import contextlib
import functools
import importlib.util
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

import eaft
from eaft import EAFTConfig, cli
from eaft.objective.registry import GATES
from eaft.training.arguments import parse

from .conftest import make_rows

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").glob("*/README.md")),
]


def name(page):
    return str(page.relative_to(ROOT))


def snippets():
    """
    Every Python block, once; one that cannot be run has `<!-- not run: why -->` on the line before
    it.
    """
    block = re.compile(r"(?:<!-- not run: (.+) -->\n)?^```python\n((?:.*\n)*?)```$", re.MULTILINE)
    found = {}
    for page in PAGES:
        for number, (not_run, code) in enumerate(block.findall(page.read_text()), 1):
            marks = [pytest.mark.skip(not_run)] if not_run else []
            found.setdefault(code, pytest.param(code, id=f"{name(page)}-{number}", marks=marks))
    return found.values()


@pytest.mark.parametrize("snippet", snippets())
def test_snippet_runs(snippet, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    tokenized = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 8)
    code = snippet.replace("Qwen/Qwen3-0.6B", str(model_dir)).replace(
        '("out"', '("out", use_cpu=True, report_to=[]'
    )
    exec(code, {"tokenized": tokenized})
    if '("out"' in snippet:
        assert list((tmp_path / "out").glob("checkpoint-*/model.safetensors"))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_code_is_overlooked(page):
    fences = re.findall(r"^\s*```(.*)$", page.read_text(), re.MULTILINE)
    assert set(fences[::2]) <= {"python", "yaml", "sql"}
    assert set(fences[1::2]) <= {""}


@functools.cache
def flags_of(command):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        cli.main([command, "--help_all" if command in ("train", "inspect") else "--help"])
    flags = set(re.findall(r"--[\w-]+", text.getvalue()))
    return flags | flags_of("train") if command == "tune" else flags  # it takes those, too


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_exist(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE).replace(
        "\\\n", " "
    )
    code = re.findall(r"^    (.*)$", text, re.MULTILINE) + re.findall(r"`([^`]+)`", text)
    for command, rest in (
        match for piece in code for match in re.findall(r"\beaft\s+([a-z]+)\b([^`]*)", piece)
    ):
        flags = {word for word in shlex.split(rest, comments=True) if word.startswith("--")}
        assert flags <= flags_of(command), f"eaft {command} {rest}"


def test_the_notebook_was_executed_as_it_stands():
    notebook = json.loads((ROOT / "docs" / "from-data-to-decision.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    code = "".join("".join(cell["source"]) + "\n" for cell in cells)
    for command, rest in re.findall(r"^!eaft (\w+) (.*)$", code, re.MULTILINE):
        assert set(re.findall(r"--\w+", rest)) <= flags_of(command)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2


def test_every_public_name_is_in_the_api():
    names = re.findall(r"^::: eaft\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert set(names) == set(eaft.__all__)


def test_a_gate_of_your_own(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_gates", raising=False)
    page = (ROOT / "docs" / "objectives.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) <= 10
    Path("my_gates.py").write_text(code)
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    (flags,) = re.findall(r"eaft train (--gate my_gates:focal .*) --model_name_or_path", page)
    flags += f" --model_name_or_path {model_dir} --dataset_name data.jsonl --output_dir out"
    flags += " --use_cpu --max_steps 2 --logging_steps 1 --report_to none"
    assert cli.main(["train", *shlex.split(flags)]) == 0
    logs = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert 0.9 < logs[0]["mean_gate"] < 1  # the model knows nothing: 1 - p is near 1
    assert json.loads(Path("out/run.json").read_text())["gate"]["gamma"] == 1.0


def test_the_docs_yaml_is_a_configuration_and_a_recipe(tmp_path):
    text, recipe = re.findall(
        r"```yaml\n(.*?)```", (ROOT / "docs" / "objectives.md").read_text(), re.DOTALL
    )
    config = EAFTConfig("out", use_cpu=True, **yaml.safe_load(text))
    assert config.gate_params == {"steepness": 20, "center": 0.2, "entropy": "top-k"}
    for flags in yaml.safe_load(recipe)["objectives"].values():
        file = tmp_path / "train.yaml"
        file.write_text(yaml.safe_dump({"output_dir": "out", "use_cpu": True, **flags}))
        (_, config, *_), _, _ = parse(["--config", str(file)])
        assert (config.gate, config.replay) == (flags["gate"], flags.get("replay", 0))


def test_every_gate_is_documented():
    page = (ROOT / "docs" / "gates.md").read_text()
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)) == set(GATES)


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 4096
    assert text.count(b"\n") <= 80


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in ("demo", "test", "check", "docs"))


def test_the_map_is_of_the_modules_that_exist():
    spec = importlib.util.spec_from_file_location("make_map", ROOT / "docs" / "make_map.py")
    make_map = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_map)
    drawn = (ROOT / "CONTRIBUTING.md").read_text()
    assert make_map.make_map() in drawn, "the map is old: python docs/make_map.py"
