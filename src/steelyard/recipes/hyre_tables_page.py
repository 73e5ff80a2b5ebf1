"""What E2 says: findings with intervals and tables, from rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steelyard.bench.stats import Estimate, Floats, cluster_estimate, number
from steelyard.recipes.hyre_tables_runs import (
    BEST,
    DIGITS,
    FLOOR,
    GAUSSIAN,
    NO_FLOOR,
    REGRESSION,
    RESIDUAL,
    RIDGE,
    SINGLE,
    SPREAD,
    UNIFORM,
    TableStudy,
)
from steelyard.recipes.preference_findings import Finding, above
from steelyard.report.page import Section
from steelyard.report.tables import Cell, Table
from steelyard.rng import numpy_generator

Row = Mapping[str, Any]
UNTUNED = ", eta = 1"
METHODS = (
    SINGLE, BEST, NO_FLOOR + UNTUNED, SPREAD + UNTUNED, FLOOR + UNTUNED, NO_FLOOR, SPREAD, FLOOR, GAUSSIAN, RIDGE,
    RESIDUAL,
)  # fmt: skip
SMALL = "small networks; other shifts and tables than the paper's where its list is not known to us"


class Ratios:
    """Errors relative to the uniform mean, by ensemble, method, n and shift, with settings chosen on other tables.

    Attributes:
        shifts: all of them.
        tables: of each shift.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.tables = {row["shift"]: row["table"] for row in rows}
        self.shifts = list(self.tables)
        self._found: dict[tuple[str, str, int], dict[float, dict[str, Row]]] = {}
        for row in rows:
            settings = self._found.setdefault((row["ensemble"], row["method"], row["n"]), {})
            settings.setdefault(row["setting"], {})[row["shift"]] = row

    def chosen(self, ensemble: str, method: str, n: int, table: str) -> float:
        """Return the setting with the least mean logarithm on all other tables; with no other table, the middle one."""
        settings = self._found[ensemble, method, n]
        others = [shift for shift in self.shifts if self.tables[shift] != table]
        if not others:
            return sorted(settings)[len(settings) // 2]
        return min(settings, key=lambda one: float(np.mean([np.log(settings[one][s]["ratio"]) for s in others])))

    def of(self, ensemble: str, method: str, n: int, value: str = "ratio") -> Floats:
        """Return one value a shift. A method whose name ends with `UNTUNED` has the paper's eta."""
        fixed = method.endswith(UNTUNED)
        method = method.removesuffix(UNTUNED)
        settings = self._found[ensemble, method, n]
        keys = [1.0 if fixed else self.chosen(ensemble, method, n, self.tables[shift]) for shift in self.shifts]
        return np.array([settings[key][shift][value] for key, shift in zip(keys, self.shifts, strict=True)])

    def gain(self, ensemble: str, method: str, n: int, other: str | None = None) -> Floats:
        """Return by how much a method errs less than another (None: the uniform mean): 100 x log ratio, a shift."""
        gain = -100 * np.log(self.of(ensemble, method, n))
        return gain if other is None else gain - self.gain(ensemble, other, n)

    def estimate(self, values: Floats) -> Estimate:
        """Return the mean over shifts with an interval that resamples tables, or shifts where there is one table."""
        tables = [self.tables[shift] for shift in self.shifts]
        clusters = tables if len(set(tables)) > 1 else self.shifts
        return cluster_estimate(values, clusters, numpy_generator(0, "tables/estimate"))


def findings(regression: Sequence[Row], classification: Sequence[Row]) -> list[Finding]:
    """Return the claims with their verdicts."""
    found = []
    if regression:
        ratios = Ratios(regression)
        few, many = _shots(regression)
        for claim, ensemble, method, n, other in (
            (f"With {few} labels HyRe errs less than the uniform ensemble under shift (shared base)", "shared", SPREAD,
             few, None),
            (f"With {few} labels HyRe errs less than the uniform ensemble under shift (independent networks)",
             "vanilla", SPREAD, few, None),
            (f"Ours: with {few} labels HyRe errs less than adding their mean residual (shared base)", "shared", SPREAD,
             few, RESIDUAL),
            (f"Ours: with noisy heads (priors), {many} labels and eta = 1 HyRe needs a floor under members' variances",
             "prior", SPREAD + UNTUNED, many, NO_FLOOR + UNTUNED),
        ):  # fmt: skip
            gain = ratios.gain(ensemble, method, n, other)
            estimate = ratios.estimate(gain)
            against = "the uniform mean" if other is None else f"{other!r}"
            better = f"{int(np.sum(gain > 0))} of {len(gain)} shifts better"
            measured = f"100 x log of the error of {against} over HyRe's: {estimate.text(1)}; {better}"
            found.append(Finding(claim, above(estimate), measured, SMALL))
    if classification:
        few, _ = _shots(classification)
        gain = 100 * (
            _accuracies(classification, "shared", "HyRe", few) - _accuracies(classification, "shared", UNIFORM, few)
        )
        estimate = _estimate(gain)
        found.append(
            Finding(
                f"With {few} labels HyRe classifies changed digits better than the uniform ensemble (shared base)",
                above(estimate),
                f"{estimate.text(1)} points of accuracy, {int(np.sum(gain > 0))} of {len(gain)} changes above 0",
                "digits of 8 x 8 pixels under changes made here, not WILDS",
            )
        )
    return found


def section(
    config: TableStudy,
    regression: Sequence[Row],
    classification: Sequence[Row],
    notes: Sequence[str],
) -> Section:
    """Return the part of the page."""
    page = Section("E2: tables under shift")
    page.text(
        "Weak evidence: gains of some percent, and a correction with one parameter (add the mean residual of the same "
        "labels) is the baseline to beat."
    )
    page.notes(notes)
    if regression:
        page.table(_regression(config, Ratios(regression)))
    if classification:
        page.table(_digits(config, classification))
    return page


def _regression(config: TableStudy, ratios: Ratios) -> Table:
    rows = []
    for ensemble in REGRESSION:
        for method in METHODS:
            cells: list[Cell] = []
            for n in config.shots:
                values = ratios.of(ensemble, method, n)
                estimate = ratios.estimate(np.log(values))
                low, high = (None if x is None else float(np.exp(x)) for x in (estimate.low, estimate.high))
                cells.append(Estimate(float(np.exp(estimate.value)), low, high, estimate.n))
                cells.append(f"{int(np.sum(values < 1))}/{len(values)}")
            worst = ratios.of(ensemble, method, config.shots[-1], "worst_draw").max()
            effective = ratios.of(ensemble, method, config.shots[-1], "ess").mean()
            rows.append((ensemble, method, *cells, number(float(worst)), _plain(effective)))
    header = [title for n in config.shots for title in (f"n = {n}", "better")]
    tables = len(set(ratios.tables.values()))
    chosen = (
        "Settings (eta, prior weights) of a table are chosen on the others."
        if tables > 1
        else "There is one table, so that no setting can be chosen on another: each is the middle of its grid."
    )
    return Table(
        "E2: error relative to the uniform mean",
        f"{len(ratios.shifts)} shifts of {tables} tables, {config.draws} draws; RMSE over that of the uniform mean of "
        "the same ensemble, geometric mean, below 1 is better; intervals resample "
        f"{'tables' if tables > 1 else 'shifts'}. Better: shifts below 1. {chosen} Worst draw and effective members: "
        f"at n = {config.shots[-1]}. A floor is the least variance of a member's likelihood: without one, residuals on "
        "training rows say how far off members are on shifted ones.",
        ("ensemble", "method", *header, "worst draw", "effective members"),
        tuple(rows),
    )


def _digits(config: TableStudy, rows: Sequence[Row]) -> Table:
    cells = []
    for ensemble in DIGITS:
        values: list[Cell] = [
            number(float(_accuracies(rows, ensemble, name, config.shots[0]).mean()), 3)
            for name in (SINGLE, UNIFORM, BEST)
        ]
        for n in config.shots:
            gain = 100 * (_accuracies(rows, ensemble, "HyRe", n) - _accuracies(rows, ensemble, UNIFORM, n))
            values += [number(float(_accuracies(rows, ensemble, "HyRe", n).mean()), 3), _estimate(gain).text(1)]
        cells.append((ensemble, *values))
    header = [title for n in config.shots for title in (f"HyRe, n = {n}", "minus uniform, points")]
    return Table(
        "E2: changed digits",
        "Accuracy over 18 changes of held-out digits (turned, noisy, moved, paler, negative, mirrored, cut); intervals "
        "resample changes; eta is chosen on the other changes of other images.",
        ("ensemble", SINGLE, UNIFORM, BEST, *header),
        tuple(cells),
    )


def _accuracies(rows: Sequence[Row], ensemble: str, method: str, n: int) -> Floats:
    return np.array(
        [row["accuracy"] for row in rows if (row["ensemble"], row["method"], row["n"]) == (ensemble, method, n)]
    )


def _estimate(values: Floats) -> Estimate:
    return cluster_estimate(values, range(len(values)), numpy_generator(0, "tables/digits"))


def _shots(rows: Sequence[Row]) -> tuple[int, int]:
    numbers = sorted({int(row["n"]) for row in rows})
    return numbers[0], numbers[-1]


def _plain(value: float) -> str:
    return "-" if np.isnan(value) else number(float(value), 1)
