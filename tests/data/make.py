"""Episodes and stores for the tests of data."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from steelyard.data.episode import ActionMeaning, ArraySpec, Episode, Spec
from steelyard.data.store import Store


def walk(length: int, seed: int, terminated: bool = False, truncated: bool | None = None, **more) -> Episode:
    """A smooth random walk from a random start."""
    rng = np.random.default_rng(seed)
    observations = rng.normal(size=3) * 3 + np.cumsum(rng.normal(size=(length + 1, 3)) * 0.05, axis=0)
    return Episode(
        observations=observations.astype(np.float32),
        actions=rng.uniform(-0.9, 0.9, (length, 2)).astype(np.float32),
        rewards=rng.normal(size=length),
        terminated=terminated,
        truncated=not terminated if truncated is None else truncated,
        **more,
    )


def walks(lengths: Sequence[int] = (5, 1, 8, 3), first_seed: int = 0) -> list[Episode]:
    return [
        walk(
            n, first_seed + i, terminated=i % 2 == 0, instruction="reach the ▲" if i == 1 else None, provenance=f"w#{i}"
        )
        for i, n in enumerate(lengths)
    ]


def nested(length: int, seed: int) -> Episode:
    rng = np.random.default_rng(seed)
    return Episode(
        observations={
            "arm.joints": rng.normal(size=(length + 1, 4)),
            "arm.tip": rng.normal(size=(length + 1, 2)).astype(np.float32),
            "camera": rng.integers(0, 255, (length + 1, 4, 4, 3), dtype=np.uint8),
        },
        actions=rng.integers(0, 3, length),
        rewards=rng.normal(size=length),
        terminated=False,
        truncated=True,
    )


def bounded_spec() -> Spec:
    return Spec(
        observations={"observation": ArraySpec((3,), "float32", names=("x", "y", "z"))},
        actions=ArraySpec((2,), "float32", (-1.0, -1.0), (1.0, 1.0)),
        meaning=ActionMeaning(control="delta", rate_hz=20.0),
    )


def example_stores() -> dict[str, Store]:
    return {
        "plain": Store.from_episodes(walks(), spec=bounded_spec(), notes=["made for a test"]),
        "nested": Store.from_episodes([nested(4, 0), nested(1, 1), nested(6, 2)]),
        "open": Store.from_episodes([walk(4, 0, truncated=False), walk(4, 1, terminated=True, truncated=True)]),
    }


def assert_equal(a: Episode, b: Episode) -> None:
    assert a.observation_dict.keys() == b.observation_dict.keys()
    for key, values in a.observation_dict.items():
        np.testing.assert_array_equal(values, b.observation_dict[key], strict=True)
    np.testing.assert_array_equal(a.actions, b.actions, strict=True)
    np.testing.assert_array_equal(a.rewards, b.rewards)
    assert (a.terminated, a.truncated, a.instruction) == (b.terminated, b.truncated, b.instruction)


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
