"""Drift against a direct float64 computation on full logits; sampled answers; prompts."""

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from eaft.errors import ConfigurationError, NonFiniteError
from eaft.evaluation.drift import Answer, BaseAnswers, read_prompts, sample_answers, summarise
from eaft.evaluation.paired import bootstrap_interval
from tests.conftest import make_model

ANSWERS = [Answer([5, 6, 7], [8, 9, 10, 2]), Answer([11], [12]), Answer([5, 9, 9, 9, 3], [20, 21])]


@pytest.fixture
def recorded(tmp_path):
    """Base answers as if the base model had given ANSWERS."""
    answers = BaseAnswers(tmp_path / "base")
    (tmp_path / "base").mkdir()
    answers.file.write_text(json.dumps([vars(answer) for answer in ANSWERS]))
    answers.record_log_probs(make_model(0).eval())
    return answers


@torch.no_grad()
def test_drift_is_the_definition(recorded):
    per_token = []
    for answer in ANSWERS:
        ids = answer.prompt_ids + answer.answer_ids
        p, q = (
            m.double()(torch.tensor([ids])).logits[0].tolist() for m in (make_model(0).eval(), make_model(1).eval())
        )
        # The position before each token of the answer predicts it
        for t in range(len(answer.prompt_ids) - 1, len(ids) - 1):
            zp, zq = (math.log(math.fsum(math.exp(z) for z in row)) for row in (p[t], q[t]))
            per_token.append(
                math.fsum(math.exp(a - zp) * ((a - zp) - (b - zq)) for a, b in zip(p[t], q[t], strict=True))
            )
    result = recorded.drift(make_model(1).eval())
    assert result["tokens"] == 7
    assert result["mean"] == pytest.approx(math.fsum(per_token) / 7, rel=1e-5)
    assert result["per_prompt"][1] == pytest.approx(per_token[4], rel=1e-5)
    assert result["quantiles"]["50%"] == pytest.approx(sorted(result["per_prompt"])[1])
    assert min(result["per_prompt"]) <= result["low"] <= result["mean"] <= result["high"] <= max(result["per_prompt"])


def test_interval_is_that_of_all_other_means():
    """Answers of one length: the mean over tokens is the mean over prompts, and so is its interval."""
    sums = np.random.default_rng(0).lognormal(size=32)
    drift = summarise(sums, np.full(32, 8))
    assert (drift["low"], drift["high"]) == pytest.approx(bootstrap_interval(sums / 8))


def test_drift_from_itself_is_zero(recorded):
    assert recorded.drift(make_model(0).eval())["mean"] == 0


def test_a_spoilt_model_has_no_drift(recorded):
    spoilt = make_model(1).eval()
    with torch.no_grad():
        spoilt.model.norm.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match="not finite on prompt 0"):
        recorded.drift(spoilt)


def test_probabilities_are_freed_and_answers_kept(recorded, tokenizer):
    assert recorded.recorded
    recorded.free()
    assert not recorded.recorded
    assert recorded.answers == ANSWERS
    recorded.record(make_model(0).eval(), tokenizer, ["another prompt"], 5, 1)
    assert len(recorded.answers) == 1
    assert recorded.recorded


def test_answers_are_sampled_from_the_models_distribution(model, tokenizer):
    """The first token of many answers to one prompt follows the model's own probabilities."""
    model = make_model(initializer_range=0.5).eval()
    prompts = ["abc"] * 2000
    answers = sample_answers(model, tokenizer, prompts, max_new_tokens=1, batch_size=500)
    assert answers == sample_answers(model, tokenizer, prompts, max_new_tokens=1, batch_size=500)
    with torch.no_grad():
        probs = model(torch.tensor([answers[0].prompt_ids])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([a.answer_ids[0] for a in answers]), minlength=len(probs))
    top = probs.argmax()
    deviation = (probs[top] * (1 - probs[top]) / len(prompts)).sqrt()
    assert 0.05 < probs[top] < 0.95
    assert abs(counts[top] / len(prompts) - probs[top]) < 4 * deviation


def test_a_models_own_penalties_do_not_bend_its_answers(tokenizer):
    model = make_model(initializer_range=0.5).eval()
    plain = sample_answers(model, tokenizer, ["abc"] * 4, max_new_tokens=20)
    own = model.generation_config
    own.update(repetition_penalty=50.0, no_repeat_ngram_size=1, min_p=0.5, do_sample=True)
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=20).unique().numel() == 22  # it would, by itself
    peft_model = get_peft_model(make_model(initializer_range=0.5), LoraConfig(target_modules=["q_proj"])).eval()
    peft_model.get_base_model().generation_config = own
    for bent in (model, peft_model):
        assert sample_answers(bent, tokenizer, ["abc"] * 4, max_new_tokens=20) == plain
        assert bent.generation_config is own


def test_answers_end_with_their_end_token_and_hold_no_padding(tokenizer):
    chat = [{"role": "user", "content": "a much longer prompt"}]
    answers = sample_answers(make_model().eval(), tokenizer, ["ab"], max_new_tokens=40) + sample_answers(
        make_model().eval(), tokenizer, [chat, [{"role": "user", "content": "b"}]] * 10, max_new_tokens=300 - 60
    )
    assert any(answer.answer_ids[-1] == tokenizer.eos_token_id for answer in answers)
    for answer in answers:
        assert tokenizer.eos_token_id not in answer.answer_ids[:-1]
        assert tokenizer.pad_token_id not in answer.prompt_ids
    for answer, request in ((answers[0], [{"role": "user", "content": "ab"}]), (answers[1], chat)):
        expected = tokenizer.apply_chat_template(request, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(answer.prompt_ids) == expected


def test_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "completion": "c"}\n\n')
    assert read_prompts(str(path), 5) == ["a", "b"]
    assert read_prompts(str(path), 1) == ["a"]
    path.write_text('{"question": "a"}\n')
    with pytest.raises(ConfigurationError, match="a `prompt` in every row"):
        read_prompts(str(path), 5)
    with pytest.raises(ConfigurationError, match="no such file"):
        read_prompts("nowhere.jsonl", 5)
