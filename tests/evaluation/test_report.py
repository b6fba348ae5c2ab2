"""
The report of an evaluation: it begins with the verdict, and holds what proves it; results.json
keeps its schema.
"""

import copy
import json
from dataclasses import replace
from importlib.resources import files

import jsonschema
import matplotlib.colors
import matplotlib.pyplot as plt
import pytest
from markdown_it import MarkdownIt

from eaft.evaluation import report
from eaft.evaluation.results import Results, Setting, as_json
from eaft.files import read_json
from eaft.provenance import write_json
from tests.evaluation.conftest import drift_results, task_results

SCHEMA = json.loads((files("eaft.evaluation") / "results.schema.json").read_text())


def check(results):
    jsonschema.validate(
        json.loads(json.dumps(results)), SCHEMA, cls=jsonschema.Draft202012Validator
    )


def rows(markdown, header):
    """Return the table under a header's line, as lists of cells."""
    lines = markdown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and header in line)
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return [table[0], *table[2:]]


def test_results_keep_the_schema(results, alone):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    content = as_json(results)
    check(content)
    check(as_json(alone))
    check({**content, "drift": None, "worst": [], "filters": {}, "means": {}})
    for spoil in (
        lambda r: r["verdict"].pop("status"),
        lambda r: r["verdict"].update(status="fine"),
        lambda r: r["tasks"]["mmlu"].pop("p_holm"),
        lambda r: r["tasks"]["mmlu"].update(lost_beyond_chance=3.0),
        lambda r: r["drift"].update(mean=None),
        lambda r: r["asked"]["mmlu"]["cut"]["after"].pop("answer"),
        lambda r: r.pop("verdict"),
        lambda r: r.update(unknown=1),
    ):
        spoilt = copy.deepcopy(content)
        spoil(spoilt)
        with pytest.raises(jsonschema.ValidationError):
            check(spoilt)


def test_results_read_back_are_equal(results, alone, tmp_path):
    for i, written in enumerate((results, alone)):
        write_json(tmp_path / f"{i}.json", as_json(written))
        assert read_json(tmp_path / f"{i}.json", Results, "") == written


def test_it_begins_with_the_verdict_and_the_table_that_proves_it(results):
    text = report.evaluation(results)
    assert text.startswith(
        "**Do not ship as it is:** gsm8k fell by 14.0 points (95%: 11.5 to 16.5; Holm-adjusted p "
    )
    assert text.splitlines()[0] == results.verdict.sentence
    headers, *table = rows(text, "smallest drop")
    assert " | ".join(headers) == (
        "task | items | base % | tuned % | change | 95% interval | p | Holm's p | lost, gained"
        " | smallest drop"
    )
    # The other filter beneath its task, without an adjusted p; then the other tasks, and the mean
    assert [row[0] for row in table] == [
        "gsm8k",
        "… flexible-extract",
        "mmlu",
        "ifeval",
        "mean: mine",
    ]
    assert [row[4] for row in table][:4] == ["**-14.0**", "+0.2", "**+5.2**", "-2.0"]
    assert [row[7] == "" for row in table] == [False, True, False, False, True]
    p, adjusted = (float(table[3][i]) for i in (6, 7))
    assert p == adjusted == 1
    assert float(table[2][7]) == pytest.approx(2 * float(table[2][6]), rel=0.1)
    assert (
        max(len(line) for line in text.splitlines() if line.startswith("|")) < 160
    )  # a table one can read


def test_one_task_has_one_p(results):
    results.tasks = task_results({"gsm8k": (700, 160, 20, 120)})
    results.filters, results.means = {}, {}
    text = report.evaluation(results)
    assert "Holm" not in "".join(rows(text, "smallest drop")[0])
    assert "p is below 0.05" in text
    assert "multiple choice |" not in text


def test_beyond_chance_has_its_interval(results):
    text = report.evaluation(results)
    [row] = rows(text, "known and lost")[1:]
    mmlu = results.tasks["mmlu"]
    lost, learned = mmlu.lost_beyond_chance, mmlu.gained_beyond_chance
    # Both models missed 820 items. If they guessed apart, more items than these would be lost
    assert lost.high < 0
    told = f"{learned.estimate:.0f} ({learned.low:.0f} to {learned.high:.0f})"
    assert row == ["mmlu", "2700", "none: they guess alike", told]


