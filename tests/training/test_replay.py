"""Replay: the base model's own answers are trained on as rows like the others, as many as asked for."""

import json

import pytest
from datasets import Dataset

from eaft import EAFTConfig, cli
from eaft.errors import ConfigurationError
from eaft.evaluation.drift import PROMPTS, Answer, read_prompts
from eaft.training import replay
from eaft.training.config import REPLAY_PROMPTS
from tests.conftest import make_rows

SMALL = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--bf16", "false", "--max_steps", "2"]
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
    flags = [*SMALL, "--model_name_or_path", model_dir, "--dataset_name", data, "--output_dir", out, *flags]
    return cli.main(["train", *map(str, flags)])


def replayed(out):
    return [json.loads(line) for line in (out / replay.REPLAY_FILE).read_text().split("\n") if line]


def test_no_request_is_one_that_drift_is_measured_on():
    drift, own = ([p[-1]["content"].casefold() for p in read_prompts(str(f), 1000)] for f in (PROMPTS, REPLAY_PROMPTS))
    assert len(set(own)) == len(own) == 64
    assert not set(drift) & set(own)


@pytest.mark.parametrize("form", ["chat", "messages", "text"])
def test_the_models_own_answers_are_trained_on(form, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "ANSWER_TOKENS", 60)
    seen = []
    monkeypatch.setattr("eaft.training.train.EAFTTrainer", spy(seen))
    rows = {
        "chat": CHAT,
        "messages": [{"messages": row["prompt"] + row["completion"]} for row in CHAT],
        "text": make_rows(16),
    }[form]
    data, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    assert run(model_dir, data, out, "--replay", "0.2") == 0
    own = replayed(out)
    assert len(own) == 4  # of twenty
    (dataset,) = seen
    assert len(dataset) == 20
    assert [dict(row) for row in dataset.select(range(16))] == rows
    for row, trained_on in zip(own, dataset.select(range(16, 20)), strict=True):
        assert trained_on == ({"messages": row["prompt"] + row["completion"]} if form == "messages" else row)
        assert isinstance(row["prompt"], str) == (form == "text")

    # The same seed samples the same, another others; a resumed run takes what it began with
    if form == "chat":
        assert run(model_dir, data, tmp_path / "again", "--replay", "0.2") == 0
        assert replayed(tmp_path / "again") == own
        assert run(model_dir, data, tmp_path / "other", "--replay", "0.2", "--seed", "1") == 0
        assert replayed(tmp_path / "other") != own
        (out / "run.json").write_text('{"finished": false}')
        (out / replay.REPLAY_FILE).write_text("".join(json.dumps(row) + "\n" for row in reversed(own)))
        assert run(model_dir, data, out, "--replay", "0.2", "--resume_from_checkpoint", "true") == 0
        assert replayed(out) == own[::-1]


def spy(seen):
    """A trainer that notes the data it is given, as it is before TRL prepares it."""
    from eaft.training.trainer import EAFTTrainer

    class Spy(EAFTTrainer):
        def __init__(self, *args, train_dataset, **kwargs):
            seen.append(train_dataset)
            super().__init__(*args, train_dataset=train_dataset, **kwargs)

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
            replay.sample_rows(4, False, model_dir, config(tmp_path, seed=seed, model_init_kwargs={}))
    assert [len({text for texts in of_seed for text in texts}) for of_seed in (asked[:8], asked[8:])] == [32, 32]
    assert set(asked[0]) != set(asked[8])


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([{"text": "a"}] * 4, [], "needs rows of `prompt` and `completion`"),
        (CHAT, ["--dataset_streaming", "true"], "leave dataset_streaming out"),
        ([{**row, "chat_template_kwargs": {"think": False}} for row in CHAT], [], "the data has chat_template_kwargs"),
        (CHAT, ["--replay_prompts", "missing.jsonl"], "missing.jsonl: there is no such file of prompts"),
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
    return EAFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, **{"replay": 0.2, **settings})


def test_other_columns_of_the_data_are_empty():
    both = [{**row, "messages": row["prompt"], "tools": [{"name": "f"}], "id": 1} for row in CHAT]
    mixed = replay.mix(Dataset.from_list(both), CHAT[:1])
    assert mixed[len(both)] == {**CHAT[0], "messages": None, "tools": None, "id": None}
    rows = [{"messages": [{**message, "name": "n"} for message in row["prompt"]], "id": 1} for row in CHAT]
    mixed = replay.mix(Dataset.from_list(rows), CHAT[:1])
    messages = [{**message, "name": None} for message in CHAT[0]["prompt"] + CHAT[0]["completion"]]
    assert mixed[len(rows)] == {"messages": messages, "id": None}


@pytest.mark.parametrize(("share", "rows", "count"), [(0.05, 19, 1), (0.05, 57, 3), (0.05, 58, 4), (0.1, 32, 4)])
def test_a_share_of_all_rows(share, rows, count, tmp_path):
    assert replay.count_replayed(rows, config(tmp_path, replay=share)) == count


def test_only_a_resumed_run_takes_what_is_there(tmp_path, monkeypatch):
    """And only as many as it is to have."""
    sampled, data = CHAT[:4], Dataset.from_list(CHAT)
    monkeypatch.setattr(replay, "sample_rows", lambda *_: sampled)
    write(tmp_path / replay.REPLAY_FILE, CHAT[4:8])
    assert replay.replayed_rows(data, "model", config(tmp_path)) == sampled
    resumed = {"resume_from_checkpoint": "true"}
    assert replay.replayed_rows(data, "model", config(tmp_path, **resumed)) == CHAT[4:8]
    with pytest.raises(ConfigurationError, match=r"replay=0\.5 is 16 rows beside this data, and .* has 4"):
        replay.replayed_rows(data, "model", config(tmp_path, replay=0.5, **resumed))


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_is_below_one(share, tmp_path):
    with pytest.raises(ConfigurationError, match=f"replay={share}"):
        EAFTConfig(output_dir=str(tmp_path), replay=share, use_cpu=True, bf16=False)
