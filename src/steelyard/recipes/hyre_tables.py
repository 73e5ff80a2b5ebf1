r"""E2 of HyRe: regression and digits under a shift between training and test rows.

Lee, Williams, Marklund, Sharma, Mitchell, Singh, Finn, "Test-Time Alignment via Hypothesis Reweighting"
(arXiv 2412.08812) shows UCI regression under shift; its reviewers found the gains there small, and so do we: weak
evidence, shown as it comes, with the baseline that a regression must beat, "add the mean residual", beside it.

Errors are relative to the uniform mean of the same ensemble on the same rows; means are geometric, intervals resample
whole tables. Settings of a table are the ones that are best on all other tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from steelyard.bench.rows import write_rows
from steelyard.errors import MissingExtraError
from steelyard.recipes.hyre_jobs import begin, carry_out
from steelyard.recipes.hyre_tables_page import findings, section
from steelyard.recipes.hyre_tables_runs import DIGITS, REGRESSION, Source, TableJob, TableStudy, shifts_of, work
from steelyard.recipes.preference_findings import Finding
from steelyard.report.page import Section

PRESETS: dict[str, TableStudy] = {
    "tiny": TableStudy(steps=200, num_heads=50, vanilla=10, draws=10),
    "small": TableStudy(steps=400),
    "paper": TableStudy(steps=3000, gaps=100, columns=2, train_rows=50_000, draws=50),
}
"""Sizes; without a data folder scikit-learn's tables alone."""


def run(config: TableStudy, out: Path, workers: int, console: Console) -> tuple[list[Section], list[Finding]]:
    """Carry out the study, or go on with it, and return its part of the page and its findings.

    Writes regression.csv and digits.csv (one row an ensemble, shift, method, setting and n) into `out`.

    Raises:
        ConfigError: the folder holds a study with other settings.
        DataError: the data folder lacks the tables.
        Interrupted: ctrl-C; the same call goes on with what is missing.
    """
    begin(out, config)
    sources: tuple[Source, ...] = ("diabetes", "digits") if config.data is None else ("uci", "california", "digits")
    jobs: list[TableJob] = []
    notes: list[str] = []
    for source in sources:
        try:
            shifts = shifts_of(config, source)
        except MissingExtraError as error:
            notes.append(f"Left out: {source}, for {error}.")
            console.print(f"tables: {notes[-1]}", markup=False, highlight=False)
            continue
        if source == "digits":
            jobs += [TableJob(config, source, "digits", kind) for kind in DIGITS]
        else:
            jobs += [TableJob(config, source, shift.name, kind) for shift in shifts for kind in REGRESSION]
    rows = carry_out(jobs, work, out, "tables under shift", workers)
    parts: dict[str, list[dict[str, Any]]] = {
        task: [row for row in rows if row["task"] == task] for task in ("regression", "classification")
    }
    for name, task in (("regression", "regression"), ("digits", "classification")):
        if parts[task]:
            write_rows(out / f"{name}.csv", parts[task])
    return [section(config, notes=notes, **parts)], findings(**parts)
