r"""Point mazes whose actuators are not what they were: turned, weaker or stronger, exchanged, pushed by a wind.

    u = clip(gain * R(rotation) * P * a + wind, -1, 1)

a is the agent's action, u the force that the simulator of `PointMaze_*-v3` is given, R turns by `rotation` degrees, P
exchanges the two actions where `swapped`. The goal is changed as in the other mazes, by `reset_options`. The
observation (x, y, vx, vy) shows neither.

Prior data come from the planner of `behaviours.py`. It knows the shift: it chooses the force that it wants and sends
the action that gives it, where the box allows.

Importing this module registers `ShiftedPointMaze-v0`; its id for `EnvConfig` is `ID`, which imports it first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from steelyard.config import Config, require_positive
from steelyard.data.episode import Episode
from steelyard.data.store import Store
from steelyard.envs.behaviours import Cell, PointMazeDataConfig, PointSize, _World, point_maze_env, point_maze_spec
from steelyard.envs.gym import EnvConfig, VectorEnv, make
from steelyard.errors import require
from steelyard.rng import numpy_generator

NAME = "ShiftedPointMaze-v0"
ID = f"{__name__}:{NAME}"
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Shift(Config):
    """How actions reach the simulator; the default changes nothing."""

    rotation: float = 0.0
    """Degrees by which the force is turned, counter-clockwise."""
    gain: float = 1.0
    """Force per action."""
    wind: tuple[float, float] = (0.0, 0.0)
    """Constant push, in units of the largest force."""
    swapped: bool = False
    """The two actions are exchanged."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "gain")

    @property
    def matrix(self) -> npt.NDArray[np.float64]:
        """The matrix gain R P, [2, 2]."""
        angle = np.deg2rad(self.rotation)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        return self.gain * (turn[:, ::-1] if self.swapped else turn)

    def forces(self, actions: Floats) -> Floats:
        """Return what the simulator receives [..., 2] for actions [..., 2]."""
        forces: Floats = np.clip(actions @ self.matrix.T + np.array(self.wind), -1, 1)
        return forces

    def actions(self, forces: Floats) -> Floats:
        """Return the actions [..., 2] that give the forces wanted, moved into the box where they are out of reach."""
        actions: Floats = np.clip((forces - np.array(self.wind)) @ np.linalg.inv(self.matrix).T, -1, 1)
        return actions


class _ShiftedActuators(gymnasium.ActionWrapper[Any, Any, Any]):
    def __init__(self, env: gymnasium.Env[Any, Any], shift: Shift) -> None:
        super().__init__(env)
        self.shift = shift

    def action(self, action: Any) -> Any:
        return self.shift.forces(np.asarray(action, np.float64)).astype(np.float32)


class _Compensated(gymnasium.ActionWrapper[Any, Any, Any]):
    """Takes the force that is wanted: what a demonstrator who knows the shift does."""

    def __init__(self, env: gymnasium.Env[Any, Any], shift: Shift) -> None:
        super().__init__(env)
        self.shift = shift

    def action(self, action: Any) -> Any:
        return self.shift.actions(np.asarray(action, np.float64)).astype(np.float32)


def make_shifted(
    size: PointSize,
    rotation: float = 0.0,
    gain: float = 1.0,
    wind_x: float = 0.0,
    wind_y: float = 0.0,
    swapped: bool = False,
    **kwargs: Any,
) -> gymnasium.Env[Any, Any]:
    """Return a point maze with shifted actuators and without a time limit, which `gymnasium.make` adds."""
    gymnasium.register_envs(require("gymnasium_robotics", "sim"))
    env = gymnasium.make(f"PointMaze_{size}-v3", disable_env_checker=True, **kwargs).unwrapped
    return _ShiftedActuators(env, Shift(rotation, gain, (wind_x, wind_y), swapped))


if NAME not in gymnasium.registry:
    gymnasium.register(NAME, entry_point=f"{__name__}:make_shifted", max_episode_steps=300)


