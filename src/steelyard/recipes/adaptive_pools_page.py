"""What E10 says: tables, a figure and findings, from rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steelyard.bench.stats import Estimate, number
from steelyard.recipes.adaptive_statistics import Outcome, cost_table, fraction_of_gain, gate
from steelyard.recipes.preference_findings import Finding, above
from steelyard.report import plots
from steelyard.report.page import Section
from steelyard.report.plots import Frame, Series
from steelyard.report.tables import Table

Row = Mapping[str, Any]
Kinds = Mapping[str, Sequence[Row]]
ONE, ORACLE = "one sample", "oracle"
BEST = "best of all by {}"
"""Of N samples, by an evaluator."""
PRUNED, RANDOM = "half given up by text", "half given up at random"
TEXT = "text"


def outcomes_of(rows: Sequence[Row], pool: str) -> dict[str, Outcome]:
    """Return {way: outcome} of a pool, prompts in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["pool"] == pool:
            found.setdefault(row["way"], []).append(row)
    outcomes = {}
    for way, own in found.items():
        own = sorted(own, key=lambda row: int(row["prompt"]))
        arrays = (np.array([float(row[key]) for row in own]) for key in ("rewards", "samples", "decoded", "evaluated"))
        outcomes[way] = Outcome(way, *arrays)
    return outcomes


def matched(policy: Outcome, found: Mapping[str, Outcome]) -> Outcome:
    """Return what a fixed number of samples comes to at the same average: a mixture of the two nearest numbers."""
    best = BEST.format(TEXT)
    steps = [found[ONE], *(one for way, one in found.items() if way.startswith("best of ") and way.endswith(" by text")
                           and way != best), found[best]]  # fmt: skip
    counts = [float(one.samples.mean()) for one in steps]
    wanted = float(np.clip(policy.samples.mean(), counts[0], counts[-1]))
    upper = max(1, int(np.searchsorted(counts, wanted)))
    share = (wanted - counts[upper - 1]) / (counts[upper] - counts[upper - 1])

    def mixed(name: str) -> Any:
        return (1 - share) * getattr(steps[upper - 1], name) + share * getattr(steps[upper], name)

    return Outcome(f"fixed, {wanted:.2f} samples", *(mixed(key) for key in ("rewards", "samples", "decoded",
                                                                            "evaluated")))  # fmt: skip


def adaptive(found: Mapping[str, Outcome]) -> list[Outcome]:
    """Return the stopping rules."""
    return [one for way, one in found.items() if way.startswith("adaptive")]


def sections(kinds: Kinds) -> list[Section]:
    """Return E10's part of the page."""
    names = list(dict.fromkeys(row["pool"] for row in kinds["pools"]))
    section = Section("E10: real samples, evaluators trained on their text")
    section.text(
        "Old samples of other models are replayed. The evaluators read text through a small frozen encoder and are far "
        "weaker than the models that wrote it; AUC within prompts says how much. Lengths are in words and signs. Every "
        "prompt is tested once; evaluators, calibration and thresholds come from other prompts. Samples are taken in "
        "several random orders. With rewards of 0 and 1 the rule of expected gain is the threshold rule under another "
        "name, so it has no row."
    )
    section.notes([_gate(kinds, name) for name in names])
    section.table(_pools(kinds["pools"]), _evaluators(kinds["evaluators"]))
    figure = _figure(kinds, names)
    if figure is not None:
        section.figure(figure)
    for name in names:
        found = outcomes_of(kinds["prompts"], name)
        one, best = found[ONE], found[BEST.format(TEXT)]
        section.table(cost_table(list(found.values()), one, best, name, "Evaluated: nothing is read but old scores."))
    section.table(_against_fixed(kinds, names))
    return [section]


def findings(kinds: Kinds) -> list[Finding]:
    """Return, for each pool, whether stopping by the text is worth more than as many samples for every prompt."""
    result = []
    for name in dict.fromkeys(row["pool"] for row in kinds["pools"]):
        found = outcomes_of(kinds["prompts"], name)
        rules = [one for one in adaptive(found) if one.name.startswith("adaptive by text, ")]
        if not rules:
            continue
        gained = _difference(rules[0], found)
        claim = f"E10, {name}: stopping by a score of the text beats as many samples for every prompt"
        differs = "an evaluator of the text alone, old samples of another model"
        if gained is None:
            result.append(Finding(claim, "not clear", "best of all samples by text gains nothing over one", differs))
            continue
        samples = number(float(rules[0].samples.mean()))
        result.append(
            Finding(claim, above(gained), f"{gained.text()} of the gain more, at {samples} samples on average", differs)
        )
    return result


