"""The length problems' part of the study's report: findings with intervals, tables and figures from rows alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from steelyard.bench.stats import Estimate, Floats, mean_estimate, number, sign_test
from steelyard.recipes.preference_findings import Finding, above, claims_table, mean, within, words
from steelyard.recipes.preference_length_runs import LENGTH_METHODS, SCRATCH, TASKS, LengthStudy
from steelyard.report import plots
from steelyard.report.page import Section
from steelyard.report.plots import Frame, Series
from steelyard.report.tables import MISSING, Cell, Table
from steelyard.rng import numpy_generator

Row = Mapping[str, Any]
TASK_LABELS = {
    "min": "Min Length",
    "mode": "Mode Length",
    "skew_long": "Skew Length, long pairs",
    "skew_short": "Skew Length, short pairs",
}
ARM_LABELS = {"pairs": "pairs", "learned": "learned reward", "gold": "gold reward", "scratch": "reward from scratch"}
OFFLINE = tuple(name for name, method in LENGTH_METHODS.items() if not method.on_policy)
ON_POLICY = ("best_of_n", "rwr", "rloo", "ppo", "online_dpo")


class Results:
    """Rows of the tables, found by what they are.

    Args:
        rows: {"identity": ..., "values": ..., "curve": ...} of every run that is not tuning.
        config: of the study.
    """

    def __init__(self, rows: Sequence[Row], config: LengthStudy) -> None:
        self.config, self.seeds = config, config.seeds
        self._rows: dict[tuple[Any, ...], Row] = {}
        for row in rows:
            identity = dict(row["identity"])
            rate = identity.pop("learning_rate")
            if identity["stage"] == "contrast":  # the only one with several
                identity["rate"] = rate
            self._rows[self._key(**identity)] = row

    @staticmethod
    def _key(
        *, task: str, method: str, arm: str, seed: int, stage: str = "main", pairs: str = "independent",
        reuse: int = 1, refresh: int = 1, rate: float | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        return (task, method, arm, seed, stage, pairs, reuse, refresh, rate)

    def row(self, task: str, method: str, arm: str, seed: int, **more: Any) -> Row | None:
        """Return one run. A skewed task shares min's runs with the gold reward."""
        found = self._rows.get(self._key(task=task, method=method, arm=arm, seed=seed, **more))
        if found is None and arm == "gold" and task.startswith("skew"):
            found = self._rows.get(self._key(task="min", method=method, arm=arm, seed=seed, **more))
        return found

    def values(self, name: str, task: str, method: str, arm: str, **more: Any) -> Floats | None:
        """Return one number a seed, NaN where a failed run has none; None where there are no such runs."""
        rows = [self.row(task, method, arm, seed, **more) for seed in self.seeds]
        if any(row is None for row in rows):
            return None
        return np.array([row["values"].get(name, np.nan) for row in rows if row is not None], np.float64)

    def stopped(self) -> list[Row]:
        """Return the runs that did not come to their end."""
        return [row for row in self._rows.values() if row["values"]["status"] != "done"]

    def arms(self, method: str) -> tuple[str, ...]:
        """Return the arms of a method."""
        return self.config.arms if LENGTH_METHODS[method].on_policy else ("pairs",)

    def cases(self, task: str) -> list[tuple[str, str]]:
        """Return (method, arm) of the runs of a task."""
        every = [(method, arm) for method in self.config.methods for arm in self.arms(method)]
        return [case for case in every if self.values("gold", task, *case) is not None]


def estimate(values: Floats, name: str) -> Estimate | None:
    """Return the mean over seeds with its interval, without runs that lack the value; None if all do."""
    known = values[~np.isnan(values)]
    return mean_estimate(known, numpy_generator(0, f"length/{name}")) if len(known) else None


def cell(values: Floats | None, name: str) -> Cell:
    """Return the estimate as a cell."""
    return (None if values is None else estimate(values, name)) or MISSING


def sections(
    config: LengthStudy,
    rows: Sequence[Row],
    tuning: Sequence[Row],
    chosen: Mapping[tuple[str, str, str], float],
    foundations: Sequence[Row],
) -> list[Section]:
    """Return the sections of the length problems."""
    results = Results(rows, config)
    page = [_findings(config, results), _setting(config, results, foundations)]
    page += [_task(config, results, task, foundations) for task in TASKS if task in config.tasks]
    page.append(_over_optimisation(config, results, foundations))
    page.append(_displacement(config, results, foundations))
    page.append(_kl(config, results))
    if any(row["identity"]["stage"] == "reuse" for row in rows):
        page.append(_reuse(config, results))
    page.append(_costs(config, results, tuning, chosen))
    return page


# ---- the answers ----


COMPARABLE = 0.5
"""Mean differences of less than half a token are taken for none."""
_TOY = "a toy language and a transformer of two layers"


