"""
Replayed tokens are held by the base model's kept probabilities; all other tokens are as they were.
"""

import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoConfig, default_data_collator

from eaft import EAFTConfig, EAFTTrainer, gated_cross_entropy
from eaft.errors import ConfigurationError
from eaft.evaluation import drift
from eaft.evaluation.drift import TopProbs
from eaft.training import replay_kl
from eaft.training.following import ReplayedTokens, mark, unmark
from eaft.training.head import GatedLMHead
from eaft.training.replay import ANSWER_TOKENS, count_replayed
from eaft.training.run_folder import last_complete_checkpoint
from tests.conftest import make_model, make_tokenizer
from tests.processes import eaft, run_ranks
from tests.training.test_objectives import LORA, SETTINGS, make_examples
from tests.training.test_replay import CHAT, SMALL, run, write
from tests.training.test_trainer import DEFAULTS, assert_same_training, steps

# The third is longer than the rows of `SETTINGS` may be
OWN = [
    {"input_ids": [5, 6, *ids], "labels": [-100, -100, *ids]}
    for ids in ([40, 41, 2], [50, 2], [*range(60, 100), 2], [70, 71, 72, 2])
]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_loss_and_gradient_are_the_formulas(softcap, monkeypatch):
    """In float64, with several chunks, and fewer probabilities kept than there are tokens."""
    monkeypatch.setattr(drift, "TOP", 20)
    monkeypatch.setattr(replay_kl, "default_budget", lambda _: replay_kl.COPIES * 264 * 4 * 3)
    model = make_model(final_logit_softcapping=softcap).double().train()
    torch.manual_seed(1)
    ids = torch.randint(3, 264, (3, 12))
    labels = ids.masked_fill(torch.rand(3, 12) < 0.2, -100)
    numbers = torch.full((3, 12), -1)
    numbers[1][labels[1] != -100] = torch.arange((labels[1] != -100).sum()).flip(0)
    numbers[0, 11] = int(numbers.max()) + 1
    labels[0, 11] = ids[0, 11]
    base = torch.randn(int(numbers.max()) + 1, 264, dtype=torch.float64).mul(2).log_softmax(-1)
    head = GatedLMHead(model, "eaft")
    head.replay_probs = TopProbs.of(base)
    output = model(input_ids=ids, labels=labels, replay_numbers=numbers, fused_lm_head=True)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    logits = model(input_ids=ids).logits[:, :-1]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    targets, places = labels[:, 1:], numbers[:, 1:]
    n = (targets != -100).sum()
    own = targets.masked_fill(places >= 0, -100)
    expected = gated_cross_entropy(logits, own, "eaft", num_items=n)
    q = logits.softmax(-1)
    divergences = []
    for row, column in ((places >= 0) & (targets != -100)).nonzero().tolist():
        p = base[places[row, column]].exp()
        kept = p.argsort(descending=True)[:20]
        mass, model_mass = 1 - p[kept].sum(), 1 - q[row, column, kept].sum()
        terms = p[kept] * (p[kept] / q[row, column, kept]).log()
        divergences.append(terms.sum() + mass * (mass / model_mass).log())
    assert len(divergences) > 6
    expected = expected + torch.stack(divergences).sum() / n
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-7, atol=1e-9)
    assert len(output.entropy) == len(output.is_top1) == output.label_mask.sum() == n
    right = (logits.argmax(-1) == targets)[targets != -100].sum()
    assert output.is_top1.sum() == right

    model.eval()  # `eval_loss` is the nll of all
    plain = model(input_ids=ids, labels=labels, replay_numbers=numbers, fused_lm_head=True).loss
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert plain.item() == pytest.approx(nll.item(), rel=1e-9)


