"""
Checks of the data that users of trainers otherwise make after training, if at all.

Rows that train on nothing (huggingface/trl 6025, 6320: a loss of 0 and a gradient of NaN;
unslothai/unsloth 2900), truncated answers, prompts that are trained on, a chat template applied
twice (unslothai/unsloth 2648: a doubled BOS), special tokens in the data's own text, duplicates.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eaft.inspection.folder import EXAMPLES_FILE, Inspection
from eaft.inspection.summary import DATA, CheckResult
from eaft.inspection.vocabulary import Vocabulary

Tokens = dict[str, NDArray[Any]]  # the columns `TOKEN_COLUMNS` of an example's tokens
Example = dict[str, Any]  # a row of examples.parquet
Row = dict[str, Any]  # a row of the data set

# Ids, where each token ends in the text, and whether it has a label that was scored
TOKEN_COLUMNS = {"token_id": np.int32, "end": np.int32, "scored": np.bool_}
FIRST_ROWS = 10  # that are named
PROMPT_TRAINED = "prompt_trained"  # the check that the report puts before its sentence
LEARNED_FROM = ("assistant", "gpt", "model", "chatbot")  # roles whose text is meant to be learned
CHECKS = {
    "unlabelled": (
        "Rows without a label",
        (
            "The model learns nothing from these rows. Their answer may lie beyond max_length, or"
            " the mask (assistant_only_loss, completion_only_loss) does not fit the chat template."
        ),
    ),
    "truncated": (
        "Truncated answers",
        (
            "max_length cuts off a part of the answer. If it cuts the end (truncation_mode"
            " keep_start), the rows teach the model not to stop. Raise max_length or drop the rows."
        ),
    ),
    PROMPT_TRAINED: (
        "Rows that train on tokens of the prompt",
        (
            "The text of the user, the system or a tool has labels: the model learns to write"
            " prompts. If that is not what you want: --assistant_only_loss true, for messages, or"
            " --completion_only_loss true."
        ),
    ),
    "template_twice": (
        "A chat template applied twice",
        (
            "A message begins with a special token, or the text begins with the same special token"
            " twice: the data already had the template, and the trainer applied it again. Give"
            " messages without the template, or plain text."
        ),
    ),
    "special_in_text": (
        "Special tokens inside the messages' own text",
        (
            "The text of a message holds a special token, which the tokenizer reads as one: it can"
            " end a turn in the middle. Remove or escape it."
        ),
    ),
    "duplicates": (
        "Duplicate examples",
        (
            "The row has the same prepared text as an earlier row, so the text is trained on more"
            " than once. Remove the copies unless you want that."
        ),
    ),
}


class Checks:
    """Collects the rows of the data that each check is about."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        special = [vocabulary.texts[token_id] for token_id in vocabulary.special]
        # The longest first, since one special token may begin with another
        special = sorted((text for text in special if text.strip()), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, special))) if special else None
        self.special_ids = vocabulary.special
        self.rows: dict[str, array[int]] = {name: array("q") for name in CHECKS}
        self.digests, self.numbers = array("Q"), array("q")  # of every row, for `duplicates`

    def add(self, example: Example, tokens: Tokens) -> None:
        """Check an example of the data."""
        text = example["text"].encode(errors="surrogatepass")
        self.digests.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
        self.numbers.append(example["row"])
        row = json.loads(example["messages"]) if example["messages"] else {}
        for name, fails in (
            ("unlabelled", example["labelled"] == 0),
            ("truncated", example["cut_labelled"] > 0),
            (PROMPT_TRAINED, prompt_is_trained(row, example["text"], tokens)),
            ("template_twice", self.template_twice(row, tokens)),
            ("special_in_text", self.special_in_text(row)),
        ):
            if fails:
                self.rows[name].append(example["row"])

    def template_twice(self, row: Row, tokens: Tokens) -> bool:
        """
        Return whether a chat template was applied twice.

        A message then begins with a special token, or the prepared text begins with the same
        special token twice.
        """
        first = tokens["token_id"][:2].tolist()
        if len(first) == 2 and first[0] == first[1] and first[0] in self.special_ids:
            return True
        if self.pattern is None:
            return False
        return any(self.pattern.match(message.text.lstrip()) for message in messages(row))

    def special_in_text(self, row: Row) -> bool:
        """Return whether the text of a message holds a special token."""
        if self.pattern is None:
            return False
        return any(self.pattern.search(message.text) for message in messages(row))

    def result(self) -> list[CheckResult]:
        """Return each check with its rows."""
        digests = np.array(self.digests, dtype=np.uint64)
        _, first = np.unique(digests, return_index=True)
        numbers = np.array(self.numbers, dtype=np.int64)
        rows = {**self.rows, "duplicates": array("q", np.delete(numbers, first).tolist())}
        return [
            CheckResult(name, title, len(rows[name]), rows[name][:FIRST_ROWS].tolist(), text)
            for name, (title, text) in CHECKS.items()
        ]


def check(inspection: Inspection) -> list[CheckResult]:
    """Return the checks of the data, and the findings about its chat template."""
    checks = Checks(Vocabulary(inspection))
    for example, tokens in with_tokens(inspection):
        if example["origin"] == DATA:
            checks.add(example, tokens)
    return checks.result() + inspection.run.template


def with_tokens(inspection: Inspection) -> Iterator[tuple[Example, Tokens]]:
    """Yield every example with its tokens, also an example without tokens."""
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
    """Yield each example's index and tokens, in order; one may continue in the next batch."""
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


@dataclass(frozen=True)
class Message:
    """A part of a conversation."""

    role: str
    text: str


def messages(row: Row) -> list[Message]:
    """Return every text of a conversational row, in order, without the tools that it calls."""
    texts = []
    for column in ("messages", "conversations", "prompt", "completion"):
        if isinstance(row.get(column), list):
            for message in row[column]:
                texts += message_texts(message)
    return texts


def message_texts(message: dict[str, Any]) -> list[Message]:
    """Return the texts of one message, in OpenAI's or ShareGPT's form."""
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    parts: list[dict[str, Any]] = content if isinstance(content, list) else [{"text": content}]
    return [Message(str(role), part["text"]) for part in parts if isinstance(part.get("text"), str)]


def prompt_is_trained(row: Row, text: str, tokens: Tokens) -> bool:
    """
    Return whether a token with a label ends within a message that is not the assistant's.

    In a row with a plain prompt, the prompt is that message: the prepared text begins with it. The
    text that the template writes between messages is no prompt. A message is skipped if the
    prepared text does not hold it, as after truncation. The search ends at an answer that the
    prepared text does not hold, as when the template drops its thoughts: a later message might
    match a place inside that answer. A plain prompt that begins after the first label is skipped,
    since it matches a place inside the answer.
    """
    prompt = row.get("prompt")
    plain: str | None = prompt if isinstance(prompt, str) else None
    starts = np.concatenate([[0], tokens["end"][:-1]])
    has_text = tokens["scored"] & (tokens["end"] > starts)
    cursor = 0
    conversation = messages(row)
    if plain is not None:
        conversation = [Message("user", plain)]
    for message in conversation:
        content = message.text.strip()
        begin = text.find(content, cursor)
        is_answer = message.role in LEARNED_FROM
        if begin < 0 and is_answer:
            break
        if begin < 0 or not content:
            continue
        if plain is not None and has_text.any() and begin > starts[has_text.argmax()]:
            continue
        cursor = begin + len(content)
        inside = has_text & (tokens["end"] > begin) & (tokens["end"] <= cursor)
        if not is_answer and inside.any():
            return True
    return False
