"""Shifted mazes: what reaches the simulator, and a demonstrator who knows it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from steelyard.envs.behaviours import PointMazeDataConfig
from steelyard.envs.gym import VectorEnv
from steelyard.envs.shifted_maze import Shift, random_steps_store, shifted_maze_env, shifted_maze_store
from steelyard.errors import ConfigError

SHIFTS = (Shift(), Shift(rotation=90), Shift(rotation=30, gain=0.5, wind=(0.2, -0.1)), Shift(swapped=True, gain=2.0))


def test_forces_by_hand():
    np.testing.assert_allclose(Shift(rotation=90).forces(np.array([1.0, 0.0])), [0, 1], atol=1e-12)
    np.testing.assert_allclose(Shift(swapped=True).forces(np.array([0.3, -0.7])), [-0.7, 0.3])
    # exchanged first, then turned
    np.testing.assert_allclose(Shift(rotation=90, swapped=True).forces(np.array([1.0, 0.0])), [-1, 0], atol=1e-12)
    np.testing.assert_allclose(Shift(gain=0.5, wind=(0.4, 0.0)).forces(np.array([1.0, 1.0])), [0.9, 0.5])
    np.testing.assert_allclose(Shift(wind=(0.4, 0.0)).forces(np.array([1.0, -1.0])), [1, -1])  # no more than the most


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_demonstrators_actions_give_the_forces_wanted_where_they_can(shift):
    wanted = np.random.default_rng(0).uniform(-0.2, 0.2, (50, 2))
    actions = shift.actions(wanted)
    inside = (np.abs(actions) < 1).all(1)
    assert inside.any()
    np.testing.assert_allclose(shift.forces(actions)[inside], wanted[inside], atol=1e-12)
    assert (np.abs(shift.actions(np.array([5.0, 5.0]))) <= 1).all()


def test_a_gain_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="gain"):
        Shift(gain=0.0)


@pytest.mark.sim
def test_the_simulator_receives_the_shifted_force():
    """Rotated by 90 degrees, action (a, b) moves the point as (-b, a) does without a shift."""
    pytest.importorskip("gymnasium_robotics")
    plain, turned = (
        VectorEnv(shifted_maze_env("Medium", shift, start=(1, 1), action_repeat=4), 1, 0, "test")
        for shift in (Shift(), Shift(rotation=90))
    )
    for env in (plain, turned):
        env.reset(0)
    np.testing.assert_array_equal(plain.observations, turned.observations)
    for a, b in ((0.5, -0.2), (0.1, 0.9), (-0.3, -0.4)):
        first = plain.step(np.array([[-b, a]], np.float32)).observations
        second = turned.step(np.array([[a, b]], np.float32)).observations
        np.testing.assert_allclose(first, second, atol=1e-5)
    assert plain.spec.actions.low == (-1.0, -1.0)
    for env in (plain, turned):
        env.close()


@pytest.mark.sim
def test_the_demonstrator_reaches_the_goal_by_the_actions_on_record():
    pytest.importorskip("gymnasium_robotics")
    shift, goal = Shift(rotation=120, gain=0.8, wind=(0.1, 0.0)), (3, 3)
    config = PointMazeDataConfig(
        size="Medium", kind="diverse", action_repeat=4, steps=60, goal=goal, goal_fraction=1.0, noise=0.1, seed=4
    )
    store = shifted_maze_store(config, shift)
    assert np.asarray(store.terminated).all()
    again = shifted_maze_store(config, shift)
    np.testing.assert_array_equal(np.asarray(store.actions), np.asarray(again.actions))
    # the same actions, played in the environment that evaluates, lead along the same path
    env_config = shifted_maze_env("Medium", shift, goal, action_repeat=4)
    env = VectorEnv(env_config, 1, 0, "test")
    env.reset(0)
    episode = store.episode(0)
    states = np.asarray(episode.observation_dict["observation"])
    point = env.envs[0].unwrapped.point_env
    point.set_state(states[0, :2].astype(np.float64), states[0, 2:].astype(np.float64))
    for number, action in enumerate(np.asarray(episode.actions)):
        found = env.step(action[None]).observations[0]
        np.testing.assert_allclose(found, states[number + 1], atol=1e-3)
    assert env.done[0]
    env.close()


@pytest.mark.sim
def test_random_steps_repeat_and_start_anywhere_but_at_the_goal():
    pytest.importorskip("gymnasium_robotics")
    config = shifted_maze_env("UMaze", Shift(rotation=10), (3, 1), max_episode_steps=40, action_repeat=4)
    assert "reset_cell" not in (config.reset_options or {})
    first, again = (random_steps_store(config, 25, 3) for _ in range(2))
    assert first.num_steps >= 25
    np.testing.assert_array_equal(np.asarray(first.actions), np.asarray(again.actions))
    starts = np.asarray(first.observations["observation"])[
        np.asarray(first.starts[:-1]) + np.arange(first.num_episodes)
    ]
    assert len(np.unique(starts[:, :2].round(2), axis=0)) > 1
    other = random_steps_store(dataclasses.replace(config), 25, 4)
    assert not np.array_equal(np.asarray(first.actions)[:5], np.asarray(other.actions)[:5])
