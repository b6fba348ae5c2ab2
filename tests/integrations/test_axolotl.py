"""
Axolotl's plugin, called as Axolotl 0.19.0 calls it, without Axolotl, which benchmarks/hosts.py
runs.
"""

import dataclasses
import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from datasets import Dataset
from pydantic import BaseModel, ValidationError
from transformers import Trainer, TrainingArguments

from eaft import EAFTConfig
from tests.conftest import make_model


class Fields(BaseModel):
    """Some of Axolotl's."""

    use_eaft: bool | None = None
    use_dft: bool | None = None
    rl: str | None = None
    reward_model: bool | None = None
    context_parallel_size: int | None = 1
    tensor_parallel_size: int | None = 1
    cut_cross_entropy: bool | None = None


@pytest.fixture
def plugin(monkeypatch):
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = object
    for name, module in {
        "axolotl": None,
        "axolotl.integrations": None,
        "axolotl.integrations.base": base,
    }.items():
        monkeypatch.setitem(sys.modules, name, module or ModuleType(name))
    monkeypatch.delitem(sys.modules, "eaft.integrations.axolotl", raising=False)
    yield importlib.import_module("eaft.integrations.axolotl").EAFTPlugin()
    sys.modules.pop("eaft.integrations.axolotl")


@pytest.fixture
def config(plugin):
    """A configuration as Axolotl makes it: a class of its fields and the plugin's."""
    module, name = plugin.get_input_args().rsplit(".", 1)
    return type(
        "Config", (Fields, getattr(importlib.import_module(module), name)), {"__module__": __name__}
    )


def test_names_and_defaults_are_those_of_the_command_line(config):
    flags = {field.name: field.default for field in dataclasses.fields(EAFTConfig)}
    ours = config().model_dump(exclude=set(Fields.model_fields))
    assert ours == {name: flags[name] for name in flags if name.startswith("gate")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"use_eaft": True},
            "use_eaft: True does not go with gate: eaft: it computes a loss of its own",
        ),
        ({"use_dft": True}, "use_dft: True does not go with gate: eaft: .* set gate: dft"),
        ({"rl": "dpo"}, "rl: dpo does not go with gate"),
        ({"reward_model": True}, "reward_model: True"),
        ({"context_parallel_size": 2}, "context_parallel_size: 2 .* set it to 1"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: 2 .* set it to 1"),
        ({"gate": "eeft"}, "Did you mean 'eaft'"),
        ({"gate": "sft-kl"}, "needs the base model as well"),
        ({"gate": "masked"}, "needs entropy_threshold"),
        ({"gate_kwargs": {"beta": 1}}, "takes no beta"),
        ({"gate_top_k": 1}, "gate_top_k"),
    ],
)
def test_what_would_pass_the_gate_by_is_refused(config, fields, message):
    with pytest.raises(ValidationError, match=message):
        config(**fields)


def test_other_fields_are_left_alone(config):
    """
    Cut-cross-entropy and Liger change the class's forward before ours takes the model's place.
    """
    config(use_eaft=False, cut_cross_entropy=True, context_parallel_size=None)


@pytest.mark.parametrize("gate", ["sft", "eaft"])
def test_accumulated_labels_count_alike(plugin, config, tmp_path, gate):
    rows = torch.randint(3, 200, (8, 9), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list(
        [{"input_ids": r, "labels": [-100] * (i % 7) + r[i % 7 :]} for i, r in enumerate(rows)]
    )
    cfg = SimpleNamespace(**config(gate=gate).model_dump())

    def train(batch, accumulated):
        args = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            max_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        model = make_model()
        trainer = Trainer(
            model, args, train_dataset=data, callbacks=plugin.add_callbacks_pre_trainer(cfg, model)
        )
        trainer.model_accepts_loss_kwargs = False  # as Axolotl leaves it
        plugin.post_trainer_create(cfg, trainer)
        trainer.train()
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    assert train(1, 4) == pytest.approx(train(4, 1), rel=1e-5)


def test_a_forward_that_the_class_was_given_before_is_passed_by(plugin, config):
    """
    As cut-cross-entropy's and Liger's, which return a plain loss and no logits where there are
    labels.
    """
    model = make_model().train()
    own, ids = type(model).forward, torch.tensor([[5, 6, 7, 8]])
    expected = model(input_ids=ids, labels=ids).loss

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, labels=None, **kwargs
    ):
        output = own(self, input_ids, attention_mask, position_ids, **kwargs)
        return SimpleNamespace(loss=torch.tensor(0.0)) if labels is not None else output

    model_class = type(model)
    try:
        model_class.forward = forward
        (callback,) = plugin.add_callbacks_pre_trainer(
            SimpleNamespace(**config(gate="sft").model_dump()), model
        )
        callback.on_init_end(SimpleNamespace(), None, None, model=model)
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)
        assert model.eval()(input_ids=ids, labels=ids).loss == 0
    finally:
        model_class.forward = own


def test_a_packed_row_is_its_sequences(plugin, config):
    """Axolotl's packing: one row, positions that begin anew, no attention mask."""
    model, ids = make_model().train(), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    labels = ids.clone()
    labels[:, 0] = -100
    (callback,) = plugin.add_callbacks_pre_trainer(SimpleNamespace(**config().model_dump()), model)
    callback.on_init_end(SimpleNamespace(), None, None, model=model)
    apart = model(input_ids=ids, labels=labels).loss
    positions = torch.arange(4).repeat(2)[None]
    packed = model(
        input_ids=ids.view(1, -1), position_ids=positions, labels=labels.view(1, -1)
    ).loss
    torch.testing.assert_close(packed, apart)
