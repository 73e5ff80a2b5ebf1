"""The best weighted mean of the members: by hand, against scipy, its certificate, its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from steelyard.adapt.base import Support
from steelyard.adapt.losses import Likelihood
from steelyard.adapt.reweight import HyRe, adapt
from steelyard.adapt.simplex import SimplexMAP
from steelyard.errors import ConfigError, DataError

from .examples import TASKS, adapted, supports

TWO = Support(np.array([[[1.0], [-1.0]]] * 2), np.ones(2))
"""Two heads of opposite opinion; twice the first was right."""


def objective(w, support, eta, task):
    f = np.einsum("nhc,h->nc", support.members, w)
    divergence = np.sum(w * np.log(np.maximum(w, 1e-300) * len(w)))
    return support.counts @ Likelihood(task).value(f, support.labels) + divergence / eta


def test_two_heads_and_two_pairs_by_hand():
    """w = (3/4, 1/4): f = 1/2 and 2 (1 - sigma(f)) (m_1 - m_2) = ln 3 / eta."""
    eta = math.log(3) / (4 / (1 + math.exp(0.5)))
    np.testing.assert_allclose(adapted(SimplexMAP(eta), TWO).coefficients, [0.75, 0.25], atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_it_is_the_optimum(task, data):
    """Against scipy over logits of the weights, from several starts; and within its own certificate."""
    support, eta = data.draw(supports(task)), data.draw(st.sampled_from([0.3, 2.0, 20.0]))
    found = adapt(SimplexMAP(eta, task), support)
    w = found.combination.coefficients
    value = objective(w, support, eta, task)
    assert found.diagnostics["gap"] <= 1e-10 * (1 + abs(value))

    def of_logits(z):
        e = np.exp(z - z.max())
        return objective(e / e.sum(), support, eta, task)

    best = min(minimize(of_logits, z, method="BFGS").fun for z in (np.zeros(len(w)), np.log(np.maximum(w, 1e-9))))
    assert abs(value - best) <= 1e-6 * (1 + abs(value))


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_its_loss_is_no_higher_than_that_of_hyre(data):
    """HyRe minimises an upper bound of the same objective."""
    support, eta = data.draw(supports("preference")), data.draw(st.sampled_from([0.5, 5.0]))
    best, hyre = (
        objective(adapted(m, support).coefficients, support, eta, "preference")
        for m in (SimplexMAP(eta), HyRe(eta=eta))
    )
    assert best <= hyre + 1e-9


def test_little_eta_is_uniform_and_much_is_the_best_mean():
    rng = np.random.default_rng(0)
    members = rng.normal(size=(40, 5, 1))
    truth = np.array([0.6, 0.4, 0, 0, 0])
    support = Support(members, members[:, :, 0] @ truth)
    np.testing.assert_array_equal(adapted(SimplexMAP(0.0, "regression"), support).coefficients, 0.2)
    np.testing.assert_allclose(adapted(SimplexMAP(1e-9, "regression"), support).coefficients, 0.2, atol=1e-6)
    np.testing.assert_allclose(adapted(SimplexMAP(1e6, "regression"), support).coefficients, truth, atol=1e-3)
    assert adapted(HyRe(eta=50.0), Support(members, (support.labels > 0) * 1.0)).coefficients.max() > 0.99


@pytest.mark.parametrize("eta", [1.0, 1e4])
def test_large_members_and_large_eta(eta):
    """Where weights pass through corners of the simplex."""
    rng = np.random.default_rng(1)
    for scale in (100.0, 1e4):
        support = Support(scale * rng.normal(size=(5, 30, 1)), rng.integers(0, 2, 5))
        w = adapted(SimplexMAP(eta), support).coefficients
        assert w.sum() == pytest.approx(1)
        least = objective(w, support, eta, "preference")
        for other in (*np.eye(30), *rng.dirichlet(np.ones(30), 20), np.full(30, 1 / 30)):
            assert least <= objective(other, support, eta, "preference") + 1e-6 * (1 + abs(least))


def test_what_cannot_be_is_refused():
    for make, name in ((lambda: SimplexMAP(-1.0), "eta"), (lambda: SimplexMAP(1.0, tolerance=0.0), "tolerance")):
        with pytest.raises(ConfigError, match=name):
            make()
    with pytest.raises(DataError, match="between 0 and 1"):
        adapted(SimplexMAP(), Support(TWO.members, np.full(2, 3.0)))
