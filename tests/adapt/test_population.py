"""Gaussian priors over heads: by hand, closed forms, against scipy, limits, many users."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from steelyard.adapt.base import Support
from steelyard.adapt.losses import BradleyTerry, Likelihood
from steelyard.adapt.population import GaussianHeads, HeadMAP, HyReThenMAP, RidgeCombination, gaussian_users
from steelyard.adapt.reweight import HyRe, adapt
from steelyard.errors import ConfigError, DataError

from .examples import TASKS, adapted, same, supports

LN3 = math.log(3)
TWO = Support(np.array([[[1.0], [-1.0]]] * 2), np.ones(2))
"""Two heads of opposite opinion; twice the first was right."""


def test_two_heads_and_two_pairs_by_hand():
    """k = g: f = 2 g (1 - sigma(f)) is ln 3 for g = 2 ln 3, with a = 1/4 of each pair."""
    found = adapt(GaussianHeads(2 * LN3), TWO)
    np.testing.assert_allclose(found.combination.coefficients, [0.5 + LN3 / 2, 0.5 - LN3 / 2])
    np.testing.assert_allclose(found.combination.apply(TWO.members), LN3)
    assert found.diagnostics["departure"] == pytest.approx(math.sqrt(2 * 0.25 * LN3))


def test_ridge_and_head_map_by_hand():
    """Both have k = 2 g or l |phi|^2, and the mean of the heads or the single model as the mean."""
    found = adapted(RidgeCombination(LN3), TWO)
    np.testing.assert_allclose(found.coefficients, [0.5 + LN3 / 2, 0.5 - LN3 / 2])
    support = Support(np.zeros((2, 1, 1)), np.ones(2), np.array([[2.0, 0.0]] * 2))
    found = adapted(HeadMAP(LN3 / 2), support)
    np.testing.assert_allclose(found.vector, [[LN3 / 2, 0]])
    assert found.apply(support.members, support.features)[0, 0] == pytest.approx(LN3)


def test_regression_by_hand():
    """One step of Bayes: mean 0, k = g over noise 1, two equal targets of 3."""
    support = Support(np.array([[[1.0], [-1.0]]] * 2), np.full(2, 3.0))
    found = adapted(GaussianHeads(1.0, task="regression"), support)
    assert found.apply(support.members)[0, 0] == pytest.approx(2)  # 3 * 2 / (2 + 1)
    np.testing.assert_allclose(found.coefficients, [1.5, -0.5])


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_squared_loss_is_bayesian_linear_regression(data):
    """With linear heads: theta ~ N(mean of the heads, g Cov(heads) + l I), in closed form over D, not over examples."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    heads, d, n = (data.draw(st.integers(1, 6)) for _ in range(3))
    g, spread, noise = (data.draw(st.sampled_from([0.1, 1.0, 7.0])) for _ in range(3))
    weight, x, y = rng.normal(size=(heads, 1, d)), rng.normal(size=(n, d)), rng.normal(size=n)
    mean = weight[:, 0].mean(0)
    prior = g * np.cov(weight[:, 0].T, bias=True).reshape(d, d) + spread * np.eye(d)
    precision = np.linalg.inv(prior) + x.T @ x / noise
    theta = np.linalg.solve(precision, np.linalg.solve(prior, mean) + x.T @ y / noise)
    found = adapted(GaussianHeads(g, spread, "regression", noise), Support(np.einsum("nd,hcd->nhc", x, weight), y, x))
    np.testing.assert_allclose(found.collapse(weight, np.zeros((heads, 1)))[0][0], theta, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_no_covariance_of_heads_is_head_map_is_ridge_regression(task, data):
    """S = 0: the penalised fit of a linear function, minimised by scipy over the features."""
    support = data.draw(supports(task, heads=1))
    c = support.members.shape[2]
    variance = data.draw(st.sampled_from([0.1, 1.0, 30.0]))
    likelihood = Likelihood(task, 0.5)

    def value(v):
        f = support.members[:, 0] + support.features @ v.reshape(c, -1).T
        losses = support.counts @ likelihood.value(f, support.labels)
        slope = (support.counts[:, None] * likelihood.gradient(f, support.labels)).T @ support.features
        return losses + v @ v / (2 * variance), slope.reshape(-1) + v / variance

    fitted = minimize(value, np.zeros(c * 3), jac=True, method="BFGS", options={"gtol": 1e-10})
    found = adapted(HeadMAP(variance, 0, task, 0.5), support)
    np.testing.assert_allclose(found.vector.reshape(-1), fitted.x, rtol=1e-4, atol=1e-5)
    same(adapted(GaussianHeads(0.0, variance, task, 0.5), support), found, 1e-9)
    same(adapted(GaussianHeads(5.0, variance, task, 0.5), support), found, 1e-9)  # one head has no covariance


@pytest.mark.parametrize("task", TASKS)
@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_it_is_the_mode_over_coefficients(task, data):
    """Against scipy over u = 1/H + C z (z standard normal, C C^T = g S) and v, which the dual never sees."""
    support = data.draw(supports(task, most=4))
    _, h, c = support.members.shape
    centred = math.sqrt(3.0 / h) * (np.eye(h) - 1 / h)
    likelihood = Likelihood(task)

    def coefficients(z):
        return 1 / h + centred @ z[:h]

    def value(z):
        f = np.einsum("nhc,h->nc", support.members, coefficients(z)) + support.features @ z[h:].reshape(c, -1).T
        slope = support.counts[:, None] * likelihood.gradient(f, support.labels)
        own = np.einsum("nhc,nc->h", support.members, slope) @ centred
        gradient = np.concatenate([own + z[:h], (slope.T @ support.features).reshape(-1) + z[h:] / 0.5])
        penalty = z[:h] @ z[:h] / 2 + z[h:] @ z[h:] / (2 * 0.5)
        return support.counts @ likelihood.value(f, support.labels) + penalty, gradient

    fitted = minimize(value, np.zeros(h + 3 * c), jac=True, method="BFGS", options={"gtol": 1e-10})
    found = adapted(GaussianHeads(3.0, 0.5, task), support)
    np.testing.assert_allclose(found.coefficients, coefficients(fitted.x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.vector.reshape(-1), fitted.x[h:], rtol=1e-4, atol=1e-5)


def test_every_head_twice_is_the_same_population():
    support = Support(np.random.default_rng(0).normal(size=(5, 6, 1)), np.array([1.0, 0, 1, 1, 0]))
    once = adapted(GaussianHeads(2.0), support)
    twice = Support(np.repeat(support.members, 2, 1), support.labels)
    np.testing.assert_allclose(2 * adapted(GaussianHeads(2.0), twice).coefficients[::2], once.coefficients)


def test_copies_of_one_head_share_its_ridge():
    support = Support(np.random.default_rng(0).normal(size=(5, 1, 1)), np.array([1.0, 0, 1, 1, 0]))
    copies = Support(np.repeat(support.members, 4, 1), support.labels)
    one, four = adapted(RidgeCombination(2.0), support), adapted(RidgeCombination(0.5), copies)
    np.testing.assert_allclose(four.coefficients.sum(), one.coefficients[0])


def test_a_tight_prior_stays_and_a_wide_one_fits():
    rng = np.random.default_rng(3)
    support = Support(rng.normal(size=(5, 8, 1)), rng.normal(size=5), rng.normal(size=(5, 3)))
    for method in (GaussianHeads, RidgeCombination):
        np.testing.assert_allclose(adapted(method(1e-9, task="regression"), support).coefficients, 1 / 8, atol=1e-6)
        fitted = adapted(method(1e9, task="regression"), support).apply(support.members)
        np.testing.assert_allclose(fitted[:, 0], support.labels, atol=1e-4)


def test_hyre_then_map_is_map_around_hyre():
    rng = np.random.default_rng(4)
    support = Support(rng.normal(size=(6, 5, 1)), rng.integers(0, 2, 6), rng.normal(size=(6, 3)))
    hyre = HyRe(BradleyTerry(), eta=2.0)
    found = adapted(HyReThenMAP(hyre, 1.5), support)
    weights = adapted(hyre, support).coefficients
    np.testing.assert_allclose(found.coefficients, weights)
    collapsed = Support(support.members.transpose(0, 2, 1) @ weights[:, None], support.labels, support.features)
    np.testing.assert_allclose(found.vector, adapted(HeadMAP(1.5), collapsed).vector, rtol=1e-6)
    same(adapted(HyReThenMAP(hyre, 0.0), support), adapted(hyre, support), 1e-12)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "make",
    [
        lambda t: GaussianHeads(3.0, task=t),
        lambda t: GaussianHeads(3.0, 0.5, t),
        lambda t: RidgeCombination(0.5, t),
        lambda t: HeadMAP(2.0, 0, t),
    ],
)
@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_many_users_at_once_are_one_by_one(make, task, data):
    """Users with different numbers of examples, padded with whatever."""
    method, heads = make(task), data.draw(st.integers(1, 5))
    users = [data.draw(supports(task, heads=heads)) for _ in range(data.draw(st.integers(1, 4)))]
    longest = max(map(len, users)) + 1
    rng = np.random.default_rng(0)
    c = users[0].members.shape[2]
    members, features = 9 * rng.normal(size=(len(users), longest, heads, c)), rng.normal(size=(len(users), longest, 3))
    labels, mask = np.ones((len(users), longest)), np.zeros((len(users), longest))
    for u, support in enumerate(users):
        rows = rng.permutation(longest)[: len(support)]
        members[u, rows], features[u, rows], labels[u, rows], mask[u, rows] = (
            support.members,
            support.features,
            support.labels,
            support.counts,
        )
    coefficients, vectors = gaussian_users(method, members, labels, mask, features)
    for u, support in enumerate(users):
        alone = adapted(method, support)
        np.testing.assert_allclose(coefficients[u], alone.coefficients, rtol=1e-6, atol=1e-7)
        assert (vectors is None) == (alone.vector is None)
        if vectors is not None:
            np.testing.assert_allclose(vectors[u], alone.vector, rtol=1e-6, atol=1e-7)


def test_users_without_a_mask_and_without_labels():
    members, labels = np.random.default_rng(0).normal(size=(2, 3, 4, 1)), np.ones((2, 3))
    everything, vectors = gaussian_users(GaussianHeads(), members, labels)
    assert vectors is None
    np.testing.assert_allclose(everything[1], adapted(GaussianHeads(), Support(members[1], labels[1])).coefficients)
    nothing, _ = gaussian_users(GaussianHeads(), members, labels, np.zeros((2, 3)))
    np.testing.assert_array_equal(nothing, 0.25)


@pytest.mark.parametrize("task", ["preference", "classification"])
def test_wide_priors_and_large_margins_still_reach_the_mode(task):
    """Where a full Newton step overshoots. At the mode the dual variables are minus the loss's derivative."""
    rng = np.random.default_rng(5)
    c = 1 if task == "preference" else 3
    for scale, g in ((1.0, 1e6), (100.0, 1e3), (1e4, 1.0)):
        members = scale * rng.normal(size=(12, 20, c))
        support = Support(members, rng.integers(0, max(c, 2), 12))
        found = adapted(GaussianHeads(g, task=task), support)
        pull = -Likelihood(task).gradient(found.apply(members), support.labels)
        centred = members - members.mean(1, keepdims=True)
        expected = 1 / 20 + g / 20 * np.einsum("nhc,nc->h", centred, pull)
        np.testing.assert_allclose(found.coefficients, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_what_cannot_be_is_refused():
    support = Support(np.ones((2, 3, 1)), np.ones(2))
    for method in (HeadMAP(), HyReThenMAP(), GaussianHeads(1.0, 1.0)):
        with pytest.raises(DataError, match="features"):
            adapted(method, support)
    with pytest.raises(DataError, match="between 0 and 1"):
        adapted(GaussianHeads(), Support(np.ones((2, 3, 1)), np.full(2, 2.0)))
    with pytest.raises(ConfigError, match="one of 3 members, found 3"):
        HeadMAP(1.0, 3).begin(3)
    for make, name in (
        (lambda: GaussianHeads(-1.0), "heads_weight"),
        (lambda: GaussianHeads(1.0, math.inf), "feature_weight"),
        (lambda: RidgeCombination(math.nan), "weight"),
        (lambda: HeadMAP(-1.0), "variance"),
        (lambda: HyReThenMAP(variance=-1.0), "variance"),
    ):
        with pytest.raises(ConfigError, match=name):
            make()
    with pytest.raises(ConfigError, match="noise"):
        GaussianHeads(task="regression", noise=0.0)
