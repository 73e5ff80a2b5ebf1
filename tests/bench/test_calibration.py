"""AUC within and across prompts, calibration error and scalings: by hand, by brute force, against scikit-learn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.bench.calibration import (
    auc_across,
    auc_within,
    brier,
    ece,
    fit_isotonic,
    fit_platt,
    prompt_aucs,
    reliability,
)
from steelyard.data.restart_labels import soft_labels
from steelyard.rng import numpy_generator

NAN = math.nan


def g(seed: int = 0):
    return numpy_generator(seed, "test")


# ------------------------------------------------------------------------------------------------ ranking


def test_within_by_hand():
    """Prompt 0: pairs (1, 0) and (1, 0'): one right, one tied, so 3/4; prompt 1 ties; prompt 2: wrong, 0."""
    scores = np.array([[0.9, 0.5, 0.9], [0.1, 0.2, 0.3], [0.2, 0.8, NAN]])
    rewards = np.array([[1.0, 0, 0], [1, 1, 1], [1, 0, 0]])
    np.testing.assert_allclose(prompt_aucs(scores, rewards), [0.75, NAN, 0.0])
    found = auc_within(scores, rewards, g())
    assert found.value == pytest.approx(0.375)
    assert found.n == 2
    assert auc_within(scores[1:2], rewards[1:2], g()) is None
    # a margin turns pairs into ties
    assert prompt_aucs(np.array([[0.1, 0.9]]), np.array([[0.6, 0.5]]), margin=0.2).tolist()[0] != 0
    assert math.isnan(prompt_aucs(np.array([[0.1, 0.9]]), np.array([[0.6, 0.5]]), margin=0.2)[0])


def test_scores_of_prompts_alone_have_one_skill_only():
    """A score that knows how hard a prompt is, and nothing of its samples: chance within, good across."""
    rewards = (g().random((200, 8)) < g(1).choice([0.0, 0.5], (200, 1))).astype(float)
    easy = np.repeat((rewards.mean(1, keepdims=True) == 0).astype(float), 8, 1)
    assert auc_within(easy, rewards, g()).value == 0.5
    across = auc_across(easy, rewards, g())
    assert across.value > 0.7
    assert across.low < across.value < across.high
    alone = auc_across(easy[:, :1], rewards, g())  # one score a prompt, against its mean label
    assert alone.value > 0.7


def brute_across(scores, rewards, margin):
    q = soft_labels(rewards, margin)
    top = bottom = 0.0
    for (p, i), (o, j) in itertools.product(np.ndindex(*scores.shape), np.ndindex(*scores.shape)):
        if p == o or np.isnan([scores[p, i], scores[o, j], q[p, i], q[o, j]]).any():
            continue
        weight = (1 - q[p, i]) * q[o, j]
        bottom += weight
        top += weight * ((scores[p, i] > scores[o, j]) + 0.5 * (scores[p, i] == scores[o, j]))
    return top / bottom if bottom else None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 5), st.integers(2, 4), st.sampled_from([0.0, 1.0]))
def test_across_by_brute_force(seed, prompts, samples, margin):
    rng = g(seed)
    scores = rng.integers(0, 4, (prompts, samples)) / 4  # many ties
    scores[rng.random(scores.shape) < 0.1] = NAN
    rewards = rng.integers(0, 4, (prompts, samples)).astype(float)
    rewards[rng.random(rewards.shape) < 0.1] = NAN
    expected = brute_across(scores, rewards, margin)
    found = auc_across(scores, rewards, g(), margin, resamples=10)
    assert (found is None) == (expected is None)
    if found is not None:
        assert found.value == pytest.approx(expected)


def test_monotone_changes_of_scores_change_no_auc():
    scores, rewards = g().random((30, 6)), (g(1).random((30, 6)) < 0.4).astype(float)
    for function in (auc_within, auc_across):
        assert function(scores, rewards, g()) == function(scores**3, rewards, g())


# ---------------------------------------------------------------------------------------------- calibration


def test_calibration_error_by_hand():
    """Two bins of five: scores .1, .3 (target 0, 1: |.2 - .5|) and .9 (target 1: .1), weights 2/3 and 1/3."""
    p, y = np.array([0.1, 0.15, 0.9, NAN]), np.array([0.0, 1.0, 1.0, 1.0])
    bins = reliability(p, y, 5)
    assert [(one.count, one.target) for one in bins] == [(2, 0.5), (1, 1.0)]
    assert ece(p, y, 5) == pytest.approx(2 / 3 * 0.375 + 1 / 3 * 0.1)
    assert brier(p, y) == pytest.approx((0.01 + 0.7225 + 0.01) / 3)
    assert reliability(np.array([1.0]), np.array([1.0]), 5)[0].count == 1  # 1 is in the last bin
    assert math.isnan(ece(np.array([NAN]), np.array([1.0])))


def test_platt_undoes_a_wrong_temperature():
    """Targets are sigma(2 l - 1) of the log-odds l that were reported."""
    odds = g().normal(0, 2, 4000)
    p = 1 / (1 + np.exp(-odds))
    truth = 1 / (1 + np.exp(-(2 * odds - 1)))
    platt = fit_platt(p, truth)  # soft targets: no noise
    assert platt.scale == pytest.approx(2, abs=1e-3)
    assert platt.offset == pytest.approx(-1, abs=1e-3)
    np.testing.assert_allclose(platt(p), truth, atol=1e-3)
    drawn = (g(2).random(4000) < truth).astype(float)
    assert ece(fit_platt(p, drawn)(p), truth) < 0.02 < ece(p, truth)
    assert math.isnan(platt(np.array([NAN]))[0])


def test_platt_is_logistic_regression_and_never_turns_scores_around():
    linear_model = pytest.importorskip("sklearn.linear_model")
    p = np.clip(g().random(300), 0.01, 0.99)
    y = (g(1).random(300) < p**2).astype(float)
    theirs = linear_model.LogisticRegression(C=np.inf, tol=1e-10).fit(np.log(p / (1 - p))[:, None], y)
    ours = fit_platt(p, y, ridge=0.0)
    assert ours.scale == pytest.approx(theirs.coef_[0, 0], rel=1e-4)
    assert ours.offset == pytest.approx(theirs.intercept_[0], rel=1e-3)
    against = fit_platt(p, 1 - y)
    assert against.scale == pytest.approx(1e-3)
    assert against(np.array([0.5]))[0] == pytest.approx(1 - y.mean(), abs=0.01)
    separated = fit_platt(np.array([0.2, 0.8]), np.array([0.0, 1.0]))
    assert np.isfinite([separated.scale, separated.offset]).all()


def test_isotonic_is_that_of_scikit_learn():
    isotonic = pytest.importorskip("sklearn.isotonic")
    p, y = g().integers(0, 40, 300) / 40, g(1).random(300)
    theirs = isotonic.IsotonicRegression().fit(p, y)
    ours = fit_isotonic(p, y)
    at = np.linspace(p.min(), p.max(), 101)
    np.testing.assert_allclose(ours(at), theirs.predict(at), atol=1e-12)
    assert fit_isotonic(np.array([0.1, 0.5, 0.9]), np.array([0.0, 1.0, 0.5])).values == (0.0, 0.75, 0.75)
    with pytest.raises(ValueError, match="at least one"):
        fit_isotonic(np.array([]), np.array([]))
