"""What E10 says: tables, a figure and findings, from rows alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steelyard.bench.stats import Estimate, number
from steelyard.recipes.adaptive_statistics import Outcome, average, cost_table, fraction_of_gain, gate
from steelyard.recipes.preference_findings import Finding, above
from steelyard.report import plots
from steelyard.report.page import Section
from steelyard.report.plots import Frame, Picture, Series
from steelyard.report.tables import Table

Row = Mapping[str, Any]
Kinds = Mapping[str, Sequence[Row]]
ONE, ORACLE = "one sample", "oracle"
BEST = "best of all by {}"
"""Of N samples, by an evaluator."""
PRUNED, RANDOM = "half given up by text", "half given up at random"
TEXT = "text"
DIFFERS = "scores read off the text; old samples of other models"


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


def evaluator_in(way: str) -> str:
    """Return which evaluator a stopping rule reads."""
    return way.removeprefix("adaptive by ").split(",")[0]


def matched(policy: Outcome, found: Mapping[str, Outcome]) -> Outcome:
    """Return what a fixed number of samples comes to at the same average: a mixture of the two nearest numbers.

    Samples are chosen by the evaluator of the policy.
    """
    name = evaluator_in(policy.name)
    best = found[BEST.format(name)]
    fewer = [one for way, one in found.items() if re.fullmatch(rf"best of \d+ by {name}", way)]
    steps = [found[ONE], *sorted(fewer, key=lambda one: float(one.samples.mean())), best]
    counts = [float(one.samples.mean()) for one in steps]
    wanted = float(np.clip(policy.samples.mean(), counts[0], counts[-1]))
    upper = max(1, int(np.searchsorted(counts, wanted)))
    share = (wanted - counts[upper - 1]) / (counts[upper] - counts[upper - 1])

    def mixed(key: str) -> Any:
        return (1 - share) * getattr(steps[upper - 1], key) + share * getattr(steps[upper], key)

    arrays = (mixed(key) for key in ("rewards", "samples", "decoded", "evaluated"))
    return Outcome(f"fixed, {number(wanted)} samples", *arrays)


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
    section.figure(_figure(kinds, names))
    for name in names:
        found = outcomes_of(kinds["prompts"], name)
        one, best = found[ONE], found[BEST.format(TEXT)]
        section.table(cost_table(list(found.values()), one, best, name, "Evaluated: nothing is read but old scores."))
    section.table(_against_fixed(kinds, names))
    return [section]


def findings(kinds: Kinds) -> list[Finding]:
    """Return, for each pool, what scores are worth beyond chance: for stopping, and for giving up half of the samples.

    Stopping is compared with as many samples for every prompt.
    """
    result = []
    for name in dict.fromkeys(row["pool"] for row in kinds["pools"]):
        found = outcomes_of(kinds["prompts"], name)
        for policy in _cheapest(found):
            gained = more_than_fixed(policy, found)
            samples = number(float(policy.samples.mean()))
            says = f"{gained.text(3)} of reward more, at {samples} samples on average"
            claim = f"E10, {name}: stopping by {evaluator_in(policy.name)} beats as many samples for every prompt"
            result.append(Finding(claim, above(gained), says, DIFFERS))
        gained = average(found[PRUNED].rewards - found[RANDOM].rewards)
        claim = f"E10, {name}: giving up half of the samples by {TEXT} beats giving them up at random"
        result.append(Finding(claim, above(gained), f"{gained.text(3)} of reward more", DIFFERS))
    return result


def _cheapest(found: Mapping[str, Outcome]) -> list[Outcome]:
    """Return the plain threshold rule of every evaluator but length, for the fewest samples."""
    rules: dict[str, Outcome] = {}
    for one in adaptive(found):
        if "shrunk" not in one.name and evaluator_in(one.name) != "length":
            rules.setdefault(evaluator_in(one.name), one)
    return list(rules.values())


def more_than_fixed(policy: Outcome, found: Mapping[str, Outcome]) -> Estimate:
    """Return by how much the mean reward is above that of a fixed number of samples, paired over prompts."""
    return average(policy.rewards - matched(policy, found).rewards)


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
        "same vector (its ECE is that of P(correct)); reward model: P(no better) from a reward model's score.",
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
            best = found[BEST.format(evaluator_in(policy.name))]
            fraction = fraction_of_gain(policy, found[ONE], best)
            samples = number(float(policy.samples.mean()))
            kept = fraction if fraction is not None else "no gain"
            rows.append((name, policy.name, samples, more_than_fixed(policy, found), kept))
    return Table(
        "Which rule is worth more than as many samples for every prompt",
        "Reward, more than fixed: less that of a fixed number of samples with the same average (a mixture of the two "
        "nearest numbers) chosen by the same evaluator. Fraction of gain: of choosing among all samples by the same "
        "evaluator; no gain: where that is not above one sample. Paired over prompts.",
        ("pool", "rule", "samples", "reward, more than fixed", "fraction of gain"),
        tuple(rows),
    )


def _figure(kinds: Kinds, names: Sequence[str]) -> Picture:
    """Return what stopping is worth beyond a fixed number of samples, for every pool and evaluator."""
    labels, found = [], []
    for name in names:
        outcomes = outcomes_of(kinds["prompts"], name)
        for policy in _cheapest(outcomes):
            labels.append(f"{name}, {evaluator_in(policy.name)}, {number(float(policy.samples.mean()))} samples")
            found.append(more_than_fixed(policy, outcomes))
    low, high = ([getattr(one, end) if getattr(one, end) is not None else one.value for one in found]
                 for end in ("low", "high"))  # fmt: skip
    series = Series("adaptive, less fixed", [one.value for one in found], low, high)
    caption = "Mean reward of stopping at a threshold, less that of as many samples for every prompt; 95% intervals."
    return plots.dots(labels, [series], Frame("adaptive_pools", caption, xlabel="reward", level=0.0, legend=False))
