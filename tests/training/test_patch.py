"""
One call, and a plain trainer trains with the gated loss: against the reference, and transformers'
own Trainer.
"""

import copy
import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from eaft import GateCallback, gated_cross_entropy, patch_model
from eaft.errors import ConfigurationError
from tests.conftest import make_model
from tests.training.test_head import batch


def train_plainly(tmp_path, callback=None, loss=None, **kwargs):
    rows = torch.randint(3, 200, (12, 9), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list(
        [{"input_ids": r, "labels": [-100] * (i % 4) + r[i % 4 :]} for i, r in enumerate(rows)]
    )
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
    callbacks = [] if callback is None else [callback]
    trainer = Trainer(
        make_model(),
        args,
        train_dataset=data,
        eval_dataset=data,
        callbacks=callbacks,
        compute_loss_func=loss,
    )
    trainer.train()
    return trainer


def test_plain_trainer_with_sft_equals_the_models_own_loss(tmp_path):
    ours = train_plainly(
        tmp_path, GateCallback("sft"), per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    own = train_plainly(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for a, b in zip(ours.state.log_history[:3], own.state.log_history[:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_plain_trainer_accumulates_and_evaluates_plain_nll(tmp_path):
    flags = {"gate": "eaft", "gate_alpha": 2.0}
    split = train_plainly(
        tmp_path,
        GateCallback(**flags),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    whole = train_plainly(tmp_path, GateCallback(**flags), per_device_train_batch_size=4)
    for a, b in zip(split.state.log_history[:3], whole.state.log_history[:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    own = make_model()
    own.load_state_dict(split.model.state_dict())
    plain = Trainer(own, split.args, eval_dataset=split.eval_dataset)
    assert split.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_a_trainer_that_computes_a_loss_of_its_own_is_found_out(tmp_path):
    def own_loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.square().mean()

    with pytest.raises(ConfigurationError, match="the trainer computes a loss of its own"):
        train_plainly(tmp_path, GateCallback("eaft"), own_loss)


def test_ligers_fused_loss_is_refused():
    args = SimpleNamespace(use_liger_kernel=True, liger_kernel_config=None)
    with pytest.raises(
        ConfigurationError, match="use_liger_kernel puts Liger's plain cross-entropy"
    ):
        GateCallback("eaft").on_init_end(args, None, None, model=make_model())
    args.liger_kernel_config = {"fused_linear_cross_entropy": False}
    GateCallback("eaft").on_init_end(args, None, None, model=make_model())


@pytest.mark.parametrize(
    ("gate", "params"),
    [("eaft", {"alpha": 2.0}), ("talr", {"tau": 0.5}), (lambda stats: stats.prob, {})],
)
@pytest.mark.parametrize("adapter", [False, True])
def test_loss_and_gradients_are_the_references(gate, params, adapter):
    model = make_model()
    if adapter:
        model = get_peft_model(
            model, LoraConfig(target_modules="all-linear", init_lora_weights=False)
        )
    reference = copy.deepcopy(model)
    head = patch_model(model, gate, **params)
    (ids, labels), seen = batch(), []
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape[:2])
    )
    for _ in range(2):
        model.zero_grad()
        output = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(40))
        output.loss.backward()
    assert output.logits is None
    assert all(rows.numel() <= 4 for rows in seen)  # of the check before the first step
    logits = reference(input_ids=ids).logits[:, :-1]
    expected = gated_cross_entropy(logits, labels[:, 1:], gate, num_items=40, **params)
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert head.losses.weights.shape == (int((labels[:, 1:] != -100).sum()),)


def test_other_calls_are_the_models_own():
    model = make_model()
    own, (ids, labels) = copy.deepcopy(model), batch()
    patch_model(model, "eaft")
    assert inspect.signature(model.forward) == inspect.signature(own.forward)
    torch.testing.assert_close(
        model.train()(input_ids=ids).logits, own.train()(input_ids=ids).logits
    )
    ours, theirs = (m.eval()(input_ids=ids, labels=labels) for m in (model, own))
    torch.testing.assert_close((ours.loss, ours.logits), (theirs.loss, theirs.logits))
    assert model.generate(ids[:1], max_new_tokens=2, do_sample=False).shape == (1, 13)


def test_logits_that_are_not_what_the_head_says_are_refused():
    model = make_model()
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: 1.5 * output)
    patch_model(model, "eaft")
    ids, labels = batch()
    with pytest.raises(ConfigurationError, match="by the model's own forward"):
        model.train()(input_ids=ids, labels=labels)
    assert model.training


def test_a_copy_has_weights_and_gradients_of_its_own():
    model, (ids, labels) = make_model(), batch()
    patch_model(model, "eaft")
    clone = copy.deepcopy(model).train()
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.mul_(0.5)
    clone(input_ids=ids, labels=labels).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert clone.get_input_embeddings().weight.grad is not None
    fresh = make_model()
    fresh.load_state_dict(clone.state_dict())
    torch.testing.assert_close(
        clone.eval()(input_ids=ids).logits, fresh.eval()(input_ids=ids).logits
    )


def test_labels_by_position_are_labels():
    model, (ids, labels) = make_model().train(), batch()
    patch_model(model, "eaft")
    by_name = model(input_ids=ids, labels=labels, return_dict=False).loss
    names = list(inspect.signature(model.forward).parameters)
    torch.testing.assert_close(
        model(ids, *[None] * (names.index("labels") - 1), labels).loss, by_name
    )


@pytest.mark.parametrize("kept", [5, torch.ones(11, dtype=torch.bool)])
def test_labels_cut_to_the_logits_kept_are_refused(kept):
    model, (ids, labels) = make_model().train(), batch()
    patch_model(model, "eaft")
    with pytest.raises(ConfigurationError, match="use_logits_to_keep false"):
        model(input_ids=ids, labels=labels, logits_to_keep=kept)
    assert model(input_ids=ids, labels=labels, logits_to_keep=0).loss > 0


def test_a_model_is_patched_once():
    model = make_model()
    patch_model(model, "eaft")
    with pytest.raises(ConfigurationError, match="patched already, with gate='eaft'"):
        patch_model(model, "dft")


def test_a_callback_that_cannot_reach_the_model_says_so(tmp_path):
    args = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True)
    data = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4)
    late = Trainer(make_model(), args, train_dataset=data)
    late.add_callback(GateCallback("eaft"))
    with pytest.raises(ConfigurationError, match="give it to the trainer's constructor"):
        late.train()
    remade = Trainer(
        model_init=lambda: make_model(),
        args=args,
        train_dataset=data,
        callbacks=[GateCallback("eaft")],
    )
    with pytest.raises(ConfigurationError, match="model_init"):
        remade.train()
    with pytest.raises(ConfigurationError, match="one process a GPU"):
        GateCallback("eaft").on_init_end(SimpleNamespace(n_gpu=2), None, None, model=make_model())


def test_a_gate_that_needs_the_base_model_is_refused():
    model = make_model()
    for gate, params in (("flow", {"tau": 1.0}), ("stm", {}), ("tmkl", {})):
        with pytest.raises(
            ConfigurationError, match="needs the base model as well; use EAFTTrainer"
        ):
            patch_model(model, gate, **params)
    with pytest.raises(ConfigurationError, match="takes no beta"):
        patch_model(model, "eaft", beta=2.0)
    with pytest.raises(ConfigurationError, match="needs entropy_threshold"):
        patch_model(model, "masked")
    assert "forward" not in model.__dict__  # it is as it was


def test_it_needs_no_trl():
    """Other trainers come with a TRL of another version, or none."""
    missing = "sys.modules.update(dict.fromkeys(['trl', 'datasets', 'peft', 'lm_eval']))"
    use = (
        "from transformers import LlamaConfig, LlamaForCausalLM; from eaft import GateCallback,"
        " patch_model; model = LlamaForCausalLM(LlamaConfig(vocab_size=30, hidden_size=8,"
        " intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)); patch_model(model);"
        " GateCallback(); ids = torch.tensor([[5, 6, 7]]); model.train()(input_ids=ids,"
        " labels=ids).loss.backward()"
    )
    subprocess.run([sys.executable, "-c", f"import sys, torch; {missing}; {use}"], check=True)
