"""What E1, E1b, E4 and E6 say: findings with intervals, tables and figures, from rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steelyard.bench.stats import Estimate, Floats, cluster_estimate, number, sign_test
from steelyard.recipes.hyre_population import Population
from steelyard.recipes.preference_findings import Finding, Verdict, above
from steelyard.report import plots
from steelyard.report.page import Section
from steelyard.report.plots import Frame, Series
from steelyard.report.tables import Table
from steelyard.rng import numpy_generator

Row = Mapping[str, Any]
Kinds = Mapping[str, Sequence[Row]]
MAIN = "user heads, pooled"
HYRE, GAUSSIAN, WIDE = "HyRe", "Gaussian over heads", "fine-tune head (wide grid)"
SINGLE, UNIFORM, ORACLE = "single model", "uniform mean", "best head (oracle)"
METHODS = (
    HYRE,
    "HyRe, 0-1 loss",
    "HyRe, eta 1",
    GAUSSIAN,
    "HyRe, then MAP",
    "head MAP",
    "ridge combination",
    "simplex MAP",
    "auto (leave one out)",
    "auto, highest score as it is",
    "fine-tune head (equal grid)",
    WIDE,
)
SHOTS = 5


class Scores:
    """Accuracies by (world, head set, method, n) -> {(split, target): accuracy}."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.found: dict[tuple[str, str, str, int], dict[tuple[int, str], float]] = {}
        for row in rows:
            key = (row["world"], row["heads"], row["method"], int(row["n"]))
            self.found.setdefault(key, {})[int(row["split"]), row["target"]] = float(row["accuracy"])

    def cells(self, world: str, method: str, n: int, heads: str = MAIN) -> dict[tuple[int, str], float]:
        """Return the accuracy of every (split, target); methods without labels stand under n = 0."""
        return self.found.get((world, heads, method, 0 if method in (SINGLE, UNIFORM, ORACLE) else n), {})

    def mean(self, world: str, method: str, n: int, heads: str = MAIN) -> float:
        """Return the mean accuracy over cells, NaN where there is none."""
        cells = self.cells(world, method, n, heads)
        return float(np.mean(list(cells.values()))) if cells else float("nan")

    def difference(self, world: str, one: str, other: str, n: int) -> tuple[Floats, list[str]]:
        """Return paired differences in points, and the user that each is of (both signs of one are one cluster)."""
        return _paired(self.cells(world, one, n), self.cells(world, other, n))


def estimate(values: Floats, users: Sequence[str]) -> Estimate:
    """Return the mean with an interval that resamples users."""
    return cluster_estimate(values, users, numpy_generator(0, "hyre/personas"))


def difference_text(one: Mapping[Any, float], other: Mapping[Any, float]) -> str:
    """Return how many points the cells of one lie above those of the other that they share, with the interval."""
    values, users = _paired(one, other)
    return estimate(values, users).text(1) if len(values) else ""


def _paired(one: Mapping[Any, float], other: Mapping[Any, float]) -> tuple[Floats, list[str]]:
    """Return paired differences in points, and the user that each is of (both signs of one are one cluster)."""
    keys = [key for key in one if key in other]
    return np.array([100 * (one[key] - other[key]) for key in keys]), [key[1].removeprefix("not ") for key in keys]


def _words(values: Floats, users: Sequence[str]) -> str:
    better = int(np.sum(values > 0))
    return (
        f"{estimate(values, users).text(1)} points, {better} of {len(values)} cells above 0 (sign test p = "
        f"{number(sign_test(values), 3)})"
    )


def _at_least(found: Estimate, points: float) -> Verdict:
    """Return "holds" if the value reaches so many points and the interval lies above 0."""
    if found.low is None or found.high is None:
        return "not clear"
    if found.value >= points and found.low > 0:
        return "holds"
    return "does not hold" if found.high < points else "not clear"


