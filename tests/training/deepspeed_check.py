"""
A few steps of training: run in two ranks by test_distributed.py, for DeepSpeed, and repeated in
one process.
"""

import json
import os
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig

from eaft import EAFTConfig, EAFTTrainer
from tests.conftest import make_rows, make_tokenizer


def train(model_dir: str, out: str, gate: str, adapter: bool) -> list[dict[str, float]]:
    """Return the logs of four steps, with LoRA if there is to be an `adapter`."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    prompts = Path(model_dir).with_name("prompts.jsonl")
    # Not test_fsdp2's, whose answers are kept: sampled in other batches they are others
    prompts.write_text("".join(f'{{"prompt": "tell {i}"}}\n' for i in range(3)))
    args = EAFTConfig(
        out,
        gate=gate,
        max_steps=4,
        per_device_train_batch_size=4 // world,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        forgetting_eval_steps=2,
        forgetting_suite=[] if world == 1 else None,
        forgetting_prompts=str(prompts),
    )
    trainer = EAFTTrainer(
        model_dir,
        args=args,
        train_dataset=Dataset.from_list(make_rows()),
        processing_class=make_tokenizer(),
        # The head is trained whole, so that the reference's is another parameter
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        if adapter
        else None,
    )
    generator = torch.Generator().manual_seed(
        0
    )  # ZeRO-3 loads a model with other calls of torch's own
    for name, parameter in trainer.model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(parameter, generator=generator)
    trainer.train()
    assert world == 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    return trainer.state.log_history


def main(model_dir: str, out: str, gate: str, trained: str) -> None:
    """Train as one rank of several."""
    import deepspeed

    # else it compiles an operation for CPUs, for minutes, if it finds a compiler
    deepspeed.ops.__compatible_ops__ = {}
    logs = train(model_dir, out, gate, trained == "LoRA")
    if torch.distributed.get_rank() == 0:
        Path(out, "logs.json").write_text(json.dumps(logs))
