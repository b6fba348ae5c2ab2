"""Fronts at a matched target: by hand, and by simulation with a known truth."""

import numpy as np
import pytest

from eaft.comparison import differences, fronts
from eaft.comparison.fronts import Trajectory, compare_fronts, front, reach, relative


def path(*points):
    """Shortfall and drift after each checkpoint, as `front` takes them."""
    shortfall, drift = np.array(points, dtype=float).T
    return shortfall[None], drift[None]


def test_a_front_is_the_least_drift_at_a_target_at_least_so_good():
    slow = path((2.0, 0.0), (1.0, 0.1), (0.8, 0.3), (1.5, 0.9))  # learns, and then memorises
    fast = path((2.0, 0.0), (0.9, 0.5), (0.7, 0.25), (1.9, 2.0))
    targets = np.array([1.5, 1.0, 0.9, 0.8, 0.7])
    # 1.5: half-way to slow's first; 0.9: half-way from slow's first to its second; 0.8: fast's
    # second is better and has drifted less than slow's
    assert front([slow], targets)[0] == pytest.approx(
        [0.05, 0.1, 0.2, 0.3, 0.3]
    )  # 0.7 it does not reach: the nearest
    assert front([slow, fast], targets)[0] == pytest.approx([0.05, 0.1, 0.2, 0.25, 0.25])


def test_targets_go_from_the_best_of_both_to_the_first_checkpoint_of_both():
    sft = [path((2.0, 0), (1.2, 0.1), (0.8, 0.3)), path((2.0, 0), (1.4, 0.1), (1.0, 0.3))]
    eaft = [path((2.0, 0), (1.3, 0.1), (0.9, 0.3), (1.1, 0.5))]
    assert reach([sft, eaft]) == (0.9, 1.3)
    nothing = [path((2.0, 0), (2.5, 0.3))]  # learns nothing: its best is the base model
    hardest, easiest = reach([sft, nothing])
    assert hardest >= easiest


# The truth: nll and drift of two objectives at two learning rates, after each epoch

EPOCHS = np.array([0, 1, 2, 3, 4, 6, 8])
SIDES = ((1.0, 1.0), (0.85, 0.6))  # drift by learning, and how much is memorised
RATES = (0.35, 1.0)


def expected(side, rate, seed):
    """Return mean nll and drift of a path; a seed changes speed, drift and nll."""
    speed, drifts, shift = seed
    t = EPOCHS * rate * speed
    gain, over = side
    nll = 0.8 + np.exp(-t) + over * np.maximum(t - 2, 0) ** 1.2 * 0.1 + (t > 0) * shift
    return nll, 0.03 * gain * drifts * t**1.3


def ways(points, shares):
    """
    Return the ways of a path, `[points, 2]` each: through its checkpoints, and from the base model
    to each of them through its interpolations.

    Args:
        points: by step and share: nll and drift.
    """
    steps = range(1, len(EPOCHS))
    way = [[points[0, 1.0], *(points[step, 1.0] for step in steps)]]
    if shares:
        way += [[points[0, 1.0], *(points[step, a] for a in (*shares, 1.0))] for step in steps]
    return way


def members(nll, drift, shares):
    """Return mean nll and drift of the checkpoints and interpolations, by step and share."""
    return {
        (step, a): (nll[0] + (nll[step] - nll[0]) * (1 - (1 - a) ** 2), drift[step] * a**1.8)
        for step in range(len(EPOCHS))
        for a in ((*shares, 1.0) if step else (1.0,))
    }


def draw_seeds(rng, n, spread):
    """Return `[2, n, 3]`: what each seed does to each objective, in part the same."""
    effect = 0.6 * rng.normal(size=(n, 3)) + 0.8 * rng.normal(size=(2, n, 3))
    speed, drifts, shift = np.moveaxis(spread * effect, -1, 0)
    return np.stack([np.exp(speed), np.exp(1.5 * drifts), 0.15 * shift], -1)


def truth(targets, spread, shares):
    """Return the true difference at targets: of all prompts, examples and 500 seeds."""
    seeds = draw_seeds(np.random.default_rng(99), 500 if spread else 1, spread)
    first, second = (
        np.mean(
            [
                front(
                    [
                        path(*way)
                        for rate in RATES
                        for way in ways(members(*expected(side, rate, s), shares), shares)
                    ],
                    targets,
                )[0]
                for s in own
            ],
            0,
        )
        for side, own in zip(SIDES, seeds, strict=True)
    )
    return first - second


