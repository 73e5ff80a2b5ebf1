"""Choosing: the plain mean, the best head, a method by leave-one-out, settings on held-out tasks.

Settings are never chosen on the target. A `Task` here is a held-out one: all labelled examples of one user or
distribution. `draw` splits them into a few labels to adapt to and examples to score, which never overlap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from steelyard.adapt.base import Combination, Floats, Method, Support, SupportPosterior, Task, accuracy
from steelyard.adapt.losses import BradleyTerry, Likelihood, MemberLoss, log_score
from steelyard.adapt.reweight import HyRe
from steelyard.errors import ConfigError, DataError, NonFiniteError
from steelyard.rng import numpy_generator

Ints = npt.NDArray[np.int64]
ETA_GRID = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
TIE = 1e-9
"""Losses this close, relative to 1 + the lowest, are a tie."""


@dataclass(frozen=True)
class Uniform:
    """The plain mean of all members, whatever the labels."""

    name: str = "uniform"

    def begin(self, num_members: int) -> SupportPosterior:
        """Return the mean."""
        return SupportPosterior(self, num_members)

    def fit(self, support: Support | None, num_members: int) -> tuple[Combination, dict[str, float]]:
        """Return the mean."""
        return Combination(np.full(num_members, 1 / num_members)), {}


@dataclass(frozen=True)
class Single:
    """One member, whatever the labels: the single model.

    Attributes:
        member: which; 0 is the pooled head where there is one.
    """

    member: int = 0
    name: str = "single"

    def begin(self, num_members: int) -> SupportPosterior:
        """Return the member."""
        return SupportPosterior(self, num_members)

    def fit(self, support: Support | None, num_members: int) -> tuple[Combination, dict[str, float]]:
        """Return the member."""
        return Combination(np.eye(num_members)[self.member]), {}


@dataclass(frozen=True)
class BestHead:
    """The member of the lowest summed loss; of members that tie, the mean, so no label at all is the plain mean.

    Attributes:
        loss: of members.
    """

    loss: MemberLoss = field(default_factory=BradleyTerry)
    name: str = "best head"

    def begin(self, num_members: int) -> SupportPosterior:
        """Return the mean of all members, which tie."""
        return SupportPosterior(self, num_members)

    def fit(self, support: Support | None, num_members: int) -> tuple[Combination, dict[str, float]]:
        """Return the mean of the members that are best."""
        total = (
            np.zeros(num_members) if support is None else support.counts @ self.loss(support.members, support.labels)
        )
        best = total <= total.min() + TIE * (1 + abs(total.min()))
        return Combination(best / best.sum()), {"tied": float(best.sum())}


@dataclass(frozen=True)
class Auto:
    """The candidate with the best leave-one-out log score on the examples themselves, if it is clearly the best.

    A few examples tell candidates apart badly, and taking the highest score as it is costs more than it brings. So
    another candidate than the first must beat it by `margin` standard errors of their paired difference, and with fewer
    than `least` examples it is always the first.

    Attributes:
        candidates: in order of trust.
        task: likelihood of the score.
        least: examples from which on candidates are compared.
        noise: variance of a regression's targets, for the score.
        margin: standard errors; 0: the highest score, the first of equals.
    """

    candidates: tuple[Method, ...]
    task: Task = "preference"
    least: int = 3
    noise: float = 1.0
    margin: float = 2.0
    name: str = "auto"

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ConfigError("candidates must hold at least one method, found none")
        if not 0 <= self.margin < math.inf:
            raise ConfigError(f"margin must be finite and at least 0, found {self.margin}")

    def begin(self, num_members: int) -> SupportPosterior:
        """Return the first candidate's prior."""
        return SupportPosterior(self, num_members)

    def fit(self, support: Support | None, num_members: int) -> tuple[Combination, dict[str, float]]:
        """Return the combination of the chosen candidate; `chosen` is its number."""
        if support is None:
            return self.candidates[0].begin(num_members).combination(), {"chosen": 0.0}
        chosen = 0
        if len(support) >= self.least and len(self.candidates) > 1:
            each = np.array([left_out_scores(method, support, self.task, self.noise) for method in self.candidates])
            weights = support.counts / support.counts.sum()
            leads = (each - each[0]) @ weights
            variance = ((each - each[0] - leads[:, None]) ** 2) @ weights / (len(support) - 1)
            clear = leads >= self.margin * np.sqrt(variance)
            clear[0] = True
            best = leads[clear].max()
            chosen = int(np.flatnonzero(clear & (leads >= best - TIE * (1 + abs(each[0] @ weights + best))))[0])
        posterior = self.candidates[chosen].begin(num_members).update(support)
        return posterior.combination(), {"chosen": float(chosen)}


def left_out_scores(method: Method, support: Support, task: Task, noise: float = 1.0) -> Floats:
    """Return the log score [N] of every example under the method adapted to the others."""
    begun, rows = method.begin(support.members.shape[1]), np.arange(len(support))
    outputs = np.empty((len(support), support.members.shape[2]))
    for row in rows:
        left, one = support.take(rows[rows != row]), support.take([row])
        outputs[row] = begun.update(left).combination().apply(one.members, one.features)[0]
    return -Likelihood(task, noise).value(outputs, support.labels)


@dataclass(frozen=True)
class HeldOutTask:
    """All labelled examples of one user or distribution.

    Attributes:
        examples: labels and what the members say.
        pool: rows that may be drawn as labels to adapt to; all others are scored, whatever is drawn. None: any row may
            be drawn, and those that were not are scored.
        sources: [N] or [N, S], what an example was made from (the numbers of its texts): examples that share one with
            the pool, or without a pool with a drawn label, are not scored.
        name: seeds the draws.
    """

    examples: Support
    pool: Ints | None = None
    sources: Ints | None = None
    name: str = ""


