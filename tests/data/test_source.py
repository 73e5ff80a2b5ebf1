"""OfflineSource: what the loop gets from a store."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.data.episode import ArraySpec, Episode
from steelyard.data.returns import RewardConfig
from steelyard.data.source import OfflineSource
from steelyard.data.store import Store


def store() -> Store:
    observations = {"a": np.arange(5, dtype=np.float32)[:, None], "b": -np.arange(10, dtype=np.float32).reshape(5, 2)}
    actions = np.array([[0.5], [1.5], [-2.0], [1.0]], np.float32)
    return Store.from_episodes([Episode(observations, actions, np.array([1.0, 0.0, 0.0, 2.0]), True, False)])


def make(**options) -> OfflineSource:
    return OfflineSource(store(), RewardConfig(scale=2.0, bias=1.0), 0.5, 4, seed=0, **options)


def test_batch_rows_are_scaled_concatenated_and_masked():
    batch = make().gather(np.array([3, 0]))
    assert batch.observations.tolist() == [[3.0, -6.0, -7.0], [0.0, 0.0, -1.0]]
    assert batch.next_observations.tolist() == [[4.0, -8.0, -9.0], [1.0, -2.0, -3.0]]
    assert batch.rewards.tolist() == [5.0, 3.0]  # 2 * reward + 1
    assert batch.masks.tolist() == [0.0, 1.0]
    assert batch.returns_to_go.tolist() == [5.0, 3.0 + 0.5 * (1.0 + 0.5 * (1.0 + 0.5 * 5.0))]


def test_observation_keys_choose_and_order():
    assert make(observation_keys=("b", "a")).gather(np.array([1])).observations.tolist() == [[-2.0, -3.0, 1.0]]


def test_batches_are_a_pure_function_of_the_step():
    one, other = make(), make()
    other.batch(3)
    assert one.batch(7).actions.tolist() == other.batch(7).actions.tolist()


@pytest.mark.parametrize(("bound", "share"), [(1.0, 0.5), (1.5, 0.25), (2.0, 0.0)])
def test_share_of_action_values_outside_the_bounds(bound, share):
    assert make().share_outside(ArraySpec((1,), low=(-bound,), high=(bound,))) == share
