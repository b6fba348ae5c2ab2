#!/usr/bin/env bash
# lm-eval 0.4.13, datasets 5.2.0, torch 2.13.0
# Behaviour: the few-shot examples of an item depend on how many processes share the work. Each
#   process draws its items' examples from one generator with the same seed, item after item, so the
#   k-th item of each process gets the k-th draw. With the same seed another number of processes
#   asks most items with other examples; and with --samples, which items were left out counts too.
#   Tasks that take the first examples (mmlu) are not affected, those that draw (gsm8k) are.
# Whom it hurts: who measures the base model on one GPU and the tuned one on eight: prompts differ,
#   and a comparison item by item is none. Scores of two machines differ beyond rounding.
# Guess beforehand: the seed and the item decide an item's examples.
# Shown without a model: by the requests that lm-eval builds for each process.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q lm-eval==0.4.13 datasets==5.2.0
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf"
"$work/venv/bin/python" - "$work" 2> "$work/log" <<'E' || { cat "$work/log"; exit 1; }
import json
import sys
from importlib.metadata import version

from lm_eval.tasks import TaskManager

print({name: version(name) for name in ("lm-eval", "datasets", "torch")})
work = sys.argv[1]
with open(f"{work}/rows.jsonl", "w") as file:
    for i in range(40):
        file.write(json.dumps({"q": f"{i} plus {i} is", "a": str(2 * i)}) + "\n")
with open(f"{work}/sums.yaml", "w") as file:
    file.write(f"task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {work}/rows.jsonl}}}}\n")
    file.write("test_split: test\nfewshot_split: test\nnum_fewshot: 2\noutput_type: generate_until\n")
    file.write("doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n")


def prompts(processes, samples=None):
    """Each item's prompt, as the processes that share the work ask it."""
    found = {}
    for rank in range(processes):
        manager = TaskManager(include_path=work, include_defaults=False)
        task = manager.load(["sums"])["tasks"]["sums"]
        task.set_fewshot_seed(1234)  # what lm-eval's command does
        task.build_all_requests(rank=rank, world_size=processes, samples=samples)
        for request in task.instances:
            row = samples[request.doc_id] if samples else request.doc_id
            found[row] = request.arguments[0]
    return found


one, again, two = prompts(1), prompts(1), prompts(2)
part = prompts(1, samples=list(range(1, 40)))
print("item 1, one process: ", repr(one[1]))
print("item 1, two processes:", repr(two[1]))
others = {name: sum(one[i] != made[i] for i in made) for name, made in (("two", two), ("part", part))}
print(f"asked with other examples: {others['two']} of {len(two)} items by two processes,")
print(f"{others['part']} of {len(part)} if only the first item is left out; the same way again:", one == again)
assert sorted(two) == sorted(one) and one == again
assert others["two"] > 30 and others["part"] > 30, "changed: examples depend on seed and item alone"
E
