"""
`EAFTTrainer` beside TRL's own `SFTTrainer`, and against itself where two ways must lead to the same
weights.
"""

import dataclasses
import inspect
import math
import re

import pytest
import torch
import trl
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from eaft import EAFTConfig, EAFTTrainer, token_statistics
from eaft.errors import ConfigurationError, NonFiniteError
from eaft.training import config as config_module
from tests.conftest import make_model, make_rows, make_tokenizer

DEFAULTS = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}


def build(cls, path, rows=None, eval_rows=None, peft_config=None, model=None, **settings):
    config = EAFTConfig if cls is EAFTTrainer else SFTConfig
    return cls(
        model or make_model(),
        args=config(str(path), **{**DEFAULTS, **settings}),
        train_dataset=Dataset.from_list(rows or make_rows()),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )


def train(cls, path, resume=None, **settings):
    trainer = build(cls, path, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def steps(trainer, key="loss"):
    return [log[key] for log in trainer.state.log_history if key in log]


def assert_same_training(a, b, initial, tolerance=1e-3):
    """
    Weights may differ by what float32 rounding, amplified by Adam, makes of the distance that
    training went.
    """
    moved = different = 0.0
    for p, q, start in zip(
        a.model.parameters(), b.model.parameters(), initial.parameters(), strict=True
    ):
        different += (p - q).square().sum().item()
        moved += (p - start).square().sum().item()
    assert moved > 0
    assert math.sqrt(different / moved) < tolerance


CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": f"{i} plus {i}"},
            {"role": "assistant", "content": f"It is {2 * i}."},
        ]
    }
    for i in range(12)
]
TEXTS = [{"text": f"{i} and {i} makes {2 * i}. " * (1 + i % 3)} for i in range(12)]
SETTINGS = {
    "completion only": {},
    "every token": {"completion_only_loss": False},
    "text": {"rows": TEXTS},
    "conversations": {"rows": CONVERSATIONS},
    "assistant only": {"rows": CONVERSATIONS, "assistant_only_loss": True},
    "packed": {"packing": True, "max_length": 64},
    "packed, wrapped": {
        "packing": True,
        "packing_strategy": "wrapped",
        "max_length": 64,
        "rows": TEXTS,
    },
    "padding-free": {"padding_free": True, "max_length": None},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "truncated": {"max_length": 14},
    "LoRA": {"peft_config": LoraConfig(r=4, target_modules="all-linear")},
}


@pytest.mark.parametrize(
    ("gate", "loss_type", "setting"),
    [("sft", "nll", setting) for setting in SETTINGS]
    + [("dft", "dft", setting) for setting in ("packed", "accumulated")],
)
def test_equals_trl_step_for_step(setting, gate, loss_type, tmp_path):
    settings = SETTINGS[setting]
    ours = train(EAFTTrainer, tmp_path / "ours", gate=gate, **settings)
    trls = train(SFTTrainer, tmp_path / "trls", loss_type=loss_type, **settings)
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert steps(ours, key) == pytest.approx(steps(trls, key), rel=1e-4), key
    assert len(steps(ours)) == 6
    assert_same_training(ours, trls, build(EAFTTrainer, tmp_path, **settings).model)


def test_bf16_equals_trl_within_bf16(tmp_path):
    ours = train(EAFTTrainer, tmp_path / "ours", gate="sft", bf16=True)
    trls = train(SFTTrainer, tmp_path / "trls", bf16=True)
    # Both round the logits to bf16, 8 bits of mantissa; the mean over tokens is better than one
    # token's 2**-8
    assert steps(ours) == pytest.approx(steps(trls), rel=2**-8)


