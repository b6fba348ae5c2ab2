"""What the report says, of numbers made up for it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from eaft.comparison import report, sentences, tables
from eaft.comparison.collect import NLL, adjust, mean_and_std, verdict
from eaft.comparison.results import (
    Choice,
    Difference,
    Failure,
    FrontDifference,
    Means,
    ObjectiveResult,
    PairResult,
    PairView,
    Spread,
    Spreads,
)
from eaft.comparison.sentences import told_apart
from eaft.evaluation.paired import paired_change
from eaft.evaluation.results import Changes, TaskChange
from eaft.evaluation.suite import Suite

GROUPS = [Suite("target", ["t"]), Suite("general", ["g", "h"])]


def difference(change, p=0.001, half=0.01):
    return Difference(
        change=change,
        low=change - half,
        high=change + half,
        p_value=p,
        p_holm=p,
        items=10,
        seeds=1,
        per_seed=[change],
    )


def front(*differences, half=0.01):
    targets = [1 + 0.1 * i for i in range(len(differences))]
    return FrontDifference(
        targets=targets,
        first=[0.1] * len(targets),
        second=[0.1] * len(targets),
        difference=list(differences),
        low=[d - half for d in differences],
        high=[d + half for d in differences],
        mean=difference(sum(differences) / len(differences)),
    )


def make_pair(
    target=0.0,
    general=0.0,
    drift=0.0,
    fronts=None,
    first="eaft",
    second="sft",
    seeds=(0, 1),
    g=0.0,
    h=0.0,
    nll=None,
):
    """A pair whose differences are significant unless they are 0."""
    view = PairView(
        means={
            n: difference(c, 0.001 if c else 1.0)
            for n, c in (("target", target), ("general", general))
        },
        drift={"general": difference(drift, 0.001 if drift else 1.0)},
        tasks={
            name: difference(c, 0.001 if c else 1.0)
            for name, c in {"t": target, "g": g, "h": h}.items()
        },
        nll=None if nll is None else difference(nll),
    )
    return PairResult(
        first=first, second=second, seeds=list(seeds), views={"last": view}, fronts=fronts or {}
    )


def task_change(change, p=1.0):
    """The change of one task of ten items."""
    alike = paired_change(np.ones(10), np.ones(10))
    return TaskChange(**{**vars(alike), "change": change}, metric="acc,none", p_holm=p)


def beside(objective, *changes, p=0.001):
    """
    What an objective has beside the base model, with one seed each: the change of its target and
    general task.
    """
    return [
        Choice(
            objective=objective,
            seed=seed,
            learning_rate=None,
            steps={"last": 1},
            numbers={},
            changes={
                "last": Changes(
                    tasks={"t": task_change(target, p), "g": task_change(general, p)},
                    filters={},
                    means={"target": task_change(target), "general": task_change(general)},
                )
            },
        )
        for seed, (target, general) in enumerate(changes)
    ]


def headline(*pairs, failed=(), choices=()):
    return sentences.headline(
        SimpleNamespace(
            pairs=pairs,
            verdicts=[verdict(pair, GROUPS) for pair in pairs],
            failed=list(failed),
            choices=choices,
            groups={"target": ["t"], "general": ["g", "h"]},
        )
    )


def judged(pair):
    """The verdict on a pair: better, worse, prefer."""
    found = verdict(pair, GROUPS)
    return found.better, found.worse, found.prefer


def test_a_gain_without_a_loss_is_chosen():
    said = headline(make_pair(drift=-0.2), make_pair(target=-0.1, first="dft"))
    assert said.startswith(
        "**Choose eaft.** eaft is better than sft in drift, and not shown to be worse in anything"
    )
    assert "drift -0.2000 (95%: -0.2100 to -0.1900; p 0.001)" in said
    assert "dft is worse than sft in target, and not shown to be better in anything" in said
    assert "target -10.0 points (95%: -11.0 to -9.0; p 0.001)" in said
    assert "One seed" not in said
    assert headline(make_pair(target=-0.1)).startswith("**Choose sft.**")


def test_the_best_of_them_may_still_be_nothing_to_ship():
    """Better than the other objective, and worse than the base model."""
    pair = make_pair(target=0.02)
    both = [*beside("eaft", (0.5, -0.125), (0.25, -0.0625)), *beside("sft", (0.1, 0.1))]
    said = headline(pair, choices=both)
    assert (
        "**Choose eaft.** Beside the base model eaft has target +37.5, general -9.4 points: "
        in said
    )
    assert "**do not ship it as it is, a loss is shown on g**" in said
    assert "Beside the base model sft" not in said
    unsure = headline(
        make_pair(), choices=[*beside("eaft", (0.5, -0.1), p=0.2), *beside("sft", (-0.1, 0.1))]
    )
    assert "eaft has target +50.0, general -10.0 points: no loss is shown." in unsure
    assert (
        "sft has target -10.0, general +10.0 points: **do not ship it as it is, a loss is shown on"
        " t**." in unsure
    )


def test_a_trade_and_nothing_are_said_to_be_that():
    said = headline(make_pair(target=-0.1, drift=-0.2))
    assert said.startswith(
        "**Choose by what you need: what is gained is paid for.** eaft is better than sft in drift"
    )
    assert "and worse in target" in said
    said = headline(make_pair(seeds=[0]))
    assert said.startswith(
        "**No objective is shown to be better than another: take the simplest.**"
    )
    assert said.endswith("another seed may turn this round.")
    both = headline(make_pair(drift=-0.2), make_pair(drift=-0.1, first="talr"))
    assert both.startswith("**Choose one of eaft, talr**: none is shown to be better than another.")
    ranked = headline(
        make_pair(drift=-0.2),
        make_pair(drift=-0.1, first="talr"),
        make_pair(drift=-0.1, second="talr"),
    )
    assert ranked.startswith("**Choose eaft.**")
    assert headline().startswith("Nothing was compared")
    assert "What failed" not in said
    failure = Failure(objective="dft", seed=0, message="out of memory")
    assert headline(make_pair(drift=-0.2), failed=[failure]).endswith(
        "What failed (below) is not judged."
    )


def test_how_it_was_tested_is_what_was_done():
    """With one seed drift's differences are a bootstrap's, as in `eaft eval`, not Student's."""
    assert "Student" not in report.how_tested([make_pair(seeds=[0])])


