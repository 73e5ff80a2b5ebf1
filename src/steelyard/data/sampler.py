"""Samplers: which rows make up the batch of a step. Pure functions of (seed, stream, step): nothing to save."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from steelyard.rng import numpy_generator

Indices = npt.NDArray[np.int64]


class Sampler(Protocol):
    """Chooses rows."""

    def indices(self, step: int) -> Indices:
        """Return int64 [B]: the rows of batch `step`."""
        ...


def uniform_indices(size: int, count: int, seed: int, stream: str, step: int) -> Indices:
    """Return `count` rows drawn uniformly with replacement from 0..size-1, a pure function of its arguments."""
    return numpy_generator(seed, stream, step).integers(size, size=count)


class UniformSampler:
    """Uniform with replacement, the field's default for transitions."""

    def __init__(self, size: int, batch_size: int, seed: int, stream: str = "batch") -> None:
        self.size, self.batch_size, self.seed, self.stream = size, batch_size, seed, stream

    def indices(self, step: int) -> Indices:
        """Return int64 [batch_size]."""
        return uniform_indices(self.size, self.batch_size, self.seed, self.stream, step)


class EpochSampler:
    """Without replacement: every row once per epoch, in a new order each epoch, batches crossing epoch borders."""

    def __init__(self, size: int, batch_size: int, seed: int, stream: str = "epoch") -> None:
        self.size, self.batch_size, self.seed, self.stream = size, batch_size, seed, stream
        self._cached: tuple[int, Indices] | None = None

    def epoch_of(self, step: int) -> int:
        """Return the epoch in which batch `step` begins."""
        return step * self.batch_size // self.size

    def indices(self, step: int) -> Indices:
        """Return int64 [batch_size]."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, self.size)
        result = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = self._order(int(epoch))[offsets[chosen]]
        return result

    def _order(self, epoch: int) -> Indices:
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, numpy_generator(self.seed, self.stream, epoch).permutation(self.size))
        return self._cached[1]


class ShardedSampler:
    """One worker's equal share of another sampler's batches: rank r of n takes rows r, r + n, r + 2n, ..."""

    def __init__(self, sampler: Sampler, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..{world_size - 1}, found {rank}")
        self.sampler, self.rank, self.world_size = sampler, rank, world_size

    def indices(self, step: int) -> Indices:
        """Return this rank's rows of batch `step`."""
        return self.sampler.indices(step)[self.rank :: self.world_size]
