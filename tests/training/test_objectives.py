"""
What the gates need beside a token's own statistics: followed examples, one pass with the base
model, a reference.
"""

import json
import math
import random

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from trl import SFTTrainer

from eaft import EAFTConfig, EAFTTrainer, TokenStatistics, gated_cross_entropy, token_statistics
from eaft.errors import ConfigurationError, NonFiniteError
from eaft.objective.gate_spec import bind_gate
from eaft.objective.registry import GATES, Gate
from eaft.training.gate_measurements import (
    MEASURED_PARAMETERS,
    MEASUREMENTS_FILE,
    OLD_LOG_PROB_ABOUT_FILE,
    OLD_LOG_PROB_FILE,
    Histogram,
    fingerprint,
)
from tests.conftest import make_model, make_rows, make_tokenizer
from tests.training.test_trainer import build, steps, train

LORA = LoraConfig(r=4, target_modules="all-linear")
SKETCH = (
    1e-5 + 2**-15
)  # of two ways to compute a statistic, and what `Histogram` states of its percentiles


def make_examples(n=14):
    """
    Prompt-completion rows, each of its own length and text; some longer than the packed rows below.
    """
    letters = random.Random(0)
    return [
        {"prompt": f"{i}:", "completion": "".join(letters.choices("abcdefgh", k=3 + 7 * (i % 8)))}
        for i in range(n)
    ]


SETTINGS = {
    "padded": {"max_length": None},
    "cut": {"max_length": 30},
    "cut at the front": {"max_length": 30, "truncation_mode": "keep_end"},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 32},
    "packed and split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 32},
    "packed and wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 32},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_token_is_of_the_example_it_says(setting, shuffle, tmp_path):
    settings = {**SETTINGS[setting], "shuffle_dataset": shuffle, "rows": make_examples()}
    trainer = build(EAFTTrainer, tmp_path, gate="flow", **settings)
    tokenizer = make_tokenizer()
    texts = [
        tokenizer(row["prompt"] + row["completion"])["input_ids"] + [2] for row in make_examples()
    ]
    seen = set()
    for row in trainer.train_dataset:
        assert len(row["example_ids"]) == len(row["input_ids"])
        for example in set(row["example_ids"]):
            piece = [
                t for t, e in zip(row["input_ids"], row["example_ids"], strict=True) if e == example
            ]
            text = texts[example]
            assert any(text[i : i + len(piece)] == piece for i in range(len(text)))
            seen.add(example)
    assert len(seen) == 14
    # TRL's rows, but for the new column
    trls = build(SFTTrainer, tmp_path, **settings).train_dataset
    for column in ("input_ids", "labels"):
        assert trainer.train_dataset[column][:] == trls[column][:]

    # The collator lays them out as it lays out tokens
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    plain = trainer.data_collator.collator([trls[i] for i in range(3)])
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    for ids, label, example in zip(
        *(batch[k].view(-1) for k in ("input_ids", "labels", "example_ids")), strict=True
    ):
        if label != -100:
            assert ids in texts[example]


def base_statistics(rows, max_length=None, split=None):
    """
    Each example's statistics under the base model, from full logits: alone, cut, or in pieces
    without context.
    """
    model, tokenizer, found = make_model(), make_tokenizer(), []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = (prompt + tokenizer(row["completion"])["input_ids"] + [2])[:max_length]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        size = split or len(ids)
        pieces = []
        for start in range(0, len(ids), size):
            piece = torch.tensor(ids[start : start + size])
            targets = torch.tensor(labels[start : start + size])[1:]
            with torch.no_grad():
                logits = model(piece.unsqueeze(0)).logits[0, :-1]
            pieces.append(token_statistics(logits[targets != -100], targets[targets != -100]))
        found.append(TokenStatistics.cat(pieces))
    return found


