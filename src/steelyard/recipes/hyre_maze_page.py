"""What HyRe's point maze says: findings with intervals, tables and curves, from rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steelyard.bench.stats import Estimate, Floats, cluster_estimate, number
from steelyard.errors import MissingExtraError
from steelyard.recipes.hyre_maze_worlds import BETWEEN, BEYOND, BOTH, GOAL, KINDS, TRAINED, MazeStudy
from steelyard.recipes.preference_findings import Finding, above
from steelyard.report.page import Section
from steelyard.report.plots import Frame, Picture, Series, lines
from steelyard.report.tables import MISSING, Cell, Table
from steelyard.rng import numpy_generator

Row = Mapping[str, Any]
DYNAMICS = (BETWEEN, BEYOND)
MAIN = ("HyRe", "Gaussian over heads", "fine-tuning", "HyRe by TD")
FIXED = ("uniform", "single", "best head, known")
SHOWN = (*FIXED, "HyRe", "Gaussian over heads", "best head", "head MAP", "fine-tuning", "HyRe by TD",
         "HyRe by returns", "HyRe by TD, random actions", "uniform, greedy", "HyRe by TD, greedy",
         "HyRe by returns, greedy")  # fmt: skip
DIFFERS = "not in the paper, whose members are reward models; small networks, one maze"
DEFINITIONS = (
    ("uniform", "mean of what all heads would do"),
    ("single", "the pooled head, which saw all worlds"),
    ("best head, known", "the one head with the least action error on the held-out demonstrations: no method, a bound"),
    ("HyRe", "heads weighted by the likelihood of demonstrated actions"),
    ("head MAP", "ridge fit of the pooled head's output layer to the demonstrated actions"),
    ("fine-tuning", "Adam on all layers of the pooled policy, rate and steps chosen for each n"),
    ("HyRe by TD", "policy heads weighted by the TD error of the critic heads on the demonstrator's rewarded steps"),
    ("by returns", "the same by the error of Q against the return that followed"),
    ("random actions", "TD errors of steps of random actions: no demonstrator at all"),
    ("greedy", "acts by the best of 32 random and all heads' actions under the weighted critic heads"),
)


class Numbers:
    """Values of methods by number of steps, over worlds and seeds.

    Attributes:
        worlds: unseen ones, with their kinds.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.worlds = {row["world"]: row["kind"] for row in rows if row["kind"] != TRAINED}
        self._found = {(row["method"], row["n"], row["world"], row["seed"]): row for row in rows}
        self.seeds = sorted({row["seed"] for row in rows})
        self.methods = {(row["method"], row["n"]) for row in rows if "success" in row}

    def of(self, method: str, n: int, value: str, kinds: Sequence[str] = KINDS) -> tuple[Floats, list[str]]:
        """Return values [worlds x seeds] and the world of each; what needs no steps has the same ones for every n."""
        if (method, 0, next(iter(self.worlds)), self.seeds[0]) in self._found:
            n = 0
        where = [(world, seed) for world, kind in self.worlds.items() if kind in kinds for seed in self.seeds]
        values = np.array([float(self._found[method, n, world, seed][value]) for world, seed in where])
        return values, [world for world, _ in where]

    def estimate(self, method: str, n: int, value: str, kinds: Sequence[str] = KINDS) -> Estimate:
        """Return the mean with an interval that resamples worlds."""
        values, worlds = self.of(method, n, value, kinds)
        return cluster_estimate(values, worlds, numpy_generator(0, "hyre_maze/estimate"))

    def gain(
        self, method: str, other: str, n: int, value: str = "success", kinds: Sequence[str] = KINDS
    ) -> tuple[Estimate, int, int]:
        """Return the paired difference, in how many worlds it is above 0, and how many there are."""
        values, worlds = self.of(method, n, value, kinds)
        differences = values - self.of(other, n, value, kinds)[0]
        means = [differences[[w == world for w in worlds]].mean() for world in dict.fromkeys(worlds)]
        estimate = cluster_estimate(differences, worlds, numpy_generator(0, "hyre_maze/gain"))
        return estimate, int(np.sum(np.array(means) > 1e-9)), len(means)


