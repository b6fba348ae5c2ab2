"""A whole results.json of `eaft eval`, as it is written."""

from dataclasses import asdict

import numpy as np
import pytest

from eaft.evaluation.drift import summarise
from eaft.evaluation.paired import holm, mean_change, paired_change
from eaft.evaluation.verdict import judge


def scores(both, lost, gained, neither):
    """Scores before and after: items right for both, before only, after only, for neither."""
    return np.repeat([1.0, 1, 0, 0], [both, lost, gained, neither]), np.repeat(
        [1.0, 0, 1, 0], [both, lost, gained, neither]
    )


def task_results(kinds, choices=()):
    """
    `tasks` of results, from each task's counts (see `scores`); those named in `choices` have four.
    """
    found = {
        name: paired_change(*scores(*kind), np.full(sum(kind), 4) if name in choices else None)
        for name, kind in kinds.items()
    }
    adjusted = holm([change.p_value for change in found.values()])
    return {
        name: {"metric": "acc,none", **asdict(change), "p_holm": p}
        for (name, change), p in zip(found.items(), adjusted, strict=True)
    }


def drift_results(mean=0.05, prompts=128):
    """`drift` of results, skewed over prompts."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 65, size=prompts)
    per_prompt = rng.lognormal(0, 0.5, size=prompts)
    return summarise(mean * per_prompt * tokens / (per_prompt @ tokens / tokens.sum()), tokens)


@pytest.fixture
def results():
    """
    Results in which GSM8K fell, but only as it is read strictly, MMLU rose, IFEval is small, and
    AIME failed.
    """
    kinds = {"gsm8k": (700, 160, 20, 120), "mmlu": (1500, 120, 260, 820), "ifeval": (20, 4, 3, 23)}
    tasks = task_results(kinds, ["mmlu"])
    tasks["gsm8k"]["metric"] = "exact_match,strict-match"
    cut = {"prompt": 0, "answer": 0, "thoughts": 0}
    asked = {
        name: {
            **{
                "version": "3.0",
                "filter": "none",
                "metric": "acc",
                "num_fewshot": 0,
                "max_gen_toks": None,
            },
            "cut": {"before": dict(cut), "after": dict(cut)},
        }
        for name in kinds
    }
    asked["gsm8k"].update(
        filter="strict-match", metric="exact_match", num_fewshot=5, max_gen_toks=256
    )
    asked["mmlu"]["version"] = {"mmlu_a": 1.0, "mmlu_b": 2.0}
    asked["gsm8k"]["cut"]["after"]["answer"] = 17
    changes = [paired_change(*scores(*kind)) for kind in kinds.values()]
    found = {
        "output_path": "eval/out",
        "model": "out",
        "base": "org/base",
        "suites": {"mine": list(kinds)},
        "protocol": {
            **{
                "apply_chat_template": True,
                "enable_thinking": False,
                "dtype": "bfloat16",
                "seed": 1234,
            },
            **{"limit": None, "data_sha256": "0" * 64},
        },
        "environment": {"eaft": "0.1.0"},
        "kept": {"model": [], "base": ["gsm8k", "answers"], "folder": "/cache/eaft"},
        "asked": asked,
        "failed": {"aime24": "OutOfMemoryError: out of memory"},
        "tasks": tasks,
        "filters": {"gsm8k": {"flexible-extract": asdict(paired_change(*scores(800, 60, 62, 78)))}},
        "means": {"mine": asdict(mean_change(changes, [scores(*kind) for kind in kinds.values()]))},
        "drift": drift_results(),
        "worst": [
            {
                **{
                    "benchmark": "gsm8k",
                    "task": "gsm8k",
                    "doc_id": 3,
                    "prompt": "How many?",
                    "target": "#### 4",
                },
                **{
                    "before": {"response": "#### 4", "score": 1.0},
                    "after": {"response": "4", "score": 0.0},
                },
            }
        ],
    }
    return {**found, "verdict": judge(found)}


@pytest.fixture
def alone(results):
    """Results of one model, without a base."""
    names = ("filters", "means", "drift", "worst", "verdict")
    found = {name: value for name, value in results.items() if name not in names}
    score = {"metric": "acc,none", "n": 50, "score": 0.48, "low": 0.35, "high": 0.61}
    for asked in found["asked"].values():
        del asked["cut"]["before"]
    return {**found, "base": None, "tasks": dict.fromkeys(found["tasks"], score)}
