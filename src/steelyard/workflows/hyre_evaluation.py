"""What a head set is worth on held-out groups: scores after n labels, and the settings that adapt best.

A held-out group is a user (annotator, source) that no head has seen. Settings are chosen on one half of the groups and
scored on the other, and the other way round, so no row of the evaluation has seen its own settings chosen; what is
saved is chosen on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from steelyard.adapt.artefact import AdaptSettings, MethodName
from steelyard.adapt.base import Floats, Method, Task, accuracy, rmse
from steelyard.adapt.choose import Chosen, HeldOutTask, Single, draw, fit_settings, scores
from steelyard.config import Config, require_positive, require_range
from steelyard.errors import ConfigError
from steelyard.rng import numpy_generator

ETAS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
HEADS_WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
FEATURE_WEIGHTS = (0.0, 1e-4, 1e-3, 1e-2)
FLOORS = (0.0, 1.0, 4.0)
"""Least variance of a member's residuals, in units of their mean over the members."""
MOST_TASKS = 16
"""Held-out groups that settings are chosen on; evaluation rows are of all of them."""
MOST_DRAWS = 3
"""Draws of labels from each of them for that."""


@dataclass(frozen=True)
class AdaptationConfig(Config):
    """How a head set is adapted to held-out groups, and evaluated there."""

    method: MethodName | Literal["choose"] = "choose"
    """The way of adapting that is saved; choose: hyre or gaussian, whichever does better on held-out groups."""
    labels: tuple[int, ...] = (1, 2, 5, 10, 20, 40)
    """Labels to adapt to; a group is scored at those of which it has twice as many."""
    choose_at: int = 5
    """Labels at which settings are chosen."""
    draws: int = 5
    """Draws of labels, for every group."""
    noise: float = 0.0
    """Assumed share of labels that are wrong."""
    mix: float = 0.0
    """Share of the prior that stays in the weights."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "labels", "choose_at", "draws")
        require_range(self, 0, 1, "mix")
        if not 0 <= self.noise < 1:
            raise ConfigError(f"noise must be at least 0 and below 1, found {self.noise}")

    @property
    def first(self) -> AdaptSettings:
        """Settings before anything is chosen."""
        method: MethodName = "hyre" if self.method == "choose" else self.method
        return AdaptSettings(method, noise=self.noise, mix=self.mix)


def sizes(tasks: Sequence[HeldOutTask], labels: Sequence[int]) -> dict[int, list[HeldOutTask]]:
    """Return {n: groups with at least 2 n different examples}; a number that no group has is left out."""
    found: dict[int, list[HeldOutTask]] = {}
    for n in labels:
        large = [task for task in tasks if 2 * n <= _different(task)]
        if large:
            found[n] = large
    return found


def _different(task: HeldOutTask) -> int:
    return len(task.examples) if task.sources is None else len(np.unique(task.sources))


@dataclass(frozen=True)
class Choice:
    """Settings chosen on held-out groups.

    Attributes:
        settings: to save.
        sentences: what was chosen.
    """

    settings: AdaptSettings
    sentences: tuple[str, ...]


def choose(tasks: Sequence[HeldOutTask], config: AdaptationConfig, task: Task, variance: Floats, seed: int) -> Choice:
    """Choose settings of HyRe and of the Gaussian over heads, and which of the two is saved.

    Args:
        tasks: held-out groups.
        config: what is asked for.
        task: what the members are for.
        variance: [H] of a regression's members' residuals.
        seed: of the draws of labels.
    """
    first = config.first
    n, large = _choosing(tasks, config)
    if not large:
        return Choice(first, ("no settings were chosen: no two held-out groups are large enough",))
    common: dict[str, Any] = {
        "tasks": large,
        "task": task,
        "n": n,
        "draws": min(config.draws, MOST_DRAWS),
        "seed": seed,
    }
    first = replace(first, variance=float(variance.mean()) if task == "regression" else 1.0)

    def build(method: MethodName) -> Callable[..., Method]:
        return lambda **values: replace(first, method=method, **values).build(task, variance)

    grid: dict[str, Sequence[float]] = {"eta": ETAS}
    if task == "regression":
        grid["variance_floor"] = tuple(floor * first.variance for floor in FLOORS)
    of_hyre = fit_settings(build("hyre"), grid, **common)
    of_gaussian = fit_settings(
        build("gaussian"), {"heads_weight": HEADS_WEIGHTS, "feature_weight": FEATURE_WEIGHTS}, **common
    )
    values: dict[str, Any] = {**of_hyre.settings, **of_gaussian.settings}
    chosen = replace(first, **values)
    notes = [f"chosen at {n} labels on {len(large)} held-out groups", of_hyre.sentence(), of_gaussian.sentence()]
    if config.method == "choose":
        means = [_mean_score(found, large, n, task, config.draws, seed) for found in (of_hyre, of_gaussian)]
        chosen = replace(chosen, method="gaussian" if means[1] > means[0] else "hyre")
        what = "log score" if task == "regression" else "accuracy"
        notes.append(f"saved: {chosen.method} ({what} {means[0]:.3f} with hyre, {means[1]:.3f} with gaussian)")
    return Choice(chosen, tuple(notes))


def _choosing(tasks: Sequence[HeldOutTask], config: AdaptationConfig) -> tuple[int, list[HeldOutTask]]:
    """Return how many labels settings are chosen at, and the groups that have twice as many; none where too few do."""
    for n in sorted((n for n in {*config.labels, config.choose_at} if n <= config.choose_at), reverse=True):
        large = [task for task in tasks if 2 * n <= _different(task)]
        if len(large) >= 2:
            return n, large[:MOST_TASKS]
    return config.choose_at, []


def _mean_score(found: Chosen, tasks: Sequence[HeldOutTask], n: int, task: Task, draws: int, seed: int) -> float:
    score: Literal["log", "accuracy"] = "log" if task == "regression" else "accuracy"
    return float(np.mean([scores(found.method, one, n, task, score, draws, seed).mean() for one in tasks]))


def cross_fitted(
    tasks: Sequence[HeldOutTask], config: AdaptationConfig, task: Task, variance: Floats, seed: int
) -> tuple[AdaptSettings, ...]:
    """Return settings for every group, chosen on the half of the groups that it is not in."""
    halves = [choose(tasks[1 - half :: 2], config, task, variance, seed).settings for half in range(2)]
    return tuple(halves[number % 2] for number in range(len(tasks)))


def evaluation_rows(
    tasks: Sequence[HeldOutTask],
    settings: Sequence[AdaptSettings],
    config: AdaptationConfig,
    task: Task,
    variance: Floats,
    seed: int,
) -> list[dict[str, Any]]:
    """Return one row for each (group, number of labels, method): the mean over draws on examples not drawn.

    `value` is the accuracy, of a regression the root of the mean squared error (`measure` says which). All methods see
    the same draws; "single" and "uniform" ignore them.
    """
    rows: list[dict[str, Any]] = []
    for number, (one, own) in enumerate(zip(tasks, settings, strict=True)):
        methods: dict[str, Method] = {
            "single": Single(),
            "uniform": replace(own, method="uniform").build(task, variance),
        }
        adapted: dict[str, Method] = {
            name: replace(own, method=name).build(task, variance) for name in ("hyre", "gaussian", "best")
        }
        for n in (0, *sizes([one], config.labels)):
            for name, method in (methods if n == 0 else methods | adapted).items():
                value, scored = _value(method, one, n, task, config.draws, seed)
                rows.append(_row(number, one.name, n, name, value, scored, task))
    return rows


def _value(method: Method, one: HeldOutTask, n: int, task: Task, draws: int, seed: int) -> tuple[float, int]:
    values, scored = [], 0
    for number in range(draws if n else 1):
        support, test = draw(one, n, numpy_generator(seed, f"adapt/draw/{one.name}", number))
        posterior = method.begin(one.examples.members.shape[1])
        if n:
            posterior = posterior.update(one.examples.take(support))
        kept = one.examples.take(test)
        outputs = posterior.combination().apply(kept.members, kept.features)
        right = rmse(outputs, kept.labels) if task == "regression" else accuracy(outputs, kept.labels, task)
        values.append(right)
        scored += len(test)
    return float(np.mean(values)), scored


def _row(number: int, group: str, n: int, method: str, value: float, scored: int, task: Task) -> dict[str, Any]:
    regression = task == "regression"
    return {
        "episode": number,
        "group": group,
        "n": n,
        "method": method,
        "measure": "rmse" if regression else "accuracy",
        "value": value,
        "return": -value if regression else value,
        "score": None if regression else value,
        "length": scored,
        "success": None,
    }


def headline(rows: Sequence[Mapping[str, Any]], method: str = "hyre") -> float | None:
    """Return the mean `return` of a method at the most labels up to 5, or of the single model where none were drawn."""
    numbers = sorted({row["n"] for row in rows if row["method"] == method and row["n"] <= 5})
    wanted = (method, numbers[-1]) if numbers else ("single", 0)
    values = [row["return"] for row in rows if (row["method"], row["n"]) == wanted]
    return float(np.mean(values)) if values and all(map(math.isfinite, values)) else None
