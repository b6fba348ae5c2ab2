"""
The advice: how much of the data fights the model, over format or content, and what to do about it.

Shares are of the nll. `conflicts` says which conflicts are format and which are content.
"""

from __future__ import annotations

from eaft.inspection.find.conflicts import Conflicts
from eaft.inspection.find.rule import Rule
from eaft.inspection.find.wording import percent, shown
from eaft.inspection.interval import MIN_CONFLICTS, share_at_most
from eaft.inspection.summary import (
    Advice,
    AdviceFacts,
    ByOrigin,
    ExpectedDrift,
    Interval,
    Shares,
    TokenNll,
)

FEW, MANY = 0.2, 0.5  # up to the first share of the nll, conflicts are few; from the second, many
MOSTLY = 0.7  # share of the conflicts' nll from which they are mostly format, or mostly content
NAMED = 3  # tokens of a kind that the text names

HEADLINES = {
    "too_few": "Too few tokens to say whether this data fights the model.",
    "few": "Little of this data {fights} the model: plain SFT will do.",
    "format": "{much} of this data {fights} the model, mostly over format: EAFT {helps}.",
    "content": (
        "{much} of this data {fights} the model, mostly over words and numbers: decide first who"
        " is right."
    ),
    "mixed": (
        "{much} of this data {fights} the model, over format and over words and numbers: EAFT"
        " {helps}."
    ),
}
WHAT_TO_DO = {
    "format": (
        "EAFT mutes these tokens: the model keeps its habits and learns this format less. If you"
        " need exactly this format, test for it after training, or write the answers as the model"
        " does."
    ),
    "content": (
        "If these are facts you want to teach, do not use EAFT: it suppresses exactly these"
        " updates. If they are errors in the data, or other words for the same thing, EAFT protects"
        " the model from them."
    ),
    "mixed": (
        "EAFT mutes both. If the words and numbers are facts you want to teach, EAFT suppresses"
        " exactly these updates: look at the tokens below."
    ),
}


def advise(shares: ByOrigin[Shares], conflicts: Conflicts, interval: Interval | None) -> Advice:
    """
    Return the advice.

    Args:
        shares: in confident conflicts, of the data and of the model's own answers.
        conflicts: of the data.
        interval: 95%, of the share of the data's nll in conflicts; None if there is none.
    """
    share, content = shares.data.nll, conflicts.content_share()
    rule = Rule.fitted()
    expected = None if share is None else rule.expect(share)
    facts = AdviceFacts(
        **vars(shares.data),
        rollouts=shares.rollouts,
        content_share=content,
        examples_with_label=conflicts.labelled_examples,
        format=conflicts.top_format(),
        content=conflicts.top_content(),
        expected=expected,
        conflicts=int(conflicts.counts.sum()),
        interval=interval,
    )
    if share is None or expected is None:
        headline = "Nothing to train on: no token has a label."
        text = "See the checks below: the labels are masked, or max_length cut them off."
        return Advice("none", headline, f"{headline} {text}", facts)
    if too_few(share, conflicts):
        count = int(conflicts.counts.sum())
        number = f"{count} is" if count == 1 else f"{count} are"
        more = (
            f"Of its labelled tokens {number} in confident conflict; at least {MIN_CONFLICTS} are"
            " needed for a share that can be trusted. Score more rows."
        )
        headline = HEADLINES["too_few"]
        return Advice("too_few", headline, f"{headline} {more}", facts)
    mostly = main_kind(content)
    kind = mostly if share > FEW else "few"
    # With fewer conflicts the share is little in any case: see `too_few`
    sure = conflicts.counts.sum() < MIN_CONFLICTS or (
        interval is not None and not interval.low <= FEW <= interval.high
    )
    helps = "is expected to help" if expected.high < 0 else "has not been shown to help"
    much = "Much" if share >= MANY else "Some"
    fights = "fights" if sure else "seems to fight"
    headline = HEADLINES[kind].format(much=much, helps=helps, fights=fights)
    sentences = [headline, how_much(shares, interval)]
    if not sure:
        sentences.append(
            f"From {percent(FEW)} of the nll we call it some, below little: more rows would say"
            " which it is."
        )
    any_conflict = bool(conflicts.counts.sum())
    if any_conflict:
        sentences.append(what_they_are(mostly, facts))
    sentences.append(what_to_expect(expected))
    if kind != "few":
        sentences.append(WHAT_TO_DO[kind])
    elif mostly == "content" and any_conflict:
        sentences.append(
            "If these few are facts you want to teach, EAFT would suppress exactly these updates."
        )
    return Advice(kind, sentences[0], " ".join(sentences), facts)


def main_kind(content_share: float | None) -> str:
    """Return what most conflicts are: "format", "content" or "mixed"."""
    if content_share is None or content_share <= 1 - MOSTLY:
        return "format"
    return "content" if content_share >= MOSTLY else "mixed"


def too_few(share: float, conflicts: Conflicts) -> bool:
    """
    Return whether there are too few conflicts to say how much of the data fights the model.

    Few conflicts are enough where even `MIN_CONFLICTS` would be little of the nll.
    """
    count = int(conflicts.counts.sum())
    if count >= MIN_CONFLICTS:
        return False
    return share_at_most(count, share, conflicts.all_nll) > FEW


def what_to_expect(expected: ExpectedDrift) -> str:
    """Return what EAFT is expected to save, and how sure that is."""
    if expected.low <= 0 <= expected.high:
        return "In our study EAFT saved nothing on data like this."
    verdict = "save" if expected.high < 0 else "cost"
    return (
        f"EAFT is expected to {verdict} drift on data like this: at the same held-out nll it drifts"
        f" {difference(expected.change)} from the base model than SFT (95% of runs:"
        f" {difference(expected.low)} to {difference(expected.high)}). We measured this on one"
        " model of 135M parameters; yours may differ."
    )


def difference(change: float) -> str:
    """Return a change in words."""
    return f"{abs(100 * change):.0f}% {'less' if change < 0 else 'more'}"


def how_much(shares: ByOrigin[Shares], interval: Interval | None) -> str:
    """Return how much of the data is in conflict, beside the model's own answers."""
    data, rollouts = shares.data, shares.rollouts
    certainty = ""
    if interval is not None:
        certainty = f"; 95% interval: {percent(interval.low)} to {percent(interval.high)}"
    parts = [
        f"{percent(data.nll or 0)} of the loss (nll{certainty})",
        f"{percent(data.tokens or 0)} of the tokens",
    ]
    if data.gradient is not None:  # a run of vLLM has none
        parts.append(f"{percent(data.gradient)} of the gradient")
    text = (
        f"{', '.join(parts[:-1])} and {parts[-1]} are confident conflicts: the model is sure of"
        " another token than the label"
    )
    if rollouts is not None and rollouts.nll is not None:
        text += f"; in its own answers to the same prompts, {percent(rollouts.nll)} of the nll"
    return f"{text}."


def what_they_are(mostly: str, facts: AdviceFacts) -> str:
    """Return which tokens are in conflict."""
    content, format_ = named(facts.content), named(facts.format)
    if mostly == "mixed":
        share = percent(facts.content_share or 0)
        return (
            f"By nll {share} of them are words and numbers ({content}), the rest format"
            f" ({format_})."
        )
    if mostly == "content":
        return f"They are mostly words and numbers: {content}."
    return f"They are mostly format: {format_}."


def named(tokens: list[TokenNll]) -> str:
    """Return the first tokens as a list in words, each text once."""
    texts = dict.fromkeys(f"`{shown(token.text)}`" for token in tokens)
    return ", ".join(list(texts)[:NAMED])
