"""`Episode`, the one in-memory truth about recorded behaviour, and `Spec`, what its arrays mean.

Alignment (T steps, T + 1 observations):

    observations  o0   o1   o2   ...  oT
    actions          a0   a1   ...  a(T-1)
    rewards          r0   r1   ...  r(T-1)
    terminated / truncated: one flag each, about the last step only
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from steelyard.config import Config
from steelyard.errors import DataError

Array = npt.NDArray[np.generic]
Observations = Array | dict[str, Array]


@dataclass(frozen=True)
class ArraySpec(Config):
    """Shape, type and bounds of one array of a single time step."""

    shape: tuple[int, ...]
    """Shape of one step, without the time axis."""
    dtype: str = "float32"
    """numpy type name."""
    low: tuple[float, ...] | None = None
    """Lower bounds, flattened, one per element; None where unknown."""
    high: tuple[float, ...] | None = None
    """Upper bounds, flattened, one per element; None where unknown."""
    names: tuple[str, ...] | None = None
    """Names of the elements, e.g. ("x", "y")."""


@dataclass(frozen=True)
class ActionMeaning(Config):
    """What an action does, where the source says so; None is "not stated"."""

    control: str | None = None
    """"absolute", "delta", "torque", "velocity", ..."""
    frame: str | None = None
    """Reference frame, e.g. "base" or "gripper"."""
    units: str | None = None
    """e.g. "m, rad" or "normalised"."""
    rate_hz: float | None = None
    """Control rate."""
    gripper_sign: str | None = None
    """e.g. "+1 opens"."""


@dataclass(frozen=True)
class Spec(Config):
    """Shapes, types, bounds and meaning of a data set's or an environment's observations and actions."""

    observations: dict[str, ArraySpec]
    """One entry per observation array; a data set with a single plain array uses the key "observation"."""
    actions: ArraySpec
    """The action array; a discrete action has shape () and an integer dtype."""
    num_actions: int | None = None
    """Number of discrete actions; None for continuous ones."""
    meaning: ActionMeaning = field(default_factory=ActionMeaning)
    """What the action numbers do."""

    def difference(self, other: Spec) -> list[str]:
        """Return one sentence for each mismatch that makes data or policies of the two specs incompatible.

        Bounds and names count only where both sides state them.
        """
        lines = []
        for key in sorted(self.observations.keys() | other.observations.keys()):
            a, b = self.observations.get(key), other.observations.get(key)
            if a is None or b is None:
                lines.append(
                    f"observation {key!r}: {'absent' if a is None else 'present'} here, "
                    f"{'absent' if b is None else 'present'} there"
                )
            else:
                lines += _array_difference(f"observation {key!r}", a, b)
        mine, theirs = list(self.observations), list(other.observations)
        if mine != theirs and set(mine) == set(theirs):
            lines.append(f"order of observations: {mine} here, {theirs} there")
        lines += _array_difference("actions", self.actions, other.actions)
        if self.num_actions != other.num_actions:
            lines.append(f"number of discrete actions: {self.num_actions} here, {other.num_actions} there")
        for item in dataclasses.fields(ActionMeaning):
            x, y = getattr(self.meaning, item.name), getattr(other.meaning, item.name)
            if x is not None and y is not None and x != y:
                lines.append(f"action {item.name}: {x!r} here, {y!r} there")
        return lines

    def select(self, keys: tuple[str, ...]) -> Spec:
        """Return the spec with only the observations `keys`, in that order."""
        unknown = [key for key in keys if key not in self.observations]
        if unknown:
            raise DataError(f"the data have no observation {unknown[0]!r}; there are {sorted(self.observations)}")
        return dataclasses.replace(self, observations={key: self.observations[key] for key in keys})

    def require_match(self, other: Spec, here: str, there: str) -> None:
        """Raise `DataError` with every difference if the two specs are incompatible."""
        lines = self.difference(other)
        if lines:
            raise DataError(f"{here} and {there} do not fit: " + "; ".join(lines))


def _array_difference(what: str, a: ArraySpec, b: ArraySpec) -> list[str]:
    lines = []
    if a.shape != b.shape:
        return [f"{what}: shape {a.shape} here, {b.shape} there"]
    if (np.dtype(a.dtype).kind in "iub") != (np.dtype(b.dtype).kind in "iub"):
        lines.append(f"{what}: type {a.dtype} here, {b.dtype} there")
    for bound in ("low", "high"):
        x, y = getattr(a, bound), getattr(b, bound)
        if x is not None and y is not None and not np.allclose(x, y):
            lines.append(f"{what}: {bound} {x} here, {y} there")
    if a.names is not None and b.names is not None and a.names != b.names:
        lines.append(f"{what}: names {a.names} here, {b.names} there")
    return lines


@dataclass(frozen=True)
class Episode:
    """One recorded trajectory. Checks itself on construction.

    Attributes:
        observations: array [T+1, ...] or a dict of such arrays.
        actions: array [T, ...].
        rewards: float array [T], raw as the source gave them (no scale, no bias).
        terminated: the task ended at the last step (success, failure): no value beyond it.
        truncated: the recording was cut at the last step (time limit): the value goes on.
        instruction: language goal, where there is one.
        provenance: where the episode comes from, e.g. "door_demos.hdf5#3".
    """

    observations: Observations
    actions: Array
    rewards: npt.NDArray[np.floating]
    terminated: bool
    truncated: bool
    instruction: str | None = None
    provenance: str = ""

    def __post_init__(self) -> None:
        """Check lengths and types.

        Raises:
            DataError: an array is empty, has the wrong length, or is not numeric. Values are not judged here: that is
                the work of `steelyard data check`.
        """
        name = f"episode {self.provenance}".strip()
        steps = len(self.actions)
        if steps == 0:
            raise DataError(f"{name}: no actions; an episode needs at least one step")
        if self.rewards.shape != (steps,):
            raise DataError(f"{name}: rewards have shape {self.rewards.shape}, expected ({steps},)")
        for key, values in self.observation_dict.items():
            if len(values) != steps + 1:
                raise DataError(
                    f"{name}: observation {key!r} has {len(values)} rows, expected {steps + 1} (one more than actions)"
                )
        for key, values in {**self.observation_dict, "actions": self.actions, "rewards": self.rewards}.items():
            if values.dtype.kind not in "fiub":
                raise DataError(f"{name}: {key!r} has type {values.dtype}, expected numbers")

    def __len__(self) -> int:
        """Return the number of steps T."""
        return len(self.actions)

    @property
    def observation_dict(self) -> dict[str, Array]:
        """The observations as a dict; a plain array appears under "observation"."""
        return dict(self.observations) if isinstance(self.observations, Mapping) else {"observation": self.observations}

    @property
    def spec(self) -> Spec:
        """The spec that the arrays show: shapes and types, no bounds."""
        discrete = self.actions.ndim == 1 and self.actions.dtype.kind in "iu"
        return Spec(
            observations={
                key: ArraySpec(values.shape[1:], str(values.dtype)) for key, values in self.observation_dict.items()
            },
            actions=ArraySpec(self.actions.shape[1:], str(self.actions.dtype)),
            num_actions=int(self.actions.max()) + 1 if discrete else None,
        )