def findings(study: MazeStudy, rows: Sequence[Row]) -> list[Finding]:
    """Return the claims with their verdicts."""
    numbers, most = Numbers(rows), max(study.shots)
    few = max((n for n in study.shots if n <= 5), default=most)
    labelled, rewarded, reach = "{n} labelled steps: ", "{n} rewarded steps: ", "succeeds more often than "
    td, by_returns, random = "HyRe by TD", "HyRe by returns", "HyRe by TD, random actions"
    tells = "TD errors of critic heads tell which "
    wanted: list[tuple[str, str, str, int, Sequence[str]]] = [
        (f"{labelled}HyRe over policy heads {reach}their mean", "HyRe", "uniform", few, KINDS),
        (f"{labelled}HyRe over policy heads {reach}the single policy", "HyRe", "single", few, KINDS),
        (f"{labelled}HyRe {reach}fine-tuning the single policy", "HyRe", "fine-tuning", few, KINDS),
        (f"{labelled}a Gaussian over heads {reach}HyRe", "Gaussian over heads", "HyRe", most, KINDS),
        (f"{labelled}HyRe reaches new goals more often than the mean of the heads", "HyRe", "uniform", most, (GOAL,)),
        (f"{rewarded}{tells}dynamics these are (policy heads, against their mean)", td, "uniform", most, DYNAMICS),
        (f"{rewarded}{tells}goal this is", td, "uniform", most, (GOAL,)),
        ("{n} steps with the returns that followed tell which goal this is", by_returns, "uniform", most, (GOAL,)),
        (f"{rewarded}random actions are enough, without a demonstrator", random, "uniform", most, DYNAMICS),
        (f"{rewarded}greedy on re-weighted critics {reach}on their mean", f"{td}, greedy", "uniform, greedy", most,
         KINDS),
    ]  # fmt: skip
    found = []
    for claim, method, other, n, kinds in wanted:
        if not any(kind in kinds for kind in numbers.worlds.values()):
            continue
        estimate, better, count = numbers.gain(method, other, n, kinds=kinds)
        scaled = _points(estimate)
        measured = f"{scaled.text(1)} points of success; {better} of {count} worlds above 0"
        found.append(Finding("Ours: " + claim.format(n=n), above(scaled), measured, DIFFERS))
    return found


def section(study: MazeStudy, rows: Sequence[Row]) -> Section:
    """Return the part of the page."""
    numbers = Numbers(rows)
    page = Section("HyRe for agents: a point maze with changed dynamics or goal")
    own, greedy = (
        float(np.mean([row["success"] for row in rows if row["method"] == method]))
        for method in ("own head", "own critic, greedy")
    )
    page.text(
        f"One network with {len(study.training)} policy heads and as many critic heads, each for one world of the "
        "prior data (turned, exchanged, weaker or blown-about actuators, or another goal), and a pooled one. In "
        f"{len(numbers.worlds)} unseen worlds the heads are re-weighted by n steps and act together.",
        ("What does not work: acting on the critics. " if greedy < own else "")
        + "In the worlds that the critics were trained for, with the right one known, acting greedily on it succeeds "
        f"in {greedy:.0%} of the episodes, the policy head of that world in {own:.0%}.",
    )
    try:
        page.panels(_curves(study, numbers))
    except MissingExtraError as error:
        page.text(f"Curves are left out: {error}.")
    page.table(_success(study, numbers), _by_kind(study, numbers), _errors(study, numbers))
    return page


