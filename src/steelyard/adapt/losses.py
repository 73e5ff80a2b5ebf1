"""Losses of every member on every labelled example: members [N, H, C] and labels [N] -> [N, H], float64.

What HyRe sums. Any loss will do, differentiable or not.

| loss | l(f_k(x), y) |
|---|---|
| `BradleyTerry` | -log sigma(f_k) for a pair whose first is preferred (Bradley and Terry 1952) |
| `CrossEntropy` | -log softmax(f_k)_y |
| `GaussianNLL` | (f_k - y)^2 / (2 sigma_k^2) + log sigma_k, sigma_k^2 at least `floor` |
| `ZeroOne` | 1 where the member is wrong, 1/2 for a tie of a preference |

`noise` rho makes the first two robust to wrong labels: p -> (1 - rho) p + rho / C with C = 2 for preferences, so that
one wrong click costs a member at most log(C / rho).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from steelyard.adapt.base import Floats, Task
from steelyard.errors import ConfigError, DataError


class MemberLoss(Protocol):
    """Judges every member on every example."""

    @property
    def name(self) -> str:
        """What profiles call it."""
        ...

    def __call__(self, members: Floats, labels: Floats) -> Floats:
        """Return losses [N, H] of members [N, H, C] against labels [N]."""
        ...


@dataclass(frozen=True)
class BradleyTerry:
    """Negative log-likelihood of preferences; `noise` is the share of clicks that are random."""

    noise: float = 0.0
    name: str = "bt"

    def __post_init__(self) -> None:
        _check_noise(self.noise)

    def __call__(self, members: Floats, labels: Floats) -> Floats:
        """Return [N, H]; labels are P(first is preferred)."""
        if members.shape[2] != 1 or ((labels < 0) | (labels > 1)).any():
            raise DataError("preferences need one output per member and labels between 0 and 1")
        margin, y = members[:, :, 0], labels[:, None]
        right, wrong = (
            _soften(-np.logaddexp(0, -margin), self.noise, 2),
            _soften(-np.logaddexp(0, margin), self.noise, 2),
        )
        return -(y * right + (1 - y) * wrong)


@dataclass(frozen=True)
class CrossEntropy:
    """Negative log-likelihood of classes; `noise` is the share of labels that are random."""

    noise: float = 0.0
    name: str = "ce"

    def __post_init__(self) -> None:
        _check_noise(self.noise)

    def __call__(self, members: Floats, labels: Floats) -> Floats:
        """Return [N, H]; labels are class numbers."""
        classes = members.shape[2]
        number = labels.astype(np.int64)
        if (number != labels).any() or (number < 0).any() or (number >= classes).any():
            raise DataError(f"labels of a classification must be class numbers from 0 to {classes - 1}")
        highest = members.max(2, keepdims=True)
        logp = members - highest - np.log(np.exp(members - highest).sum(2, keepdims=True))
        return -_soften(np.take_along_axis(logp, number[:, None, None], 2)[:, :, 0], self.noise, classes)


@dataclass(frozen=True)
class GaussianNLL:
    """Negative log-likelihood of targets, up to a constant.

    Attributes:
        variance: [H] of every member's residuals on held-out data, or one number.
        floor: least variance. Residuals on held-out data of the training distribution are far too small under a shift:
            without a floor five labels put all weight on one member, which may be worse than the mean.
    """

    variance: Floats | float = 1.0
    floor: float = 0.0
    name: str = "gaussian"

    def __call__(self, members: Floats, labels: Floats) -> Floats:
        """Return [N, H]; labels are targets."""
        if members.shape[2] != 1:
            raise DataError(f"a regression has one output per member, found {members.shape[2]}")
        variance = np.maximum(np.asarray(self.variance, np.float64), self.floor)
        if not (variance > 0).all():
            raise ConfigError("the variance of a Gaussian likelihood must be above 0")
        losses: Floats = (members[:, :, 0] - labels[:, None]) ** 2 / (2 * variance) + 0.5 * np.log(variance)
        return losses


@dataclass(frozen=True)
class ZeroOne:
    """1 where a member is wrong; a tie of a preference counts half."""

    task: Task = "preference"
    name: str = "zero_one"

    def __call__(self, members: Floats, labels: Floats) -> Floats:
        """Return [N, H]."""
        if self.task == "classification":
            return np.asarray(members.argmax(2) != labels[:, None], np.float64)
        if self.task != "preference" or members.shape[2] != 1:
            raise DataError("the 0-1 loss is for preferences and classification")
        margin = np.where(labels[:, None] >= 0.5, members[:, :, 0], -members[:, :, 0])
        return np.asarray((margin < 0) + 0.5 * (margin == 0), np.float64)


def default_loss(task: Task, noise: float = 0.0) -> MemberLoss:
    """Return the negative log-likelihood of a task."""
    if task == "preference":
        return BradleyTerry(noise)
    return CrossEntropy(noise) if task == "classification" else GaussianNLL()


def _check_noise(noise: float) -> None:
    if not 0 <= noise < 1:
        raise ConfigError(f"noise must be at least 0 and below 1, found {noise}")


def _soften(logp: Floats, noise: float, classes: int) -> Floats:
    """Return log((1 - noise) p + noise / classes)."""
    if noise == 0:
        return logp
    return np.asarray(np.logaddexp(np.log1p(-noise) + logp, np.log(noise / classes)))
