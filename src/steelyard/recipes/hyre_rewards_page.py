"""What E3 says: findings with intervals, tables and a figure, from rows alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steelyard.bench.stats import Estimate, Floats, cluster_estimate, number, sign_test
from steelyard.recipes.hyre_rewards_heads import MAIN, SHOTS, WITH_LENGTH, RewardStudy
from steelyard.recipes.hyre_rewards_runs import (
    BEST,
    BLOCK,
    GAUSSIAN,
    HYRE,
    LENGTH,
    LONGER,
    MAP,
    SINGLE,
    TUNED,
    TUNED_EQUAL,
    UNIFORM,
)
from steelyard.recipes.preference_findings import Finding, above
from steelyard.report import plots
from steelyard.report.page import Section
from steelyard.report.plots import Frame, Series
from steelyard.report.tables import MISSING, Cell, Table
from steelyard.rng import numpy_generator

Row = Mapping[str, Any]
SMALL = "a frozen encoder of 22M parameters instead of a reward model of 2B; other distributions"
ORDER = (SINGLE, UNIFORM, HYRE, GAUSSIAN, TUNED, TUNED_EQUAL, MAP, LONGER, LENGTH, BEST)


class Scores:
    """Mean accuracies by head set, method, n and target.

    Attributes:
        targets: in the order of the rows.
        families: of each target.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._found = {(r["heads"], r["method"], int(r["n"]), r["target"]): float(r["accuracy"]) for r in rows}
        self.families = {row["target"]: row["family"] for row in rows}
        self.targets = list(self.families)

    def of(self, method: str, n: int = SHOTS, heads: str = MAIN) -> Floats:
        """Return one accuracy a target, NaN where there is none."""
        n = 0 if method == BEST else n
        return np.array([self._found.get((heads, method, n, target), np.nan) for target in self.targets])

    def estimate(self, values: Floats, by_family: bool = False) -> Estimate:
        """Return the mean over targets [T] with an interval that resamples targets, or whole families of them."""
        clusters = [self.families[target] if by_family else target for target in self.targets]
        return cluster_estimate(values, clusters, numpy_generator(0, "rewards/estimate"))


def words(scores: Scores, difference: Floats) -> str:
    """Return a difference with its interval, wins, and the interval that resamples families."""
    better = int(np.sum(difference > 0))
    return (
        f"{scores.estimate(100 * difference).text(1)} points of accuracy, {better} of {len(difference)} distributions "
        f"above 0 (sign test p = {number(sign_test(difference), 3)}); resampling families: "
        f"{scores.estimate(100 * difference, by_family=True).interval(1)}"
    )


def findings(rows: Sequence[Row], targets: Sequence[Row]) -> list[Finding]:
    """Return the claims with their verdicts."""
    scores = Scores(rows)
    hyre = scores.of(HYRE)
    found = []
    for claim, difference in (
        (f"With {SHOTS} labelled pairs HyRe beats the uniform ensemble on real distributions that the heads never saw",
         hyre - scores.of(UNIFORM)),
        (f"With {SHOTS} labelled pairs HyRe beats the single model there", hyre - scores.of(SINGLE)),
        (f"With {SHOTS} labelled pairs HyRe beats fine-tuning the head, widely tuned, there", hyre - scores.of(TUNED)),
        (f"Ours: a Gaussian over the same heads beats HyRe there at n = {SHOTS}", scores.of(GAUSSIAN) - hyre),
        ("Ours: HyRe beats a rule that knows length alone and learns its sign from the same labels",
         hyre - scores.of(LENGTH)),
    ):  # fmt: skip
        found.append(Finding(claim, above(scores.estimate(difference)), words(scores, difference), SMALL))
    difference = scores.of(HYRE, heads=WITH_LENGTH) - scores.of(UNIFORM, heads=WITH_LENGTH)
    if not np.isnan(difference).any():
        claim = f"Ours: with the completion's length as a feature HyRe-{SHOTS} beats the uniform ensemble there"
        found.append(Finding(claim, above(scores.estimate(difference)), words(scores, difference), SMALL))
    by_name = {row["target"]: float(row["published_2b"]) for row in targets}
    published = np.array([by_name.get(target, np.nan) for target in scores.targets])
    known = np.isfinite(published)
    if known.any():
        difference = 100 * (hyre - published)[known]
        names = [target for target, keep in zip(scores.targets, known, strict=True) if keep]
        estimate = cluster_estimate(difference, names, numpy_generator(0, "rewards/published"))
        measured = (
            f"{estimate.text(1)} points against the published GRM-Gemma-2B, on the {len(names)} distributions that "
            "have such a figure"
        )
        claim = "HyRe surpasses the best reward model of 2B parameters"
        found.append(Finding(claim, above(estimate), measured, f"no test of the claim: {SMALL}"))
    return found


