"""A point on a line to bring to 0, made known to Gymnasium by `--env cli.toy_point:ToyPoint-v0`."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from steelyard.data.episode import Episode
from steelyard.envs.gym import EnvConfig, make

ENV_ID = "cli.toy_point:ToyPoint-v0"
LIMIT = 8


class ToyPoint(gymnasium.Env):
    """x' = x + 0.3 a from |x| in [0.5, 1]; observed are x and -x; reward 1 and the end within 0.2 of 0."""

    observation_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x = float(self.np_random.choice([-1, 1]) * self.np_random.uniform(0.5, 1))
        return np.array([self.x, -self.x], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.x = float(np.clip(self.x + 0.3 * action[0], -2, 2))
        reached = abs(self.x) < 0.2
        return np.array([self.x, -self.x], np.float32), float(reached), reached, False, {"success": reached}


if "ToyPoint-v0" not in gymnasium.registry:
    gymnasium.register("ToyPoint-v0", entry_point=ToyPoint, max_episode_steps=LIMIT)


def recorded(seed: int) -> Episode:
    """Play one noisy episode."""
    env, rng = make(EnvConfig(ENV_ID)), np.random.default_rng(seed)
    observations, actions, rewards, over = [env.reset(seed=seed)[0]], [], [], False
    while not over:
        actions.append(np.clip(-0.5 * observations[-1][:1] + rng.normal(0, 0.6, 1), -1, 1).astype(np.float32))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(observation)
        rewards.append(reward)
        over = terminated or truncated
    return Episode(np.array(observations), np.array(actions), np.array(rewards), terminated, not terminated)
