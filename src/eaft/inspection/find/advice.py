"""
The sentence: how much of the data fights the model, whether that is format or content, and what to
do about it.

**Format or content.** A conflict's token counts as *content* where the label and the model's first
choice are two different words or numbers, as ` Rome` for ` Paris`. It counts as *format*

- where either of the two is special or has no letter and no digit (`<<`, a line's end, an end of
  turn);
- where they are the same but for capitals, spaces and where the tokenizer splits them (` PAR` for `
  Paris`);
- where the label, having no digit, is in conflict in many examples: a habit of the writer, since
  facts differ from example to example. Many: a fifth of the examples that have a label, and at
  least three.

Shares are of the nll. The rule reads single tokens: a minus for a plus is format to it, a renamed
heading content if it is rare. The tokens it judged are listed beside the sentence.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft.inspection.find.rule import Expected, Rule
from eaft.inspection.labelled import Labelled, Vocabulary
from eaft.inspection.score.pieces import BYTE_TOKEN
from eaft.text import visible

Numbers = dict[str, Any]

FEW, MANY = 0.2, 0.5  # of the nll in conflicts: up to the first it is little, from the second much
MOSTLY = 0.7  # of the conflicts' nll: format, or content
RECURRING_SHARE, RECURRING_EXAMPLES = 0.2, 3
NAMED = 3  # tokens of a kind that the sentence names
# What ends a line would break a table, and the word clouds
SYMBOLS = str.maketrans(
    {"\n": "⏎", "\r": "⇤", "\t": "⇥", "`": "'"}
    | dict.fromkeys("\v\f\x1c\x1d\x1e\x85\u2028\u2029", "↓")
)


class Conflicts:
    """Sums over the conflicts of the data, by label."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.plain = np.zeros(vocabulary.size, dtype=bool)  # a word or a number
        self.digits = np.zeros(vocabulary.size, dtype=bool)
        for token, text in vocabulary.texts.items():
            self.plain[token] = token not in vocabulary.special and any(c.isalnum() for c in text)
            self.digits[token] = any(c.isdigit() for c in BYTE_TOKEN.sub("", text))
        # Of all conflicts, and of those in which the label and the first choice are two different
        # words or numbers
        self.nll, self.words_nll = np.zeros(vocabulary.size), np.zeros(vocabulary.size)
        self.counts, self.words_counts = (
            np.zeros(vocabulary.size, dtype=np.int64) for _ in range(2)
        )
        self.examples = np.zeros(
            vocabulary.size, dtype=np.int64
        )  # in which the label is in conflict
        self.labelled_examples = 0
        self.last_example, self.labels_of_last = -1, np.zeros(0, dtype=np.int32)

    def add(self, tokens: Labelled) -> None:
        """Add tokens of the data, in order."""
        conflict = tokens.stats.is_conflict.numpy()
        label, first, nll = (
            tokens.token_id[conflict],
            tokens.first_choice[conflict],
            tokens.quantities["nll"][conflict],
        )
        size = self.vocabulary.size
        words = self.are_two_words(label, first)
        for keep, counts, sums in (
            (slice(None), self.counts, self.nll),
            (words, self.words_counts, self.words_nll),
        ):
            counts += np.bincount(label[keep], minlength=size)
            sums += np.bincount(label[keep], nll[keep], size)
        self.count_examples(tokens.example, tokens.example[conflict], label)

    def are_two_words(self, label: NDArray[Any], first: NDArray[Any]) -> NDArray[np.bool_]:
        """
        Return for each token whether its label and first choice are two different words or numbers.
        """
        pairs, of_pair = np.unique(np.stack([label, first]), axis=1, return_inverse=True)
        found = np.zeros(pairs.shape[1], dtype=bool)
        for i, pair in enumerate(pairs.T.tolist()):
            if all(token in self.vocabulary.texts and self.plain[token] for token in pair):
                one, other = (
                    "".join(self.vocabulary.texts[token].casefold().split()) for token in pair
                )
                begins = one.startswith(other) or other.startswith(one)
                found[i] = one != other if self.digits[pair].any() else not begins
        return found[of_pair.ravel()]

    def count_examples(
        self, all_examples: NDArray[Any], example: NDArray[Any], label: NDArray[Any]
    ) -> None:
        """
        Count the examples that each label is in conflict in; one may go on from the batch before.
        """
        if not len(all_examples):
            return
        goes_on = all_examples[0] == self.last_example
        self.labelled_examples += len(np.unique(all_examples)) - int(goes_on)
        pairs = np.unique(example.astype(np.int64) << 32 | label)
        example, label = pairs >> 32, pairs & 0xFFFFFFFF
        new = ~((example == self.last_example) & np.isin(label, self.labels_of_last))
        self.examples += np.bincount(label[new], minlength=self.vocabulary.size)
        labels_of_last = label[example == all_examples[-1]]
        if all_examples[-1] == self.last_example:
            labels_of_last = np.union1d(labels_of_last, self.labels_of_last)
        self.last_example, self.labels_of_last = int(all_examples[-1]), labels_of_last

    def content(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """
        Return the nll and the number of content conflicts by label; the rest of a label's are
        format.
        """
        many = max(RECURRING_EXAMPLES, math.ceil(RECURRING_SHARE * self.labelled_examples))
        habit = (self.examples >= many) & ~self.digits
        return np.where(habit, 0.0, self.words_nll), np.where(habit, 0, self.words_counts)

    def facts(self) -> Numbers:
        """
        Return the share of content in the conflicts' nll, and the labels with most nll of each
        kind.
        """
        content_nll, content_counts = self.content()
        total = self.nll.sum()
        kinds = {
            "format": (self.nll - content_nll, self.counts - content_counts),
            "content": (content_nll, content_counts),
        }
        return {
            "content_share": float(content_nll.sum() / total) if total else None,
            "examples_with_label": self.labelled_examples,
            **{
                kind: [
                    {
                        **self.vocabulary.named(token),
                        "count": int(counts[token]),
                        "nll": float(nll[token]),
                    }
                    for token in np.argsort(-nll, kind="stable")[:10]
                    if counts[token] > 0
                ]
                for kind, (nll, counts) in kinds.items()
            },
        }


def advise(data: Numbers, rollouts: Numbers | None, conflicts: Conflicts) -> Numbers:
    """
    Return the advice: `kind`, a `headline`, the whole `text` and the `facts` behind it.

    Args:
        data: the shares of tokens, nll and gradient in conflicts.
        rollouts: the same of the model's own answers, if there are any.
        conflicts: of the data.
    """
    facts = {**data, "rollouts": rollouts, **conflicts.facts()}
    share, content = data["nll"], facts["content_share"]
    if share is None:
        headline = "Nothing to train on: no token has a label."
        text = "See the checks below: the labels are masked, or were cut by max_length."
        return {"kind": "none", "headline": headline, "text": f"{headline} {text}", "facts": facts}
    mostly = (
        "format"
        if content is None or content <= 1 - MOSTLY
        else "content"
        if content >= MOSTLY
        else "mixed"
    )
    kind = mostly if share > FEW else "few"
    rule = Rule.fitted()
    expected = rule.expect(share)
    facts["expected"] = asdict(expected)
    helps = "is expected to help" if expected.high < 0 else "has not been shown to help"
    sentences = [
        HEADLINES[kind].format(much="Much" if share >= MANY else "Some", helps=helps),
        how_much(data, rollouts),
    ]
    if conflicts.counts.sum():
        sentences.append(what_they_are(mostly, facts))
    sentences.append(what_to_expect(expected, share, rule))
    if kind != "few":
        sentences.append(WHAT_TO_DO[kind])
    elif mostly == "content" and conflicts.counts.sum():
        sentences.append(
            "If those few are facts you want to teach, EAFT would suppress exactly these updates."
        )
    return {"kind": kind, "headline": sentences[0], "text": " ".join(sentences), "facts": facts}


HEADLINES = {
    "few": "Little of this data fights the model: plain SFT will do.",
    "format": "{much} of this data fights the model, mostly over format: EAFT {helps}.",
    "content": (
        "{much} of this data fights the model, mostly over words and numbers: decide first who is"
        " right."
    ),
    "mixed": (
        "{much} of this data fights the model, over format and over words and numbers: EAFT"
        " {helps}."
    ),
}
WHAT_TO_DO = {
    "format": (
        "EAFT mutes these tokens: the model keeps its habits and learns this format less. If you"
        " need exactly this format, test for it after training, or write the answers the way the"
        " model does."
    ),
    "content": (
        "If these are facts you want to teach, do not use EAFT: it suppresses exactly these"
        " updates. If they are errors in the data, or other words for the same thing, EAFT protects"
        " the model from them."
    ),
    "mixed": (
        "EAFT mutes both. If the words and numbers are facts you want to teach, it suppresses"
        " exactly these updates: look at them below."
    ),
}


def what_to_expect(expected: Expected, share: float, rule: Rule) -> str:
    """Return what EAFT is expected to save, how sure that is, and what it rests on."""
    nearest = min(max(share, rule.lowest), rule.highest)
    where = (
        "at this share"
        if nearest == share
        else f"at {percent(nearest)}, the nearest share that was measured"
    )
    pays = (
        "it pays"
        if expected.high < 0
        else "it costs"
        if expected.low > 0
        else "no saving to count on"
    )
    return (
        f"Expected of EAFT {where}: it drifts {difference(expected.change)} from the base model"
        f" than SFT does at the same held-out nll (95% of runs: {difference(expected.low)} to"
        f" {difference(expected.high)}), {pays}. Measured on one model of 135M parameters; yours"
        " may differ."
    )


def difference(change: float) -> str:
    """Return a change in words."""
    return f"{abs(100 * change):.0f}% {'less' if change < 0 else 'more'}"


def how_much(data: Numbers, rollouts: Numbers | None) -> str:
    """Return how much of the data is in conflict, beside the model's own answers."""
    text = (
        f"{percent(data['nll'])} of the loss (nll), {percent(data['tokens'])} of the tokens and"
        f" {percent(data['gradient'])} of the gradient are confident conflicts: the model is sure"
        " of something else than the label"
    )
    if rollouts is not None and rollouts["nll"] is not None:
        text += f"; in its own answers to the same prompts, {percent(rollouts['nll'])} of the nll"
    return f"{text}."


def what_they_are(mostly: str, facts: Numbers) -> str:
    """Return which tokens are in conflict."""

    def named(kind: str) -> str:
        return ", ".join(
            list(dict.fromkeys(f"`{shown(token['text'])}`" for token in facts[kind]))[:NAMED]
        )

    if mostly == "mixed":
        share = percent(facts["content_share"])
        return (
            f"By nll {share} of them are words and numbers ({named('content')}), the rest format"
            f" ({named('format')})."
        )
    what = {"format": "format", "content": "words and numbers"}[mostly]
    return f"They are mostly {what}: {named(mostly)}."


def shown(text: str, leading: bool = False) -> str:
    """
    Return a token's text so that it can be seen: white space as symbols, at most 24 characters.

    Args:
        text: of the token.
        leading: show a leading space too, which tells ` the` from `the` in tables.
    """
    if leading and text.startswith(" ") and not text.isspace():
        return f"␣{shown(text[1:])}"
    text = visible(
        (text.replace(" ", "␣") if text.isspace() else text.strip()).translate(SYMBOLS), lines=False
    )
    return text if len(text) <= 24 else f"{text[:23]}…"


def percent(share: float) -> str:
    """Return a share in per cent, as one says it."""
    return f"{100 * share:.0f}%" if share >= 0.0995 or share == 0 else f"{100 * share:.1f}%"