def test_less_drift_for_less_learned_is_no_gain():
    """Drift at each one's own choice is lower, but not where both have learned as much."""
    equal = replace(front(0.0, 0.0), mean=difference(0.0, 1.0))
    assert judged(make_pair(drift=-0.2, fronts={NLL: equal})) == ([], [], None)
    worse = make_pair(drift=-0.2, fronts={NLL: front(0.05, 0.07)})
    assert judged(worse) == ([], [f"drift at equal {NLL}"], "sft")
    no_common_target = make_pair(drift=-0.2, fronts={NLL: None})
    assert judged(no_common_target)[2] == "eaft"


def test_nothing_learned_is_no_gain():
    """A run that never learns shares no target with another, and has drifted least of all."""
    pair = make_pair(drift=-0.2, nll=0.5, fronts={NLL: None})
    assert judged(pair) == (["drift"], [NLL], None)
    assert "held-out nll +0.5000 (95%: +0.4900 to +0.5100; p 0.001)" in headline(pair)


def test_a_worse_best_nll_is_a_price_also_beside_fronts():
    """As in the demo: less drift at equal nll, and a best nll that is shown to be worse."""
    pair = make_pair(nll=0.072, fronts={NLL: front(-0.02, -0.03)})
    assert judged(pair) == ([f"drift at equal {NLL}"], [NLL], None)
    said = headline(pair)
    assert said.startswith("**Choose by what you need: what is gained is paid for.**")
    assert "held-out nll +0.0720 (95%: +0.0620 to +0.0820; p 0.001)" in said
    assert "not shown to be worse" not in said
    unsure = make_pair(nll=0.0, fronts={NLL: front(-0.02, -0.03)})
    unsure.views["last"].nll.p_holm = 0.2
    assert judged(unsure)[2] == "eaft"


