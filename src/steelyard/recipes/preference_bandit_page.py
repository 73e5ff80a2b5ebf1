"""Level 1 of the preference study as findings, tables and figures; every sentence follows from the rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from steelyard.bench.stats import Estimate, Floats, number, probability_of_improvement, sign_test
from steelyard.recipes.preference_bandit import METHODS, ArmResult, BanditStudy, Columns, Results, areas
from steelyard.recipes.preference_findings import Finding, above, band, iqm, mean, slopes, within, words
from steelyard.report import plots
from steelyard.report.page import Section
from steelyard.report.plots import Frame, Picture, Series
from steelyard.report.tables import MISSING, Cell, Table
from steelyard.rng import numpy_generator

TIE = 0.15
"""Rewards that differ by less are called comparable; the reward's range is 0 to 1."""
SHARED = ("best-of-n", "rwr", "dpo", "ipo")
"""Objectives that run on either source."""
SUPERVISED, CONTRASTIVE = ("pref-ft", "best-of-n", "rwr"), ("dpo", "ipo")
_TASK = "one-token bandit, small network, a re-implementation; learning rate tuned per arm"


def findings(results: Results, study: BanditStudy) -> list[Finding]:
    """Return the paper's claims that the arms at hand can answer."""
    return [
        finding
        for part in (_on_policy, _negative, _reuse, _prompts, _speed, _tokens)
        for finding in part(results, study)
    ]


def sections(results: Results, study: BanditStudy) -> list[Section]:
    """Return the sections of level 1, those of arms that did not run left out."""
    parts = (_who_draws, _lambda, _pairing, _reuse_curves, _fig16, _rates, _positions)
    return [section for part in parts for section in part(results, study)]


# findings


def _on_policy(results: Results, study: BanditStudy) -> Iterator[Finding]:
    gains: dict[str, Floats] = {}
    for target in study.targets:
        pairs = [
            (
                results.get(("main", f"on-policy {name}", target, "")),
                results.get(("main", f"offline {name}", target, "")),
            )
            for name in SHARED
        ]
        gains[target] = np.array([on.final() - off.final() for on, off in pairs if on and off])
    if gains.get("misaligned") is not None and len(gains["misaligned"]):
        gain = gains["misaligned"].mean(0)
        yield Finding(
            "Reward peaks in the reference's tail: on-policy sampling beats offline data.",
            above(mean(gain)),
            f"On-policy minus offline, mean over {len(gains['misaligned'])} objectives: {words(gain)}. By objective: "
            + _list(SHARED, gains["misaligned"]),
            f"{_TASK}; protocols of the released scripts, which give on-policy arms {study.refreshes} times the reward "
            f"queries and {study.refreshes * study.reuse / study.offline_steps:g} times the steps",
        )
    found = [(name, results.get(("matched", f"offline {name}", "misaligned", "refreshed"))) for name in SHARED]
    ons = [results.get(("main", f"on-policy {name}", "misaligned", "")) for name in SHARED]
    matched = [(name, on, off) for (name, off), on in zip(found, ons, strict=True) if on and off]
    if matched:
        gain = np.array([on.final() - off.final() for _, on, off in matched])
        yield Finding(
            "The same, with as many samples and as many steps on both sides: only who draws the completions differs.",
            above(mean(gain.mean(0))),
            f"On-policy minus matched offline: {words(gain.mean(0))}. By objective: "
            + _list([name for name, _, _ in matched], gain),
            f"{_TASK}; both sides draw {study.completions} completions a prompt at each of {study.refreshes} refreshes",
        )
    one, on = (results.get(("matched", "offline best-of-n", "misaligned", "one set")), ons[0])
    if one and on:
        gain = on.final() - one.final()
        yield Finding(
            "On-policy best-of-N beats best-of-N selection from one fixed set of as many samples.",
            above(mean(gain)),
            f"On-policy minus offline best of {study.refreshes * study.completions}: {words(gain)}; offline reaches "
            f"{mean(one.final()).text(3)}",
            f"{_TASK}; not the paper's comparison: with one decision, selection from enough samples finds the tail",
        )
    if len(gains.get("aligned", ())):
        best = [_best(results, "main", "aligned", on_policy) for on_policy in (True, False)]
        if best[0] and best[1]:
            gain = best[0].final() - best[1].final()
            yield Finding(
                "Reward peaks where the reference has its mode: offline methods are comparable.",
                within(mean(gain), TIE),
                f"Best on-policy ({_label(best[0])}) minus best offline ({_label(best[1])}), both chosen on tuning "
                f"seeds: {words(gain)}; comparable means within {TIE:g}",
                _TASK,
            )
        if len(gains.get("misaligned", ())):
            gain = gains["misaligned"].mean(0) - gains["aligned"].mean(0)
            yield Finding(
                "On-policy sampling helps more when the peak is far from the reference than when it is near.",
                above(mean(gain)),
                f"Gain in the misaligned less gain in the aligned case: {words(gain)}",
                _TASK,
            )