def _difference(policy: Outcome, found: Mapping[str, Outcome]) -> Estimate | None:
    return fraction_of_gain(policy, found[ONE], found[BEST.format(TEXT)], minus=matched(policy, found))


def _gate(kinds: Kinds, name: str) -> str:
    found = outcomes_of(kinds["prompts"], name)
    auc = next(row for row in kinds["evaluators"] if row["pool"] == name and row["evaluator"] == TEXT)
    _, sentence = gate(float(auc["auc_within"] or 0.0), found[ONE], found[BEST.format(TEXT)], found[ORACLE])
    return f"{name}: {sentence}"


def _pools(rows: Sequence[Row]) -> Table:
    return Table(
        "Pools",
        "Mixed: share of prompts whose samples differ in reward by more than the margin; nothing can be gained on the "
        "others.",
        ("pool", "prompts", "samples used", "mean reward", "mixed", "margin", "words", "pruned after"),
        tuple(
            (str(row["pool"]), str(row["prompts"]), str(row["samples"]), number(float(row["reward"]), 3),
             number(float(row["varied"])), number(float(row["margin"]), 3), number(float(row["words"]), 0),
             str(row["cut"]))
            for row in rows
        ),
    )  # fmt: skip


def _evaluators(rows: Sequence[Row]) -> Table:
    def cell(row: Row, name: str) -> str:
        if row[name] is None:
            return "-"
        return f"{number(float(row[name]))} [{number(float(row[f'{name}_low']))}, {number(float(row[f'{name}_high']))}]"

    return Table(
        "Evaluators on unseen prompts",
        "AUC within prompts decides which sample is chosen, AUC across prompts when to stop. text and length: P(no "
        "better) from the encoder's vector and the length, and from the length alone; correctness: P(correct) from the "
        "same vector; reward model: P(no better) from a published reward model's score.",
        ("pool", "evaluator", "AUC within prompts", "AUC across prompts", "ECE"),
        tuple(
            (str(row["pool"]), str(row["evaluator"]), cell(row, "auc_within"), cell(row, "auc_across"),
             number(float(row["ece"]), 3))
            for row in rows
        ),
    )  # fmt: skip


def _against_fixed(kinds: Kinds, names: Sequence[str]) -> Table:
    rows = []
    for name in names:
        found = outcomes_of(kinds["prompts"], name)
        for policy in adaptive(found):
            gained = _difference(policy, found)
            samples = number(float(policy.samples.mean()))
            rows.append((name, policy.name, samples, gained if gained is not None else "no gain"))
    return Table(
        "Which rule is worth more than as many samples for every prompt",
        "Fraction of the gain of choosing among all samples by text, less that of a fixed number of samples with the "
        "same average (a mixture of the two nearest numbers, chosen by text); paired over prompts.",
        ("pool", "rule", "samples", "fraction of gain, more than fixed"),
        tuple(rows),
    )


def _figure(kinds: Kinds, names: Sequence[str]) -> Any:
    """Return FG of the two adaptive rules by text and of their fixed twins, or None where no pool has a gain."""
    kept, policies, twins = [], [], []
    for name in names:
        found = outcomes_of(kinds["prompts"], name)
        rules = [one for one in adaptive(found) if one.name.startswith("adaptive by text, ")]
        if not rules:
            continue
        best = found[BEST.format(TEXT)]
        own = fraction_of_gain(rules[0], found[ONE], best)
        twin = fraction_of_gain(matched(rules[0], found), found[ONE], best)
        if own is not None and twin is not None:
            kept.append(f"{name}, {rules[0].samples.mean():.2f} samples")
            policies.append(own)
            twins.append(twin)
    if not kept:
        return None

    def series(label: str, estimates: Sequence[Estimate]) -> Series:
        ends = [(one.low if one.low is not None else one.value, one.high if one.high is not None else one.value)
                for one in estimates]  # fmt: skip
        return Series(label, [one.value for one in estimates], [low for low, _ in ends], [high for _, high in ends])

    frame = Frame(
        "adaptive_pools",
        "Fraction of the gain of choosing among all samples that is kept; 95% intervals over prompts.",
        xlabel="fraction of gain",
        level=0.0,
    )
    return plots.dots(kept, [series("adaptive by text", policies), series("as many for every prompt", twins)], frame)
