"""The reference loss against the paper's formula, a finite difference, and transformers' own Trainer."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from eaft import GatedLoss, gated_cross_entropy
from eaft.errors import ConfigurationError
from eaft.gates import GATES

from .conftest import make_model
from .test_gates import formula
from .test_statistics import softmax


@pytest.mark.parametrize("gate", sorted(GATES))
@pytest.mark.parametrize("vocab", [7, 45])
def test_value_and_gradient_are_the_formula(gate, vocab):
    logits = 3 * torch.randn(6, vocab, dtype=torch.float64)
    logits.requires_grad_()
    labels = torch.tensor([0, 3, -100, 6, -100, 2])
    loss = gated_cross_entropy(logits, labels, gate)
    loss.backward()

    total, n = 0.0, 4
    for row, label, grad in zip(logits.tolist(), labels.tolist(), logits.grad.tolist(), strict=True):
        if label == -100:
            assert grad == [0.0] * vocab
            continue
        probs, weight = softmax(row), formula(gate, row, label)
        total -= weight * math.log(probs[label])
        # The gate is a constant in the gradient
        assert grad == pytest.approx([weight * (p - (j == label)) / n for j, p in enumerate(probs)], abs=1e-12)
    assert loss.item() == pytest.approx(total / n, rel=1e-12)


def test_num_items_divides():
    logits, labels = torch.randn(4, 30, dtype=torch.float64), torch.tensor([1, -100, 2, 3])
    mean = gated_cross_entropy(logits, labels)
    assert gated_cross_entropy(logits, labels, num_items=12).item() == pytest.approx(mean.item() * 3 / 12)
    assert gated_cross_entropy(logits, labels, num_items=torch.tensor(12)).item() == pytest.approx(mean.item() * 3 / 12)


def test_ignore_index_is_honoured():
    logits = torch.randn(3, 30)
    expected = gated_cross_entropy(logits[:2], torch.tensor([1, 2]))
    torch.testing.assert_close(gated_cross_entropy(logits, torch.tensor([1, 2, 0]), ignore_index=0), expected)


@pytest.mark.parametrize("gate", sorted(GATES))
def test_no_labelled_token_is_a_connected_zero(gate):
    logits = torch.randn(3, 30, requires_grad=True)
    loss = gated_cross_entropy(logits, torch.full((3,), -100), gate)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(3, 30))


def test_bfloat16_logits_are_computed_in_float32():
    logits, labels = torch.randn(50, 300).bfloat16(), torch.randint(300, (50,))
    loss = gated_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(gated_cross_entropy(logits.double(), labels).item(), rel=1e-6)


def test_unknown_parameter_is_refused():
    with pytest.raises(ConfigurationError, match="takes no alpha"):
        gated_cross_entropy(torch.zeros(1, 5), torch.tensor([0]), "sft", alpha=2.0)
    with pytest.raises(ConfigurationError, match="takes no beta"):
        GatedLoss("eaft", params={"beta": 2.0})


def train_plainly(loss, tmp_path, **kwargs):
    rows = torch.randint(3, 200, (12, 9), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"input_ids": r, "labels": [-100] * (i % 4) + r[i % 4 :]} for i, r in enumerate(rows)])
    args = TrainingArguments(
        tmp_path,
        max_steps=3,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **kwargs,
    )
    trainer = Trainer(make_model(), args, train_dataset=data, eval_dataset=data, compute_loss_func=loss)
    trainer.train()
    return trainer


def test_plain_trainer_with_sft_equals_the_models_own_loss(tmp_path):
    ours = train_plainly(GatedLoss("sft"), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    own = train_plainly(None, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for a, b in zip(ours.state.log_history[:3], own.state.log_history[:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_plain_trainer_accumulates_and_evaluates_plain_nll(tmp_path):
    loss = GatedLoss("eaft", params={"alpha": 2.0})
    split = train_plainly(loss, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    whole = train_plainly(loss, tmp_path, per_device_train_batch_size=4)
    for a, b in zip(split.state.log_history[:3], whole.state.log_history[:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    eval_loss = split.evaluate()["eval_loss"]
    split.compute_loss_func = None  # the model's own cross-entropy
    assert eval_loss == pytest.approx(split.evaluate()["eval_loss"], rel=1e-5)