def test_a_replayed_label_keeps_its_number():
    """Beside its example's index, through a mark of 32 bits; rows in any order and any batches."""
    data = Dataset.from_list([{"input_ids": [9] * n, "labels": [9] * n} for n in (3, 0, 2)] + OWN)
    replayed = ReplayedTokens.of(data, 3)
    table = data.with_format("arrow")[:]
    marked = mark(table, list(range(len(data))), replayed)
    order = [6, 0, 4, 3, 5, 2, 1]
    back = unmark(marked.take(order), replayed)
    counts = iter(range(100))
    numbers = [[-1] * 3, [], [-1] * 2]
    for row in OWN:
        numbers.append([-1 if label == -100 else next(counts) for label in row["labels"]])
    assert back["replay_numbers"].to_pylist() == [numbers[i] for i in order]
    assert back["example_ids"].to_pylist() == [[i] * len(numbers[i]) for i in order]
    assert back["input_ids"].to_pylist() == [data[i]["input_ids"] for i in order]


def make(folder, replay_loss, gate="sft", peft_config=None, data_collator=None, **settings):
    """A trainer that replays `OWN`, where the base model was sure of each of its tokens."""
    labels = torch.tensor([label for row in OWN for label in row["labels"] if label != -100])
    sure = torch.zeros(len(labels), 1)
    folder.mkdir(exist_ok=True)
    replay_kl.save_probs(TopProbs(labels[:, None].int(), sure, sure - math.inf), folder)
    return EAFTTrainer(
        make_model(),
        args=EAFTConfig(
            str(folder),
            **{**DEFAULTS, "gate": gate, "replay": 0.2, "replay_loss": replay_loss, **settings},
        ),
        train_dataset=Dataset.from_list(make_examples()),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
        data_collator=data_collator,
        replayed=Dataset.from_list(OWN),
    )


@pytest.mark.parametrize("setting", ["cut", "padding-free", "packed and split", "LoRA", "psft"])
def test_the_kl_from_a_sure_base_model_is_the_nll(setting, tmp_path):
    """So training is that of replay with its nll, however rows are cut, packed and batched."""
    settings = {**SETTINGS.get(setting, {"max_length": None}), "shuffle_dataset": True}
    settings |= {"max_steps": 2, "peft_config": LORA if setting == "LoRA" else None}
    kl = make(tmp_path / "kl", "kl", gate="psft" if setting == "psft" else "sft", **settings)
    nll = make(tmp_path / "nll", "nll", **settings)
    assert "replay_numbers" not in nll.train_dataset.column_names
    kl.train()
    nll.train()
    assert min(steps(kl, "replay_kl")) > 1
    assert steps(nll, "replay_kl") == []
    same = slice(1 if setting == "psft" else 2)  # whose weights are 1 in the first step
    for name in ("loss", "grad_norm", "mean_token_accuracy"):
        assert steps(kl, name)[same] == pytest.approx(steps(nll, name)[same], rel=1e-4)


def test_accumulated_batches_are_one_batch(tmp_path):
    settings = {"max_steps": 2, "max_length": None, "gate": "eaft"}
    size, accumulate = "per_device_train_batch_size", "gradient_accumulation_steps"
    one = make(tmp_path / "one", "kl", **settings, **{size: 6})
    parts = make(tmp_path / "parts", "kl", **settings, **{size: 1, accumulate: 6})
    one.train()
    parts.train()
    assert steps(one) == pytest.approx(steps(parts), rel=1e-5)
    assert steps(one, "replay_kl") == pytest.approx(steps(parts, "replay_kl"), rel=1e-5)
    assert_same_training(one, parts, make_model())


@pytest.fixture(scope="module")
def replayable(tokenizer, tmp_path_factory):
    """A model whose answers end soon."""
    model_dir = tmp_path_factory.mktemp("replayable")
    model = make_model()
    model.generation_config.eos_token_id = list(range(2, 102))
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    return model_dir