def shifted_maze_env(
    size: PointSize,
    shift: Shift,
    goal: Cell | None = None,
    start: Cell | None = None,
    max_episode_steps: int | None = None,
    action_repeat: int = 1,
) -> EnvConfig:
    """Return a shifted maze that ends at the pinned goal.

    Args:
        size: maze.
        shift: of its actuators.
        goal: cell (row, column); None is the size's own.
        start: cell; None: any free cell but the goal's, drawn at each reset.
        max_episode_steps: time limit in simulator steps; None is the size's own.
        action_repeat: simulator steps per action.
    """
    plain = point_maze_env(size, start, goal, max_episode_steps, action_repeat)
    options = dict(plain.reset_options or {})
    if start is None:
        del options["reset_cell"]
    numbers: dict[str, bool | int | float | str] = {
        "size": size,
        "rotation": shift.rotation,
        "gain": shift.gain,
        "wind_x": shift.wind[0],
        "wind_y": shift.wind[1],
        "swapped": shift.swapped,
    }
    return replace(plain, id=ID, kwargs=numbers | plain.kwargs, reset_options=options)


def shifted_maze_store(config: PointMazeDataConfig, shift: Shift, path: str | Path | None = None) -> Store:
    """Generate what the demonstrator does under a shift into a store, in memory or at `path`.

    Args:
        config: maze, goal, noise and how much; `noise` is that of the forces wanted.
        shift: of the actuators, which the demonstrator knows.
        path: where to.
    """
    world = _ShiftedWorld(config, shift)
    try:
        return Store.from_episodes(world.episodes(), path, spec=point_maze_spec(config.size))
    finally:
        world.env.close()


def random_steps_store(config: EnvConfig, steps: int, seed: int, path: str | Path | None = None) -> Store:
    """Play uniformly random actions into a store, in memory or at `path`: experience that needs no demonstrator.

    Args:
        config: environment.
        steps: at least so many; the episode that reaches the number is completed.
        seed: of starts and actions.
        path: where to.
    """

    def episodes() -> Iterator[Episode]:
        env, done, number = VectorEnv(config, 1, seed, "random steps"), 0, 0
        box: Any = env.envs[0].action_space
        while done < steps:
            rng = numpy_generator(seed, "random steps/actions", number)
            observations, actions, rewards = [env.reset(0)], [], []
            while not env.done[0]:
                actions.append(rng.uniform(box.low, box.high).astype(np.float32))
                result = env.step(actions[-1][None])
                observations.append(result.observations[0])
                rewards.append(float(result.rewards[0]))
            ended = bool(result.terminated[0])
            yield Episode(np.stack(observations), np.stack(actions), np.array(rewards), ended, not ended)
            done, number = done + len(actions), number + 1
        env.close()

    return Store.from_episodes(episodes(), path, spec=point_maze_spec(config.kwargs["size"]))  # type: ignore[arg-type]


class _ShiftedWorld(_World):
    """The planner's world with shifted actuators."""

    def __init__(self, config: PointMazeDataConfig, shift: Shift) -> None:
        super().__init__(config)
        self.shift = shift
        self.env.close()
        env = shifted_maze_env(
            config.size, shift, config.goal, config.start, config.max_episode_steps, config.action_repeat
        )
        self.env = _Compensated(make(env), shift)

    def episodes(self) -> Iterator[Episode]:
        """Yield episodes until there are enough steps."""
        done, number = 0, 0
        while done < self.config.steps:
            episode = self.episode(number)
            yield episode
            done, number = done + len(episode), number + 1

    def episode(self, number: int) -> Episode:
        """Play episode `number`; its actions are those that were sent, not the forces that were wanted."""
        episode = super().episode(number)
        sent = self.shift.actions(np.asarray(episode.actions, np.float64)).astype(np.float32)
        return replace(episode, actions=sent)
