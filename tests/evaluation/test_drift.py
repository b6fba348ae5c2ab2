"""Drift against a direct float64 computation on full logits; sampled answers; prompts."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from eaft.errors import ConfigurationError, NonFiniteError
from eaft.evaluation import drift
from eaft.evaluation.drift import (
    Answer,
    BaseAnswers,
    Share,
    TopProbs,
    answer_log_probs,
    read_prompts,
    sample_answers,
    summarise,
)
from eaft.evaluation.paired import bootstrap_interval
from eaft.evaluation.protocol import DRIFT_PROMPTS, PROMPTS
from eaft.objective.statistics import kl_divergence
from tests.conftest import make_model

ANSWERS = [Answer([5, 6, 7], [8, 9, 10, 2]), Answer([11], [12]), Answer([5, 9, 9, 9, 3], [20, 21])]


@pytest.fixture
def recorded():
    """Base answers as if the base model had given ANSWERS."""
    return BaseAnswers.record(make_model(0).eval(), ANSWERS)


@torch.no_grad()
def test_drift_is_the_definition(recorded):
    per_token = []
    for answer in ANSWERS:
        ids = answer.prompt_ids + answer.answer_ids
        p, q = (
            m.double()(torch.tensor([ids])).logits[0].tolist()
            for m in (make_model(0).eval(), make_model(1).eval())
        )
        # The position before each token of the answer predicts it
        for t in range(len(answer.prompt_ids) - 1, len(ids) - 1):
            zp, zq = (math.log(math.fsum(math.exp(z) for z in row)) for row in (p[t], q[t]))
            per_token.append(
                math.fsum(
                    math.exp(a - zp) * ((a - zp) - (b - zq))
                    for a, b in zip(p[t], q[t], strict=True)
                )
            )
    result = summarise(*recorded.drift(make_model(1).eval()))
    assert result.tokens == 7
    assert result.mean == pytest.approx(math.fsum(per_token) / 7, rel=1e-5)
    assert result.per_prompt[1] == pytest.approx(per_token[4], rel=1e-5)
    assert result.quantiles["50%"] == pytest.approx(sorted(result.per_prompt)[1])
    assert (
        min(result.per_prompt) <= result.low <= result.mean <= result.high <= max(result.per_prompt)
    )


@torch.no_grad()
@pytest.mark.parametrize("prompt_tuning", [False, True])
@pytest.mark.parametrize("kind", ["all positions", "xlstm", "llama"])
def test_positions_are_the_answers_whatever_the_forward_returns(kind, prompt_tuning):
    """
    xLSTM's forward ignores logits_to_keep, and prompt tuning adds positions before the prompt's.
    """
    if kind == "xlstm":
        torch.manual_seed(0)
        shape = {
            "vocab_size": 264,
            "hidden_size": 64,
            "num_heads": 4,
            "num_hidden_layers": 2,
            "num_blocks": 2,
        }
        shape |= {"qk_dim_factor": 1.0, "v_dim_factor": 1.0, "autocast_kernel_dtype": "float32"}
        config = AutoConfig.for_model(
            "xlstm", **shape, chunkwise_kernel="chunkwise--native_autograd"
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = make_model()
        if kind == "all positions":
            own = model.forward
            model.forward = lambda *args, logits_to_keep=0, **kwargs: own(*args, **kwargs)
    if prompt_tuning:
        model = get_peft_model(
            model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        )
    model.eval()
    for answer in ANSWERS:
        logits = model(torch.tensor([answer.prompt_ids + answer.answer_ids])).logits[0].double()
        right = logits[-len(answer.answer_ids) - 1 : -1].log_softmax(-1)
        assert torch.allclose(answer_log_probs(model, answer).double(), right, atol=1e-5)


def test_logits_that_are_not_one_position_a_token_are_refused(recorded):
    model = make_model(1).eval()
    own = model.forward
    model.forward = lambda ids, logits_to_keep=0: own(ids[:, : len(ANSWERS[0].answer_ids) + 2])
    with pytest.raises(
        ConfigurationError, match=r"model_type='llama': its logits for 7 tokens are \[1, 6, 264\]"
    ):
        recorded.drift(model)
    with pytest.raises(ConfigurationError, match="The tuned model has 200 logits"):
        recorded.drift(make_model(1, vocab_size=200).eval())


def test_interval_is_that_of_all_other_means():
    """
    Answers of one length: the mean over tokens is the mean over prompts, and so is its interval.
    """
    sums = np.random.default_rng(0).lognormal(size=32)
    found = summarise(sums, np.full(32, 8))
    assert (found.low, found.high) == pytest.approx(bootstrap_interval(sums / 8))


def test_drift_from_itself_is_zero(recorded):
    sums, counts = recorded.drift(make_model(0).eval())
    assert sums.tolist() == [0, 0, 0]
    assert counts.tolist() == [4, 1, 2]


def test_a_spoilt_model_has_no_drift(recorded):
    spoilt = make_model(1).eval()
    with torch.no_grad():
        spoilt.model.norm.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match="not finite on prompt 0"):
        recorded.drift(spoilt)


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 8, 100, 263])
def test_top_probabilities_and_the_rest_are_a_distribution_of_k_plus_one(monkeypatch, k):
    """Its KL against float64, all other tokens taken for one: never above the KL of the whole."""
    monkeypatch.setattr(drift, "TOP", k)
    logits = [
        m.double()(torch.tensor([[5, 6, 7, 8]])).logits[0]
        for m in (make_model(0).eval(), make_model(1).eval())
    ]
    p, q = (rows.softmax(-1).tolist() for rows in logits)
    found = (
        TopProbs.of(logits[0].float().log_softmax(-1))
        .kl_to(logits[1].float().log_softmax(-1))
        .tolist()
    )
    for t in range(4):
        order = sorted(range(264), key=lambda v: -p[t][v])
        top, rest = order[:k], order[k:]
        lumped = [
            *((p[t][v], q[t][v]) for v in top),
            (sum(p[t][v] for v in rest), sum(q[t][v] for v in rest)),
        ]
        assert found[t] == pytest.approx(
            math.fsum(a * math.log(a / b) for a, b in lumped), rel=1e-4
        )
        whole = math.fsum(a * math.log(a / b) for a, b in zip(p[t], q[t], strict=True))
        assert found[t] < whole * (1 + 1e-6)


def test_a_few_thousand_probabilities_are_enough():
    """
    On the real model's vocabulary, peaked as its answers are: the docstring's 0.7%, and a rest that
    small.
    """
    torch.manual_seed(0)
    logits = torch.randn(64, 49_152, dtype=torch.float64) * 2.5
    other = logits + 0.3 * torch.randn_like(logits)
    whole = kl_divergence(logits.log_softmax(-1), other.log_softmax(-1)).mean().item()
    kept = TopProbs.of(logits.float().log_softmax(-1))
    assert kept.ids.shape == (64, drift.TOP)
    found = kept.kl_to(other.float().log_softmax(-1)).mean().item()
    # What is missing is at most the rest's share, times the KL within the rest
    assert whole * (1 - 2 * kept.rest.exp().mean().item()) < found < whole


def test_what_is_saved_is_what_was_recorded(recorded, tmp_path):
    recorded.save(tmp_path)
    again = BaseAnswers.load(tmp_path)
    assert again.answers == ANSWERS
    assert again.digest == recorded.digest
    assert (
        again.drift(make_model(1).eval())[0].tolist()
        == recorded.drift(make_model(1).eval())[0].tolist()
    )
    other = BaseAnswers.record(make_model(1).eval(), ANSWERS)
    assert other.digest != recorded.digest


@pytest.mark.parametrize("n", [1, 4, 5, 6, 7])
def test_shares_cover_all_in_as_many_passes_each(n):
    shares = [Share(rank, 3).of(n) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    assert sorted({i for share in shares for i in share}) == list(range(n))


def test_answers_are_sampled_from_the_models_distribution(model, tokenizer):
    """The first token of many answers to one prompt follows the model's own probabilities."""
    model = make_model(initializer_range=0.5).eval()
    texts = ["abc"] * 2000
    answers = sample_answers(model, tokenizer, texts, max_new_tokens=1, batch_size=500)
    assert answers == sample_answers(model, tokenizer, texts, max_new_tokens=1, batch_size=500)
    with torch.no_grad():
        probs = model(torch.tensor([answers[0].prompt_ids])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([a.answer_ids[0] for a in answers]), minlength=len(probs))
    top = probs.argmax()
    deviation = (probs[top] * (1 - probs[top]) / len(texts)).sqrt()
    assert 0.05 < probs[top] < 0.95
    assert abs(counts[top] / len(texts) - probs[top]) < 4 * deviation


