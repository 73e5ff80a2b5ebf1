"""Discounted returns-to-go of recorded trajectories, with every rule for how a trajectory goes on after its last step.

G_t = r_t + discount * G_{t+1} within a trajectory, on rewards after scale and bias. What follows the last step:

| trajectory | tail value G_T |
|---|---|
| terminated | 0 |
| sparse task, no step better than `step_reward` (a failure), not terminated | `step_reward / (1 - discount)` |
| infinite horizon (`horizon="infinite"`), truncated | last reward / (1 - discount) |
| otherwise truncated | 0 |

The failure rule makes every step of a failed trajectory worth exactly "never reaches the goal" however early the
recording was cut (Nakamoto et al. 2023, authors' replay buffer). A failed trajectory that *terminated* (a fall) ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from steelyard.config import Config
from steelyard.errors import ConfigError

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class RewardConfig(Config):
    """How raw rewards become the rewards and returns-to-go that objectives see."""

    scale: float = 1.0
    """Multiplies the raw reward."""
    bias: float = 0.0
    """Added after the scale."""
    horizon: Literal["finite", "sparse", "infinite"] = "finite"
    """Rule for the tail of a truncated trajectory: see `data/returns.py`."""
    step_reward: float = 0.0
    """Raw reward of a step that has not (yet) succeeded; used by the sparse rule to recognise failures."""

    def transform(self, rewards: Floats) -> npt.NDArray[np.float64]:
        """Return scale * rewards + bias in float64."""
        return self.scale * np.asarray(rewards, np.float64) + self.bias


def returns_to_go(rewards: Floats, terminated: bool, discount: float, config: RewardConfig) -> npt.NDArray[np.float64]:
    """Return G [T] of one trajectory.

    Args:
        rewards: raw rewards [T], as recorded.
        terminated: whether the last step ended the task.
        discount: discount factor per step.
        config: scale, bias and tail rule.

    Raises:
        ConfigError: a rule that needs discount < 1 is used with discount 1.
    """
    if config.horizon != "finite" and not discount < 1:
        raise ConfigError(f"horizon={config.horizon!r} needs discount < 1, found {discount}")
    scaled = config.transform(rewards)
    tail = 0.0
    if not terminated:
        if config.horizon == "infinite":
            tail = scaled[-1] / (1 - discount)
        elif config.horizon == "sparse" and np.all(np.asarray(rewards) <= config.step_reward):
            tail = (config.scale * config.step_reward + config.bias) / (1 - discount)
    result = np.empty_like(scaled)
    running = tail
    for t in range(len(scaled) - 1, -1, -1):
        running = scaled[t] + discount * running
        result[t] = running
    return result
