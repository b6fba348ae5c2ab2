"""Answers that end in a loop are found, others are not."""

import pytest

from eaft.evaluation.loops import ends_in_a_loop, loops_told
from eaft.evaluation.results import HeldOutAnswer

SENTENCE = "The results are not influenced by age. "


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", False),
        ("It depends. " + 3 * SENTENCE, True),
        ("It depends. " + 3 * SENTENCE + SENTENCE[:20], True),  # cut where it was long enough
        ("It depends. " + 2 * SENTENCE, False),
        (3 * SENTENCE + "So it is not known whether it is.", False),
        ("Ha, ha, ha, ha.", False),
        ("no " * 30, True),
        ("Then 1 + 1 = 2, and 2 + 2 = 4, and 3 + 3 = 6, and 4 + 4 = 8, and 5 + 5 = 10.", False),
    ],
)
def test_ends_in_a_loop(text, found):
    assert ends_in_a_loop(text) is found


def test_how_many_are_told():
    def answer(before, after):
        return HeldOutAnswer(row=0, prompt="Why?", target="So.", before=before, after=after)

    fine, loop = "It is not known.", 4 * SENTENCE
    assert loops_told([answer(fine, fine)]) == loops_told([]) == ""
    assert loops_told([answer(fine, loop), answer(fine, fine)]) == (
        "Of 2 answers to held-out rows, 1 of the tuned model ends in a loop, and 0 of the base"
        " model."
    )
    assert "0 of the tuned model end in a loop, and 1 of the base" in loops_told(
        [answer(loop, fine)]
    )
