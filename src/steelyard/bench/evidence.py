"""What a model, a preference set and a reward look like together: measures with intervals, for `bench/advise.py`.

| question | measured by |
|---|---|
| where is the reward's peak? | samples near the best reward known; best-of-N; how likely the chosen ones are |
| are the pairs distinct? | normalised edit distance, shared tokens, log-prob and length differences |
| are the data on-policy? | per-token log-ratio, two-sample tests, overlap |
| can the reward be trusted? | agreement with the pairs, lengths that the pairs cover |

Everything is a pure function of arrays (`Observations`); intervals are over prompts, for samples of one prompt
resemble each other.

Shapes: P prompts, N samples a prompt, K pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steelyard.bench.stats import Estimate, mean_estimate, number, wilson_interval
from steelyard.errors import DataError
from steelyard.rng import numpy_generator

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# "Near" the peak is within so many within-prompt standard deviations of the best reward known.
PEAK_WIDTH = 0.5
# What is central in the samples' lengths and log-probs.
CENTRAL = (0.05, 0.95)
PERMUTATIONS = 999
# Share of unfinished samples from which on their lengths and rewards say little.
MANY_CUT = 0.1


@dataclass(frozen=True)
class PairObservations:
    """What was seen of a preference set; column 0 is the chosen completion, column 1 the rejected one.

    Attributes:
        prompt: int64 [K], which of the P prompts.
        lengths: [K, 2] tokens.
        logps: [K, 2], summed over tokens, under the model.
        head_lengths: [K, 2] tokens up to the limit of a sample's: what is compared with samples.
        head_logps: [K, 2], summed over these; log-probs per token rise along a text, so that longer text would differ.
        distances: [K], edit distance over the longer one's length.
        shared: [K], share of common tokens, whatever their order.
        rewards: [K, 2] of the scorer, NaN where unscorable; None without a scorer.
    """

    prompt: Ints
    lengths: Floats
    logps: Floats
    head_lengths: Floats
    head_logps: Floats
    distances: Floats
    shared: Floats
    rewards: Floats | None = None


@dataclass(frozen=True)
class Observations:
    """What was seen of a model: N samples of each of P prompts, and the pairs of these prompts.

    Attributes:
        lengths: [P, N] tokens.
        logps: [P, N], summed over tokens.
        cut: bool [P, N], stopped by the limit of tokens instead of the end of text.
        rewards: [P, N], NaN where unscorable; None without a scorer.
        pairs: None without a preference set.
        learned: the scorer is a reward model; its rewards mean something within a prompt only.
        peak: the highest reward there can be, where it is known.
    """

    lengths: Floats
    logps: Floats
    cut: npt.NDArray[np.bool_]
    rewards: Floats | None = None
    pairs: PairObservations | None = None
    learned: bool = False
    peak: float | None = None


@dataclass(frozen=True)
class Measure:
    """A number with its interval, in words.

    Attributes:
        key: name in JSON.
        label: what it is.
        estimate: the number.
        digits: to print.
        note: how to read it.
        exact: has no interval (a p-value is no mean).
    """

    key: str
    label: str
    estimate: Estimate
    digits: int = 2
    note: str = ""
    exact: bool = False

    def cells(self) -> tuple[str, str]:
        """Return the number and its interval, as text."""
        interval = "" if self.exact else self.estimate.interval(self.digits)
        return number(self.estimate.value, self.digits), interval

    def text(self) -> str:
        """Return for example 'samples near the peak: 0.01 [0.00, 0.03]'."""
        return f"{self.label}: {' '.join(self.cells())}".rstrip()


@dataclass(frozen=True)
class Evidence:
    """All measures of a case.

    Attributes:
        questions: {question: its measures}.
        warnings: what makes them doubtful.
        cut: share of samples that were cut at the limit of new tokens.
    """

    questions: dict[str, tuple[Measure, ...]]
    warnings: tuple[str, ...] = ()
    cut: float = 0.0

    def find(self, key: str) -> Measure | None:
        """Return the measure of that key, or None if it could not be taken."""
        return next((m for found in self.questions.values() for m in found if m.key == key), None)


def best_of(rewards: Floats, k: int) -> Floats:
    """Return the expected maximum of k of the N rewards, [P, N] -> [P]: exact over all subsets, without replacement."""
    n = rewards.shape[1]
    weights = np.array([math.comb(i, k - 1) for i in range(n)], np.float64) / math.comb(n, k)
    return np.asarray(np.sort(rewards, axis=1) @ weights)


def share_estimate(hits: Floats, groups: Ints) -> Estimate:
    """Return the mean of hits in [0, 1] with a Wilson interval whose sample size is cut by the design effect.

    Samples of one prompt resemble each other: n of them are worth n / d, where d is the variance of the mean over
    prompts by the variance that independent rows would give.
    """
    rate, count = float(hits.mean()), len(hits)
    effect = 1.0
    if 0 < rate < 1:
        labels = np.unique(groups, return_inverse=True)[1]
        sums = np.bincount(labels, hits - rate)
        if len(sums) > 1:
            variance = float((sums**2).sum()) / count**2 * len(sums) / (len(sums) - 1)
            effect = max(1.0, variance / (rate * (1 - rate) / count))
    size = max(1, int(count / effect))
    inner = wilson_interval(round(rate * size), size)
    assert inner.low is not None
    assert inner.high is not None
    return Estimate(rate, min(inner.low, rate), max(inner.high, rate), count)


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the Levenshtein distance, bit-parallel (Myers 1999): one step for each token of `b`."""
    if not a:
        return len(b)
    where: dict[int, int] = {}
    for position, token in enumerate(a):
        where[token] = where.get(token, 0) | 1 << position
    last, full = 1 << (len(a) - 1), (1 << len(a)) - 1
    rises, falls, distance = full, 0, len(a)  # of the column of the distance table, as bits
    for token in b:
        match = where.get(token, 0)
        diagonal = (((match & rises) + rises) ^ rises) | match | falls
        right_rises = falls | (~(diagonal | rises) & full)
        right_falls = rises & diagonal
        distance += bool(right_rises & last) - bool(right_falls & last)
        right_rises = (right_rises << 1 | 1) & full
        right_falls = right_falls << 1 & full
        rises = right_falls | (~(diagonal | right_rises) & full)
        falls = right_rises & diagonal
    return distance


