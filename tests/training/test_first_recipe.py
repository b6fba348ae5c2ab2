"""`eaft init`: the recipe that it writes is one that `eaft train` takes."""

import json

import pytest
import yaml

from eaft import cli
from tests.conftest import make_rows


def test_a_recipe_for_chats(model_dir, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = []
    for row in make_rows(12):
        turns = {"user": row["prompt"], "assistant": row["completion"]}
        rows.append({"messages": [{"role": r, "content": text} for r, text in turns.items()]})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["init", str(model_dir), "data.jsonl"]) == 0
    text = (tmp_path / "recipe.yaml").read_text()
    longest = max(
        len(tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"])
        for row in rows
    )
    assert text.startswith(f"# 12 rows of messages; up to {longest} tokens")
    settings = yaml.safe_load(text)
    assert settings["assistant_only_loss"] is True
    assert settings["max_length"] >= longest
    capsys.readouterr()
    assert cli.main(["train", "--config", "recipe.yaml", "--dry_run"]) == 0
    assert "Recipe is complete" in capsys.readouterr().out


@pytest.mark.parametrize("output", ["recipe.yaml", "missing/recipe.yaml"])
def test_nothing_is_overwritten(output, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("mine")
    assert cli.main(["init", str(model_dir), "data.jsonl", "--output", output]) == 2
    assert f"--output='{output}'" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