def _negative(results: Results, study: BanditStudy) -> Iterator[Finding]:
    contrastive, supervised = (
        _best(results, "main", "misaligned", False, names) for names in (CONTRASTIVE, SUPERVISED)
    )
    if contrastive and supervised:
        gain = contrastive.final() - supervised.final()
        yield Finding(
            "Offline, reward in the tail: a contrastive loss (negative gradient) beats supervised ones.",
            above(mean(gain)),
            f"{_label(contrastive)} minus {_label(supervised)}, each the best of its kind on the tuning seeds: "
            f"{words(gain)}",
            f"{_TASK}; {study.offline_steps} steps on {study.completions} completions a prompt",
        )
    table = _slopes(results, study)
    for source, says in ((True, "on-policy"), (False, "offline")):
        found = [slope for method, slope, _ in table if METHODS[method].on_policy == source]
        if found:
            pooled = np.mean(found, axis=0)
            yield Finding(
                f"A stronger negative gradient (lambda from 0 to 1) gives a higher reward, {says}.",
                above(mean(pooled)),
                f"Slope of the final reward in lambda, mean over {len(found)} objectives: {words(pooled)}",
                "lambda is ours: the paper compares losses with and without the term; misaligned case",
            )
    widening = [
        (name, results.get(("main", f"offline {name}", "misaligned", ""))) for name in ("dpo", "ipo", "best-of-n")
    ]
    if all(result for _, result in widening):
        margins = [r.final("delta_chosen") - r.final("delta_rejected") for _, r in widening if r]
        yield Finding(
            "A negative gradient widens the margin between chosen and rejected completions.",
            above(mean(np.minimum(margins[0], margins[1]))),
            "delta_w - delta_l from 0 before training, nats: "
            + ", ".join(f"{name} {mean(margin).text(1)}" for (name, _), margin in zip(widening, margins, strict=True)),
            f"{_TASK}; on the training pairs",
        )


