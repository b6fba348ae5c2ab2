#!/usr/bin/env bash
# inspect_ai 0.3.285
# Behaviour: with multiple_choice(shuffle=True) (deprecated, and still in use) the log's conversation
#   and answer are not what was sent and received. After the model has answered, inspect_ai writes
#   the choices back in their order and replaces the model's answer by the letter that it would have
#   been. Only the events of the log have the real call.
# Whom it hurts: who reads `messages` or `output` of a log: to see which letter a model prefers, to
#   grade again, to train on the answers, or to check that two models were asked the same. Two runs
#   with other orders of choices look as if they were asked alike.
# Guess beforehand: `messages` is what the model was asked, and `output` is what it wrote.
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
from inspect_ai.log import read_eval_log
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import choice
from inspect_ai.solver import multiple_choice

print({"inspect_ai": version("inspect_ai")})


def always_a(*call):
    output = ModelOutput.from_content("mockllm/model", "I am sure of it.\nANSWER: A")
    output.usage = ModelUsage()  # else a tokenizer is downloaded, to count tokens
    return output


rows = [Sample(input=f"Which is number {i % 4}?", choices=list("0123"), target="ABCD"[i % 4]) for i in range(12)]
task = Task(dataset=MemoryDataset(rows), solver=multiple_choice(shuffle=True), scorer=choice())
model = get_model("mockllm/model", custom_outputs=always_a, memoize=False)
(log,) = eval(task, model=model, log_dir="logs", display="none")
samples = read_eval_log(log.location, resolve_attachments=True).samples
calls = [next(event for event in sample.events if event.event == "model") for sample in samples]
kept = [sample.output.completion for sample in samples]
sent = [sample.messages[0].text == call.input[0].text for sample, call in zip(samples, calls)]
print("what the model wrote, by the events:", sorted({call.output.completion for call in calls}))
print("what it wrote, by the log's output: ", sorted(set(kept)))
print(f"prompts in `messages` that are those sent: {sum(sent)} of {len(sent)}")
assert {call.output.completion for call in calls} == {"I am sure of it.\nANSWER: A"}
assert len(set(kept)) > 1 and not any("sure" in text for text in kept), "changed: answers are kept"
assert sum(sent) < len(sent), "changed: prompts are kept"
E