def test_eaft_trains_differently_and_alpha_zero_is_sft(tmp_path):
    sft = train(EAFTTrainer, tmp_path / "sft", gate="sft")
    zero = train(EAFTTrainer, tmp_path / "zero", gate="eaft", gate_alpha=0.0)
    eaft = train(EAFTTrainer, tmp_path / "eaft", gate="eaft", gate_alpha=2.0)
    assert steps(zero) == steps(sft)
    assert all(e < s for e, s in zip(steps(eaft), steps(sft), strict=True))
    with pytest.raises(AssertionError):
        assert_same_training(eaft, sft, make_model())


@pytest.mark.parametrize(
    "peft_config", [None, LoraConfig(r=4, target_modules="all-linear")], ids=["full", "LoRA"]
)
def test_accumulating_4_x_1_equals_1_x_4(tmp_path, peft_config):
    split = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "peft_config": peft_config,
    }
    one = train(EAFTTrainer, tmp_path / "4x1", **split)
    four = train(EAFTTrainer, tmp_path / "1x4", peft_config=peft_config)
    assert steps(one) == pytest.approx(steps(four), rel=1e-5)
    # Adam hides a factor in all gradients, clipping does not (transformers 5.4 divides them by 4
    # once more)
    assert steps(one, "grad_norm") == pytest.approx(steps(four, "grad_norm"), rel=1e-4)
    assert_same_training(one, four, build(EAFTTrainer, tmp_path, **split).model)


@pytest.mark.parametrize("setting", ["completion only", "packed", "LoRA"])
def test_resumed_run_equals_uninterrupted(tmp_path, setting):
    settings = {**SETTINGS[setting], "save_strategy": "steps", "save_steps": 2}
    whole = train(EAFTTrainer, tmp_path / "whole", **settings)
    resumed = train(
        EAFTTrainer,
        tmp_path / "resumed",
        resume=str(tmp_path / "whole" / "checkpoint-4"),
        **settings,
    )
    assert steps(resumed) == steps(whole)
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_eval_loss_is_plain_nll_whatever_the_gate(tmp_path):
    losses = [
        build(EAFTTrainer, tmp_path, eval_rows=make_rows(5), gate=gate).evaluate()
        for gate in ("sft", "eaft", "dft")
    ]
    trls = build(SFTTrainer, tmp_path, eval_rows=make_rows(5)).evaluate()
    for metrics in losses:
        assert metrics["eval_loss"] == pytest.approx(trls["eval_loss"], rel=1e-5)


def test_best_checkpoint_is_kept_by_evaluation_during_training(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    trainer = train(
        EAFTTrainer,
        tmp_path,
        eval_rows=make_rows(5),
        load_best_model_at_end=True,
        save_total_limit=1,
        **settings,
    )
    losses = steps(trainer, "eval_loss")
    assert len(losses) == 3
    assert trainer.state.best_metric == min(losses)


@pytest.mark.parametrize("accumulated", [1, 4])
def test_metrics_are_those_of_the_tokens(tmp_path, accumulated):
    """
    One step on the whole data, with a model sure enough to have conflicts, against its own full
    logits.
    """
    model = make_model(initializer_range=0.6)
    settings = {
        "per_device_train_batch_size": 16 // accumulated,
        "gradient_accumulation_steps": accumulated,
    }
    trainer = build(EAFTTrainer, tmp_path, model=model, max_steps=1, **settings)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
            :, :-1
        ]
    labelled = batch["labels"][:, 1:] != -100
    stats = token_statistics(logits[labelled].double(), batch["labels"][:, 1:][labelled])
    conflict = (stats.entropy < 0.5) & (stats.log_prob < math.log(0.1))
    assert 0 < conflict.sum() < len(conflict)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["nll"] == pytest.approx(-stats.log_prob.mean().item(), rel=1e-4)
    assert log["mean_gate"] == pytest.approx(
        (stats.top_k_entropy / math.log(20)).mean().item(), rel=1e-4
    )
    assert log["conflict_share"] == pytest.approx(conflict.double().mean().item())
    share = stats.log_prob[conflict].sum() / stats.log_prob.sum()
    assert log["conflict_nll_share"] == pytest.approx(share.item(), rel=1e-4)
    for name, group in (("high", stats.entropy >= 2.0), ("low", stats.entropy <= 0.5)):
        assert 0 < group.sum() < len(group)
        assert log[f"nll_{name}_entropy"] == pytest.approx(
            -stats.log_prob[group].mean().item(), rel=1e-4
        )