def findings(config: LengthStudy, results: Results) -> list[Finding]:
    """Return what the rows say about each claim; a claim whose runs are not there is left out."""
    found = []
    for claim, unit, values in claims(config, results):
        known = np.zeros(0) if values is None else values[~np.isnan(values)]
        if len(known):
            estimate = mean(known)
            verdict = within(estimate, COMPARABLE) if "comparable" in claim else above(estimate)
            found.append(Finding(claim, verdict, f"{words(known, 2)}, {unit}", _TOY))
    return found


def _findings(config: LengthStudy, results: Results) -> Section:
    section = Section("The claims in the length problems")
    section.text(
        "The claims are the paper's, read at second hand, unless marked as ours. Differences are paired by seed; "
        f"comparable means: within {COMPARABLE} tokens."
    )
    if len(results.seeds) < 6:
        section.notes([FEW])
    return section.table(claims_table(findings(config, results), "Claims, level 2"))


FEW = (
    "So few seeds cannot settle a claim: a bootstrap over them is too narrow, and a sign test needs six to reach "
    "0.05. Read 'holds' as: every seed, or nearly every one, points that way."
)


def claims(config: LengthStudy, results: Results) -> list[tuple[str, str, Floats | None]]:
    """Return (claim, unit, one number a seed, above 0 where it holds); None where it was not run."""
    gentle = config.contrast_learning_rates[0]
    tokens, share, nats = "gold reward (tokens)", "share of the possible gain", "nats"
    learned, offline = _group(ON_POLICY, "learned"), _group(OFFLINE, "pairs")
    last = max(config.reuse)
    fast = paired(results, "mean_gold", "min", [("online_dpo", "learned")], [*learned[:-1], *offline])
    clipped, free = (_sweep(results, method, last, 1) for method in ("ppo", "ppo_unclipped"))
    gaps = [paired(results, "gold", "min", _group((m,), "gold"), _group((m,), "learned")) for m in ON_POLICY]
    scratch = [
        _minus(results.values("gold", "min", m, "gold"), results.values("gold", "min", m, "scratch", stage="scratch"))
        for m in ON_POLICY
    ]
    contrast = [
        results.values("held_delta_w", "min", "dpo", "pairs", stage="contrast", pairs=kind, rate=gentle)
        for kind in ("distinct", "similar")
    ]
    supervised, policy_gradient = _kl_spent(results, ("best_of_n", "rwr")), _kl_spent(results, ("rloo", "ppo"))
    return [
        ("Min (misaligned): on-policy with the learned reward ends above offline", tokens,
         paired(results, "gold", "min", learned, offline)),
        ("Mode (aligned): on-policy with the learned reward and offline are comparable", tokens,
         paired(results, "gold", "mode", learned, offline)),
        ("on-policy sampling gains more in Min than in Mode", share,
         _minus(_gain(results, "min", learned, offline), _gain(results, "mode", learned, offline))),
        ("Skew, long pairs: on-policy with the learned reward ends above offline", tokens,
         paired(results, "gold", "skew_long", learned, offline)),
        ("Skew, short pairs: on-policy with the learned reward ends above offline", tokens,
         paired(results, "gold", "skew_short", learned, offline)),
        ("Min: offline, a negative gradient (DPO, IPO) ends above Pref-FT", tokens,
         paired(results, "gold", "min", _group(("dpo", "ipo"), "pairs"), [("pref_ft", "pairs")])),
        ("Mode: offline, DPO and IPO are comparable to Pref-FT", tokens,
         paired(results, "gold", "mode", _group(("dpo", "ipo"), "pairs"), [("pref_ft", "pairs")])),
        ("Min: on-policy DPO is faster than the others on average (mean over training, learned reward)", tokens, fast),
        ("Min: on-policy DPO with the learned reward ends above offline DPO", tokens,
         paired(results, "gold", "min", [("online_dpo", "learned")], [("dpo", "pairs")])),
        ("Min: DPO lowers the log-probability of held-out chosen answers", nats,
         _negative(results.values("held_delta_w", "min", "dpo", "pairs"))),
        ("Min: Pref-FT raises the log-probability of held-out chosen answers", nats,
         results.values("held_delta_w", "min", "pref_ft", "pairs")),
        (f"DPO moves chosen answers further up on distinct than on similar pairs (rate {gentle:g})", nats,
         _minus(*contrast)),
        (f"DPO raises held-out chosen answers on distinct pairs (rate {gentle:g})", nats, contrast[0]),
        (f"DPO lowers held-out chosen answers on similar pairs (rate {gentle:g})", nats, _negative(contrast[1])),
        (f"reuse T = {last}: PPO is better with clipping than without (mean over training)", tokens,
         _minus(clipped, free)),
        (f"reuse T = {last} is worse than T = {config.reuse[0]} for best of N (mean over training)", tokens,
         _minus(_sweep(results, "best_of_n", config.reuse[0], 1), _sweep(results, "best_of_n", last, 1))),
        ("ours: Min: the gold reward in the loop ends above the learned one", tokens, _mean(gaps)),
        ("ours: Min: and above one learned from scratch", tokens, _mean(scratch)),
        ("ours: Min: best of N and RWR spend more KL than RLOO and PPO for the same gold reward (learned)", nats,
         _minus(supervised, policy_gradient)),
    ]  # fmt: skip


