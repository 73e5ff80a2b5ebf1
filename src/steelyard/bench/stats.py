"""Statistics of runs: interval estimates, paired comparisons, regret and selection. Pure functions of arrays.

Definitions and formulas stand in docs/statistics.md. Interquartile mean, stratified bootstrap and probability of
improvement follow Agarwal et al. (2021), "Deep RL at the edge of the statistical precipice"; the tests compare them
with rliable and scipy. Every random part takes a generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Statistic = Callable[[Floats], Floats]
"""Maps [..., N] to [...]: one number per set of N runs."""

CONFIDENCE = 0.95
RESAMPLES = 5000


@dataclass(frozen=True)
class Estimate:
    """A number with its interval. Without one it may only stand for a single run: a bare mean is refused."""

    value: float
    low: float | None
    high: float | None
    n: int
    """Runs (or pairs, or episodes) behind the number."""

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None) or self.n < 1:
            raise ValueError(f"an estimate needs n >= 1 and both ends of its interval or none, found {self}")
        if self.low is None and self.n > 1:
            raise ValueError(f"a mean over {self.n} runs needs its interval")

    def interval(self, digits: int = 2) -> str:
        """Return the interval in brackets, or '(one run)'."""
        if self.low is None or self.high is None:
            return "(one run)"
        return f"[{number(self.low, digits)}, {number(self.high, digits)}]"

    def text(self, digits: int = 2) -> str:
        """Return for example '0.95 [0.90, 0.98]'."""
        return f"{number(self.value, digits)} {self.interval(digits)}"

    def excludes_zero(self) -> bool:
        """Whether the interval exists and lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def number(value: float, digits: int = 2) -> str:
    """Format with fixed digits and without a negative zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def mean(scores: Floats) -> Floats:
    """Mean over the last axis."""
    return np.asarray(np.mean(scores, axis=-1))


def interquartile_mean(scores: Floats) -> Floats:
    """Mean over the last axis without the lowest and the highest floor(N / 4) values: [..., N] -> [...]."""
    cut = scores.shape[-1] // 4
    kept = np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut]
    return np.asarray(kept.mean(axis=-1))


def stratified_estimate(
    tasks: Sequence[Floats],
    statistic: Statistic,
    generator: np.random.Generator,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Return a statistic of all runs with its stratified bootstrap percentile interval.

    Args:
        tasks: one array [N_t] of run scores per task (stratum); runs are resampled within their task.
        statistic: applied to the runs of all tasks together.
        generator: source of the resamples.
        resamples: number of bootstrap samples.
        confidence: probability mass between the two percentiles.

    Returns:
        The estimate; without an interval if there is only one run in all.

    Raises:
        ValueError: a task has no runs.
    """
    if not tasks or any(len(task) == 0 for task in tasks):
        raise ValueError("every task needs at least one run")
    everything = np.concatenate(tasks)
    value = float(statistic(everything))
    if len(everything) == 1:
        return Estimate(value, None, None, 1)
    samples = np.concatenate([_resample(task, generator, resamples) for task in tasks], axis=-1)
    low, high = _percentiles(statistic(samples), confidence)
    return Estimate(value, float(low), float(high), len(everything))