@pytest.mark.parametrize("setting", ["padded", "cut", "packed, keep_end", "packed and split"])
def test_flow_is_measured_with_the_base_model(setting, tmp_path):
    packed_from_the_start = {
        "packing": True,
        "max_length": 32,
        "truncation_mode": "keep_end",
    }  # `bfd` takes no notice
    settings = {
        **SETTINGS.get(setting, packed_from_the_start),
        "rows": make_examples(),
        "learning_rate": 0.05,
    }
    trainer = train(EAFTTrainer, tmp_path, gate="flow", **settings)
    cut = (
        settings["max_length"]
        if setting not in ("packed and split", "padded", "padding-free")
        else None
    )
    split = 32 if setting == "packed and split" else None
    means = [stats.nll.mean().item() for stats in base_statistics(make_examples(), cut, split)]
    measured = json.loads((tmp_path / MEASUREMENTS_FILE).read_text())
    assert measured["example_nll"] == pytest.approx(means, rel=1e-5)
    assert measured["params"]["tau"] == pytest.approx(np.median(means), rel=1e-5)

    # In training, long after the model has moved, each token has the weight of its example
    seen = set()
    for batch in trainer.get_train_dataloader():
        trainer.model(**batch, fused_lm_head=True)
        losses = trainer.gated_lm_head.losses
        assert losses.weights.tolist() == pytest.approx(
            [
                math.exp(-means[i] / np.median(means))
                for i in losses.statistics.example_ids.tolist()
            ],
            rel=1e-5,
        )
        seen |= set(losses.weights.tolist())
    assert len(seen) == 14


@pytest.mark.parametrize("setting", ["cut", "padding-free", "packed and split"])
def test_psft_compares_with_the_base_model_on_the_same_rows(setting, tmp_path):
    settings = {**SETTINGS[setting], "rows": make_examples(), "learning_rate": 2e-3, "max_steps": 2}
    trainer = train(EAFTTrainer, tmp_path, gate="psft", **settings)
    base, kept = make_model(), 0
    for batch in trainer.get_train_dataloader():
        trainer.model(**batch, fused_lm_head=True)
        losses = trainer.gated_lm_head.losses
        inputs = {
            name: batch[name]
            for name in ("input_ids", "position_ids", "attention_mask")
            if name in batch
        }
        labels = batch["labels"][:, 1:]
        with torch.no_grad():
            logits = base(**inputs, use_cache=False).logits[
                :, :-1
            ]  # with a cache, packed examples see each other
            old = token_statistics(logits[labels != -100], labels[labels != -100]).log_prob
        ratios = (losses.statistics.log_prob - old).exp()
        torch.testing.assert_close(
            losses.weights, torch.where(ratios < 1.28, ratios, 0.0), rtol=1e-4, atol=1e-5
        )
        assert (losses.weights == 0).any()
        kept += (losses.weights > 0).sum()
    assert kept > 10
    measured = json.loads((tmp_path / OLD_LOG_PROB_ABOUT_FILE).read_text())
    # Of packed rows each document's first token has no label
    assert 0 < measured["tokens"] < sum(map(len, trainer.train_dataset["input_ids"]))


