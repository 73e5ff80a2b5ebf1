r"""Generated users with tastes: what re-weighting needs, without any data set.

A user u of group g likes the half of its items with the highest utility

    v_u . x + noise,   v_u = shared * s + group * s_g d_g + own * e_u,      x ~ N(0, I_D)

with unit directions s (all users share it), d_g (axes on which users take sides: s_g = 1 for the majority, -1 for the
minority of an axis) and e_u (the user's own). The crowd's average taste is close to s plus what the majority adds;
users of the minority side are served badly by it, and a few labels tell which axis and side a user is on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from steelyard.config import Config, require_positive, require_range
from steelyard.data.pair_tasks import Floats, Taste
from steelyard.rng import numpy_generator


@dataclass(frozen=True)
class TastesConfig(Config):
    """How many users, and what their tastes are made of."""

    users: int = 48
    """Users."""
    items: int = 400
    """Items that every user judges; each user has its own."""
    features: int = 32
    """D: features of an item."""
    axes: int = 5
    """Axes on which users take sides; each user cares about one."""
    minority: float = 0.35
    """Share of users on the less popular side of their axis."""
    shared: float = 0.8
    """Weight of the taste that all users share."""
    group: float = 1.0
    """Weight of the axis a user cares about."""
    own: float = 0.5
    """Weight of a user's own direction."""
    noise: float = 0.3
    """Standard deviation of what no feature explains."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "users", "items", "features", "axes")
        require_range(self, 0, 0.5, "minority")
        require_range(self, 0, math.inf, "shared", "group", "own", "noise")


def generate_tastes(config: TastesConfig, seed: int) -> list[Taste]:
    """Return the users, named "user SEED-NUMBER (axis 3, minority)"; a function of config and seed only."""
    generator = numpy_generator(seed, "tastes/population")
    shared, *axes = _directions(1 + config.axes, config.features, generator)
    tastes = []
    for user in range(config.users):
        generator = numpy_generator(seed, "tastes/user", user)
        axis = user % config.axes
        side = -1 if generator.random() < config.minority else 1
        own = _directions(1, config.features, generator)[0]
        taste = config.shared * shared + config.group * side * axes[axis] + config.own * own
        features = generator.standard_normal((config.items, config.features)).astype(np.float32)
        utility = features @ taste + config.noise * generator.standard_normal(config.items)
        name = f"user {seed}-{user} (axis {axis}, {'minority' if side < 0 else 'majority'})"
        tastes.append(Taste(name, features, utility > np.median(utility)))
    return tastes


def _directions(count: int, features: int, generator: np.random.Generator) -> Floats:
    """Return random unit vectors [count, D], orthogonal as far as D allows."""
    vectors = generator.standard_normal((count, features))
    if count <= features:
        return np.ascontiguousarray(np.linalg.qr(vectors.T)[0].T)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
