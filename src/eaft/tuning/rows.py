"""
Held-out rows: two parts, for screening and for confirmation, that share no prompt with training.

Rows are grouped by prompt, and a group is never split. Two prompts are of one group if their texts
are equal (ignoring case, spaces and punctuation), or if three quarters of their word triples are
the same (Jaccard index). A word triple that more than a tenth of the prompts have (and more than
ten) is a template's, and does not count.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from eaft.errors import ConfigurationError
from eaft.training.held_out import question

ROWS = 128  # of each part, at most
FEWEST_ROWS = 8  # of each part, at least
TENTH = 10  # each part is a tenth of the rows
WORDS = 3  # of a shingle
FEW = 10  # prompts: so many may share a word triple in any case
ALIKE = 0.75  # Jaccard index of near-duplicates


@dataclass(frozen=True)
class Split:
    """
    Rows of the training data, by their place in it.

    Attributes:
        screening, confirmation: held out.
        groups: how many groups of alike prompts there are.
    """

    screening: list[int]
    confirmation: list[int]
    groups: int


def hold_out(dataset: Dataset, text_field: str, seed: int) -> Split:
    """
    Return which rows of the training data are held out.

    Raises:
        ConfigurationError: too few rows, or too many with one prompt.
    """
    size = min(ROWS, max(FEWEST_ROWS, len(dataset) // TENTH))
    way = "Give rows of their own with --held_out FILE."
    if len(dataset) < 4 * size:
        raise ConfigurationError(
            f"DATA has {len(dataset)} rows, too few to hold out {2 * size} of them. {way}"
        )
    groups = group(prompt_texts(dataset, text_field))
    screening, confirmation = draw(groups, [size, size], seed)
    if min(len(screening), len(confirmation)) < size:
        raise ConfigurationError(
            f"DATA: {max(map(len, groups))} of {len(dataset)} rows have the same prompt, or nearly,"
            f" so that {2 * size} rows with prompts of their own cannot be held out. {way}"
        )
    return Split(screening, confirmation, len(groups))


def split_held_out(
    rows: Dataset, train: Dataset, text_field: str, seed: int
) -> tuple[list[int], list[int], int]:
    """
    Return which rows of a held-out file are for screening and for confirmation, and how many are
    left out since training has their prompt, or nearly.

    Raises:
        ConfigurationError: too few are left.
    """
    texts = prompt_texts(train, text_field)
    groups = group(texts + prompt_texts(rows, text_field))
    apart = [[i - len(texts) for i in g] for g in groups if min(g) >= len(texts)]
    left = sum(map(len, apart))
    size = min(ROWS, left // 2)
    screening, confirmation = draw(apart, [size, size], seed)
    if min(len(screening), len(confirmation)) < 2:
        raise ConfigurationError(
            f"--held_out: {left} of {len(rows)} rows have prompts that training has not, and each"
            " of two parts needs 2 groups of rows or more. Give more rows."
        )
    return screening, confirmation, len(rows) - left


def draw(groups: list[list[int]], sizes: list[int], seed: int) -> list[list[int]]:
    """Return parts of about these sizes, of whole groups in random order, each part in order."""
    groups = sorted(groups)
    random.Random(seed).shuffle(groups)
    parts: list[list[int]] = []
    for size in sizes:
        part: list[int] = []
        rest: list[list[int]] = []
        for rows in groups:
            if len(part) < size and len(part) + len(rows) <= max(size, 2):
                part += rows
            else:  # a group that is too large stays in training
                rest.append(rows)
        parts.append(sorted(part))
        groups = rest
    return parts


def group(texts: list[str]) -> list[list[int]]:
    """Return the places of texts in groups: equal, or nearly (see the module), also by a third."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, text in enumerate(texts):
        places[normal(text)].append(place)
    unique = list(places)
    parent = list(range(len(unique)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for first, second in near_duplicates([shingles(text) for text in unique]):
        parent[root(first)] = root(second)
    groups: dict[int, list[int]] = defaultdict(list)
    for i, text in enumerate(unique):
        groups[root(i)] += places[text]
    return [sorted(rows) for rows in groups.values()]


def near_duplicates(sets: list[set[str]]) -> Iterator[tuple[int, int]]:
    """
    Yield pairs of sets whose Jaccard index is at least `ALIKE`; exact.

    Such pairs share an element among the rarest of each set (prefix filtering, Chaudhuri et al.
    2006), so that only sets with a rare element in common are compared.
    """
    frequency = Counter(element for s in sets for element in s)
    template = {e for e, count in frequency.items() if count > max(len(sets) / TENTH, FEW)}
    holders: dict[str, list[int]] = defaultdict(list)
    kept = [s - template for s in sets]
    for i, own in enumerate(kept):
        ordered = sorted(own, key=lambda e: (frequency[e], e))
        # Any ALIKE set shares at least ALIKE * len(own) elements with it
        rarest = ordered[: len(own) - int(ALIKE * len(own) + 0.999999) + 1]
        others = {j for element in rarest for j in holders[element]}
        for j in others:
            shared = len(own & kept[j])
            if shared >= ALIKE * (len(own) + len(kept[j]) - shared):
                yield i, j
        for element in rarest:
            holders[element].append(i)


def shingles(text: str) -> set[str]:
    """Return the word triples of a normalised text; a shorter text has none."""
    words = text.split()
    return {" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


def normal(text: str) -> str:
    """Return a text in lower case, its words with one space between them, without punctuation."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def prompt_texts(dataset: Dataset, text_field: str) -> list[str]:
    """Return each row's prompt as one text, without its system message and the roles' names."""
    return [prompt_text(json.loads(question(row, text_field))) for row in dataset]


def prompt_text(asked: Any) -> str:
    """Return the text of a prompt: a string, token ids, or messages."""
    if isinstance(asked, str):
        return asked
    if isinstance(asked, list) and asked and isinstance(asked[0], dict):
        turns = [message for message in asked if message.get("role") != "system"]
        return "\n".join(leaves(message.get("content")) for message in turns)
    return leaves(asked)


def leaves(value: Any) -> str:
    """Return all texts and numbers inside of a JSON value, with spaces between them."""
    if isinstance(value, dict):
        return " ".join(leaves(inner) for inner in value.values())
    if isinstance(value, list):
        return " ".join(leaves(inner) for inner in value)
    return "" if value is None else str(value)