def test_a_loss_on_one_task_is_not_hidden_by_a_gain_on_another():
    said = headline(make_pair(drift=-0.2, g=-0.1, h=0.1))
    assert said.startswith("**Choose by what you need")
    assert "eaft is better than sft in h and drift and worse in g" in said
    assert "h +10.0 points" in said
    assert "g -10.0 points (95%: -11.0 to -9.0; p 0.001)" in said
    assert (
        " t " not in headline(make_pair(target=0.1)).partition("(eaft minus")[0]
    )  # one task is its group's mean


def where_of(pair, target):
    found = next(f for f in sentences.fronts_of(pair) if f.target == target)
    return sentences.where(found)


def test_where_fronts_can_be_told_apart():
    pair = make_pair(fronts={NLL: front(-0.03, -0.02, 0.0, 0.02, 0.005)})
    assert [(s.sign, s.start, s.end) for s in told_apart(pair.fronts[NLL])] == [
        (-1, 1.0, pytest.approx(1.1)),
        (1, pytest.approx(1.3), pytest.approx(1.3)),
    ]
    assert (
        where_of(pair, NLL)
        == "eaft and sft: at held-out nll 1.000 to 1.100 eaft drifts less, by 0.0200 to 0.0300, at"
        " held-out nll 1.300 eaft drifts more, by 0.0200; elsewhere from 1.000 to 1.400 they"
        " cannot be told apart (on average -0.0050 (95%: -0.0150 to +0.0050; p 0.001), -5% of"
        " sft's)."
    )
    whole = make_pair(fronts={NLL: front(-0.03, -0.02)})
    assert "elsewhere" not in where_of(whole, NLL)
    nothing = make_pair(fronts={NLL: front(0.0, 0.001)})
    assert "cannot be told apart at any held-out nll from 1.000 to 1.100" in where_of(nothing, NLL)
    assert "there is no held-out nll that both reach" in where_of(
        make_pair(fronts={NLL: None}), NLL
    )
    score = front(-0.03, -0.03)
    score.targets = [0.3, 0.5]  # shortfalls
    assert "at gsm8k 70.0% to 50.0% eaft drifts less" in where_of(
        make_pair(fronts={"gsm8k": score}), "gsm8k"
    )


def test_p_is_adjusted_within_each_kind_over_all_pairs():
    pairs = [make_pair(0.1, 0.1, 0.1), make_pair(0.1, 0.1, 0.1, first="dft")]
    adjust(pairs, ["last"])
    assert [p.views["last"].means["target"].p_holm for p in pairs] == pytest.approx([0.006, 0.006])


def test_tables_show_spread_only_with_several_seeds():
    numbers = Spread(mean=0.5, std=None)
    names = ("target", "general", "drift_general")
    at = Spreads(**dict.fromkeys(names, numbers), tasks=dict.fromkeys("tgh", numbers))
    training = dict.fromkeys(("tokens_per_s", "peak_memory_gib"), numbers)
    results = SimpleNamespace(
        base=Means(
            target=0.1, general=0.6, drift_general=0.0, tasks={"t": 0.1, "g": 0.7, "h": 0.5}
        ),
        groups={"target": ["t"], "general": ["g", "h"]},
        objectives={"sft": ObjectiveResult(last=at, training=training)},
    )
    row = tables.objectives_table(results, "last").splitlines()[3]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "sft", "50.0", "+40.0", "50.0", "-10.0", "0.5000", "", "", "0", "0.50",
    ]  # fmt: skip
    at.tasks["g"] = Spread(mean=0.5, std=0.02)
    head, _, base, sft = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in tables.table_1(results, "last").splitlines()[:4]
    )
    assert head == ["method", "g", "h", "general avg.", "change", "t", "target avg.", "change"]
    assert base == ["base", "70.0", "50.0", "60.0", "", "10.0", "10.0", ""]
    assert sft == ["sft", "50.0 ± 2.0", "50.0", "50.0", "-10.0", "50.0", "50.0", "+40.0"]
    assert mean_and_std([1.0, 2.0]) == Spread(mean=1.5, std=pytest.approx(0.5**0.5))