def section(config: RewardStudy, rows: Sequence[Row], targets: Sequence[Row], settings: Sequence[Row]) -> Section:
    """Return the part of the page."""
    scores = Scores(rows)
    facts = {heads: {row["target"]: row for row in targets if row["heads"] == heads} for heads in (MAIN, WITH_LENGTH)}
    families = len(set(scores.families.values()))
    page = Section("E3: real preference distributions, a small frozen encoder")
    page.text(
        f"{len(scores.targets)} target distributions in {families} families. Heads for a block of {BLOCK} families are "
        "trained on all others, without pairs that have a prompt of a target; settings are chosen on other blocks, "
        f"nested. {config.draws} draws of n labelled pairs a target; all other pairs are scored, except those with a "
        f"prompt of a labelled one (at most {config.target_pairs} pairs a target are used). Chance is 0.5.",
        reason(scores, facts),
    )
    page.table(_methods(config, scores))
    if importlib.util.find_spec("matplotlib") is not None:
        page.figure(_figure(scores))
    page.table(_head_sets(config, scores), _targets(scores, rows, facts[MAIN]))
    edges = [row for row in settings if row["at_edge"]]
    return page.notes(
        [f"{len(edges)} of {len(settings)} choices of settings lie at an edge of their grid (settings.csv)."]
    )


def reason(scores: Scores, facts: Mapping[str, Mapping[str, Row]]) -> str:
    """Return, in words, how much of all this is the length of completions."""
    rows = [facts[MAIN][target] for target in scores.targets]
    longer = np.array([row["longer_chosen"] for row in rows])
    against = longer < 0.5
    gain = 100 * (scores.of(HYRE) - scores.of(UNIFORM))
    turned = np.array([row["length_in_hyre"] - row["length_in_uniform"] for row in rows])
    text = (
        "How much of it is length: the change from the uniform ensemble to HyRe of the correlation between margins and "
        "the log ratio of lengths, and the share of pairs whose longer completion is chosen, have rank correlation "
        f"{number(rank_correlation(turned, longer))} over distributions. Where the longer one is mostly rejected "
        f"({int(against.sum())} distributions) HyRe gains {number(_mean(gain[against]), 1)} points over uniform, "
        f"elsewhere {number(_mean(gain[~against]), 1)}. A rule that knows length alone and learns its sign from the "
        f"same {SHOTS} labels has accuracy {number(float(scores.of(LENGTH).mean()), 3)}; HyRe has "
        f"{number(float(scores.of(HYRE).mean()), 3)}"
    )
    added = scores.of(HYRE, heads=WITH_LENGTH)
    if np.isnan(added).any():
        return f"{text}."
    return (
        f"{text}, and {number(float(added.mean()), 3)} where length is a feature beside the encoder's, whose vectors "
        "have unit length and say little of it."
    )