def test_a_run_begins_at_its_base_and_goes_on_as_it_began(replayable, tmp_path, capsys):
    """By the command line: at the first step the model's KL to itself is 0."""
    model_dir = replayable
    data, whole, broken = write(tmp_path / "rows.jsonl", CHAT), tmp_path / "a", tmp_path / "b"
    flags = ["--replay", "0.2", "--replay_loss", "kl", "--save_steps", 1, "--logging_steps", 1]
    flags += ["--learning_rate", "1e-2", "--per_device_train_batch_size", 20]
    assert run(model_dir, data, whole, *flags) == 0
    shutil.copytree(whole, broken)
    logs = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert abs(logs[0]["replay_kl"]) < 1e-6 < 1e-3 < logs[1]["replay_kl"]
    (broken / "checkpoint-2" / "trainer_state.json").unlink()
    (broken / "model.safetensors").unlink()
    assert last_complete_checkpoint(broken) == str(broken / "checkpoint-1")
    resume = ["--resume_from_checkpoint", "true"]
    assert run(model_dir, data, broken, *flags, "--replay_loss", "nll", *resume) == 2
    assert "replay_loss='nll': the run that is resumed" in capsys.readouterr().err
    (broken / replay_kl.PROBS_FILE).rename(tmp_path / "kept")
    assert run(model_dir, data, broken, *flags, *resume) == 2
    assert f"{replay_kl.PROBS_FILE} is missing" in capsys.readouterr().err
    (tmp_path / "kept").rename(broken / replay_kl.PROBS_FILE)
    assert run(model_dir, data, broken, *flags, *resume) == 0
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_two_processes_equal_one(replayable, tmp_path, monkeypatch):
    flags = ["--replay", "0.2", "--replay_loss", "kl", "--logging_steps", 1]
    flags += ["--learning_rate", "1e-2", "--per_device_train_batch_size"]
    data, one, two = write(tmp_path / "rows.jsonl", CHAT), tmp_path / "one", tmp_path / "two"
    assert run(replayable, data, one, *flags, 10) == 0
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    given = ["--model_name_or_path", replayable, "--dataset_name", data, "--output_dir", two]
    run_ranks(eaft, "train", *SMALL, *given, *flags, 5)
    logs = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (one, two)
    ]
    for name in ("replay_kl", "nll", "loss", "grad_norm"):
        assert steps_of(logs[1], name) == pytest.approx(steps_of(logs[0], name), rel=1e-4, abs=1e-6)
    assert max(steps_of(logs[0], "replay_kl")) > 1e-3
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    for name, weight in a.items():
        torch.testing.assert_close(b[name], weight, rtol=1e-4, atol=1e-5)


def steps_of(log, name):
    return [line[name] for line in log if name in line]


def test_dry_run_says_how_large_the_probabilities_may_be(replayable, tmp_path, capsys):
    """As large as the file for answers of the longest that ends."""
    data = write(tmp_path / "rows.jsonl", CHAT)
    flags = ["--replay", "0.2", "--replay_loss", "kl", "--dry_run"]
    assert run(replayable, data, tmp_path / "out", *flags) == 0
    rows = count_replayed(len(CHAT), SimpleNamespace(replay=0.2))
    size = AutoConfig.from_pretrained(replayable).vocab_size
    probs = TopProbs.of(torch.zeros(rows * (ANSWER_TOKENS - 1), size))
    replay_kl.save_probs(probs, tmp_path)
    expected = (tmp_path / replay_kl.PROBS_FILE).stat().st_size / 2**30
    said = float(re.search(r"Disk +up to (\S+) GiB", capsys.readouterr().out).group(1))
    assert said == pytest.approx(expected, rel=0.05)


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="replay=0 asks for none: set replay"):
        EAFTConfig(str(tmp_path), use_cpu=True, bf16=False, replay_loss="kl")
    with pytest.raises(ConfigurationError, match="'kl' must know each token's number; not with"):
        make(tmp_path, "kl", data_collator=default_data_collator)
    trainer = make(tmp_path / "short", "kl")
    kept = replay_kl.load_probs(tmp_path / "short", trainer._held_tokens)
    replay_kl.save_probs(kept.select(torch.arange(3)), tmp_path / "short")
    with pytest.raises(ConfigurationError, match="has 3 tokens, and the replayed answers have"):
        trainer.train()
