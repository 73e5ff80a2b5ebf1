"""Choosing: ties of heads, leave-one-out, draws that never overlap, settings on held-out tasks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from steelyard.adapt.base import Support
from steelyard.adapt.choose import (
    ETA_GRID,
    Auto,
    BestHead,
    HeldOutTask,
    Single,
    Uniform,
    draw,
    fit_eta,
    fit_settings,
    left_out_scores,
    scores,
    search,
)
from steelyard.adapt.finetune import EQUAL, EQUAL_NETWORK
from steelyard.adapt.losses import ZeroOne, log_score
from steelyard.adapt.population import GaussianHeads
from steelyard.adapt.reweight import HyRe, adapt
from steelyard.errors import ConfigError, DataError, NonFiniteError
from steelyard.rng import numpy_generator

from .examples import adapted


def task_of(seed, n=40, heads=6, name=None, noise=0.0, own=None):
    """A user who agrees with one head, up to a share of random labels."""
    rng = np.random.default_rng(seed)
    members = rng.normal(size=(n, heads, 1))
    labels = (members[:, rng.integers(heads) if own is None else own, 0] > 0).astype(float)
    labels = np.where(rng.random(n) < noise, rng.integers(0, 2, n), labels)
    return HeldOutTask(Support(members, labels, rng.normal(size=(n, 3))), name=str(seed) if name is None else name)


def test_uniform_and_single_ignore_labels():
    support = task_of(0).examples
    np.testing.assert_allclose(adapted(Uniform(), support).coefficients, 1 / 6)
    np.testing.assert_array_equal(adapted(Single(2), support).coefficients, np.eye(6)[2])


def test_heads_that_tie_share():
    support = Support(np.array([[[1.0], [2.0], [-1.0]]]), np.ones(1))
    np.testing.assert_allclose(adapted(BestHead(ZeroOne()), support).coefficients, [0.5, 0.5, 0])
    np.testing.assert_allclose(adapted(BestHead(), support).coefficients, [0, 1, 0])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_drawn_labels_are_never_scored(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    size, n, seed = data.draw(st.integers(4, 30)), data.draw(st.integers(0, 6)), data.draw(st.integers(0, 9))
    pool = None
    if data.draw(st.booleans()):
        pool = rng.permutation(np.arange(size))[: data.draw(st.integers(1, size))]
    sources = rng.integers(0, 2 * size, (size, 2)) if data.draw(st.booleans()) else None
    task = HeldOutTask(Support(np.zeros((size, 2, 1)), np.zeros(size)), pool, sources, "t")
    try:
        support, test = draw(task, n, numpy_generator(seed, "s"))
    except DataError:  # more than there are, or none left to score
        assume(False)
    assert len(support) == n == len(set(support.tolist()))
    assert len(test) == len(set(test.tolist())) > 0
    assert not set(support.tolist()) & set(test.tolist())
    if pool is not None:
        assert set(support.tolist()) <= set(pool.tolist())
        assert not set(pool.tolist()) & set(test.tolist())
    if sources is None:
        expected = set(range(size)) - set((support if pool is None else pool).tolist())
        assert set(test.tolist()) == expected
    else:
        assert not set(sources[support].ravel().tolist()) & set(sources[test].ravel().tolist())
    fewer, _ = draw(task, n // 2, numpy_generator(seed, "s"))
    np.testing.assert_array_equal(fewer, support[: n // 2])


def test_a_pool_is_scored_on_the_same_examples_whatever_is_drawn():
    task = dataclasses.replace(task_of(0), pool=np.arange(20))
    tests = [draw(task, n, numpy_generator(seed, "s"))[1] for n in (0, 5, 20) for seed in (0, 1)]
    assert all(np.array_equal(test, np.arange(20, 40)) for test in tests)
    with pytest.raises(DataError, match="expected 21 examples to draw, found 20"):
        draw(task, 21, numpy_generator(0, "s"))
    with pytest.raises(DataError, match="none is left to score"):
        draw(task_of(0), 40, numpy_generator(0, "s"))


def test_the_labels_of_what_is_scored_cannot_reach_the_method():
    """Every method is scored with the same result whatever the scored labels were, up to the score itself."""
    task = task_of(1)
    support, test = draw(task, 5, numpy_generator(0, "adapt/draw/1", 0))
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Spy(HyRe):
        def begin(self, num_members):
            posterior = super().begin(num_members)

            class Watched:
                def update(self, given):
                    seen.append(given)
                    return posterior.update(given)

            return Watched()

    scores(Spy(), task, 5, "preference", draws=1)
    np.testing.assert_array_equal(seen[0].members, task.examples.members[support])
    assert not any((row == task.examples.members[test]).all((1, 2)).any() for row in seen[0].members)


def test_scores_are_paired_by_draw():
    task = task_of(2)
    found = scores(HyRe(), task, 5, "preference", draws=3, seed=7)
    np.testing.assert_array_equal(found, scores(HyRe(eta=1.0), task, 5, "preference", draws=3, seed=7))
    np.testing.assert_array_equal(found[:2], scores(HyRe(), task, 5, "preference", draws=2, seed=7))
    support, test = draw(task, 5, numpy_generator(7, "adapt/draw/2", 1))
    combination = adapted(HyRe(), task.examples.take(support))
    kept = task.examples.take(test)
    right = np.mean((combination.apply(kept.members)[:, 0] > 0) == kept.labels)
    assert found[1] == pytest.approx(right)
    logs = scores(HyRe(), task, 5, "preference", "log", draws=3, seed=7)
    assert logs[1] == pytest.approx(log_score(combination.apply(kept.members), kept.labels, "preference"))


def test_leave_one_out_by_hand():
    support = dataclasses.replace(task_of(3, n=4).examples, weights=np.array([1.0, 2, 1, 0.5]))
    found = left_out_scores(HyRe(), support, "preference")
    for row in range(4):
        others = support.take([r for r in range(4) if r != row])
        one = support.take([row])
        outputs = adapted(HyRe(), others).apply(one.members)
        assert found[row] == pytest.approx(log_score(outputs, one.labels, "preference"))


def test_auto_takes_what_predicts_the_labels_it_has():
    """Labels by a difference of two heads: no weighted mean says them, a Gaussian does; by one head: HyRe does."""
    rng = np.random.default_rng(4)
    members = rng.normal(size=(40, 6, 1))
    opposite = (members[:, 0, 0] - members[:, 1, 0] > 0).astype(float)
    candidates = (HyRe(eta=2.0), GaussianHeads(30.0))
    auto = Auto(candidates)
    of_difference = adapt(auto, Support(members, opposite))
    assert of_difference.diagnostics["chosen"] == 1
    np.testing.assert_allclose(
        of_difference.combination.coefficients, adapted(candidates[1], Support(members, opposite)).coefficients
    )
    of_one = adapt(auto, Support(5 * members, (members[:, 0, 0] > 0).astype(float)))
    assert of_one.diagnostics["chosen"] == 0
    few = adapt(auto, Support(members[:2], opposite[:2]))
    assert few.diagnostics["chosen"] == 0
    assert adapt(Auto((HyRe(), HyRe())), Support(members, opposite)).diagnostics["chosen"] == 0
    with pytest.raises(ConfigError, match="candidates"):
        Auto(())


def test_auto_leaves_the_first_candidate_for_a_clear_lead_only():
    rng = np.random.default_rng(4)
    members = rng.normal(size=(12, 6, 1))
    support = Support(members, (members[:, 0, 0] - members[:, 1, 0] > 0).astype(float))
    candidates = (HyRe(eta=2.0), GaussianHeads(30.0))
    first, other = (left_out_scores(method, support, "preference") for method in candidates)
    errors = (other - first).mean() / (np.std(other - first, ddof=1) / np.sqrt(12))
    assert 0.5 < errors < 50
    for margin, chosen in ((0.0, 1), (errors - 0.01, 1), (errors + 0.01, 0)):
        assert adapt(Auto(candidates, margin=margin), support).diagnostics["chosen"] == chosen
    assert adapt(Auto(candidates[::-1], margin=0.0), support).diagnostics["chosen"] == 0
    with pytest.raises(ConfigError, match="margin"):
        Auto(candidates, margin=-1.0)


def test_eta_is_high_for_clean_labels_and_low_for_random_ones():
    clean = fit_eta([task_of(seed) for seed in range(4)], n=5)
    random = fit_eta([task_of(seed, noise=1.0) for seed in range(4)], n=5)
    assert clean.settings["eta"] >= 2 > 0.5 >= random.settings["eta"]
    assert clean.method == HyRe(eta=clean.settings["eta"])
    assert random.edges == ("eta",)
    assert "eta at the edge of the grid" in random.sentence()
    assert len(clean.table) == len(ETA_GRID)


def test_settings_are_those_of_the_highest_mean_score():
    tasks = [task_of(seed) for seed in range(3)]
    grid = {"heads_weight": (0.5, 5.0, 500.0), "feature_weight": (0.0, 1.0)}
    found = fit_settings(GaussianHeads, grid, tasks, n=(2, 5), draws=2, seed=3)
    table = {
        (g, f): np.mean(
            [scores(GaussianHeads(g, f), t, n, "preference", "log", 2, 3).mean() for t in tasks for n in (2, 5)]
        )
        for g in grid["heads_weight"]
        for f in grid["feature_weight"]
    }
    best = max(table, key=table.get)
    assert (found.settings["heads_weight"], found.settings["feature_weight"]) == best
    assert [value for _, value in found.table] == pytest.approx(list(table.values()))
    assert found.method == GaussianHeads(*best)


def test_the_edge_of_a_grid_is_reported_and_zero_is_none():
    assert search({"a": (1, 2, 3)}, lambda a: a).edges == ("a",)
    assert search({"a": (3, 2, 1)}, lambda a: a).edges == ("a",)
    assert search({"a": (1, 2, 3)}, lambda a: -((a - 2) ** 2)).edges == ()
    assert search({"a": (0, 1)}, lambda a: -a).edges == ()
    assert search({"a": (5,)}, lambda a: a).edges == ()
    assert search({"a": (1, 2)}, lambda a: 0.0).settings == {"a": 1}


def test_settings_that_break_are_passed_over():
    def score(a):
        if a > 1:
            raise NonFiniteError("runs away")
        return a

    assert search({"a": (0.5, 1, 2)}, score).settings == {"a": 1}
    with pytest.raises(NonFiniteError, match="finite score"):
        search({"a": (2, 3)}, score)
    for grid in ({}, {"a": ()}):
        with pytest.raises(ConfigError, match="grid"):
            search(grid, score)
    with pytest.raises(ConfigError, match="held-out"):
        fit_eta([])


def test_equal_tuning_is_as_many_settings_as_eta_has():
    for grid in (EQUAL, EQUAL_NETWORK):
        assert np.prod([len(values) for values in grid.values()]) == len(ETA_GRID)
