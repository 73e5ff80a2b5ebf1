"""Exact weighted mixtures: how many rows each source gives to the batch of a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def mixture_counts(weights: Sequence[float], batch_size: int, step: int) -> npt.NDArray[np.int64]:
    """Return rows per source for batch `step`: a pure function, exact over time.

    Every batch has `batch_size` rows, and after any number of batches the total given by a source is within one row
    of its weighted share. Example: weights (0.5, 0.5) with batch size 3 alternate between (1, 2) and (2, 1).

    Args:
        weights: non-negative, not all zero; they are normalised.
        batch_size: rows per batch.
        step: which batch.
    """
    shares = np.asarray(weights, np.float64)
    if np.any(shares < 0) or not shares.sum() > 0:
        raise ValueError(f"weights must be non-negative and not all zero, found {list(weights)}")
    edges = np.concatenate([[0.0], np.cumsum(shares) / shares.sum()])
    edges[-1] = 1.0

    def cumulative(steps: int) -> npt.NDArray[np.int64]:
        # rounding the cumulative edges keeps the sum exact
        return np.diff(np.floor(edges * (steps * batch_size) + 0.5).astype(np.int64))

    return cumulative(step + 1) - cumulative(step)
