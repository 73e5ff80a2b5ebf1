r"""What a way of spending compute is worth: shared by all parts of the adaptive-compute study.

    FG = (R_policy - R_1) / (R_N - R_1)

is the fraction of the gain of best-of-N over one sample at temperature 1 that a policy keeps. All its terms are means
over the same prompts, so its interval resamples prompts, the same ones in every term. Where best-of-N gains little, FG
is a ratio of noise: no interval is given unless the gain itself is above zero.

The gate: a fraction of a gain means something only if there is one. The evaluator must tell good from bad samples of
one prompt, and best-of-N by its scores must recover half of what an oracle gets; otherwise greedy decoding looks like a
triumph of adaptive sampling.

Shapes: P prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steelyard.adapt.compute_policy import Trace
from steelyard.bench.stats import CONFIDENCE, Estimate, number
from steelyard.errors import DataError
from steelyard.report.tables import Cell, Table
from steelyard.rng import numpy_generator

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
"""Of prompts."""
ENDS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
"""Quantiles of the resamples between which an interval lies."""
GATE_AUC = 0.75
"""Least AUC within prompts."""
GATE_GAIN = 0.5
"""Least share of the oracle's gain that best-of-N recovers."""


@dataclass(frozen=True)
class Outcome:
    """One way of spending compute, prompt by prompt.

    Attributes:
        name: what tables call it.
        rewards: [P] of the answers that were given (means, where several orders of the samples were tried).
        samples: [P] samples started.
        decoded: [P] tokens decoded.
        evaluated: [P] tokens read for self-evaluations.
    """

    name: str
    rewards: Floats
    samples: Floats
    decoded: Floats
    evaluated: Floats

    def __post_init__(self) -> None:
        shapes = {np.shape(x) for x in (self.rewards, self.samples, self.decoded, self.evaluated)}
        if len(shapes) != 1 or len(self.rewards) == 0:
            raise DataError(f"outcome {self.name!r}: expected four arrays of one length above 0, found {shapes}")
        if not np.isfinite(self.rewards).all():
            raise DataError(f"outcome {self.name!r}: rewards of {int(np.sum(~np.isfinite(self.rewards)))} prompts are "
                            "not finite; leave prompts without a known reward out")  # fmt: skip

    def take(self, rows: npt.NDArray[np.int64]) -> Outcome:
        """Return the given prompts only."""
        return Outcome(self.name, self.rewards[rows], self.samples[rows], self.decoded[rows], self.evaluated[rows])


def outcome(name: str, traces: Sequence[Trace]) -> Outcome:
    """Return what traces of P prompts come to; rewards are those of the chosen samples."""
    return Outcome(
        name,
        np.array([trace.draws[trace.chosen].reward for trace in traces], np.float64),
        np.array([trace.samples for trace in traces], np.float64),
        np.array([trace.decoded for trace in traces], np.float64),
        np.array([trace.evaluated for trace in traces], np.float64),
    )


