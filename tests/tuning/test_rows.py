"""Held-out rows: no prompt, nor nearly one, is both trained on and held out."""

import itertools
import random

import pytest
from datasets import Dataset

from eaft.errors import ConfigurationError
from eaft.tuning.rows import ALIKE, group, hold_out, near_duplicates, prompt_text, split_held_out

WORDS = ["river", "lamp", "stone", "letter", "garden"]


def sentences(n, seed=0, length=12):
    rng = random.Random(seed)
    return [
        " ".join(f"{rng.choice(WORDS)}{rng.randrange(50)}" for _ in range(length)) for _ in range(n)
    ]


def test_near_duplicates_are_all_pairs_above_the_threshold():
    """Against every pair."""
    rng = random.Random(1)
    sets = []
    for _ in range(40):
        known = {str(rng.randrange(300)) for _ in range(16)}
        for _ in range(3):
            fewer = set(rng.sample(sorted(known), len(known) - rng.randrange(4)))
            sets.append(fewer | {str(rng.randrange(300)) for _ in range(rng.randrange(3))})
    counts = {e: sum(e in s for s in sets) for e in set().union(*sets)}
    kept = [{e for e in s if counts[e] <= 12} for s in sets]
    expected = {
        frozenset((i, j))
        for i, j in itertools.combinations(range(len(sets)), 2)
        if kept[i] & kept[j] and len(kept[i] & kept[j]) / len(kept[i] | kept[j]) >= ALIKE
    }
    assert any(count > 12 for count in counts.values())
    assert len(expected) > 20
    assert {frozenset(pair) for pair in near_duplicates(sets)} == expected


def test_groups():
    a, b, c = sentences(3)
    texts = [a, b, a.upper() + " ?", c, b.replace(b.split()[0], "other", 1), "Hi!", "hi"]
    assert sorted(group(texts)) == [[0, 2], [1, 4], [3], [5, 6]]
    template = "Answer the question below as well as you can and be brief: "
    assert len(group([template + text for text in sentences(30, length=6)])) == 30


def test_no_group_is_split():
    prompts = sentences(60)
    rows = [{"prompt": p, "completion": str(i)} for i in range(3) for p in prompts]
    split = hold_out(Dataset.from_list(rows), "text", seed=3)
    assert split.groups == 60
    assert len(split.screening) == len(split.confirmation) == 18
    held = {*split.screening, *split.confirmation}
    trained = {rows[i]["prompt"] for i in range(len(rows)) if i not in held}
    for part in (split.screening, split.confirmation):
        assert not trained & {rows[i]["prompt"] for i in part}
    assert not {rows[i]["prompt"] for i in split.screening} & {
        rows[i]["prompt"] for i in split.confirmation
    }
    assert hold_out(Dataset.from_list(rows), "text", seed=3) == split
    assert hold_out(Dataset.from_list(rows), "text", seed=4) != split


def test_rows_of_a_file_that_are_trained_on_are_left_out():
    prompts = sentences(20)
    train = Dataset.from_list([{"prompt": p, "completion": "x"} for p in prompts[:10]])
    rows = Dataset.from_list([{"prompt": p, "completion": "x"} for p in prompts[7:]])
    screening, confirmation, left_out = split_held_out(rows, train, "text", 0)
    assert left_out == 3
    assert sorted(screening + confirmation) == list(range(3, 13))
    with pytest.raises(ConfigurationError, match="0 of 10 rows have prompts"):
        split_held_out(train, train, "text", 0)


def test_too_few_rows_and_one_prompt_for_all():
    with pytest.raises(ConfigurationError, match="16 rows, too few"):
        hold_out(Dataset.from_list([{"text": t} for t in sentences(16)]), "text", 0)
    same = Dataset.from_list([{"prompt": "Go on.", "completion": t} for t in sentences(40)])
    with pytest.raises(ConfigurationError, match="40 of 40 rows have the same prompt"):
        hold_out(same, "text", 0)


def test_prompt_texts():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    assert prompt_text(messages).split() == ["text", "Hello"]
    assert prompt_text([5, 6]) == "5 6"