def mean_estimate(
    runs: Floats, generator: np.random.Generator, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> Estimate:
    """Return the mean of runs [N] of one task with its bootstrap percentile interval."""
    return stratified_estimate([runs], mean, generator, resamples, confidence)


def cluster_estimate(
    values: Floats,
    clusters: Sequence[object],
    generator: np.random.Generator,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Return the mean of values that are not independent, with a bootstrap interval that resamples whole clusters.

    For example differences of two methods on the same user in several splits: the user is the cluster, for another
    split with the same user says little that is new.

    Args:
        values: [N].
        clusters: [N], what each value belongs to.
        generator: source of the resamples.
        resamples: number of bootstrap samples.
        confidence: probability mass between the two percentiles.

    Returns:
        The estimate, whose n is the number of clusters; without an interval if there is only one.
    """
    if len(values) != len(clusters) or not len(values):
        raise ValueError(f"expected as many clusters as values and at least one, found {len(clusters)}, {len(values)}")
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    rows = np.array([numbers[cluster] for cluster in clusters])
    count = len(numbers)
    value = float(np.mean(values))
    if count == 1:
        return Estimate(value, None, None, 1)
    sums, sizes = np.bincount(rows, values, count), np.bincount(rows, minlength=count)
    weights = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
    low, high = _percentiles((weights @ sums) / (weights @ sizes), confidence)
    return Estimate(value, float(low), float(high), count)


def bootstrap_band(
    curves: Floats, generator: np.random.Generator, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> tuple[Floats, Floats]:
    """Return pointwise percentile bounds ([P], [P]) of the mean of curves [N, P]; whole curves are resampled."""
    count = len(curves)
    # a resample of N curves is fixed by how often it takes each: weights [R, N], so memory does not grow with P
    weights = generator.multinomial(count, np.full(count, 1 / count), size=resamples) / count
    low, high = _percentiles(weights @ curves, confidence)
    return low, high


def wilson_interval(successes: int, episodes: int, confidence: float = CONFIDENCE) -> Estimate:
    """Return a success rate with its Wilson score interval (Wilson 1927), which treats episodes as independent."""
    if not 0 <= successes <= episodes or episodes < 1:
        raise ValueError(f"expected 0 <= successes <= episodes and episodes >= 1, found {successes} of {episodes}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / episodes
    scale = 1 + z**2 / episodes
    centre = (rate + z**2 / (2 * episodes)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / episodes + z**2 / (4 * episodes**2))
    # at the ends the bound is exactly the rate; rounding must not move it past
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == episodes else centre + half
    return Estimate(rate, low, high, episodes)


def sign_test(differences: Floats) -> float:
    """Return the exact two-sided p-value of "positive and negative differences are equally likely"; zeros drop out."""
    positive, negative = int(np.sum(differences > 0)), int(np.sum(differences < 0))
    total = positive + negative
    tail = sum(math.comb(total, k) for k in range(min(positive, negative) + 1))
    return min(1.0, tail / 2.0 ** (total - 1))


def probability_of_improvement(
    x: Sequence[Floats],
    y: Sequence[Floats],
    generator: np.random.Generator,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Return P(X > Y) + P(X = Y) / 2 for random runs of the same task, averaged over tasks (Mann-Whitney).

    Args:
        x: one array [N_t] of run scores per task.
        y: one array [M_t] per task, in the same order.
        generator: source of the resamples; runs of x and of y are resampled independently, within their task.
        resamples: number of bootstrap samples.
        confidence: probability mass between the two percentiles.
    """
    value = float(np.mean([_win_rate(a, b) for a, b in zip(x, y, strict=True)]))
    n = sum(min(len(a), len(b)) for a, b in zip(x, y, strict=True))
    if sum(map(len, x)) == 1 and sum(map(len, y)) == 1:
        return Estimate(value, None, None, 1)
    samples = [
        _win_rate(_resample(a, generator, resamples), _resample(b, generator, resamples))
        for a, b in zip(x, y, strict=True)
    ]
    low, high = _percentiles(np.mean(samples, axis=0), confidence)
    return Estimate(value, float(low), float(high), n)


def evaluation_regret(scores: Floats) -> float:
    """Return the mean of 1 - score over the online evaluation points [K], the one before the first step included."""
    return float(np.mean(1 - scores))


def training_regret(scores: Floats, completed: float = 1.0) -> float:
    """Return the mean of 1 - score over online training episodes [M].

    Args:
        scores: score of each finished training episode.
        completed: share of the planned environment steps that the run took; the rest counts with score 0.

    Raises:
        ValueError: no episodes, although steps were taken.
    """
    if not 0 <= completed <= 1 or (completed > 0 and len(scores) == 0):
        raise ValueError(f"expected training episodes for a completed share of {completed}, found {len(scores)}")
    return 1 - completed + (completed * float(np.mean(1 - scores)) if completed > 0 else 0.0)


def initial_dip(env_steps: Ints, scores: Floats) -> float:
    """Return the score at step 0 minus the lowest score soon after it; negative if the score only rose.

    Soon after: evaluations within the first tenth of the environment steps, at least the first two after step 0.

    Args:
        env_steps: [K] increasing, first 0.
        scores: [K].
    """
    if len(env_steps) < 2 or env_steps[0] != 0:
        raise ValueError("the initial dip needs an evaluation at step 0 and one after it")
    early = max(2, int(np.sum(env_steps[1:] <= 0.1 * env_steps[-1])))
    return float(scores[0] - scores[1 : 1 + early].min())


def budgeted_selection(
    episode_scores: Floats, budget: int, generator: np.random.Generator, repeats: int = 500
) -> float:
    """Return the score to expect when only `budget` evaluation episodes may be spent on choosing a checkpoint.

    A UCB1 bandit (Auer et al. 2002) spends the episodes on checkpoints; the one with the highest mean wins (the latest
    of equals) and is scored on episodes that the bandit never saw. Averaged over random splits and draws.

    Args:
        episode_scores: [C, E] scores in 0..1 of E >= 2 evaluation episodes of each of C checkpoints, in training order.
        budget: evaluation episodes to spend, at least 1.
        generator: splits the episodes and draws from them.
        repeats: number of simulated selections.
    """
    checkpoints, episodes = episode_scores.shape
    if episodes < 2 or budget < 1:
        raise ValueError(
            f"selection needs two episodes a checkpoint and a budget of one, found {episodes} and {budget}"
        )
    shuffled = generator.permuted(np.broadcast_to(episode_scores, (repeats, checkpoints, episodes)), axis=-1)
    seen, held_out = shuffled[..., : episodes // 2], shuffled[..., episodes // 2 :].mean(axis=-1)

    rows = np.arange(repeats)
    first_arms = generator.permuted(np.tile(np.arange(checkpoints), (repeats, 1)), axis=-1)
    counts, totals = np.zeros((repeats, checkpoints)), np.zeros((repeats, checkpoints))
    for pull in range(budget):
        if pull < checkpoints:
            arms = first_arms[:, pull]
        else:
            arms = np.argmax(totals / counts + np.sqrt(2 * math.log(pull) / counts), axis=-1)
        # with replacement: a budget may exceed the stored episodes
        totals[rows, arms] += seen[rows, arms, generator.integers(seen.shape[-1], size=repeats)]
        counts[rows, arms] += 1
    means = np.where(counts > 0, totals / np.maximum(counts, 1), -np.inf)
    latest_best = checkpoints - 1 - np.argmax(means[:, ::-1], axis=-1)
    return float(held_out[rows, latest_best].mean())


def _resample(runs: Floats, generator: np.random.Generator, resamples: int) -> Floats:
    """[N] -> [R, N], with replacement."""
    return runs[generator.integers(len(runs), size=(resamples, len(runs)))]


def _percentiles(samples: Floats, confidence: float) -> tuple[Floats, Floats]:
    """Return the two percentiles over axis 0."""
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def _win_rate(x: Floats, y: Floats) -> Floats:
    """[..., N] and [..., M] -> [...]: share of pairs that x wins, ties half."""
    difference = x[..., :, None] - y[..., None, :]
    return np.asarray(np.mean((difference > 0) + 0.5 * (difference == 0), axis=(-2, -1)))
