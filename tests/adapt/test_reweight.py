"""HyRe: by hand, Bayes' rule, its limits, its guards, what it minimises, many users."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.adapt.base import Combination, Support, accuracy, describe, rmse, same_settings
from steelyard.adapt.choose import BestHead
from steelyard.adapt.losses import BradleyTerry, GaussianNLL, ZeroOne, sigmoid
from steelyard.adapt.reweight import HyRe, adapt, reweight_users
from steelyard.errors import ConfigError, DataError

from .examples import TASKS, adapted, method_of, supports

LN3 = math.log(3)
TWO = Support(np.array([[[LN3], [-LN3]], [[-LN3], [0.0]]]), np.array([1.0, 0.0]))
"""Two heads, two pairs: likelihoods 3/4, 3/4 and 1/4, 1/2."""


def weights(method, support=TWO):
    return method.begin(support.members.shape[1]).update(support).weights()


def test_two_heads_and_two_pairs_by_hand():
    np.testing.assert_allclose(weights(HyRe()), [9 / 11, 2 / 11])
    np.testing.assert_allclose(weights(HyRe(eta=0.5)), np.array([3, math.sqrt(2)]) / (3 + math.sqrt(2)))
    np.testing.assert_allclose(weights(HyRe(mix=0.1)), 0.9 * np.array([9, 2]) / 11 + 0.05)
    np.testing.assert_allclose(weights(HyRe(prior=np.array([0.2, 0.8]))), [9 / 17, 8 / 17])
    errors = HyRe(ZeroOne(), eta=math.log(2))  # the second head has one error and a tie
    np.testing.assert_allclose(weights(errors), np.array([1, 2**-1.5]) / (1 + 2**-1.5))
    f = adapted(HyRe(), TWO).apply(TWO.members)
    np.testing.assert_allclose(f[:, 0], [7 / 11 * LN3, -9 / 11 * LN3])


@given(support=supports("preference", soft=False))
@settings(max_examples=30, deadline=None)
def test_with_log_loss_it_is_bayes_rule(support):
    p = sigmoid(support.members[:, :, 0])
    likelihood = np.where(support.labels[:, None] == 1, p, 1 - p) ** support.counts[:, None]
    posterior = likelihood.prod(0) / likelihood.prod(0).sum()
    np.testing.assert_allclose(weights(HyRe(), support), posterior, rtol=1e-9)


@pytest.mark.parametrize("task", TASKS)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_it_minimises_expected_loss_and_divergence(task, data):
    """<w, L> + KL(w || prior) / eta, against other weights."""
    support = data.draw(supports(task))
    method = method_of("HyRe", task)
    evidence = support.counts @ method.loss(support.members, support.labels)

    def value(w):
        return w @ evidence + np.sum(w * np.log(np.maximum(w, 1e-300) * len(w))) / method.eta

    least = value(weights(method, support))
    for other in np.random.default_rng(data.draw(st.integers(0, 99))).dirichlet(np.ones(len(evidence)), 20):
        assert value(other) >= least - 1e-9


def test_little_eta_is_uniform_and_much_is_the_best_head():
    support = Support(np.random.default_rng(0).normal(size=(5, 20, 1)), np.array([1.0, 0, 1, 1, 0]))
    np.testing.assert_array_equal(weights(HyRe(eta=0.0), support), 0.05)
    np.testing.assert_allclose(weights(HyRe(eta=1e-9), support), 0.05, rtol=1e-7)
    best = adapted(BestHead(), support).coefficients
    np.testing.assert_allclose(weights(HyRe(eta=1e6), support), best, atol=1e-12)
    with pytest.raises(ConfigError, match="eta"):
        HyRe(eta=math.inf)


def test_a_member_without_prior_stays_without_weight():
    found = weights(HyRe(prior=np.array([0.0, 1.0]), mix=0.2))
    np.testing.assert_array_equal(found, [0, 1])
    posterior = HyRe(prior=np.array([0.0, 1.0])).begin(2).update(TWO)
    assert all(np.isfinite(value) for value in posterior.diagnostics().values())
    for prior in ([0.5, 0.4], [1.5, -0.5], [1.0]):
        with pytest.raises(ConfigError, match="prior"):
            HyRe(prior=np.array(prior)).begin(2)


def test_evidence_is_a_sum():
    """A mean would never sharpen: the same pair ten times must count ten times."""
    ten = TWO.take(np.zeros(10, int))
    odds = weights(HyRe(), ten)
    assert math.log(odds[0] / odds[1]) == pytest.approx(10 * math.log(3))


def test_log_weights_are_logarithms_of_weights_beyond_what_floats_hold():
    posterior = HyRe().begin(3).update_losses(np.array([[0.0, 1e4, 1e5]]))
    np.testing.assert_allclose(posterior.log_weights, [0, -1e4, -1e5])
    np.testing.assert_array_equal(posterior.weights(), [1, 0, 0])


def test_the_largest_weights_and_the_rest_evenly():
    posterior = HyRe().begin(4).update_losses(-np.log([[0.5, 0.1, 0.3, 0.1]]))
    np.testing.assert_allclose(posterior.weights(top=1), [0.5, 1 / 6, 1 / 6, 1 / 6])
    np.testing.assert_allclose(posterior.weights(top=9), [0.5, 0.1, 0.3, 0.1])


def test_diagnostics_by_hand():
    found = adapt(HyRe(), TWO)
    w = np.array([9, 2]) / 11
    assert found.diagnostics["ess"] == pytest.approx(121 / 85)
    assert found.diagnostics["entropy"] == pytest.approx(-(w @ np.log(w)))
    assert (found.diagnostics["best"], found.diagnostics["best_weight"]) == (0, pytest.approx(9 / 11))
    assert found.posterior.ess == pytest.approx(found.diagnostics["ess"])
    assert describe(np.zeros(3))["ess"] == 0
    assert describe(np.array([1.0, -1.0]))["ess"] == 2


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_many_users_at_once_are_one_by_one(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    users, n, heads, eta = (data.draw(st.integers(1, 5)) for _ in range(4))
    members, labels = rng.normal(size=(users, n, heads, 1)), rng.integers(0, 2, (users, n)).astype(float)
    mask = rng.integers(0, 2, (users, n)) * rng.random((users, n))
    losses = np.stack([BradleyTerry()(m, y) for m, y in zip(members, labels, strict=True)])
    together = reweight_users(losses, mask, eta)
    whole = reweight_users(losses, None, eta)
    for u in range(users):
        alone = Support(members[u], labels[u], weights=mask[u])
        np.testing.assert_allclose(together[u], weights(HyRe(eta=eta), alone), atol=1e-12)
        np.testing.assert_allclose(whole[u], weights(HyRe(eta=eta), Support(members[u], labels[u])), atol=1e-12)
    priors = rng.dirichlet(np.ones(heads), users)
    mine = reweight_users(losses, mask, eta, np.log(priors))
    for u in range(users):
        alone = Support(members[u], labels[u], weights=mask[u])
        np.testing.assert_allclose(mine[u], weights(HyRe(eta=eta, prior=priors[u]), alone), atol=1e-12)


def test_examples_are_checked():
    for members, labels, more, match in (
        (np.zeros((2, 3)), np.zeros(2), {}, "expected members"),
        (np.zeros((2, 3, 1)), np.zeros(3), {}, "expected members"),
        (np.zeros((2, 3, 1)), np.zeros(2), {"features": np.zeros((3, 1))}, "features has 3 rows, expected 2"),
        (np.full((2, 3, 1), np.nan), np.zeros(2), {}, "members holds a number that is not finite"),
        (np.zeros((2, 3, 1)), np.zeros(2), {"weights": np.array([1.0, -1.0])}, "below 0"),
    ):
        with pytest.raises(DataError, match=match):
            Support(members, labels, **more)
    with pytest.raises(DataError, match="two kinds"):
        TWO.joined(Support(TWO.members, TWO.labels, np.zeros((2, 1))))
    with pytest.raises(DataError, match="features"):
        Combination(np.ones(2), np.ones((1, 3))).apply(TWO.members)


def test_accuracy_and_error_by_hand():
    margins = np.array([[1.0], [-1.0], [0.0], [2.0]])
    assert accuracy(margins, np.array([1.0, 0, 1, 0]), "preference") == (1 + 1 + 0.5) / 4
    assert accuracy(np.array([[1.0, 2], [3, 0]]), np.array([1.0, 1]), "classification") == 0.5
    assert rmse(np.array([[1.0], [4.0]]), np.array([1.0, 1])) == pytest.approx(3 / math.sqrt(2))
    with pytest.raises(DataError, match="rmse"):
        accuracy(margins, margins[:, 0], "regression")


def test_settings_with_arrays_are_compared():
    first = HyRe(GaussianNLL(np.array([1.0, 2.0])))
    assert same_settings(first, HyRe(GaussianNLL(np.array([1.0, 2.0]))))
    assert not same_settings(first, HyRe(GaussianNLL(np.array([1.0, 3.0]))))
    assert not same_settings(first, HyRe())
    support = Support(np.array([[[1.0], [2.0]]]), np.ones(1))
    merged = first.begin(2).update(support).merge(HyRe(GaussianNLL(np.array([1.0, 2.0]))).begin(2))
    assert merged.n == 1
