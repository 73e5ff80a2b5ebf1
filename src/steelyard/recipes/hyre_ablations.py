"""E6 of HyRe: how many heads of which kind, and each switch of the rule by itself.

Head sets differ by what their heads see and by their number K; the diversity meter is read of all of them. The rule's
switches are tried on the head set of the claims: one eta for every n (for the sum of losses and for their mean, which
with an eta for each n would be the same rule), mixing with the uniform mean, prior weight of the single model, members
without standardisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from steelyard.bench.stats import Estimate, number
from steelyard.data.pair_tasks import Floats
from steelyard.nets.ensemble import HeadsConfig
from steelyard.recipes.hyre_adapting import ETAS, Reweighting, Trials
from steelyard.recipes.hyre_heads import HeadSpec
from steelyard.recipes.hyre_personas_page import HYRE, MAIN, SHOTS, UNIFORM, Kinds, Row, Scores, difference_text
from steelyard.report import plots
from steelyard.report.page import Section
from steelyard.report.plots import Frame
from steelyard.report.tables import Table
from steelyard.rng import numpy_generator

USERS = "user heads"
SHARED = "shared base"
FAMILIES = {
    USERS: HeadSpec(USERS),
    "cluster heads": HeadSpec("cluster heads", sees="one cluster"),
    "some users each": HeadSpec("some users each", sees="some users"),
    "+-PCA": HeadSpec("+-PCA", heads=HeadsConfig(kind="pca")),
    "random directions": HeadSpec("random directions", heads=HeadsConfig(kind="gaussian")),
    SHARED: HeadSpec(SHARED, "trunk", "everything"),
}
"""Head sets whose number of heads is varied; all with the pooled head."""
BETAS = (1.0, 5.0, 20.0)
"""Scales of the frozen priors of a shared base; 0 is the shared base itself."""
ONE_ETA, MEAN_LOSS = "HyRe, one eta for every n", "mean loss, one eta for every n"
MIXED, PRIOR = "HyRe, mixed with the uniform mean", "HyRe, prior on the single model"
RAW, RAW_ETA_1 = "HyRe, not standardised", "HyRe, not standardised, eta 1"
SWITCHES = (HYRE, "HyRe, 0-1 loss", "HyRe, eta 1", ONE_ETA, MEAN_LOSS, MIXED, PRIOR, RAW, RAW_ETA_1)
RAW_ETAS = (0.002, 0.005, 0.01, *ETAS)


def sized(family: str, count: int) -> str:
    """Return the name of the head set of a family with so many heads."""
    return f"{family}, {count} heads"


def beta_name(beta: float) -> str:
    """Return the name of the shared base with frozen priors of a scale."""
    return f"{SHARED}, prior {beta:g}"


def head_sets(counts: Sequence[int]) -> tuple[HeadSpec, ...]:
    """Return the head sets that are compared; the first is the one of the claims. User heads are a subset of it."""
    priors = HeadsConfig(num_heads=max(counts), prior="mlp")
    return (
        HeadSpec(MAIN),
        HeadSpec("user heads, no pooled head", heads=HeadsConfig(pooled=False)),
        HeadSpec("shared base, user heads", "trunk", "one user", HeadsConfig(init_scale=0.0)),
        *(HeadSpec(beta_name(beta), "trunk", "everything", replace(priors, prior_scale=beta)) for beta in BETAS),
        *(
            replace(spec, name=sized(family, count), heads=replace(spec.heads, num_heads=count))
            for family, spec in FAMILIES.items()
            if family != USERS
            for count in counts
        ),
    )


def switch(trials: Trials, scale: Floats, shots: Sequence[int]) -> None:
    """Try each switch of the rule on the head set of the claims, beside the rows of E1."""
    trials.tune(Reweighting(ONE_ETA), *shots)
    trials.tune(Reweighting(MEAN_LOSS, mean=True), *shots)
    raw = replace(
        trials,
        validation=trials.validation.of_members(slice(None), scale),
        targets=trials.targets.of_members(slice(None), scale),
    )
    for n in shots:
        trials.tune(Reweighting(MIXED, mixes=(0.0, 0.02, 0.05, 0.1, 0.2, 0.5)), n)
        trials.tune(Reweighting(PRIOR, priors=(0.001, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9)), n)
        raw.tune(Reweighting(RAW, etas=RAW_ETAS), n)
        raw.test(Reweighting(RAW_ETA_1), n, {"eta": 1.0})


def fewer_users(trials: Trials, counts: Sequence[int]) -> list[Trials]:
    """Return the head set of the claims with the heads of fewer users, beside the pooled one; users are in no order."""
    heads = trials.targets.members.shape[3] - 1
    return [
        Trials(
            {**trials.common, "heads": sized(USERS, count)},
            trials.validation.of_members(slice(0, count + 1)),
            trials.targets.of_members(slice(0, count + 1)),
        )
        for count in counts
        if count < heads
    ]


def sections(kinds: Kinds, counts: Sequence[int], splits: int) -> list[Section]:
    """Return E6's part of the page; head sets are compared on the first splits only, the rule's switches on all."""
    scores = Scores([row for row in kinds["rows"] if int(row["split"]) < splits])
    section = Section("E6: which head sets can be re-weighted")
    if any(int(row["split"]) >= splits for row in kinds["rows"]):
        section.text(f"On {splits} of the splits, for all head sets alike, so that E1's numbers differ a little.")
    _meter(section, scores, [row for row in kinds["diversity"] if int(row["split"]) < splits])
    section.table(_sizes(scores, counts))
    betas = _betas(scores, kinds["settings"], counts)
    if betas is not None:
        section.table(betas)
    rule, scores = Section("E6: the switches of the rule"), Scores(kinds["rows"])
    for world, words in (("agree", "users mostly agree"), ("conflict", "users conflict")):
        if scores.cells(world, ONE_ETA, SHOTS):
            rule.table(_switches(scores, world, words))
    return [section, rule]


def _switches(scores: Scores, world: str, words: str) -> Table:
    shots = sorted({n for own, heads, method, n in scores.found if (own, heads, method) == (world, MAIN, ONE_ETA)})
    rows = [
        (
            name,
            *(number(100 * scores.mean(world, name, n), 1) for n in shots),
            "" if name == HYRE else difference_text(scores.cells(world, name, SHOTS), scores.cells(world, HYRE, SHOTS)),
        )
        for name in SWITCHES
        if scores.cells(world, name, SHOTS)
    ]
    return Table(
        f"The rule's switches, {words}",
        "Accuracy in % after n labels; last column: minus HyRe after 5 labels, in points, with its interval. HyRe has "
        "an eta for each n; what else a row has was chosen on validation users, for each n unless it says otherwise.",
        ("rule", *(f"n = {n}" for n in shots), "minus HyRe"),
        tuple(rows),
    )


def _sizes(scores: Scores, counts: Sequence[int]) -> Table:
    def cell(heads: str) -> str:
        uniform, hyre = (100 * scores.mean("agree", method, SHOTS, heads) for method in (UNIFORM, HYRE))
        return "" if np.isnan(hyre) else f"{number(hyre, 1)} ({number(hyre - uniform, 1)})"

    rows = [
        (family, *(cell(sized(family, count)) for count in counts), cell(MAIN) if family == USERS else "")
        for family in FAMILIES
    ]
    return Table(
        "How many heads",
        "Accuracy in % of HyRe with 5 labels, in brackets its gain over the uniform mean of the same heads. There are "
        "no more user heads than training users.",
        ("heads", *(f"K = {count}" for count in counts), "one for every user"),
        tuple(rows),
    )


def _betas(scores: Scores, settings: Sequence[Row], counts: Sequence[int]) -> Table | None:
    """Return the priors' scale chosen on validation users, split by split."""
    names = {0.0: sized(SHARED, max(counts))} | {beta: beta_name(beta) for beta in BETAS}
    best: dict[int, dict[float, float]] = {}
    for row in settings:
        for beta, name in names.items():
            if row["heads"] == name and row["method"] == HYRE and int(row["n"]) == SHOTS:
                best.setdefault(int(row["split"]), {})[beta] = float(row["validation"])
    if not best or any(len(found) < len(names) for found in best.values()):
        return None
    chosen = {split: max(found, key=lambda beta: found[beta]) for split, found in best.items()}
    rows = []
    for label, pick in [
        *((f"beta = {beta:g}", dict.fromkeys(chosen, beta)) for beta in names),
        ("beta chosen on validation users", chosen),
    ]:
        means = []
        for method in (UNIFORM, HYRE):
            cells = {beta: scores.cells("agree", method, SHOTS, name) for beta, name in names.items()}
            means.append(
                np.mean([value for beta in names for key, value in cells[beta].items() if pick[key[0]] == beta])
            )
        rows.append(
            (label, *(number(100 * float(mean), 1) for mean in means), number(100 * float(means[1] - means[0]), 1))
        )
    taken = ", ".join(f"{beta:g}" for _, beta in sorted(chosen.items()))
    return Table(
        "Scale of the frozen priors",
        f"Shared base with {max(counts)} heads that all see everything. Chosen for 5 labels, split by split: {taken}.",
        ("", "uniform", "HyRe-5", "gain"),
        tuple(rows),
    )


