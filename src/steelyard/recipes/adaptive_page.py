"""What the rows of a tier say: findings with intervals, tables and figures (E7, E8, E9), for tiers 1 and 2 alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steelyard.bench.stats import Estimate, number
from steelyard.recipes.adaptive_replays import ABSOLUTE, ADAPTIVE, BEST, BOTH, GREEDY, LOWEST, MIXES, ONE, RANDOM
from steelyard.recipes.adaptive_statistics import (
    Outcome,
    average,
    beyond,
    cost_table,
    fraction_of_gain,
    gate,
    joined,
    recovered,
)
from steelyard.recipes.preference_findings import Finding, Verdict, above
from steelyard.report.page import Section
from steelyard.report.plots import Frame, Series, lines
from steelyard.report.tables import Cell, Table

Row = Mapping[str, Any]
KEPT, MOST = 0.75, 1.5
"""The issue's target: this share of the gain at so many samples."""
PRUNED_KEEPS = 0.9
"""The target of pruning half."""
WAYS = (ADAPTIVE, BOTH)


@dataclass(frozen=True)
class Mix:
    """Outcomes on one mix of prompts, seeds joined.

    Attributes:
        name: of the mix.
        found: {(group, name, threshold or samples allowed): outcome}; thresholds of "curve", samples of "chosen"
            and "matched".
        thresholds: {(name, samples allowed): those chosen, one a seed}.
        auc: within prompts, mean over seeds.
    """

    name: str
    found: dict[tuple[str, str, float | None], Outcome]
    thresholds: dict[tuple[str, float], list[float]]
    auc: float

    @classmethod
    def of(cls, rows: Sequence[Row], name: str) -> Mix:
        """Collect the rows of a mix."""
        grouped: dict[tuple[str, str, float | None], list[Outcome]] = {}
        thresholds: dict[tuple[str, float], list[float]] = {}
        for row in rows:
            if row["kind"] != "outcome" or row["mix"] != name:
                continue
            numbers = (np.array(row[key], np.float64) for key in ("rewards", "samples", "decoded", "evaluated"))
            key = row["group"], row["name"], row["most"] if row["group"] in ("chosen", "matched") else row["threshold"]
            grouped.setdefault(key, []).append(Outcome(row["name"], *numbers))
            if row["group"] == "chosen":
                thresholds.setdefault((row["name"], row["most"]), []).append(row["threshold"])
        aucs = [r["value"] for r in rows if r["kind"] == "auc" and r["mix"] == name and r["name"] == "within"]
        auc = float(np.mean(aucs)) if aucs else float("nan")
        return cls(name, {key: joined(outcomes) for key, outcomes in grouped.items()}, thresholds, auc)

    def __getitem__(self, key: tuple[str, str, float | None]) -> Outcome:
        return self.found[key]

    def fixed(self, name: str) -> Outcome:
        """Return one that chooses nothing by validation."""
        return self.found["fixed", name, None]

    @property
    def one(self) -> Outcome:
        """One sample at temperature 1."""
        return self.fixed(ONE)

    @property
    def largest(self) -> int:
        """N."""
        return max(int(one.samples[0]) for (group, _, _), one in self.found.items() if group == "fixed")

    @property
    def best(self) -> Outcome:
        """Best of N by self-evaluation."""
        return self.fixed(BEST.format(self.largest))

    @property
    def oracle(self) -> Outcome:
        """Best of N by the truth."""
        return self.fixed(f"best of {self.largest} by an oracle")

    def fraction(self, policy: Outcome, minus: Outcome | None = None) -> Estimate | None:
        """Return the fraction of the gain."""
        return fraction_of_gain(policy, self.one, self.best, minus)

    def gate(self) -> tuple[bool, str]:
        """Return whether fractions of gain mean something, and why."""
        return gate(self.auc, self.one, self.best, self.oracle)


