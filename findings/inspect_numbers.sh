#!/usr/bin/env bash
# inspect_ai 0.3.285
# Behaviour: the scorers that inspect_ai has for numbers take wrong numbers for right ones.
#   match(numeric=True) writes both numbers with 5 significant digits and compares these texts, so
#   that digits after the fifth do not count; the log shows such an answer as 1.2346e+06. exact(),
#   f1() and match() drop a minus sign as punctuation: 7 is an "exact" match of -7.
# Whom it hurts: who measures arithmetic: a model that gets the last digits of each product wrong,
#   as small models do, has an accuracy of 1.0; by the other scorers, one that loses each sign.
# Guess beforehand: numbers match when they are equal, and "exact" means no less.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q inspect-ai==0.3.285
cd "$work"
"$work/venv/bin/python" - 2> "$work/log" <<'E' || { cat "$work/log"; exit 1; }
from importlib.metadata import version

from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import exact, f1, match

print({"inspect_ai": version("inspect_ai")})
SCORERS = {"match(numeric=True)": match(numeric=True), "match()": match(), "exact()": exact(), "f1()": f1()}


def score(what, right, wrong):
    rows = [Sample(input=f"Item {i}", target=str(number)) for i, number in enumerate(right)]
    said = dict(zip((row.input for row in rows), map(str, wrong)))

    def answer(messages, *rest):
        output = ModelOutput.from_content("mockllm/model", said[messages[-1].text])
        output.usage = ModelUsage()  # else a tokenizer is downloaded, to count tokens
        return output

    task = Task(dataset=MemoryDataset(rows), scorer=list(SCORERS.values()))
    model = get_model("mockllm/model", custom_outputs=answer, memoize=False)
    (log,) = eval(task, model=model, log_dir="logs", display="none")
    found = [next(iter(part.metrics.values())).value for part in log.results.scores]
    first = log.samples[0].scores["match"].answer
    print(f"{what}: {right[0]} is right, the model says {wrong[0]}, and the log has {first!r}")
    print(f"  all {len(rows)} answers are wrong; accuracy or mean:", dict(zip(SCORERS, found, strict=True)))
    return dict(zip(SCORERS, found, strict=True))


products = [a * b for a in (6174, 7340, 8513, 9687) for b in (5231, 6899, 7777)]
large = score("products of 4 digits", products, [product + 7 for product in products])
products = [a * b for a in (61, 73, 85, 96) for b in (52, 68, 77)]
small = score("products of 2 digits", products, [product + 7 for product in products])
signs = score("differences", [-number for number in range(7, 19)], list(range(7, 19)))
assert large["match(numeric=True)"] == 1.0, "changed: more than 5 digits count"
assert small["match(numeric=True)"] == large["exact()"] == 0.0
assert signs["exact()"] == signs["f1()"] == signs["match()"] == 1.0, "changed: the sign counts"
assert signs["match(numeric=True)"] == 0.0
E
