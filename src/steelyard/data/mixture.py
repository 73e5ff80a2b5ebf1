"""Exact weighted mixtures: how many rows each source gives to the batch of a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def mixture_counts(weights: Sequence[float], batch_size: int, step: int) -> npt.NDArray[np.int64]:
    """Return rows per source for batch `step`: a pure function, exact over time.

    Every batch has `batch_size` rows, and after any number of batches the total given by each of k sources is within
    (k - 1) / 2 rows of its weighted share: half a row for two sources. Example: weights (0.5, 0.5) with batch size 3
    alternate between (2, 1) and (1, 2).

    Args:
        weights: non-negative, not all zero; they are normalised.
        batch_size: rows per batch.
        step: which batch.
    """
    shares = np.asarray(weights, np.float64)
    if np.any(shares < 0) or not shares.sum() > 0:
        raise ValueError(f"weights must be non-negative and not all zero, found {list(weights)}")
    counts = np.zeros(len(shares), np.int64)
    # the first source takes its rounded share of all rows so far, the next one its share of what is left, ...
    before, after = step * batch_size, (step + 1) * batch_size
    for index, share in enumerate(shares):
        rest = float(shares[index:].sum())
        if rest == 0:
            break
        taken_before, taken_after = (int(np.floor(share / rest * rows + 0.5)) for rows in (before, after))
        counts[index] = taken_after - taken_before
        before, after = before - taken_before, after - taken_after
    return counts
