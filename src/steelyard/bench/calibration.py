r"""How good self-evaluations are: can they choose among a prompt's samples, can they tell prompts apart, are they true?

Three different skills, measured apart:

- `auc_within`: of two samples of one prompt, does the better one get the higher score? What selection and pruning need.
- `auc_across`: of two samples of different prompts, does the one that is harder to beat get the higher score? What
  stopping needs: a model that only knows which prompts are hard has it, and chooses no better than chance.
- `ece`, `brier`: is the score the probability that it claims to be? What a threshold means.

Labels are soft (`data/restart_labels.py`): a sample is "no better" with weight 1 - \hat q and "better" with weight
\hat q. NaN scores and unknown rewards are left out.

Shapes: P prompts, N samples of each, M values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steelyard.bench.stats import CONFIDENCE, RESAMPLES, Estimate
from steelyard.data.restart_labels import soft_labels

Floats = npt.NDArray[np.float64]
EDGE = 1e-6
"""Probabilities are kept this far from 0 and 1 before their log-odds are taken."""
LEAST_SCALE = 1e-3
"""Of log-odds in Platt scaling."""


# ------------------------------------------------------------------------------------------------ ranking


def prompt_aucs(scores: Floats, rewards: Floats, margin: float = 0.0) -> Floats:
    """Return [P], the share of pairs of each prompt with r_i > r_j + margin in which s_i > s_j, ties half.

    NaN where a prompt has no such pair.

    Args:
        scores: [P, N], P(no fresh sample would be better).
        rewards: [P, N].
        margin: rewards that differ by no more are a tie, and no pair.
    """
    s, r = _masked(scores, rewards)
    pairs = r[:, :, None] > r[:, None, :] + margin  # False wherever one is NaN
    above = s[:, :, None] - s[:, None, :]
    wins = np.where(pairs, (above > 0) + 0.5 * (above == 0), 0.0).sum((1, 2))
    count = pairs.sum((1, 2))
    return np.where(count > 0, wins / np.maximum(count, 1), np.nan)


def auc_within(
    scores: Floats, rewards: Floats, generator: np.random.Generator, margin: float = 0.0, resamples: int = RESAMPLES
) -> Estimate | None:
    """Return the mean of `prompt_aucs` over the prompts that have better and worse samples, with its interval.

    Each prompt counts once, however many pairs it has; the interval resamples prompts. None: there is no such prompt.
    """
    found = prompt_aucs(scores, rewards, margin)
    found = found[~np.isnan(found)]
    if not len(found):
        return None
    draws = found[generator.integers(len(found), size=(resamples, len(found)))].mean(1)
    return _estimate(float(found.mean()), draws, len(found))


def auc_across(
    scores: Floats, rewards: Floats, generator: np.random.Generator, margin: float = 0.0, resamples: int = 500
) -> Estimate | None:
    r"""Return how well scores tell samples of different prompts apart, with an interval that resamples prompts.

        sum_{p != p'} (1 - \hat q_a) \hat q_b [s_a > s_b]  /  sum_{p != p'} (1 - \hat q_a) \hat q_b,    ties half,

    over samples a of p and b of p'. None: nothing is ever better, or always.

    Args:
        scores: [P, N], or [P, 1] for scores of prompts alone.
        rewards: [P, N].
        generator: source of the resamples.
        margin: of ties.
        resamples: number of bootstrap samples.
    """
    better = soft_labels(np.asarray(rewards, np.float64), margin)
    if np.shape(scores)[1] == 1 and better.shape[1] != 1:
        known = ~np.isnan(better)
        better = (
            np.where(known, better, 0).sum(1, keepdims=True) / np.where(known.any(1), known.sum(1), np.nan)[:, None]
        )
    s, q = _masked(scores, better)
    wins, pairs = _against_others(s, q)
    whole = np.ones(len(s))
    value = _share(wins, pairs, whole)
    if math.isnan(value):
        return None
    # a resample of prompts is fixed by how often it takes each
    weights = generator.multinomial(len(s), np.full(len(s), 1 / len(s)), size=resamples).astype(np.float64)
    top, bottom = ((weights @ matrix) * weights for matrix in (wins, pairs))
    draws = top.sum(1) / np.where(bottom.sum(1) > 0, bottom.sum(1), np.nan)
    return _estimate(value, draws[~np.isnan(draws)], len(s))


def _against_others(s: Floats, q: Floats) -> tuple[Floats, Floats]:
    """Return weighted wins and pairs [P, P] of samples of one prompt against those of another; 0 on the diagonal."""
    count = len(s)
    known = ~np.isnan(s)
    values, rank = np.unique(s[known], return_inverse=True)
    ranks = np.zeros(s.shape, np.int64)
    ranks[known] = rank
    good, bad = np.where(known, 1 - q, 0.0), np.where(known, q, 0.0)
    wins = np.zeros((count, count))
    for row in range(count):
        # mass of this prompt's "better" samples below each value, those at it by half
        at = np.bincount(ranks[row], bad[row], len(values)) if len(values) else np.zeros(1)
        below = np.cumsum(at) - 0.5 * at
        wins[:, row] = (good * below[ranks]).sum(1)
    pairs = np.outer(good.sum(1), bad.sum(1))
    np.fill_diagonal(wins, 0.0)
    np.fill_diagonal(pairs, 0.0)
    return wins, pairs


def _share(wins: Floats, pairs: Floats, weights: Floats) -> float:
    total = float(weights @ pairs @ weights)
    return float(weights @ wins @ weights) / total if total > 0 else math.nan


def _masked(scores: Floats, other: Floats) -> tuple[Floats, Floats]:
    s, o = np.asarray(scores, np.float64), np.asarray(other, np.float64)
    if s.shape != o.shape or s.ndim != 2:
        raise ValueError(f"expected two arrays [P, N], found {s.shape} and {o.shape}")
    unknown = np.isnan(s) | np.isnan(o)
    return np.where(unknown, np.nan, s), np.where(unknown, np.nan, o)


def _estimate(value: float, draws: Floats, count: int) -> Estimate:
    if count == 1 or not len(draws):
        return Estimate(value, None, None, 1)
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high), count)


# ---------------------------------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Bin:
    """Scores of one part of [0, 1]: their number, mean score and mean target."""

    count: int
    score: float
    target: float


def reliability(probabilities: Floats, targets: Floats, bins: int = 15) -> list[Bin]:
    """Return the bins of equal width that hold a score; a score of 1 belongs to the last."""
    p, y = _flat(probabilities, targets)
    number = np.minimum((p * bins).astype(np.int64), bins - 1)
    return [
        Bin(int(inside.sum()), float(p[inside].mean()), float(y[inside].mean()))
        for inside in (number == one for one in range(bins))
        if inside.any()
    ]


def ece(probabilities: Floats, targets: Floats, bins: int = 15) -> float:
    """Return the expected calibration error: the mean over scores of |mean score - mean target| of their bin.

    Targets may be soft. NaN where there are no scores.
    """
    found = reliability(probabilities, targets, bins)
    total = sum(one.count for one in found)
    return sum(one.count * abs(one.score - one.target) for one in found) / total if total else math.nan


def brier(probabilities: Floats, targets: Floats) -> float:
    """Return the mean squared difference of scores and (soft) targets; NaN where there are none."""
    p, y = _flat(probabilities, targets)
    return float(((p - y) ** 2).mean()) if len(p) else math.nan


def sigmoid(x: Floats) -> Floats:
    """Return 1 / (1 + exp(-x)) without overflow; NaN stays NaN."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.exp(-np.logaddexp(0, -x)))


