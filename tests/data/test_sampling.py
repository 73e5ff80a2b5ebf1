import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.data.mixture import mixture_counts
from steelyard.data.normalize import BoxScaler, Normalizer
from steelyard.data.returns import RewardConfig, returns_to_go
from steelyard.data.sampler import EpochSampler, ShardedSampler, UniformSampler
from steelyard.errors import ConfigError, DataError


@pytest.mark.parametrize("kind", [UniformSampler, EpochSampler])
def test_samplers_are_pure_functions_of_the_step(kind):
    a, b = kind(100, 7, seed=3), kind(100, 7, seed=3)
    forward = [a.indices(step) for step in range(40)]
    for step in reversed(range(40)):
        np.testing.assert_array_equal(b.indices(step), forward[step])
    assert forward[0].dtype == np.int64
    assert not np.array_equal(kind(100, 7, seed=4).indices(0), forward[0])
    assert not np.array_equal(kind(100, 7, seed=3, stream="other").indices(0), forward[0])


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 40), batch=st.integers(1, 90), epochs=st.integers(1, 3))
def test_an_epoch_holds_every_row_once(size, batch, epochs):
    sampler = EpochSampler(size, batch, seed=0)
    rows = np.concatenate([sampler.indices(step) for step in range(-(-size * epochs // batch))])
    for epoch in range(epochs):
        np.testing.assert_array_equal(np.sort(rows[epoch * size : (epoch + 1) * size]), np.arange(size))


def test_uniform_sampler_reaches_every_row():
    sampler = UniformSampler(10, 50, seed=0)
    assert set(np.concatenate([sampler.indices(step) for step in range(5)])) == set(range(10))


def test_shards_partition_the_batch():
    whole = UniformSampler(100, 10, seed=0)
    parts = [ShardedSampler(whole, rank, 3).indices(5) for rank in range(3)]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.sort(whole.indices(5)))
    with pytest.raises(ValueError, match="rank"):
        ShardedSampler(whole, 3, 3)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=5).filter(lambda w: sum(w) > 0.1),
    batch=st.integers(1, 50),
    batches=st.integers(1, 60),
)
def test_mixture_is_exact_over_time(weights, batch, batches):
    counts = np.array([mixture_counts(weights, batch, step) for step in range(batches)])
    assert (counts >= 0).all()
    assert (counts.sum(1) == batch).all()
    share = np.array(weights) / sum(weights)
    assert (
        np.abs(counts.cumsum(0) - share * batch * np.arange(1, batches + 1)[:, None]).max()
        <= (len(weights) - 1) / 2 + 1e-9
    )


@settings(max_examples=60, deadline=None)
@given(weight=st.floats(0, 1), batch=st.integers(1, 50), batches=st.integers(1, 60))
def test_mixture_of_two_is_exact_over_time(weight, batch, batches):
    counts = np.array([mixture_counts([weight, 1 - weight], batch, step) for step in range(batches)])
    assert (counts >= 0).all()
    assert (counts.sum(1) == batch).all()
    share = np.array([weight, 1 - weight])
    assert np.abs(counts.cumsum(0) - share * batch * np.arange(1, batches + 1)[:, None]).max() <= 1


def test_mixture_example_and_bad_weights():
    assert [mixture_counts((0.5, 0.5), 3, step).tolist() for step in range(2)] in ([[1, 2], [2, 1]], [[2, 1], [1, 2]])
    for weights in ([0.0, 0.0], [1.0, -0.5]):
        with pytest.raises(ValueError, match="non-negative"):
            mixture_counts(weights, 4, 0)


def test_returns_of_a_terminated_trajectory_end_at_zero():
    g = returns_to_go(np.array([1.0, 2.0, 3.0]), True, 0.5, RewardConfig(horizon="sparse"))
    np.testing.assert_allclose(g, [1 + 0.5 * 2 + 0.25 * 3, 2 + 0.5 * 3, 3])


def test_returns_with_scale_and_bias():
    g = returns_to_go(np.array([0.0, 1.0]), True, 0.9, RewardConfig(scale=10, bias=-5))
    np.testing.assert_allclose(g, [-5 + 0.9 * 5, 5])


def test_returns_of_a_sparse_failure_do_not_depend_on_its_length():
    config = RewardConfig(scale=10.0, bias=-5.0, horizon="sparse", step_reward=0.0)
    for length in (1, 10, 300):
        np.testing.assert_allclose(returns_to_go(np.zeros(length), False, 0.99, config), -5 / 0.01)
    fell = returns_to_go(np.zeros(2), True, 0.99, config)  # a termination ends, also without success
    np.testing.assert_allclose(fell, [-5 - 0.99 * 5, -5])
    cut = returns_to_go(np.array([0.0, 1.0]), False, 0.99, config)  # a success, then cut: tail 0
    np.testing.assert_allclose(cut, [-5 + 0.99 * 5, 5])


def test_returns_of_infinite_and_finite_horizons():
    rewards = np.array([1.0, 2.0])
    infinite = returns_to_go(rewards, False, 0.9, RewardConfig(horizon="infinite"))
    np.testing.assert_allclose(infinite, [1 + 0.9 * (2 + 0.9 * 20), 2 + 0.9 * 20])
    np.testing.assert_allclose(returns_to_go(rewards, False, 0.9, RewardConfig()), [1 + 0.9 * 2, 2])
    np.testing.assert_allclose(returns_to_go(rewards, False, 1.0, RewardConfig()), [3, 2])
    with pytest.raises(ConfigError, match="discount < 1"):
        returns_to_go(rewards, False, 1.0, RewardConfig(horizon="sparse"))


def test_normalizer_chunks_equal_whole_and_inverse():
    values = np.random.default_rng(0).normal(5, [1, 10, 0.1], (1000, 3))
    whole = Normalizer.fit([values])
    parts = Normalizer.fit(iter([values[:1], values[1:400], values[400:400], values[400:]]))
    torch.testing.assert_close(whole.mean, parts.mean)
    torch.testing.assert_close(whole.scale, parts.scale)
    np.testing.assert_allclose(whole.scale, values.std(0), rtol=1e-5)
    x = torch.tensor(values, dtype=torch.float32)
    torch.testing.assert_close(whole.inverse(whole(x)), x)
    assert whole.state_dict().keys() == {"mean", "scale"}


def test_near_constant_dimension_keeps_scale_one():
    rng = np.random.default_rng(0)
    values = np.stack([np.full(100, 7.0), 500 + 1e-4 * rng.normal(size=100), rng.normal(size=100)], 1)
    assert Normalizer.fit([values]).scale[:2].tolist() == [1.0, 1.0]
    assert Normalizer.fit([values])(torch.tensor([7.1, 500.1, 0.0])).abs().max() < 1


def test_normalizer_refuses():
    with pytest.raises(DataError, match="dimension 1 holds NaN"):
        Normalizer.fit([np.array([[0.0, np.nan]])])
    with pytest.raises(DataError, match="no rows"):
        Normalizer.fit([])
    with pytest.raises(DataError, match="scales above 0"):
        Normalizer(torch.zeros(2), torch.tensor([1.0, 0.0]))
    with pytest.raises(DataError, match="low < high"):
        BoxScaler(torch.zeros(2), torch.zeros(2))


def test_box_scaler():
    scaler = BoxScaler(torch.tensor([0.0, -2.0]), torch.tensor([10.0, 2.0]))
    torch.testing.assert_close(scaler(torch.tensor([[0.0, 2.0], [5.0, 0.0]])), torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(scaler.inverse(scaler(torch.tensor([3.0, 1.0]))), torch.tensor([3.0, 1.0]))