def _reuse(results: Results, study: BanditStudy) -> Iterator[Finding]:
    curve = _curve(results, "on-policy best-of-n", [f"samples/{t}" for t in study.reuse_samples])
    if curve is not None and {1, 2} <= set(study.reuse_samples):
        gain = curve[:, study.reuse_samples.index(2)] - curve[:, study.reuse_samples.index(1)]
        yield Finding(
            "A little reuse helps: T = 2 beats T = 1 on the same samples (best-of-N).",
            above(mean(gain)),
            f"T = 2 minus T = 1: {words(gain)}",
            f"{_TASK}; learning rate {study.fixed_rates[0]:g}; T also buys optimiser steps",
        )
        yield Finding(
            "Excessive reuse hurts on the same samples (best-of-N).",
            above(mean(losses_to_reuse(curve))),
            f"Reward at the best smaller T (the best of the other seeds) minus T = {study.reuse_samples[-1]}: "
            f"{mean(losses_to_reuse(curve)).text(3)}",
            f"{_TASK}; T also buys optimiser steps",
        )
    for rate in study.fixed_rates:
        keys = [f"steps/{rate:g}/{t}" for t in study.reuse_steps]
        both = [_curve(results, f"on-policy {name}", keys) for name in ("best-of-n", "ppo")]
        if both[0] is None or both[1] is None or len(study.reuse_steps) < 2:
            continue
        last = study.reuse_steps[-1]
        gap = mean(losses_to_reuse(both[0]))
        yield Finding(
            f"Excessive reuse hurts at fixed samples and steps (best-of-N, learning rate {rate:g}).",
            above(gap),
            f"Reward at the best smaller T (the best of the other seeds) minus T = {last}: {gap.text(3)}",
            f"{_TASK}; the released ablation's design: N grows with T, refreshes fall",
        )
        contrast = (both[1][:, -1] - both[1][:, 0]) - (both[0][:, -1] - both[0][:, 0])
        yield Finding(
            f"Clipping tolerates reuse: PPO loses less by it than best-of-N (learning rate {rate:g}).",
            above(mean(contrast)),
            f"(PPO at T = {last} less T = {study.reuse_steps[0]}) minus the same of best-of-N: {words(contrast)}",
            f"{_TASK}; fixed samples and steps; a group baseline in place of a critic; the clip also holds the policy "
            "near its sampler, which binds where refreshes are few",
        )


def _prompts(results: Results, study: BanditStudy) -> Iterator[Finding]:
    for rate in study.fixed_rates:
        runs = [results.get(("prompts", "offline ipo", "misaligned", f"{rate:g}/{p}")) for p in study.prompt_grid]
        if not runs or not all(runs) or len(runs) < 2:
            continue
        chosen = np.stack([run.final("delta_chosen") for run in runs if run], 1)
        rejected = np.stack([run.final("delta_rejected") for run in runs if run], 1)
        few, many = mean(chosen[:, 0]), mean(chosen[:, -1])
        yield Finding(
            f"Few prompts: IPO raises the chosen and lowers the rejected completions (learning rate {rate:g}).",
            above(mean(np.minimum(chosen[:, 0], -rejected[:, 0]))),
            f"{study.prompt_grid[0]} prompts: delta_w {few.text()}, delta_l {mean(rejected[:, 0]).text()} nats",
            f"{_TASK}; {study.offline_steps} steps",
        )
        yield Finding(
            f"Many prompts: the chosen completions fall too (learning rate {rate:g}).",
            above(mean(-chosen[:, -1])),
            f"{study.prompt_grid[-1]} prompts: delta_w {many.text()} nats; change of delta_w a doubling of prompts: "
            f"{words(slopes(np.log2(study.prompt_grid).tolist(), chosen), 2)}",
            f"{_TASK}; {study.offline_steps} steps",
        )


def _speed(results: Results, study: BanditStudy) -> Iterator[Finding]:
    if "misaligned" not in study.targets:
        return
    names = [name for name in METHODS if METHODS[name].on_policy]
    runs = {name: results.get(("main", name, "misaligned", "")) for name in names}
    pairwise = [r for name, r in runs.items() if r and name.split()[-1] in CONTRASTIVE]
    others = [r for name, r in runs.items() if r and name.split()[-1] not in CONTRASTIVE]
    if not pairwise or not others:
        return
    fastest = [max(group, key=lambda r: areas(r.tuning[r.area_rate]).mean()) for group in (pairwise, others)]
    heights = [areas(result.area_runs) for result in fastest]
    gain = heights[0] - heights[1]
    better = probability_of_improvement([heights[0]], [heights[1]], numpy_generator(0, "study/better"))
    yield Finding(
        "The combination is fastest: on-policy DPO or IPO learns from fewer reward queries than the others.",
        above(mean(gain)),
        f"Area under the reward-query curve, {_label(fastest[0])} minus {_label(fastest[1])}, each the fastest of its "
        f"kind on tuning seeds: {words(gain)}; probability that a random run of the former is faster: {better.text()}",
        f"{_TASK}, for speed (by the area under the curve)",
    )