@dataclass(frozen=True)
class Platt:
    r"""\sigma(scale log-odds + offset) of a score (Platt 1999); it changes no order as long as scale is positive."""

    scale: float = 1.0
    offset: float = 0.0

    def __call__(self, probabilities: Floats) -> Floats:
        """Return calibrated probabilities; NaN stays NaN."""
        return sigmoid(self.scale * _log_odds(probabilities) + self.offset)


def fit_platt(probabilities: Floats, targets: Floats, ridge: float = 1e-3) -> Platt:
    """Return the Platt scaling with the least cross-entropy against (soft) targets, by Newton's method.

    A scale below `LEAST_SCALE` would turn the order of scores around and is held there.

    Args:
        probabilities: scores, any shape; NaN are left out.
        targets: as the scores.
        ridge: pull towards the identity (scale 1, offset 0), in pseudo-observations, which keeps perfectly separated
            scores finite.
    """
    p, y = _flat(probabilities, targets)
    x = np.stack([_log_odds(p), np.ones(len(p))], 1)
    theta = _newton(x, y, np.array([1.0, 0.0]), ridge, np.array([True, True]))
    if theta[0] < LEAST_SCALE:
        theta = _newton(x, y, np.array([LEAST_SCALE, 0.0]), ridge, np.array([False, True]))
    return Platt(float(theta[0]), float(theta[1]))