@pytest.mark.parametrize("setting", ["packed"])
def test_psft_begins_as_sft(setting, tmp_path):
    settings = {
        **SETTINGS[setting],
        "rows": make_examples(),
        "max_steps": 1,
        "gradient_accumulation_steps": 2,
    }
    psft, sft = (
        train(EAFTTrainer, tmp_path / gate, gate=gate, **settings) for gate in ("psft", "sft")
    )
    assert steps(psft, "mean_gate") == pytest.approx([1.0], rel=1e-5)
    for p, q in zip(psft.model.parameters(), sft.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_resuming_psft_needs_its_file(tmp_path):
    settings = {"gate": "psft", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    train(EAFTTrainer, tmp_path, **settings)
    (tmp_path / OLD_LOG_PROB_FILE).unlink()
    with pytest.raises(ConfigurationError, match=f"{OLD_LOG_PROB_FILE} is missing"):
        train(EAFTTrainer, tmp_path, resume=str(tmp_path / "checkpoint-2"), **settings)


def test_a_gate_can_need_both_passes(tmp_path, monkeypatch):
    """Over unlike rows, where they are packed; a resumed run finds what either measured."""

    def weight(stats):
        return (stats.log_prob - stats.old_log_prob - stats.example_nll).exp()

    monkeypatch.setitem(
        GATES, "both", Gate(weight, needs_old_log_prob=True, needs_example_nll=True)
    )
    settings = {
        "gate": "both",
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        **SETTINGS["packed"],
    }
    whole = train(EAFTTrainer, tmp_path, **settings)
    resumed = train(EAFTTrainer, tmp_path, resume=str(tmp_path / "checkpoint-2"), **settings)
    assert steps(resumed) == steps(whole)


# The tiny model is so unsure that `masked` by the exact entropy would leave out every token, and
# training is refused
@pytest.mark.parametrize(
    ("gate", "entropy", "divisor"),
    [("masked", "top-k", 20), ("conflict-mask", "top-k", 20), ("conflict-mask", "exact", 20)],
)
def test_thresholds_are_percentiles_of_the_data_under_the_base_model(
    gate, entropy, divisor, tmp_path
):
    kwargs = {"entropy_percentile": 30.0}
    trainer = train(
        EAFTTrainer,
        tmp_path,
        gate=gate,
        gate_entropy=entropy,
        gate_kwargs=kwargs,
        rows=make_examples(),
        max_steps=1,
    )
    stats = base_statistics(make_examples())
    key = {"top-k": "top_k_entropy", "exact": "entropy"}[entropy]
    g = np.concatenate([getattr(s, key).numpy() for s in stats]).clip(
        0, math.log(divisor)
    ) / math.log(divisor)
    expected = {"entropy_threshold": np.percentile(g, 30)}
    if gate == "conflict-mask":
        expected["prob_threshold"] = np.percentile(
            np.concatenate([s.prob.numpy() for s in stats]), 15
        )
    measured = json.loads((tmp_path / MEASUREMENTS_FILE).read_text())
    assert measured["params"] == pytest.approx(expected, rel=SKETCH)
    assert measured["tokens"] == len(g)
    assert {k: trainer.gated_lm_head.gate.params[k] for k in expected} == measured["params"]
    assert "example_nll" not in measured


def test_a_threshold_that_is_given_is_not_measured(tmp_path):
    for threshold in (0.5, "batch"):
        train(
            EAFTTrainer,
            tmp_path,
            gate="masked",
            gate_kwargs={"entropy_threshold": threshold},
            max_steps=1,
        )
        assert not (tmp_path / MEASUREMENTS_FILE).exists()


def test_measuring_does_not_change_the_order_of_the_data(tmp_path):
    sft = train(EAFTTrainer, tmp_path / "sft", gate="sft", learning_rate=0.0)
    flow = train(EAFTTrainer, tmp_path / "flow", gate="flow", learning_rate=0.0)
    assert steps(flow, "nll") == pytest.approx(steps(sft, "nll"), rel=1e-6)


# talr weighs by the batch, flow by what was measured
@pytest.mark.parametrize(
    ("gate", "setting"),
    [
        ("flow", "padding-free"),
        ("flow", "packed and split"),
        ("flow", "packed and wrapped"),
        ("talr", "packed"),
        ("talr", "packed and split"),
    ],
)
def test_packed_or_not_the_loss_of_the_same_examples_is_the_same(gate, setting, tmp_path):
    rows = make_examples(9)[:-1]
    if setting == "packed":  # which cuts
        rows = [row for row in rows if len(row["completion"]) < 28]
    everything = {
        "rows": rows,
        "gate": gate,
        "max_steps": 1,
        "learning_rate": 0.0,
        "per_device_train_batch_size": 16,
    }
    loose = train(EAFTTrainer, tmp_path / "loose", max_length=None, **everything)
    packed = train(EAFTTrainer, tmp_path / "packed", **SETTINGS[setting], **everything)
    if setting in ("padding-free", "packed"):
        assert steps(packed) == pytest.approx(steps(loose), rel=1e-5)
        return
    # A split example loses its context at the cut, so its nll differs; but the gate still knows it
    # as one
    stats = packed.gated_lm_head.losses.statistics
    if gate == "flow":
        head = packed.gated_lm_head
        expected = (-head.example_nll[stats.example_ids] / head.gate.params["tau"]).exp()
        torch.testing.assert_close(head.losses.weights, expected)
        assert stats.example_ids.unique().numel() == len(rows)
    else:
        means = [
            stats.nll[stats.example_ids == i].mean().item() for i in stats.example_ids.unique()
        ]
        assert len(means) == len(rows)
        expected = (stats.log_prob / np.median(means)).exp().clamp(min=0.01)
        torch.testing.assert_close(packed.gated_lm_head.losses.weights, expected)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize("gate", ["sft-kl", "asft"])
def test_the_reference_is_the_model_before_training(gate, peft_config, tmp_path):
    trainer = train(EAFTTrainer, tmp_path, gate=gate, peft_config=peft_config, learning_rate=0.02)
    kl = steps(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 0.01
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.model(**batch, fused_lm_head=True).loss
    logits, reference = (
        m(batch["input_ids"]).logits[:, :-1] for m in (trainer.model, make_model())
    )
    expected = gated_cross_entropy(logits, batch["labels"][:, 1:], gate, reference_logits=reference)
    torch.testing.assert_close(loss, expected)
    if peft_config:  # no second copy of the weights
        assert trainer.gated_lm_head.reference is trainer.model
    plain = gated_cross_entropy(logits, batch["labels"][:, 1:], "sft")
    trainer.model.eval()
    assert trainer.model(**batch, fused_lm_head=True).loss.item() == pytest.approx(
        plain.item(), rel=1e-5
    )


# One gate of each kind: what a run keeps depends on what its gate needs, and not on its formula,
# which test_head.py has
@pytest.mark.parametrize(
    ("gate", "setting"),
    [
        *(("talr", "padded"), ("masked", "padded"), ("stm", "padded")),
        *(("asft", "packed"), ("psft", "packed"), ("flow", "LoRA"), ("asft", "LoRA")),
    ],
)
def test_resumed_run_equals_uninterrupted(gate, setting, tmp_path):
    settings = {"peft_config": LORA} if setting == "LoRA" else SETTINGS[setting]
    settings = {"gate": gate, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, **settings}
    if gate == "stm":  # with its default the tiny model would train on nothing
        settings["gate_kwargs"] = {"perplexity_threshold": 300}
    whole = train(EAFTTrainer, tmp_path, **settings)
    by_token = GATES[gate].needs_old_log_prob
    measured = tmp_path / (OLD_LOG_PROB_ABOUT_FILE if by_token else MEASUREMENTS_FILE)
    assert measured.exists() == (
        bool(bind_gate(gate, measured=MEASURED_PARAMETERS).missing) or by_token
    )
    before = measured.read_text() if measured.exists() else None
    resumed = train(EAFTTrainer, tmp_path, resume=str(tmp_path / "checkpoint-2"), **settings)
    assert steps(resumed) == steps(whole)
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert before == (measured.read_text() if measured.exists() else None)


def test_resuming_notices_what_changed(tmp_path):
    settings = {"gate": "flow", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    train(EAFTTrainer, tmp_path, **settings)
    resume = {"resume": str(tmp_path / "checkpoint-2"), **settings}
    before = (tmp_path / MEASUREMENTS_FILE).read_text()
    changed = make_rows()
    changed[3]["completion"] += "?"
    with pytest.raises(
        ConfigurationError, match=f"{MEASUREMENTS_FILE} was measured with other training"
    ):
        train(EAFTTrainer, tmp_path, rows=changed, **resume)
    with pytest.raises(
        ConfigurationError, match=f"{MEASUREMENTS_FILE} was measured with another gate"
    ):
        train(EAFTTrainer, tmp_path, **{**resume, "gate": "masked"})
    assert (tmp_path / MEASUREMENTS_FILE).read_text() == before
    (tmp_path / MEASUREMENTS_FILE).unlink()
    with pytest.raises(ConfigurationError, match=f"{MEASUREMENTS_FILE} is missing"):
        train(EAFTTrainer, tmp_path, **resume)


def test_the_fingerprint_is_of_tokens_labels_and_order():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    other_labels = [{**rows[0], "labels": [1, 2, 3]}, rows[1]]
    moved = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3, 4], "labels": [3, 4]}]
    digests = [fingerprint(Dataset.from_list(r)) for r in (rows, other_labels, moved, rows[::-1])]
    assert len(set(digests)) == 4
    assert fingerprint(Dataset.from_list(rows)) == digests[0]


@pytest.mark.parametrize("q", [0, 0.1, 15, 50, 99.9, 100])
def test_percentiles_of_a_histogram_are_numpys_to_its_bound(q):
    drawn = np.random.default_rng(0).random(1001, dtype=np.float32)
    for values in (drawn, drawn**8, np.repeat(drawn[:7] ** 3, 50), np.array([0.25], np.float32)):
        histogram = Histogram()
        for part in np.array_split(values, 5):
            histogram.add(torch.from_numpy(part))
        found, exact = histogram.percentile(q), np.percentile(values.astype(np.float64), q)
        assert exact <= found <= exact * (1 + 2**-15)
        # A value that is itself the percentile counts as no greater than it, as with the exact one
        assert (values <= found).sum() >= (values <= exact).sum()
    ends = Histogram()
    ends.add(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert ends.percentile(0) == pytest.approx(0, abs=1e-40)
    assert ends.percentile(100) == 1


def test_a_base_model_that_is_not_finite_is_named_with_its_example(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    trainer = build(EAFTTrainer, tmp_path, gate="flow", model=model)
    with pytest.raises(NonFiniteError, match="not finite on example 0 of the training data"):
        trainer.train()
    assert not (tmp_path / MEASUREMENTS_FILE).exists()


def test_examples_without_a_label_left_are_not_measured(tmp_path):
    rows = [*make_rows(6), {"prompt": "x" * 40, "completion": "y"}]
    train(EAFTTrainer, tmp_path, gate="flow", rows=rows, max_length=30, max_steps=1)
    measured = json.loads((tmp_path / MEASUREMENTS_FILE).read_text())
    assert measured["examples"] == 6
    assert len(measured["example_nll"]) == 7
    assert 0 < measured["params"]["tau"] < math.inf


def test_examples_that_never_had_a_label_are_not_measured(tmp_path):
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]},
        {"input_ids": [5, 6], "labels": [-100, -100]},
    ] * 4
    rows.append({"input_ids": [9], "labels": [9]})  # the first token is nobody's label
    for gate in ("flow", "masked"):
        train(
            EAFTTrainer,
            tmp_path / gate,
            gate=gate,
            rows=rows,
            padding_free=True,
            max_length=None,
            max_steps=1,
        )
        assert json.loads((tmp_path / gate / MEASUREMENTS_FILE).read_text())["examples"] == 4