def _tokens(results: Results, study: BanditStudy) -> Iterator[Finding]:
    names = [name for name in SHARED if ("tokens", f"on-policy {name}", "misaligned", "") in results]
    gains, used = [], []
    for name in names:
        off = results.get(("tokens", f"offline {name}", "misaligned", ""))
        if off:
            gains.append(results["tokens", f"on-policy {name}", "misaligned", ""].final() - off.final())
            used.append(name)
    if gains:
        table = np.array(gains)
        yield Finding(
            f"Completions of {study.tokens} tokens, reward in the tail, equal samples and steps: on-policy wins.",
            above(mean(table.mean(0))),
            f"On-policy minus matched offline: {words(table.mean(0))}. By objective: {_list(used, table)}",
            "positions are independent given the context; the paper's policy is a small GPT",
        )


def losses_to_reuse(curve: Floats) -> Floats:
    """Return (best smaller T) minus (largest T) [S] of rewards [S, P].

    Each seed's best T is that of the mean over the *other* seeds, so that on average choosing it favours nothing.
    """
    others = (curve.sum(0) - curve)[:, :-1]
    losses: Floats = curve[np.arange(len(curve)), others.argmax(1)] - curve[:, -1]
    return losses


def _best(
    results: Results, group: str, target: str, on_policy: bool, names: Sequence[str] | None = None
) -> ArmResult | None:
    """Return the arm with the highest final reward on the tuning seeds."""
    found = [
        result
        for (g, method, t, variant), result in results.items()
        if (g, t, variant) == (group, target, "")
        and METHODS[method].on_policy == on_policy
        and (names is None or method.split(" ", 1)[1] in names)
    ]
    return max(found, key=_tuned, default=None)


def _tuned(result: ArmResult) -> float:
    return float(np.mean([run["reward"][-1] for run in result.tuning[result.rate]]))


def _label(result: ArmResult) -> str:
    return METHODS[result.arm.method].label


def _list(names: Sequence[str], values: Floats) -> str:
    return ", ".join(f"{name} {mean(row).text(2)}" for name, row in zip(names, values, strict=True))


def _curve(results: Results, method: str, variants: Sequence[str]) -> Floats | None:
    """Return final rewards [S, P] of the reuse arms of a method, None where one is missing."""
    found = [results.get(("reuse", method, "misaligned", variant)) for variant in variants]
    return None if not found or not all(found) else np.stack([one.final() for one in found if one], 1)


def _slopes(results: Results, study: BanditStudy) -> list[tuple[str, Floats, Floats]]:
    """Return (method, slope of the final reward in lambda [S], rewards [S, L])."""
    found = []
    for method in METHODS:
        runs = [results.get(("negative", method, "misaligned", f"{value:g}")) for value in study.negatives]
        if len(runs) > 1 and all(runs):
            rewards = np.stack([run.final() for run in runs if run], 1)
            found.append((method, slopes(study.negatives, rewards), rewards))
    return found


# sections


def _who_draws(results: Results, study: BanditStudy) -> Iterator[Section]:
    if "main" not in study.arms:
        return
    section = Section("Bandits: who draws the completions")
    section.text(
        "A context, one of 100 actions, and a reward around one action: bin 70, where the reference has a mass of "
        "0.002 (misaligned), or bin 20, near its mode (aligned). Offline arms take "
        f"{study.offline_steps} steps on one set of {study.completions} completions of each of {study.prompts} "
        f"prompts; on-policy arms draw as many afresh {study.refreshes} times and take {study.reuse} steps on each. "
        "The policy starts at the reference; rewards are exact expectations on 100 unseen contexts."
    )
    methods = list(METHODS)
    pictures = []
    for target in study.targets:
        runs = [results["main", method, target, ""] for method in methods]
        start = float(np.mean([run["reward"][0] for run in runs[0].runs]))
        ends = [iqm(run.final()) for run in runs]
        pictures.append(
            plots.dots(
                [METHODS[method].label for method in methods],
                [_dots("reward", ends)],
                Frame(
                    f"main/{target}",
                    f"{target.capitalize()}: final reward, interquartile mean over {len(study.seeds)} seeds with its "
                    "95% interval; the line is the reward before training.",
                    xlabel="expected reward",
                    ylim=(-0.03, 1.03),
                    level=start,
                    small=True,
                ),
            )
        )
    section.panels(pictures)
    section.figure(_query_curves(results, study), _moved(results, study), _divergences(results, study))
    for target in study.targets:
        section.table(_results_table([results["main", method, target, ""] for method in methods], target))
    section.table(_pairs_table(results, study), _mass_table(results, study))
    yield section