def findings(rows: Sequence[Row], label: str, differs: str) -> list[Finding]:
    """Return the claims with their verdicts.

    Args:
        rows: of all seeds.
        label: of the tier, which begins every claim.
        differs: what is not as in the paper.
    """
    heavy = Mix.of(rows, "easy-heavy")
    passed, says = heavy.gate()
    found = [
        Finding(
            f"{label}: scores tell good from bad samples of a prompt, and best-of-N recovers half of the oracle's gain",
            "holds" if passed else "does not hold",
            says,
            differs,
        )
    ]
    for way in WAYS:
        policy = heavy["chosen", way, MOST]
        fraction = heavy.fraction(policy)
        target = beyond(fraction, KEPT)
        verdict: Verdict = "not clear" if target is None or not passed else above(target)
        if verdict == "holds" and policy.samples.mean() > MOST:
            verdict = "not clear"
        found.append(
            Finding(
                f"{label}, easy-heavy prompts: {way}, keeps {KEPT:.0%} of the gain of best-of-{heavy.largest} with "
                f"{MOST:g} samples on average",
                verdict,
                f"{_said(fraction)} of the gain at {average(policy.samples).text()} samples started; "
                f"greedy decoding alone {_said(heavy.fraction(heavy.fixed(GREEDY)))}",
                differs,
            )
        )
    for name in MIXES:
        mix = Mix.of(rows, name)
        both, greedy = mix["chosen", BOTH, MOST], mix.fixed(GREEDY)
        found.append(
            _compared(
                f"{label}, {name} prompts: deciding adaptively adds to greedy decoding (at most {MOST:g} samples)",
                mix.fraction(both, greedy),
                f"at {average(both.samples).text()} samples",
                differs,
            )
        )
        aware, absolute = mix["matched", ADAPTIVE, MOST], mix["chosen", ABSOLUTE, MOST]
        found.append(
            _compared(
                f"{label}, {name} prompts: knowing when no sample will be better beats stopping at an absolute "
                "correctness (both T = 1, thresholds for equal samples)",
                mix.fraction(aware, absolute),
                f"at {average(aware.samples).text()} and {average(absolute.samples).text()} samples",
                differs,
            )
        )
        half, random = mix["pruned", LOWEST.format(0.5), None], mix["pruned", RANDOM.format(0.5), None]
        saved = 1 - half.decoded.mean() / mix.best.decoded.mean()
        fraction = mix.fraction(half)
        target = beyond(fraction, PRUNED_KEEPS)
        found.append(
            Finding(
                f"{label}, {name} prompts: giving up half of the samples early keeps {PRUNED_KEEPS:.0%} of the gain",
                "not clear" if target is None else above(target),
                f"{_said(fraction)} of the gain, {saved:.0%} of the tokens saved",
                differs,
            )
        )
        found.append(
            _compared(
                f"{label}, {name} prompts: giving up half by score beats giving up half at random",
                mix.fraction(half, random),
                f"random keeps {_said(mix.fraction(random))}",
                differs,
            )
        )
    return found


def _said(fraction: Estimate | None) -> str:
    return "no gain to keep" if fraction is None else fraction.text()


def _compared(claim: str, difference: Estimate | None, more: str, differs: str) -> Finding:
    if difference is None:
        return Finding(claim, "not clear", f"best-of-N gains nothing; {more}", differs)
    return Finding(claim, above(difference), f"fraction of gain higher by {difference.text()}; {more}", differs)


