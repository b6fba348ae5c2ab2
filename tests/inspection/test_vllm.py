"""
`eaft inspect --backend vllm` with a stand-in for vLLM, whose numbers are from the whole logits in
float64, beside our own scorer: the same tables, but for what needs the whole vocabulary.
"""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch

from eaft import cli
from eaft.inspection.find.effects import DataGate
from eaft.inspection.folder import BASE, Inspection
from eaft.inspection.labelled import Labelled, weighed_gates
from eaft.inspection.score import vllm_model
from eaft.inspection.summary import ROLLOUTS, MeasuredParameters
from eaft.objective.statistics import token_statistics
from tests.conftest import make_model, make_rows
from tests.inspection.made import make_client

TOLD = ["log_prob", "top_k_entropy", "first_prob", "first_choice", "rank"]
NOT_TOLD = ["entropy", "sum_sq_probs"]
ANSWER = (70, 2)
TOP_K = 20


@torch.no_grad()
def flat_log_probs(model, ids, k):
    """vLLM's `FlatLogprobs` of a prompt: each token's own entry, then the K likeliest in order."""
    token_ids, log_probs, ranks = [], [], []
    rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for row, label in zip(rows[:-1], ids[1:], strict=True):
        top = row.sort(descending=True)
        token_ids += [label, *top.indices[:k].tolist()]
        log_probs += [row[label].item(), *top.values[:k].tolist()]
        ranks += [int((row >= row[label]).sum()), *range(1, k + 1)]
    return SimpleNamespace(token_ids=token_ids, logprobs=log_probs, ranks=ranks)


def sharp_model(seed):
    """A model that is sure of some tokens."""
    return make_model(seed, initializer_range=1.0)


