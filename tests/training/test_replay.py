"""
Replay: the base model's own answers are trained on as rows like the others, as many as asked for.
"""

import copy
import json
import string

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from eaft import EAFTConfig, EAFTTrainer, cli
from eaft.errors import ConfigurationError
from eaft.evaluation.drift import Answer, read_prompts
from eaft.evaluation.protocol import PROMPTS
from eaft.training import replay
from eaft.training.flags import REPLAY_PROMPTS
from tests.conftest import CHAT_TEMPLATE, TINY_TRAINING, chain_model, make_rows

SMALL = [*TINY_TRAINING, "--max_steps", "2"]
CHAT = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in make_rows(16)
]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def run(model_dir, data, out, *flags):
    given = ["--model_name_or_path", model_dir, "--dataset_name", data, "--output_dir", out]
    return cli.main(["train", *map(str, [*SMALL, *given, *flags])])


def replayed(out):
    return [json.loads(line) for line in (out / replay.REPLAY_FILE).read_text().split("\n") if line]


def test_no_request_is_one_that_drift_is_measured_on():
    drift, own = (
        [p[-1]["content"].casefold() for p in read_prompts(str(f), 1000)]
        for f in (PROMPTS, REPLAY_PROMPTS)
    )
    assert len(set(own)) == len(own) == 64
    assert not set(drift) & set(own)


# As Qwen3's: asked without thinking, the prompt ends with an empty thought, which a message of the
# history has not
NO_THOUGHT = CHAT_TEMPLATE.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{%"
    " endif %}",
)


