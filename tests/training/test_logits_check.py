"""
The check of the head against the model's own logits: what it refuses, what it lets through, what it
leaves alone.
"""

import random
import types

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from eaft import EAFTTrainer, patch_model
from eaft.errors import ConfigurationError
from eaft.training.head import GatedLMHead
from eaft.training.logits_check import TOKENS, check_logits
from tests.conftest import make_model, make_rows
from tests.processes import run_ranks
from tests.training import logits_check_fsdp
from tests.training.test_families import FAMILIES, make
from tests.training.test_trainer import TEXTS, build, steps


class Float8Head(torch.nn.Linear):
    """A head whose weight is stored in 8 bits, as a multiple of a scale that its forward knows."""

    def __init__(self, head):
        torch.nn.Module.__init__(self)
        self.scale = head.weight.detach().abs().max() / 448
        self.weight = torch.nn.Parameter(
            (head.weight.detach() / self.scale).to(torch.float8_e4m3fn), False
        )
        self.bias = None

    def forward(self, hidden):
        return hidden @ (self.weight.to(hidden.dtype) * self.scale).T


def quantised():
    model = make_model(tie_word_embeddings=False)
    model.lm_head = Float8Head(model.lm_head)
    return model


def with_fault(forward, change):
    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    return changed


def with_logits(change):
    """
    A model whose own forward changes its logits in a way that no field of its configuration tells
    of.
    """
    model = make_model()
    model.forward = with_fault(model.forward, change)
    return model


def modernbert():
    """
    Its head is a dense layer and a norm before the matrix that `get_output_embeddings` returns.
    """
    sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tokens = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    }
    config = AutoConfig.for_model("modernbert-decoder", **sizes, **tokens, num_attention_heads=4)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )


HIDDEN = {
    "8-bit head": quantised,
    "dense layer in the head": modernbert,
    "masked vocabulary": lambda: with_logits(
        lambda z: z.index_fill(-1, torch.arange(200, 220), -1e9)
    ),
    "soft cap": lambda: with_logits(lambda z: 5 * torch.tanh(z / 5)),
    "scale": lambda: with_logits(lambda z: z / 1.1),
}


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_transformation_is_refused(name, bf16, tmp_path):
    trainer = build(EAFTTrainer, tmp_path, model=HIDDEN[name](), bf16=bf16)
    with pytest.raises(
        ConfigurationError,
        match=r"model_type='\S+': the nll of a token is .* where rounding explains",
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_evaluation_alone_is_checked(tmp_path):
    trainer = build(EAFTTrainer, tmp_path, model=HIDDEN["scale"](), eval_rows=make_rows(5))
    with pytest.raises(ConfigurationError, match="the nll of a token"):
        trainer.evaluate()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_rounding_is_not_refused(name, dtype):
    model = make(name).to(dtype)
    GatedLMHead(model, "eaft")
    ids = torch.randint(3, 260, (2, 9), generator=torch.Generator().manual_seed(0))
    check_logits(model, {"input_ids": ids, "labels": ids}, lambda x: x)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding_free": True, "max_length": None},
        {"packing": True, "max_length": 64, "rows": TEXTS},
    ],
    ids=["padded", "padding-free", "packed"],
)
def test_changes_nothing_else(settings, tmp_path, monkeypatch):
    """
    Training with dropout, with the check and without, ends in the same weights; and it runs once.
    """
    calls = []

    def counted(*args):
        calls.append(args)
        check_logits(*args)

    def run(check):
        monkeypatch.setattr("eaft.training.trainer.check_logits", check)
        lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)
        trainer = build(
            EAFTTrainer,
            tmp_path,
            model=make_model(attention_dropout=0.5),
            peft_config=lora,
            **settings,
        )
        trainer.train()
        return trainer

    checked, unchecked = run(counted), run(lambda *args: None)
    assert len(calls) == 1
    assert steps(checked) == steps(unchecked)
    assert all(map(torch.equal, checked.model.parameters(), unchecked.model.parameters()))


class Merging(torch.nn.Module):
    """
    A layer that changes its weight for inference when it leaves training mode, as some adapters do,
    for good.
    """

    def __init__(self, layer):
        super().__init__()
        self.layer, self.norm = layer, torch.nn.BatchNorm1d(layer.out_features, affine=False)

    def train(self, mode=True):
        if not mode:
            self.layer.weight.data += 1
        return super().train(mode)

    def forward(self, hidden):
        self.norm(self.layer(hidden).flatten(0, 1))  # moves its statistics in training mode
        return self.layer(hidden) + (random.random() + np.random.rand()) * 1e-3  # noqa: NPY002


