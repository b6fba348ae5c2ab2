#!/usr/bin/env bash
# transformers 5.23.0, schedulefree 1.4.1, accelerate 1.15.0, torch 2.13.0
# Behaviour: with optim="schedule_free_adamw" or "schedule_free_sgd", Trainer hands warmup_steps to
#   the optimizer as it is. As a share of the steps, which it may be since warmup_ratio went, 0.03
#   is a warm-up of 0.03 steps: the first step is 33 times as large as the rate. Logs show the rate.
#   And Trainer calls optimizer.eval() to evaluate, but not to save: a checkpoint has the averaged
#   weights if an evaluation came right before it, and else the point where gradients are taken.
# Whom it hurts: who warms up in the usual way, with the constant schedule that this optimizer asks
#   for: the pretrained weights are thrown about in the first step. Who saves without evaluating:
#   the model in the folder is not the one that trainer.evaluate() measures.
# Guess beforehand: a share means the same for all optimizers, and saves are of the averaged model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 accelerate==1.15.0 schedulefree==1.4.1
"$work/venv/bin/python" - "$work" 2> "$work/log" <<'E' || { cat "$work/log"; exit 1; }
import sys
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

print({name: version(name) for name in ("torch", "transformers", "schedulefree")})
torch.manual_seed(0)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (64, 16)).tolist()]
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
RATE = 1e-3


class FirstStep(TrainerCallback):
    def on_step_begin(self, args, state, control, model, **rest):
        if state.global_step == 0:
            self.before = [weight.detach().clone() for weight in model.parameters()]

    def on_step_end(self, args, state, control, model, **rest):
        if state.global_step == 1:
            moves = zip(model.parameters(), self.before, strict=True)
            self.move = max((new.detach() - old).abs().max().item() for new, old in moves)


def run(optim, steps, **settings):
    torch.manual_seed(0)
    args = TrainingArguments(
        sys.argv[1] + "/run", optim=optim, max_steps=steps, learning_rate=RATE, lr_scheduler_type="constant",
        per_device_train_batch_size=16, logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, **settings,
    )  # fmt: skip
    first = FirstStep()
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows, callbacks=[first])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer, first.move / RATE


moves = {}
for warmup in (0, 3, 0.03):  # 0.03 of 100 steps is 3
    trainer, moves[warmup] = run("schedule_free_adamw", 100, warmup_steps=warmup, save_strategy="no")
    logs = [log for log in trainer.state.log_history if "loss" in log]
    print(f"warmup_steps={warmup}: the first step moves weights by {moves[warmup]:.2f} times the rate;",
          f"the log says rate {logs[0]['learning_rate']}, losses {[round(log['loss'], 2) for log in logs[:3]]}")
saved = {}
for optim in ("adamw_torch", "schedule_free_adamw"):
    for when in ("no", "steps"):
        trainer, _ = run(optim, 20, save_steps=20, eval_steps=20, eval_strategy=when)
        saved[when] = LlamaForCausalLM.from_pretrained(f"{trainer.args.output_dir}/checkpoint-20")
    pairs = zip(saved["no"].parameters(), saved["steps"].parameters(), strict=True)
    saved[optim] = max((one - other).abs().max().item() for one, other in pairs) / RATE
    print(f"{optim}: checkpoint without and with an evaluation before: differ by {saved[optim]:.2f} times the rate")
assert 0.99 < moves[0] < 1.01 and moves[3] < 0.34
assert moves[0.03] > 30, "changed: a share of the steps is a share"
assert saved["adamw_torch"] == 0
assert saved["schedule_free_adamw"] > 0.1, "changed: saves are of the averaged model"
E
