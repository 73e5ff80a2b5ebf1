"""Evaluation: whole episodes from fixed initial states, from a random stream of its own; one row per episode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from steelyard.envs.gym import EnvConfig, VectorEnv
from steelyard.objectives.base import Policy
from steelyard.rng import derive_seed, torch_generator

Act = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""Observations [B, O] -> actions [B, A]."""


def evaluate(
    policy: Policy,
    env: VectorEnv,
    episodes: int,
    seed: int,
    mode: Literal["mean", "sample"] = "mean",
    score_range: tuple[float, float] | None = None,
) -> list[dict[str, Any]]:
    """Play episodes 0..episodes-1 of the evaluation stream and return one row for each.

    Episode k always starts from the same state for the same seed, so policies and methods are compared on equal
    starts, and calling this never changes what training does.

    Args:
        policy: acts on raw observations.
        env: its stream should be the evaluation's own.
        episodes: how many.
        seed: of the policy's noise (`mode="sample"`).
        mode: the policy's mode, or samples.
        score_range: returns that count as 0 and 1, for tasks without a success rule.

    Returns:
        rows with episode, episode_seed, return, length, success (None without a rule), and score: success as 0 or 1,
        else the return mapped by `score_range`, else None.
    """
    rows: list[dict[str, Any]] = []
    for first in range(0, episodes, env.num_envs):
        count = min(env.num_envs, episodes - first)
        observations = env.reset_all(first_episode=first)
        policy.reset()
        active = np.arange(env.num_envs) < count
        returns, lengths = np.zeros(env.num_envs), np.zeros(env.num_envs, np.int64)
        success: np.ndarray[Any, Any] | None = None
        time = 0
        while active.any():
            generator = torch_generator(seed, f"eval/{first}", time)
            actions = policy.act(torch.from_numpy(observations), generator, mode).cpu().numpy()
            result = env.step(actions, active)
            returns += np.where(active, result.rewards, 0.0)
            lengths += active
            success = result.success
            observations = result.observations
            active &= ~result.done
            time += 1
        for index in range(count):
            won = None if success is None else bool(success[index])
            rows.append(
                {
                    "episode": first + index,
                    "episode_seed": derive_seed(env.seed, env.stream, first + index) % 2**31,
                    "return": float(returns[index]),
                    "length": int(lengths[index]),
                    "success": won,
                    "score": score_of(won, float(returns[index]), score_range),
                }
            )
    return rows


def mean_score(rows: list[dict[str, Any]]) -> float | None:
    """Return the mean score of rows, or None where they have none."""
    scores = [row["score"] for row in rows]
    return None if None in scores else float(np.mean(scores))


def play(config: EnvConfig, act: Act, seed: int, stream: str) -> dict[str, Any]:
    """Play episode 0 of a stream and return its path as plain JSON (see the report's trajectory.json).

    Mazes add their map (1 is a wall), the size of a cell and the goal, so that the path can be drawn from above.
    """
    env = VectorEnv(config, 1, seed, stream)
    observations, actions = [env.reset_all(first_episode=0)[0]], []
    success: bool | None = None
    while not env.done[0]:
        actions.append(act(observations[-1][None])[0])
        result = env.step(actions[-1][None])
        observations.append(result.observations[0])
        success = None if result.success is None else bool(result.success[0])
    path: dict[str, Any] = {
        "observations": np.array(observations).tolist(),
        "actions": np.array(actions).tolist(),
        "success": success,
    }
    world: Any = env.envs[0].unwrapped
    if hasattr(world, "maze"):
        rows = [[int(cell == 1) for cell in row] for row in world.maze.maze_map]
        path |= {"maze": rows, "cell_size": float(world.maze.maze_size_scaling), "goal": np.array(world.goal).tolist()}
    env.close()
    return path


def score_of(success: bool | None, total: float, score_range: tuple[float, float] | None) -> float | None:
    """Return the score of an episode: success as 0 or 1, else the return mapped by `score_range`, else None."""
    if success is not None:
        return float(success)
    if score_range is not None:
        low, high = score_range
        return (total - low) / (high - low)
    return None
