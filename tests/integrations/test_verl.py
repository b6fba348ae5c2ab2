"""verl's SFT trainer with the gated loss, called as its FSDP engine calls a loss."""

import types

import pytest
import torch

from eaft import gated_cross_entropy
from eaft.errors import ConfigurationError

from .formula import terms


def sft_loss(config, model_output, data, dp_group=None):
    """The host's: the mask is shifted to the left, as the log-probabilities are."""
    log_prob, mask = model_output["log_probs"].values(), data["loss_mask"].values().roll(-1).bool()
    loss = -torch.where(mask, log_prob, 0.0).sum() / data["batch_num_tokens"] * data["dp_size"]
    return loss, {}


class SFTTrainer:
    """What is called of the host's."""

    strategy = "fsdp2"

    def _build_engine(self):
        engine = {"strategy": self.strategy, "use_fused_kernels": False, "pad_to_length": False}
        engine |= {"ulysses_sequence_parallel_size": 1}
        self.engine_config = types.SimpleNamespace(**engine)
        self.training_client = types.SimpleNamespace(
            set_loss_fn=lambda loss_fn: setattr(self, "loss_fn", loss_fn),
            train_batch=self.train_batch,
        )

    def train_batch(self, data):
        """As `FSDPEngineWithLMHead.prepare_model_outputs` and `forward_step`."""
        logits, offsets = data["logits"], data["input_ids"].offsets()
        model_output = {}
        if data.get("distillation_use_topk"):
            outputs = self.loss_fn(student_logits=logits.unsqueeze(0), data=data)
            for name, values in outputs.items():
                assert values.shape == (1, len(logits))
                model_output[name] = torch.nested.nested_tensor_from_jagged(
                    values.squeeze(0), offsets
                )
        labels = data["input_ids"].values().roll(-1)
        log_probs = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        model_output["log_probs"] = torch.nested.nested_tensor_from_jagged(log_probs, offsets)
        loss, _ = self.loss_fn(model_output=model_output, data=data, dp_group=None)
        return loss


@pytest.fixture
def host(import_with):
    utils = types.SimpleNamespace(assign_non_tensor=lambda data, **values: data.update(values))
    return import_with(
        "verl",
        verl__utils={"tensordict_utils": utils},
        verl__workers__utils__losses={"sft_loss": sft_loss},
    )


LENGTHS, PROMPTS = [5, 7, 4], [2, 1, 3]


@pytest.fixture
def data():
    """Three examples, packed; an answer's first token is predicted at the prompt's last."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    masks = [[0] * prompt + [1] * (n - prompt) for n, prompt in zip(LENGTHS, PROMPTS, strict=True)]
    ids = torch.randint(50, (sum(LENGTHS),), generator=generator)
    return {
        "input_ids": torch.nested.nested_tensor_from_jagged(ids, offsets),
        "loss_mask": torch.nested.nested_tensor_from_jagged(
            torch.tensor([*masks[0], *masks[1], *masks[2]]), offsets
        ),
        "logits": (3 * torch.randn(len(ids), 50, generator=generator)).requires_grad_(),
        "batch_num_tokens": 21,
        "dp_size": 2,
    }


def shifted_labels(data):
    """Return the labels of each position, by a loop."""
    labels, start = [], 0
    for n, prompt in zip(LENGTHS, PROMPTS, strict=True):
        ids = data["input_ids"].values()[start : start + n].tolist()
        labels += [ids[t + 1] if t + 1 < n and t + 1 >= prompt else -100 for t in range(n)]
        start += n
    return torch.tensor(labels)


def trained(host, data, **flags):
    trainer = host.gated(SFTTrainer, **flags)()
    trainer._build_engine()
    return trainer.training_client.train_batch(data=data)


@pytest.mark.parametrize("gate", ["sft", "eaft", "dft"])
@pytest.mark.parametrize("rows", [1024, 4])
def test_loss_and_gradient_are_the_formulas(host, data, gate, rows, monkeypatch):
    monkeypatch.setattr(host, "ROWS", rows)
    expected = terms(data["logits"], shifted_labels(data), gate).sum() / 21 * 2
    loss = trained(host, data, gate=gate)
    torch.testing.assert_close(loss, expected.float())
    for one, other in zip(
        *(torch.autograd.grad(v, data["logits"]) for v in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("gate", "params"),
    [
        ("talr", {}),
        ("ranktuner", {}),
        ("deft", {}),
        ("masked", {"entropy_threshold": "batch"}),
        ("mile", {}),
    ],
)
def test_other_gates_are_those_of_the_reference(host, data, gate, params):
    examples = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
    expected = gated_cross_entropy(
        data["logits"], shifted_labels(data), gate, num_items=21, example_ids=examples, **params
    )
    torch.testing.assert_close(trained(host, data, gate=gate, gate_kwargs=params), 2 * expected)


def test_a_closed_gate_shuts_out_a_label_that_cannot_occur(host, data):
    with torch.no_grad():
        data["logits"][
            2, data["input_ids"].values()[3]
        ] = -torch.inf  # a label's: dft weighs it with 0
    loss = trained(host, data, gate="dft")
    loss.backward()
    assert loss.isfinite()
    assert data["logits"].grad.isfinite().all()


def test_no_label_in_a_micro_batch(host, data):
    data["loss_mask"] = torch.zeros_like(data["loss_mask"])
    assert trained(host, data) == 0


def test_validation_is_the_hosts_own(host, data):
    trainer = host.gated(SFTTrainer, gate="eaft")()
    trainer._build_engine()
    with torch.no_grad():
        loss = trainer.train_batch(data)  # not by the client's: no logits are shown
    torch.testing.assert_close(
        loss, (terms(data["logits"], shifted_labels(data), "sft").sum() / 21 * 2).float()
    )


def test_refuses_what_it_cannot_do(host):
    with pytest.raises(ConfigurationError, match="needs the base model"):
        host.gated(SFTTrainer, gate="psft")
    trainer = host.gated(SFTTrainer)()
    trainer.strategy = "megatron"
    with pytest.raises(ConfigurationError, match="needs fsdp"):
        trainer._build_engine()


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_fused_kernels", True), ("ulysses_sequence_parallel_size", 2), ("pad_to_length", True)],
)
def test_refuses_an_engine_that_shows_no_logits(host, name, value):
    trainer = SFTTrainer()
    trainer._build_engine()
    setattr(trainer.engine_config, name, value)
    with pytest.raises(ConfigurationError, match=name):
        host.check_engine(trainer.engine_config)
