r"""Choosing one of N samples, and what it is worth on average: the baselines of adaptive sampling.

| rule | chooses |
|---|---|
| `first` | the first sample: what one sample is worth |
| `score` | the highest self-evaluation, P(no fresh sample would be better) |
| `logp` | the highest mean log-probability of a token |
| `certainty` | the highest self-certainty (Kang et al., arXiv 2502.18581) |
| `majority` | the most frequent answer (self-consistency; Wang et al., arXiv 2203.11171) |
| `weighted` | the answer with the largest sum of scores |
| `oracle` | the highest reward; with 0/1 rewards its value is pass@k |
| any column | the highest value of a column of N numbers, e.g. `rm_score` of a reward model |

From N samples of a prompt, best-of-k for every k <= N is estimated without bias, as the mean over all subsets of k:
with samples in falling order of the criterion, sample i (from 0) is the best of a subset with probability
C(N-1-i, k-1) / C(N, k). Equal criteria share their probability. For 0/1 rewards and the oracle it is the estimator
1 - C(N-c, k) / C(N, k) of pass@k with c successes (Chen et al., arXiv 2107.03374, eq. 1). Votes have no such form:
subsets are drawn, unless k = N.

Random pruning of N samples to m, and best-of-m by a rule, are the same in expectation: its baseline is best-of-m.
The baseline "absolute correctness" stops and chooses by P(correct): give a pool those as its scores
(`SamplePool.with_scores`) and replay a threshold.

Shapes: P prompts, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.errors import ConfigError, DataError
from steelyard.rng import numpy_generator

Floats = npt.NDArray[np.float64]

RULES = ("first", "score", "logp", "certainty", "majority", "weighted", "oracle")
VOTES = ("majority", "weighted")
SUBSETS = 200
"""Drawn for a vote among k < N."""


def criterion(item: PromptSamples, rule: str) -> Floats:
    """Return what a rule prefers samples by, [N].

    Raises:
        ConfigError: a vote, which prefers answers.
        DataError: the prompt's samples lack it.
    """
    n = len(item.rewards)
    if rule in VOTES:
        raise ConfigError(f"{rule} votes for answers; it gives samples no values")
    if rule == "first":
        return -np.arange(n, dtype=np.float64)
    values = _values(item, rule)
    if values is None or len(values) != n or np.isnan(values).any():
        raise DataError(f"selection by {rule!r}: expected a number for each of {n} samples of {_name(item)}, found "
                        + ("none" if values is None or len(values) != n else f"{int(np.isnan(values).sum())} NaN")
                        )  # fmt: skip
    return values


def _values(item: PromptSamples, rule: str) -> Floats | None:
    if rule == "score":
        return item.scores
    if rule == "logp":
        return None if item.logps is None else item.logps / np.maximum(item.lengths, 1)
    if rule == "certainty":
        return item.certainty
    if rule == "oracle":
        return item.rewards
    column = item.columns.get(rule)
    if not isinstance(column, list):
        known = [name for name, value in item.columns.items() if isinstance(value, list)]
        raise ConfigError(f"selection by {rule!r}: expected one of {', '.join((*RULES, *known))}")
    return np.array([np.nan if value is None else value for value in column], np.float64)


def choose(item: PromptSamples, rule: str, samples: Sequence[int] | None = None) -> int:
    """Return the position of the sample that a rule chooses; of equals the first.

    Args:
        item: a prompt's samples.
        rule: see above.
        samples: positions to choose among; None: all.
    """
    rows = np.arange(len(item.rewards)) if samples is None else np.asarray(samples, np.int64)
    if len(rows) == 0:
        raise DataError(f"selection by {rule!r}: expected at least one sample of {_name(item)}, found none")
    if rule in VOTES:
        answers = _answers(item)
        return int(rows[_vote([answers[row] for row in rows], _weights(item, rule)[rows])])
    return int(rows[int(np.argmax(criterion(item, rule)[rows]))])


def best_of_k(criteria: Floats, rewards: Floats, k: int) -> float:
    """Return the mean reward of the best of k by the criterion, over all subsets of k of the N samples.

    Args:
        criteria: [N], higher is preferred; equal ones share the chance to be chosen.
        rewards: [N].
        k: 1 <= k <= N.
    """
    n = len(criteria)
    _require_k(k, n)
    order = np.argsort(-criteria, kind="stable")
    chance = _chances(n, k)
    ranked, values = criteria[order], rewards[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    sizes = np.diff(np.r_[starts, n])
    return float(np.add.reduceat(chance, starts) @ (np.add.reduceat(values, starts) / sizes))


def pass_at_k(correct: npt.ArrayLike, k: int) -> Floats:
    """Return 1 - C(N-c, k) / C(N, k) for each row of 0/1 outcomes [..., N].

    Raises:
        DataError: other values than 0 and 1.
    """
    outcomes = np.asarray(correct, np.float64)
    if not np.isin(outcomes, (0, 1)).all():
        raise DataError("pass@k: expected rewards of 0 and 1 only")
    n = outcomes.shape[-1]
    _require_k(k, n)
    wrong = n - outcomes.sum(-1).astype(np.int64)
    none = np.array([math.comb(w, k) / math.comb(n, k) for w in range(n + 1)])
    return np.asarray(1 - none[wrong])


def expected_reward(pool: SamplePool, rule: str, k: int, seed: int = 0, subsets: int = SUBSETS) -> Floats:
    """Return the mean reward [P] of the sample that a rule chooses among k of a prompt's samples.

    Args:
        pool: N >= k samples of each prompt.
        rule: see above.
        k: samples to choose among.
        seed: of the subsets that votes are held in.
        subsets: how many of them.

    Raises:
        DataError: a prompt has fewer samples, or they lack what the rule needs; unknown rewards.
    """
    found = []
    for number, item in enumerate(pool.items):
        rewards = np.asarray(item.rewards, np.float64)
        if np.isnan(rewards).any():
            raise DataError(f"{pool.source or 'pool'}: {int(np.isnan(rewards).sum())} rewards of prompt {number} are "
                            "unknown; leave such prompts out")  # fmt: skip
        if rule == "first":  # any of them comes first equally often
            _require_k(k, len(rewards))
            found.append(float(rewards.mean()))
        elif rule in VOTES:
            found.append(_vote_of_k(item, rule, k, numpy_generator(seed, f"selection/{rule}/{k}", number), subsets))
        else:
            found.append(best_of_k(criterion(item, rule), rewards, k))
    return np.array(found)


def curves(pool: SamplePool, rules: Sequence[str], ks: Sequence[int], seed: int = 0) -> dict[str, Floats]:
    """Return {rule: [len(ks), P]}, the expected reward of every rule at every k, prompt by prompt."""
    return {rule: np.stack([expected_reward(pool, rule, k, seed) for k in ks]) for rule in rules}


def available(pool: SamplePool, rules: Sequence[str] = RULES) -> tuple[str, ...]:
    """Return those rules for which every prompt of the pool has what they need."""
    return tuple(rule for rule in rules if all(_has(item, rule) for item in pool.items))


def _has(item: PromptSamples, rule: str) -> bool:
    if rule in VOTES and not any(item.answers):
        return False
    if rule in ("first", "majority"):
        return True
    try:
        criterion(item, "score" if rule == "weighted" else rule)
    except (DataError, ConfigError):
        return False
    return True


def _chances(n: int, k: int) -> Floats:
    """Return [N], the chance C(N-1-i, k-1) / C(N, k) that the i-th best of N is the best of k of them."""
    total = math.comb(n, k)
    return np.array([math.comb(n - 1 - i, k - 1) / total for i in range(n)])


def _vote_of_k(item: PromptSamples, rule: str, k: int, generator: np.random.Generator, subsets: int) -> float:
    n = len(item.rewards)
    _require_k(k, n)
    if k == 1:
        return float(item.rewards.mean())
    rows = np.arange(n)[None] if k == n else generator.random((subsets, n)).argsort(1)[:, :k]
    winners, codes = _winners(_answers(item), _weights(item, rule), rows)
    rewards = np.zeros(winners.shape)
    np.add.at(rewards, (np.arange(len(rows))[:, None], codes), item.rewards[rows])
    counts = np.zeros(winners.shape)
    np.add.at(counts, (np.arange(len(rows))[:, None], codes), 1)
    each = np.where(winners, rewards / np.maximum(counts, 1), 0).sum(1) / winners.sum(1)
    return float(each.mean())


def _vote(answers: Sequence[str], weights: Floats) -> int:
    """Return the first sample that states the winning answer; of equal winners, the one stated first."""
    winners, codes = _winners(answers, weights, np.arange(len(answers))[None])
    return int(np.flatnonzero(winners[0, codes[0]])[0])


def _winners(
    answers: Sequence[str], weights: Floats, rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Return which answers win in each subset [S, A], and the number of the answer of each of its samples [S, k].

    "" is no answer and wins only where there is no other.
    """
    numbers = {answer: number for number, answer in enumerate(dict.fromkeys(answers))}
    codes = np.array([numbers[answer] for answer in answers], np.int64)[rows]
    votes = np.full((len(rows), len(numbers)), -np.inf)
    subset = np.arange(len(rows))[:, None]
    votes[subset, codes] = 0
    np.add.at(votes, (subset, codes), weights[rows])
    if "" in numbers:
        votes[:, numbers[""]] = np.where(np.isneginf(votes[:, numbers[""]]), -np.inf, -1)
    most = votes.max(1, keepdims=True)
    return votes >= most - 1e-9 * np.abs(most), codes


def _answers(item: PromptSamples) -> tuple[str, ...]:
    if len(item.answers) != len(item.rewards):
        raise DataError(f"a vote: expected an answer of each of {len(item.rewards)} samples of {_name(item)}, found "
                        f"{len(item.answers)}")  # fmt: skip
    return item.answers


def _weights(item: PromptSamples, rule: str) -> Floats:
    return np.ones(len(item.rewards)) if rule == "majority" else criterion(item, "score")


def _require_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise DataError(f"best of k: expected k between 1 and the {n} samples of a prompt, found {k}")


def _name(item: PromptSamples) -> str:
    return f"prompt {item.prompt[:40]!r}"
