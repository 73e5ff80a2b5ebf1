"""`ReplayBuffer`: transitions of finished online trajectories, with their returns-to-go, in a ring."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steelyard.data.batch import TransitionBatch
from steelyard.data.returns import RewardConfig, returns_to_go
from steelyard.data.sampler import Indices


class ReplayBuffer:
    """Holds whole trajectories only: what is not finished has no return-to-go and cannot be in here.

    Attributes:
        capacity: transitions kept; the oldest are overwritten.
        total: transitions ever added.
    """

    def __init__(
        self,
        capacity: int,
        observation_size: int,
        action_size: int,
        rewards: RewardConfig,
        discount: float,
        n_step: int | None = None,
    ) -> None:
        self.n_step = n_step
        self.capacity, self.config, self.discount = capacity, rewards, discount
        self.total = 0
        self.columns: dict[str, npt.NDArray[np.float32]] = {
            "observations": np.empty((capacity, observation_size), np.float32),
            "actions": np.empty((capacity, action_size), np.float32),
            "rewards": np.empty(capacity, np.float32),
            "next_observations": np.empty((capacity, observation_size), np.float32),
            "masks": np.empty(capacity, np.float32),
            "returns_to_go": np.empty(capacity, np.float32),
        }
        if n_step is not None:
            self.columns |= {
                "n_step_returns": np.empty(capacity, np.float32),
                "n_step_discounts": np.empty(capacity, np.float32),
                "n_step_observations": np.empty((capacity, observation_size), np.float32),
            }

    def __len__(self) -> int:
        """Return the number of transitions that can be sampled."""
        return min(self.total, self.capacity)

    def add_trajectory(
        self,
        observations: npt.NDArray[np.float32],
        actions: npt.NDArray[np.float32],
        rewards: npt.NDArray[np.float64],
        terminated: bool,
    ) -> None:
        """Add one finished trajectory.

        Args:
            observations: [T + 1, O].
            actions: [T, A], in the environment's units.
            rewards: [T], raw.
            terminated: whether the last step ended the task (a time limit did not).
        """
        steps = len(actions)
        masks = np.ones(steps, np.float32)
        masks[-1] = 1.0 - terminated
        rows = (self.total + np.arange(steps)) % self.capacity
        values: dict[str, npt.NDArray[np.floating]] = {
            "observations": observations[:-1],
            "actions": actions,
            "rewards": self.config.transform(rewards),
            "next_observations": observations[1:],
            "masks": masks,
            "returns_to_go": returns_to_go(rewards, terminated, self.discount, self.config),
        }
        if self.n_step is not None:
            # R_t = sum of up to n discounted rewards, from whole finite sums: S_t - discount^(k) S_(t + k)
            start = np.arange(steps)
            end = np.minimum(start + self.n_step, steps)
            scaled = self.config.transform(rewards)
            sums = np.append(returns_to_go(scaled, True, self.discount, RewardConfig()), 0.0)
            weight = self.discount ** (end - start)
            values["n_step_returns"] = sums[start] - weight * sums[end]
            values["n_step_discounts"] = weight * np.where(end == steps, masks[-1], 1.0)
            values["n_step_observations"] = observations[end]
        for name, column in self.columns.items():
            column[rows] = values[name]  # a trajectory longer than the ring keeps its end: later rows win
        self.total += steps

    def gather(self, indices: Indices) -> TransitionBatch:
        """Return the transitions at `indices` [B]."""
        picked = {name: torch.from_numpy(column[indices]) for name, column in self.columns.items()}
        return TransitionBatch(**picked, is_offline=torch.zeros(len(indices)))

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the filled part of the ring and the count."""
        filled = {name: torch.from_numpy(column[: len(self)]) for name, column in self.columns.items()}
        return {**filled, "total": torch.tensor(self.total)}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned."""
        self.total = int(state["total"])
        for name, column in self.columns.items():
            column[: len(self)] = state[name].numpy()
