"""Every way of spending compute, replayed on two pools of the same prompts: shared by tiers 1 and 2 of the study.

One pool at temperature 1 and one annealed, with scores at the end and at checkpoints; every rule of stopping, pruning
and choosing is tried on them without a model. Thresholds are chosen on validation prompts. Rows hold an outcome prompt
by prompt, so that the page can resample prompts.

Shapes: P prompts, N samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from steelyard.adapt.best_of_n import sample
from steelyard.adapt.compute_policy import Backend, Budget, ComputePolicy, PruneRule, StopRule, TemperatureSchedule
from steelyard.adapt.replay import ReplayBackend
from steelyard.adapt.selection import expected_reward
from steelyard.bench.calibration import auc_across, auc_within
from steelyard.data.sample_pool import SamplePool
from steelyard.recipes.adaptive_statistics import Outcome, averaged, choose_threshold, outcome
from steelyard.recipes.hyre_jobs import Row
from steelyard.rng import numpy_generator
from steelyard.workflows.self_eval import TrainedSelfEval

Stratum = Literal["easy", "medium", "hopeless"]
STRATA: tuple[Stratum, ...] = ("easy", "medium", "hopeless")
MIXES: dict[str, dict[Stratum, float]] = {
    "easy-heavy": {"easy": 0.75, "medium": 0.15, "hopeless": 0.10},
    "mixed": {"easy": 0.35, "medium": 0.35, "hopeless": 0.30},
}
"""Shares of the strata among test prompts."""
VERIFIER = "verifier"
"""Column of P(right) by a model of its own."""
ONE, BEST = "one sample, T = 1", "best of {} by self-evaluation"
GREEDY, ADAPTIVE, BOTH = "greedy", "adaptive, T = 1", "adaptive and annealed"
ABSOLUTE = "absolute correctness, T = 1"
LOWEST, BELOW, RANDOM = "lowest scores, {:.0%}", "scores below 0.1", "at random, {:.0%}"


class ReplayStudy(Protocol):
    """What a study says about its replays.

    Attributes:
        samples: N.
        checkpoints: tokens after which samples are looked at.
        pruned: shares of N parallel samples that are given up.
        thresholds: of the stopping rule.
        most_samples: average samples that a threshold may take on validation prompts.
        orders: of the samples at temperature 1 that outcomes are averaged over.
        validation_prompts: of each mix.
        test_prompts: of each mix.
    """

    @property
    def samples(self) -> int: ...  # noqa: D102
    @property
    def checkpoints(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def pruned(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def thresholds(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def most_samples(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def orders(self) -> int: ...  # noqa: D102
    @property
    def validation_prompts(self) -> int: ...  # noqa: D102
    @property
    def test_prompts(self) -> int: ...  # noqa: D102


def counts_of(shares: Mapping[Stratum, float], count: int) -> dict[Stratum, int]:
    """Return how many problems of each stratum a mix of `count` has."""
    found = {stratum: round(share * count) for stratum, share in shares.items()}
    found["easy"] += count - sum(found.values())
    return found


def enough_for(mixes: Mapping[str, Mapping[Stratum, float]], count: int) -> dict[Stratum, int]:
    """Return how many problems of each stratum serve every mix of `count`."""
    return {stratum: max(counts_of(shares, count)[stratum] for shares in mixes.values()) for stratum in STRATA}


def mix_rows(pool: SamplePool, shares: Mapping[Stratum, float], count: int) -> npt.NDArray[np.int64]:
    """Return which prompts of a pool make up a mix: the first so many of each stratum."""
    wanted = counts_of(shares, count)
    strata = np.array([item.stratum for item in pool])
    return np.concatenate([np.flatnonzero(strata == stratum)[: wanted[stratum]] for stratum in STRATA])


def policy_of(
    threshold: float | None,
    kind: Literal["constant", "annealed"],
    samples: int,
    prune: PruneRule | None = None,
    prior_strength: float = 0.0,
) -> ComputePolicy:
    """Return a policy that stops at a threshold; None: all samples at once."""
    if threshold is None:
        stop, waves = StopRule("never"), (samples,)
    else:
        stop, waves = StopRule("threshold", threshold, prior_strength), (1,)
    return ComputePolicy(TemperatureSchedule(kind), stop, prune or PruneRule(), Budget(samples), waves)


class Replays:
    """Rules replayed on the pools of some prompts."""

    def __init__(self, study: ReplayStudy, constant: SamplePool, annealed: SamplePool, extra_tokens: int) -> None:
        self.study, self.constant, self.annealed, self.extra = study, constant, annealed, extra_tokens
        self._orders = [ReplayBackend(constant, order, extra_tokens) for order in range(study.orders)]
        self._annealed = ReplayBackend(annealed, extra_tokens=extra_tokens)
        self._absolute = [
            ReplayBackend(constant.with_scores(constant.array(VERIFIER), None), order, extra_tokens)
            for order in range(study.orders)
        ]

    def adaptive(self, name: str, threshold: float, prior_strength: float = 0.0) -> Outcome:
        """Return what stopping at a threshold comes to."""
        kind: Literal["constant", "annealed"] = "annealed" if name.startswith(BOTH) else "constant"
        policy = policy_of(threshold, kind, self.study.samples, prior_strength=prior_strength)
        backends: Sequence[Backend] = [self._annealed] if kind == "annealed" else self._orders
        if name == ABSOLUTE:
            found = self._mean(name, self._absolute, policy)
            return dataclasses.replace(found, evaluated=found.decoded)  # a model of its own reads every sample
        return self._mean(name, backends, policy)

    def pruned(self, name: str, prune: PruneRule) -> Outcome:
        """Return what giving up a part of N parallel samples comes to."""
        policy = policy_of(None, "constant", self.study.samples, prune)
        # scores decide the same in every order; random pruning does not
        return self._mean(name, self._orders if prune.kind == "random" else self._orders[:1], policy)

    def _mean(self, name: str, backends: Sequence[Backend], policy: ComputePolicy) -> Outcome:
        count = len(self.constant)
        return averaged([outcome(name, sample(one, count, policy, seed=k)) for k, one in enumerate(backends)])

    def one(self) -> Outcome:
        """Return one sample at temperature 1, the mean over all N."""
        return self._fixed(ONE, self.constant.array("rewards").mean(1), 1, 0)

    def greedy(self) -> Outcome:
        """Return the greedy sample."""
        lengths = self.annealed.array("lengths")[:, 0]
        ones = np.ones(len(lengths))
        return Outcome(GREEDY, self.annealed.array("rewards")[:, 0], ones, lengths, 0 * ones)

    def best(self, rule: str, name: str, k: int) -> Outcome:
        """Return best-of-k by a rule, the mean over all subsets."""
        found = self._fixed(name, expected_reward(self.constant, rule, k), k, self.extra if rule == "score" else 0)
        return dataclasses.replace(found, evaluated=found.decoded) if rule == VERIFIER else found

    def _fixed(self, name: str, rewards: npt.NDArray[np.float64], k: int, extra: int) -> Outcome:
        lengths = self.constant.array("lengths").mean(1)
        return Outcome(name, rewards, np.full(len(rewards), float(k)), k * lengths, np.full(len(rewards), k * extra))


PRUNING: dict[str, PruneRule] = {
    LOWEST: PruneRule("quantile"),
    BELOW: PruneRule("absolute"),
    RANDOM: PruneRule("random"),
}


def rows_of_outcomes(study: ReplayStudy, validation: Replays, test: Replays, seed: int) -> list[Row]:
    """Return one row a mix and way of spending compute, with its outcome prompt by prompt."""
    n = study.samples
    fixed = [test.one(), test.greedy()]
    fixed += [test.best("score", BEST.format(k), k) for k in (2, 4, 8, 16) if k < n]
    best = test.best("score", BEST.format(n), n)
    fixed += [
        best,
        test.best(VERIFIER, f"best of {n} by an external verifier", n),
        test.best("logp", f"best of {n} by mean log-probability", n),
        test.best("certainty", f"best of {n} by self-certainty", n),
        test.best("majority", f"majority of {n}", n),
        test.best("oracle", f"best of {n} by an oracle", n),
    ]
    ways = {ADAPTIVE: 0.0, BOTH: 0.0, f"{BOTH}, shrunk": 2.0, ABSOLUTE: 0.0}
    curves = {
        name: [
            (threshold, validation.adaptive(name, threshold, prior), test.adaptive(name, threshold, prior))
            for threshold in study.thresholds
        ]
        for name, prior in ways.items()
    }
    pruned = [
        test.pruned(name.format(share), dataclasses.replace(rule, at=study.checkpoints, fraction=share))
        for share in study.pruned
        for name, rule in PRUNING.items()
        if rule.kind != "absolute" or share == study.pruned[0]
    ]
    rows: list[Row] = []
    for mix, shares in MIXES.items():
        here = mix_rows(test.constant, shares, study.test_prompts)
        there = mix_rows(validation.constant, shares, study.validation_prompts)

        def row(group: str, found: Outcome, threshold: float | None = None, most: float | None = None) -> Row:
            kept = found.take(here)  # noqa: B023 - called in this very turn
            numbers = {name: getattr(kept, name).tolist() for name in ("rewards", "samples", "decoded", "evaluated")}
            identity = {"kind": "outcome", "seed": seed, "mix": mix, "group": group, "name": found.name}  # noqa: B023
            return identity | {"threshold": threshold, "most": most} | numbers

        rows += [row("fixed", found) for found in fixed] + [row("pruned", found) for found in pruned]
        for curve in curves.values():
            seen = [(threshold, held_out.take(there)) for threshold, held_out, _ in curve]
            by_threshold = {threshold: found for threshold, _, found in curve}
            rows += [row("curve", found, threshold) for threshold, found in by_threshold.items()]
            for most in study.most_samples:
                chosen = choose_threshold(seen, most)
                rows.append(row("chosen", by_threshold[chosen], chosen, most))
        # the rival that stops at an absolute correctness, and ours with as many samples as it takes
        for most in study.most_samples:
            absolute = {threshold: held_out.take(there) for threshold, held_out, _ in curves[ABSOLUTE]}
            allowed = absolute[choose_threshold(list(absolute.items()), most)].samples.mean()
            seen = [(threshold, held_out.take(there)) for threshold, held_out, _ in curves[ADAPTIVE]]
            chosen = choose_threshold(seen, float(allowed))
            by_threshold = {threshold: found for threshold, _, found in curves[ADAPTIVE]}
            rows.append(row("matched", by_threshold[chosen], chosen, most))
    return rows


def reader_rows(name: str, trained: TrainedSelfEval, seed: int) -> list[Row]:
    """Return how good a reader is at the prompt, the checkpoints and the end of held-out samples, and its drift."""
    report = trained.report
    assert report is not None
    drift = report.drift
    return [
        {
            "kind": "reader",
            "seed": seed,
            "reader": name,
            "where": one.where,
            "within": None if one.within is None else one.within.value,
            "across": None if one.across is None else one.across.value,
            "ece": one.ece,
            "brier": one.brier,
            "extra_tokens": trained.evaluator.extra_tokens,
            "kl": 0.0 if drift is None else drift.kl,
            "greedy_match": 1.0 if drift is None else drift.greedy_match,
        }
        for one in report.rows
    ]


def strata_rows(test: Replays, seed: int) -> list[Row]:
    """Return what test samples of each stratum are worth."""
    strata = np.array([item.stratum for item in test.constant])
    rewards = test.constant.array("rewards")
    greedy, best = test.greedy().rewards, expected_reward(test.constant, "score", rewards.shape[1])
    return [
        {
            "kind": "stratum",
            "seed": seed,
            "stratum": stratum,
            "prompts": int((strata == stratum).sum()),
            "one": float(rewards[strata == stratum].mean()),
            "greedy": float(greedy[strata == stratum].mean()),
            "best": float(best[strata == stratum].mean()),
            "oracle": float(rewards[strata == stratum].max(1).mean()),
        }
        for stratum in STRATA
    ]


def gate_rows(test: Replays, study: ReplayStudy, seed: int) -> list[Row]:
    """Return the AUCs of the scores on test prompts, whose samples the trained model itself drew."""
    rows = []
    for mix, shares in MIXES.items():
        pool = test.constant.take(mix_rows(test.constant, shares, study.test_prompts).tolist())
        scores, rewards = pool.array("scores"), pool.array("rewards")
        within = auc_within(scores, rewards, numpy_generator(seed, "auc"))
        across = auc_across(scores, rewards, numpy_generator(seed, "auc"), resamples=100)
        for name, one in (("within", within), ("across", across)):
            if one is not None:
                rows.append({"kind": "auc", "seed": seed, "mix": mix, "name": name, "value": one.value, "low": one.low,
                             "high": one.high, "prompts": one.n})  # fmt: skip
    return rows


def means(row: Row) -> Row:
    """Return the row of an outcome with means in place of one number a prompt."""
    found = {name: float(np.mean(value)) if isinstance(value, list) else value for name, value in row.items()}
    return found | {"prompts": len(row["rewards"])}
