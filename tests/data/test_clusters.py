"""K-means: finds what is there, is a function of its generator, and leaves no cluster empty."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.data.clusters import k_means, squared_distances
from steelyard.errors import DataError


def test_finds_separate_groups() -> None:
    generator = np.random.default_rng(0)
    truth = generator.permutation(np.repeat(np.arange(4), 30))
    points = 10 * np.array([[0, 0], [0, 1], [1, 0], [1, 1]])[truth] + generator.normal(size=(120, 2))
    found = k_means(points, 4, np.random.default_rng(1))
    assert len(set(zip(truth, found, strict=True))) == 4
    assert np.array_equal(found, k_means(points, 4, np.random.default_rng(1)))


def test_no_cluster_is_empty() -> None:
    points = np.concatenate([np.zeros((50, 1)), np.arange(6.0)[:, None]])
    for seed in range(20):
        assert set(k_means(points, 6, np.random.default_rng(seed))) == set(range(6))


def test_every_point_is_with_its_nearest_centre() -> None:
    points = np.random.default_rng(0).normal(size=(80, 3))
    labels = k_means(points, 5, np.random.default_rng(0))
    centres = np.stack([points[labels == cluster].mean(0) for cluster in range(5)])
    assert np.array_equal(squared_distances(points, centres).argmin(1), labels)


def test_needs_as_many_different_points() -> None:
    with pytest.raises(DataError, match="3 different points"):
        k_means(np.array([[0.0], [0.0], [1.0]]), 3, np.random.default_rng(0))
