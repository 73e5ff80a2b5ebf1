"""Losses of members and likelihoods of functions: by hand, bounded by noise, and their derivatives."""

from __future__ import annotations

import math

import numpy as np
import pytest

from steelyard.adapt.losses import (
    BradleyTerry,
    CrossEntropy,
    GaussianNLL,
    Likelihood,
    ZeroOne,
    default_loss,
    log_score,
    sigmoid,
    softmax,
)
from steelyard.errors import ConfigError, DataError

LN3 = math.log(3)


def pairs(*margins):
    return np.array(margins, float)[:, :, None]


def test_bradley_terry_by_hand():
    losses = BradleyTerry()(pairs([LN3, -LN3], [0.0, LN3]), np.array([1.0, 0.25]))
    expected = [[math.log(4 / 3), math.log(4)], [math.log(2), 0.25 * math.log(4 / 3) + 0.75 * math.log(4)]]
    np.testing.assert_allclose(losses, expected)


def test_cross_entropy_by_hand():
    members = np.log(np.array([[[1.0, 2, 1], [3, 1, 4]]]))
    np.testing.assert_allclose(CrossEntropy()(members, np.array([1.0])), [[math.log(2), math.log(8)]])


def test_two_classes_are_a_preference():
    margins = np.random.default_rng(0).normal(size=(6, 4, 1))
    labels = np.array([0.0, 1, 1, 0, 1, 0])
    two = np.concatenate([np.zeros_like(margins), margins], 2)
    for noise in (0.0, 0.1):
        np.testing.assert_allclose(CrossEntropy(noise)(two, labels), BradleyTerry(noise)(margins, labels))


def test_gaussian_by_hand_and_its_floor():
    members, labels = pairs([1.0, 3.0]), np.array([2.0])
    expected = [[1 / 8 + math.log(2), 1 / 2]]
    np.testing.assert_allclose(GaussianNLL(np.array([4.0, 1.0]))(members, labels), expected)
    floored = GaussianNLL(np.array([4.0, 1e-9]), floor=1.0)(members, labels)
    np.testing.assert_allclose(floored, expected)
    with pytest.raises(ConfigError, match="above 0"):
        GaussianNLL(0.0)(members, labels)


def test_zero_one_counts_errors_and_halves_ties():
    losses = ZeroOne()(pairs([1.0, -1.0, 0.0], [-2.0, 3.0, 0.0]), np.array([1.0, 0.0]))
    np.testing.assert_array_equal(losses, [[0, 1, 0.5], [0, 1, 0.5]])
    classes = ZeroOne("classification")(np.array([[[0.0, 2], [2, 0]]]), np.array([1.0]))
    np.testing.assert_array_equal(classes, [[0, 1]])
    with pytest.raises(DataError, match="0-1 loss"):
        ZeroOne("regression")(pairs([1.0]), np.ones(1))


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_noise_bounds_what_one_wrong_label_costs(noise):
    extreme = pairs([-1e4, 1e4])
    np.testing.assert_allclose(BradleyTerry(noise)(extreme, np.ones(1))[0, 0], math.log(2 / noise))
    logits = np.array([[[1e4, 0, 0]]])
    np.testing.assert_allclose(CrossEntropy(noise)(logits, np.array([2.0])), math.log(3 / noise))
    mixed = BradleyTerry(noise)(pairs([LN3]), np.ones(1))[0, 0]
    assert mixed == pytest.approx(-math.log((1 - noise) * 0.75 + noise / 2))


def test_little_noise_is_no_noise():
    members, labels = np.random.default_rng(0).normal(size=(5, 3, 1)), np.array([1.0, 0, 0.3, 1, 0])
    np.testing.assert_allclose(BradleyTerry(1e-13)(members, labels), BradleyTerry()(members, labels), rtol=1e-9)


@pytest.mark.parametrize("loss", [BradleyTerry(), BradleyTerry(0.1), CrossEntropy(), CrossEntropy(0.1)])
def test_losses_of_1e4_are_finite(loss):
    members = np.array([[[1e4], [-1e4]]]) if isinstance(loss, BradleyTerry) else np.array([[[1e4, 0], [-1e4, 0]]])
    losses = loss(members, np.ones(1))
    assert np.isfinite(losses).all()
    if not loss.noise:
        assert losses.max() == pytest.approx(1e4)


