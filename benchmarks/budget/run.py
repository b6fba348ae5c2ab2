"""
Train and measure the runs of the budget study; README.md says what is compared and by which rule.

    python -m benchmarks.budget.run ../shared/data
    python -m benchmarks.budget.run ../shared/data --setting gemma --arms sft eaft

from the repository's root. Goes on where it was stopped; each run's numbers are written to
benchmarks/budget/results/SETTING/ARM-SEED.json once they are whole.
"""

import argparse
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from benchmarks.budget.settings import (
    ARMS,
    GROUPS,
    REPORTED,
    RESULTS,
    SCREENING,
    SEEDS,
    SETTINGS,
    Setting,
)
from eaft.evaluation.comparable import comparable_models
from eaft.evaluation.drift import BaseAnswers, Share, answer_log_probs, read_prompts
from eaft.evaluation.measured_model import MeasuredModel, nll_of_rows
from eaft.evaluation.protocol import PROMPTS, Protocol
from eaft.provenance import environment, write_json
from eaft.training.apart import checkpoints, finished, parse_flags, run_train
from eaft.training.data import load_rows
from eaft.training.held_out import Row, prepare
from eaft.tuning.measure import Kept, LoadedFamily, Part
from eaft.tuning.plan import SCREENING_FILE
from eaft.tuning.points import Member, Point
from eaft.tuning.search import Search

BUDGETS = (0.02, 0.05, 0.1)
LOOKED_AT = 0.05  # the budget whose models are also measured on other data
INTERPOLATED = 8  # steps between the checkpoints that are interpolated
LONG = 12  # prompts whose drift is shown by position