def averaged(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the mean over several outcomes of the same prompts, e.g. over orders of their samples."""
    return _merged(outcomes, lambda arrays: np.mean(arrays, axis=0))


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcomes of different prompts, e.g. of several seeds, as one."""
    return _merged(outcomes, np.concatenate)


def _merged(outcomes: Sequence[Outcome], merge: Callable[[list[Floats]], Floats]) -> Outcome:
    fields = ("rewards", "samples", "decoded", "evaluated")
    return Outcome(outcomes[0].name, *(merge([getattr(one, name) for one in outcomes]) for name in fields))


def average(values: Floats) -> Estimate:
    """Return the mean over prompts with its bootstrap interval."""
    low, high = np.quantile(_weights(len(values)) @ values, ENDS)
    return Estimate(float(np.mean(values)), float(low), float(high), len(values))


def fraction_of_gain(policy: Outcome, one: Outcome, best: Outcome, minus: Outcome | None = None) -> Estimate | None:
    """Return FG with its paired bootstrap interval over prompts.

    Args:
        policy: what is asked about.
        one: one sample at temperature 1.
        best: best-of-N by the same scores.
        minus: if given, the difference FG(policy) - FG(minus) is returned.

    Returns:
        None where the gain of best-of-N is not above zero in 97.5% of the resamples: there is nothing to take a
        fraction of.
    """
    base = one.rewards if minus is None else minus.rewards
    over, gain = policy.rewards - base, best.rewards - one.rewards
    weights = _weights(len(gain))
    gains = weights @ gain
    if np.quantile(gains, ENDS[0]) <= 0:
        return None
    ratios = (weights @ over)[gains > 0] / gains[gains > 0]
    low, high = np.quantile(ratios, ENDS)
    return Estimate(float(over.mean() / gain.mean()), float(low), float(high), len(gain))


@functools.lru_cache(maxsize=2)
def _weights(count: int) -> Floats:
    """Return resamples of prompts [R, P]: how often each takes which, over P; the same for every statistic."""
    drawn = numpy_generator(0, "adaptive/prompts").multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return drawn / count


def beyond(estimate: Estimate | None, target: float) -> Estimate | None:
    """Return the estimate less a target, for a verdict from its interval (`preference_findings.above`)."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return None
    return Estimate(estimate.value - target, estimate.low - target, estimate.high - target, estimate.n)


def choose_threshold(curve: Sequence[tuple[float, Outcome]], samples: float) -> float:
    """Return the threshold with the highest mean reward among those with at most so many samples on average.

    Args:
        curve: thresholds with their outcomes on validation prompts, never on the prompts of the tables.
        samples: most samples on average; where every threshold takes more, the one with the fewest is returned.
    """
    within = [(threshold, found) for threshold, found in curve if found.samples.mean() <= samples]
    if not within:
        return min(curve, key=lambda pair: float(pair[1].samples.mean()))[0]
    return max(within, key=lambda pair: (float(pair[1].rewards.mean()), -float(pair[1].samples.mean())))[0]


def recovered(one: Outcome, best: Outcome, oracle: Outcome) -> Estimate | None:
    """Return the share of the oracle's gain over one sample that best-of-N recovers."""
    return fraction_of_gain(best, one, oracle)


def gate(within_auc: float, one: Outcome, best: Outcome, oracle: Outcome) -> tuple[bool, str]:
    """Return whether fractions of gain mean something here, and why in a sentence."""
    share = recovered(one, best, oracle)
    passed = within_auc >= GATE_AUC and share is not None and share.value >= GATE_GAIN
    gained = "the oracle gains nothing" if share is None else f"best-of-N recovers {share.text()} of the oracle's gain"
    says = "The gate holds" if passed else "The evaluator is too weak for the headline"
    return passed, (
        f"{says}: AUC within prompts {number(within_auc)} (asked: at least {GATE_AUC:g}), {gained} (asked: at least "
        f"{GATE_GAIN:g})."
    )


def cost_row(policy: Outcome, one: Outcome, best: Outcome) -> tuple[Cell, ...]:
    """Return name | reward | samples | tokens decoded | tokens evaluated | FG."""
    fraction = fraction_of_gain(policy, one, best)
    return (
        policy.name,
        average(policy.rewards),
        average(policy.samples),
        average(policy.decoded),
        number(float(policy.evaluated.mean()), 1),
        fraction if fraction is not None else "no gain",
    )


def cost_table(outcomes: Sequence[Outcome], one: Outcome, best: Outcome, title: str, note: str) -> Table:
    """Return a table of ways to spend compute on the same prompts."""
    return Table(
        title,
        f"{note} {len(one.rewards)} prompts; brackets are 95% bootstrap intervals over prompts. Fraction of gain: "
        f"(reward - that of {one.name!r}) / (that of {best.name!r} - that of {one.name!r}), paired over prompts.",
        ("way", "reward", "samples started", "tokens decoded", "tokens evaluated", "fraction of gain"),
        tuple(cost_row(policy, one, best) for policy in outcomes),
    )