def test_groups_without_a_token_are_not_logged(tmp_path):
    """A model that has learned nothing is sure of nothing: every entropy is near ln V."""
    log = train(EAFTTrainer, tmp_path, max_steps=1).state.log_history[0]
    assert log["nll_high_entropy"] == pytest.approx(log["nll"])
    assert "nll_low_entropy" not in log


@pytest.mark.parametrize("padding_free", [False, True])
def test_loss_that_is_not_finite_stops_before_the_weights(tmp_path, padding_free):
    trainer = build(
        EAFTTrainer,
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        padding_free=padding_free,
        max_length=None,
        rows=make_rows(8),
    )
    forward = trainer.model.model.forward

    def poisoned(*args, **kwargs):
        output = forward(*args, **kwargs)
        if trainer.state.global_step == 1:
            output.last_hidden_state = output.last_hidden_state * math.nan
        return output

    trainer.model.model.forward = poisoned
    with pytest.raises(
        NonFiniteError, match=r"The loss is nan in training, step 2; the batch's rows are"
    ) as raised:
        trainer.train()
    # Both epochs' second batch holds four rows, each named by its index and text
    named = [
        i
        for i in range(8)
        if f"{i}: '{trainer.processing_class.decode(trainer.train_dataset[i]['input_ids'])[:8]}"
        in str(raised.value)
    ]
    assert len(named) == 4
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_gradient_that_is_not_finite_stops_before_the_weights(tmp_path):
    trainer = build(EAFTTrainer, tmp_path)
    trainer.model.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(
        NonFiniteError, match=r"The gradient's norm is (nan|inf) in training, step 1"
    ):
        trainer.train()
    for p, q in zip(trainer.model.parameters(), make_model().parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": "eatf"}, r"gate='eatf' is unknown. Did you mean 'eaft'"),
        ({"gate_top_k": 1}, "gate_top_k must be at least 2, got 1"),
        ({"gate_alpha": -0.5}, "alpha must be a number of at least 0, got -0.5"),
        ({"gate_alpha": math.nan}, "gate_alpha=nan: expected a finite number"),
        ({"gate": "dft", "gate_alpha": 2.0}, "gate='dft' takes no alpha"),
        ({"loss_type": "dft"}, "loss_type='dft' does not go with a gate"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor does not go with a gate"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        EAFTConfig("out", use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("slow", "given", "expected"),
    [(True, None, False), (True, True, True), (False, None, True), (False, False, False)],
)
def test_bf16_is_the_default_where_the_cpu_is_fast_in_it(
    slow, given, expected, monkeypatch, tmp_path
):
    monkeypatch.setattr(config_module, "slow_bfloat16", lambda: slow)
    assert EAFTConfig(tmp_path, use_cpu=True, bf16=given).bf16 is expected


def test_empty_data(tmp_path):
    with pytest.raises(ConfigurationError, match="data set is empty"):
        EAFTTrainer(
            make_model(),
            EAFTConfig(str(tmp_path), use_cpu=True),
            train_dataset=Dataset.from_list([]),
        )


@dataclasses.dataclass
class OwnConfig(SFTConfig):
    own: str = "kept"


@pytest.mark.parametrize("config", [SFTConfig, TrainingArguments, OwnConfig])
def test_other_arguments_are_completed(config, tmp_path):
    given = config(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        learning_rate=0.125,
        hub_token="secret",
    )
    trainer = EAFTTrainer(
        make_model(), given, None, Dataset.from_list(make_rows()), None, make_tokenizer()
    )
    assert isinstance(trainer.args, EAFTConfig)
    assert (trainer.args.gate, trainer.args.learning_rate, trainer.args.hub_token) == (
        "eaft",
        0.125,
        "secret",
    )
    assert getattr(trainer.args, "own", None) == getattr(given, "own", None)


def test_arguments_by_position_are_those_of_trl():
    def names(cls):
        return [
            p.name
            for p in inspect.signature(cls).parameters.values()
            if p.kind == p.POSITIONAL_OR_KEYWORD
        ]

    assert names(EAFTTrainer) == names(SFTTrainer)


@pytest.mark.parametrize("args", [{}, "out"])
def test_what_is_no_configuration_is_refused(args):
    with pytest.raises(
        ConfigurationError, match="args must be an EAFTConfig, or TRL's SFTConfig; got"
    ):
        EAFTTrainer(make_model(), args, train_dataset=Dataset.from_list(make_rows()))


@pytest.mark.parametrize(
    ("loss_type", "way"),
    [("dft", "use gate='dft'"), ("chunked", "a gate weighs the 'nll'. Leave it out")],
)
def test_other_losses_are_refused(loss_type, way, tmp_path):
    with pytest.raises(ConfigurationError, match=way):
        EAFTConfig(str(tmp_path), loss_type=loss_type, use_cpu=True, bf16=False)
    assert (
        EAFTConfig(str(tmp_path), loss_type="chunked_nll", use_cpu=True, bf16=False).loss_type
        == "nll"
    )


def no_weight(statistics):
    return torch.zeros_like(statistics.log_prob)


def test_a_first_gradient_of_zero_says_why(tmp_path):
    """Weights of 0, frozen or unused parameters are refused; a batch without labels is not."""

    def refused(match, change=lambda trainer: None, **settings):
        trainer = build(EAFTTrainer, tmp_path, **settings)
        change(trainer)
        with pytest.raises(ConfigurationError, match=match):
            trainer.train()
        assert trainer.state.global_step == 0

    def unused(trainer):
        trainer.model.requires_grad_(False)
        trainer.model.register_parameter("apart", torch.nn.Parameter(torch.ones(3)))
        # as gradient checkpointing does: the backward pass has a leaf
        trainer.model.enable_input_require_grads()

    refused(
        r"is 0 in training, step 1.*gate='\S+no_weight' gives weight 0 to each of its \d+ labelled",
        gate=f"{__name__}:no_weight",
    )
    off = "adapters are switched off: call enable_adapter_layers"
    refused(off, lambda t: t.model.disable_adapter_layers(), peft_config=LoraConfig(r=2))
    refused(r"The 1 trainable parameters \(apart, ...\) have no part in the loss", unused)

    def zeros(trainer):
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(not parameter.requires_grad)

    nothing = r"each of the \d+ trainable parameters has a gradient of 0: they are all 0"
    refused(nothing, zeros, peft_config=LoraConfig(r=2))
    refused("Every parameter of the model is frozen", lambda t: t.model.requires_grad_(False))
    unlabelled = {"input_ids": [3, 4, 5], "labels": [-100] * 3}
    rows = [unlabelled] * 4 + [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 4
    trainer = build(
        EAFTTrainer, tmp_path, rows=rows, train_sampling_strategy="sequential", max_steps=2
    )
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("gate", ["eaft", "psft"])
def test_no_label_after_truncation(tmp_path, packing, gate):
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, -100, 6]}] * 4
    with pytest.raises(
        ConfigurationError,
        match=r"No row has a labelled token left after truncation to max_length=3",
    ):
        build(EAFTTrainer, tmp_path, rows=rows, max_length=3, packing=packing, gate=gate)