def test_likeliest_answers(tokenizer):
    model = make_model(initializer_range=0.5).eval()
    answers = sample_answers(model, tokenizer, ["abc", "a longer text"], 6, greedy=True)
    for answer in answers:
        ids = [*answer.prompt_ids, *answer.answer_ids]
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        assert answer.answer_ids == best[len(answer.prompt_ids) - 1 : -1]


def test_a_models_own_penalties_do_not_bend_its_answers(tokenizer):
    model = make_model(initializer_range=0.5).eval()
    plain = sample_answers(model, tokenizer, ["abc"] * 4, max_new_tokens=20)
    own = model.generation_config
    own.update(repetition_penalty=50.0, no_repeat_ngram_size=1, min_p=0.5, do_sample=True)
    assert (
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=20).unique().numel() == 22
    )  # it would, by itself
    peft_model = get_peft_model(
        make_model(initializer_range=0.5), LoraConfig(target_modules=["q_proj"])
    ).eval()
    peft_model.get_base_model().generation_config = own
    for bent in (model, peft_model):
        assert sample_answers(bent, tokenizer, ["abc"] * 4, max_new_tokens=20) == plain
        assert bent.generation_config is own


def test_answers_end_with_their_end_token_and_hold_no_padding(tokenizer):
    texts = ["a much longer prompt", *["b"] * 15]
    answers = sample_answers(make_model().eval(), tokenizer, texts, max_new_tokens=60)
    assert any(answer.answer_ids[-1] == tokenizer.eos_token_id for answer in answers)
    for answer, text in zip(answers, texts, strict=True):
        assert tokenizer.eos_token_id not in answer.answer_ids[:-1]
        assert tokenizer.decode(answer.prompt_ids) == text


def test_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "completion": "c"}\n\n')
    assert read_prompts(str(path), 5) == ["a", "b"]
    assert read_prompts(str(path), 1) == ["a"]
    path.write_text('{"question": "a"}\n')
    with pytest.raises(ConfigurationError, match="in every row"):
        read_prompts(str(path), 5)
    with pytest.raises(ConfigurationError, match="no such file"):
        read_prompts("nowhere.jsonl", 5)


def test_built_in_prompts_are_enough_for_the_interval_and_all_different():
    prompts = read_prompts(str(PROMPTS), 1000)
    assert len(prompts) == DRIFT_PROMPTS == 128
    assert [[message.keys() for message in prompt] for prompt in prompts] == [
        [{"role", "content"}]
    ] * 128
    words = [frozenset(prompt[0]["content"].lower().split()) for prompt in prompts]
    alike = max(len(a & b) / len(a | b) for i, a in enumerate(words) for b in words[:i])
    assert alike < 0.6
