"""
Seed faults, one after the other: the tests must notice each.

    .venv/bin/python benchmarks/mutants.py before --commit 96a7ce3
    .venv/bin/python benchmarks/mutants.py after

Each mutant changes one expression in a copy of a commit (by default the one that is checked out),
and runs the few tests that should fail then. Without a mutant these tests must pass. A commit must
have a mutant's expression once. If it does not, that is an error: change the mutant with the code.

Run this before and after you remove tests or make them shorter. It takes about six minutes, in one
process. Writes benchmarks/results/mutants.json and mutants.md, with a column for each name.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from eaft.provenance import environment, write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIMIT = 300  # seconds for the tests of one mutant
CAUGHT, MISSED = "caught", "MISSED"


class Mutant(NamedTuple):
    """
    A fault.

    Attributes:
        name: the fault in words.
        changes: expression -> what replaces it. White space does not count. If older commits word
            it differently, they have an entry of their own; the first that the commit has is used.
        tests: the files or tests below `tests/` that should fail, with spaces between them.
    """

    name: str
    changes: dict[str, str]
    tests: str


MUTANTS = [
    Mutant(
        "objective: top-K probabilities not renormalised",
        {"logits.topk(top_k, sorted=False).values.log_softmax(-1)": "log_probs.topk(top_k).values"},
        "objective/test_statistics.py::test_statistics_are_the_definitions",
    ),
    Mutant(
        "objective: eaft-sigmoid with the wrong sign",
        {"torch.sigmoid(steepness": "torch.sigmoid(-steepness"},
        "objective/test_gates.py::test_gate_is_its_formula_on_adversarial_logits",
    ),
    Mutant(
        "objective: one logit too many in the last segment of a row (torch)",
        {"columns >= width": "columns > width"},
        "objective/test_fused.py::test_the_largest_are_found_as_torch_finds_them",
    ),
    Mutant(
        "objective: every chunk takes the labels of the first",
        {"slice(rows.start + start, rows.start + stop)": "slice(start, stop)"},
        "objective/test_fused.py::test_equals_the_reference_function",
    ),
    Mutant(
        "objective: a new maximum rescales the sum of squares once, not twice (Triton)",
        {"scale * scale * squares + lane_sum": "scale * squares + lane_sum"},
        "objective/test_triton_backend.py::test_as_exact_as_plain_formulas_at_other_sizes",
    ),
    Mutant(
        "evaluation: drift counts the most likely tokens again in the rest",
        {'log_probs.scatter(-1, ids, float("-inf")).logsumexp': "log_probs.logsumexp"},
        "evaluation/test_drift.py",
    ),
    Mutant(
        "evaluation: an unpaired test of paired scores",
        {"stats.binomtest(lost, lost + gained).pvalue": "stats.mannwhitneyu(base, tuned).pvalue"},
        "evaluation/test_paired.py",
    ),
    Mutant(
        "evaluation: p-values not adjusted for the number of tests",
        {"* np.arange(len(p), 0, -1)": ""},
        "evaluation/test_verdict.py",
    ),
    Mutant(
        "evaluation: cache key without the chat template",
        {
            "special, tokenizer.chat_template, day]": "special, day]",
            "special, tokenizer.chat_template, asked]": "special]",
        },
        "evaluation/test_measured.py::test_a_change_of_the_model_is_a_new_key",
    ),
    Mutant(
        "evaluation: scores of different prompts are paired",
        {'"prompt_hash", "target_hash"': '"target_hash"'},
        "evaluation/test_evaluate.py::test_items_of_other_prompts_are_not_compared",
    ),
    Mutant(
        "evaluation: unfinished thoughts are graded as the answer",
        {"return None if began else text": "return text"},
        "evaluation/test_thinking.py",
    ),
    Mutant(
        "training: the head shifts labels, but not their examples",
        {"F.pad(example_ids[:, 1:], (0, 1))": "F.pad(example_ids[:, :-1], (1, 0))"},
        "training/test_head.py::test_equals_reference_on_full_logits",
    ),
    Mutant(
        "training: each micro-batch is divided by its own number of labels",
        {"labelled.sum() if num_items_in_batch is None": "labelled.sum() if True"},
        "training/test_patch.py::test_plain_trainer_accumulates_and_evaluates_plain_nll",
    ),
    Mutant(
        "training: the nll of a group of tokens without its mask",
        {
            '"high_nll": nll * high': '"high_nll": nll',
            "[group, nll * group]": "[group, nll]",
        },
        "training/test_trainer.py::test_metrics_are_those_of_the_tokens",
    ),
    Mutant(
        "training: prepared rows lose those without a label",
        {"np.where(labels == -100, UNLABELLED, labels)": "labels"},
        "training/test_prepare.py",
    ),
    Mutant(
        "training: replay takes answers that were cut at the limit",
        {"len(answer.answer_ids) < ANSWER_TOKENS": "len(answer.answer_ids) <= ANSWER_TOKENS"},
        "training/test_replay.py::test_answers_that_do_not_end_are_left_out",
    ),
    Mutant(
        "training: the plan does not shard the optimizer states",
        {"trainable * states / launch.optimizer": "trainable * states"},
        "training/test_plan.py::test_memory_by_hand",
    ),
    Mutant(
        "training: the first checkpoint over the drift budget is kept",
        {"trained[over - 1] if over": "trained[min(over, len(trained) - 1)] if over"},
        "training/test_forgetting.py::test_rules_by_hand",
    ),
    Mutant(
        "training: the row before an excluded one is removed",
        {"if row not in excluded": "if row + 1 not in excluded"},
        "training/test_exclude_examples.py",
    ),
    Mutant(
        "comparison: held-out rows may be trained on",
        {
            "if (asked := question(row, text_field)) in places": "if (asked := None)",
            'if json.dumps(row["prompt"]) in trained': "if False",
        },
        "comparison/test_compare.py::test_rows_that_are_trained_on_cannot_choose",
    ),
    Mutant(
        "comparison: fronts are interpolated from the wrong end",
        {"(1 - share) * drift[:, [k - 1]] + share *": "share * drift[:, [k - 1]] + (1 - share) *"},
        "comparison/test_fronts.py::test_a_front_is_the_least_drift_at_a_target_at_least_so_good",
    ),
    Mutant(
        "comparison: no variance between seeds",
        {"math.sqrt(by_seed + by_item)": "math.sqrt(by_item)"},
        "comparison/test_differences.py::test_variances_by_hand",
    ),
    Mutant(
        "inspection: the last example of a batch loses its first token",
        {"values[starts[-1] :]": "values[starts[-1] + 1 :]"},
        "inspection/test_checks.py",
    ),
    Mutant(
        "inspection: a box in the viewer holds its upper side",
        {"{column}::DOUBLE < ?": "{column}::DOUBLE <= ?"},
        "inspection/test_queries.py",
    ),
]


def main() -> None:
    """Try the mutants on a commit, and write which of them the tests noticed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the column in the results, such as before or after")
    parser.add_argument("--commit", default="HEAD", help="where sources and tests are taken from")
    parser.add_argument("--only", default="", help="part of a mutant's name; nothing is written")
    parser.add_argument("--note", default="", help="a sentence for the results")
    args = parser.parse_args()
    show = ["git", "rev-parse", "--short=12", args.commit]
    commit = subprocess.run(show, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as name:
        archive = ["git", "archive", commit.strip()]
        files = subprocess.run(archive, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", name], input=files, check=True)
        found = try_all(Path(name), [mutant for mutant in MUTANTS if args.only in mutant.name])
    if not args.only:
        write_results({"name": args.name, "commit": commit.strip(), "note": args.note, **found})
    if any(row["result"] != CAUGHT for row in found["mutants"].values()):
        sys.exit(1)


def try_all(folder: Path, mutants: list[Mutant]) -> dict[str, Any]:
    """Return what each mutant came to in a copy of a commit; the tests must pass without any."""
    began = time.perf_counter()
    code = run_tests(folder, " ".join(mutant.tests for mutant in mutants), limit=4 * LIMIT)
    if code != 0:
        sys.exit(f"The tests must pass before a fault is seeded, and pytest returned {code}.")
    found = {}
    unmutated = round(time.perf_counter() - began, 1)
    print(f"{unmutated:6.1f} s  no fault: the tests pass", flush=True)
    for mutant in mutants:
        began = time.perf_counter()
        result = try_one(folder, mutant)
        seconds = round(time.perf_counter() - began, 1)
        print(f"{seconds:6.1f} s  {mutant.name}: {result}", flush=True)
        found[mutant.name] = {"tests": mutant.tests, "result": result, "seconds": seconds}
    return {"seconds_without_fault": unmutated, "mutants": found}


def try_one(folder: Path, mutant: Mutant) -> str:
    """Seed a fault, run its tests and undo it; return `CAUGHT`, `MISSED` or what went wrong."""
    sources = {file: file.read_text() for file in (folder / "src").rglob("*.py")}
    for expression in mutant.changes:
        parts = re.findall(r"\w+|[^\w\s]", expression)
        pattern = re.compile(r"\s*".join(map(re.escape, parts)))
        places = [(file, m) for file, text in sources.items() for m in pattern.finditer(text)]
        if places:
            break
    if len(places) != 1:
        return f"error: the commit has its expression {len(places)} times"
    ((file, place),) = places
    text = sources[file]
    file.write_text(text[: place.start()] + mutant.changes[expression] + text[place.end() :])
    code = run_tests(folder, mutant.tests, LIMIT)
    file.write_text(text)
    return {0: MISSED, 1: CAUGHT}.get(code, f"error: pytest returned {code}")


def run_tests(folder: Path, tests: str, limit: float) -> int:
    """Return pytest's exit code: 0 if all tests pass, 1 if one fails; -1 if they take too long."""
    files = [str(folder / "tests" / test) for test in dict.fromkeys(tests.split())]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    with tempfile.TemporaryDirectory() as cache:
        # No bytecode, which is told apart by size and second; no data that another fault prepared
        changes = {"PYTHONDONTWRITEBYTECODE": "1", "HF_DATASETS_CACHE": cache}
        changes |= {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
        own = {name: value for name, value in os.environ.items() if name != "EAFT_CACHE"} | changes
        try:
            done = subprocess.run(command, cwd=folder, env=own, capture_output=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return -1
    if done.returncode not in (0, 1):
        print(done.stdout.decode()[-2000:], done.stderr.decode()[-2000:])
    return done.returncode


def write_results(run: dict[str, Any]) -> None:
    """Write a run into the results, in place of one of the same name, and a table of all runs."""
    file = RESULTS / "mutants.json"
    runs = {run["name"]: run for run in json.loads(file.read_text())} if file.is_file() else {}
    runs[run["name"]] = {**run, "environment": environment()}
    write_json(file, list(runs.values()))
    lines = ["Faults that `benchmarks/mutants.py` seeds, and whether the tests notice them.", ""]
    for run in runs.values():
        rows = run["mutants"].values()
        caught = sum(row["result"] == CAUGHT for row in rows)
        minutes = (run["seconds_without_fault"] + sum(row["seconds"] for row in rows)) / 60
        lines.append(
            f"- {run['name']}: commit {run['commit']}, {caught} of {len(rows)} caught, "
            f"{minutes:.1f} minutes in one process ({run['environment']['cpu']}). {run['note']}"
        )
    table: list[list[Any]] = []
    for name in dict.fromkeys(name for run in runs.values() for name in run["mutants"]):
        found = [run["mutants"].get(name, {}) for run in runs.values()]
        table.append([name, *(row.get(key) for row in found for key in ("result", "seconds"))])
    headers = ["fault", *(head for name in runs for head in (name, "seconds"))]
    lines += ["", tabulate(table, headers, tablefmt="github", disable_numparse=True), ""]
    (RESULTS / "mutants.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