def sections(rows: Sequence[Row], title: str) -> list[Section]:
    """Return the part of the page: strata, readers, and for each mix the table, the curves and pruning."""
    page = Section(title)
    page.text(Mix.of(rows, "easy-heavy").gate()[1])
    page.table(_strata(rows), _readers(rows))
    live = [row for row in rows if row["kind"] == "live"]
    if live:
        same, count = sum(row["same"] for row in live), sum(row["prompts"] for row in live)
        most = max(row["score_difference"] for row in live)
        page.text(
            f"Decoded live instead of replayed, {same} of {count} prompts (over {len(live)} rules and seeds) drew the "
            f"same tokens, gave up the same samples and chose the same answer; scores differed by at most {most:.1e}."
        )
    found = [page]
    for name, shares in MIXES.items():
        mix = Mix.of(rows, name)
        here = Section(f"{title}: {name} prompts")
        parts = ", ".join(f"{share:.0%} {stratum}" for stratum, share in shares.items())
        here.text(f"{parts}. {mix.gate()[1]}")
        here.table(_decomposition(mix), _everything(mix))
        here.figure(*_curves(mix, title))
        here.table(_pruning(mix))
        found.append(here)
    costs = [row for row in rows if row["kind"] == "cost"]
    if costs:
        steps = dict.fromkeys(row["step"] for row in costs)
        minutes = {step: sum(row["cpu_seconds"] for row in costs if row["step"] == step) / 60 for step in steps}
        said = ", ".join(f"{step} {number(spent, 1)}" for step, spent in minutes.items())
        page.text(f"CPU-minutes over {len({row['seed'] for row in costs})} seed(s): {said}.")
    return found


def _strata(rows: Sequence[Row]) -> Table:
    kept = [row for row in rows if row["kind"] == "stratum"]
    cells: list[tuple[Cell, ...]] = []
    for stratum in dict.fromkeys(row["stratum"] for row in kept):
        own = [row for row in kept if row["stratum"] == stratum]
        values = [number(float(np.mean([row[key] for row in own])), 3) for key in ("one", "greedy", "best", "oracle")]
        cells.append((stratum, str(sum(row["prompts"] for row in own)), *values))
    return Table(
        "Strata of the test prompts",
        "Share of right answers. Where greedy is below the oracle, another sample can repair what greedy repeats; "
        "where the oracle is low, no sample helps.",
        ("stratum", "prompts", "one sample, T = 1", "greedy", "best of N by self-evaluation", "best of N by an oracle"),
        tuple(cells),
    )


def _readers(rows: Sequence[Row]) -> Table:
    kept = [row for row in rows if row["kind"] == "reader"]
    cells: list[tuple[Cell, ...]] = []
    for reader, where in dict.fromkeys((row["reader"], row["where"]) for row in kept):
        own = [row for row in kept if (row["reader"], row["where"]) == (reader, where)]
        last = where == "end"
        cells.append(
            (
                reader if where == kept[0]["where"] else "",
                where,
                *(_mean(own, key) for key in ("within", "across", "ece", "brier")),
                *((_mean(own, "extra_tokens", 0), _mean(own, "kl", 4), _mean(own, "greedy_match", 4)) if last else
                  ("", "", "")),
            )
        )  # fmt: skip
    return Table(
        "E9: readers",
        "On held-out samples of the policy before training, mean over seeds. Within: a better sample of a prompt "
        "gets the higher score (choosing, pruning). Across: of two prompts' samples the one harder to beat does "
        "(stopping). ECE after calibration on other prompts. KL to, and greedy match with, the policy before training "
        "say what the reader did to it; a probe leaves it untouched. State: a probe that is not told how likely the "
        "tokens were.",
        ("reader", "after tokens", "AUC within", "AUC across", "ECE", "Brier", "extra tokens", "KL", "greedy match"),
        tuple(cells),
    )


def _mean(rows: Sequence[Row], key: str, digits: int = 3) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    return number(float(np.mean(values)), digits) if values else "-"


def _allowed(mix: Mix) -> list[float]:
    return sorted({most for _, most in mix.thresholds})


def _named(mix: Mix, way: str, most: float) -> Outcome:
    policy = mix["chosen", way, most]
    chosen = ", ".join(f"{one:g}" for one in sorted(set(mix.thresholds[way, most])))
    return Outcome(
        f"{way}; at most {most:g} samples (threshold {chosen})",
        policy.rewards,
        policy.samples,
        policy.decoded,
        policy.evaluated,
    )