def _query_curves(results: Results, study: BanditStudy) -> Picture:
    target = study.targets[0]
    series = []
    for index, method in enumerate(METHODS):
        result = results["main", method, target, ""]
        if METHODS[method].on_policy:
            y, low, high = band(_matrix(result.area_runs, "reward"))
            x = result.area_runs[0]["queries"]
            label = f"{METHODS[method].label} ({result.area_rate:g})"
            series.append(Series(label, y, low, high, x, index))
    return plots.lines(
        series,
        Frame(
            f"queries/{target}",
            f"{target.capitalize()}: reward against reward queries, mean over seeds with its 95% band; in brackets the "
            "learning rate with the largest area under the curve on the tuning seeds.",
            xlabel="reward queries",
            ylabel="expected reward",
            ylim=(-0.03, 1.03),
        ),
    )


def _moved(results: Results, study: BanditStudy) -> Picture:
    """Draw the displacement of chosen and rejected completions, offline."""
    target = study.targets[0]
    methods = [method for method in METHODS if not METHODS[method].on_policy]
    frame = Frame(
        f"displacement/{target}",
        f"{target.capitalize()}, offline: mean log pi / pi_ref of the chosen (delta_w) and rejected (delta_l) "
        "completions trained on, with 95% intervals. Left of the line: less likely than before.",
        xlabel="nats",
        level=0.0,
        symlog=True,
    )
    return _of_methods(results, methods, target, {"delta_chosen": "delta_w", "delta_rejected": "delta_l"}, frame)


def _divergences(results: Results, study: BanditStudy) -> Picture:
    """Draw both KL divergences of all methods."""
    target = study.targets[0]
    frame = Frame(
        f"kl/{target}",
        f"{target.capitalize()}: KL(pi, ref), small where pi stays on the reference's actions, and KL(ref, pi), "
        "large where it gives actions of the reference up; both exact, on unseen contexts, with 95% intervals.",
        xlabel="nats",
        symlog=True,
    )
    return _of_methods(
        results, list(METHODS), target, {"reverse_kl": "KL(pi, ref)", "forward_kl": "KL(ref, pi)"}, frame
    )


def _of_methods(
    results: Results, methods: Sequence[str], target: str, columns: dict[str, str], frame: Frame
) -> Picture:
    """Draw the mean last value of columns, one row a method."""
    series = []
    for index, (name, label) in enumerate(columns.items()):
        ends = [mean(results["main", method, target, ""].final(name)) for method in methods]
        series.append(_dots(label, ends, index))
    return plots.dots([METHODS[method].label for method in methods], series, frame)


def _results_table(results: Sequence[ArmResult], title: str) -> Table:
    failures = any(result.failed for result in results)
    rows = []
    for result in results:
        cells: tuple[Cell, ...] = (
            _label(result) + (f", {result.arm.variant}" if result.arm.variant else ""),
            f"{result.rate:g}",
            iqm(result.final()),
            *(
                _cell(result, name)
                for name in ("reverse_kl", "forward_kl", "entropy", "delta_chosen", "delta_rejected")
            ),
            f"{result.arm.case.queries} / {result.arm.case.steps}",
            *((str(result.failed),) if failures else ()),
        )
        rows.append(cells)
    return Table(
        f"Final values, {title}",
        "Reward: interquartile mean over seeds; the rest: means; both with 95% bootstrap intervals. Failed runs stay "
        "in with their value at collapse.",
        (
            *("method", "learning rate", "reward", "KL(pi, ref)", "KL(ref, pi)", "entropy", "delta_w", "delta_l"),
            "queries / steps",
            *(("failed",) if failures else ()),
        ),
        tuple(rows),
        (
            ("delta_w, delta_l", "log pi / pi_ref of the chosen and rejected completions of the last pairs, nats; no "
             "number where a converged policy draws only equal ones"),
        ),
    )  # fmt: skip