def _curves(study: MazeStudy, numbers: Numbers) -> list[Picture]:
    pictures = []
    groups = (("changed dynamics", DYNAMICS), ("new goal", (GOAL,)), ("both", (BOTH,)))
    present = [one for one in groups if any(kind in one[1] for kind in numbers.worlds.values())]
    for title, kinds in present:
        series = []
        for index, method in enumerate((*MAIN, "uniform", "single")):
            found = [numbers.estimate(method, n, "success", kinds) for n in study.shots]
            x, y = [float(n) for n in study.shots], [one.value for one in found]
            series.append(Series(method, y, x=x, index=index))
        count = sum(kind in kinds for kind in numbers.worlds.values())
        caption = f"Success in {count} unseen worlds with {title}: mean over worlds, seeds and episodes."
        frame = Frame(f"hyre maze {title}", caption, "labelled or rewarded steps", "success", log_x=True,
                      ylim=(-0.03, 1.03), small=True)  # fmt: skip
        pictures.append(lines(series, frame))
    return pictures


def _success(study: MazeStudy, numbers: Numbers) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for method in SHOWN:
        cells: list[Cell] = []
        for n in study.shots:
            played = {(method, n), (method, 0)} & numbers.methods
            cells.append(numbers.estimate(method, n, "success") if played else MISSING)
        total = numbers.estimate(method, max(study.shots), "return")
        gain, better, count = numbers.gain(method, "uniform", max(study.shots))
        against = MISSING if method == "uniform" else f"{_points(gain).text(1)}, {better}/{count}"
        rows.append((method, *cells, total.text(1), against))
    episodes = len(numbers.seeds) * study.episodes
    return Table(
        "Success in unseen worlds, by steps to adapt with",
        f"{len(numbers.worlds)} worlds, {len(numbers.seeds)} seeds, {episodes} episodes a world and method from paired "
        f"starts. The last two columns are at n = {max(study.shots)}: return (minus the steps taken; at least "
        "minus the time limit), and points of success above the mean of the policy heads with the worlds in which it "
        "is above 0. Intervals resample worlds. Settings of every method are chosen for each n by the action error in "
        f"{len(study.validation)} other worlds.",
        ("method", *(f"n = {n}" for n in study.shots), "return", "minus uniform, points"),
        tuple(rows),
        DEFINITIONS,
    )


def _by_kind(study: MazeStudy, numbers: Numbers) -> Table:
    kinds = [kind for kind in KINDS if kind in numbers.worlds.values()]
    most = max(study.shots)
    rows: list[tuple[Cell, ...]] = []
    for method in SHOWN:
        rows.append((method, *(numbers.estimate(method, most, "success", (kind,)) for kind in kinds)))
    counts = [sum(found == kind for found in numbers.worlds.values()) for kind in kinds]
    return Table(
        f"Success by what changed, n = {most}",
        "Between and beyond: inside or outside what the training worlds span. Critics of different goals agree on "
        "every step away from the goals, so that TD errors alone say little about a goal.",
        ("method", *(f"{kind} ({count})" for kind, count in zip(kinds, counts, strict=True))),
        tuple(rows),
    )


def _errors(study: MazeStudy, numbers: Numbers) -> Table:
    rows = []
    for method in SHOWN:
        if method.endswith("greedy"):
            continue
        cells: list[Cell] = [number(float(numbers.of(method, n, "error")[0].mean()), 3) for n in study.shots]
        hyre = method.startswith("HyRe")
        ess = number(float(numbers.of(method, max(study.shots), "ess")[0].mean()), 1) if hyre else MISSING
        rows.append((method, *cells, ess))
    return Table(
        "Error of actions on held-out demonstrations",
        "Mean squared error of each number of an action, of [-1, 1]; the noise of the demonstrator is part of it. "
        f"Effective members at n = {max(study.shots)}, of {len(study.training) + 1}.",
        ("method", *(f"n = {n}" for n in study.shots), "effective members"),
        tuple(rows),
    )


def _points(estimate: Estimate) -> Estimate:
    low, high = (None if x is None else 100 * x for x in (estimate.low, estimate.high))
    return Estimate(100 * estimate.value, low, high, estimate.n)
