"""
Architectures with something of their own in the head or the experts, trained beside a trainer that
is not ours.

That is TRL's `SFTTrainer` with its default loss. TRL 1.16 fails on some (it reads `num_experts`,
which they call otherwise, or a base model that they do not have), and does not know the caps and
scales of others: these are trained on the loss of the model's own forward.
"""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM
from trl import SFTTrainer

from eaft import EAFTTrainer
from eaft.training.head import GatedLMHead
from tests.conftest import SHAPE, make_rows
from tests.training.test_trainer import assert_same_training, build, steps

SIZES = {
    **SHAPE,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
INKLING = {
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
TRL, OWN = "TRL", "own forward"
# name: model_type, what differs from the defaults, the trainer that it is compared with
FAMILIES = {
    "Qwen3-MoE": (
        "qwen3_moe",
        {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        TRL,
    ),
    "GraniteMoE": ("granitemoe", {**LOCAL, "logits_scaling": 2.0}, OWN),
    "Granite-4": (
        "granitemoehybrid",
        {
            **LOCAL,
            **MAMBA,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 16,
            "logits_scaling": 2.0,
        },
        OWN,
    ),
    "PhiMoE": ("phimoe", {**LOCAL, "lm_head_bias": True}, OWN),
    # Its own forward has no auxiliary loss, and TRL's reads `num_experts`
    "Llama-4": (
        "llama4_text",
        {**HEADS, **LOCAL, "intermediate_size_mlp": 64, "router_aux_loss_coef": 0.0},
        OWN,
    ),
    "Gemma-3": ("gemma3_text", {**HEADS, "final_logit_softcapping": 2.0}, TRL),
    "GLM-4": ("glm4", HEADS, TRL),
    "Falcon-H1": (
        "falcon_h1",
        {**HEADS, **MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
        TRL,
    ),
    "RecurrentGemma": (
        "recurrent_gemma",
        {"logits_soft_cap": 2.0, "lru_width": 32, "num_hidden_layers": 3},
        OWN,
    ),
    "xLSTM": (
        "xlstm",
        {
            "hidden_size": 64,
            "num_heads": 4,
            "autocast_kernel_dtype": "float32",
            "output_logit_soft_cap": 2.0,
        },
        OWN,
    ),
    "Inkling": (
        "inkling_text",
        {**INKLING, "unpadded_vocab_size": 262, "logits_mup_width_multiplier": 3.0},
        OWN,
    ),
}


# Adam would make whole steps of the rounding in a gradient that is zero (that of a key's bias)
SGD = {"optim": "sgd", "learning_rate": 0.05}
# Both losses and both gradients are float32 sums along a path of some thousand roundings of 2**-24,
# which add up as their square root at best, and linearly at worst
TOLERANCE = 1000 * 2**-24


class OwnForward(SFTTrainer):
    """Trains on the loss that the model's own forward returns."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def make(name):
    model_type, fields, _ = FAMILIES[name]
    known = AutoConfig.for_model(model_type)
    config = AutoConfig.for_model(
        model_type, **{k: v for k, v in SIZES.items() if hasattr(known, k)} | fields
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )


def make_trainer(cls, name, path, lora):
    settings = {
        "router_aux_loss_coef": FAMILIES[name][1].get("router_aux_loss_coef"),
        "max_steps": 2,
        **SGD,
    }
    if cls is EAFTTrainer:
        settings["gate"] = "sft"
    peft_config = LoraConfig(r=4, target_modules=r".*\.(q_proj|v_proj|q|v)") if lora else None
    return build(cls, path, make_rows(8), peft_config=peft_config, model=make(name), **settings)


@pytest.mark.parametrize(
    ("name", "lora"),
    [(name, False) for name in FAMILIES]
    + [(name, True) for name in ("Qwen3-MoE", "Gemma-3", "Inkling")],
)
def test_trains_as_another_trainer_does(name, lora, tmp_path):
    peer = {TRL: SFTTrainer, OWN: OwnForward}[FAMILIES[name][2]]
    ours, theirs = (make_trainer(cls, name, tmp_path, lora) for cls in (EAFTTrainer, peer))
    untrained = copy.deepcopy(theirs.model)
    for trainer in (ours, theirs):
        torch.manual_seed(0)  # PhiMoE's routers draw while they train
        trainer.train()
    assert steps(ours) == pytest.approx(steps(theirs), rel=TOLERANCE)
    assert_same_training(ours, theirs, untrained, TOLERANCE)


@pytest.mark.parametrize("name", ["Qwen3-MoE", "GraniteMoE"])
def test_eval_loss_of_experts_is_plain_nll(name, tmp_path):
    model, rows = make(name), make_rows(5)
    trainer = build(
        EAFTTrainer, tmp_path, eval_rows=rows, model=model, gate="sft", router_aux_loss_coef=0.5
    )
    batch = trainer.data_collator(list(trainer.eval_dataset))
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        logits = model.eval()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), labels.flatten())
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(nll.item(), rel=TOLERANCE)
    assert metrics["eval_aux_loss"] > 1
    trainer.train()
    difference = steps(trainer)[0] - steps(trainer, "nll")[0]
    assert difference == pytest.approx(0.5 * steps(trainer, "aux_loss")[0], rel=1e-3)


def test_auxiliary_loss_where_models_have_none_of_their_own(tmp_path):
    """
    E sum_e f_e P_e (arXiv:2101.03961, equation 4) over the tokens of all layers, for Llama 4's
    routers.
    """
    model = make("Llama-4").train()
    ids = torch.randint(3, 264, (2, 9))
    GatedLMHead(model, "sft")
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "output_router_logits": True,
    }
    found = model(**inputs, labels=ids, fused_lm_head=True).aux_loss
    probs = torch.cat(model.model(**inputs).router_logits).softmax(-1).double()
    used = torch.nn.functional.one_hot(probs.topk(2).indices, 4).sum(1).double()
    assert found.item() == pytest.approx(
        4 * (used.mean(0) * probs.mean(0)).sum().item(), rel=TOLERANCE
    )


def test_family_with_experts_in_a_size_without(tmp_path):
    """Granite 4's dense hybrids: TRL asks for the logits of routers that they do not have."""
    config = make("Granite-4").config
    config.num_local_experts, config.num_experts_per_tok = 0, 0
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    trainer = build(EAFTTrainer, tmp_path, gate="sft", model=model, max_steps=2)
    trainer.train()
    assert steps(trainer) == pytest.approx(steps(trainer, "nll"), rel=1e-5)
    assert steps(trainer, "aux_loss") == [0, 0]
