"""What adaptive best-of-N actions bring on the point maze: findings with intervals, a curve and tables, from rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from steelyard.bench.stats import Estimate, Floats, mean, number, stratified_estimate
from steelyard.errors import MissingExtraError
from steelyard.recipes.adaptive_statistics import Outcome, fraction_of_gain
from steelyard.recipes.preference_findings import Finding, above
from steelyard.report.page import Section
from steelyard.report.plots import Frame, Picture, Series, lines
from steelyard.report.tables import MISSING, Cell, Table
from steelyard.rng import numpy_generator

Row = Mapping[str, Any]
MODE, FIXED, THRESHOLD, GAIN = "mode", "fixed", "threshold", "expected gain"
CHANCE, BOUND = "stop by chance", "expected gain, known"
RULES = (THRESHOLD, GAIN)
DIFFERS = "not in the paper, whose samples are texts; small networks, one maze"
DEFINITIONS = (
    (MODE, "the policy's mode: noise 0, no critic"),
    (FIXED, "best of K candidates by the critic, in every state"),
    (THRESHOLD, "draws until P(no fresh draw is better) reaches a threshold"),
    (GAIN, "draws until the expected gain of a draw in Q falls below a cost"),
    (CHANCE, "stops after each draw with a fixed probability; the best so far is played"),
    (BOUND, "the same with 128 further draws that are not counted: a bound, not a method"),
)


class Study(Protocol):
    """What the page reads of the settings."""

    @property
    def fixed(self) -> tuple[int, ...]:
        """K of fixed best-of-K."""
        ...

    @property
    def means(self) -> tuple[float, ...]:
        """Mean candidates that rules are matched to."""
        ...

    @property
    def episodes(self) -> int:
        """A seed and method."""
        ...


class Numbers:
    """Values by method and mean candidates, paired over seeds and episodes.

    Returns are minus the decisions' steps taken: at least minus the time limit.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.seeds = sorted({row["seed"] for row in rows})
        self._rows: dict[tuple[str, float, int], list[Row]] = {}
        for row in rows:
            self._rows.setdefault((row["method"], row["mean"], row["seed"]), []).append(row)

    def of(self, method: str, count: float, value: str) -> list[Floats]:
        """Return values [episodes] of each seed: "return", "success", "length", "evaluations" or "decisions"."""
        sign, column = (-1.0, "length") if value == "return" else (1.0, value)
        found = []
        for seed in self.seeds:
            rows = sorted(self._rows[method, count, seed], key=lambda row: int(row["episode"]))
            found.append(sign * np.array([float(row[column]) for row in rows]))
        return found

    def estimate(self, method: str, count: float, value: str) -> Estimate:
        """Return the mean, with an interval that resamples episodes within seeds."""
        return stratified_estimate(self.of(method, count, value), mean, numpy_generator(0, "actions/estimate"))

    def per_decision(self, method: str, count: float) -> float:
        """Return the candidates drawn a decision, over all episodes."""
        return _total(self.of(method, count, "evaluations")) / _total(self.of(method, count, "decisions"))

    def per_step(self, method: str, count: float) -> float:
        """Return the candidates drawn a step of the environment."""
        return _total(self.of(method, count, "evaluations")) / _total(self.of(method, count, "length"))

    def outcome(self, method: str, count: float) -> Outcome:
        """Return returns and evaluations of all episodes as `adaptive_statistics` reads them."""
        rewards = np.concatenate(self.of(method, count, "return"))
        drawn = np.concatenate(self.of(method, count, "evaluations"))
        return Outcome(f"{method} {count:g}", rewards, drawn, np.zeros_like(drawn), drawn)

    def fixed_at(self, fixed: Sequence[int], evaluations: float, value: str) -> list[Floats]:
        """Return fixed best-of-K at as many evaluations a decision: linear in log K between its two neighbours."""
        high = next((index for index, count in enumerate(fixed) if count >= evaluations), len(fixed) - 1)
        low, high = max(0, high - 1), max(1, high)
        place = math.log(evaluations / fixed[low]) / math.log(fixed[high] / fixed[low])
        place = min(1.0, max(0.0, place))
        pairs = zip(self.of(FIXED, fixed[low], value), self.of(FIXED, fixed[high], value), strict=True)
        return [(1 - place) * a + place * b for a, b in pairs]

    def difference(self, one: Sequence[Floats], other: Sequence[Floats]) -> tuple[Estimate, int]:
        """Return the paired mean difference and in how many seeds it is above 0."""
        differences = [a - b for a, b in zip(one, other, strict=True)]
        estimate = stratified_estimate(differences, mean, numpy_generator(0, "actions/difference"))
        return estimate, sum(float(one.mean()) > 1e-9 for one in differences)