def test_what_was_asked(results):
    text = report.evaluation(results)
    assert "Asked with the chat template, thinking off, in bfloat16, seed 1234." in text
    headers = ["task", "version", "metric", "filter", "examples", "answer tokens"]
    assert rows(text, "prompts cut")[:3] == [
        [*headers, "prompts cut", "answers cut", "thoughts cut"],
        ["gsm8k", "3.0", "exact_match", "strict-match", "5", "256", "0, 0", "0, 17", "0, 0"],
        ["mmlu", "1.0, 2.0", "acc", "none", "0", "", "0, 0", "0, 0", "0, 0"],
    ]
    assert "read from /cache/eaft: of the base model: gsm8k, answers." in text
    assert "## Failed\n\n- aime24: OutOfMemoryError: out of memory" in text
    assert "No result of aime24" in text.splitlines()[0]
    results.protocol = replace(
        results.protocol, apply_chat_template=False, enable_thinking=None, limit=20
    )
    results.kept.base = []
    text = report.evaluation(results)
    assert (
        "Asked in plain text, without a chat template, in bfloat16, seed 1234, at most 20 items"
        in text
    )
    assert "/cache/eaft" not in text


def test_intervals_not_to_be_relied_on_are_named(results):
    text = report.evaluation(results)
    assert "not to be relied on" not in text
    results.drift = drift_results(prompts=31)
    results.tasks |= task_results({"tiny": (10, 3, 2, 4)})
    text = report.evaluation(results)
    assert "Fewer than 32 prompts: the interval is not to be relied on." in text
    assert "Fewer than 20 items, so that the interval is not to be relied on: tiny." in text


def test_one_model_alone(alone):
    text = report.evaluation(alone)
    assert text.startswith("# out\n")
    assert rows(text, "score %")[1] == ["gsm8k", "acc,none", "50", "48.0", "35.0 to 61.0"]
    assert rows(text, "prompts cut")[1][-2] == "17"
    assert "aime24: OutOfMemoryError" in text


def test_everything_failed(results):
    results = replace(results, tasks={}, filters={}, means={}, asked={}, worst=[], drift=None)
    results.verdict.sentence = "**Nothing was compared.**"
    text = report.evaluation(results)
    assert text.startswith("**Nothing was compared.**\n")
    assert "changes.png" not in text


def test_held_out_rows_are_shown_before_and_after(results, tmp_path):
    text = report.evaluation(results)
    found = rows(text, "held-out rows")[1]
    assert found == ["40", "80", "1.5000", "1.0000", "**-0.5000**", "-0.6000 to -0.4000", "0.001"]
    assert "rows_of_mine.jsonl" in text
    assert "was not checked" in text
    assert "    *four*\n" in text
    page = report.page(results, tmp_path)
    for shown in ("&lt;b&gt;How&lt;/b&gt; many?", "<pre>*four*</pre>", "<td>1.5000</td>"):
        assert shown in page
    assert "<b>How" not in page
    assert page.count('class="sides"') == 2  # of the row, and of the worst regression


def test_the_picture_is_coloured_by_what_is_shown(results, tmp_path, monkeypatch):
    """A change whose own interval leaves 0 out, but whose adjusted p is above 0.05, is grey."""
    kinds = {"fell": (500, 160, 20, 320), "rose": (500, 20, 160, 320), "unsure": (100, 9, 1, 100)}
    results.tasks, results.means = task_results(kinds), {}
    unsure = results.tasks["unsure"]
    results.tasks["unsure"] = replace(unsure, p_holm=3 * unsure.p_value)
    assert unsure.high < 0
    kept = []
    monkeypatch.setattr(report.plt, "close", kept.append)
    report.draw_changes(results, tmp_path / "changes.png")
    assert (tmp_path / "changes.png").read_bytes().startswith(b"\x89PNG")
    axis = kept[0].axes[0]
    colors = [matplotlib.colors.to_hex(c.lines[0].get_color()) for c in axis.containers]
    assert colors == [
        matplotlib.colors.to_hex(name) for name in ("tab:gray", "tab:green", "tab:red")
    ]  # from below
    monkeypatch.undo()
    plt.close(kept[0])


def test_end_tokens_are_shown_as_they_are(results):
    ends = Setting(base=["<|im_end|>"], model=["a`b", "</s>"])
    text = report.evaluation(replace(results, differs={"end_tokens": ends}))
    inline = [
        token
        for token in MarkdownIt().parse(text)
        if "differ in more than weights" in token.content
    ]
    found = [token.content for token in inline[0].children if token.type == "code_inline"]
    assert [json.loads(part) for part in found] == [ends.base, ends.model]