def test_a_gate_of_your_own_is_measured_at_the_papers_percentile(tmp_path, monkeypatch):
    (tmp_path / "low_gates.py").write_text(
        "def low(stats, prob_threshold):\n    return (stats.prob > prob_threshold).float()"
    )
    monkeypatch.syspath_prepend(tmp_path)
    trainer = train(EAFTTrainer, tmp_path / "out", gate="low_gates:low", max_steps=1)
    probs = torch.cat([stats.prob for stats in base_statistics(make_rows())])
    assert trainer.gated_lm_head.gate.params["prob_threshold"] == pytest.approx(
        np.percentile(probs.numpy(), 15), rel=SKETCH
    )


def test_what_predict_leaves_does_not_reach_the_next_evaluation(tmp_path):
    trainer = build(EAFTTrainer, tmp_path, eval_rows=make_rows(5))
    expected = trainer.evaluate()["eval_nll"]
    trainer.predict(trainer.train_dataset)
    assert trainer.evaluate()["eval_nll"] == expected


def stream():
    yield from make_rows()


@pytest.mark.parametrize("gate", ["flow", "talr", "masked", "psft"])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"train_dataset": IterableDataset.from_generator(stream)},
            "needs a data set with a length",
        ),
        ({"data_collator": lambda rows: rows}, "not with a data_collator of your own"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "not with dataset_kwargs"),
    ],
    ids=["stream", "collator", "prepared"],
)
def test_set_ups_that_lose_the_example_are_refused(gate, kwargs, message, tmp_path):
    kwargs = {"train_dataset": Dataset.from_list(make_rows()), **kwargs}
    prepared = {"dataset_kwargs": kwargs.pop("dataset_kwargs", None)}
    args = EAFTConfig(
        str(tmp_path), gate=gate, use_cpu=True, bf16=False, report_to=[], max_steps=1, **prepared
    )
    with pytest.raises(ConfigurationError, match=message):
        EAFTTrainer(make_model(), args=args, processing_class=make_tokenizer(), **kwargs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate_kwargs": "{steepness"}, "is not JSON"),
        ({"gate_kwargs": [1]}, "expected a map"),
        (
            {"gate": "eaft-sigmoid", "gate_kwargs": {"steepnes": 3}},
            "takes no steepnes; it takes steepness, center",
        ),
        ({"gate_kwargs": {"alpha": 2.0}}, "set alpha by gate_alpha"),
        ({"gate": "dft", "gate_entropy": "exact"}, "takes no entropy"),
        (
            {"gate": "masked", "gate_kwargs": {"entropy_threshold": "none"}},
            "expected a number or 'batch'",
        ),
    ],
)
def test_bad_parameters_of_a_gate(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        EAFTConfig("out", use_cpu=True, **settings)


def test_parameters_reach_the_gate(tmp_path):
    args = {"gate": "eaft-sigmoid", "gate_entropy": "exact", "gate_kwargs": '{"center": 0.4}'}
    trainer = train(EAFTTrainer, tmp_path, max_steps=1, **args)
    head = trainer.gated_lm_head
    assert head.gate.params == {"steepness": 30.0, "center": 0.4, "entropy": "exact"}
    g = (head.losses.statistics.entropy / math.log(20)).clamp(max=1)
    torch.testing.assert_close(head.losses.weights, torch.sigmoid(30 * (g - 0.4)))
