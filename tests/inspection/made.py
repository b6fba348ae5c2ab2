"""
A folder as `eaft inspect` writes it, made from random logits over a small vocabulary: no model, no
tokenizer.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from starlette.testclient import TestClient

from eaft.evaluation.results import HeldOutAnswer, as_json
from eaft.inspection.folder import BASE, COMPARED, EXAMPLES, TOKENS, VOCABULARY, Inspection
from eaft.inspection.summary import DATA, ROLLOUTS
from eaft.inspection.view.queries import Queries
from eaft.inspection.view.runs import Runs
from eaft.inspection.view.server import make_app
from eaft.inspection.view.tables import Tables
from eaft.objective.statistics import token_statistics
from eaft.provenance import environment
from eaft.tuning.results import (
    Budget,
    Confirmation,
    Data,
    Drifted,
    Screened,
    TuneResults,
    Unconstrained,
)

# Words, format, markup, right-to-left text, numbers; the last three ids together are one emoji
WORDS = [
    " the",
    " cat",
    " Paris",
    " 42",
    " blue",
    "<<",
    ">>",
    "<|im_end|>",
    "<script>alert(1)</script>",
    " שלום",
    "\n",
]
VOCAB = WORDS + [f" w{i}" for i in range(40)] + ["<0xF0><0x9F>", "<0x99>", "<0x82>"]
EMOJI = [len(VOCAB) - 3, len(VOCAB) - 2, len(VOCAB) - 1]
TOP_K = 20
EMPTY_SUMMARY = {
    "counts": {"data": {"examples": 0, "tokens": 0, "labelled": 0}, "rollouts": None},
    **{"conflicts": {}, "nll": {}, "entropy": {}, "entropy_max": 0.0, "measured": None},
    **{"gates": [], "top_k": None, "checks": []},
    "tokens": {"high_entropy": [], "low_entropy": [], "conflict": []},
    "advice": {
        "kind": "none",
        "headline": "",
        "text": "",
        "facts": {
            **{"tokens": None, "nll": None, "gradient": None, "rollouts": None},
            **{"content_share": None, "examples_with_label": 0, "format": [], "content": []},
        },
    },
}


def make_example(generator, length):
    """Token ids, their ends and the text."""
    ids, ends, text = [], [], ""
    while len(ids) < length:
        new = int(torch.randint(len(VOCAB) - 2, (1,), generator=generator))
        if new == EMOJI[0]:
            ids += EMOJI
            ends += [len(text), len(text), len(text) + 1]
            text += "🙂"
        else:
            ids.append(new)
            text += VOCAB[new]
            ends.append(len(text))
    return ids, ends, text


def make_logits(ids, generator, sharpness):
    """Random logits, some sure of the label, some sure of another token."""
    logits = sharpness * torch.randn(len(ids), len(VOCAB), generator=generator)
    kind = torch.rand(len(ids), generator=generator)
    logits[kind < 0.4, torch.tensor(ids)[kind < 0.4]] += 6
    logits[kind > 0.85, 3] += 15
    return logits


def columns(logits, ids, labelled):
    """Return the columns of `STATISTICS`, null where a token is not labelled."""
    labels = torch.tensor(ids)
    stats = token_statistics(logits, labels, TOP_K)
    found = {
        name: getattr(stats, name)
        for name in ("log_prob", "entropy", "top_k_entropy", "sum_sq_probs")
    }
    probs = logits.softmax(-1)
    found["first_prob"], found["first_choice"] = probs.max(-1)
    found["rank"] = (logits > logits.gather(-1, labels[:, None])).sum(-1) + 1
    keep = [bool(x) for x in labelled]
    return {
        name: [v if k else None for v, k in zip(values.tolist(), keep, strict=True)]
        for name, values in found.items()
    }, stats


def make_inspection(
    folder, examples=40, rollouts=20, compared=("tuned",), shards=2, seed=0, summary=None
):
    """Write the folder and return its path; `summary` is put over `EMPTY_SUMMARY`."""
    folder = Path(folder)
    generator = torch.Generator().manual_seed(seed)
    rows, tokens, others = [], [], {name: [] for name in compared}
    for example in range(examples + rollouts):
        origin = DATA if example < examples else ROLLOUTS
        length = int(torch.randint(8, 60, (1,), generator=generator))
        ids, ends, text = make_example(generator, length)
        labelled = [position >= len(ids) // 3 and position > 0 for position in range(len(ids))]
        if example == 3:
            labelled = [False] * len(ids)
        sharpness = 2.0 if origin == DATA else 3.0
        logits = make_logits(ids, generator, sharpness)
        if origin == ROLLOUTS:
            logits[range(len(ids)), ids] += 5
        found, stats = columns(logits, ids, labelled)
        keys = {"example": [example] * len(ids), "position": list(range(len(ids)))}
        tokens.append({**keys, "token_id": ids, "end": ends, "labelled": labelled, **found})
        for name in compared:
            shift = torch.randn(logits.shape, generator=generator)
            shift[range(len(ids)), ids] += 2
            others[name].append({**keys, **columns(logits + shift, ids, labelled)[0]})
        keep = torch.tensor(labelled)
        nll, conflict = stats.nll[keep], stats.is_conflict[keep]
        any_label = bool(keep.any())
        rows.append(
            {
                "example": example,
                "origin": origin,
                "source": f"source-{example % 2}",
                "row": example if origin == DATA else example - examples,
                "digest": f"{example:016x}",
                "text": text,
                "messages": json.dumps(
                    {"prompt": text[: len(text) // 3], "completion": text[len(text) // 3 :]}
                ),
                "tokens": len(ids),
                "labelled": sum(labelled),
                "cut": 5 if example == 4 else 0,
                "cut_labelled": 5 if example == 4 else 0,
                "nll": float(nll.mean()) if any_label else None,
                "entropy": float(stats.entropy[keep].mean()) if any_label else None,
                "conflict_share": float(conflict.float().mean()) if any_label else None,
                "conflict_nll_share": float((nll * conflict).sum() / nll.sum())
                if any_label
                else None,
            }
        )
    write_shards(folder / "tokens", tokens, TOKENS, shards)
    for name in compared:
        write_shards(folder / "compared" / name, others[name], COMPARED, shards)
    pq.write_table(pa.Table.from_pylist(rows, EXAMPLES), folder / "examples.parquet")
    special = [text.startswith("<|") for text in VOCAB]
    vocabulary = {"token_id": range(len(VOCAB)), "text": VOCAB, "special": special}
    pq.write_table(pa.table(vocabulary, VOCABULARY), folder / "vocabulary.parquet")
    models = [{"name": BASE, "model": "made/base"}]
    models += [
        {"name": name, "model": f"made/{name}", "step": 10 * (i + 1)}
        for i, name in enumerate(compared)
    ]
    run = {
        "scored": True,
        "finished": True,
        "model": "made/base",
        "dataset": "made.jsonl",
        "top_k": TOP_K,
    }
    (folder / "run.json").write_text(json.dumps({**run, "models": models, "config": {}}))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps({**EMPTY_SUMMARY, **summary}))
    return folder


def make_tuning(folder):
    """Write results.json as `eaft tune` does: two checkpoints; of two candidates one passed."""
    folder.mkdir(parents=True)
    intervals = {"nll_change": -0.5, "nll_low": -0.75, "nll_high": -0.25}
    intervals |= {"drift_low": 0.03, "drift_high": 0.06}
    screened = [
        Screened(step=4, share=1.0, nll=1.7, drift=0.08),  # as an older version wrote it
        Screened(step=8, share=1.0, nll=1.2, drift=0.12),
        Screened(step=8, share=0.6, nll=1.45, drift=0.049),
        Screened(step=8, share=0.5, nll=1.5, drift=0.04, **intervals),
    ]
    chosen = Confirmation(
        **{"step": 8, "share": 0.5, "drift": 0.041, "bound": 0.049, "within": True},
        **{"shown": True, "prompts_needed": None, "tasks": [], "prompts": 40, "rows": 8},
        **{"nll": 1.55, "nll_change": -0.45, "nll_low": -0.7, "nll_high": -0.2},
    )
    refused = {"share": 0.6, "drift": 0.052, "bound": 0.06, "within": False, "shown": False}
    sizes = ("training_rows", "screening_rows", "confirmation_rows", "left_out")
    sizes += ("screening_prompts", "confirmation_prompts")
    results = TuneResults(
        status="shown",
        sentence="The held-out nll fell.",
        budget=Budget(max_drift=0.05, max_drop=None, strict=False),
        model="made/base",
        data=Data(**dict.fromkeys(sizes, 8)),
        base_nll=2.0,
        base_nll_screening=2.0,
        chosen=chosen,
        candidates=[replace(chosen, **refused), chosen],
        screened=screened,
        unconstrained=Unconstrained(step=8, share=1.0, nll=1.2, drift=0.12, cost=0.3),
        answers=[
            HeldOutAnswer(row=0, prompt="2 + 2?", target="4", before="five", after="<b>four</b>")
        ],
        most_drifted=[Drifted(prompt="Hello", answer="<i>Good day</i>", drift=0.2)],
        flags=[],
        environment=environment(),
    )
    (folder / "results.json").write_text(json.dumps(as_json(results)))
    return folder


def grad_norm(sum_sq_probs, log_prob):
    """
    sqrt(sum p^2 - 2 p_y + 1) in float64, which float32 statistics tell where p_y is near 1 only by
    its bounds.
    """
    log_prob = np.asarray(log_prob, dtype=float)
    other = -np.expm1(
        log_prob
    )  # the others' probabilities are at most this together: their squares lie between
    squares = np.asarray(sum_sq_probs, dtype=float) - 2 * np.exp(log_prob) + 1
    return np.sqrt(np.clip(squares, other**2, 2 * other**2))


def write_shards(folder, parts, schema, shards):
    """Write the examples' columns as so many files, in order."""
    folder.mkdir(parents=True)
    size = -(-len(parts) // shards)
    for shard in range(shards):
        chosen = parts[shard * size : (shard + 1) * size]
        joined = {name: [v for part in chosen for v in part[name]] for name in schema.names}
        pq.write_table(pa.table(joined, schema), folder / f"{shard:05d}.parquet")


def make_client(folder):
    """Return a client of the page's server on an inspection."""
    app = make_app("made", Queries(Tables(Inspection(folder))), Runs(folder), 8765, "secret")
    return TestClient(
        app, base_url="http://127.0.0.1:8765", headers={"Authorization": "token secret"}
    )
