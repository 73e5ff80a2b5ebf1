"""The numbers in words: the sentence on top of a report, its cautions, and the table for the terminal."""

from __future__ import annotations

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from steelyard.bench import stats
from steelyard.bench.rows import Ints, Run, paired
from steelyard.bench.stats import Estimate
from steelyard.report.numbers import QUANTITIES, Comparison, RecipeSummary, Summary, config_difference


def sentence(summary: Summary) -> str:
    """Return the result in plain words, one or two sentences a recipe."""
    return " ".join(_recipe_sentence(recipe) for recipe in summary.recipes)


def _recipe_sentence(recipe: RecipeSummary) -> str:
    """Say the result of one recipe in words."""
    reference = recipe.cases[0]
    after = reference.estimates["after"]
    count = f"{len(reference.runs)} runs" if len(reference.runs) > 1 else "one run"
    if "before" in reference.estimates:
        before = _plain(reference.estimates["before"])
        start = f"{before} before and {_plain(after)} after online fine-tuning"
    else:
        start = f"{_plain(after)} after training"
    text = f"{reference.label}: mean {recipe.metric} {start} ({count})"
    name = "evaluation_regret" if "evaluation_regret" in reference.estimates else "after"
    for row in recipe.comparisons:
        if row.quantity == name:
            what = "evaluation regret" if name == "evaluation_regret" else f"final {recipe.metric}"
            text += "; " + _comparison_words(row, reference.label, what)
    failed = sum(run.status == "failed" for case in recipe.cases for run in case.runs)
    total = sum(len(case.runs) for case in recipe.cases)
    text += "."
    if failed:
        text += f" {failed} of {total} runs failed; evaluations not reached count with score 0."
    return text


def _plain(estimate: Estimate) -> str:
    return stats.number(estimate.value) if estimate.low is None else estimate.text()


def _comparison_words(row: Comparison, reference: str, what: str) -> str:
    """Turn 'case minus reference' into words about the reference."""
    difference = row.difference
    if difference.low is None:
        pairs, size = "one paired seed, no interval", stats.number(abs(difference.value))
    else:
        pairs, size = f"{difference.n} paired seeds", _absolute(difference)
    if difference.value == 0:
        return f"{what} equal to {row.label}'s ({pairs})"
    if difference.low is not None and not difference.excludes_zero():
        span = f"{row.label} minus {reference}: {difference.text()}, {pairs}"
        return f"{what} not clearly different from {row.label}'s ({span})"
    direction = "lower" if difference.value > 0 else "higher"
    return f"{what} {direction} than {row.label}'s by {size} ({pairs})"


def _absolute(difference: Estimate) -> str:
    """Return the text of a difference turned positive."""
    if difference.value >= 0 or difference.low is None or difference.high is None:
        return difference.text()
    return Estimate(-difference.value, -difference.high, -difference.low, difference.n).text()


def terminal_table(summary: Summary) -> Group:
    """Return one table a recipe for the terminal, a column a case, and the sentence; numbers as in the report."""
    tables = [_recipe_table(recipe) for recipe in summary.recipes]
    # Text, not str: labels come from files and must not be read as markup
    return Group(*tables, Text(sentence(summary)))


def _recipe_table(recipe: RecipeSummary) -> RichTable:
    table = RichTable(title=Text(recipe.recipe), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("mean [95% interval]")
    for case in recipe.cases:
        failed = sum(run.status == "failed" for run in case.runs)
        count = "one run" if len(case.runs) == 1 else f"{len(case.runs)} runs"
        table.add_column(Text(f"{case.label}\n{count}" + (f", {failed} failed" if failed else "")), justify="right")
    for quantity in QUANTITIES:
        estimates = [case.estimates.get(quantity.name) for case in recipe.cases]
        if any(estimates):
            table.add_row(quantity.title, *(Text("-" if e is None else e.text()) for e in estimates))
    return table


def notes(recipe: RecipeSummary) -> list[str]:
    """Say what a reader must know before believing the table."""
    cases, found = recipe.cases, []
    fewest = min(len(case.runs) for case in cases)
    if fewest == 1:
        found.append("A case with one run has no interval over runs: nothing can be said about other seeds.")
    elif fewest < 5:
        found.append(
            "With fewer than 5 runs a bootstrap percentile interval is too narrow: at a nominal 95% it covers the true "
            "mean about half of the time with 2 runs, 75% with 3 and 79% with 4 (docs/statistics.md)."
        )
    for case in cases:
        failed = [run for run in case.runs if run.status == "failed"]
        if failed:
            seeds = ", ".join(str(run.seed) for run in failed)
            found.append(
                f"{case.label}: {len(failed)} of {len(case.runs)} runs failed (seed {seeds}). Failed runs stay in the "
                "averages; evaluations not reached count with score 0."
            )
        varying = sorted({key for run in case.runs[1:] for key in config_difference(case.runs[0], run)})
        if varying:
            found.append(f"{case.label}: configs differ between seeds in {', '.join(varying)}.")
        finished = {tuple(run.points("online").step) for run in case.runs if run.status == "done"}
        if len(finished) > 1:
            found.append(f"{case.label}: runs were evaluated at different steps; the curve interpolates linearly.")
    if all(_alike(run) for case in cases for run in case.runs):
        found.append(
            "The final evaluation episodes of each run are all alike: they say no more than one episode a run, and the "
            "Wilson interval, which takes them for independent, is too narrow."
        )
    reference = cases[0]
    for case in cases[1:]:
        pairs = paired(case.runs, reference.runs)
        alone = len(case.runs) + len(reference.runs) - 2 * len(pairs)
        if not pairs:
            found.append(f"{case.label} and {reference.label} share no seed: no paired comparison.")
        elif alone:
            found.append(
                f"{case.label} and {reference.label} share {len(pairs)} seeds; {alone} runs without a partner are left "
                "out of the paired differences."
            )
        if any(a.data_hash != b.data_hash for a, b in pairs):
            found.append(
                f"{case.label} and {reference.label} were trained on different data (their data hashes differ)."
            )
        if any(
            not np.array_equal(_final_seeds(a), _final_seeds(b))
            for a, b in pairs
            if "failed" not in (a.status, b.status)
        ):
            found.append(
                f"{case.label} and {reference.label}: final evaluation episodes start from different seeds; they are "
                "paired by training seed only."
            )
    return found


def _last(run: Run) -> Ints:
    """Return the rows of the last evaluation; none if a failed run made none."""
    points = run.points("online").episodes or run.points("offline").episodes
    return points[-1] if points else np.zeros(0, np.int64)


def _final_seeds(run: Run) -> Ints:
    return np.sort(run.evaluations.episode_seed[_last(run)])


def _alike(run: Run) -> bool:
    rows = _last(run)
    returns, lengths = run.evaluations.returns[rows], run.evaluations.length[rows]
    return len(rows) > 1 and bool(np.all(returns == returns[0]) and np.all(lengths == lengths[0]))
