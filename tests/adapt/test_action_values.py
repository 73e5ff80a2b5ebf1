"""The distribution of fresh draws' values: tails and ties by hand, quantile regression that finds known ones."""

from __future__ import annotations

import math

import pytest
import torch

from steelyard.adapt.action_values import (
    LEVELS,
    Coins,
    DrawnValues,
    ValueQuantilesConfig,
    above,
    fit_value_quantiles,
    load_value_quantiles,
    pinball,
    save_value_quantiles,
)
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.rng import torch_generator

U = torch.tensor(LEVELS)


def exact(kind: str) -> torch.Tensor:
    """Quantiles of an exponential distribution, or of a uniform one on [0, 1]."""
    return (U if kind == "uniform" else -torch.log1p(-U))[None]


def test_chance_and_gain_within_the_quantiles_are_those_of_the_distribution():
    best = torch.linspace(0.1, 0.9, 9)
    better, gain = above(exact("uniform").expand(9, -1), U, best, 1e-6)
    torch.testing.assert_close(better, 1 - best)
    # above the last quantile the tail is exponential, not uniform: the gain may differ by what lies there
    torch.testing.assert_close(gain, (1 - best) ** 2 / 2, atol=2e-3, rtol=0)


def test_an_exponential_tail_is_continued_exactly():
    last = float(exact("exponential")[0, -1])
    best = torch.tensor([last, last + 1, last + 3])
    better, gain = above(exact("exponential").expand(3, -1), U, best, 1e-6)
    torch.testing.assert_close(better, torch.exp(-best))
    torch.testing.assert_close(gain, torch.exp(-best))  # memoryless: P(X > b) times a mean excess of 1


def test_gain_is_the_integral_of_the_chance_and_both_fall():
    quantiles = torch.tensor([[-3.0, -1.0, -0.5, 0.0, 0.0, 0.4, 0.5, 2.0, 2.5]])  # with a tie in the middle
    best = torch.linspace(-8, 12, 4001)
    better, gain = above(quantiles.expand(len(best), -1), U, best, 1e-6)
    assert bool((better.diff() <= 1e-7).all())
    assert bool((better >= 0).all() and (better <= 1).all())
    width = float(best[1] - best[0])
    # trapezoids meet the jump at the tie half a cell late
    torch.testing.assert_close(-gain.diff(), (better[1:] + better[:-1]) / 2 * width, atol=2e-3, rtol=0)
    assert float(gain[-1]) == pytest.approx(0, abs=1e-3)
    assert float(gain[0]) == pytest.approx(8 + float(gain[0] + best[0]), abs=1e-4)


def test_where_all_values_are_equal_nothing_is_better():
    better, gain = above(torch.full((1, len(LEVELS)), 2.0), U, torch.tensor([2.0]), 1e-6)
    assert float(better) <= 1 - LEVELS[-1] + 1e-6
    assert float(gain) < 1e-6
    lower, gap = above(torch.full((1, len(LEVELS)), 2.0), U, torch.tensor([1.5]), 1e-6)
    assert float(lower) == pytest.approx(1)
    assert float(gap) == pytest.approx(0.5, abs=1e-5)


def test_pinball_by_hand_and_least_at_the_quantile():
    loss = pinball(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, -1.0]]), torch.tensor([0.25, 0.9]))
    assert float(loss) == pytest.approx((0.25 * 2 + 0.75 * 1 + 0.9 * 1 + 0.1 * 2) / 4)
    values = torch.arange(100, dtype=torch.float32)[None]
    tried = [float(pinball(torch.tensor([[q]]), values, torch.tensor([0.8]))) for q in (60.0, 79.5, 95.0)]
    assert tried[1] == min(tried)


def values(observations: torch.Tensor, generator: torch.Generator, count: int) -> torch.Tensor:
    """A state x: values 10 x + (0.1 + x^2) times a standard normal number."""
    x = observations[:, :1]
    return 10 * x + (0.1 + x**2) * torch.randn((len(x), count), generator=generator)


@pytest.fixture(scope="module")
def fitted():
    states = torch.rand((1500, 1), generator=torch_generator(0, "states")) * 2 - 1
    return fit_value_quantiles(values, states, ValueQuantilesConfig(hidden=(32, 32), updates=800), 0)


def test_it_learns_place_and_width_of_every_state(fitted):
    net, calibration = fitted
    assert calibration.error < 0.05
    assert calibration.states == 150
    assert 0 < calibration.spread < 0.05  # nearly all variance lies between states
    states = torch.tensor([[-0.8], [0.0], [0.9]])
    known = net.read(states)
    z = math.sqrt(2) * torch.special.erfinv(torch.tensor(2 * 0.9 - 1))
    expected = 10 * states + (0.1 + states**2) * z
    torch.testing.assert_close(known[:, LEVELS.index(0.9)], expected[:, 0], atol=0.25, rtol=0)
    score, gain = net.judge(known, expected, torch.zeros(3, 1))
    torch.testing.assert_close(score, torch.full((3,), 0.9), atol=0.1, rtol=0)
    _, gain = net.judge(known, 10 * states, torch.zeros(3, 1))  # above the median: 0.4 standard deviations
    torch.testing.assert_close(gain, 0.3989 * (0.1 + states[:, 0] ** 2), atol=0.1, rtol=0)
    assert float(gain[1]) < 0.5 * float(gain[[0, 2]].min())  # more is at stake where values lie apart
    again, _ = fit_value_quantiles(
        values, torch.rand((60, 1), generator=torch_generator(1, "s")), ValueQuantilesConfig((8,), updates=3), 5
    )
    twice, _ = fit_value_quantiles(
        values, torch.rand((60, 1), generator=torch_generator(1, "s")), ValueQuantilesConfig((8,), updates=3), 5
    )
    assert torch.equal(again.read(states), twice.read(states))


def test_it_is_saved_and_read_back(fitted, tmp_path):
    net, _ = fitted
    save_value_quantiles(net, tmp_path / "values.safetensors")
    states = torch.linspace(-1, 1, 7)[:, None]
    found = load_value_quantiles(tmp_path / "values.safetensors")
    assert torch.equal(found.read(states), net.read(states))
    assert found.config == net.config
    (tmp_path / "other").write_text("no")
    with pytest.raises(CheckpointError, match="other: cannot be read"):
        load_value_quantiles(tmp_path / "other")


def test_what_cannot_be_learned_from_is_refused():
    config = ValueQuantilesConfig((8,), updates=1)
    with pytest.raises(DataError, match="at least 10 states"):
        fit_value_quantiles(values, torch.zeros(3, 1), config, 0)
    with pytest.raises(DataError, match="not all finite"):
        fit_value_quantiles(values, torch.full((20, 1), torch.nan), config, 0)
    with pytest.raises(ConfigError, match="updates"):
        ValueQuantilesConfig(updates=0)


def test_coins_and_known_draws():
    coins = torch.tensor([[0.2, 0.7], [0.9, 0.1]])
    score, gain = Coins().judge(Coins().read(torch.zeros(2, 1)), torch.zeros(2, 2), coins)
    torch.testing.assert_close(score, torch.tensor([0.7, 0.9]))
    torch.testing.assert_close(gain, 1 - score)
    known = DrawnValues(lambda seen, generator, count: torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 4)
    score, gain = known.judge(known.read(torch.zeros(1, 1)), torch.tensor([[0.0, 2.0]]), coins[:1])
    assert (float(score), float(gain)) == (0.5, 0.75)