def _pairs_table(results: Results, study: BanditStudy) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for target in study.targets:
        for name in SHARED:
            on = results.get(("main", f"on-policy {name}", target, ""))
            for group, variant, words_ in (
                ("main", "", "one small set"),
                ("matched", "refreshed", "equal samples and steps"),
                ("matched", "one set", "one large set, equal samples and steps"),
            ):
                off = results.get((group, f"offline {name}", target, variant))
                if on and off:
                    d = on.final() - off.final()
                    rows.append((target, name, words_, mean(off.final()), mean(d), number(sign_test(d), 3)))
    return Table(
        "On-policy minus offline, the same objective",
        "Paired over seeds: mean [95% interval] and the exact two-sided sign test. Equal samples and steps: the "
        "offline arm draws from the reference when the on-policy arm draws from the policy, nothing else differs.",
        ("target", "objective", "offline data", "offline reward", "difference", "p"),
        tuple(rows),
    )


def _mass_table(results: Results, study: BanditStudy) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for target in study.targets:
        for method in METHODS:
            result = results["main", method, target, ""]
            if not METHODS[method].on_policy:
                cells = (_cell(result, name) for name in ("mass_best", "mass_rest", "mass_unseen", "negative_mass"))
                rows.append((target, _label(result), *cells))
    return Table(
        "Where the mass went, offline",
        "Probability, on the training prompts, of each prompt's best completion, of its other completions, and of all "
        "actions that its data do not contain; and the share of the gradient that pushes down.",
        ("target", "method", "best", "others seen", "unseen", "negative share"),
        tuple(rows),
    )


def _lambda(results: Results, study: BanditStudy) -> Iterator[Section]:
    table = _slopes(results, study)
    if not table:
        return
    section = Section("Bandits: the negative gradient as one number")
    section.text(
        "lambda scales whatever an objective pushes down: 0 never lowers the probability of a completion, 1 is the "
        f"objective itself. Misaligned case; on-policy arms with {study.short_refreshes} refreshes, so that not all is "
        "solved; every lambda chooses its own learning rate."
    )
    pictures = []
    for source, title in ((True, "on-policy"), (False, "offline")):
        series = []
        for index, (method, _, rewards) in enumerate(table):
            if METHODS[method].on_policy == source:
                y, low, high = band(rewards)
                series.append(Series(METHODS[method].label, y, low, high, study.negatives, index))
        if series:
            frame = Frame(
                f"lambda/{title}",
                f"{title.capitalize()}: final reward against lambda, mean over seeds with its 95% band.",
                xlabel="lambda",
                ylabel="expected reward",
                ylim=(-0.03, 1.03),
            )
            pictures.append(plots.lines(series, frame))
    section.figure(*pictures)
    rows: list[tuple[Cell, ...]] = []
    for method, slope, rewards in table:
        ends = (mean(rewards[:, i]) for i in range(rewards.shape[1]))
        rows.append((METHODS[method].label, *ends, mean(slope), number(sign_test(slope), 3)))
    section.table(
        Table(
            "Slope of the final reward in lambda",
            "Least squares over lambda for each seed, then mean over seeds [95% interval] and sign test.",
            ("method", *(f"lambda {value:g}" for value in study.negatives), "slope", "p"),
            tuple(rows),
        )
    )
    yield section


