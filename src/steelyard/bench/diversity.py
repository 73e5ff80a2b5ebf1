"""The diversity meter: can re-weighting this ensemble help at all?

Re-weighting chooses among members. Where they all say the same, or where no user is served better by one of them than
by their mean, five labels change nothing. Four numbers tell, before any label is spent:

| number | meaning |
|---|---|
| `disagreement` | share of examples on which two members decide differently, mean over pairs of members |
| `correlation` | mean correlation of two members' outputs |
| `directions` | participation ratio of the members' covariance spectrum: 1 if all say the same, H if unrelated |
| `gain` | best member of each held-out group minus the uniform mean, in accuracy (regression: share of the error) |

The best member is chosen on the examples it is judged on: `gain` is an upper bound on what choosing a member gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steelyard.adapt.base import Floats, Support, Task, accuracy, rmse
from steelyard.bench.stats import number
from steelyard.errors import DataError

LEAST_GAIN = 0.01
"""Below this (one point of accuracy, or 1 % of the error) re-weighting cannot help."""


@dataclass(frozen=True)
class Diversity:
    """What the meter shows; see the module docstring.

    Attributes:
        disagreement: 0..1.
        correlation: -1..1.
        directions: 1..H.
        uniform: accuracy (or error) of the mean of the members, averaged over groups.
        best: of every group's best member.
        gain: `best` minus `uniform`, or 1 - best / uniform for errors.
        num_members: H.
        num_groups: held-out groups.
        task: what the members are for; of a regression, `disagreement` is 0 and `gain` a share of the error.
    """

    disagreement: float
    correlation: float
    directions: float
    uniform: float
    best: float
    gain: float
    num_members: int
    num_groups: int
    task: Task = "preference"

    def to_dict(self) -> dict[str, float]:
        """Return the numbers by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "task"}

    def sentence(self) -> str:
        """Return what follows from it, in words."""
        regression = self.task == "regression"
        unit = f"{number(100 * self.gain, 1)} {'% of the error' if regression else 'points'}"
        differ = "" if regression else f"members differ on {number(100 * self.disagreement, 1)} % of examples, "
        if self.num_members < 2:
            return "There is one member only: re-weighting cannot help."
        if self.gain < LEAST_GAIN:
            return (
                f"Re-weighting cannot help: even the best member of each of {self.num_groups} held-out groups is only "
                f"{unit} better than the uniform mean ({differ}{number(self.directions, 1)} effective directions of "
                f"{self.num_members}). Give heads different data, e.g. one head for each user or cluster."
            )
        return (
            f"Re-weighting can help: the best member of each of {self.num_groups} held-out groups is {unit} better "
            f"than the uniform mean, at most ({number(self.directions, 1)} effective directions of {self.num_members})."
        )


def measure(groups: Sequence[Support], task: Task) -> Diversity:
    """Measure an ensemble on held-out groups (users, sources, clusters).

    Args:
        groups: the labelled examples of each group; members [N, H, C].
        task: what they are trained for.

    Raises:
        DataError: no group.
    """
    if not groups:
        raise DataError("the diversity meter needs at least one held-out group")
    members = np.concatenate([group.members for group in groups])
    heads = members.shape[1]
    uniform, best = [], []
    for group in groups:
        mean = group.members.mean(1)
        if task == "regression":
            uniform.append(rmse(mean, group.labels))
            errors = np.sqrt(((group.members[:, :, 0] - group.labels[:, None]) ** 2).mean(0))
            best.append(float(errors.min()))
        else:
            uniform.append(accuracy(mean, group.labels, task))
            best.append(max(accuracy(group.members[:, head], group.labels, task) for head in range(heads)))
    low, high = float(np.mean(uniform)), float(np.mean(best))
    gain = 1 - high / low if task == "regression" and low > 0 else high - low
    outputs = members.transpose(1, 0, 2).reshape(heads, -1)
    correlation, directions = _spectrum(outputs)
    return Diversity(_disagreement(members, task), correlation, directions, low, high, gain, heads, len(groups), task)


def _disagreement(members: Floats, task: Task) -> float:
    """Return the share of examples on which two different members decide differently; of regressions, 0."""
    _, heads, outputs = members.shape
    if heads < 2 or task == "regression":
        return 0.0
    if task == "preference":
        decisions = (members[:, :, 0] > 0).astype(np.int64)
        classes = 2
    else:
        decisions, classes = members.argmax(2), outputs
    counts = np.stack([(decisions == kind).sum(1) for kind in range(classes)], 1).astype(np.float64)
    agree = (counts * (counts - 1)).sum(1) / (heads * (heads - 1))
    return float(1 - agree.mean())


def _spectrum(outputs: Floats) -> tuple[float, float]:
    """Return the mean correlation of two rows of [H, M], and the participation ratio of their covariance."""
    heads = len(outputs)
    if heads < 2:
        return 1.0, 1.0
    centred = outputs - outputs.mean(1, keepdims=True)
    covariance = centred @ centred.T
    trace, square = float(np.trace(covariance)), float((covariance**2).sum())
    directions = trace**2 / square if square > 0 else 1.0
    scale = np.sqrt(np.diag(covariance))
    kept = scale > 0
    if kept.sum() < 2:
        return 1.0, directions
    correlations = (covariance / np.where(kept, scale, 1) / np.where(kept, scale, 1)[:, None])[np.ix_(kept, kept)]
    count = int(kept.sum())
    return float((correlations.sum() - count) / (count * (count - 1))), directions
