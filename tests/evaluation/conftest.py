"""A whole results.json of `eaft eval`, as it is written."""

from dataclasses import fields, replace

import numpy as np
import pytest

from eaft.evaluation.drift import summarise
from eaft.evaluation.paired import holm, mean_change, paired_change
from eaft.evaluation.results import (
    Asked,
    Changes,
    Cut,
    Evaluation,
    HeldOut,
    HeldOutAnswer,
    Kept,
    ModelEvaluation,
    RecordedProtocol,
    Regression,
    Response,
    TaskChange,
    TaskScore,
    TunedEvaluation,
)
from eaft.evaluation.verdict import judge
from eaft.provenance import software


def scores(both, lost, gained, neither):
    """Scores of base and tuned: items right for both, base only, tuned only, neither."""
    return np.repeat([1.0, 1, 0, 0], [both, lost, gained, neither]), np.repeat(
        [1.0, 0, 1, 0], [both, lost, gained, neither]
    )


def task_results(kinds, choices=()):
    """
    `tasks` of results, from each task's counts (see `scores`); those named in `choices` have four.
    """
    changes = {
        name: paired_change(*scores(*kind), np.full(sum(kind), 4) if name in choices else None)
        for name, kind in kinds.items()
    }
    adjusted = holm([change.p_value for change in changes.values()])
    return {
        name: TaskChange(**vars(change), metric="acc,none", p_holm=p)
        for (name, change), p in zip(changes.items(), adjusted, strict=True)
    }


def drift_results(mean=0.05, prompts=128):
    """`drift` of results, skewed over prompts."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 65, size=prompts)
    per_prompt = rng.lognormal(0, 0.5, size=prompts)
    return summarise(mean * per_prompt * tokens / (per_prompt @ tokens / tokens.sum()), tokens)


def held_out_results(change=-0.5, p_value=0.001):
    """`held_out` of results, with one row's answers."""
    text = "<b>How</b> many?"
    answer = HeldOutAnswer(row=2, prompt=text, target="4", before="*four*", after="4")
    return HeldOut(
        file="rows_of_mine.jsonl",
        rows=40,
        tokens=80,
        before=1.5,
        after=1.5 + change,
        change=change,
        low=change - 0.1,
        high=change + 0.1,
        p_value=p_value,
        before_per_row=[1.5] * 40,
        after_per_row=[1.5 + change] * 40,
        tokens_per_row=[2] * 40,
        prepared="as the training data of out",
        apart=False,
        max_new_tokens=256,
        answers=[answer],
    )


@pytest.fixture
def results():
    """
    Results in which GSM8K fell, but only as it is read strictly, MMLU rose, IFEval is small, and
    AIME failed.
    """
    kinds = {"gsm8k": (700, 160, 20, 120), "mmlu": (1500, 120, 260, 820), "ifeval": (20, 4, 3, 23)}
    tasks = task_results(kinds, ["mmlu"])
    tasks["gsm8k"] = replace(tasks["gsm8k"], metric="exact_match,strict-match")
    asked = {
        name: Asked(
            version="3.0",
            metric="acc",
            filter="none",
            num_fewshot=0,
            max_gen_toks=None,
            cut={side: Cut(prompt=0, answer=0, thoughts=0) for side in ("before", "after")},
        )
        for name in kinds
    }
    asked["gsm8k"] = replace(
        asked["gsm8k"],
        filter="strict-match",
        metric="exact_match",
        num_fewshot=5,
        max_gen_toks=256,
    )
    asked["mmlu"].version = {"mmlu_a": 1.0, "mmlu_b": 2.0}
    asked["gsm8k"].cut["after"].answer = 17
    changes = [paired_change(*scores(*kind)) for kind in kinds.values()]
    made = Changes(
        tasks=tasks,
        filters={"gsm8k": {"flexible-extract": paired_change(*scores(800, 60, 62, 78))}},
        means={"mine": mean_change(changes, [scores(*kind) for kind in kinds.values()])},
    )
    failed, drift = {"aime24": "OutOfMemoryError: out of memory"}, drift_results()
    return TunedEvaluation(
        output_path="eval/out",
        model="out",
        base="org/base",
        suites={"mine": list(kinds)},
        protocol=RecordedProtocol(
            apply_chat_template=True,
            enable_thinking=False,
            dtype="bfloat16",
            limit=None,
            data_sha256="0" * 64,
        ),
        environment=software(),
        kept=Kept(model=[], base=["gsm8k", "answers"], folder="/cache/eaft"),
        asked=asked,
        failed=failed,
        **vars(made),
        drift=drift,
        held_out=held_out_results(),
        worst=[
            Regression(
                benchmark="gsm8k",
                task="gsm8k",
                doc_id=3,
                prompt="How many?",
                target="#### 4",
                before=Response(response="#### 4", score=1.0),
                after=Response(response="4", score=0.0),
            )
        ],
        verdict=judge(made, drift, failed),
    )


@pytest.fixture
def alone(results):
    """Results of one model, without a base."""
    score = TaskScore(metric="acc,none", n=50, score=0.48, low=0.35, high=0.61)
    for asked in results.asked.values():
        del asked.cut["before"]
    common = {f.name: getattr(results, f.name) for f in fields(Evaluation)}
    return ModelEvaluation(**common, base=None, tasks=dict.fromkeys(results.tasks, score))