def _pairing(results: Results, study: BanditStudy) -> Iterator[Section]:
    rules = {"all": "all pairs", "best_worst": "best with worst", "best_rest": "best with each other"}
    methods = [method for method in METHODS if ("pairing", method, "misaligned", "all") in results]
    if not methods:
        return
    series = []
    for index, (rule, label) in enumerate(rules.items()):
        ends = [mean(results["pairing", method, "misaligned", rule].final()) for method in methods]
        series.append(_dots(label, ends, index))
    frame = Frame(
        "pairing",
        "Misaligned: final reward by pairing rule, mean over seeds with its 95% interval; on-policy arms with "
        f"{study.short_refreshes} refreshes.",
        xlabel="expected reward",
        ylim=(-0.03, 1.03),
    )
    runs = [results["pairing", method, "misaligned", rule] for method in methods for rule in rules]
    yield (
        Section("Bandits: which completions are compared")
        .figure(plots.dots([METHODS[method].label for method in methods], series, frame))
        .table(_results_table(runs, "by pairing rule"))
    )


def _reuse_curves(results: Results, study: BanditStudy) -> Iterator[Section]:
    groups = [("samples", study.reuse_samples, f"fixed samples, learning rate {study.fixed_rates[0]:g}", "samples")]
    groups += [
        (f"steps/{rate:g}", study.reuse_steps, f"fixed samples and steps, learning rate {rate:g}", "steps")
        for rate in study.fixed_rates
    ]
    pictures = []
    rows: list[tuple[Cell, ...]] = []
    for prefix, grid, title, kind in groups:
        series = []
        for index, method in enumerate(METHODS):
            curve = _curve(results, method, [f"{prefix}/{t}" for t in grid])
            if curve is not None:
                y, low, high = band(curve)
                series.append(Series(METHODS[method].label, y, low, high, grid, index))
                best = int(curve.mean(0).argmax())
                ends = (METHODS[method].label, title, str(grid[best]), mean(curve[:, best]), mean(curve[:, -1]))
                rows.append((*ends, mean(curve[:, best] - curve[:, -1])))
        if series:
            what = "T also buys steps" if kind == "samples" else "N grows with T, refreshes fall"
            frame = Frame(
                f"reuse/{prefix}",
                f"{title.capitalize()}: final reward against T, mean over seeds with its 95% band ({what}).",
                xlabel="T, updates on the same completions",
                ylabel="expected reward",
                log_x=True,
                ylim=(-0.03, 1.03),
            )
            pictures.append(plots.lines(series, frame))
    if not pictures:
        return
    yield (
        Section("Bandits: reuse of samples")
        .text(
            "Misaligned case, on-policy. At a fixed number of samples a larger T buys more optimiser steps; the "
            "released ablation fixes both, so that a larger T means fewer refreshes with more completions each."
        )
        .figure(*pictures)
        .table(
            Table(
                "Best T",
                "T with the highest mean reward, and what the largest T loses against it (0 where it is the best "
                "itself). The best was chosen on the same runs, which favours it; the claims above do not do that.",
                ("method", "protocol", "best T", "reward there", "reward at the largest T", "loss at the largest T"),
                tuple(rows),
            )
        )
    )


def _fig16(results: Results, study: BanditStudy) -> Iterator[Section]:
    pictures = []
    for rate in study.fixed_rates:
        runs = [results.get(("prompts", "offline ipo", "misaligned", f"{rate:g}/{p}")) for p in study.prompt_grid]
        if not runs or not all(runs):
            continue
        series = []
        for index, (name, label) in enumerate((("delta_chosen", "delta_w"), ("delta_rejected", "delta_l"))):
            y, low, high = band(np.stack([run.final(name) for run in runs if run], 1))
            series.append(Series(label, y, low, high, study.prompt_grid, index))
        frame = Frame(
            f"prompts/{rate:g}",
            f"Learning rate {rate:g}: mean log-ratio of the chosen (delta_w) and rejected (delta_l) completions after "
            f"{study.offline_steps} steps; bands are 95%.",
            xlabel="prompts",
            ylabel="nats",
            log_x=True,
            level=0.0,
        )
        pictures.append(plots.lines(series, frame))
    if pictures:
        yield (
            Section("Bandits: number of prompts (the paper's figure 16)")
            .text("Offline IPO, misaligned case: does the chosen completion rise when more prompts share the network?")
            .figure(*pictures)
        )


