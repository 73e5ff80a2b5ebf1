r"""Which example to ask a label for: scores of a pool from what the members say of it, and choices of one or several.

Lee, Williams, Marklund, Sharma, Mitchell, Singh, Finn, "Test-Time Alignment via Hypothesis Reweighting"
(arXiv 2412.08812) names entropy, BALD and variance. With p_k(x) the prediction of member k, \bar p = \sum_k w_k p_k and
H the entropy in nats:

| `how` | score | for |
|---|---|---|
| random | none | all |
| entropy | H[\bar p] | preference, classification |
| variance | \sum_k w_k (f_k - \bar f)^2, summed over outputs | all |
| bald | H[\bar p] - \sum_k w_k H[p_k]: what the answer tells about the member (Houlsby et al. 2011) | as entropy |
| joint_bald | the same of several answers together (Kirsch et al., "BatchBALD", 2019), exact | as entropy |

Labels of one member's world are independent, so the joint prediction of n answers needs no sampling:

    P(y_1..y_n) = \sum_k w_k \prod_i p_k(y_i),      C^n outcomes,
    I(y_1..y_n; k) = H[P] - \sum_i \sum_k w_k H[p_k(y_i)].

Differences from BatchBALD: no Monte Carlo; more than `MAX_OUTCOMES` outcomes are refused instead.

All but joint_bald look at one question at a time, so that several chosen at once may ask the same thing several times.
Ties are broken by the generator. What does not depend on the weights is worked out once per pool (`Pool`), so that
asking again after every answer costs two matrix-vector products.

Shapes: N examples in the pool, H members, C outputs (classes), K chosen, S joint outcomes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from steelyard.adapt.base import Floats, Task
from steelyard.errors import ConfigError, DataError

How = Literal["random", "entropy", "variance", "bald", "joint_bald"]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
MAX_OUTCOMES = 4096
"""Joint outcomes that are enumerated: twelve answers to preferences, six with four classes."""


@dataclass(frozen=True)
class Pool:
    """What the members say of examples without labels.

    Attributes:
        members: [N, H, C], standardised; margins for pairs.
        task: what the members are for.

    Raises:
        DataError: shapes that do not fit, or numbers that are not finite.
    """

    members: Floats
    task: Task

    def __post_init__(self) -> None:
        members = self.members
        if members.ndim != 3 or (self.task != "classification" and members.shape[2] != 1):
            outputs = "C" if self.task == "classification" else "1"
            raise DataError(f"asking: expected what members say [N, H, {outputs}], found the shape {members.shape}")
        if not np.isfinite(members).all():
            raise DataError("asking: what members say of the pool holds a number that is not finite")

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def predictions(self) -> Floats:
        """Probabilities of every class by every member [N, H, C]; for preferences of "first is preferred" [N, H, 1]."""
        return self._predicted[0]

    @cached_property
    def own_entropy(self) -> Floats:
        """H[p_k] [N, H] in nats."""
        return self._predicted[1]

    @cached_property
    def _predicted(self) -> tuple[Floats, Floats]:
        if self.task == "regression":
            raise ConfigError("a regression predicts no classes: use variance or random to choose what to ask")
        if self.task == "classification":
            shifted = np.exp(self.members - self.members.max(2, keepdims=True))
            p = shifted / shifted.sum(2, keepdims=True)
            return p, _entropy(p)
        # H[sigma(m)] = log(1 + e) + |m| e / (1 + e) with e = exp(-|m|): exact at any margin
        size = np.abs(self.members)
        e = np.exp(-size)
        unlikely = e / (1 + e)
        return 0.5 + np.copysign(0.5 - unlikely, self.members), (np.log(1 + e) + size * unlikely)[:, :, 0]

    @cached_property
    def outcomes(self) -> Floats:
        """Probabilities of every answer [N, H, A], A = 2 for preferences: (second, first) is preferred."""
        p = self.predictions
        return np.concatenate([1 - p, p], 2) if self.task == "preference" else p

    def entropy(self, weights: Floats) -> Floats:
        r"""Return H[\bar p] [N] in nats: how unsure the weighted members are together, for whatever reason."""
        mean = np.tensordot(weights, self.predictions, (0, 1))
        return _entropy(np.concatenate([1 - mean, mean], 1) if self.task == "preference" else mean)

    def variance(self, weights: Floats) -> Floats:
        """Return the weighted variance of what members say [N], summed over outputs; of margins, for preferences."""
        centred = self.members - np.tensordot(weights, self.members, (0, 1))[:, None]
        return np.asarray(np.einsum("nhc,nhc,h->n", centred, centred, weights))

    def bald(self, weights: Floats) -> Floats:
        """Return the mutual information [N] of an answer and the member that is right, in nats: between 0 and log C."""
        limit = np.log(2 if self.task == "preference" else self.members.shape[2])
        return np.clip(self.entropy(weights) - self.own_entropy @ weights, 0, limit)

    def joint_bald(self, weights: Floats, rows: npt.ArrayLike) -> float:
        """Return the mutual information of the answers to several rows together and the member that is right, in nats.

        Raises:
            ConfigError: more than `MAX_OUTCOMES` outcomes.
        """
        rows = np.asarray(rows, np.int64)
        p = self.outcomes[rows]
        _check_outcomes(p.shape[2], len(p))
        joint = weights[None]
        for one in p:
            joint = _with_answer(joint, one)
        return max(0.0, float(_entropy(joint.sum(1)) - (self.own_entropy[rows] @ weights).sum()))


def acquire(
    members: Floats | Pool,
    weights: Floats,
    k: int,
    how: How,
    task: Task,
    generator: np.random.Generator,
    exclude: Mask | None = None,
) -> Ints:
    """Choose examples of a pool to ask labels for.

    Args:
        members: [N, H, C] of the pool, standardised (margins for pairs); or the pool, to ask it again.
        weights: [H] of the members now, summing to 1; uniform before the first label.
        k: how many to choose.
        how: the criterion.
        task: what the members are for.
        generator: of random choices and of ties.
        exclude: [N], examples that must not be chosen, e.g. those asked before.

    Returns:
        Rows of the pool [K], best first, each once.

    Raises:
        ConfigError: a criterion that there is not, or not for this task; fewer than k examples to choose from; or too
            many joint outcomes.
        DataError: weights that are no distribution over the members, or numbers that are not finite.
    """
    pool = members if isinstance(members, Pool) else Pool(np.asarray(members, np.float64), task)
    weights = np.asarray(weights, np.float64)
    if how not in get_args(How):
        raise ConfigError(f"how to ask: expected one of {', '.join(get_args(How))}, found {how!r}")
    if weights.shape != pool.members.shape[1:2] or not (weights >= 0).all() or not np.isclose(weights.sum(), 1):
        raise DataError(f"asking: expected weights of {pool.members.shape[1]} members, at least 0 and of sum 1")
    open_rows = np.ones(len(pool), bool) if exclude is None else ~np.asarray(exclude, bool)
    if not 1 <= k <= open_rows.sum():
        raise ConfigError(f"asked for {k} examples, but there are {open_rows.sum()} to choose from")
    order = generator.permutation(len(pool))  # equal scores: whichever comes first here
    if how == "joint_bald":
        return _joint(pool, weights, k, order, open_rows)
    scores = np.zeros(len(pool)) if how == "random" else getattr(pool, how)(weights)
    scores = np.where(open_rows, scores, -np.inf)
    chosen: Ints = order[np.argsort(-scores[order], kind="stable")[:k]]
    return chosen


def next_query(
    members: Floats | Pool, weights: Floats, asked: Mask, how: How, task: Task, generator: np.random.Generator
) -> int:
    """Choose the one example to ask next; asking one at a time re-weights after every answer.

    Args:
        members: [N, H, C] of the pool, or the pool.
        weights: [H] after all answers so far.
        asked: [N], True where there is an answer already.
        how: the criterion; joint_bald of one is bald.
        task: what the members are for.
        generator: of random choices and of ties.
    """
    return int(acquire(members, weights, 1, how, task, generator, asked)[0])


def _joint(pool: Pool, weights: Floats, k: int, order: Ints, open_rows: Mask) -> Ints:
    """Choose greedily: each next example adds most to the joint information of all chosen so far."""
    p = pool.outcomes
    n, heads, classes = p.shape
    _check_outcomes(classes, k)
    own = pool.own_entropy @ weights
    flat = p.transpose(1, 0, 2).reshape(heads, n * classes)
    joint, left, chosen = weights[None], open_rows.copy(), []
    for _ in range(k):
        together = (joint @ flat).reshape(len(joint), n, classes)
        # what is subtracted for the examples chosen before is the same for all candidates
        information = _entropy(together.transpose(1, 0, 2).reshape(n, -1)) - own
        information[~left] = -np.inf
        best = int(order[np.argmax(information[order])])
        chosen.append(best)
        left[best] = False
        joint = _with_answer(joint, p[best])
    return np.array(chosen, np.int64)


def _with_answer(joint: Floats, p: Floats) -> Floats:
    """Return w_k P(outcome, y | k) [S * C, H] of w_k P(outcome | k) [S, H] and one more answer's p_k(y) [H, C]."""
    return np.asarray((joint[:, None] * p.T[None]).reshape(-1, joint.shape[1]))


def _entropy(p: Floats) -> Floats:
    """Return the entropy over the last axis, in nats; 0 log 0 is 0."""
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    return -np.asarray(np.einsum("...c,...c->...", p, logs))


def _check_outcomes(classes: int, k: int) -> None:
    if classes**k > MAX_OUTCOMES:
        raise ConfigError(
            f"joint_bald enumerates all answers to {k} questions with {classes} outcomes each, {classes**k} in all and "
            f"more than {MAX_OUTCOMES}; choose fewer at a time, or use bald"
        )