def _decomposition(mix: Mix) -> Table:
    """Return greedy alone, adaptive alone, both: the headline's honest form."""
    rows = [mix.fixed(GREEDY), *(_named(mix, way, most) for most in _allowed(mix) for way in WAYS)]
    share = recovered(mix.one, mix.best, mix.oracle)
    return cost_table(
        rows,
        mix.one,
        mix.best,
        f"E7, {mix.name}: greedy alone, adaptive alone, both",
        f"Thresholds chosen on validation prompts. Best-of-{mix.largest} by self-evaluation recovers "
        f"{'nothing' if share is None else share.text()} of the oracle's gain.",
    )


def _everything(mix: Mix) -> Table:
    fixed = [one for (group, _, _), one in mix.found.items() if group == "fixed"]
    ways = dict.fromkeys(way for way, _ in mix.thresholds)
    rows = fixed + [_named(mix, way, MOST) for way in ways if (way, MOST) in mix.thresholds]
    return cost_table(
        rows, mix.one, mix.best, f"E7, {mix.name}: all ways",
        "Shrunk: the chance of a better sample falls with every failure (Beta rule).",
    )  # fmt: skip


def _pruning(mix: Mix) -> Table:
    rows = [mix.best, *(one for (group, _, _), one in mix.found.items() if group == "pruned")]
    rows += [mix.fixed(BEST.format(k)) for k in (8, 4) if ("fixed", BEST.format(k), None) in mix.found]
    table = cost_table(rows, mix.one, mix.best, f"E8, {mix.name}: giving up samples early",
                       f"{mix.largest} samples in parallel, a part given up at the checkpoints.")  # fmt: skip
    full = mix.best.decoded.mean()
    saved = [f"{1 - one.decoded.mean() / full:.0%}" for one in rows]
    cells = tuple((*row, share) for row, share in zip(table.rows, saved, strict=True))
    return Table(table.title, table.caption, (*table.header, "tokens saved"), cells)


def _curves(mix: Mix, title: str) -> list[Any]:
    pictures = []
    for axis, label in (("samples", "samples started, mean"), ("decoded", "tokens decoded, mean")):
        series = []
        for index, way in enumerate((*WAYS, ABSOLUTE)):
            points = [one for (group, name, _), one in mix.found.items() if (group, name) == ("curve", way)]
            points.sort(key=lambda one: float(getattr(one, axis).mean()))
            shown = [(float(getattr(one, axis).mean()), mix.fraction(one)) for one in points]
            kept = [(x, f) for x, f in shown if f is not None and f.low is not None and f.high is not None]
            series.append(
                Series(
                    way,
                    [f.value for _, f in kept],
                    [float(f.low or 0) for _, f in kept],
                    [float(f.high or 0) for _, f in kept],
                    [x for x, _ in kept],
                    index,
                )
            )
        for index, name in ((3, GREEDY), (4, "best of k by self-evaluation")):
            ks = [1, 2, 4, 8, 16]
            fixed = [mix.fixed(GREEDY)] if name == GREEDY else [
                one for k in ks for one in [mix.one if k == 1 else mix.found.get(("fixed", BEST.format(k), None))]
                if one is not None
            ]  # fmt: skip
            both = [(float(getattr(one, axis).mean()), mix.fraction(one)) for one in fixed]
            line = [(x, f.value) for x, f in both if f is not None]
            series.append(Series(name, [y for _, y in line], x=[x for x, _ in line], index=index))
        series = [one for one in series if len(one.y)]
        if not series:
            continue
        pictures.append(
            lines(
                series,
                Frame(
                    f"{title}/{mix.name}/{axis}",
                    f"Fraction of the gain of best-of-{mix.largest} against {label}; every threshold; bands are 95% "
                    "bootstrap intervals over prompts. Greedy decoding is the rival at one sample.",
                    label,
                    "fraction of gain",
                    log_x=True,
                    level=KEPT,
                ),
            )
        )
    return pictures