def test_dropped_rows_are_counted(tmp_path, caplog):
    # The prompts of rows 10 to 15 are a byte longer each way: nothing of their completion is left
    with caplog.at_level("WARNING"):
        trainer = build(EAFTTrainer, tmp_path, max_length=9)
    dropped = 16 - len(trainer.train_dataset)
    assert dropped > 0
    assert f"{dropped} of 16 rows have no labelled token left" in caplog.text


def test_model_card_names_the_gate(tmp_path):
    trainer = build(EAFTTrainer, tmp_path, gate_alpha=2.0)
    trainer.create_model_card(model_name="mine", dataset_name="my/data")
    card = (tmp_path / "README.md").read_text()
    assert "| `eaft` | 2.0 | top-k | 20 |" in card
    assert "my/data" in card
    assert "2601.02151" in card
    size = sum(p.numel() for p in trainer.model.parameters())
    assert f"All {size:,} parameters, on 16 rows, for 0 steps (0 epochs)." in card


@pytest.mark.parametrize("wanted", [True, False])
def test_model_card_says_which_tokens_were_trained_on(tmp_path, wanted):
    tokenizer = make_tokenizer()
    # Without these marks TRL cannot tell the assistant's tokens, and `label_turns` does
    template = re.sub(r"{%-? *(end)?generation *-?%}", "", tokenizer.chat_template)
    assert template != tokenizer.chat_template
    tokenizer.chat_template = template
    trainer = EAFTTrainer(
        make_model(),
        args=EAFTConfig(str(tmp_path), **DEFAULTS, assistant_only_loss=wanted),
        train_dataset=Dataset.from_list(CONVERSATIONS),
        processing_class=tokenizer,
    )
    assert not trainer.args.assistant_only_loss
    trainer.create_model_card()
    assert f"- assistant_only_loss: {wanted}\n" in (tmp_path / "README.md").read_text()