def _newton(x: Floats, y: Floats, start: Floats, ridge: float, free: npt.NDArray[np.bool_]) -> Floats:
    """Return the minimum of the logistic loss plus ridge / 2 |theta - start|^2 over the free entries of theta."""
    theta = start.copy()

    def loss(theta: Floats) -> float:
        z = x @ theta
        return float((np.logaddexp(0, z) - y * z).sum() + ridge / 2 * ((theta - start) ** 2).sum())

    for _ in range(100):
        q = sigmoid(x @ theta)
        gradient = (x.T @ (q - y) + ridge * (theta - start))[free]
        curvature = ((x * (q * (1 - q))[:, None]).T @ x + ridge * np.eye(len(theta)))[np.ix_(free, free)]
        step = np.zeros(len(theta))
        step[free] = np.linalg.solve(curvature, gradient)
        size, before = 1.0, loss(theta)
        while loss(theta - size * step) > before + 1e-12 and size > 1e-8:
            size /= 2
        theta = theta - size * step
        if float(np.abs(size * step).max()) < 1e-10:
            break
    return theta


@dataclass(frozen=True)
class Isotonic:
    """A non-decreasing step function, linear between the steps (Zadrozny and Elkan 2002).

    Attributes:
        scores: increasing.
        values: non-decreasing, of the same length.
    """

    scores: tuple[float, ...]
    values: tuple[float, ...]

    def __call__(self, probabilities: Floats) -> Floats:
        """Return calibrated probabilities; NaN stays NaN."""
        p = np.asarray(probabilities, np.float64)
        return np.asarray(np.where(np.isnan(p), np.nan, np.interp(p, self.scores, self.values)))


def fit_isotonic(probabilities: Floats, targets: Floats) -> Isotonic:
    """Return the non-decreasing function with the least squared error against (soft) targets (pool adjacent violators).

    Raises:
        ValueError: there are no scores.
    """
    p, y = _flat(probabilities, targets)
    if not len(p):
        raise ValueError("isotonic calibration needs at least one score")
    scores, inverse = np.unique(p, return_inverse=True)
    mass = np.bincount(inverse).astype(np.float64)
    blocks: list[list[float]] = []  # [mean, mass, scores in it]
    for mean, weight in zip(np.bincount(inverse, y) / mass, mass, strict=True):
        blocks.append([float(mean), float(weight), 1.0])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            last = blocks.pop()
            before = blocks[-1]
            total = before[1] + last[1]
            before[0] = (before[0] * before[1] + last[0] * last[1]) / total
            before[1], before[2] = total, before[2] + last[2]
    values = np.concatenate([np.full(int(size), mean) for mean, _, size in blocks])
    return Isotonic(tuple(scores.tolist()), tuple(values.tolist()))


def _flat(probabilities: Floats, targets: Floats) -> tuple[Floats, Floats]:
    p, y = np.asarray(probabilities, np.float64).ravel(), np.asarray(targets, np.float64).ravel()
    if p.shape != y.shape:
        raise ValueError(f"expected as many targets as scores, found {y.shape} and {p.shape}")
    known = ~(np.isnan(p) | np.isnan(y))
    return p[known], y[known]


def _log_odds(probabilities: Floats) -> Floats:
    p = np.clip(np.asarray(probabilities, np.float64), EDGE, 1 - EDGE)
    return np.asarray(np.log(p) - np.log1p(-p))
