#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0, torch 2.13.0
# Behaviour: a run that is resumed with another learning_rate or weight_decay goes on with the old
#   ones. They lie in the checkpoint's optimizer and scheduler, which are loaded after the new ones
#   are made. A larger max_steps does hold, with a first step at the old schedule's last rate: 0
#   after a linear one, so that this batch is passed over. Trainer warns of changed save and logging
#   steps, not of this.
# Whom it hurts: who lowers the rate after a spike of the loss, or turns decay off, and resumes: the
#   arguments and the saved training_args.bin show the new value, the weights get the old one.
# Guess beforehand: the arguments hold, since Trainer makes its optimizer and schedule of them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
"$work/venv/bin/python" - "$work" 2> "$work/log" <<'E' || { cat "$work/log"; exit 1; }
import sys
from importlib.metadata import version

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

print({name: version(name) for name in ("torch", "transformers", "accelerate")})
torch.manual_seed(0)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (64, 16)).tolist()]
old, new = dict(learning_rate=1e-3, weight_decay=0.1), dict(learning_rate=1e-5, weight_decay=0.0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)


def run(steps, resume, schedule, settings):
    out = f"{sys.argv[1]}/{schedule}"
    args = TrainingArguments(
        out, max_steps=steps, save_steps=4, logging_steps=1, per_device_train_batch_size=8,
        lr_scheduler_type=schedule, use_cpu=True, report_to=[], disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Trainer(LlamaForCausalLM(LlamaConfig(**sizes)), args, train_dataset=Dataset.from_list(rows))
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=f"{out}/checkpoint-4" if resume else None)
    return trainer


for schedule in ("constant", "linear"):
    run(4, False, schedule, old)
    trainer = run(8, True, schedule, new)
    rates = [log["learning_rate"] for log in trainer.state.log_history if log.get("learning_rate") is not None]
    decay = max(group["weight_decay"] for group in trainer.optimizer.param_groups)
    print(f"{schedule}: args say {trainer.args.learning_rate} and {trainer.args.weight_decay};",
          f"rates of the resumed steps {[f'{rate:.1e}' for rate in rates[4:]]}, weight decay {decay}")
    assert rates[4] == rates[3] if schedule == "constant" else rates[4] == 0 < rates[5]
    assert max(rates[4:]) > 20 * new["learning_rate"], "changed: the new rate is taken"
    assert decay == old["weight_decay"], "changed: the new decay is taken"
E
