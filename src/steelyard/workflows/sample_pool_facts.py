"""What a sample pool holds, before it is trained on or replayed: counts, rewards, ties, and what choosing is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steelyard.adapt.selection import available, expected_reward
from steelyard.bench.calibration import auc_across, auc_within
from steelyard.bench.stats import Estimate, mean_estimate
from steelyard.data.sample_pool import SamplePool
from steelyard.rng import numpy_generator


@dataclass(frozen=True)
class Fact:
    """One line of a description: what, the number, and how to read it."""

    what: str
    value: float | Estimate
    note: str = ""


def known_rewards(pool: SamplePool) -> SamplePool:
    """Return the prompts all of whose rewards are known."""
    return pool.take([row for row, item in enumerate(pool.items) if not np.isnan(item.rewards).any()])


def facts(pool: SamplePool) -> list[Fact]:
    """Return what a user should know before training on a pool or replaying it."""
    n = pool.array("rewards").shape[1]
    texts = [text for item in pool for text in item.texts]
    known = known_rewards(pool)
    found = [
        Fact("prompts", len(pool)),
        Fact("samples", n, "of each prompt"),
        Fact("unknown", len(pool) - len(known), "prompts with a sample without reward; left out below"),
        Fact("empty", sum(not text.strip() for text in texts), "completions"),
        Fact(
            "unfinished",
            sum(int((~item.finished).sum()) for item in pool if item.finished is not None),
            "completions cut at the limit",
        ),
    ]
    generator = numpy_generator(0, "sample pool/facts")
    lengths = np.array([item.lengths.mean() for item in pool], np.float64)
    found.append(Fact("length", mean_estimate(lengths, generator), "tokens of a completion, its end included"))
    if texts:
        distinct = np.array([len(set(item.texts)) / n for item in pool])
        found.append(Fact("distinct", mean_estimate(distinct, generator), "share of a prompt's completions"))
    if not len(known) or n < 2:
        return found
    rewards = known.rewards()
    found.append(Fact("reward", mean_estimate(rewards.mean(1), generator), "of one sample"))
    greedy = _greedy(known)
    if greedy is not None:
        found.append(Fact("greedy", mean_estimate(greedy, generator), "reward of the sample at temperature 0"))
    others = n * (n - 1)
    ties = ((rewards[:, :, None] == rewards[:, None, :]).sum((1, 2)) - n) / others
    found.append(Fact("ties", mean_estimate(ties, generator), "pairs of samples of a prompt with equal rewards"))
    if np.isin(rewards, (0, 1)).all():
        for name, row in (("all right", rewards.min(1)), ("all wrong", 1 - rewards.max(1))):
            found.append(Fact(name, mean_estimate(row, generator), "share of prompts; no choice changes them"))
    if all(item.scores is not None for item in known):
        scores = known.array("scores")
        for name, measure in (("AUC within", auc_within), ("AUC across", auc_across)):
            value = measure(scores, rewards, generator)
            if value is not None:  # None: no sample is better than another
                note = "of the scores, between a prompt's samples" if measure is auc_within else "between prompts"
                found.append(Fact(name, value, note))
    return found


def _greedy(pool: SamplePool) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """Return the rewards [P] of greedy samples, None where a prompt has none."""
    cold = [None if item.temperatures is None else np.flatnonzero(item.temperatures == 0) for item in pool]
    if any(rows is None or not len(rows) for rows in cold):
        return None
    return np.array([item.rewards[rows].mean() for item, rows in zip(pool, cold, strict=True)])


def selection_rows(
    pool: SamplePool, rules: Sequence[str] | None = None, ks: Sequence[int] | None = None
) -> list[tuple[str, int, Estimate]]:
    """Return (rule, k, mean reward of what the rule chooses among k samples), with intervals over prompts.

    Args:
        pool: prompts with known rewards.
        rules: `adapt.selection`; None: all that the pool has data for.
        ks: None: powers of two up to N, and N.
    """
    n = pool.rewards().shape[1]
    wanted = sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n}) if ks is None else ks
    columns = [
        name
        for name, value in pool.items[0].columns.items()
        if isinstance(value, list) and len(value) == n and all(isinstance(x, int | float) for x in value)
    ]
    chosen = (*available(pool), *available(pool, columns)) if rules is None else rules
    generator = numpy_generator(0, "sample pool/selection")
    return [(rule, k, mean_estimate(expected_reward(pool, rule, k), generator)) for rule in chosen for k in wanted]
