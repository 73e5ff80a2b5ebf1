"""What must hold of every way of adapting, whatever the examples."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.adapt.base import Posterior, Support
from steelyard.adapt.head_set import LinearHeads
from steelyard.adapt.losses import Likelihood
from steelyard.adapt.reweight import adapt
from steelyard.errors import ConfigError, DataError

from .examples import HYRES, NAMES, ON_SIMPLEX, SINGLE, TASKS, adapted, method_of, same, supports, zero_one

EVERY = [(name, task) for name in NAMES for task in TASKS]
quick = settings(max_examples=5, deadline=None)


@pytest.mark.parametrize(("name", "task"), EVERY)
@given(data=st.data())
@quick
def test_heads_may_come_in_any_order(name, task, data):
    support = data.draw(supports(task))
    order = np.array(data.draw(st.permutations(range(support.members.shape[1]))))
    found = adapted(method_of(name, task), support)
    moved = dataclasses.replace(support, members=support.members[:, order])
    other = adapted(method_of(name, task, pooled=int(np.flatnonzero(order == 0)[0])), moved)
    same(other, dataclasses.replace(found, coefficients=found.coefficients[order]))


@pytest.mark.parametrize(("name", "task"), EVERY)
@given(data=st.data())
@quick
def test_one_at_a_time_in_any_order_is_all_at_once(name, task, data):
    support = data.draw(supports(task))
    method = method_of(name, task)
    posterior = method.begin(support.members.shape[1])
    for row in data.draw(st.permutations(range(len(support)))):
        posterior = posterior.update(support.take([row]))
    same(posterior.combination(), adapted(method, support))
    assert posterior.n == pytest.approx(support.counts.sum())


@pytest.mark.parametrize(("name", "task"), EVERY)
@given(data=st.data())
@quick
def test_a_posterior_is_never_changed(name, task, data):
    support = data.draw(supports(task))
    before = method_of(name, task).begin(support.members.shape[1])
    first = before.combination()
    after = before.update(support)
    kept = after.combination()
    after.update(support)
    after.forget(0.5)
    after.merge(after)
    same(before.combination(), first, 0)
    same(after.combination(), kept, 0)
    assert before.n == 0


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@quick
def test_what_all_heads_say_alike_does_not_matter(name, data):
    """A constant added to all logits of an example, of all heads, changes no probability and so nothing."""
    support = data.draw(supports("classification"))
    level = np.array(data.draw(st.lists(st.floats(-50, 50), min_size=len(support), max_size=len(support))))
    moved = dataclasses.replace(support, members=support.members + level[:, None, None])
    same(adapted(method_of(name, "classification"), moved), adapted(method_of(name, "classification"), support), 1e-5)


@pytest.mark.parametrize("name", [*HYRES, "zero_one"])
@given(data=st.data())
@quick
def test_a_loss_that_all_heads_share_does_not_matter(name, data):
    support = data.draw(supports("preference"))
    method = zero_one("preference") if name == "zero_one" else method_of(name, "preference")
    losses = method.loss(support.members, support.labels)
    level = np.array(data.draw(st.lists(st.floats(-1e3, 1e3), min_size=len(support), max_size=len(support))))
    begun = method.begin(losses.shape[1])
    expected = begun.update_losses(losses).weights()
    np.testing.assert_allclose(begun.update_losses(losses + level[:, None]).weights(), expected, rtol=1e-8)


@pytest.mark.parametrize("name", ["best head", *HYRES, "simplex MAP", "Gaussian", "ridge"])
@given(data=st.data())
@quick
def test_a_target_may_be_measured_from_anywhere(name, data):
    """Targets and members that move together: residuals are the same, and so are weights (which sum to 1)."""
    support = data.draw(supports("regression"))
    level = np.array(data.draw(st.lists(st.floats(-5, 5), min_size=len(support), max_size=len(support))))
    moved = dataclasses.replace(support, members=support.members + level[:, None, None], labels=support.labels + level)
    found, expected = (adapted(method_of(name, "regression"), s) for s in (moved, support))
    if name == "ridge":  # its coefficients need not sum to 1, so a level that all members share is something to learn
        if np.abs(level).max() > 1 and abs(expected.coefficients.sum() - 1) > 0.1:
            assert not np.allclose(found.coefficients, expected.coefficients, atol=1e-6)
    else:
        same(found, expected)


@pytest.mark.parametrize(("name", "task"), EVERY)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e2, 1e4])
@given(data=st.data())
@settings(max_examples=3, deadline=None)
def test_weights_sum_to_one_and_nothing_is_nan_at_any_scale(name, task, scale, data):
    support = data.draw(supports(task, scale=scale))
    result = adapt(method_of(name, task), support)
    outputs = result.combination.apply(support.members, support.features)
    assert np.isfinite(outputs).all()
    assert np.isfinite(result.combination.coefficients).all()
    assert all(np.isfinite(value) for value in result.diagnostics.values())
    assert result.cost["labels"] == len(support)
    if name in ON_SIMPLEX:
        assert (result.combination.coefficients >= 0).all()
    if name != "ridge":
        assert result.combination.coefficients.sum() == pytest.approx(1, abs=1e-9 if name in ON_SIMPLEX else 1e-4)


@given(task=st.sampled_from(TASKS), data=st.data())
@settings(max_examples=25, deadline=None)
def test_losses_of_1e4_and_more(task, data):
    support = data.draw(supports(task))
    losses = data.draw(st.sampled_from([1e4, 1e8, 1e300])) * np.random.default_rng(0).random(support.members.shape[:2])
    for name in HYRES:
        weights = method_of(name, task).begin(losses.shape[1]).update_losses(losses / len(losses)).weights()
        assert np.isfinite(weights).all()
        assert weights.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("name", "task"), EVERY)
@given(data=st.data())
@quick
def test_one_linear_function_serves_as_all_members_do(name, task, data):
    c = 3 if task == "classification" else 1
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    heads = LinearHeads(rng.normal(size=(5, c, 4)), rng.normal(size=(5, c)), task)
    features = rng.normal(size=(9, 4))
    labels = {"preference": rng.random(6), "regression": rng.normal(size=6), "classification": rng.integers(0, c, 6)}
    combination = adapted(method_of(name, task), Support(heads.members(features[:6]), labels[task], features[:6]))
    vector, bias = combination.collapse(heads.weight, heads.bias)
    explicit = combination.apply(heads.members(features), features)
    np.testing.assert_allclose(features @ vector.T + bias, explicit, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", [n for n in NAMES if n != "ridge"])
@given(data=st.data())
@quick
def test_copies_of_one_head_are_that_head(name, task, data):
    """Ridge coefficients are each as free as one; `test_population` has their case."""
    support = data.draw(supports(task, heads=1))
    copies = dataclasses.replace(support, members=np.repeat(support.members, 5, 1))
    method = method_of(name, task)
    one, five = adapted(method, support), adapted(method, copies)
    expected = one.apply(support.members, support.features)
    np.testing.assert_allclose(five.apply(copies.members, support.features), expected, rtol=1e-7, atol=1e-7)
    if name not in SINGLE:
        np.testing.assert_allclose(five.coefficients, 0.2, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@quick
def test_mirrored_labels_give_mirrored_weights(name, data):
    """Of heads in both signs: swapped labels are swapped halves."""
    support = data.draw(supports("preference"))
    half = support.members.shape[1]
    both = dataclasses.replace(support, members=np.concatenate([support.members, -support.members], 1))
    mirrored = dataclasses.replace(both, labels=1 - both.labels)
    found = adapted(method_of(name, "preference"), both)
    other = adapted(method_of(name, "preference", pooled=half), mirrored)
    same(other, dataclasses.replace(found, coefficients=np.roll(found.coefficients, half), vector=_negative(found)))


def _negative(combination):
    return None if combination.vector is None else -combination.vector


@pytest.mark.parametrize(("name", "task"), EVERY)
@given(data=st.data())
@quick
def test_counts_are_repetitions(name, task, data):
    support = data.draw(supports(task, most=4))
    times = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(support), max_size=len(support))))
    if times.sum() == 0 or (name == "auto"):  # leaving one of two equal examples out leaves the other in
        return
    counted = dataclasses.replace(support, weights=times.astype(float))
    repeated = dataclasses.replace(support, weights=None).take(np.repeat(np.arange(len(support)), times))
    same(adapted(method_of(name, task), counted), adapted(method_of(name, task), repeated))


@pytest.mark.parametrize(("name", "task"), EVERY)
@given(data=st.data())
@quick
def test_forgetting_scales_and_merging_joins(name, task, data):
    support = data.draw(supports(task, least=2))
    begun = method_of(name, task).begin(support.members.shape[1])
    cut = data.draw(st.integers(1, len(support) - 1))
    first, second = support.take(range(cut)), support.take(range(cut, len(support)))
    whole = begun.update(support)
    same(begun.update(first).merge(begun.update(second)).combination(), whole.combination())
    same(begun.update(second).merge(begun.update(first)).combination(), whole.combination())
    same(whole.merge(begun).combination(), whole.combination())
    same(begun.merge(whole).combination(), whole.combination())
    gamma = data.draw(st.floats(0.05, 1))
    same(whole.forget(gamma).combination(), begun.update(support.scaled(gamma)).combination())
    assert whole.forget(gamma).n == pytest.approx(gamma * whole.n)
    faded = begun.update(first).forget(gamma).update(second)
    same(faded.combination(), begun.update(first.scaled(gamma).joined(second.scaled(1.0))).combination())
    if name != "auto":
        same(whole.forget(0.0).combination(), begun.combination())


@pytest.mark.parametrize(("name", "task"), EVERY)
def test_before_any_label_it_is_the_prior(name, task):
    posterior: Posterior = method_of(name, task).begin(4)
    expected = np.eye(4)[0] if name in SINGLE else np.full(4, 0.25)
    np.testing.assert_allclose(posterior.combination().coefficients, expected)
    assert posterior.combination().vector is None
    assert posterior.diagnostics()["ess"] == pytest.approx(1 if name in SINGLE else 4)
    empty = Support(np.zeros((0, 4, 3 if task == "classification" else 1)), np.zeros(0), np.zeros((0, 2)))
    same(posterior.update(empty).combination(), posterior.combination())
    assert posterior.update(empty).n == 0


@pytest.mark.parametrize("name", NAMES)
def test_other_members_and_other_settings_are_refused(name):
    support = Support(np.ones((2, 3, 1)), np.ones(2), np.ones((2, 2)))
    posterior = method_of(name, "preference").begin(4)
    with pytest.raises(DataError, match="expected 4 members, found 3"):
        posterior.update(support)
    with pytest.raises(DataError, match="cannot be merged"):
        posterior.merge(method_of(name, "preference").begin(3))
    with pytest.raises(ConfigError, match="gamma"):
        posterior.forget(1.5)
    other = method_of("HyRe mix" if name == "HyRe" else "HyRe", "preference")
    if isinstance(posterior, type(other.begin(4))):
        with pytest.raises(DataError, match="cannot be merged"):
            posterior.merge(other.begin(4))


@pytest.mark.parametrize("name", ["simplex MAP", "Gaussian", "Gaussian and features", "ridge", "head MAP"])
@pytest.mark.parametrize("task", TASKS)
@given(data=st.data())
@quick
def test_a_mode_explains_its_labels_no_worse_than_the_prior(name, task, data):
    support = data.draw(supports(task))
    method = method_of(name, task)
    before, after = method.begin(support.members.shape[1]).combination(), adapted(method, support)
    losses = [
        Likelihood(task).value(c.apply(support.members, support.features), support.labels) for c in (before, after)
    ]
    assert support.counts @ losses[1] <= support.counts @ losses[0] + 1e-9