class StandIn:
    """lm-eval's model of vLLM, as far as it is used."""

    loaded: ClassVar = []
    ended: ClassVar = []

    def __init__(self, model, tokenizer, protocol):
        self.loaded.append((model, protocol.dtype, protocol.model_args))
        self.model = sharp_model(int(str(model)[-1])).double()
        core = SimpleNamespace(shutdown=lambda: self.ended.append(model))
        self.model.llm_engine = SimpleNamespace(engine_core=core)

    def _model_generate(self, prompts, generate, sampling_params):
        outputs = []
        for prompt, ask in zip(prompts, sampling_params, strict=True):
            log_probs = None
            if hasattr(ask, "prompt_logprobs"):
                assert ask.flat_logprobs
                assert ask.max_tokens == 1
                log_probs = flat_log_probs(self.model, prompt, ask.prompt_logprobs)
            else:
                assert ask.temperature == 1.0
            answer = SimpleNamespace(token_ids=ANSWER)
            outputs.append(SimpleNamespace(outputs=[answer], prompt_logprobs=log_probs))
        return outputs


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in in the place of vLLM."""
    module = SimpleNamespace(
        SamplingParams=lambda **given: SimpleNamespace(**given), __spec__="found"
    )
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm_model, "load_lm", StandIn)
    StandIn.loaded.clear()
    StandIn.ended.clear()


def run(*argv):
    return cli.main(["inspect", *map(str, argv)])


def table(folder, model=BASE):
    return pd.concat(map(pd.read_parquet, Inspection(folder).files(model)), ignore_index=True)


def test_equals_our_own_scorer_but_for_the_whole_vocabulary(tokenizer, tmp_path, vllm, capsys):
    data, base, tuned = (tmp_path / name for name in ("rows.jsonl", "model-0", "tuned-7"))
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows(9)))
    sharp_model(0).save_pretrained(base)
    tokenizer.save_pretrained(base)
    sharp_model(7).save_pretrained(tuned)
    flags = [base, data, "--use_cpu", "--bf16", "false", "--max_new_tokens", 7]
    flags += ["--rollouts", 3, "--compare", tuned, "--rollout_backend", "vllm"]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert run(*flags, "--output_dir", ours) == 0
    assert len(StandIn.loaded) == 1  # the answers alone
    StandIn.loaded.clear()
    assert run(*flags, "--backend", "vllm", "--output_dir", theirs) == 0
    longest = int(Inspection(theirs).examples()["tokens"].to_numpy().max())
    names, dtypes, arguments = zip(*StandIn.loaded, strict=True)
    assert names == (str(base), str(tuned))  # one engine samples and scores
    assert StandIn.ended == [str(base), *names]  # before the next one needs the memory
    assert set(dtypes) == {"float32"}
    assert all(given["max_logprobs"] == TOP_K for given in arguments)
    assert all(given["max_model_len"] > longest for given in arguments)
    for model in (BASE, "tuned-7"):
        expected, found = table(ours, model), table(theirs, model)
        pd.testing.assert_frame_equal(
            found.drop(columns=NOT_TOLD), expected.drop(columns=NOT_TOLD), rtol=1e-4, atol=1e-4
        )
        assert found[TOLD].notna().any().all()
        assert found[NOT_TOLD].isna().all(None)
        assert (found["rank"] > TOP_K).any()
    tokens = table(theirs)
    means = tokens[tokens["labelled"]].groupby("example")["top_k_entropy"].mean()
    examples = Inspection(theirs).examples().to_pandas()
    np.testing.assert_allclose(examples["entropy"], means, rtol=1e-5)
    conflict = (tokens["top_k_entropy"] < 0.5) & (tokens["log_prob"] < np.log(0.1))
    shares = conflict[tokens["labelled"]].groupby(tokens["example"]).mean()
    np.testing.assert_allclose(examples["conflict_share"], shares)
    mine = examples[examples["origin"] == ROLLOUTS]
    assert set(mine["labelled"]) == {len(ANSWER)}
    assert 0 < conflict[tokens["labelled"]].mean() < 0.5

    # What is found says what is not there
    inspection = Inspection(theirs)
    assert inspection.run.backend == "vllm"
    whole, summary = Inspection(ours).summary, inspection.summary
    removed = {effect.gate for effect in whole.gates} - {effect.gate for effect in summary.gates}
    assert removed == {"deft", "mile", "ranktuner"}
    assert {effect.gradient for effect in summary.gates} == {None}
    assert not (theirs / "figures" / "gradient.png").exists()
    assert (ours / "figures" / "gradient.png").exists()
    printed = capsys.readouterr().out
    sentence = "Absent, because they need the whole vocabulary"
    assert printed.count(sentence) == 1  # of two runs
    assert sentence in (theirs / "report.html").read_text()
    assert "mean top-20 entropy" in (theirs / "report.html").read_text()
    assert sentence not in (ours / "report.html").read_text()
    before = {e.gate: e for e in whole.gates if e.source is None}
    for effect in summary.gates:
        assert effect.nll == pytest.approx(before[effect.gate].nll, rel=1e-4, abs=1e-4)

    check_view(theirs, tokens[tokens["labelled"]], examples)

    # It is no run of the other backend, and vLLM has no logits for the curve
    assert run(*flags, "--output_dir", theirs) == 2
    assert "an inspection of another backend" in capsys.readouterr().err
    assert run(*flags, "--backend", "vllm", "--top_k_curve", "--output_dir", tmp_path / "c") == 2
    assert "top_k_curve needs the logits" in capsys.readouterr().err
    assert (
        run(*flags, "--backend", "vllm", "--max_new_tokens", 250, "--output_dir", tmp_path / "c")
        == 2
    )
    assert "the model has 256" in capsys.readouterr().err


def check_view(folder, tokens, examples):
    """The viewer's answers, from the columns that vLLM has."""
    client = make_client(folder)

    def ask(path, **params):
        answer = client.get(f"/api/{path}", params=params)
        assert answer.status_code == 200, answer.text
        return answer

    about = ask("folder").json()
    assert about["entropy_name"] == "top-20 entropy"
    assert "vLLM" in about["absent"]
    assert about["entropy_max"] == pytest.approx(tokens["top_k_entropy"].max())
    gates = {gate["name"]: gate for gate in about["gates"]}
    assert not gates.keys() & {"deft", "mile", "ranktuner"}
    assert "entropy" not in {param["name"] for param in gates["eaft"]["params"]}
    data = tokens[tokens["example"].isin(examples[examples["origin"] != ROLLOUTS]["example"])]
    sure = data[data["top_k_entropy"] < 1]
    plane = ask("landscape", box="0,1,0,1").json()
    assert plane["gradient"] is None
    assert plane["selected"]["tokens"] == len(sure) > 0
    assert plane["selected"]["gradient"] is None
    assert plane["selected"]["nll"] == pytest.approx(-sure["log_prob"].sum(), rel=1e-5)
    effect = ask("gates", gate="eaft").json()
    weights = data["top_k_entropy"] / np.log(TOP_K)
    assert effect["mean_weight"] == pytest.approx(weights.mean(), rel=1e-5)
    assert effect["removed"]["gradient"] is effect["gradient"] is None
    assert client.get("/api/gates", params={"gate": "mile"}).status_code == 400
    first = ask("example", example=0).json()["tokens"]
    shown = [token["entropy"] for token in first if token["labelled"]]
    np.testing.assert_allclose(shown, data[data["example"] == 0]["top_k_entropy"], rtol=1e-5)
    header = ask("export/tokens.csv").text.splitlines()[0].split(",")
    assert "top_k_entropy" in header
    assert not {*NOT_TOLD, "grad_norm"} & set(header)


def test_a_gate_that_reads_the_whole_vocabulary_is_marked():
    """Other values of what vLLM does not tell change the weights of the marked gates alone."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 50, generator=generator)
    labels = torch.randint(50, (200,), generator=generator)
    stats = token_statistics(logits, labels, TOP_K, ranked=True)
    example = np.arange(200, dtype=np.int32) // 10
    nll = np.linspace(0.5, 3, 20)

    def weights(gate, stats):
        tokens = Labelled(stats, example, labels.numpy(), stats.first_choice.numpy())
        return DataGate(gate, MeasuredParameters(0.2, 0.1, 2.0)).weights(tokens, nll)

    other = replace(stats, entropy=stats.entropy + 0.5, sum_sq_probs=stats.sum_sq_probs / 2)
    for name, gate in weighed_gates().items():
        same = np.array_equal(weights(name, stats), weights(name, other))
        assert same is not gate.needs_vocabulary, name