def _rates(results: Results, study: BanditStudy) -> Iterator[Section]:
    tuned = [result for result in results.values() if result.tuning]
    if not tuned:
        return
    section = Section("Bandits: sensitivity to the learning rate")
    section.text(
        f"Every arm chose among the same {len(study.learning_rates)} learning rates on seeds "
        f"{', '.join(map(str, study.tuning_seeds))}; all of these runs are here, not only the winners."
    )
    pictures = []
    for target in study.targets:
        for on_policy in (False, True):
            series = []
            for index, method in enumerate(METHODS):
                result = results.get(("main", method, target, ""))
                if result and METHODS[method].on_policy == on_policy:
                    rewards = np.stack([_finals(result.tuning[rate]) for rate in result.arm.rates], 1)
                    y, low, high = band(rewards)
                    series.append(Series(METHODS[method].label, y, low, high, result.arm.rates, index))
            if series:
                source = "on-policy" if on_policy else "offline"
                frame = Frame(
                    f"rates/{target}/{source}",
                    f"{target.capitalize()}, {source}: final reward against the learning rate, mean over the tuning "
                    "seeds with its 95% band.",
                    xlabel="learning rate",
                    ylabel="expected reward",
                    log_x=True,
                    ylim=(-0.03, 1.03),
                )
                pictures.append(plots.lines(series, frame))
    rows: list[tuple[Cell, ...]] = []
    for result in tuned:
        ends = tuple(mean(_finals(result.tuning[rate])) for rate in result.arm.rates)
        rows.append((result.arm.group, result.arm.target, _label(result), result.arm.variant or MISSING, *ends))
    header = ("arm", "target", "method", "variant", *(f"{rate:g}" for rate in study.learning_rates))
    caption = "Final reward at each learning rate on the tuning seeds, mean [95% interval]."
    for end, word in ((min(study.learning_rates), "smallest"), (max(study.learning_rates), "largest")):
        edge = [f"{_label(r)} ({r.arm.group}, {r.arm.target})" for r in tuned if r.rate == end and not r.arm.variant]
        if edge:
            section.text(
                f"These chose the {word} rate of the list, so that a better one may lie beyond: {', '.join(edge)}."
            )
    yield section.figure(*pictures).table(Table("All learning rates", caption, header, tuple(rows)))


def _positions(results: Results, study: BanditStudy) -> Iterator[Section]:
    runs = [result for (group, *_), result in results.items() if group == "tokens"]
    if not runs:
        return
    labels = [_label(run) + (", equal samples and steps" if run.arm.variant else "") for run in runs]
    frame = Frame(
        "tokens",
        f"Misaligned, completions of {study.tokens} tokens: final reward, mean over seeds with its 95% interval; the "
        "line is the reward before training.",
        xlabel="expected reward",
        ylim=(-0.03, 1.03),
        level=float(np.mean([run["reward"][0] for run in runs[0].runs])),
    )
    yield (
        Section(f"Bandits: completions of {study.tokens} tokens")
        .text(
            "The reward is the mean over positions, so that no selection among a few whole completions finds the best "
            "one. Positions are independent given the context, which keeps all expectations exact."
        )
        .figure(plots.dots(labels, [_dots("reward", [mean(run.final()) for run in runs])], frame))
        .table(_results_table(runs, f"{study.tokens} tokens"))
    )


def _dots(label: str, ends: Sequence[Estimate], index: int | None = None) -> Series:
    low = [end.value if end.low is None else end.low for end in ends]
    high = [end.value if end.high is None else end.high for end in ends]
    return Series(label, [end.value for end in ends], low, high, index=index)


def _cell(result: ArmResult, name: str) -> Cell:
    """Return the mean of the finite last values, or a dash."""
    if any(name not in run for run in result.runs):
        return MISSING
    values = result.final(name)
    return mean(values) if np.isfinite(values).any() else MISSING


def _finals(runs: Sequence[Columns]) -> Floats:
    return np.array([run["reward"][-1] for run in runs], np.float64)


def _matrix(runs: Sequence[Columns], name: str) -> Floats:
    """Return [S, P] of a column; a missing number is NaN."""
    return np.array([[math.nan if x is None else x for x in run[name]] for run in runs], np.float64)