def _total(values: Sequence[Floats]) -> float:
    return float(sum(one.sum() for one in values))


def findings(study: Study, rows: Sequence[Row], states: Sequence[Row]) -> list[Finding]:
    """Return the claims with their verdicts."""
    numbers, most = Numbers(rows), study.fixed[-1]
    found = []

    def add(claim: str, one: Sequence[Floats], other: Sequence[Floats], extra: str = "") -> None:
        estimate, better = numbers.difference(one, other)
        measured = f"{estimate.text(1)} in return; above 0 in {better} of {len(numbers.seeds)} seeds{extra}"
        found.append(Finding(f"Ours: {claim}", above(estimate), measured, DIFFERS))

    first = numbers.of(FIXED, 1, "return")
    add(f"best of {most} actions returns more than one draw", numbers.of(FIXED, most, "return"), first)
    before = study.fixed[-2]
    add(
        f"the critic is not over-used: best of {most} returns more than best of {before}",
        numbers.of(FIXED, most, "return"),
        numbers.of(FIXED, before, "return"),
    )
    for count in study.means:
        for method in RULES:
            evaluations = numbers.per_decision(method, count)
            own, spent = numbers.of(method, count, "return"), f" ({evaluations:.2f} evaluations a decision)"
            add(
                f"{method}, {count:g} evaluations on average: more than fixed best-of-K at as many",
                own,
                numbers.fixed_at(study.fixed, evaluations, "return"),
                spent,
            )
            by_chance = f" (and {numbers.per_decision(CHANCE, count):.2f})"
            add(
                f"{method}, {count:g} evaluations on average: more than stopping by chance",
                own,
                numbers.of(CHANCE, count, "return"),
                spent + by_chance,
            )
            more = _chosen(states, method, count) - _chosen(states, CHANCE, count)
            against = stratified_estimate([more], mean, numpy_generator(0, "actions/chosen"))
            found.append(
                Finding(
                    f"Ours: {method}, {count:g} evaluations on average: chooses actions of higher Q than stopping by "
                    "chance, in the same states",
                    above(against),
                    f"{against.text(2)} of the gain of best of {most}; {int(np.sum(more > 0))} of {len(more)} seeds",
                    DIFFERS,
                )
            )
    return found


def _chosen(states: Sequence[Row], method: str, count: float) -> Floats:
    """Return, seed by seed, the fraction of the gain in Q of the largest best-of-K over one draw."""
    found = {(row["method"], row["mean"], row["seed"]): float(row["value"]) for row in states}
    most = max(row["mean"] for row in states if row["method"] == FIXED)
    seeds = sorted({row["seed"] for row in states})
    one, best, own = (
        np.array([found[key, number, seed] for seed in seeds])
        for key, number in ((FIXED, 1.0), (FIXED, most), (method, count))
    )
    return np.asarray((own - one) / (best - one))


def section(study: Study, rows: Sequence[Row], states: Sequence[Row]) -> Section:
    """Return the part of the page."""
    numbers = Numbers(rows)
    page = Section("The same for robots: adaptive best-of-N actions on a point maze")
    error = float(np.mean([row["calibration_error"] for row in states]))
    within = float(np.mean([row["within_states"] for row in states]))
    page.text(
        "A flow clones the behaviour and draws chunks of actions, critics value them, and the best is played. A small "
        "network predicts the distribution of the critics' values over the policy's own draws in a state: from it "
        "follow the chance that a fresh draw is better, and by how much.",
        f"Calibration of that network in held-out states: mean error of its quantiles {error:.3f}. Of the variance of "
        f"values, {within:.0%} lies within states: only that is left to choose from.",
        "What is counted is candidates drawn and valued; one draw is counted as 1 although nothing is compared.",
    )
    failed = [one for one in findings(study, rows, states) if one.verdict == "does not hold"]
    page.notes([f"Does not hold here: {one.claim}: {one.measured}" for one in failed])
    try:
        page.panels(_curves(study, numbers))
    except MissingExtraError as missing:
        page.text(f"Curves are left out: {missing}.")
    return page.table(_table(study, numbers), _values(study, states))


