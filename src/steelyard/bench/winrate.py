r"""Win rates of one policy's completions against another's, and their length-controlled variant.

Win rate: on every prompt the share of pairs of completions (one of each policy) that the policy wins, ties half; the
mean over prompts. Completions of one prompt are not independent, so intervals resample prompts.

Length-controlled: Dubois, Galambosi, Liang, Hashimoto, "Length-Controlled AlpacaEval: A Simple Way to Debias Automatic
Evaluators" (COLM 2024). Preferences p are regressed on the difference of lengths d in units of its standard deviation
s, and, where it is known, on how hard a prompt is for everyone:

    P(policy preferred on x) = \sigma(\theta + \phi \tanh(d / s) + \psi \gamma_x)
    LC win rate = mean over prompts of \sigma(\theta + \psi \gamma_x)

the win rate that would be expected of completions as long as the baseline's. Swapping the policies turns p into 1 - p
and d into -d, hence \theta, \psi into -\theta, -\psi: Win(m, b) = 1 - Win(b, m) and Win(m, m) = 1/2.

| symbol | code |
|---|---|
| p | `preferences` [N] in 0..1 |
| d | `length_differences` [N], policy minus baseline |
| \gamma_x | `difficulty` [N], or None |
| \theta, \phi, \psi | coefficients, in this order |

Differences from the paper: a ridge of `RIDGE` in place of the cross-validated L1 penalty; no judgements of a baseline
asked to be short or long to steady \phi. Between two policies \gamma is unknown and left out; on AlpacaEval's own data
that is the difference that matters (docs/evaluation_text.md): where one policy is always the shorter one, d and \theta
are hard to tell apart, and the rate is drawn to 1/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steelyard.bench.stats import CONFIDENCE, Estimate, Floats, Ints, mean_estimate
from steelyard.errors import DataError

RIDGE = 1e-3
"""Weight of |coefficients|^2 / 2 against the summed log-likelihood: nothing, unless the data are separable."""
RESAMPLES = 1000


@dataclass(frozen=True)
class WinRate:
    """What a comparison of two policies says.

    Attributes:
        rate: win rate with its interval over prompts; `n` counts prompts.
        length_controlled: the same at equal lengths; None where lengths are unknown.
        length_effect: phi; above 0 the scorer prefers longer completions.
        ties: share of compared pairs that tie.
        prompts: prompts compared.
        unscorable: prompts left out, because every completion of one side was unscorable.
    """

    rate: Estimate
    length_controlled: Estimate | None
    length_effect: float | None
    ties: float
    prompts: int
    unscorable: int


def compare(
    scores: Floats,
    baseline_scores: Floats,
    prompt_of: Ints,
    baseline_prompt_of: Ints,
    generator: np.random.Generator,
    lengths: Floats | None = None,
    baseline_lengths: Floats | None = None,
) -> WinRate:
    """Compare scored completions of a policy and of a baseline, on the prompts that both have.

    Args:
        scores: [N] of the policy's completions; NaN is unscorable and left out.
        baseline_scores: [M] of the baseline's.
        prompt_of: [N], which prompt each belongs to.
        baseline_prompt_of: [M], the same numbers.
        generator: of the bootstrap.
        lengths: [N] in any unit; with `baseline_lengths` [M] gives the length-controlled rate.
        baseline_lengths: see `lengths`.

    Raises:
        DataError: no prompt has a scored completion of both.
    """
    preferences, differences, owners, left_out = [], [], [], 0
    for prompt in np.intersect1d(prompt_of, baseline_prompt_of):
        a = np.flatnonzero((prompt_of == prompt) & ~np.isnan(scores))
        b = np.flatnonzero((baseline_prompt_of == prompt) & ~np.isnan(baseline_scores))
        if len(a) == 0 or len(b) == 0:
            left_out += 1
            continue
        gap = scores[a][:, None] - baseline_scores[b][None, :]
        preferences.append(((gap > 0) + 0.5 * (gap == 0)).ravel())
        owners.append(np.full(gap.size, prompt))
        if lengths is not None and baseline_lengths is not None:
            differences.append((lengths[a][:, None] - baseline_lengths[b][None, :]).ravel())
    if not preferences:
        raise DataError("win rate: expected at least one prompt with a scored completion of both sides, found none")
    preference, prompt_of_pair = np.concatenate(preferences), np.concatenate(owners)
    rate = win_rate(preference, prompt_of_pair, generator)
    controlled, effect = None, None
    if differences:
        difference = np.concatenate(differences)
        controlled, effect = length_controlled(preference, difference, prompt_of_pair, generator)
    return WinRate(rate, controlled, effect, float(np.mean(preference == 0.5)), rate.n, left_out)


def win_rate(preferences: Floats, prompt_of: Ints, generator: np.random.Generator) -> Estimate:
    """Return the mean over prompts of the mean preference [N] on each, with a bootstrap interval over prompts."""
    _, number = np.unique(prompt_of, return_inverse=True)
    return mean_estimate(np.bincount(number, preferences) / np.bincount(number), generator)


def length_controlled(
    preferences: Floats,
    length_differences: Floats,
    prompt_of: Ints,
    generator: np.random.Generator,
    difficulty: Floats | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> tuple[Estimate, float]:
    """Return the length-controlled win rate with its interval over prompts, and the effect of length phi.

    Args:
        preferences: [N] in 0..1, 1 where the policy wins; probabilities of a judge will do.
        length_differences: [N], policy minus baseline, in any unit.
        prompt_of: [N]; prompts count alike, however many comparisons they have.
        generator: of the bootstrap.
        difficulty: [N], the same for all comparisons of a prompt, e.g. the logit of what many policies win on it.
        resamples: number of bootstrap samples; each is fitted anew.
        confidence: probability mass between the two percentiles.
    """
    _, number = np.unique(prompt_of, return_inverse=True)
    count = int(number.max()) + 1
    share = 1 / np.bincount(number)[number]
    # where all differences are equal, any scale will do
    scale = float(np.std(length_differences) or np.max(np.abs(length_differences)) or 1.0)
    x = np.stack([np.ones(len(preferences)), np.tanh(length_differences / scale)], axis=1)
    if difficulty is not None:
        x = np.concatenate([x, difficulty[:, None]], axis=1)
    equal = x * np.array([1.0, 0.0, 1.0])[: x.shape[1]]  # as if no completion were longer

    def rates(fits: Floats, weights: Floats) -> Floats:
        return np.asarray((weights * _sigmoid(fits @ equal.T)).sum(1) / weights.sum(1))

    fit = logistic_regression(x, preferences, share[None])
    value, effect = float(rates(fit, share[None])[0]), float(fit[0, 1])
    if count == 1:
        return Estimate(value, None, None, 1), effect
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples)  # how often each prompt, [R, P]
    weights = drawn[:, number] * share
    found = rates(logistic_regression(x, preferences, weights), weights)
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high), count), effect


def logistic_regression(x: Floats, y: Floats, weights: Floats, steps: int = 50, tolerance: float = 1e-10) -> Floats:
    """Return the ridge maximum-likelihood coefficients [R, D] of R weighted logistic regressions, by Newton's method.

    Steps are halved where they would not raise the likelihood, so that separable data converge too.

    Args:
        x: features [N, D].
        y: targets [N] in 0..1.
        weights: [R, N], a row for each regression.
        steps: most Newton steps.
        tolerance: largest last step.
    """
    beta = np.zeros((len(weights), x.shape[1]))
    likelihood = _log_likelihood(beta, x, y, weights)
    for _ in range(steps):
        p = _sigmoid(beta @ x.T)
        gradient = (weights * (y - p)) @ x - RIDGE * beta
        curvature = np.einsum("rn,nd,ne->rde", weights * p * (1 - p), x, x, optimize=True)
        step = np.linalg.solve(curvature + RIDGE * np.eye(x.shape[1]), gradient[..., None])[..., 0]
        for _ in range(30):
            moved = _log_likelihood(beta + step, x, y, weights)
            worse = moved < likelihood - 1e-12 * np.abs(likelihood)
            if not worse.any():
                break
            step[worse] /= 2
        beta, likelihood = beta + step, moved
        if np.abs(step).max() < tolerance:
            break
    return beta


def _log_likelihood(beta: Floats, x: Floats, y: Floats, weights: Floats) -> Floats:
    """[R, D] -> [R], with the ridge."""
    z = beta @ x.T
    fit = (weights * (y * z - np.logaddexp(0, z))).sum(1)
    return np.asarray(fit - RIDGE / 2 * (beta**2).sum(1))


def _sigmoid(z: npt.ArrayLike) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(np.asarray(z) / 2)))


def prompt_numbers(prompts: Sequence[str], baseline_prompts: Sequence[str]) -> tuple[Ints, Ints]:
    """Return ([N], [M]) numbers of prompts, equal where the prompts are."""
    known: dict[str, int] = {}
    for prompt in (*prompts, *baseline_prompts):
        known.setdefault(prompt, len(known))
    return np.array([known[p] for p in prompts], np.int64), np.array([known[p] for p in baseline_prompts], np.int64)