def _minus(a: Floats | None, b: Floats | None) -> Floats | None:
    return None if a is None or b is None else a - b


def _negative(values: Floats | None) -> Floats | None:
    return None if values is None else -values


def _mean(parts: Sequence[Floats | None]) -> Floats | None:
    known = [part for part in parts if part is not None]
    if not known:
        return None
    average: Floats = np.mean(known, axis=0)
    return average


def _gain(
    results: Results, task: str, left: Sequence[tuple[str, str]], right: Sequence[tuple[str, str]]
) -> Floats | None:
    """Return a paired difference in shares of the way from the reference to the best possible reward."""
    difference = paired(results, "gold", task, left, right)
    if difference is None:
        return None
    start = np.array([_start(results, task, seed) for seed in results.seeds])
    share: Floats = difference / (_best(task) - start)
    return share


def _best(task: str) -> float:
    return 0.0 if task == "mode" else -1.0


def _level(results: Results, task: str) -> float:
    """Return the gold reward halfway between the reference's and the best possible one."""
    start = float(np.nanmean([_start(results, task, seed) for seed in results.seeds]))
    return (start + _best(task)) / 2


def _kl_spent(results: Results, methods: Sequence[str]) -> Floats | None:
    """Return the KL that methods spend on Min Length with the learned reward up to the level, one number a seed."""
    parts: list[Floats | None] = []
    for method in methods:
        rows = [results.row("min", method, "learned", seed) for seed in results.seeds]
        if all(row is not None for row in rows):
            level = _level(results, "min")
            parts.append(np.array([kl_at(row["curve"], level) for row in rows if row is not None]))
    return _mean(parts)


# ---- what was done ----


def _setting(config: LengthStudy, results: Results, foundations: Sequence[Row]) -> Section:
    section = Section("Length problems: a small transformer trained on the spot")
    length = np.array([row["reference_length"] for row in foundations])
    spread = np.array([row["reference_length_std"] for row in foundations])
    completions = config.prompts_per_step * config.num_generations
    section.text(
        f"A transformer of two layers and width {config.width} learns a synthetic language (vocabulary "
        f"{config.language.vocab_size}, answers of at most {config.language.cap} tokens). Its answers are "
        f"{length.mean():.1f} tokens long on average (standard deviation {spread.mean():.1f}). Pairs are its own "
        f"answers, labelled by length. Every method then takes {config.steps} updates on {completions} completions "
        "each, from the same weights. Offline methods see the pairs; on-policy methods draw fresh answers and score "
        "them with a reward model that was trained on those very pairs (learned) or with the true reward (gold). No "
        "run has a KL penalty.",
        "These are protocols, not equal budgets of labels: an on-policy run asks for a reward of every completion, an "
        "offline run reuses one set of pairs. Compare gold arms with offline methods only with that in mind: the "
        "learned arm is the one that knows what the offline methods know.",
        f"Intervals are 95% bootstrap intervals over {len(config.seeds)} seeds ({_seeds(config.seeds)}); reference, "
        "pairs and reward model are new for every seed and shared by all methods. "
        + (
            f"Each method chose among learning rates {_rates(config)} by gold reward on seeds "
            f"{_seeds(config.tuning_seeds)}."
            if config.tuning_seeds
            else f"All methods have the learning rate {config.learning_rates[0]:g}; nothing was tuned."
        ),
    )
    rows = []
    for task in config.tasks:
        found = [pair for row in foundations for pair in row["pairs"] if pair.get("model") == task]
        numbers = {name: np.array([pair[name] for pair in found], np.float64) for name in _PAIR_COLUMNS}
        rows.append((TASK_LABELS[task], *(cell(numbers[name], f"pairs/{task}/{name}") for name in _PAIR_COLUMNS)))
    section.table(
        Table(
            "Pairs and reward models",
            "Of each task, before any fine-tuning. Accuracy is the share of pairs that the learned reward ranks right; "
            "the last column asks it about pairs with the reference's own lengths.",
            ("task", "pairs", "chosen length", "rejected length", "edit distance", "accuracy, held out", "accuracy, "
             "reference's pairs"),
            tuple(rows),
        )
    )  # fmt: skip
    return section


_PAIR_COLUMNS = (
    "count", "chosen_length", "rejected_length", "edit_distance", "reward_model_accuracy",
    "reward_model_reference_accuracy",
)  # fmt: skip