def _curves(study: Study, numbers: Numbers) -> list[Picture]:
    pictures = []
    for value in ("return", "success"):
        series = []
        for index, method in enumerate((FIXED, *RULES, CHANCE)):
            counts: Sequence[float] = study.fixed if method == FIXED else study.means
            found = [numbers.estimate(method, count, value) for count in counts]
            series.append(
                Series(
                    method,
                    [one.value for one in found],
                    [one.value if one.low is None else one.low for one in found],
                    [one.value if one.high is None else one.high for one in found],
                    [numbers.per_step(method, count) for count in counts],
                    index,
                )
            )
        caption = f"Mean {value} against candidates valued a step; bands are 95% over episodes within seeds."
        frame = Frame(f"actions {value}", caption, "evaluations a step", value, log_x=True, small=True)
        pictures.append(lines(series, frame))
    return pictures


def _table(study: Study, numbers: Numbers) -> Table:
    one, best = numbers.outcome(FIXED, 1), numbers.outcome(FIXED, study.fixed[-1])
    rows: list[tuple[Cell, ...]] = []
    ways = [(MODE, 1.0), *((FIXED, float(count)) for count in study.fixed)]
    ways += [(method, count) for count in study.means for method in (*RULES, CHANCE)]
    for method, count in ways:
        name = method if method == MODE else f"{method}, {count:g}"
        kept = fraction_of_gain(numbers.outcome(method, count), one, best)
        against: Cell = MISSING
        if method in (*RULES, CHANCE):
            other = numbers.fixed_at(study.fixed, numbers.per_decision(method, count), "return")
            against = numbers.difference(numbers.of(method, count, "return"), other)[0].text(1)
        rows.append(
            (
                name,
                number(numbers.per_decision(method, count)),
                number(numbers.per_step(method, count)),
                numbers.estimate(method, count, "return").text(1),
                numbers.estimate(method, count, "success"),
                MISSING if kept is None else kept,
                against,
            )
        )
    return Table(
        "Return and success by how candidates are drawn",
        f"{len(numbers.seeds)} seeds with agents of their own, {study.episodes} episodes each from the same starts. "
        "Return: minus the steps until the goal, at least minus the time limit. Intervals resample episodes within "
        "seeds: they speak of these agents. Fraction of gain: (R - R of one draw) / (R of best of "
        f"{study.fixed[-1]} - R of one draw). The last column compares with fixed best-of-K at the same evaluations a "
        "decision, between two K linearly in log K.",
        ("method", "a decision", "a step", "return", "success", "fraction of gain", "return minus fixed"),
        tuple(rows),
        DEFINITIONS,
    )


def _values(study: Study, states: Sequence[Row]) -> Table:
    """Return what is chosen in the same states, where there is no luck of episodes."""
    seeds = sorted({row["seed"] for row in states})
    found = {(row["method"], row["mean"], row["seed"]): row for row in states}
    rows: list[tuple[Cell, ...]] = []
    ways = [(FIXED, float(count)) for count in study.fixed[1:]]
    ways += [(method, count) for count in study.means for method in (*RULES, CHANCE, BOUND)]
    for method, count in ways:
        drawn = float(np.mean([found[method, count, seed]["evaluations"] for seed in seeds]))
        estimate = stratified_estimate([_chosen(states, method, count)], mean, numpy_generator(0, "actions/states"))
        rows.append((f"{method}, {count:g}", number(drawn), estimate))
    return Table(
        "What is chosen in the same states",
        "Fraction of the gain in Q of the largest best-of-K over one draw, in states of other episodes; intervals "
        "resample seeds. How much of it turns into return is the critic's affair.",
        ("method", "evaluations a decision", "fraction of the gain in Q"),
        tuple(rows),
    )