def shared_tokens(a: Sequence[int], b: Sequence[int]) -> float:
    """Return the share of common tokens whatever their order: 2 |a and b| / (|a| + |b|), counted with repetitions."""
    return 2 * (Counter(a) & Counter(b)).total() / max(len(a) + len(b), 1)


def two_sample_test(values: Floats, foreign: npt.NDArray[np.bool_], groups: Ints, seed: int = 0) -> tuple[float, float]:
    """Return (Kolmogorov-Smirnov distance, p-value) of data against samples.

    The p-value is that of permuting who is who within each prompt, so that prompts that differ from each other cannot
    make a difference.
    """
    order = np.argsort(groups, kind="stable")
    values, foreign, groups = values[order], foreign[order], groups[order]
    generator = numpy_generator(seed, "advise/permutations")
    keys = generator.random((PERMUTATIONS, len(values))) + np.unique(groups, return_inverse=True)[1] * 2.0
    shuffled = foreign[np.argsort(keys, axis=1)]
    by_value = np.argsort(values, kind="stable")
    ends = np.append(np.diff(values[by_value]) > 0, True)  # a step of both distribution functions at once where equal
    steps = np.where(np.vstack([foreign, shuffled])[:, by_value], 1 / foreign.sum(), -1 / (~foreign).sum())
    distances = np.abs(np.cumsum(steps, axis=1))[:, ends].max(1)
    above = int((distances[1:] >= distances[0] - 1e-12).sum())
    return float(distances[0]), (above + 1) / (PERMUTATIONS + 1)


# --- measures -------------------------------------------------------------------------------------------------------


def measure(seen: Observations, seed: int = 0) -> Evidence:
    """Return every measure that the observations allow."""
    questions: dict[str, tuple[Measure, ...]] = {}
    warnings: list[str] = []
    if len(seen.lengths) < 20:
        warnings.append(f"only {len(seen.lengths)} prompts: the intervals are rough")
    cut = float(seen.cut.mean())
    if cut > MANY_CUT:
        warnings.append(
            f"{cut:.0%} of the samples were cut at the limit of new tokens: their lengths and rewards are those of "
            "unfinished text; raise --max-new-tokens"
        )
    peak = _peak(seen, seed, warnings)
    if peak:
        questions["where is the reward's peak?"] = tuple(peak)
    if seen.pairs is not None:
        questions["are the pairs distinct?"] = tuple(_distinct(seen.pairs, seed))
        questions["are the data on-policy?"] = tuple(_on_policy(seen, seen.pairs, seed))
    trust = _trust(seen)
    if trust:
        questions["can the reward be trusted?"] = tuple(trust)
    return Evidence(questions, tuple(warnings), cut)