def findings(kinds: Kinds) -> list[Finding]:
    """Return the claims with their verdicts."""
    scores = Scores(kinds["rows"])
    if not scores.cells("agree", HYRE, SHOTS):
        return []
    differs = "a frozen encoder's features (or generated ones) in place of a fine-tuned reward model"
    found = []
    for other in (UNIFORM, SINGLE):
        values, users = scores.difference("agree", HYRE, other, SHOTS)
        verdict = _at_least(estimate(values, users), 7)
        found.append(
            Finding(f"{SHOTS} labels: HyRe is 7 points above the {other}", verdict, _words(values, users), differs)
        )
    values, users = scores.difference("agree", HYRE, WIDE, SHOTS)
    low, high = estimate(values, users).low, estimate(values, users).high
    verdict = (
        "not clear"
        if low is None or high is None
        else "holds"
        if low >= -1
        else "does not hold"
        if high < 0
        else "not clear"
    )
    claim = f"{SHOTS} labels, users mostly agree: HyRe is at least equal to widely tuned fine-tuning (within 1 point)"
    found.append(Finding(claim, verdict, _words(values, users), differs))
    values, users = scores.difference("conflict", HYRE, WIDE, SHOTS)
    if len(values):
        verdict = _at_least(estimate(values, users), 2)
        claim = f"{SHOTS} labels, users conflict: HyRe is 2 points above widely tuned fine-tuning"
        found.append(Finding(claim, verdict, _words(values, users), differs))
    shots = sorted({int(row["n"]) for row in kinds["rows"]} - {0, 1})
    for world, words in (("agree", "mostly agree"), ("conflict", "conflict")):
        parts = {
            n: estimate(*scores.difference(world, GAUSSIAN, HYRE, n)) for n in shots if scores.cells(world, HYRE, n)
        }
        if parts:
            worst = min(parts, key=lambda n: parts[n].value)
            lows = [one.low for one in parts.values() if one.low is not None]
            verdict = "holds" if min(lows) >= -0.5 else "does not hold" if (parts[worst].high or 0) < 0 else "not clear"
            measured = "; ".join(f"n = {n}: {one.text(1)}" for n, one in parts.items())
            claim = f"Users {words}: a Gaussian over the same heads is at least as good as HyRe at every n >= 2"
            found.append(Finding(claim, verdict, measured, "not in the paper"))
    for heads in dict.fromkeys(str(row["heads"]) for row in kinds["rows"]):
        if heads.startswith("shared base, ") and "user" not in heads:
            values, users = _paired(*(scores.cells("agree", method, SHOTS, heads) for method in (HYRE, UNIFORM)))
            claim = f"{SHOTS} labels help the ensemble of the paper ({heads}, linear, which all see everything)"
            found.append(Finding(claim, above(estimate(values, users)), _words(values, users), differs))
    found += _query_findings(kinds["queries"])
    return found


def _query_findings(rows: Sequence[Row]) -> list[Finding]:
    found = []
    for n in (2, 5):
        cells: dict[str, dict[tuple[Any, ...], float]] = {"random": {}, "bald": {}}
        for row in rows:
            if int(row["n"]) == n and row["how"] in cells:
                cells[row["how"]][row["split"], row["target"], row["draw"]] = float(row["accuracy"])
        keys = [key for key in cells["bald"] if key in cells["random"]]
        if keys:
            values = np.array([100 * (cells["bald"][key] - cells["random"][key]) for key in keys])
            users = [str(key[1]) for key in keys]
            claim = f"Questions chosen by BALD beat random ones after {n} answers"
            found.append(
                Finding(claim, above(estimate(values, users)), _words(values, users), "a pool of 40 pairs a user")
            )
    return found


