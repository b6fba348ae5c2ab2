"""
Is the data what you think? What users of trainers found out only after training, counted before.

Rows that train on nothing (huggingface/trl 6025, 6320: a loss of 0 and a gradient of NaN;
unslothai/unsloth 2900), answers that were cut, prompts that are trained on, a chat template applied
twice (unslothai/unsloth 2648: a doubled BOS), special tokens that the data's own text holds,
duplicates.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eaft.inspection.folder import DATA, EXAMPLES_FILE, Inspection
from eaft.inspection.labelled import Vocabulary

Tokens = dict[str, NDArray[Any]]

# Of an example's tokens: their ids, where each ends in the text, and whether it has a label that
# was scored
TOKEN_COLUMNS = {"token_id": np.int32, "end": np.int32, "scored": np.bool_}
FIRST_ROWS = 10  # that are named
LEARNED_FROM = ("assistant", "gpt", "model", "chatbot")  # roles whose text is meant to be learned
CHECKS = {
    "unlabelled": (
        "Rows without a label",
        (
            "Nothing of them is learned. Their answer may lie beyond max_length, or the mask"
            " (assistant_only_loss, completion_only_loss) does not fit the chat template."
        ),
    ),
    "truncated": (
        "Truncated answers",
        (
            "A part of their answer is cut at max_length. Where it is the end (truncation_mode"
            " keep_start), such rows teach not to stop. Raise max_length or drop them."
        ),
    ),
    "prompt_trained": (
        "Prompt tokens that are trained on",
        (
            "The text of the user, the system or a tool has labels: the model learns to write"
            " prompts. Set assistant_only_loss or completion_only_loss if that is not what you"
            " want."
        ),
    ),
    "template_twice": (
        "A chat template applied twice",
        (
            "A message begins with a special token, or the text with the same special token twice:"
            " the data already had the template, and got it once more. Give messages without it, or"
            " plain text."
        ),
    ),
    "special_in_text": (
        "Special tokens inside the messages' own text",
        (
            "The text of a message holds a special token and is read as such: it can end a turn in"
            " the middle. Remove or escape it."
        ),
    ),
    "duplicates": (
        "Duplicate examples",
        (
            "The same prepared text as an earlier row: it counts as many times. Remove the copies"
            " unless that is meant."
        ),
    ),
}


def check(inspection: Inspection) -> list[dict[str, Any]]:
    """
    Return each check: its name, title, number of rows, the first rows (their numbers in the data)
    and advice.
    """
    vocabulary = Vocabulary(inspection)
    special = sorted(
        (t for i in vocabulary.special if (t := vocabulary.texts[i]).strip()), key=len, reverse=True
    )
    pattern = re.compile("|".join(map(re.escape, special))) if special else None
    rows: dict[str, array[int]] = {name: array("q") for name in CHECKS}
    digests, numbers = array("Q"), array("q")
    for example, tokens in with_tokens(inspection):
        if example["origin"] != DATA:
            continue
        digest = hashlib.blake2b(
            example["text"].encode(errors="surrogatepass"), digest_size=8
        ).digest()
        digests.append(int.from_bytes(digest, "little"))
        numbers.append(example["row"])
        row = json.loads(example["messages"]) if example["messages"] else {}
        for name, found in (
            ("unlabelled", example["labelled"] == 0),
            ("truncated", example["cut_labelled"] > 0),
            ("prompt_trained", prompt_is_trained(row, example["text"], tokens)),
            ("template_twice", template_twice(row, tokens, pattern, vocabulary.special)),
            (
                "special_in_text",
                pattern is not None and any(pattern.search(text) for _, text in messages(row)),
            ),
        ):
            if found:
                rows[name].append(example["row"])
    _, first = np.unique(np.array(digests, dtype=np.uint64), return_index=True)
    rows["duplicates"].extend(np.delete(np.array(numbers, dtype=np.int64), first).tolist())
    return [
        {
            "name": name,
            "title": title,
            "count": len(rows[name]),
            "rows": rows[name][:FIRST_ROWS].tolist(),
            "text": text,
        }
        for name, (title, text) in CHECKS.items()
    ] + inspection.run.get(
        "template", []
    )  # of the chat template: `eaft.training.templates.Findings`


def with_tokens(inspection: Inspection) -> Iterator[tuple[dict[str, Any], Tokens]]:
    """Yield every example with its tokens."""
    columns = ["example", "origin", "row", "text", "messages", "labelled", "cut_labelled"]
    tokens = tokens_by_example(inspection)
    following = next(tokens, None)
    for batch in pq.ParquetFile(inspection.folder / EXAMPLES_FILE).iter_batches(
        1024, columns=columns
    ):
        for example in batch.to_pylist():
            if following is None or following[0] != example["example"]:
                yield example, {name: np.zeros(0, dtype) for name, dtype in TOKEN_COLUMNS.items()}
            else:
                yield example, following[1]
                following = next(tokens, None)


def tokens_by_example(inspection: Inspection) -> Iterator[tuple[int, Tokens]]:
    """Yield each example's index and tokens, in order; an example may go on in the next batch."""
    kept: Tokens = {}
    for batch in inspection.batches(["example", "token_id", "end", "log_prob"], rows=1 << 18):
        columns = {name: batch[name].to_numpy() for name in ("example", "token_id", "end")}
        columns["scored"] = pc.is_valid(batch["log_prob"]).to_numpy(zero_copy_only=False)
        kept = {
            name: np.concatenate([kept[name], new]) if kept else new
            for name, new in columns.items()
        }
        starts = np.flatnonzero(np.diff(kept["example"], prepend=-1)).tolist()
        for start, end in itertools.pairwise(starts):
            yield (
                int(kept["example"][start]),
                {name: kept[name][start:end] for name in TOKEN_COLUMNS},
            )
        kept = {name: values[starts[-1] :] for name, values in kept.items()} if starts else kept
    if len(kept.get("example", ())):
        yield int(kept["example"][0]), {name: kept[name] for name in TOKEN_COLUMNS}