def _peak(seen: Observations, seed: int, warnings: list[str]) -> list[Measure]:
    found: list[Measure] = []
    rewards, pairs = seen.rewards, seen.pairs
    if rewards is not None:
        whole = np.asarray(~np.isnan(rewards).any(1))
        if not whole.any():
            raise DataError("the scorer scored no prompt's samples all: there is nothing to measure")
        if not whole.all():
            warnings.append(
                f"{int((~whole).sum())} prompts with unscorable samples were left out of the reward's measures"
            )
        numbers = _numbers(rewards[whole])
        found.append(Measure("reward", "mean reward of a sample", _mean(rewards[whole].mean(1), seed), numbers))
        k = 2
        while k <= rewards.shape[1]:
            estimate = _mean(best_of(rewards[whole], k), seed)
            found.append(Measure(f"best_of_{k}", f"best of {k} samples", estimate, numbers))
            k *= 2
        near = _near_peak(seen, whole)
        if near is None:
            warnings.append("all samples have the same reward: it says nothing about where the peak lies")
        else:
            found.append(
                Measure(
                    "near_peak",
                    "share of samples near the best reward known",
                    near,
                    3,
                    f"within {PEAK_WIDTH} standard deviations of it",
                )
            )
    if pairs is None:
        return found
    each = _per_token(pairs.head_logps, pairs.head_lengths)[:, 0]
    own = _per_token(seen.logps, seen.lengths)
    gap = each - own.mean(1)[pairs.prompt]
    below = (each < np.median(own, axis=1)[pairs.prompt]).astype(np.float64)
    found += [
        Measure(
            "chosen_log_ratio",
            "log-prob per token of the chosen less that of samples",
            _by_prompt(gap, pairs.prompt, seed),
        ),
        Measure(
            "chosen_atypical",
            "share of chosen less likely than a typical sample",
            share_estimate(below, pairs.prompt),
            note="0.5 if the model had written them",
        ),
    ]
    if rewards is not None and pairs.rewards is not None:
        chosen = pairs.rewards[:, 0]
        rows = ~np.isnan(chosen) & ~np.isnan(rewards[pairs.prompt]).any(1)
        if rows.any():
            group = rewards[pairs.prompt[rows]]
            rank = (group < chosen[rows, None]).mean(1) + 0.5 * (group == chosen[rows, None]).mean(1)
            found.append(
                Measure(
                    "chosen_quantile",
                    "quantile of the chosen's reward among samples",
                    _by_prompt(rank, pairs.prompt[rows], seed),
                    note="0.5 if the model had written them",
                )
            )
    return found


def _near_peak(seen: Observations, whole: npt.NDArray[np.bool_]) -> Estimate | None:
    """Return the share of samples near the best reward known (PEAK_WIDTH deviations); None if all are equal."""
    assert seen.rewards is not None
    rewards = seen.rewards[whole]
    # a Bradley-Terry reward is known up to a constant of each prompt
    centre = rewards.mean(1, keepdims=True) if seen.learned else np.zeros((len(rewards), 1))
    known = [rewards - centre]
    if seen.pairs is not None and seen.pairs.rewards is not None:
        position = np.cumsum(whole) - 1
        rows = whole[seen.pairs.prompt]
        known.append(seen.pairs.rewards[rows] - centre[position[seen.pairs.prompt[rows]]])
    best = float(np.nanmax(np.concatenate([x.ravel() for x in known]))) if seen.peak is None else seen.peak
    spread = math.sqrt(float(rewards.var(axis=1, ddof=1).mean()))
    if spread == 0 and np.ptp(known[0]) == 0 and best <= float(known[0].max()):
        return None
    hits = (known[0] >= best - PEAK_WIDTH * spread).astype(np.float64)
    return share_estimate(hits.ravel(), np.repeat(np.arange(len(rewards)), rewards.shape[1]))


def _distinct(pairs: PairObservations, seed: int) -> list[Measure]:
    each = _per_token(pairs.logps, pairs.lengths)
    longer = np.sign(pairs.lengths[:, 0] - pairs.lengths[:, 1]) / 2 + 0.5
    return [
        Measure(
            "edit_distance",
            "normalised edit distance of chosen and rejected",
            _by_prompt(pairs.distances, pairs.prompt, seed),
            note="0: the same text; 1: nothing in common",
        ),
        Measure("shared_tokens", "share of tokens they have in common", _by_prompt(pairs.shared, pairs.prompt, seed)),
        Measure(
            "log_prob_gap",
            "log-prob per token of the chosen less that of the rejected",
            _by_prompt(each[:, 0] - each[:, 1], pairs.prompt, seed),
        ),
        Measure(
            "length_gap",
            "tokens of the chosen less those of the rejected",
            _by_prompt(pairs.lengths[:, 0] - pairs.lengths[:, 1], pairs.prompt, seed),
            1,
        ),
        Measure(
            "longer_chosen",
            "share of pairs with the longer one chosen",
            share_estimate(longer, pairs.prompt),
            note="equal lengths count half",
        ),
    ]


