"""Drift against a direct float64 computation on full logits; scores of lm-eval's tasks; sampled answers."""

import json
import math

import pytest
import torch

from eaft.errors import ConfigurationError
from eaft.evaluate import Answer, drift, load_model, read_prompts, sample_answers, score_tasks, task_manager

from .conftest import make_model

ANSWERS = [Answer([5, 6, 7], [8, 9, 10, 2]), Answer([11], [12]), Answer([5, 9, 9, 9, 3], [20, 21])]


@torch.no_grad()
def test_drift_is_the_definition():
    base, tuned = make_model(0).eval(), make_model(1).eval()
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
    result = drift(base, tuned, ANSWERS)
    assert result["tokens"] == 7
    assert result["mean"] == pytest.approx(math.fsum(per_token) / 7, rel=1e-5)
    assert result["per_prompt"][1] == pytest.approx(per_token[4], rel=1e-5)


def test_drift_from_itself_is_zero():
    assert drift(make_model().eval(), make_model().eval(), ANSWERS)["mean"] == 0


def test_answers_are_sampled_from_the_models_distribution(model, tokenizer):
    """The first token of many answers to one prompt follows the model's own probabilities."""
    tokenizer.padding_side = "left"
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


def test_answers_end_with_their_end_token_and_hold_no_padding(tokenizer):
    tokenizer.padding_side = "left"
    chat = [{"role": "user", "content": "a much longer prompt"}]
    answers = sample_answers(make_model().eval(), tokenizer, ["ab"], max_new_tokens=40) + sample_answers(
        make_model().eval(), tokenizer, [chat, [{"role": "user", "content": "b"}]] * 10, max_new_tokens=300 - 60
    )
    assert any(answer.answer_ids[-1] == tokenizer.eos_token_id for answer in answers)
    for answer in answers:
        assert tokenizer.eos_token_id not in answer.answer_ids[:-1]
        assert tokenizer.pad_token_id not in answer.prompt_ids
    assert tokenizer.decode(answers[1].prompt_ids) == tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )


@pytest.fixture
def task_path(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"{i}?", "choices": ["a", "bb"], "answer": i % 2} for i in range(6)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/questions.jsonl}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: answer\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return str(folder)


def test_scores_are_the_mean_of_the_items(model_dir, task_path):
    model, tokenizer = load_model(str(model_dir))
    score = score_tasks(model, tokenizer, ["tiny"], task_manager(["tiny"], task_path), 4, apply_chat_template=False)[
        "tiny"
    ]
    assert score["metric"] == "acc,none"
    assert score["n"] == 6
    # By hand: which of the two continuations has the larger log-likelihood?
    expected = []
    for i in range(6):
        prompt = tokenizer(f"{i}?")["input_ids"]
        likelihoods = []
        for choice in (" a", " bb"):
            ids = prompt + tokenizer(choice)["input_ids"]
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            likelihoods.append(sum(log_probs[t, ids[t + 1]].item() for t in range(len(prompt) - 1, len(ids) - 1)))
        expected.append(float((likelihoods[1] > likelihoods[0]) == (i % 2)))
    assert [item["score"] for item in score["items"]] == expected
    assert score["score"] == pytest.approx(sum(expected) / 6)


def test_unknown_task_is_refused(task_path):
    with pytest.raises(ConfigurationError, match=r"lm-eval knows no task 'gsm8kk'\. Did you mean 'gsm8k'"):
        task_manager(["gsm8kk"], task_path)
    with pytest.raises(ConfigurationError, match="there is no such folder"):
        task_manager(["tiny"], "nowhere")


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
