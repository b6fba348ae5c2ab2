"""
The head inside the model's forward: equal to the reference loss on the model's own full logits, for
every option.
"""

import contextlib
import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
)

from eaft import gated_cross_entropy
from eaft.errors import ConfigurationError
from eaft.objective import fused
from eaft.objective.gate_spec import bind_gate
from eaft.objective.registry import GATES
from eaft.training import head
from eaft.training.head import GatedLMHead, frozen_copy, logit_scale
from tests.conftest import SHAPE, make_model
from tests.objective.test_gates import GIVEN, every_gate_once

SIZES = {**SHAPE, "initializer_range": 0.3}
CONFIGS = {
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "soft-capped": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "scaled": CohereConfig(**SIZES, logit_scale=0.25),
    "divided": GraniteConfig(**SIZES, logits_scaling=4.0),
    "biased": PhiConfig(**SIZES),
    "mixture of experts": MixtralConfig(
        **SIZES, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1
    ),
}


def build(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name], attn_implementation="eager", dtype=torch.float32
    )
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 264, (3, 11), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[2] = -100
    labels[2, 7] = ids[2, 7]
    return ids, labels


FOUR_TOKENS = 4 * 264 * 4  # bytes of the float32 logits of four tokens
# Which example each position is from: two in the first row, as if packed
EXAMPLE_IDS = torch.tensor([[0] * 6 + [1] * 5, [2] * 11, [3] * 11])
EXAMPLE_NLL = torch.tensor([0.2, 1.1, 0.7, 2.0])
# Which token of the data each is: rows out of order. The base model finds 256 tokens about as
# likely
TOKEN_NUMBERS = torch.arange(33).view(3, 11)[[2, 0, 1]]
OLD_LOG_PROB = torch.linspace(-6.5, -4.5, 33)
# On a model that knows nothing: the papers' values would shut out everything, or magnify rounding
UNTRAINED = {
    "profit": {"prob_threshold": 0.003},
    "mile": {"gamma": 0.1},
    "stm": {"perplexity_threshold": 250.0},
}