def rank_correlation(a: Floats, b: Floats) -> float:
    """Return Spearman's correlation of a and b [N]; ties get their mean rank."""
    ranks = [np.array([np.mean(np.flatnonzero(np.sort(x) == value)) for value in x]) for x in (a, b)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _methods(config: RewardStudy, scores: Scores) -> Table:
    rows = []
    for method in ORDER:
        cells: list[Cell] = []
        for n in config.shots:
            values = scores.of(method, n)
            cells.append(MISSING if np.isnan(values).any() else scores.estimate(values))
        values = scores.of(method)
        worst = np.sort(values)[: max(1, len(values) // 10)].mean()
        rows.append((method, *cells, number(float(worst), 3)))
    return Table(
        "E3: accuracy over distributions",
        f"Heads of {MAIN!r}; mean over distributions with its 95% interval, which resamples distributions. Single, "
        "uniform and the oracle need no label; the oracle is the best head on all pairs of its target. Worst decile: "
        f"mean of the tenth of distributions with the lowest accuracy, n = {SHOTS}.",
        ("method", *(f"n = {n}" for n in config.shots), "worst decile"),
        tuple(rows),
    )


def _head_sets(config: RewardStudy, scores: Scores) -> Table:
    rows = []
    for heads in config.head_sets:
        uniform, hyre = scores.of(UNIFORM, heads=heads), scores.of(HYRE, heads=heads)
        single = scores.of(SINGLE, heads=heads)
        values = (single, uniform, hyre, scores.of(GAUSSIAN, heads=heads), scores.of(BEST, heads=heads))
        gains = tuple(scores.estimate(100 * (hyre - other)).text(1) for other in (uniform, single))
        rows.append((heads, *(number(float(value.mean()), 3) for value in values), *gains))
    return Table(
        "E3: head sets",
        f"Mean accuracy over distributions, n = {SHOTS}; the last columns are HyRe's gains in points.",
        ("heads", SINGLE, UNIFORM, HYRE, GAUSSIAN, BEST, "HyRe - uniform", "HyRe - single"),
        tuple(rows),
    )


def _targets(scores: Scores, rows: Sequence[Row], facts: Mapping[str, Row]) -> Table:
    deviation = {
        row["target"]: float(row["deviation"])
        for row in rows
        if row["heads"] == MAIN and row["method"] == HYRE and int(row["n"]) == SHOTS
    }
    columns = [scores.of(method) for method in (SINGLE, UNIFORM, HYRE, GAUSSIAN, TUNED, LONGER)]
    cells = []
    for place, target in enumerate(scores.targets):
        fact = facts[target]
        published = float(fact["published_2b"])
        cells.append(
            (
                target,
                str(fact["pairs"]),
                *(number(float(column[place]), 3) for column in columns),
                number(deviation[target], 3),
                number(float(fact["length_in_uniform"])),
                number(float(fact["length_in_hyre"])),
                MISSING if np.isnan(published) else number(published, 3),
            )
        )
    return Table(
        "E3: every distribution",
        f"n = {SHOTS}. Deviation: of HyRe's accuracy over draws. Length: correlation about 0 of margins with the log "
        "ratio of lengths. The last column is another class of model: GRM-Gemma-2B-rewardmodel-ft, published "
        "(RewardBench; on JudgeBench counted from its published scores on GPT-4o's answers), a 2B reward model trained "
        "on large preference sets; xstest-should-respond is rebuilt and not row by row RewardBench's.",
        ("distribution", "pairs", SINGLE, UNIFORM, HYRE, GAUSSIAN, TUNED, LONGER, "deviation", "length in uniform",
         "length in HyRe", "2B, published"),
        tuple(cells),
    )  # fmt: skip


def _figure(scores: Scores) -> plots.Picture:
    series = [Series(name, (100 * (scores.of(HYRE) - scores.of(name))).tolist()) for name in (UNIFORM, SINGLE)]
    frame = Frame(
        "e3-gains",
        f"HyRe with {SHOTS} labels minus the uniform ensemble and minus the single model, in points of accuracy, for "
        "every distribution.",
        xlabel="points of accuracy",
        level=0.0,
    )
    return plots.dots(scores.targets, [Series(f"minus {one.label}", one.y) for one in series], frame)
