"""Fraction of gain, its interval, thresholds and the gate."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.adapt.compute_policy import Draw, Request, Trace
from steelyard.errors import DataError
from steelyard.recipes.adaptive_statistics import (
    Outcome,
    averaged,
    beyond,
    choose_threshold,
    cost_table,
    fraction_of_gain,
    gate,
    joined,
    outcome,
)


def made(rewards: list[float] | np.ndarray, samples: float = 1.0, name: str = "x") -> Outcome:
    values = np.asarray(rewards, np.float64)
    constant = np.full(len(values), samples)
    return Outcome(name, values, constant, 10 * constant, 0 * constant)


def test_outcome_reads_the_chosen_sample_and_counts_everything() -> None:
    draws = tuple(
        Draw(Request(0, k, 1.0), "", (), 0.1 * k, {}, -1.0, 0.0, True, None, 7 + k, 2, reward=float(k == 1))
        for k in range(3)
    )
    found = outcome("x", [Trace(draws, 1, "threshold", 3), Trace(draws[:1], 0, "threshold", 1)])
    assert found.rewards.tolist() == [1.0, 0.0]
    assert found.samples.tolist() == [3.0, 1.0]
    assert found.decoded.tolist() == [24.0, 7.0]
    assert found.evaluated.tolist() == [6.0, 2.0]


def test_fraction_by_hand() -> None:
    one, best = made([0, 0, 0, 1] * 50), made([1, 1, 1, 1] * 50)
    policy = made([1, 0, 1, 1] * 50)
    fraction = fraction_of_gain(policy, one, best)
    assert fraction is not None
    assert fraction.value == pytest.approx(2 / 3)
    assert fraction.low is not None
    assert fraction.high is not None
    assert 0.5 < fraction.low < 2 / 3 < fraction.high < 0.8
    assert fraction.n == 200
    difference = fraction_of_gain(policy, one, best, minus=one)
    assert difference is not None
    assert difference.value == pytest.approx(2 / 3)


def test_fraction_is_paired_over_prompts() -> None:
    # the policy differs from best-of-N on no prompt: FG is exactly 1 in every resample, however noisy both are
    rng = np.random.default_rng(0)
    one, best = made(rng.normal(size=100)), made(rng.normal(1, 1, size=100))
    fraction = fraction_of_gain(best, one, best)
    assert fraction is not None
    assert (fraction.low, fraction.high) == pytest.approx((1, 1))


def test_no_fraction_of_no_gain() -> None:
    rng = np.random.default_rng(0)
    one = made(rng.integers(0, 2, 50).astype(float))
    best = made(one.rewards[::-1])
    assert fraction_of_gain(best, one, best) is None
    assert "no gain" in cost_table([best], one, best, "t", "n").rows[0]


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        easy = rng.random(300) < 0.7
        one = made((easy & (rng.random(300) < 0.8)).astype(float))
        best = made(easy.astype(float))
        policy = made(np.where(rng.random(300) < 0.5, one.rewards, best.rewards))
        found = fraction_of_gain(policy, one, best)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.5 <= found.high
    assert covered >= 88


def test_threshold_is_the_best_within_the_samples_allowed() -> None:
    curve = [
        (0.5, made([0.5], 1.1)),
        (0.7, made([0.8], 1.4)),
        (0.8, made([0.7], 1.45)),
        (0.9, made([0.9], 2.0)),
    ]
    assert choose_threshold(curve, 1.5) == 0.7
    assert choose_threshold(curve, 3.0) == 0.9
    assert choose_threshold(curve, 1.0) == 0.5  # none is cheap enough: the cheapest


def test_gate_asks_for_both() -> None:
    one, oracle = made([0.0, 1.0] * 100), made([1.0, 1.0] * 100)
    half, little = made([0.5, 1.0] * 100), made([0.2, 1.0] * 100)
    assert gate(0.8, one, half, oracle)[0]
    assert not gate(0.7, one, half, oracle)[0]
    assert not gate(0.8, one, little, oracle)[0]
    passed, says = gate(0.8, one, one, one)
    assert not passed
    assert "the oracle gains nothing" in says


def test_merging() -> None:
    assert averaged([made([0.0, 1.0]), made([1.0, 1.0])]).rewards.tolist() == [0.5, 1.0]
    assert len(joined([made([0.0, 1.0]), made([1.0])]).rewards) == 3


def test_verdict_on_a_target() -> None:
    fraction = fraction_of_gain(made([1, 0] * 50), made([0, 0] * 50), made([1, 1] * 50))
    found = beyond(fraction, 0.75)
    assert found is not None
    assert found.value == pytest.approx(-0.25)
    assert found.high is not None
    assert found.high < 0
    assert beyond(None, 0.75) is None


def test_unknown_rewards_are_refused() -> None:
    with pytest.raises(DataError, match="rewards of 1 prompts are not finite"):
        made([1.0, float("nan")])