@pytest.mark.parametrize("form", ["chat", "messages", "text"])
def test_the_models_own_answers_are_trained_on(form, tokenizer, tmp_path, monkeypatch):
    """
    As they were sampled: right is what transformers' generate writes. The data is as TRL prepares
    it.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = NO_THOUGHT
    model = chain_model(
        tokenizer,
        "\nOK<|im_end|>",
        ":OK",
        *[f"{letter}OK" for letter in string.ascii_lowercase + "?."],
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model_dir, trainers = str(tmp_path / "model"), []
    monkeypatch.setattr("eaft.training.train.EAFTTrainer", spy(trainers))
    rows = {
        "chat": CHAT,
        "messages": [{"messages": row["prompt"] + row["completion"]} for row in CHAT],
        "text": make_rows(16),
    }[form]
    data, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    assert run(model_dir, data, out, "--replay", "0.2") == 0
    own, dataset = replayed(out), trainers[0].train_dataset
    assert len(own) == 4  # of twenty
    plain = SFTConfig(str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to=[])
    right = SFTTrainer(model_dir, plain, train_dataset=Dataset.from_list(rows)).train_dataset
    names = ["input_ids", "labels"]
    assert list(dataset.select_columns(names)) == list(right.select_columns(names)) + [
        {name: row[name] for name in names} for row in own
    ]
    model.generation_config.pad_token_id = 0
    for row in own:
        prompt = [
            token
            for token, label in zip(row["input_ids"], row["labels"], strict=True)
            if label == -100
        ]
        said = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        assert row["labels"][len(prompt) :] == row["input_ids"][len(prompt) :] == said
        assert tokenizer.decode(prompt) == row["prompt"]
        assert said[-1] == tokenizer.eos_token_id
        assert row["prompt"].endswith("</think>\n\n") == (form != "text")


def test_replayed_rows_are_packed_cut_and_followed_with_the_others(model_dir, tmp_path):
    """
    By a gate that must know each token's example; the twentieth row is longer than a row may be.
    """
    data = Dataset.from_list(make_rows(3))
    own = [
        {"input_ids": [5] * 4, "labels": [-100, -100, 5, 5]},
        {"input_ids": [6] * 50, "labels": [-100] + [6] * 49},
    ]
    settings = {
        "gate": "flow",
        "max_length": 40,
        "packing": True,
        "packing_strategy": "bfd",
        "report_to": [],
    }
    trainer = EAFTTrainer(
        str(model_dir),
        config(tmp_path, replay=0, **settings),
        train_dataset=data,
        replayed=Dataset.from_list(own),
    )
    packed = trainer.train_dataset
    pairs = [
        pair
        for row in packed
        for pair in zip(row["input_ids"], row["labels"], row["example_ids"], strict=True)
    ]
    assert [pair for pair in pairs if pair[2] == 3] == [
        (5, -100, 3),
        (5, -100, 3),
        (5, 5, 3),
        (5, 5, 3),
    ]
    assert [pair[:2] for pair in pairs if pair[2] == 4] == [(6, -100)] + [(6, 6)] * 39
    assert {pair[2] for pair in pairs} == set(range(5))
    trainer.train()


def test_a_seed_samples_the_same(model_dir, tmp_path, monkeypatch):
    """Another seed others; a resumed run takes what it began with."""
    monkeypatch.setattr(replay, "ANSWER_TOKENS", 60)
    data, out = write(tmp_path / "rows.jsonl", CHAT), tmp_path / "out"
    for folder, flags in (("out", []), ("again", []), ("other", ["--seed", "1"])):
        assert run(model_dir, data, tmp_path / folder, "--replay", "0.2", *flags) == 0
    own = replayed(out)
    assert replayed(tmp_path / "again") == own
    assert replayed(tmp_path / "other") != own
    (out / "run.json").write_text('{"finished": false}')
    (out / replay.REPLAY_FILE).write_text("".join(json.dumps(row) + "\n" for row in reversed(own)))
    assert run(model_dir, data, out, "--replay", "0.2", "--resume_from_checkpoint", "true") == 0
    assert replayed(out) == own[::-1]


def spy(trainers):
    """A trainer that is kept."""

    class Spy(EAFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    return Spy


def test_answers_that_do_not_end_are_left_out(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(replay, "ANSWER_TOKENS", 1)
    data, out = write(tmp_path / "rows.jsonl", CHAT), tmp_path / "out"
    assert run(model_dir, data, out, "--replay", "0.2") == 2
    assert "asks for 4 answers, and of 32 only 0 ended within 1 tokens" in capsys.readouterr().err
    assert not out.exists()


def test_every_try_and_every_seed_asks_other_requests(model_dir, tmp_path, monkeypatch):
    asked = []

    def none_ends(model, tokenizer, texts, *_, **__):
        asked.append(texts)
        return [Answer([3], [4] * replay.ANSWER_TOKENS)] * len(texts)

    monkeypatch.setattr(replay, "sample_answers", none_ends)
    for seed in (0, 1):
        with pytest.raises(ConfigurationError, match="of 32 only 0 ended"):
            replay.sample_rows(
                4, False, model_dir, config(tmp_path, seed=seed, model_init_kwargs={})
            )
    assert [
        len({text for texts in of_seed for text in texts}) for of_seed in (asked[:8], asked[8:])
    ] == [32, 32]
    assert set(asked[0]) != set(asked[8])


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([{"text": "a"}] * 4, [], "needs rows of `prompt` and `completion`"),
        (CHAT, ["--dataset_streaming", "true"], "leave dataset_streaming out"),
        (
            [{**row, "chat_template_kwargs": {"think": False}} for row in CHAT],
            [],
            "the data has chat_template_kwargs",
        ),
        ([{**row, "images": []} for row in CHAT], [], "leave it out with images"),
        (
            CHAT,
            ["--replay_prompts", "missing.jsonl"],
            "missing.jsonl: there is no such file of prompts",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(rows, flags, message, model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(model_dir, write(tmp_path / "rows.jsonl", rows), out, "--replay", "0.1", *flags) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_zero3_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ConfigurationError, match="use ZeRO-2 or FSDP2"):
        replay.check_replay(Dataset.from_list(CHAT), config(tmp_path))


def config(folder, **settings):
    return EAFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, **{"replay": 0.2, **settings}
    )


@pytest.mark.parametrize(
    ("share", "rows", "count"), [(0.05, 19, 1), (0.05, 57, 3), (0.05, 58, 4), (0.1, 32, 4)]
)
def test_a_share_of_all_rows(share, rows, count, tmp_path):
    assert replay.count_replayed(rows, config(tmp_path, replay=share)) == count


def test_only_a_resumed_run_takes_what_is_there(tmp_path, monkeypatch):
    """And only as many as it is to have."""
    rows = [
        {"prompt": "a", "completion": "b", "input_ids": [5, i], "labels": [-100, i]}
        for i in range(8)
    ]
    sampled, data = rows[:4], Dataset.from_list(CHAT)
    monkeypatch.setattr(replay, "sample_rows", lambda *_: replay.Replayed(sampled))
    write(tmp_path / replay.REPLAY_FILE, rows[4:])
    assert replay.replayed_rows(data, "model", config(tmp_path)).rows == sampled
    resumed = {"resume_from_checkpoint": "true"}
    assert replay.replayed_rows(data, "model", config(tmp_path, **resumed)).rows == rows[4:]
    with pytest.raises(
        ConfigurationError, match=r"replay=0\.5 is 16 rows beside this data, and .* has 4"
    ):
        replay.replayed_rows(data, "model", config(tmp_path, replay=0.5, **resumed))
    write(tmp_path / replay.REPLAY_FILE, CHAT[:4])
    with pytest.raises(ConfigurationError, match="an older eaft wrote it"):
        replay.replayed_rows(data, "model", config(tmp_path, **resumed))


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_is_below_one(share, tmp_path):
    with pytest.raises(ConfigurationError, match=f"replay={share}"):
        EAFTConfig(output_dir=str(tmp_path), replay=share, use_cpu=True, bf16=False)