def measured(rng, seeds, prompts, examples, spread, shares=()):
    """
    Return one comparison's data: paths by objective and seed, and the tokens of prompts and
    examples; and by how much harder than all examples these are.
    """
    tokens = (
        rng.integers(20, 65, prompts).astype(float),
        rng.integers(20, 90, examples).astype(float),
    )
    prompt = np.exp(rng.normal(size=prompts) * 0.8 - 0.32)  # skewed, as drift is over prompts
    example, noise = rng.normal(size=examples) * 0.35, rng.normal(size=examples) * 0.1
    sides = []
    for side, own in zip(SIDES, draw_seeds(rng, seeds, spread), strict=True):
        prompt_here = prompt * np.exp(rng.normal(size=prompts) * 0.2 - 0.02)
        example_here = example + rng.normal(size=examples) * 0.06
        by_seed = []
        for seed in own:
            by_seed.append([])
            for rate in RATES:
                found = {}
                for member, (nll, drift) in members(*expected(side, rate, seed), shares).items():
                    kl = drift * prompt_here * np.exp(rng.normal(size=prompts) * 0.15 - 0.01125)
                    loss = nll + example_here + rng.normal(size=examples) * 0.05
                    if member[0] == 0:
                        loss = nll + example + noise  # one base model for all
                    found[member] = kl * tokens[0], loss * tokens[1]
                by_seed[-1] += [
                    Trajectory(*map(np.array, zip(*way, strict=True)))
                    for way in ways(found, shares)
                ]
        sides.append(by_seed)
    return (*sides, *tokens), (tokens[1] @ example) / tokens[1].sum()


@pytest.mark.parametrize(
    ("seeds", "prompts", "examples", "spread", "shares"),
    [
        (1, 32, 32, 0.0, ()),
        (2, 128, 64, 0.04, ()),
        (5, 128, 64, 0.04, ()),
        (1, 32, 32, 0.0, (0.25, 0.5, 0.75)),
        (3, 128, 64, 0.04, (0.25, 0.5, 0.75)),
    ],
)
def test_the_band_holds_the_true_curve(monkeypatch, seeds, prompts, examples, spread, shares):
    """
    Of 100 comparisons about 95% hold it at every target, and their mean (three standard errors:
    6.5%).

    One seed is simulated without spread: its interval is of that seed's models.
    """
    monkeypatch.setattr(fronts, "RESAMPLES", 300)
    monkeypatch.setattr(fronts, "TARGETS", 15)
    monkeypatch.setattr(differences, "p_value", lambda *args: 1.0)  # it takes most of the time
    grid = np.linspace(0.7, 1.8, 221)
    true = truth(grid, spread, shares)
    assert true.max() - true.min() > 0.005  # the fronts do differ, more in some places
    rng = np.random.default_rng(7)
    whole, mean = [], []
    for _ in range(100):
        data, harder = measured(rng, seeds, prompts, examples, spread, shares)
        found = compare_fronts(*data)
        here = np.interp(np.array(found.targets) - harder, grid, true)
        whole.append(
            all(low <= d <= high for low, d, high in zip(found.low, here, found.high, strict=True))
        )
        mean.append(found.mean.low <= here.mean() <= found.mean.high)
    assert np.mean(whole) >= 0.89, np.mean(whole)
    assert np.mean(mean) >= 0.89, np.mean(mean)


def test_what_is_there_is_found_and_an_objective_beside_itself_is_not():
    (first, second, *tokens), _ = measured(np.random.default_rng(8), 3, 128, 64, 0.02)
    found = compare_fronts(first, second, *tokens)
    assert found.targets == sorted(found.targets)
    # Half the drift, everything else equal
    half = [[Trajectory(path.drift / 2, path.shortfall) for path in paths] for paths in first]
    less = compare_fronts(half, first, *tokens)
    assert max(less.high) < 0
    assert less.mean.p_value < 0.01
    assert less.first == pytest.approx(np.array(less.second) / 2)
    assert relative(less) == pytest.approx(-0.5)
    same = compare_fronts(first, first, *tokens)
    assert same.difference == pytest.approx([0] * len(same.targets))
    assert same.mean.p_value == 1


def test_the_uncertainty_of_the_target_is_in_the_band():
    """Few held-out examples, many prompts: a band from prompts alone would be too narrow."""
    rng = np.random.default_rng(9)
    (first, second, *tokens), _ = measured(rng, 1, 400, 12, 0.0)
    few = compare_fronts(first, second, *tokens)
    (first, second, *tokens), _ = measured(rng, 1, 400, 800, 0.0)
    many = compare_fronts(first, second, *tokens)
    assert np.mean(np.subtract(few.high, few.low)) > 2 * np.mean(np.subtract(many.high, many.low))


def test_no_common_target():
    (first, second, *tokens), _ = measured(np.random.default_rng(10), 1, 20, 20, 0.0)
    second = [
        [Trajectory(path.drift, path.shortfall[[0]].repeat(len(EPOCHS), 0)) for path in paths]
        for paths in second
    ]
    assert compare_fronts(first, second, *tokens) is None
