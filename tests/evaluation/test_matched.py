"""
`eaft eval --from`: logs that lm-eval and inspect_ai wrote here; what does not match is refused.
"""

import functools
import itertools
import json
import math
import random
import re
import shlex
import shutil
import sys
from pathlib import Path

import jsonschema
import pytest

from eaft import cli
from eaft.evaluation import results
from eaft.evaluation.matched import compare_logs, matched
from eaft.evaluation.read_logs import read_log
from eaft.evaluation.results import Results, as_json
from eaft.files import read_json
from eaft.inspection.view.runs import Runs
from tests.conftest import make_model

ROOT = Path(__file__).parents[2]
SCHEMA = Path(results.__file__).with_name("results.schema.json")
COMMANDS = re.findall(
    r"^    (lm_eval .*|eaft eval --from .*)$",
    (ROOT / "docs/evaluation.md").read_text().replace("\\\n", ""),
    re.MULTILINE,
)
ROWS = 30


def write_tasks(folder):
    """
    A group of two tasks of choices, and a task to be answered twice in words, read in two ways.
    """
    rows = [
        {"question": f"{i}?", "choices": ["a", "bb", "c"], "answer": i % 3} for i in range(ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (
        "dataset_path: json\ndataset_kwargs: {data_files: {test:"
        f" {folder}/rows.jsonl}}}}\ntest_split: test\nmetadata: {{version: 1}}\n"
    )
    for name in ("left", "right"):
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\n{data}output_type: multiple_choice\n"
            f'doc_to_text: "{name} {{{{question}}}}"\n'
            'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
        )
    (folder / "sides.yaml").write_text(
        "group: sides\ntask: [left, right]\naggregate_metric_list: [{metric: acc}]\n"
    )
    (folder / "words.yaml").write_text(
        f'task: words\n{data}output_type: generate_until\ndoc_to_text: "{{{{question}}}}"\n'
        'doc_to_target: "{{question}}"\nnum_fewshot: 1\nfewshot_split: test\nrepeats: 2\n'
        "generation_kwargs: {max_gen_toks: 2, until: [zzz], do_sample: true, temperature: 1.0}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        "filter_list: [{name: strict, filter: [{function: take_first}]}, {name: first, filter:"
        ' [{function: regex, regex_pattern: "(.)"}, {function: take_first}]}]\n'
    )


@pytest.fixture(scope="module")
def lm_eval_logs(tmp_path_factory, tokenizer):
    """The folder in which lm-eval's own command, as the docs have it, wrote logs of two models."""
    import lm_eval.tasks
    from lm_eval.__main__ import cli_evaluate

    folder = tmp_path_factory.mktemp("lm_eval")
    for seed, name in enumerate(("Qwen/Qwen3-0.6B", "out")):
        make_model(seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_tasks(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", str)  # takes seconds
        manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
        patch.setattr("lm_eval.tasks.TaskManager", manager)  # else it reads 13,000 files
        for command in COMMANDS[:2]:
            words = shlex.split(command.replace("gsm8k", "sides,words"))
            flags = ["--include_path", ".", "--device", "cpu", "--batch_size", "30"]
            patch.setattr(sys, "argv", [*words, *flags])
            cli_evaluate()
    return folder


def samples_of(folder, task):
    """The file of a task's samples in a folder that lm-eval wrote, and its lines."""
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    return file, [json.loads(line) for line in file.read_text().splitlines()]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def binomial_p(lost, gained):
    """McNemar's exact p, two-sided, from the definition."""
    n, k = lost + gained, min(lost, gained)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def test_two_runs_of_lm_eval(lm_eval_logs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(lm_eval_logs)
    words = shlex.split(COMMANDS[2])[1:]
    assert cli.main([*words[:4], "--output_path", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out/results.json").read_text())
    jsonschema.validate(content, json.loads(SCHEMA.read_text()))
    assert as_json(read_json(tmp_path / "out/results.json", Results, "")) == content
    assert list(content["tasks"]) == ["sides", "words"]

    lost = gained = 0
    own = []
    for name in ("left", "right"):
        base, tuned = (
            {row["doc"]["question"]: row["acc"] for row in samples_of(Path("logs", side), name)[1]}
            for side in ("base", "out")
        )
        lost += sum(base[question] > tuned[question] for question in base)
        gained += sum(base[question] < tuned[question] for question in base)
    for side in ("base", "out"):
        (file,) = Path("logs", side).rglob("results_*.json")
        own.append(json.loads(file.read_text()))
    change = content["tasks"]["sides"]
    assert (change["lost"], change["gained"], change["n"]) == (lost, gained, 2 * ROWS)
    assert lost + gained > 5
    assert change["p_value"] == pytest.approx(binomial_p(lost, gained))
    for side, written in zip(("before", "after"), own, strict=True):
        assert change[side] == pytest.approx(written["results"]["sides"]["acc,none"])
    assert content["filters"]["words"]["first"]["n"] == content["tasks"]["words"]["n"] == ROWS
    assert content["asked"]["words"]["num_fewshot"] == 1
    assert content["asked"]["words"]["max_gen_toks"] == 2

    source = content["source"]
    assert (source["tool"], source["base"]["path"]) == ("lm-eval", "logs/base")
    assert source["base"]["version"] == own[0]["lm_eval_version"]
    assert (content["base"], content["model"]) == ("Qwen/Qwen3-0.6B", "out")
    assert "Asked by lm-eval" in capsys.readouterr().out
    assert (tmp_path / "out/changes.png").is_file()
    runs = Runs(tmp_path)  # of `eaft view`
    (entry,) = runs.entries()
    assert (entry.kind, entry.sentence) == ("eval", content["verdict"]["sentence"])
    assert len(runs.items("out", 0).entries) == 3 * ROWS
    assert "Asked by lm-eval" in (tmp_path / "out/report.html").read_text()


def test_the_order_of_files_does_not_matter(lm_eval_logs, tmp_path):
    shutil.copytree(lm_eval_logs / "logs", tmp_path / "shuffled")
    random.seed(0)
    for file in (tmp_path / "shuffled").rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        random.shuffle(rows)
        if "/out/" in str(file):  # as of a run whose rows have other numbers
            rows = [{**row, "doc_id": ROWS - row["doc_id"]} for row in rows]
        write(file, rows)
    both = []
    for logs in (lm_eval_logs / "logs", tmp_path / "shuffled"):
        out = tmp_path / f"{logs.name} compared"
        results = as_json(compare_logs(str(logs / "base"), str(logs / "out"), str(out)))
        for run in ("base", "model"):
            results["source"][run].pop("path")
        both.append({k: v for k, v in results.items() if k not in ("output_path", "environment")})
    assert both[0] == both[1]


def change_rows(**values):
    """Set fields of the first sample of a file."""
    return lambda rows: [{**rows[0], **values}, *rows[1:]]


def change_prompt(rows):
    rows[0]["arguments"]["gen_args_0"]["arg_0"] += " "
    return rows


def change_generation(rows):
    rows[0]["arguments"]["gen_args_0"]["arg_1"]["temperature"] = 0.5
    return rows


@pytest.mark.parametrize(
    ("rows", "settings", "reason"),
    [
        (change_prompt, {}, "another prompt in the tuned model's (the first: item 0)"),
        (change_rows(target="x"), {}, "1 of 30 items have another target"),
        (lambda rows: [r for r in rows if r["doc_id"]], {}, "1 items are only in the base's log"),
        (change_rows(exact_match="?"), {}, "1 items have no score in the tuned model's"),
        (change_rows(exact_match=1.0), {}, "items are missing or were changed"),
        (change_generation, {}, "temperature is 1.0 in the base's log and 0.5"),
        (None, {"versions": 2}, "the task version is 1 in the base's log and 2 in"),
        (None, {"n-shot": 5}, "few-shot examples is 1 in the base's log and 5 in"),
        (None, {"results": {}}, "metric exact_match,strict is missing"),
        (None, {"configs": {"repeats": 3}}, "made or graded in another way"),
    ],
)
def test_what_does_not_match_is_refused(lm_eval_logs, tmp_path, rows, settings, reason):
    shutil.copytree(lm_eval_logs / "logs/out", tmp_path / "out")
    if rows:
        file, old = samples_of(tmp_path / "out", "words")
        write(file, rows(old))
    (file,) = (tmp_path / "out").rglob("results_*.json")
    content = json.loads(file.read_text())
    for key, value in settings.items():
        content[key]["words"] = value
    file.write_text(json.dumps(content))
    base = read_log(str(lm_eval_logs / "logs/base"))
    _, _, asked, failed = matched(base, read_log(str(tmp_path / "out")))
    assert list(asked) == ["sides"]
    assert list(failed) == ["words"]
    assert reason in failed["words"]
    assert "\n" not in failed["words"]


def test_bad_input_is_one_line(lm_eval_logs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, out = (str(lm_eval_logs / "logs" / side) for side in ("base", "out"))
    for flags, told in (
        ([base, "nowhere"], "there is no nowhere"),
        ([base, str(tmp_path)], "holds no log"),
        ([base, str(lm_eval_logs / "logs")], "holds task"),
        ([base, out, "--suite", "math"], "--suite would do nothing"),
        ([base, out, "--max_drop", "-1"], "--max_drop"),
    ):
        assert cli.main(["eval", "--from", *flags]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
    shutil.copytree(lm_eval_logs / "logs/out", "changed")
    file, rows = samples_of(Path("changed"), "words")
    write(file, change_prompt(rows))
    assert cli.main(["eval", "--from", base, "changed"]) == 1
    assert "- words: 1 of 30 items have another prompt" in capsys.readouterr().out
    for name in ("left", "right"):
        samples_of(Path("changed"), name)[0].unlink()
    assert cli.main(["eval", "--from", base, "changed", "--output_path", "compared"]) == 2
    assert "no task can be compared. " in capsys.readouterr().err
    assert not Path("compared").exists()


def exact_swap_p(before, after):
    """The share of all swaps of the two models' scores with a sum as far from 0."""
    differences = [t - b for b, t in zip(before, after, strict=True) if t != b]
    total = abs(sum(differences))
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(value >= total - 1e-9 for value in sums) / len(sums)


EPOCHS = {"base": [[1, 1], [1, 0], [1, 1], [0, 1], [1, 1], [0, 0]]}  # right, by row and epoch
EPOCHS["tuned"] = [[0, 1], [0, 0], [1, 0], [1, 0], [0, 0], [1, 1]]


@pytest.fixture(scope="module")
def inspect_log(tmp_path_factory):
    """A function that lets inspect_ai ask its mock model, and returns the path of the log."""
    pytest.importorskip("inspect_ai", reason="needs inspect-ai: pip install 'eaft[inspect-ai]'")
    from inspect_ai import Task, eval
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import ModelOutput, ModelUsage, get_model
    from inspect_ai.scorer import includes, match
    from inspect_ai.solver import generate, system_message

    def run(right, epochs=2, system="Be brief.", order=range(6)):
        turn = [iter(row) for row in right]

        def answer(messages, *rest):
            row = int(messages[-1].text.split()[0])
            text = f"{row + 1}" if next(turn[row]) else f"{row + 1}, or not"
            output = ModelOutput.from_content("mockllm/model", text)
            output.usage = ModelUsage()  # else inspect_ai fetches a tokenizer to count tokens
            return output

        samples = [Sample(input=f"{i} plus 1 is", target=str(i + 1)) for i in order]
        task = Task(
            dataset=MemoryDataset(samples),
            solver=[system_message(system), generate()],
            scorer=[match(), includes()],
            epochs=epochs,
            name="sums",
        )
        (log,) = eval(
            task,
            model=get_model("mockllm/model", custom_outputs=answer, memoize=False),
            log_dir=str(tmp_path_factory.mktemp("logs")),
            log_realtime=False,
            display="none",
        )
        return log.location

    return run


@pytest.fixture(scope="module")
def base_log(inspect_log):
    return inspect_log(EPOCHS["base"])


def test_epochs_of_inspect_are_one_item(inspect_log, base_log, tmp_path):
    tuned_log = inspect_log(EPOCHS["tuned"], order=[5, 3, 4, 0, 1, 2])
    results = compare_logs(base_log, tuned_log, str(tmp_path / "out"), max_drop=1)
    before, after = ([sum(row) / 2 for row in EPOCHS[side]] for side in ("base", "tuned"))
    change = results.tasks["sums"]
    assert (change.n, change.metric) == (6, "accuracy,match")
    assert change.before == pytest.approx(sum(before) / 6)
    assert change.after == pytest.approx(sum(after) / 6)
    assert (change.lost, change.gained) == (4, 1)
    assert change.p_value == pytest.approx(exact_swap_p(before, after))
    assert results.filters["sums"]["includes"].change == 0  # every answer has the number in it
    assert (results.source.tool, results.failed) == ("inspect_ai", {})
    assert results.source.base.version
    lines = (tmp_path / "out/items_after/sums.jsonl").read_text().splitlines()
    items = {item["prompt"]: sorted(item["repeats"]) for item in map(json.loads, lines)}
    assert items == {
        f"Be brief.\n\n{i} plus 1 is": sorted(map(float, row))
        for i, row in enumerate(EPOCHS["tuned"])
    }
    jsonschema.validate(as_json(results), json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"system": "Be long."}, "6 of 6 items have another prompt"),
        ({"epochs": 1}, "2 times in the base's log and 1 times"),
    ],
)
def test_what_inspect_asked_otherwise_is_refused(inspect_log, base_log, changed, reason):
    tuned_log = inspect_log(EPOCHS["base"], **changed)
    _, _, asked, failed = matched(read_log(base_log), read_log(tuned_log))
    assert not asked
    assert reason in failed["sums"]