@pytest.mark.parametrize("name", ["llama", "OPT"])  # OPT's backbone runs a second time
def test_leaves_no_trace(name):
    if name == "llama":
        model = make_model(attention_dropout=0.5)
        model.model.layers[0].mlp.down_proj = Merging(model.model.layers[0].mlp.down_proj)
        model.model.layers[1].eval()
    else:
        sizes = {"vocab_size": 264, "hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32}
        model = OPTForCausalLM(
            OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, dropout=0.5)
        ).train()
    GatedLMHead(model, "eaft")
    ids = torch.randint(3, 264, (2, 9))
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    check_logits(model, {"input_ids": ids, "labels": ids}, lambda x: x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # noqa: NPY002
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Repacking(torch.nn.Linear):
    """
    As bitsandbytes 0.50's `Linear4bit` on a CPU with AVX512-BF16: evaluation repacks it and stops
    gradients.
    """

    support_avx512bf16_for_cpu = True

    def __init__(self, layer):
        torch.nn.Module.__init__(self)
        self.weight, self.bias = layer.weight.requires_grad_(False), None
        self.weight.quant_state = types.SimpleNamespace(packing_format_for_cpu=False)

    def forward(self, hidden):
        state = self.weight.quant_state
        if self.support_avx512bf16_for_cpu and not self.training:
            state.packing_format_for_cpu = True
        return super().forward(hidden.detach() if state.packing_format_for_cpu else hidden)

    def _save_to_state_dict(self, *args):
        self.weight.quant_state.packing_format_for_cpu = False
        super()._save_to_state_dict(*args)


@pytest.mark.parametrize("used_before", [False, True])
def test_evaluation_does_not_freeze_a_four_bit_model(used_before):
    model, ids = make_model(), torch.randint(3, 264, (2, 9))
    attention = model.model.layers[-1].self_attn
    attention.o_proj = Repacking(attention.o_proj)
    if used_before:
        model.eval()(input_ids=ids)
    patch_model(model, gate="eaft")
    model.eval()(input_ids=ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert attention.v_proj.weight.grad is not None
    assert attention.v_proj.weight.grad.any()


TINY = [(8, 700), (8, 50000), (16, 32000), (64, 5000)]


@pytest.mark.parametrize(("hidden", "vocab"), TINY)
def test_tiny_random_models_are_not_refused_and_their_faults_are(hidden, vocab):
    """In float32 the logits' own rounding is less than the nll's."""
    faults = {
        "scale": lambda z: z * 1.02,
        "soft cap": lambda z: 0.1 * torch.tanh(z / 0.1),
        "bias": lambda z: z + 1e-3 * torch.arange(z.shape[-1]) / z.shape[-1],
    }
    for seed in range(6):
        torch.manual_seed(seed)
        model = make_model(
            hidden_size=hidden, vocab_size=vocab, initializer_range=0.02, tie_word_embeddings=False
        )
        forward = model.forward
        ids = torch.randint(3, vocab, (4, 16))
        inputs = {"input_ids": ids, "labels": ids}
        head = GatedLMHead(model, "eaft")
        check_logits(model, inputs, lambda x: x)
        if seed == 0:
            for fault in faults.values():
                head.original_forward = with_fault(forward, fault)
                with pytest.raises(ConfigurationError, match="the nll of a token"):
                    check_logits(model, inputs, lambda x: x)


@pytest.mark.parametrize("labelled", [True, False])
def test_logits_of_the_batch_never_exist(labelled, model):
    GatedLMHead(model, "eaft")
    sizes = []
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape))
    ids = torch.randint(3, 264, (8, 32))
    labels = ids if labelled else torch.full_like(ids, -100)
    check_logits(model, {"input_ids": ids, "labels": labels}, lambda x: x)
    assert sizes == [(1, TOKENS, 264)]


def test_a_batch_of_the_shape_of_what_is_compared(model):
    GatedLMHead(model, "eaft")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert ids.shape == (1, TOKENS)
    check_logits(model, {"input_ids": ids, "labels": ids}, gather=lambda found: found)


def test_other_auxiliary_loss_is_refused():
    model = make("GraniteMoE").train()
    ids = torch.randint(3, 264, (2, 9))
    head = GatedLMHead(model, "eaft")
    inputs = {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": torch.ones_like(ids),
        "output_router_logits": True,
    }
    check_logits(model, inputs, lambda x: x)
    head.aux_loss = lambda *args: torch.tensor(2.5)
    with pytest.raises(
        ConfigurationError, match=r"the router's auxiliary loss is .* and 2\.5 by ours"
    ):
        check_logits(model, inputs, lambda x: x)


def test_sharded_model_is_checked_and_refused_by_every_rank():
    assert run_ranks(logits_check_fsdp.main).count("refused: the nll of a token") == 2
