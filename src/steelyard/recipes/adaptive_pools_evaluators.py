"""Evaluators of old samples, trained on their text: what says P(no fresh sample would be better) without the model.

A frozen encoder's vector of a (partial) answer in the light of its prompt, and its length, go into a logistic
regression on the soft labels of `data/restart_labels.py`. Nothing of a prompt is on two sides of a split: the
regression sees training prompts, its ridge and its calibration are chosen on validation prompts.

Shapes: P prompts, N samples of each, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steelyard.bench.calibration import Platt, fit_platt
from steelyard.bench.winrate import RIDGE, logistic_regression
from steelyard.data.sample_pool import SamplePool
from steelyard.data.sample_pool_imports import prefix
from steelyard.errors import DataError
from steelyard.rng import numpy_generator

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

RIDGES = (10.0, 100.0, 1000.0)
"""Penalties among which validation prompts choose."""


@dataclass(frozen=True)
class Split:
    """Prompts of one fold: int64 each, none in two of them."""

    train: Indices
    validation: Indices
    test: Indices


def splits(count: int, folds: int, seed: int) -> list[Split]:
    """Return folds of prompts 0..count - 1: each prompt is tested once and validates once.

    Raises:
        DataError: fewer prompts than folds.
    """
    if count < folds:
        raise DataError(f"expected at least {folds} prompts for {folds} folds, found {count}")
    parts = np.array_split(numpy_generator(seed, "adaptive/folds").permutation(count), folds)
    found = []
    for fold in range(folds):
        after = (fold + 1) % folds
        rest = [part for number, part in enumerate(parts) if number not in (fold, after)]
        found.append(Split(np.concatenate(rest), parts[after], parts[fold]))
    return found


def thinned(pool: SamplePool, kept: int, seed: int) -> SamplePool:
    """Return a pool with at most `kept` samples of every prompt, drawn at random prompt by prompt."""
    items = []
    for row, item in enumerate(pool):
        order = numpy_generator(seed, "adaptive/samples", row).permutation(len(item.rewards))
        items.append(item.take(order[:kept].tolist()))
    return SamplePool(tuple(items), source=pool.source)


@dataclass(frozen=True)
class Evaluator:
    """A calibrated logistic regression.

    Attributes:
        mean, scale: [F] of the training rows.
        weights: [1 + F], the offset first.
        platt: of validation rows.
        ridge: that was chosen.
    """

    mean: Floats
    scale: Floats
    weights: Floats
    platt: Platt
    ridge: float

    def probabilities(self, features: Floats) -> Floats:
        """Return [...] of features [..., F]."""
        flat = features.reshape(-1, features.shape[-1])
        raw = _sigmoid(_design(flat, self.mean, self.scale) @ self.weights)
        found: Floats = np.asarray(self.platt(raw), np.float64).reshape(features.shape[:-1])
        return found


def fit_evaluator(train: tuple[Floats, Floats], validation: tuple[Floats, Floats]) -> Evaluator:
    """Fit a regression for every ridge and keep the one with the least validation loss, calibrated there.

    Args:
        train: features [P, N, F] and targets [P, N] in 0..1.
        validation: of other prompts.
    """
    x, y = train[0].reshape(-1, train[0].shape[-1]), train[1].reshape(-1)
    held, targets = validation[0].reshape(-1, validation[0].shape[-1]), validation[1].reshape(-1)
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-6)
    best: tuple[float, Floats, float] | None = None
    for ridge in RIDGES:
        # the regression's own penalty is fixed: features that are smaller by a root are punished more
        small = np.sqrt(RIDGE / ridge)
        design = _design(x, mean, scale) * np.r_[1.0, np.full(x.shape[1], small)]
        weights = logistic_regression(design, y, np.ones((1, len(y))))[0] * np.r_[1.0, np.full(x.shape[1], small)]
        loss = _log_loss(_design(held, mean, scale) @ weights, targets)
        if best is None or loss < best[0]:
            best = (loss, weights, ridge)
    assert best is not None
    return Evaluator(mean, scale, best[1], fit_platt(_sigmoid(_design(held, mean, scale) @ best[1]), targets), best[2])


def _design(x: Floats, mean: Floats, scale: Floats) -> Floats:
    return np.concatenate([np.ones((len(x), 1)), (x - mean) / scale], 1)


def _sigmoid(z: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(z / 2)))


def _log_loss(z: Floats, y: Floats) -> float:
    return float(np.mean(np.logaddexp(0, z) - y * z))


def texts_of(pool: SamplePool, words: int | None = None) -> list[tuple[str, str]]:
    """Return (prompt, answer) of every sample, P N of them, answers cut after so many words."""
    return [(item.prompt, text if words is None else prefix(text, words)) for item in pool for text in item.texts]


def log_lengths(pool: SamplePool, words: int | None = None) -> Floats:
    """Return log(1 + words) of every (cut) sample, [P, N, 1]."""
    lengths = pool.array("lengths")
    return np.log1p(lengths if words is None else np.minimum(lengths, words))[..., None]


def unit_rewards(rewards: Floats, train: Indices) -> Floats:
    """Return rewards [P, N] moved to 0..1 by the range of the training prompts; those of 0 and 1 stay as they are."""
    low, high = float(rewards[train].min()), float(rewards[train].max())
    return np.clip((rewards - low) / max(high - low, 1e-12), 0, 1)
