"""Normalisers: fitted statistics that travel inside the artefact, with a floor and an exact inverse."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from steelyard.errors import DataError


class Normalizer(nn.Module):
    """y = (x - mean) / scale, element by element; its statistics are buffers and are saved with the weights.

    A dimension whose standard deviation lies below `floor * max(1, |mean|)` counts as constant and keeps scale 1, so
    that a tiny change of a near-constant sensor cannot explode.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        if not bool(torch.isfinite(mean).all() and torch.isfinite(scale).all() and (scale > 0).all()):
            raise DataError("normaliser statistics must be finite with scales above 0")
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    @classmethod
    def identity(cls, size: int) -> Normalizer:
        """Return the normaliser that changes nothing."""
        return cls(torch.zeros(size), torch.ones(size))

    @classmethod
    def fit(cls, values: Iterable[npt.NDArray[np.floating]], floor: float = 1e-3) -> Normalizer:
        """Fit mean and standard deviation over chunks [n, O], in float64, one pass, bounded memory.

        Raises:
            DataError: no rows, or a value that is not finite.
        """
        count, mean, squares = 0, np.zeros(1), np.zeros(1)
        for chunk in values:
            x = np.asarray(chunk, np.float64)
            if not np.isfinite(x).all():
                bad = np.unique(np.nonzero(~np.isfinite(x))[1])
                raise DataError(f"cannot fit a normaliser: dimension {bad[0]} holds NaN or infinite values")
            if len(x) == 0:
                continue
            total = count + len(x)  # Chan's update of mean and sum of squares
            chunk_mean = x.mean(0)
            delta = chunk_mean - mean
            squares = squares + ((x - chunk_mean) ** 2).sum(0) + delta**2 * (count * len(x) / total)
            mean = mean + delta * (len(x) / total)
            count = total
        if count == 0:
            raise DataError("cannot fit a normaliser: no rows")
        std = np.sqrt(squares / count)
        scale = np.where(std > floor * np.maximum(1.0, np.abs(mean)), std, 1.0)
        return cls(torch.tensor(mean, dtype=torch.float32), torch.tensor(scale, dtype=torch.float32))

    def forward(self, values: Tensor) -> Tensor:
        """Normalise [..., O]."""
        return (values - self.mean) / self.scale

    def inverse(self, values: Tensor) -> Tensor:
        """Undo `forward`."""
        return values * self.scale + self.mean


class BoxScaler(nn.Module):
    """Maps a bounded box to [-1, 1] and back: y = (x - centre) / half_width."""

    low: Tensor
    high: Tensor
    centre: Tensor
    half_width: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all() and (high > low).all()):
            raise DataError(f"action bounds must be finite with low < high, found {low.tolist()} and {high.tolist()}")
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("centre", (low + high) / 2)
        self.register_buffer("half_width", (high - low) / 2)

    def forward(self, values: Tensor) -> Tensor:
        """Map the box to [-1, 1]."""
        return (values - self.centre) / self.half_width

    def inverse(self, values: Tensor) -> Tensor:
        """Map [-1, 1] to the box; rounding never leaves it."""
        return (values * self.half_width + self.centre).clamp(self.low, self.high)
