"""Grouped transitions: equally many of every group, each with the right number, a pure function of the step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steelyard.data.episode import Episode
from steelyard.data.grouped import GroupedSource, joined
from steelyard.data.returns import RewardConfig
from steelyard.data.source import OfflineSource
from steelyard.data.store import Store
from steelyard.errors import DataError


def store(group: int, lengths: tuple[int, ...]) -> Store:
    """Return episodes whose numbers all say their group: action = group, observation = group + time / 100."""
    episodes = []
    for length in lengths:
        times = np.arange(length + 1, dtype=np.float32)[:, None] / 100
        actions = np.full((length, 1), group, np.float32)
        episodes.append(Episode(group + times, actions, np.ones(length), False, True))
    return Store.from_episodes(episodes)


STORES = [store(0, (3,)), store(1, (20, 30)), store(2, (1, 1))]


def source(batch: int = 4, seed: int = 0) -> GroupedSource:
    whole, groups = joined(STORES)
    return GroupedSource(OfflineSource(whole, RewardConfig(), 0.9, 1, 0), groups, batch, seed)


def test_stores_are_joined_in_order_with_the_group_of_every_step():
    whole, groups = joined(STORES)
    assert whole.num_episodes == 5
    assert groups.tolist() == [0] * 3 + [1] * 50 + [2] * 2
    np.testing.assert_array_equal(np.asarray(whole.actions)[:, 0], groups)


def test_a_batch_has_equally_many_rows_of_every_group():
    made = source()
    for step in range(5):
        batch = made.batch(step)
        assert batch.groups.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        torch.testing.assert_close(batch.actions[:, 0], batch.groups.float())
        assert (batch.next_observations.floor()[:, 0] == batch.groups).all()


def test_a_batch_is_a_function_of_seed_and_step_and_reaches_every_row():
    made, again = source(), source()
    again.batch(3)
    torch.testing.assert_close(made.batch(7).observations, again.batch(7).observations)
    assert not torch.equal(made.batch(7).observations, made.batch(8).observations)
    assert not torch.equal(made.batch(7).observations, source(seed=1).batch(7).observations)
    seen = torch.cat([made.batch(step).observations[:, 0] for step in range(200)])
    assert len(seen.unique()) == 3 + 30 + 1  # the second group's two episodes look the same, as do the third's


def test_what_does_not_fit_is_refused():
    whole, groups = joined(STORES)
    offline = OfflineSource(whole, RewardConfig(), 0.9, 1, 0)
    for wrong in (groups[:-1], np.where(groups == 1, 0, groups)):
        with pytest.raises(DataError, match="a group of every one of 55 steps"):
            GroupedSource(offline, wrong, 4, 0)
    with pytest.raises(DataError, match="at least one group"):
        joined([])
    wide = Store.from_episodes(
        [Episode(np.zeros((3, 2), np.float32), np.zeros((2, 1), np.float32), np.ones(2), False, True)]
    )
    with pytest.raises(DataError, match="group 0 and group 1 do not fit"):
        joined([STORES[0], wide])
