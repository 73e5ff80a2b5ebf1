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

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from steelyard.adapt.base import TASKS, Floats, Task
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
        if members.shape[2] != 1 or (len(labels) and not (labels.min() >= 0 and labels.max() <= 1)):
            raise DataError("preferences need one output per member and labels between 0 and 1")
        margin, y = members[:, :, 0], labels[:, None]
        if not self.noise:
            return np.asarray(np.logaddexp(0, margin) - y * margin)
        wrong = self.noise / 2
        p = (1 - self.noise) * sigmoid(margin) + wrong
        return np.asarray(-(y * np.log(p) + (1 - y) * np.log(1 - p)))


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


@dataclass(frozen=True)
class Likelihood:
    """-log p(y | f) of one function f, with its derivatives: what methods that fit a function minimise.

    Any axes may stand before C: outputs f [..., C], labels [...].

    Attributes:
        task: Bradley-Terry, Gaussian or softmax.
        noise: variance of a regression's targets.
    """

    task: Task = "preference"
    noise: float = 1.0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"task must be one of {', '.join(TASKS)}, found {self.task!r}")
        if not self.noise > 0:
            raise ConfigError(f"the noise variance must be above 0, found {self.noise}")

    def check(self, outputs: int, labels: Floats) -> None:
        """Raise unless the labels are such as the task has, for functions of so many outputs."""
        if self.task == "classification":
            if ((labels < 0) | (labels >= outputs) | (labels != np.floor(labels))).any():
                raise DataError(f"labels of a classification must be class numbers from 0 to {outputs - 1}")
        elif outputs != 1:
            raise DataError(f"a {self.task} has one output per member, found {outputs}")
        elif self.task == "preference" and ((labels < 0) | (labels > 1)).any():
            raise DataError("labels of preferences must be between 0 and 1")

    def value(self, outputs: Floats, labels: Floats) -> Floats:
        """Return -log p(y | f), [...]."""
        if self.task == "classification":
            shifted = outputs - outputs.max(-1, keepdims=True)
            own = np.take_along_axis(shifted, labels.astype(np.int64)[..., None], -1)[..., 0]
            return np.asarray(np.log(np.exp(shifted).sum(-1)) - own)
        f = outputs[..., 0]
        if self.task == "preference":
            return np.asarray(np.logaddexp(0, f) - labels * f)
        return np.asarray((f - labels) ** 2 / (2 * self.noise) + 0.5 * math.log(2 * math.pi * self.noise))

    def gradient(self, outputs: Floats, labels: Floats) -> Floats:
        """Return the derivative of `value` with respect to f, [..., C]."""
        if self.task == "classification":
            return np.asarray(softmax(outputs) - (labels[..., None] == np.arange(outputs.shape[-1])))
        if self.task == "preference":
            return sigmoid(outputs) - labels[..., None]
        return np.asarray((outputs - labels[..., None]) / self.noise)

    def curvature(self, outputs: Floats) -> Floats:
        """Return the second derivative of `value` with respect to f, [..., C, C]; it does not depend on labels."""
        if self.task == "classification":
            p = softmax(outputs)
            return np.asarray(p[..., None] * (np.eye(p.shape[-1]) - p[..., None, :]))
        if self.task == "preference":
            p = sigmoid(outputs)
            return np.asarray((p * (1 - p))[..., None])
        return np.full((*outputs.shape, 1), 1 / self.noise)


def log_score(outputs: Floats, labels: Floats, task: Task, noise: float = 1.0) -> float:
    """Return the mean log-likelihood of labels [N] under outputs [N, C]; above is better."""
    return -float(Likelihood(task, noise).value(outputs, labels).mean())


def sigmoid(x: Floats) -> Floats:
    """Return 1 / (1 + exp(-x)), for any x."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def softmax(x: Floats) -> Floats:
    """Return exp(x) / sum exp(x) over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


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