def draw(task: HeldOutTask, n: int, generator: np.random.Generator) -> tuple[Ints, Ints]:
    """Return (rows to adapt to [n], rows to score): disjoint, and sharing no source.

    With the same generator the rows for a smaller n are the first of those for a larger one.
    """
    size = len(task.examples)
    pool = np.arange(size) if task.pool is None else np.unique(np.asarray(task.pool, np.int64))
    if n < 0 or n > len(pool):
        raise DataError(f"task {task.name!r}: expected {n} examples to draw, found {len(pool)}")
    support = generator.permutation(pool)[:n]
    closed = support if task.pool is None else pool
    scored = np.ones(size, bool)
    scored[closed] = False
    if task.sources is not None:
        sources = np.asarray(task.sources).reshape(size, -1)
        scored &= ~np.isin(sources, sources[closed]).any(1)
    test = np.flatnonzero(scored)
    if not len(test):
        raise DataError(f"task {task.name!r}: after drawing {n} of {size} examples none is left to score")
    return support, test


Score = Literal["log", "accuracy"]


def scores(
    method: Method, target: HeldOutTask, n: int, task: Task, score: Score = "accuracy", draws: int = 5, seed: int = 0
) -> Floats:
    """Return the method's score on a task after n labels, for every draw: [draws].

    Draws are a function of (seed, name of the task, number of the draw): the same for all methods, settings and n.
    """
    results = []
    for number in range(draws):
        support, test = draw(target, n, numpy_generator(seed, f"adapt/draw/{target.name}", number))
        posterior = method.begin(target.examples.members.shape[1])
        combination = posterior.update(target.examples.take(support)).combination()
        kept = target.examples.take(test)
        outputs = combination.apply(kept.members, kept.features)
        measure = accuracy if score == "accuracy" else log_score
        results.append(measure(outputs, kept.labels, task))
    return np.array(results)


@dataclass(frozen=True)
class Found:
    """The best settings of a grid.

    Attributes:
        settings: by name.
        table: every combination with its score, in the order of the grid.
        edges: settings that lie at an edge of their grid (0 is no edge: nothing lies below it).
    """

    settings: Mapping[str, float]
    table: tuple[tuple[Mapping[str, float], float], ...]
    edges: tuple[str, ...]

    def sentence(self) -> str:
        """Return what was chosen, and a warning where the grid was too narrow."""
        chosen = ", ".join(f"{name} {value:g}" for name, value in self.settings.items())
        text = f"{chosen}, the best of {len(self.table)}"
        return text + (f"; {' and '.join(self.edges)} at the edge of the grid" if self.edges else "")


@dataclass(frozen=True)
class Chosen(Found):
    """Settings chosen on held-out tasks.

    Attributes:
        method: with them.
    """

    method: Method

    def sentence(self) -> str:
        """Return what was chosen for which method."""
        return f"{self.method.name}: {super().sentence()}"


def fit_settings(
    family: Callable[..., Method],
    grid: Mapping[str, Sequence[float]],
    tasks: Sequence[HeldOutTask],
    task: Task = "preference",
    n: int | Sequence[int] = 5,
    score: Score = "log",
    draws: int = 5,
    seed: int = 0,
) -> Chosen:
    """Return the settings with the best mean score after n labels over held-out tasks; the first of equals.

    Args:
        family: settings by name -> method, such as `GaussianHeads` itself.
        grid: ordered values of every setting.
        tasks: never the target.
        task: what the members are for.
        n: labels to adapt to; the mean over several.
        score: mean log-likelihood, or accuracy.
        draws: of labels, for every task.
        seed: of the draws.
    """
    if not tasks:
        raise ConfigError("settings are chosen on held-out tasks, found none")
    numbers = (n,) if isinstance(n, int) else tuple(n)

    def mean_score(**settings: float) -> float:
        method = family(**settings)
        return float(np.mean([scores(method, one, k, task, score, draws, seed) for one in tasks for k in numbers]))

    found = search(grid, mean_score)
    return Chosen(found.settings, found.table, found.edges, family(**found.settings))


def search(grid: Mapping[str, Sequence[float]], score: Callable[..., float]) -> Found:
    """Return the settings of the highest score among all combinations of a grid; the first of equals.

    Settings under which a method breaks (`NonFiniteError`) score minus infinity.
    """
    if not grid or not all(len(values) for values in grid.values()):
        raise ConfigError("settings are chosen from a grid of at least one value each, found an empty one")
    table: list[tuple[Mapping[str, float], float]] = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        try:
            table.append((settings, score(**settings)))
        except NonFiniteError:
            table.append((settings, -math.inf))
    best, value = max(table, key=lambda row: row[1])
    if not math.isfinite(value):
        raise NonFiniteError(f"no combination of {', '.join(grid)} has a finite score")
    edges = tuple(
        name
        for name, values in grid.items()
        if len(values) > 1 and best[name] != 0 and best[name] in (min(values), max(values))
    )
    return Found(best, tuple(table), edges)


def fit_eta(
    tasks: Sequence[HeldOutTask],
    hyre: HyRe | None = None,
    grid: Sequence[float] = ETA_GRID,
    task: Task = "preference",
    n: int | Sequence[int] = 5,
    score: Score = "log",
    draws: int = 5,
    seed: int = 0,
) -> Chosen:
    """Return HyRe with the eta of the best mean score after n labels over held-out tasks."""
    base = HyRe() if hyre is None else hyre
    return fit_settings(lambda eta: replace(base, eta=eta), {"eta": grid}, tasks, task, n, score, draws, seed)