def nudged(model):
    """A copy whose distribution differs a little."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return other


@pytest.mark.parametrize(("gate", "name"), every_gate_once(CONFIGS))
@pytest.mark.parametrize("budget", [fused.LOGITS_BUDGET, FOUR_TOKENS])
def test_equals_reference_on_full_logits(name, gate, budget, monkeypatch):
    monkeypatch.setattr(fused, "LOGITS_BUDGET", budget)
    params = {**GIVEN, **UNTRAINED}.get(gate, {})
    ids, labels = batch()
    model = build(name).train()
    base = nudged(model).eval()
    outputs = model(input_ids=ids)
    expected = gated_cross_entropy(
        outputs.logits[:, :-1],
        labels[:, 1:],
        gate,
        example_ids=EXAMPLE_IDS[:, 1:],
        example_nll=EXAMPLE_NLL[EXAMPLE_IDS][:, 1:],
        old_log_prob=OLD_LOG_PROB[TOKEN_NUMBERS][:, 1:],
        reference_logits=base(input_ids=ids).logits[:, :-1],
        **params,
    )
    if name == "mixture of experts":
        # The model's own forward adds the auxiliary loss only when it has labels
        aux_loss = model(input_ids=ids, labels=labels).aux_loss
        expected = expected + 0.1 * aux_loss
    expected.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()

    gated = GatedLMHead(
        model, bind_gate(gate, params), frozen_copy(base) if GATES[gate].anchor else None
    )
    gated.example_nll, gated.old_log_prob = EXAMPLE_NLL, OLD_LOG_PROB
    numbers = {"example_ids": EXAMPLE_IDS, "token_numbers": TOKEN_NUMBERS}
    outputs = model(input_ids=ids, labels=labels, **numbers, fused_lm_head=True)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.loss, expected)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n], rtol=1e-4, atol=1e-6)
    assert sum(p.grad.norm() for p in model.parameters()) > 1e-3
    assert all(p.grad is None for p in base.parameters())


def test_a_frozen_copy_is_a_copy(model):
    GatedLMHead(model, "eaft")  # patched before, as a trainer's model is
    ids, labels = batch()
    expected = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    frozen = frozen_copy(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1.0)
    assert torch.equal(frozen(ids), expected)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert model(
        input_ids=ids, labels=labels, fused_lm_head=True
    ).loss.requires_grad  # the model's patch is still there


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_with_adapters_the_reference_is_the_model_without_them(modules_to_save):
    ids, labels = batch()
    base = build("untied")
    lora = LoraConfig(
        r=4, target_modules="all-linear", lora_dropout=0.5, modules_to_save=modules_to_save
    )
    peft_model = get_peft_model(copy.deepcopy(base), lora)
    with torch.no_grad():
        for p in peft_model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    model = peft_model.get_base_model()
    policy = copy.deepcopy(peft_model)
    gated = GatedLMHead(model, "sft-kl", peft_model)
    loss = peft_model.train()(input_ids=ids, labels=labels, fused_lm_head=True).loss
    assert all(module.training for module in model.modules())
    loss.backward()
    assert {n for n, p in peft_model.named_parameters() if p.grad is not None} == {
        n for n, p in peft_model.named_parameters() if p.requires_grad
    }

    # Dropout is on in training; without it the loss is that of full logits
    for module in (*peft_model.modules(), *policy.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = peft_model(input_ids=ids, labels=labels, fused_lm_head=True).loss
    logits, reference = (m(input_ids=ids).logits[:, :-1] for m in (policy, base))
    expected = gated_cross_entropy(logits, labels[:, 1:], "sft-kl", reference_logits=reference)
    torch.testing.assert_close(loss, expected)
    assert gated.losses.kl.mean() > 1e-3


def test_an_adapter_on_the_head_is_refused():
    """
    As it is made it changes no logit, so that the check of the logits sees nothing; and it would
    get no gradient.
    """
    ids, labels = batch()
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    refused = pytest.raises(
        ConfigurationError, match=r"The head has an adapter \(peft\.tuners\..*modules_to_save"
    )
    base = build("untied")
    gated = GatedLMHead(base, "eaft")
    peft_model = get_peft_model(base, config)  # after the head was patched
    for run in (partial(peft_model, fused_lm_head=True), partial(gated.statistics, base)):
        with refused:
            run(input_ids=ids, labels=labels)
    with peft_model.disable_adapter():
        assert peft_model(input_ids=ids, labels=labels, fused_lm_head=True).loss.isfinite()
    with refused:
        GatedLMHead(get_peft_model(build("untied"), config).get_base_model(), "eaft")
    peft_model.merge_adapter()
    assert peft_model(input_ids=ids, labels=labels, fused_lm_head=True).loss.isfinite()


def test_evaluation_does_not_run_the_reference(model):
    ids, labels = batch()
    reference = frozen_copy(model)
    gated = GatedLMHead(model, "asft", reference)
    reference.forward = None
    with torch.no_grad():
        loss = model.eval()(input_ids=ids, labels=labels, fused_lm_head=True).loss
    assert gated.losses.kl is None
    torch.testing.assert_close(loss, model(input_ids=ids, labels=labels).loss.detach())


def test_shifted_labels_are_taken_as_they_stand(model):
    ids, labels = batch()
    GatedLMHead(model, "eaft")
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    a = model(input_ids=ids, labels=labels, fused_lm_head=True).loss
    b = model(input_ids=ids, labels=None, shift_labels=shifted, fused_lm_head=True).loss
    torch.testing.assert_close(a, b)


def test_evaluation_is_plain_nll(model):
    ids, labels = batch()
    gated = GatedLMHead(model, bind_gate("eaft", {"alpha": 2.0}))
    expected = model(input_ids=ids, labels=labels).loss
    with torch.no_grad():
        loss = model.eval()(input_ids=ids, labels=labels, fused_lm_head=True).loss
    torch.testing.assert_close(loss, expected.detach())
    assert torch.equal(gated.losses.weights, torch.ones(15))


# Each labelled token once, and once for a reference; twice if the gate must see the batch first
@pytest.mark.parametrize(("gate", "passes"), [("eaft", 1), ("asft", 2), ("talr", 2)])
def test_full_logits_never_exist(gate, passes, model, monkeypatch):
    monkeypatch.setattr(fused, "LOGITS_BUDGET", FOUR_TOKENS)
    sizes = []
    project = fused.Projector.__call__

    def spy(projection, rows):
        z = project(projection, rows)
        sizes.append(len(z))
        assert projection.memory.nbytes == FOUR_TOKENS
        return z

    GatedLMHead(model, gate, frozen_copy(model))
    monkeypatch.setattr(fused.Projector, "__call__", spy)
    ids, labels = batch()
    model.train()(input_ids=ids, labels=labels, fused_lm_head=True).loss.backward()
    assert max(sizes) == 4
    assert sum(sizes) == passes * 15  # labelled tokens only


def test_no_labelled_token_gives_zero_gradients(model):
    ids, labels = batch()
    GatedLMHead(model, "eaft")
    loss = model.train()(
        input_ids=ids, labels=torch.full_like(labels, -100), fused_lm_head=True
    ).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())


def test_head_that_is_partitioned_outside_its_context(monkeypatch):
    """
    As under ZeRO-3: the head's weight is empty but while it is gathered, in the forward and in the
    backward pass.
    """
    monkeypatch.setattr(fused, "LOGITS_BUDGET", FOUR_TOKENS)
    ids, labels = batch()
    expected = build("untied").train()
    GatedLMHead(expected, "eaft")
    expected(input_ids=ids, labels=labels, fused_lm_head=True).loss.backward()

    model = build("untied").train()
    GatedLMHead(model, "eaft")
    weight = model.lm_head.weight
    full, depth = weight.data, 0

    @contextlib.contextmanager
    def gather(*parameters):
        nonlocal depth
        assert parameters[0] is weight
        weight.data, depth = full, depth + 1
        yield
        depth -= 1
        if depth == 0:
            weight.data = torch.empty(0)

    monkeypatch.setattr(head, "gather_partitioned", gather)
    weight.register_hook(
        lambda grad: setattr(weight, "data", full)
    )  # DeepSpeed sees to the gradient's own reduction
    weight.data = torch.empty(0)
    loss = model(input_ids=ids, labels=labels, fused_lm_head=True).loss
    assert weight.numel() == 0
    loss.backward()
    torch.testing.assert_close(weight.grad, expected.lm_head.weight.grad)
    torch.testing.assert_close(model.model.norm.weight.grad, expected.model.norm.weight.grad)


def test_generation_and_plain_forward_are_the_models_own(model):
    ids, labels = batch()
    expected = model(input_ids=ids, labels=labels).loss
    generated = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    GatedLMHead(model, "eaft")
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, expected)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=4, do_sample=False), generated)


def test_logit_scale_is_one_without_a_field():
    assert logit_scale(make_model().config) == 1.0


def test_reference_head_that_is_partitioned_outside_its_context(monkeypatch):
    """
    As ZeRO-3 leaves the frozen head under LoRA with modules_to_save=["lm_head"]: it is not the
    policy's.
    """
    ids, labels = batch()
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])

    def adapted():
        torch.manual_seed(0)
        peft_model = get_peft_model(build("untied"), config).train()
        model = peft_model.get_base_model()
        with torch.no_grad():  # as after some steps
            model.lm_head.weight.mul_(1.5)
        GatedLMHead(model, "sft-kl", peft_model)
        return model

    model = adapted()
    expected = model(input_ids=ids, labels=labels, fused_lm_head=True).loss

    model = adapted()
    weight = model.lm_head.original_module.weight
    full, gathered = weight.data, []

    @contextlib.contextmanager
    def gather(*parameters):
        gathered.extend(parameters)
        weight.data = full if any(p is weight for p in parameters) else weight.data
        yield
        weight.data = torch.empty(0)

    monkeypatch.setattr(head, "gather_partitioned", gather)
    weight.data = torch.empty(0)
    assert model(input_ids=ids, labels=labels, fused_lm_head=True).loss.item() == pytest.approx(
        expected.item()
    )
    assert any(p is model.lm_head.weight for p in gathered)