def _seeds(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _rates(config: LengthStudy) -> str:
    return ", ".join(f"{rate:g}" for rate in config.learning_rates)


# ---- one task ----

QUESTIONS = {
    "min": "the peak of the reward is where the reference has hardly any mass (misaligned)",
    "mode": "the peak of the reward is where the reference has most of its mass (aligned)",
    "skew_long": "misaligned, and the pairs pile up at long answers, away from the peak and from the reference",
    "skew_short": "misaligned, and the pairs pile up at short answers: away from the reference, around the peak",
}


def _task(config: LengthStudy, results: Results, task: str, foundations: Sequence[Row]) -> Section:
    section = Section(TASK_LABELS[task])
    cases = results.cases(task)
    start = np.array([_start(results, task, seed) for seed in results.seeds])
    section.text(
        f"Here {QUESTIONS[task]}. The reference's gold reward is {number(float(np.nanmean(start)))} tokens; the best "
        f"possible is {_best(task):.0f}."
    )
    columns = ("gold", "mean_gold", "proxy", "length", "kl", "reverse_kl", "entropy")
    rows: list[tuple[Cell, ...]] = []
    for method, arm in cases:
        label = f"{LENGTH_METHODS[method].label}, {ARM_LABELS[arm]}"
        cells = [cell(results.values(name, task, method, arm), f"{task}/{method}/{arm}/{name}") for name in columns]
        rows.append((label, *cells))
    section.table(
        Table(
            f"{TASK_LABELS[task]}: results",
            "At the end of training, over fresh answers to unseen prompts at temperature 1. Gold reward in tokens; its "
            "mean over training, the reference included, stands for speed; learned reward (proxy) in standard "
            "deviations of the reference's; lengths in tokens; KL divergences in nats per answer; entropy in nats per "
            "token.",
            ("method", "gold", "gold, mean over training", "proxy", "length", "KL(policy, reference)",
             "KL(reference, policy)", "entropy"),
            tuple(rows),
        )
    )  # fmt: skip
    section.table(contrast_table(results, task, f"{TASK_LABELS[task]}: paired differences", CONTRASTS))
    section.figure(_gold_dots(results, task, float(np.nanmean(start))))
    arms = [arm for arm in ("pairs", *config.arms) if any(found == arm for _, found in cases)]
    section.panels([_curves(results, task, arm) for arm in arms])
    section.panels([_histograms(config, results, task, arm) for arm in arms])
    return section


def _start(results: Results, task: str, seed: int) -> float:
    for method, arm in results.cases(task):
        row = results.row(task, method, arm, seed)
        if row is not None:
            return float(row["values"]["start_gold"])
    return float("nan")


Contrast = tuple[str, Sequence[tuple[str, str]], Sequence[tuple[str, str]]]
"""(words, cases (method, arm) on the left, cases on the right): means over each side, paired by seed."""


def _group(methods: Sequence[str], arm: str) -> list[tuple[str, str]]:
    return [(method, arm) for method in methods]


CONTRASTS: tuple[Contrast, ...] = (
    ("on-policy, learned reward, minus offline (means over methods)",
     _group(ON_POLICY, "learned"), _group(OFFLINE, "pairs")),
    ("on-policy, gold reward, minus offline (means over methods)",
     _group(ON_POLICY, "gold"), _group(OFFLINE, "pairs")),
    ("same loss, learned reward: on-policy DPO minus DPO", [("online_dpo", "learned")], [("dpo", "pairs")]),
    ("same loss, gold reward: on-policy DPO minus DPO", [("online_dpo", "gold")], [("dpo", "pairs")]),
    ("imitation of the better, learned reward: on-policy best of N minus Pref-FT",
     [("best_of_n", "learned")], [("pref_ft", "pairs")]),
    ("negative gradient, offline: DPO and IPO minus Pref-FT", [("dpo", "pairs"), ("ipo", "pairs")],
     [("pref_ft", "pairs")]),
    ("negative gradient, on-policy, learned reward: RLOO, PPO, on-policy DPO minus best of N, RWR",
     _group(("rloo", "ppo", "online_dpo"), "learned"), _group(("best_of_n", "rwr"), "learned")),
    ("negative gradient, on-policy, gold reward: RLOO, PPO, on-policy DPO minus best of N, RWR",
     _group(("rloo", "ppo", "online_dpo"), "gold"), _group(("best_of_n", "rwr"), "gold")),
    ("gold minus learned reward in the loop (means over on-policy methods)",
     _group(ON_POLICY, "gold"), _group(ON_POLICY, "learned")),
)  # fmt: skip


def paired(results: Results, name: str, task: str, left: Sequence[tuple[str, str]], right: Sequence[tuple[str, str]],
           ) -> Floats | None:  # fmt: skip
    """Return mean over left cases minus mean over right ones, one number a seed; cases that were not run are left out.

    None where a side has no case at all.
    """
    sides = []
    for cases in (left, right):
        known = [found for case in cases if (found := results.values(name, task, *case)) is not None]
        if not known:
            return None
        sides.append(np.mean(known, axis=0))
    difference: Floats = sides[0] - sides[1]
    return difference


def contrast_table(results: Results, task: str, title: str, contrasts: Sequence[Contrast]) -> Table:
    """Return the table of paired differences in gold reward."""
    rows = []
    for label, left, right in contrasts:
        final = paired(results, "gold", task, left, right)
        during = paired(results, "mean_gold", task, left, right)
        if final is None or during is None:
            continue
        seeds = f"{int((final > 0).sum())} of {len(final)}, p = {sign_test(final):.2g}"
        rows.append((label, cell(final, f"{task}/{label}"), seeds, cell(during, f"{task}/{label}/during")))
    return Table(
        title,
        "Differences in gold reward (tokens; above 0: the first is better), paired by seed, with intervals; how many "
        "seeds are above 0 with the sign test's p; and the same for the mean over training.",
        ("contrast", "at the end", "seeds above 0", "mean over training"),
        tuple(rows),
    )


def _index(method: str) -> int:
    return list(LENGTH_METHODS).index(method)


def _series(label: str, estimates: Sequence[Estimate | None], index: int, x: Sequence[float] | None = None) -> Series:
    def of(pick: Callable[[Estimate], float | None]) -> list[float]:
        found = [None if e is None else pick(e) for e in estimates]
        return [float("nan") if value is None else value for value in found]

    y = of(lambda e: e.value)
    low = [a if a == a else b for a, b in zip(of(lambda e: e.low), y, strict=True)]
    high = [a if a == a else b for a, b in zip(of(lambda e: e.high), y, strict=True)]
    return Series(label, y, low, high, x, index)


def _gold_dots(results: Results, task: str, start: float) -> plots.Picture:
    methods = [method for method in results.config.methods if any(case[0] == method for case in results.cases(task))]
    series = []
    for index, arm in enumerate(("pairs", *results.config.arms)):
        found = [results.values("gold", task, method, arm) for method in methods]
        if any(values is not None for values in found):
            estimates = [None if v is None else estimate(v, f"{task}/{m}/{arm}") for v, m in zip(found, methods,
                         strict=True)]  # fmt: skip
            series.append(_series(ARM_LABELS[arm], estimates, index))
    return plots.dots(
        [LENGTH_METHODS[method].label for method in methods],
        series,
        Frame(f"length/{task}/gold", f"{TASK_LABELS[task]}: gold reward at the end, mean over seeds with its 95% "
              "interval; the line is the reference.", "gold reward (tokens)", level=start),
    )  # fmt: skip


def _curves(results: Results, task: str, arm: str) -> plots.Picture:
    series = []
    for method in results.config.methods:
        rows = [results.row(task, method, arm, seed) for seed in results.seeds]
        if any(row is None for row in rows):
            continue
        curves = [row["curve"] for row in rows if row is not None]
        steps = [point["step"] for point in max(curves, key=len)]
        table = np.array([_padded([point["gold"] for point in curve], len(steps)) for curve in curves])
        estimates = [estimate(column, f"{task}/{method}/{arm}/{step}") for column, step in zip(table.T, steps,
                     strict=True)]  # fmt: skip
        series.append(_series(LENGTH_METHODS[method].label, estimates, _index(method), steps))
    caption = f"{TASK_LABELS[task]}, {ARM_LABELS[arm]}: gold reward against updates; bands are 95% intervals."
    return plots.lines(
        series, Frame(f"length/{task}/curves/{arm}", caption, "updates", "gold reward (tokens)", small=True)
    )


def _padded(values: list[float], length: int) -> list[float]:
    """A run that stopped early stays where it stopped."""
    return values + [values[-1]] * (length - len(values))


def _histograms(config: LengthStudy, results: Results, task: str, arm: str) -> plots.Picture:
    """Plot how long the answers of an arm's policies are."""
    lengths = [float(length) for length in range(1, config.language.cap + 1)]
    series = []
    for method, of in results.cases(task):
        rows = [results.row(task, method, of, seed) for seed in results.seeds]
        texts = [row["values"].get("histogram") for row in rows if row is not None]
        found = [[float(share) for share in text.split()] for text in texts if text]
        if of == arm and found:
            means = np.mean(found, axis=0).tolist()
            series.append(Series(LENGTH_METHODS[method].label, means, x=lengths, index=_index(method)))
    caption = f"{TASK_LABELS[task]}, {ARM_LABELS[arm]}: share of answers of each length at the end, means over seeds."
    return plots.lines(series, Frame(f"length/{task}/lengths/{arm}", caption, "length (tokens)", "share", small=True))


# ---- findings across tasks ----


def _over_optimisation(config: LengthStudy, results: Results, foundations: Sequence[Row]) -> Section:
    section = Section("Length problems: learned and gold rewards")
    section.text(
        "A learned reward is right about pairs like those it has seen. On-policy methods climb to its own maximum, "
        "which need not be the gold reward's; the figures show where it lies. The gap is the gold reward that the same "
        "method reaches with the gold reward in the loop, less what it reaches with the learned one."
    )
    section.panels([_proxy_picture(task, foundations) for task in config.tasks])
    rows: list[tuple[Cell, ...]] = []
    for task, arm, stage in _LEARNED:
        for method in config.methods:
            learned = results.values("gold", task, method, arm, stage=stage)
            gold = results.values("gold", task, method, "gold")
            if learned is None or gold is None:
                continue
            key = SCRATCH if arm == "scratch" else task
            peak = np.array([_proxy_peak(row, key) for row in foundations], np.float64)
            proxy = results.values("proxy", task, method, arm, stage=stage)
            other = results.values("proxy", task, method, "gold") if key == task and task in ("min", "mode") else None
            rows.append(
                (
                    TASK_LABELS[task] + (", from scratch" if arm == "scratch" else ""),
                    LENGTH_METHODS[method].label,
                    cell(learned, f"learned/{key}/{method}"),
                    cell(gold - learned, f"gap/{key}/{method}"),
                    cell(proxy, f"gap/{key}/{method}/proxy"),
                    cell(other, f"gap/{key}/{method}/other"),
                    cell(peak, f"peak/{key}"),
                )
            )
    if rows:
        section.table(
            Table(
                "Over-optimisation",
                "Gap: gold reward at the end, gold arm minus learned arm, paired by seed. Proxy: what the learned "
                "reward says of its arm's answers, and of the gold arm's. Peak: the length that the "
                "learned reward likes most. From scratch: the reward model does not begin at the reference's weights; "
                "its runs have the learning rates that were chosen with the other one.",
                ("task", "method", "gold, learned arm", "gap (tokens)", "proxy, learned arm", "proxy, gold arm",
                 "proxy's peak (tokens)"),
                tuple(rows),
            )
        )  # fmt: skip
    return section


_LEARNED = (
    ("min", "learned", "main"), ("min", "scratch", "scratch"), ("mode", "learned", "main"),
    ("skew_long", "learned", "main"), ("skew_short", "learned", "main"),
)  # fmt: skip
"""(task, arm, stage) with a learned reward in the loop."""


def _proxy_picture(task: str, foundations: Sequence[Row]) -> plots.Picture:
    series: list[Series] = []
    for key, label in ((task, "from the reference"), (SCRATCH, "from scratch")):
        points = [point for row in foundations for point in row["proxy"]]
        points = [point for point in points if (point["task"], point["model"]) == (task, key)]
        lengths = sorted({point["length"] for point in points})
        columns = [np.array([p["proxy"] for p in points if p["length"] == length]) for length in lengths]
        estimates = [estimate(column, f"proxy/{key}/{length}") for column, length in zip(columns, lengths, strict=True)]
        if points:
            series.append(_series(label, estimates, len(series), lengths))
    caption = f"{TASK_LABELS[task]}: learned reward of the reference's answers cut to each length."
    return plots.lines(series, Frame(f"length/{task}/proxy", caption, "length (tokens)", "proxy (sd)", small=True))


def _proxy_peak(row: Row, key: str) -> float:
    points = [point for point in row["proxy"] if point["model"] == key]
    return float(max(points, key=lambda point: float(point["proxy"]))["length"])


def _displacement(config: LengthStudy, results: Results, foundations: Sequence[Row]) -> Section:
    section = Section("Length problems: what happens to chosen and rejected answers")
    section.text(
        "How far the log-probability of an answer moves from the reference's, in nats: delta_w of chosen, delta_l of "
        "rejected answers. A growing margin delta_w - delta_l hides whether the chosen one falls too; sums over tokens "
        "grow with length, so per-token averages stand beside them."
    )
    columns = ("train_delta_w", "train_delta_l", "held_delta_w", "held_delta_l", "held_delta_w_token",
               "held_delta_l_token", "held_accuracy")  # fmt: skip
    header = ("delta_w, train", "delta_l, train", "delta_w, held out", "delta_l, held out", "delta_w a token, held out",
              "delta_l a token, held out", "accuracy, held out")  # fmt: skip
    for task in config.tasks:
        rows = []
        for method, arm in results.cases(task):
            if arm == "gold" and task.startswith("skew"):
                continue  # min's runs, measured on min's pairs
            label = f"{LENGTH_METHODS[method].label}, {ARM_LABELS[arm]}"
            rows.append((label, *(cell(results.values(name, task, method, arm), f"{task}/{method}/{arm}/{name}")
                                  for name in columns)))  # fmt: skip
        section.table(
            Table(f"{TASK_LABELS[task]}: displacement", "In nats; accuracy: the share of pairs with delta_w > delta_l.",
                  ("method", *header), tuple(rows))
        )  # fmt: skip
    if config.contrasts:
        _add_contrast(section, config, results, foundations, columns, header)
    return section


def _add_contrast(
    section: Section, config: LengthStudy, results: Results, foundations: Sequence[Row], columns: Sequence[str],
    header: Sequence[str],
) -> None:  # fmt: skip
    """Add the comparison of similar with distinct pairs."""
    distances = {
        kind: np.array([p["edit_distance"] for row in foundations for p in row["pairs"] if p["pairs"] == kind])
        for kind in ("similar", "distinct")
    }
    section.text(
        "Similar or distinct pairs: the rejected answer is the same, and the chosen one is 1 to 3 tokens shorter. "
        "It is the same text ended earlier (similar; edit distance "
        f"{distances['similar'].mean():.1f}) or another answer of that length (distinct; "
        f"{distances['distinct'].mean():.1f}). Both kinds have the same lengths and the same learning rates."
    )
    rows: list[tuple[Cell, ...]] = []
    for method, rate in ((m, r) for m in ("dpo", "pref_ft") for r in config.contrast_learning_rates):
        label = f"{LENGTH_METHODS[method].label}, rate {rate:g}"
        sides: dict[str, dict[str, Floats | None]] = {}
        for kind in ("similar", "distinct"):
            more = {"stage": "contrast", "pairs": kind, "rate": rate}
            sides[kind] = {name: results.values(name, "min", method, "pairs", **more) for name in columns}
            cells = [cell(sides[kind][name], f"contrast/{label}/{kind}/{name}") for name in columns]
            rows.append((f"{label}: {kind}", *cells))
        differences = [
            cell(_minus(sides["distinct"][name], sides["similar"][name]), f"contrast/{label}/{name}")
            for name in columns
        ]
        rows.append((f"{label}: distinct minus similar", *differences))
    section.table(Table("Similar and distinct pairs", "In nats; every third row is a difference, paired by seed.",
                        ("method, pairs", *header), tuple(rows)))  # fmt: skip


def kl_at(curve: Sequence[Mapping[str, float]], gold: float) -> float:
    """Return KL(policy, reference) where a run's gold reward first reaches `gold`, linear between evaluations."""
    for before, after in itertools.pairwise(curve):
        if after["gold"] >= gold:
            share = 0.0 if before["gold"] >= gold else (gold - before["gold"]) / (after["gold"] - before["gold"])
            return float(before["kl"] + share * (after["kl"] - before["kl"]))
    return float("nan")


def _kl(config: LengthStudy, results: Results) -> Section:
    section = Section("Length problems: KL spent for the same gold reward")
    section.text(
        "No run has a KL penalty, so what a method spends is its own. The level is halfway from the reference's gold "
        "reward to the best possible one; runs that never reach it are counted, not averaged."
    )
    for task in config.tasks:
        level = _level(results, task)
        rows, series = [], []
        for method, arm in results.cases(task):
            found = [row for seed in results.seeds if (row := results.row(task, method, arm, seed)) is not None]
            spent = np.array([kl_at(row["curve"], level) for row in found])
            reached = int((~np.isnan(spent)).sum())
            label = f"{LENGTH_METHODS[method].label}, {ARM_LABELS[arm]}"
            rows.append((label, f"{reached} of {len(spent)}", cell(spent, f"kl/{task}/{method}/{arm}")))
            if arm != "gold":
                points = [[(p["kl"], p["gold"]) for p in row["curve"]] for row in found]
                length = min(map(len, points))
                mean = np.mean([curve[:length] for curve in points], axis=0)
                series.append(Series(label, mean[:, 1].tolist(), x=mean[:, 0].tolist(), index=_index(method)))
        section.table(
            Table(f"{TASK_LABELS[task]}: KL at a gold reward of {level:.1f}", "KL(policy, reference), nats per answer.",
                  ("method", "runs that reach it", "KL there"), tuple(rows))
        )  # fmt: skip
        caption = (
            f"{TASK_LABELS[task]}: gold reward against KL(policy, reference), means over seeds at each evaluation."
        )
        section.figure(plots.lines(series, Frame(f"length/{task}/kl", caption, "KL (nats)", "gold reward (tokens)")))
    return section


def _reuse(config: LengthStudy, results: Results) -> Section:
    section = Section("Length problems: reuse and staleness of samples")
    section.text(
        "Min Length with the gold reward, and always as many updates. Reuse: T passes over each draw, so T times fewer "
        "completions are drawn. Staleness: one pass over a draw of B / M minibatches, so as many completions, "
        "only earlier. PPO without clipping is PPO in all else."
    )
    methods = [m for m in ("best_of_n", "ppo", "ppo_unclipped") if _sweep(results, m, config.reuse[0], 1) is not None]
    shapes = [(reuse, 1) for reuse in config.reuse]
    shapes += [(1, refresh) for refresh in config.refresh if (1, refresh) not in shapes]
    names = ("mean_gold", "gold", "staleness", "sampler_kl", "sampler_ess", "generated_tokens")
    rows: list[tuple[Cell, ...]] = []
    for method in methods:
        for reuse, refresh in shapes:
            found = [_sweep(results, method, reuse, refresh, name) for name in names]
            cells = [cell(values, f"reuse/{method}/{reuse}/{refresh}/{name}") for values, name in zip(found, names,
                     strict=True)]  # fmt: skip
            rows.append((LENGTH_METHODS[method].label, str(reuse), str(refresh), *cells))
    section.table(
        Table("Reuse T and draws of B / M minibatches",
              "Gold reward in tokens; staleness in updates; KL(sampler, policy) in nats per answer and the effective "
              "share of samples under importance weights, both averaged over updates.",
              ("method", "T", "B / M", "gold, mean over training", "gold at the end", "staleness", "KL to the sampler",
               "effective share", "tokens drawn"), tuple(rows))
    )  # fmt: skip
    base = shapes[0]
    contrasts = []
    for method in methods:
        for shape in shapes[1:]:
            a, b = (_sweep(results, method, *one) for one in (shape, base))
            if a is not None and b is not None:
                label = (
                    f"{LENGTH_METHODS[method].label}: T = {shape[0]}, B / M = {shape[1]} minus T = {base[0]}, B / M = 1"
                )
                contrasts.append((label, cell(a - b, label)))
    for shape in shapes:
        a, b = (_sweep(results, method, *shape) for method in ("ppo", "ppo_unclipped"))
        if a is not None and b is not None:
            label = f"PPO with minus without clipping: T = {shape[0]}, B / M = {shape[1]}"
            contrasts.append((label, cell(a - b, label)))
    section.table(Table("Reuse: paired differences", "In gold reward, mean over training (tokens).",
                        ("contrast", "difference"), tuple(contrasts)))  # fmt: skip
    pictures = []
    for what, picked, axis in (
        ("reuse T", [shape for shape in shapes if shape[1] == 1], 0),
        ("minibatches of a draw B / M", [shape for shape in shapes if shape[0] == 1], 1),
    ):
        series = []
        for method in methods:
            estimates = [_maybe(_sweep(results, method, *shape), f"{what}/{method}/{shape}") for shape in picked]
            series.append(
                _series(LENGTH_METHODS[method].label, estimates, _index(method), [shape[axis] for shape in picked])
            )
        frame = Frame(f"length/{what}", f"Gold reward, mean over training, against {what}.", what,
                      "gold reward (tokens)", log_x=True, small=True)  # fmt: skip
        pictures.append(plots.lines(series, frame))
    section.panels(pictures)
    return section


def _maybe(values: Floats | None, name: str) -> Estimate | None:
    return None if values is None else estimate(values, name)


def _sweep(results: Results, method: str, reuse: int, refresh: int, name: str = "mean_gold") -> Floats | None:
    return results.values(name, "min", method, "gold", stage="reuse", reuse=reuse, refresh=refresh)


def _costs(
    config: LengthStudy, results: Results, tuning: Sequence[Row], chosen: Mapping[tuple[str, str, str], float]
) -> Section:
    section = Section("Length problems: learning rates, costs and failures")
    if tuning:
        rows = []
        groups: dict[tuple[str, str, str], dict[float, list[float]]] = {}
        for row in tuning:
            one = row["identity"]
            rates = groups.setdefault((one["task"], one["method"], one["arm"]), {})
            rates.setdefault(one["learning_rate"], []).append(row["values"]["gold"])
        for (task, method, arm), rates in groups.items():
            cells = [
                cell(np.array(rates[rate]), f"tuning/{task}/{method}/{arm}/{rate}") for rate in config.learning_rates
            ]
            label = f"{LENGTH_METHODS[method].label}, {ARM_LABELS[arm]}"
            rows.append((TASK_LABELS[task], label, *cells, f"{chosen[task, method, arm]:g}"))
        section.table(
            Table("Learning rates", "Gold reward at the end on the tuning seeds, which are in no other table.",
                  ("task", "method", *(f"{rate:g}" for rate in config.learning_rates), "chosen"), tuple(rows))
        )  # fmt: skip
    names = ("updates", "generated_tokens", "reward_queries", "cpu_seconds", "loss_negative_mass")
    rows = []
    for method in config.methods:
        arm = results.arms(method)[0]
        task = config.tasks[0]
        cells = [cell(results.values(name, task, method, arm), f"costs/{method}/{name}") for name in names]
        rows.append((f"{LENGTH_METHODS[method].label}, {ARM_LABELS[arm]}", *cells))
    section.table(
        Table("Costs and the negative gradient", f"Of a run of {TASK_LABELS[config.tasks[0]]}. The last column is the "
              "share of the gradient's weight that pushes answers down, averaged over updates.",
              ("method", "updates", "tokens drawn", "reward queries", "CPU seconds", "negative mass"), tuple(rows))
    )  # fmt: skip
    stopped = [
        f"{row['identity']['task']}, {row['identity']['method']}, {row['identity']['arm']}, seed "
        f"{row['identity']['seed']}: {row['values']['status']} after {row['values']['updates']} updates: "
        f"{row['values']['message']}"
        for row in results.stopped()
    ]
    section.text(
        "Every run came to its end."
        if not stopped
        else "Runs that stopped early; they keep the values they had and stay in all averages. Converged: every answer "
        "to every prompt had the same reward, so there was nothing left to learn. A failed run has no displacement, "
        "entropy or KL from the reference; those columns are means over the other runs."
    )
    section.notes(stopped[:20] + ([f"and {len(stopped) - 20} more, in rows.csv"] if len(stopped) > 20 else []))
    return section
