"""Sources of batches: what the loop asks for data, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steelyard.data.ahead import look_ahead
from steelyard.data.batch import TransitionBatch
from steelyard.data.episode import ArraySpec, Spec
from steelyard.data.normalize import Normalizer
from steelyard.data.returns import RewardConfig, returns_to_go
from steelyard.data.sampler import Indices, Sampler, uniform_indices
from steelyard.data.store import Store
from steelyard.objectives.actor_critic import DataStatistics
from steelyard.objectives.base import Needs

CHUNK = 1 << 16


class Source(Protocol):
    """Gives the batch of each update step."""

    def batch(self, step: int) -> Any:
        """Return the batch of update `step`."""
        ...

    def counters(self) -> dict[str, Any]:
        """Return what the log should show beside the update step, e.g. {"env_step": 400}."""
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """Return everything that is not a pure function of the step, for the checkpoint."""
        ...

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned."""
        ...


class OfflineSource:
    """Batches of transitions from a store, rewards scaled and biased, with returns-to-go. Stateless."""

    def __init__(
        self,
        store: Store,
        rewards: RewardConfig,
        discount: float,
        batch_size: int,
        seed: int,
        observation_keys: tuple[str, ...] | None = None,
        sampler: Sampler | None = None,
        needs: Needs | None = None,
    ) -> None:
        self.store, self.batch_size, self.seed, self.discount = store, batch_size, seed, discount
        self.needs = Needs() if needs is None else needs
        self.spec = store.spec if observation_keys is None else store.spec.select(observation_keys)
        self._sampler = sampler
        raw = np.asarray(store.rewards, np.float64)
        self.rewards = rewards.transform(raw).astype(np.float32)
        self.returns_to_go = np.empty(store.num_steps, np.float32)
        for number in range(store.num_episodes):
            rows = slice(int(store.starts[number]), int(store.starts[number + 1]))
            self.returns_to_go[rows] = returns_to_go(raw[rows], bool(store.terminated[number]), discount, rewards)

    def batch(self, step: int) -> TransitionBatch:
        """Return the batch of update `step`: a pure function of (seed, step)."""
        if self._sampler is not None:
            return self.gather(self._sampler.indices(step))
        return self.sample(self.batch_size, step)

    def sample(self, count: int, step: int) -> TransitionBatch:
        """Return `count` transitions drawn uniformly for update `step`."""
        return self.gather(uniform_indices(self.store.num_steps, count, self.seed, "batch/offline", step))

    def gather(self, indices: Indices) -> TransitionBatch:
        """Return the transitions at `indices` [B]."""
        steps = self.store.gather(indices)
        return TransitionBatch(
            **look_ahead(self, indices, self.needs),
            observations=torch.from_numpy(self._flat(steps.observations)),
            actions=torch.from_numpy(np.ascontiguousarray(steps.actions, self._action_type)),
            rewards=torch.from_numpy(self.rewards[indices]),
            next_observations=torch.from_numpy(self._flat(steps.next_observations)),
            masks=torch.from_numpy(1.0 - steps.terminated.astype(np.float32)),
            returns_to_go=torch.from_numpy(self.returns_to_go[indices]),
            is_offline=torch.ones(len(indices)),
        )

    @property
    def _action_type(self) -> type[np.int64] | type[np.float32]:
        return np.float32 if self.spec.num_actions is None else np.int64

    def remaining(self, rows: Indices) -> Indices:
        """Return the steps from each row to its trajectory's end, itself included."""
        left: Indices = self.store.starts[self.store.episode_index[rows] + 1] - rows
        return left

    def rewards_at(self, rows: Indices) -> npt.NDArray[np.float32]:
        """Return the rewards, scaled and biased, in the shape of `rows`."""
        return self.rewards[rows]

    def actions_at(self, rows: Indices) -> npt.NDArray[Any]:
        """Return the actions, [*rows, A], or [*rows] where they are discrete."""
        return self.store.actions_at(rows).astype(self._action_type, copy=False)

    def after(self, rows: Indices) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
        """Return what follows rows [B]: next observations [B, O] and masks [B]."""
        steps = self.store.gather(rows)
        return self._flat(steps.next_observations), 1.0 - steps.terminated.astype(np.float32)

    def statistics(self) -> DataStatistics:
        """Return normaliser statistics over all observations and the mean return-to-go.

        Images (all observations bytes) keep mean 0 and scale 1: encoders scale them themselves.
        """
        mean_return = float(self.returns_to_go.mean(dtype=np.float64))
        if observation_type(self.spec) is np.uint8:
            size = sum(int(np.prod(entry.shape)) for entry in self.spec.observations.values())
            return DataStatistics(torch.zeros(size), torch.ones(size), mean_return)

        def chunks() -> Iterator[npt.NDArray[np.float32]]:
            columns = self.store.observations
            rows = self.store.num_steps + self.store.num_episodes
            for start in range(0, rows, CHUNK):
                yield self._flat({key: column[start : start + CHUNK] for key, column in columns.items()})

        normalizer = Normalizer.fit(chunks())
        return DataStatistics(normalizer.mean, normalizer.scale, mean_return)

    def share_outside(self, bounds: ArraySpec) -> float:
        """Return the share of action values that lie beyond the bounds of `bounds` by more than rounding."""
        if self.spec.num_actions is not None:
            return 0.0
        low, high = (np.reshape(np.asarray(x, np.float32), bounds.shape) for x in (bounds.low, bounds.high))
        outside = total = 0
        for start in range(0, self.store.num_steps, CHUNK):
            rows = np.arange(start, min(start + CHUNK, self.store.num_steps))
            actions = self.store.gather(rows).actions.astype(np.float32)
            outside += int(((actions < low - 1e-5) | (actions > high + 1e-5)).sum())
            total += actions.size
        return outside / total

    def _flat(self, observations: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return concatenated({key: observations[key] for key in self.spec.observations})

    def counters(self) -> dict[str, int]:
        """Return {"env_step": 0}: no environment is involved."""
        return {"env_step": 0}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return nothing: the step says it all."""
        return {}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""


def observation_type(spec: Spec) -> type[np.uint8] | type[np.float32]:
    """Return the type of concatenated observations: bytes where all of them are bytes, else float32."""
    only_bytes = all(np.dtype(entry.dtype) == np.uint8 for entry in spec.observations.values())
    return np.uint8 if only_bytes else np.float32


def concatenated(observations: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Concatenate observation arrays [B, ...] in the given order to [B, O]: uint8 if all are, else float32."""
    only_bytes = all(values.dtype == np.uint8 for values in observations.values())
    dtype = np.uint8 if only_bytes else np.float32
    parts = [np.asarray(values, dtype).reshape(len(values), -1) for values in observations.values()]
    return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts, axis=1)
