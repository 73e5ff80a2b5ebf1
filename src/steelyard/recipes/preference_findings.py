"""What a study says about a paper's claims: paired numbers in, a verdict and a table row out.

Nothing here is written by hand: whether a claim holds follows from the interval alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from steelyard.bench.stats import (
    Estimate,
    Floats,
    bootstrap_band,
    interquartile_mean,
    mean_estimate,
    number,
    sign_test,
    stratified_estimate,
)
from steelyard.report.tables import Table
from steelyard.rng import numpy_generator

Verdict = Literal["holds", "does not hold", "not clear"]
VERDICTS: tuple[Verdict, ...] = ("holds", "does not hold", "not clear")


@dataclass(frozen=True)
class Finding:
    """One claim and what was measured.

    Attributes:
        claim: the paper's, in one sentence.
        verdict: see `above` and `within`.
        measured: our number with its interval, in words.
        differs: what is not the same as in the paper.
    """

    claim: str
    verdict: Verdict
    measured: str
    differs: str


def above(estimate: Estimate) -> Verdict:
    """Return "holds" if the whole interval lies above zero, "does not hold" if below, else "not clear"."""
    if not estimate.excludes_zero():
        return "not clear"
    return "holds" if estimate.value > 0 else "does not hold"


def within(estimate: Estimate, margin: float) -> Verdict:
    """Return "holds" if the whole interval lies within +- margin, "does not hold" if outside, else "not clear"."""
    if estimate.low is None or estimate.high is None:
        return "not clear"
    if -margin <= estimate.low and estimate.high <= margin:
        return "holds"
    return "does not hold" if estimate.low > margin or estimate.high < -margin else "not clear"


def mean(values: Floats) -> Estimate:
    """Return the mean over seeds with its bootstrap interval; seeds whose value is not finite are left out."""
    kept = values[np.isfinite(values)]
    if len(kept) == 0:
        raise ValueError("no finite value")
    return mean_estimate(kept, numpy_generator(0, "study/mean"))


def iqm(values: Floats) -> Estimate:
    """Return the interquartile mean over seeds with its bootstrap interval."""
    return stratified_estimate([values], interquartile_mean, numpy_generator(0, "study/iqm"))


def band(curves: Floats) -> tuple[list[float], list[float], list[float]]:
    """Return (mean, low, high) [P] of curves [S, P], pointwise."""
    low, high = bootstrap_band(curves, numpy_generator(0, "study/band"), resamples=2000)
    return curves.mean(0).tolist(), low.tolist(), high.tolist()


def slopes(x: Sequence[float], values: Floats) -> Floats:
    """Return the least-squares slope over x [P] of each row of values [S, P]."""
    centred = np.asarray(x, np.float64) - np.mean(x)
    result: Floats = (values - values.mean(1, keepdims=True)) @ centred / (centred @ centred)
    return result


def words(differences: Floats, digits: int = 3) -> str:
    """Return the mean with its interval, how many seeds it rests on, and the p-value of a sign test."""
    estimate = mean(differences)
    better = int(np.sum(differences > 0))
    return (
        f"{estimate.text(digits)} ({better} of {len(differences)} seeds above 0, "
        f"sign test p = {number(sign_test(differences), 3)})"
    )


def claims_table(findings: Sequence[Finding], title: str = "Claims") -> Table:
    """Return claim | verdict | our measurement | what differs."""
    return Table(
        title,
        "Paired over seeds; brackets are 95% bootstrap intervals. The verdict follows from the interval alone: holds, "
        "if it lies wholly on the claim's side; does not hold, if wholly on the other; otherwise not clear.",
        ("claim", "verdict", "our measurement", "what differs"),
        tuple((f.claim, f.verdict, f.measured, f.differs) for f in findings),
    )


def tally(findings: Sequence[Finding]) -> str:
    """Return "7 hold, 2 do not, 3 are not clear"."""
    counts = [sum(finding.verdict == verdict for finding in findings) for verdict in VERDICTS]
    verbs = ("hold" if counts[0] != 1 else "holds", "do not" if counts[1] != 1 else "does not")
    return f"{counts[0]} {verbs[0]}, {counts[1]} {verbs[1]}, {counts[2]} {'are' if counts[2] != 1 else 'is'} not clear"