def _on_policy(seen: Observations, pairs: PairObservations, seed: int) -> list[Measure]:
    count = seen.lengths.shape[1]
    own_prompt = np.repeat(np.arange(len(seen.lengths)), count)
    prompt = np.repeat(pairs.prompt, 2)
    own = np.stack([seen.lengths.ravel(), _per_token(seen.logps, seen.lengths).ravel()])
    data = np.stack([pairs.head_lengths.ravel(), _per_token(pairs.head_logps, pairs.head_lengths).ravel()])
    ratio = data[1] - _per_token(seen.logps, seen.lengths).mean(1)[prompt]
    found = [
        Measure(
            "log_ratio", "log-prob per token of the data less that of samples", _by_prompt(ratio, prompt, seed),
            note="0 if the model had written them",
        ),
    ]  # fmt: skip
    for row, (key, label) in enumerate((("length", "lengths"), ("log_prob", "log-probs per token"))):
        foreign = np.arange(data.shape[1] + own.shape[1]) < data.shape[1]
        distance, p = two_sample_test(
            np.concatenate([data[row], own[row]]), foreign, np.concatenate([prompt, own_prompt]), seed
        )
        note = f"Kolmogorov-Smirnov distance {number(distance)}, permuted within prompts"
        found.append(
            Measure(f"{key}_test", f"p-value that the {label} of data and samples are alike",
                    Estimate(p, p, p, data.shape[1]), 3, note, exact=True)
        )  # fmt: skip
    # the region is drawn on every other sample and tried on the rest, so that both shares are of unseen points
    low, high = np.quantile(own[:, 0::2], CENTRAL, axis=1)
    inside = [((x >= low[:, None]) & (x <= high[:, None])).all(0).astype(np.float64) for x in (data, own[:, 1::2])]
    share, usual = share_estimate(inside[0], prompt), share_estimate(inside[1], own_prompt[1::2])
    overlap = Estimate(
        min(1.0, share.value / max(usual.value, 1e-9)),
        min(1.0, (share.low or 0.0) / max(usual.high or 0.0, 1e-9)),
        min(1.0, (share.high or 0.0) / max(usual.low or 0.0, 1e-9)),
        share.n,
    )
    return [
        *found,
        Measure("overlap", "data inside the samples' region, relative to samples", overlap,
                note="1 if the model had written them"),
    ]  # fmt: skip


def _trust(seen: Observations) -> list[Measure]:
    pairs = seen.pairs
    if pairs is None or pairs.rewards is None or seen.rewards is None:
        return []
    found: list[Measure] = []
    rows = ~np.isnan(pairs.rewards).any(1)
    if rows.any():
        agrees = np.sign(pairs.rewards[rows, 0] - pairs.rewards[rows, 1]) / 2 + 0.5
        found.append(
            Measure(
                "agreement",
                "share of pairs that the scorer orders as the data do",
                share_estimate(agrees, pairs.prompt[rows]),
                note="optimistic if the reward model was trained on these pairs",
            )
        )
    whole = ~np.isnan(seen.rewards).any(1)
    if seen.learned and whole.any():
        low, high = np.quantile(pairs.lengths, (0.01, 0.99))
        best = seen.lengths[whole][np.arange(int(whole.sum())), seen.rewards[whole].argmax(1)]
        covered = ((best >= low) & (best <= high)).astype(np.float64)
        found.append(
            Measure(
                "coverage",
                f"share of best-of-{seen.lengths.shape[1]} samples whose length the pairs cover",
                share_estimate(covered, np.flatnonzero(whole)),
                note=f"lengths {low:.0f} to {high:.0f} tokens",
            )
        )
    return found


def _per_token(logps: Floats, lengths: Floats) -> Floats:
    return logps / np.maximum(lengths, 1)


def _mean(values: Floats, seed: int) -> Estimate:
    return mean_estimate(values, numpy_generator(seed, "advise/intervals"))


def _by_prompt(values: Floats, prompt: Ints, seed: int) -> Estimate:
    """Return the mean over prompts of their means, with an interval over prompts."""
    labels = np.unique(prompt, return_inverse=True)[1]
    return _mean(np.bincount(labels, values) / np.bincount(labels), seed)


def _numbers(rewards: Floats) -> int:
    """Return digits that show the spread of rewards with two figures."""
    spread = float(rewards.std())
    return 2 if spread == 0 else min(6, max(0, 1 - math.floor(math.log10(spread))))
