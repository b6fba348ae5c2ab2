"""Answers that go round in a circle, which no score and no nll shows."""

from __future__ import annotations

from eaft.evaluation.results import HeldOutAnswer

ROUNDS, LENGTH = 3, 60  # a piece that stands so often at the end, in so many characters at least


def ends_in_a_loop(text: str) -> bool:
    """Return whether a text ends in a piece that is repeated; its last round may be cut."""
    for piece in range(1, len(text) // ROUNDS + 1):
        end = text[-max(ROUNDS * piece, LENGTH) :]
        if len(end) >= LENGTH and end[piece:] == end[:-piece]:
            return True
    return False


def loops_told(answers: list[HeldOutAnswer]) -> str:
    """Return in words how many answers of either model end in a loop; nothing if none does."""
    before, after = (
        sum(map(ends_in_a_loop, texts))
        for texts in ([a.before for a in answers], [a.after for a in answers])
    )
    if not before and not after:
        return ""
    answers_of = "1 answer" if len(answers) == 1 else f"{len(answers)} answers"
    return (
        f"Of {answers_of} to held-out rows, {after} of the tuned model"
        f" {'ends' if after == 1 else 'end'} in a loop, and {before} of the base model."
    )
