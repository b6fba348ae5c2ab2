"""
Templates that write the date write one date for a whole run, which a resumed run and all that
belongs to it keep.
"""

import json

import pytest
import yaml
from transformers.utils import chat_template_utils

from eaft import cli
from eaft.comparison import compare
from eaft.comparison.recipe import EvaluateConfig, Recipe, plan_runs
from eaft.errors import ConfigurationError
from eaft.evaluation import evaluate
from eaft.evaluation.identity import tokenizer_digest
from eaft.evaluation.protocol import Protocol
from eaft.files import check, read_yaml
from eaft.inspection import inspect
from eaft.models import template_date, template_today
from eaft.training import train
from eaft.training.arguments import parse
from eaft.training.data import load_splits
from eaft.training.prepare import prepare_rows
from tests.conftest import CHAT_TEMPLATE, make_rows, make_tokenizer

DATED = "{{ strftime_now('%d %b %Y %H:%M') }}\n" + CHAT_TEMPLATE
SOME_DAY = "2024-02-29"


def dated_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DATED
    return tokenizer


def first_line(tokenizer):
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    ).splitlines()[0]


@pytest.fixture
def on(monkeypatch):
    """Move the clock that templates read."""

    def move(day):
        class Day(chat_template_utils.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2026, 12, day, 7, 31)

        monkeypatch.setattr(chat_template_utils, "datetime", Day)

    return move


def test_a_template_writes_the_fixed_date_and_then_the_clocks_again(on):
    on(1)
    tokenizer = dated_tokenizer()
    assert (template_today(), first_line(tokenizer)) == ("2026-12-01", "01 Dec 2026 07:31")
    with template_date(SOME_DAY):
        assert (template_today(), first_line(tokenizer)) == (SOME_DAY, "29 Feb 2024 00:00")
        on(2)
    assert first_line(tokenizer) == "01 Dec 2026 07:31"
    with pytest.raises(
        ConfigurationError, match="template_date='29 Feb': expected a date, as 2026-11-29"
    ):
        template_date("29 Feb").__enter__()


def test_only_a_template_that_writes_the_date_is_another_on_another_day():
    digests = {}
    for day in (SOME_DAY, "2024-03-01"):
        with template_date(day):
            digests[day] = [
                tokenizer_digest(tokenizer) for tokenizer in (make_tokenizer(), dated_tokenizer())
            ]
    (plain, dated), (plain_after, dated_after) = digests.values()
    assert plain == plain_after
    assert dated != dated_after


def test_prepared_rows_have_the_runs_date_whatever_datasets_has_cached(tmp_path, model_dir):
    rows = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in make_rows(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "model_name_or_path": str(model_dir),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "use_cpu": True,
    }
    (tmp_path / "train.yaml").write_text(
        yaml.safe_dump({**flags, "output_dir": str(tmp_path / "out")})
    )
    (script_args, args, _, dataset_args, _), _, _ = parse(
        ["--config", str(tmp_path / "train.yaml")]
    )
    for day, text in (("2024-02-29", "29 Feb 2024"), ("2024-03-01", "01 Mar 2024")):
        with template_date(day):
            found = prepare_rows(
                dated_tokenizer(), args, load_splits(script_args, dataset_args)["train"]
            ).cut
        assert [dated_tokenizer().decode(row["input_ids"])[:11] for row in found] == [text] * 3


@pytest.mark.parametrize(
    ("module", "name", "argv", "file", "content"),
    [
        (
            train,
            "train",
            ["train", "--resume_from_checkpoint", "true"],
            "run.json",
            {"config": {"template_date": 1}},
        ),
        (inspect, "inspect", ["inspect", "m", "d"], "run.json", {"config": {"template_date": 1}}),
        (
            evaluate,
            "evaluate",
            ["eval", "m", "--suite", "s"],
            "inputs.json",
            {"protocol": {"template_date": 1}},
        ),
    ],
)
def test_what_was_begun_goes_on_with_its_date(
    module, name, argv, file, content, tmp_path, monkeypatch, on
):
    seen = []

    def stand_in(*args, protocol=None, **kwargs):
        settings = protocol or args[1]
        assert settings.template_date == template_today()
        seen.append(template_today())

    monkeypatch.setattr(module, name, stand_in)
    flags = ["--output_path" if name == "evaluate" else "--output_dir", str(tmp_path)]
    flags += [] if name == "evaluate" else ["--use_cpu", "true"]
    on(1)
    assert cli.main([*argv, *flags]) == 0
    (tmp_path / file).write_text(json.dumps(content).replace(": 1}", f': "{template_today()}"}}'))
    on(2)
    assert cli.main([*argv, *flags]) == 0
    assert cli.main([*argv, *flags, "--template_date", SOME_DAY]) == 0
    (tmp_path / file).unlink()
    assert cli.main([*argv, *flags]) == 0
    assert seen == ["2026-12-01", "2026-12-01", SOME_DAY, "2026-12-02"]


def test_a_comparison_has_one_date(tmp_path, model_dir, monkeypatch, on):
    """In its folder's mark, for what is measured and for every run's training."""
    seen = []

    def stand_in(recipe, jobs):
        seen.append((template_today(), recipe.evaluate.template_date))

    monkeypatch.setattr(compare, "compare_on_date", stand_in)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(3)))
    flags = {
        "model_name_or_path": str(model_dir),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "use_cpu": True,
    }

    def recipe():
        config = EvaluateConfig(target_tasks=["t"], general_tasks=["g"])
        return Recipe(str(tmp_path / "out"), {"sft": {"gate": "sft"}}, flags, config)

    on(1)
    compare.compare(recipe())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.json").write_text(
        json.dumps({**compare.OURS, "template_date": "2026-12-01"})
    )
    on(2)
    again = recipe()
    compare.compare(again)
    assert seen == [("2026-12-01", "2026-12-01")] * 2
    (run,) = plan_runs(again, None)
    assert run.flags["template_date"] == "2026-12-01"
    assert "template_date" not in run.identity["flags"]  # the day alone makes no other run


def test_yaml_reads_a_date_without_quotes(tmp_path):
    """In a recipe of `eaft train` and in `evaluate` of `eaft compare` alike."""
    file = tmp_path / "recipe.yaml"
    file.write_text("template_date: 2024-02-29\nuse_cpu: true\nbf16: false\n")
    (configs, _, _) = parse(["--config", str(file)])
    assert configs[1].template_date == "2024-02-29"
    read = read_yaml(file, "recipe")["template_date"]
    assert check(Protocol, {"template_date": read}, "").template_date == "2024-02-29"