def test_model_card_says_what_was_trained_and_keeps_trls_links(tmp_path, monkeypatch):
    space = "https://huggingface.co/spaces/me/trackio"
    monkeypatch.setattr(trl.trainer.base_trainer, "get_trackio_space_url", lambda: space)
    adapter = LoraConfig(r=4, lora_alpha=9, target_modules=["v_proj", "q_proj"])
    trainer = build(EAFTTrainer, tmp_path, peft_config=adapter, max_steps=3)
    trainer.train()
    trainer.create_model_card("mine", str(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    for line in ("- kind: LORA", "- r: 4", "- lora_alpha: 9", "- target_modules: q_proj, v_proj"):
        assert line in card.text
    layers = 2 * 4 * (32 + 32 + 32 + 16)  # two matrices of rank 4 beside each query and value
    size = sum(p.numel() for p in trainer.model.parameters())
    trained = f"{layers:,} of {size:,} parameters, on 16 rows, for 3 steps (0.75 epochs)."
    assert trained in card.text
    assert f"]({space})" in card.text
    assert {"trl", "sft", f"trackio:{space}"} <= set(card.data.tags)
    assert card.data.library_name == "peft"
    assert card.data.datasets is None  # a folder of this machine


def test_compute_loss_func_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="compute_loss_func"):
        EAFTTrainer(
            make_model(), EAFTConfig(str(tmp_path), use_cpu=True), compute_loss_func=lambda *a: 0
        )


@pytest.mark.parametrize(
    "setting",
    [{"init_lora_weights": "pissa"}, {"init_lora_weights": "OLoRA"}, {"bias": "all"}],
    ids=str,
)
def test_refuses_a_reference_that_is_not_the_base_model(tmp_path, setting):
    adapter = LoraConfig(r=4, target_modules=["q_proj"], **setting)
    with pytest.raises(
        ConfigurationError, match=f"{next(iter(setting))}=.*base model.*gate='sft-kl'.*: use "
    ):
        build(EAFTTrainer, tmp_path, peft_config=adapter, gate="sft-kl")
    build(EAFTTrainer, tmp_path, peft_config=adapter, gate="eaft")  # has no reference