def main() -> None:
    """Do every run of a setting that is not done, and that no other process has begun."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", type=Path, help="holds gsm8k_train.jsonl and others")
    parser.add_argument("--setting", choices=SETTINGS, default="gsm8k")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/budget"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    flags = parser.parse_args()
    setting, work = SETTINGS[flags.setting], flags.work_dir / flags.setting
    results = RESULTS / flags.setting
    for folder in (work, results):
        folder.mkdir(parents=True, exist_ok=True)
    model = setting.model()
    with FileLock(work / "data.lock"):
        setting.write(flags.data_dir, work / "data")
    for group in GROUPS:
        for seed in SEEDS:
            for arm in group:
                if arm in flags.arms:
                    one_run(setting, arm, seed, model, work, results / f"{arm}-{seed}.json")


def one_run(setting: Setting, arm: str, seed: int, model: str, work: Path, result: Path) -> None:
    """Train and measure one run, unless it is done or another process does it."""
    folder = work / f"{arm}-{seed}"
    try:
        with FileLock(work / f"{arm}-{seed}.lock", timeout=0):
            if result.is_file():
                return
            flags = flags_of(setting, arm, seed, model, folder, work / "data")
            train(flags, folder)
            numbers = {
                "setting": setting.title,
                "arm": arm,
                "seed": seed,
                "flags": setting.flags(arm),
                **measure(setting, flags, model, folder, work / "data"),
                "environment": environment(),
            }
            write_json(result, numbers)
            shutil.rmtree(folder)
    except Timeout:
        return


def flags_of(
    setting: Setting, arm: str, seed: int, model: str, folder: Path, data: Path
) -> dict[str, Any]:
    """Return the flags of `eaft train`."""
    return {
        **setting.flags(arm),
        "seed": seed,
        "model_name_or_path": model,
        "dataset_name": str(data / f"train-{seed}.jsonl"),
        "output_dir": str(folder),
    }


def train(flags: dict[str, Any], folder: Path) -> None:
    """Train a run to its end."""
    if folder.is_dir() and finished(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)
    arguments = []
    for name, value in flags.items():
        arguments += [f"--{name}", str(value)]
    if code := run_train(arguments, folder):
        raise SystemExit(f"{folder.name}: training ended with exit code {code}.")


def prepared(name: str, configs: list[Any], model: str, data: Path) -> list[Row]:
    """Return rows of a file as training prepares them; those cut to nothing are left out."""
    rows = load_rows(str(data / f"{name}.jsonl"), "text", name)
    return [row for row in prepare(rows, configs, model, name) if row["input_ids"]]


def base_of(model: str, max_new_tokens: int) -> MeasuredModel:
    """Return the base model, to be measured on answers of so many tokens at most."""
    protocol = Protocol(max_new_tokens=max_new_tokens, template_date="2026-11-29")
    return comparable_models(model, None, protocol, drift=True)[0]


def measure(
    setting: Setting, flags: dict[str, Any], model: str, folder: Path, data: Path
) -> dict[str, Any]:
    """Return a run's numbers: all that screening measured, and what reports the chosen models."""
    configs = parse_flags(flags)
    everyday = read_prompts(str(PROMPTS), REPORTED + LONG)
    bases = [base_of(model, tokens) for tokens in (48, 64)]
    screening = Part.of(
        bases[0],
        prepared("screening", configs, model, data),
        read_prompts(str(SCREENING_FILE), SCREENING),
    )
    reported = Part.of(bases[1], prepared("reported", configs, model, data), everyday[:REPORTED])
    for base in bases:
        base.free()
    other = OtherData(flags, model, data, everyday[REPORTED:]) if setting.others else None
    run = checkpoints(folder)
    family = LoadedFamily(bases[1], run, {})
    search = Search(Kept(folder / "screening.jsonl", screening, family), screening.base_nll.mean)
    steps = [checkpoint.step for checkpoint in run]
    for step in steps:
        search.at(step, 1.0)
    for budget in BUDGETS:
        search.run([step for step in steps if step % INTERPOLATED == 0], budget)
    chosen: dict[Member, dict[str, Any]] = {}
    choices = []
    for budget in BUDGETS:
        for way, member in ways(search, budget).items():
            choices.append(
                {"budget": budget, "way": way, "member": asdict(member) if member else None}
            )
            if member is not None and member not in chosen:
                chosen[member] = {}
    looked_at = [choice["member"] for choice in choices if choice["budget"] == LOOKED_AT]
    points = Kept(folder / "reported.jsonl", reported, family)
    for member, numbers in chosen.items():
        numbers["member"] = asdict(member)
        numbers["reported"] = summary(points(member))
        if other is not None and asdict(member) in looked_at:
            numbers |= other.measure(family.model(member))
    return {
        "base": {
            "screening_nll": screening.base_nll.mean,
            "nll": reported.base_nll.mean,
            **(other.base if other is not None else {}),
        },
        "screened": [
            {**asdict(p.member), "nll": p.nll.mean, "drift": p.drift.mean} for p in search.points
        ],
        "choices": choices,
        "chosen": list(chosen.values()),
    }


class OtherData:
    """
    Forgetting that is not of the kind that replay trains on, and drift by position.

    Attributes:
        base: what the base model's nll is (nats per token).
    """

    def __init__(self, flags: dict[str, Any], model: str, data: Path, prompts: list[Any]) -> None:
        wide = parse_flags({**flags, "max_length": 1024})  # this data is longer
        short, long = base_of(model, 64), base_of(model, 256)
        self.mmlu = prepared("mmlu", wide, model, data)
        self.pubmedqa = prepared("pubmedqa", wide, model, data)
        self.ifeval = short.answers(read_prompts(str(data / "ifeval.jsonl"), LONG))
        self.base = {
            "mmlu": mean(*short.nll(self.mmlu)),
            "pubmedqa": mean(*short.nll(self.pubmedqa)),
        }
        short.free()
        self.long = long.answers(prompts)
        long.free()

    def measure(self, model: Any) -> dict[str, Any]:
        """Return a model's nll and drift (nats per token)."""
        nll, pubmedqa = (nll_of_rows(model, rows, Share()) for rows in (self.mmlu, self.pubmedqa))
        return {
            "other": {"nll": mean(*nll), "drift": mean(*self.ifeval.drift(model))},
            "by_position": by_position(self.long, model),
            "pubmedqa": mean(*pubmedqa),
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
    main()
