"""Labelled examples and methods that the tests of adaptation share."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from steelyard.adapt.base import Support
from steelyard.adapt.choose import Auto, BestHead, Single, Uniform
from steelyard.adapt.finetune import FineTuneHead
from steelyard.adapt.losses import ZeroOne, default_loss
from steelyard.adapt.population import GaussianHeads, HeadMAP, HyReThenMAP, RidgeCombination
from steelyard.adapt.reweight import HyRe
from steelyard.adapt.simplex import SimplexMAP

TASKS = ("preference", "regression", "classification")
HYRES = ("HyRe", "HyRe mix")
ON_SIMPLEX = ("uniform", "single", "best head", *HYRES, "simplex MAP")
SINGLE = ("single", "head MAP", "fine-tune head")
NAMES = (
    *ON_SIMPLEX,
    "Gaussian",
    "Gaussian and features",
    "ridge",
    "head MAP",
    "HyRe then MAP",
    "fine-tune head",
    "auto",
)


def method_of(name, task, pooled=0):
    """Return a method by name, moderately set; `pooled` is the member that is the single model."""
    hyre = HyRe(default_loss(task), eta=1.5)
    made = {
        "uniform": lambda: Uniform(),
        "single": lambda: Single(pooled),
        "best head": lambda: BestHead(default_loss(task)),
        "HyRe": lambda: hyre,
        "HyRe mix": lambda: HyRe(default_loss(task), eta=0.7, mix=0.05),
        "simplex MAP": lambda: SimplexMAP(2.0, task),
        "Gaussian": lambda: GaussianHeads(3.0, task=task),
        "Gaussian and features": lambda: GaussianHeads(3.0, 0.5, task=task),
        "ridge": lambda: RidgeCombination(0.5, task),
        "head MAP": lambda: HeadMAP(2.0, pooled, task),
        "HyRe then MAP": lambda: HyReThenMAP(hyre, 2.0, task),
        "fine-tune head": lambda: FineTuneHead(5, 0.1, pooled, task),
        "auto": lambda: Auto((hyre, GaussianHeads(3.0, task=task)), task),
    }
    return made[name]()


def zero_one(task):
    return HyRe(ZeroOne(task))


@st.composite
def supports(draw, task, least=1, most=6, scale=1.0, features=3, heads=None, soft=True):
    """Labelled examples from a seed, sometimes with members that tie and with counts."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, h = draw(st.integers(least, most)), heads or draw(st.integers(1, 7))
    c = 3 if task == "classification" else 1
    members = scale * rng.normal(size=(n, h, c))
    if draw(st.booleans()):
        members = np.round(members)
    labels = {
        "preference": rng.integers(0, 2, n) if not soft or draw(st.booleans()) else rng.random(n),
        "regression": scale * rng.normal(size=n),
        "classification": rng.integers(0, c, n),
    }[task]
    counts = rng.uniform(0.2, 2, n) if draw(st.booleans()) else None
    return Support(members, labels, rng.normal(size=(n, features)), counts)


def adapted(method, support):
    return method.begin(support.members.shape[1]).update(support).combination()


def same(first, second, tolerance=1e-6):
    """Assert that two combinations are the same."""
    np.testing.assert_allclose(first.coefficients, second.coefficients, rtol=tolerance, atol=tolerance)
    one, other = first.vector, second.vector
    if one is None or other is None:
        assert one is None or not one.any()
        assert other is None or not other.any()
    else:
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
