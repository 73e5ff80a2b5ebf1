"""K-means, for data that come without groups: heads of clusters differ as heads of users do."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from steelyard.errors import DataError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

STEPS = 100


def k_means(points: Floats, count: int, generator: np.random.Generator, steps: int = STEPS) -> Ints:
    """Return the cluster of each point, int64 [N], 0..count-1 and none of them empty.

    Lloyd's algorithm from centres drawn as in k-means++ (Arthur and Vassilvitskii 2007): each with probability
    proportional to its squared distance from those before. A cluster that loses all points takes the one that is
    farthest from its own centre.

    Args:
        points: [N, D].
        count: of clusters.
        generator: draws the first centres.
        steps: at most so many.

    Raises:
        DataError: there are fewer different points than clusters.
    """
    points = np.asarray(points, np.float64)
    if count < 1 or len(np.unique(points, axis=0)) < count:
        raise DataError(f"expected at least {count} different points for as many clusters, found {len(points)} points")
    centres = points[generator.integers(len(points))][None]
    while len(centres) < count:
        distances = squared_distances(points, centres).min(1)
        centres = np.concatenate([centres, points[generator.choice(len(points), p=distances / distances.sum())][None]])
    labels = np.full(len(points), -1, np.int64)
    for _ in range(steps):
        distances = squared_distances(points, centres)
        found = distances.argmin(1).astype(np.int64)
        own = distances[np.arange(len(points)), found]
        for empty in np.setdiff1d(np.arange(count), found):
            # never the last point of another cluster
            movable = np.where(np.bincount(found, minlength=count)[found] > 1, own, -1.0)
            row = int(movable.argmax())
            found[row], own[row] = empty, 0.0
        if np.array_equal(found, labels):
            break
        labels = found
        centres = np.stack([points[labels == cluster].mean(0) for cluster in range(count)])
    return labels


def squared_distances(points: Floats, centres: Floats) -> Floats:
    """Return squared distances [N, K] of points [N, D] and centres [K, D]."""
    products = (points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)
    return np.asarray(np.maximum(products, 0.0))