def _meter(section: Section, scores: Scores, rows: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(row["heads"] for row in rows))
    table, predicted, realised = [], [], []
    for name in names:
        own = [row for row in rows if row["heads"] == name]
        gain = 100 * float(np.mean([row["gain"] for row in own]))
        real = 100 * (scores.mean("agree", HYRE, SHOTS, name) - scores.mean("agree", UNIFORM, SHOTS, name))
        predicted.append(gain)
        realised.append(real)
        directions, disagreement = (float(np.mean([row[key] for row in own])) for key in ("directions", "disagreement"))
        uniform, hyre = (100 * scores.mean("agree", method, SHOTS, name) for method in (UNIFORM, HYRE))
        table.append(
            (name, number(uniform, 1), number(hyre, 1), number(real, 1), number(gain, 1), number(directions, 1),
             number(100 * disagreement, 1))
        )  # fmt: skip
    section.table(
        Table(
            "Head sets, users mostly agree",
            "Accuracy in % with 5 labels and eta chosen on validation users. The meter (best head of a user minus "
            "uniform, on validation users) is read before any label of an unseen user is spent.",
            ("heads", "uniform", "HyRe-5", "gain", "meter", "directions", "disagreement %"),
            tuple(table),
        )
    )
    if len(names) > 2:
        found = rank_correlation(np.array(predicted), np.array(realised))
        frame = Frame(
            "hyre_meter",
            f"One dot a head set; rank correlation {found.text(2)} (bootstrap over head sets).",
            "the meter: best head minus uniform, validation users (points)",
            "gain of HyRe-5, unseen users (points)",
            level=0,
        )
        section.figure(plots.scatter(names, predicted, realised, frame))
        section.text(
            f"Rank correlation of meter and realised gain over {len(names)} head sets: {found.text(2)}. Sets of one "
            "kind with other numbers of heads are relatives, so the interval is too narrow."
        )


def rank_correlation(x: Floats, y: Floats, resamples: int = 2000) -> Estimate:
    """Return Spearman's correlation with an interval that resamples pairs; resamples without spread are left out."""
    generator, values = numpy_generator(0, "hyre/rank"), []
    for _ in range(resamples):
        rows = generator.integers(len(x), size=len(x))
        if np.ptp(x[rows]) and np.ptp(y[rows]):
            values.append(float(np.corrcoef(_ranks(x[rows]), _ranks(y[rows]))[0, 1]))
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(float(np.corrcoef(_ranks(x), _ranks(y))[0, 1]), float(low), float(high), len(x))


def _ranks(values: Floats) -> Floats:
    """Return ranks from 0; equal values share the mean of theirs."""
    return np.asarray((values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2)
