"""Rows as TRL prepares them, each followed to where it was, in every format."""

import pytest
from datasets import Dataset, IterableDataset
from trl import SFTTrainer

from eaft.errors import ConfigurationError
from eaft.training.prepare import prepare_rows
from tests.conftest import make_tokenizer
from tests.training.test_trainer import build

QUESTIONS = [f"{i} plus {i * 3}?" + " please" * (3 * (i % 4)) for i in range(8)]
ANSWERS = [f"is {i * 4}" + "!" * i for i in range(8)]
PAIRS = list(zip(QUESTIONS, ANSWERS, strict=True))


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


FORMATS = {
    "text": ([{"text": q + a} for q, a in PAIRS], {}),
    "another column": ([{"story": q + a} for q, a in PAIRS], {"dataset_text_field": "story"}),
    "prompt and completion": ([{"prompt": q, "completion": a} for q, a in PAIRS], {}),
    "all of them": (
        [{"prompt": q, "completion": a} for q, a in PAIRS],
        {"completion_only_loss": False},
    ),
    "chat": ([{"prompt": chat(q, a)[:1], "completion": chat(q, a)[1:]} for q, a in PAIRS], {}),
    "messages": ([{"messages": chat(q, a) + chat(a, q)} for q, a in PAIRS], {}),
    "assistant only": (
        [{"messages": chat(q, a) + chat(a, q)} for q, a in PAIRS],
        {"assistant_only_loss": True},
    ),
    "conversations": (
        [
            {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
            for q, a in PAIRS
        ],
        {},
    ),
    "token ids": (
        [{"input_ids": [3 + len(q), 70, 71] * i} for i, (q, _) in enumerate(PAIRS, 1)],
        {},
    ),
    "labels": (
        [{"input_ids": [3, 70, 71] * i, "labels": [-100, 70, -100] * i} for i in range(1, 9)],
        {},
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_rows_are_trls_and_none_is_lost(name, mode, tmp_path):
    rows, settings = FORMATS[name]
    rows = [{**row, "source": "here"} for row in rows]
    settings = {**settings, "max_length": 24, "truncation_mode": mode, "rows": rows}
    theirs = build(SFTTrainer, tmp_path, shuffle_dataset=False, **settings)
    prepared = prepare_rows(
        make_tokenizer(), build_args(tmp_path, settings), Dataset.from_list(rows)
    )
    assert len(prepared.cut) == len(prepared.whole) == len(rows)
    ours = [
        (row["input_ids"], [label if label >= 0 else -100 for label in row["labels"]])
        for row in prepared.cut
    ]
    left = [row for row in ours if any(label != -100 for label in row[1])]
    assert left == [(row["input_ids"], row["labels"]) for row in theirs.train_dataset]
    for (ids, _), whole in zip(ours, prepared.whole, strict=True):
        assert ids == (
            whole["input_ids"][:24] if mode == "keep_start" else whole["input_ids"][-24:]
        )
    if name == "chat" and mode == "keep_start":
        assert len(left) < len(rows)  # TRL drops those whose prompt fills max_length


def test_a_text_beside_prompt_and_completion_changes_nothing(tmp_path):
    rows, _ = FORMATS["prompt and completion"]
    args, tokenizer = build_args(tmp_path, {}), make_tokenizer()
    alone, beside = (
        prepare_rows(tokenizer, args, Dataset.from_list(data)).whole["labels"]
        for data in (rows, [{**row, "text": row["prompt"] + row["completion"]} for row in rows])
    )
    assert list(beside) == list(alone)
    assert all(labels[-1] == tokenizer.eos_token_id for labels in beside)
    args = build_args(tmp_path, {"dataset_text_field": "completion"})
    assert list(prepare_rows(tokenizer, args, Dataset.from_list(rows)).whole["labels"]) == list(
        alone
    )


def build_args(path, settings):
    from eaft import EAFTConfig

    settings = {name: value for name, value in settings.items() if name != "rows"}
    # None of these may reach the rows, or stop them
    unwanted = {
        "packing": True,
        "gate": "flow",
        "report_to": ["no such tracker"],
        "eval_strategy": "steps",
    }
    return EAFTConfig(str(path / "unused"), use_cpu=True, **unwanted, **settings)


def test_what_cannot_be_followed(tmp_path):
    rows = IterableDataset.from_generator(lambda: iter(FORMATS["text"][0]))
    with pytest.raises(ConfigurationError, match="dataset_streaming false"):
        prepare_rows(make_tokenizer(), build_args(tmp_path, {}), rows)
    plain = Dataset.from_list(FORMATS["text"][0])
    with pytest.raises(ConfigurationError, match="not conversational"):
        prepare_rows(make_tokenizer(), build_args(tmp_path, {"assistant_only_loss": True}), plain)
    nothing = Dataset.from_list([{"input_ids": [3, 4], "labels": [3, -100]}])
    with pytest.raises(ConfigurationError, match="No row has a labelled token"):
        prepare_rows(make_tokenizer(), build_args(tmp_path, {}), nothing)
    empty = Dataset.from_list(
        [{"input_ids": [3, 4], "labels": [3, 4]}, {"input_ids": [], "labels": []}]
    )
    with pytest.raises(ConfigurationError, match="1 rows of 2"):
        prepare_rows(make_tokenizer(), build_args(tmp_path, {}), empty)