def messages(row: dict[str, Any]) -> list[tuple[str, str]]:
    """
    Return role and text of every message of a conversational row, in order, without the tools it
    calls.
    """
    found = []
    for column in ("messages", "conversations", "prompt", "completion"):
        if isinstance(row.get(column), list):
            for message in row[column]:
                role, content = (
                    message.get("role", message.get("from")),
                    message.get("content", message.get("value")),
                )
                parts = content if isinstance(content, list) else [{"text": content}]
                found += [
                    (str(role), part["text"]) for part in parts if isinstance(part.get("text"), str)
                ]
    return found


def prompt_is_trained(row: dict[str, Any], text: str, tokens: Tokens) -> bool:
    """
    Return whether a token with a label ends within the text of a message that is not the
    assistant's.

    Of a row with a plain prompt: within the prompt, with which the prepared text begins. What the
    template writes between messages is no prompt here, nor is a message that is not found in the
    prepared text, as where it was cut, nor what follows an answer that is not, as where the
    template drops its thoughts: it might be found within it. So might a plain prompt that was cut:
    one that begins after the first label is none.
    """
    plain = row.get("prompt")
    starts = np.concatenate([[0], tokens["end"][:-1]])
    visible = tokens["scored"] & (tokens["end"] > starts)
    cursor = 0
    for role, content in [("user", plain)] if isinstance(plain, str) else messages(row):
        content = content.strip()
        begin = text.find(content, cursor)
        if begin < 0 and role in LEARNED_FROM:
            break
        if begin < 0 or not content:
            continue
        if isinstance(plain, str) and visible.any() and begin > starts[visible.argmax()]:
            continue
        cursor = begin + len(content)
        if (
            role not in LEARNED_FROM
            and (visible & (tokens["end"] > begin) & (tokens["end"] <= cursor)).any()
        ):
            return True
    return False


def template_twice(
    row: dict[str, Any], tokens: Tokens, pattern: re.Pattern[str] | None, special: set[int]
) -> bool:
    """
    Return whether a message begins with a special token, or the prepared text with the same one
    twice.
    """
    first = tokens["token_id"][:2].tolist()
    doubled = len(first) == 2 and first[0] == first[1] and first[0] in special
    return doubled or (
        pattern is not None and any(pattern.match(text.lstrip()) for _, text in messages(row))
    )