def sections(population: Population, kinds: Kinds) -> list[Section]:
    """Return the part of the page."""
    scores = Scores(kinds["rows"])
    shots = list(population.shots)
    result = []
    for world, title in (("agree", "E1: unseen users"), ("conflict", "E1b: users who conflict")):
        section = Section(title)
        users = "personas" if population.source == "personas" else "generated users"
        section.text(
            f"{population.targets} unseen {users} in each of {population.splits} splits, {population.draws} draws of "
            f"the labelled pairs, {population.test_pairs} test pairs of other items. Heads: one for each of "
            f"{population.train} training users, and the pooled head. Settings were chosen on {population.validation} "
            "other users."
        )
        names = [name for name in METHODS if scores.cells(world, name, shots[0])]
        rows = [
            (
                name,
                *(number(100 * scores.mean(world, name, n), 1) for n in shots),
                number(100 * _worst(scores, world, name), 1),
            )
            for name in (SINGLE, UNIFORM, ORACLE, *names)
        ]
        section.table(
            Table(
                "Accuracy in % after n labels",
                "Mean over splits and users; last column: mean of the worst tenth of cells after 5 labels. The oracle "
                "chooses the best head on the test pairs.",
                ("method", *(f"n = {n}" for n in shots), "worst tenth"),
                tuple(rows),
            )
        )
        series = []
        for position, name in enumerate((HYRE, GAUSSIAN, WIDE, "head MAP", SINGLE, UNIFORM)):
            estimates = [_accuracy(scores, world, name, n) for n in shots]
            series.append(
                Series(
                    name,
                    [one.value for one in estimates],
                    [one.value if one.low is None else one.low for one in estimates],
                    [one.value if one.high is None else one.high for one in estimates],
                    x=shots,
                    index=position,
                )
            )
        frame = Frame(
            f"hyre_{world}", "Bands: 95 % bootstrap over users.", "labelled pairs n", "accuracy in %", log_x=True
        )
        section.figure(plots.lines(series, frame))
        if scores.cells(world, HYRE, SHOTS):
            section.figure(_differences(scores, world, names))
        edges = [row for row in kinds["settings"] if row["world"] == world and row["heads"] == MAIN and row["edges"]]
        section.notes([f"{len(edges)} chosen settings lie at an edge of their grid (settings.csv names them)."])
        result.append(section)
    return [*result, _queries(kinds["queries"])]


def _worst(scores: Scores, world: str, method: str) -> float:
    values = np.sort(list(scores.cells(world, method, SHOTS).values()))
    return float(values[: max(1, len(values) // 10)].mean()) if len(values) else float("nan")


def _accuracy(scores: Scores, world: str, method: str, n: int) -> Estimate:
    cells = scores.cells(world, method, n)
    users = [target.removeprefix("not ") for _, target in cells]
    return estimate(np.array([100 * value for value in cells.values()]), users)


def _queries(rows: Sequence[Row]) -> Section:
    section = Section("E4: which pair to ask about")
    section.text(
        "Every answer re-weights the heads before the next question; HyRe with the eta chosen for five "
        "labels. Joint BALD chooses all five before the first answer."
    )
    hows = list(dict.fromkeys(row["how"] for row in rows))
    asked = sorted({int(row["n"]) for row in rows})
    means = {
        (how, n): np.mean([float(row["accuracy"]) for row in rows if row["how"] == how and int(row["n"]) == n])
        for how in hows
        for n in asked
    }
    return section.table(
        Table(
            "Accuracy in % after n answers",
            "Mean over splits, users and two pools each.",
            ("criterion", *(f"n = {n}" for n in asked)),
            tuple((how, *(number(100 * float(means[how, n]), 1) for n in asked)) for how in hows),
        )
    )


def _differences(scores: Scores, world: str, names: Sequence[str]) -> plots.Picture:
    """Return how far HyRe is above each other method after a few labels."""
    others = [name for name in (SINGLE, UNIFORM, *names) if name != HYRE]
    found = [estimate(*scores.difference(world, HYRE, name, SHOTS)) for name in others]
    series = Series(
        "HyRe minus method",
        [one.value for one in found],
        [one.value if one.low is None else one.low for one in found],
        [one.value if one.high is None else one.high for one in found],
    )
    caption = f"HyRe with {SHOTS} labels minus each method; 95 % bootstrap over users. Right of 0: HyRe is better."
    frame = Frame(f"hyre_difference_{world}", caption, "difference in points of accuracy", level=0)
    return plots.dots(others, [series], frame)