def test_labels_that_the_loss_does_not_know_are_refused():
    one, three = np.zeros((1, 2, 1)), np.zeros((1, 2, 3))
    for loss, members, label, match in (
        (BradleyTerry(), one, 1.5, "between 0 and 1"),
        (BradleyTerry(), one, -1.0, "between 0 and 1"),
        (BradleyTerry(), three, 1.0, "one output"),
        (CrossEntropy(), three, 3.0, "from 0 to 2"),
        (CrossEntropy(), three, 0.5, "from 0 to 2"),
        (GaussianNLL(), three, 0.5, "one output per member, found 3"),
    ):
        with pytest.raises(DataError, match=match):
            loss(members, np.array([label]))
    for task, outputs, label, match in (
        ("preference", 1, 1.5, "between 0 and 1"),
        ("preference", 2, 1.0, "one output"),
        ("regression", 2, 1.0, "one output"),
        ("classification", 3, -1.0, "from 0 to 2"),
    ):
        with pytest.raises(DataError, match=match):
            Likelihood(task).check(outputs, np.array([label]))
    with pytest.raises(ConfigError, match="noise"):
        BradleyTerry(1.0)
    with pytest.raises(ConfigError, match="variance"):
        Likelihood("regression", 0.0)
    with pytest.raises(ConfigError, match="task"):
        Likelihood("ranking")


def test_default_losses():
    assert default_loss("preference", 0.1) == BradleyTerry(0.1)
    assert default_loss("classification", 0.1) == CrossEntropy(0.1)
    assert default_loss("regression") == GaussianNLL()


CASES = [("preference", 1), ("regression", 1), ("classification", 4)]


@pytest.mark.parametrize(("task", "outputs"), CASES)
def test_likelihoods_are_the_members_losses(task, outputs):
    rng = np.random.default_rng(1)
    members = rng.normal(size=(7, 5, outputs))
    labels = rng.integers(0, max(outputs, 2), 7).astype(float)
    losses = default_loss(task)(members, labels)
    values = Likelihood(task).value(members, np.repeat(labels[:, None], 5, 1))
    constant = 0.5 * math.log(2 * math.pi) if task == "regression" else 0
    np.testing.assert_allclose(values, losses + constant)


@pytest.mark.parametrize(("task", "outputs"), CASES)
def test_derivatives_are_those_of_the_value(task, outputs):
    rng = np.random.default_rng(2)
    likelihood = Likelihood(task, 0.7)
    f, labels = rng.normal(size=(3, outputs)), rng.integers(0, max(outputs, 2), 3).astype(float)
    for c in range(outputs):
        step = np.zeros(outputs)
        step[c] = 1e-5
        slope = (likelihood.value(f + step, labels) - likelihood.value(f - step, labels)) / 2e-5
        np.testing.assert_allclose(likelihood.gradient(f, labels)[:, c], slope, atol=1e-8)
        bend = (likelihood.gradient(f + step, labels) - likelihood.gradient(f - step, labels)) / 2e-5
        np.testing.assert_allclose(likelihood.curvature(f)[:, c], bend, atol=1e-8)


def test_log_score_by_hand():
    assert log_score(np.array([[LN3], [LN3]]), np.array([1.0, 0.0]), "preference") == pytest.approx(
        0.5 * (math.log(0.75) + math.log(0.25))
    )
    assert log_score(np.array([[1.0]]), np.array([3.0]), "regression", 4.0) == pytest.approx(
        -0.5 - 0.5 * math.log(8 * math.pi)
    )
    assert log_score(np.log([[1.0, 3.0]]), np.array([1.0]), "classification") == pytest.approx(math.log(0.75))


def test_sigmoid_and_softmax_far_out():
    np.testing.assert_array_equal(sigmoid(np.array([-1e4, 0, 1e4])), [0, 0.5, 1])
    np.testing.assert_array_equal(softmax(np.array([-1e308, 0.0])), [0, 1])
