"""`steelyard report RUN... [--out DIR] [--title TEXT] [--reference CASE]`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from steelyard.bench.rows import find_runs, read_lines, read_run
from steelyard.errors import ConfigError, MissingExtraError, SteelyardError
from steelyard.report import heads
from steelyard.report.html import write_report
from steelyard.report.numbers import summarize
from steelyard.report.summary import terminal_table
from steelyard.workflows.common import kind_of_run


@dataclass(frozen=True)
class ReportArguments:
    """Write report.html and report.md from run directories, and print the result table."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories, or directories that contain some."""
    out: Path | None = None
    """Where to write; default: the directory given, if there is one only."""
    title: str | None = None
    """Heading; default: the recipes and their cases."""
    reference: str | None = None
    """The case that others are compared with; default: the first one found."""


def main(argv: list[str]) -> int:
    """Run the command; return the exit status (2 after an error, which goes to stderr as one sentence)."""
    try:
        arguments = tyro.cli(ReportArguments, prog="steelyard report", args=argv)
    except SystemExit as stop:  # tyro has printed help or the usage error
        return stop.code if isinstance(stop.code, int) else 2
    try:
        report(arguments)
    except SteelyardError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def show(folder: Path) -> None:
    """Report on one finished run, or say where it is if it was not evaluated or has no scores."""
    scores = [row["score"] for row in read_lines(folder / "eval.jsonl")]
    if scores and None not in scores:
        try:
            report(ReportArguments((folder,)))
        except MissingExtraError as error:  # the run itself is fine
            print(f"no report page: {error}", file=sys.stderr)
    else:
        reason = "no success rule and no --evaluation.score-range" if scores else "no environment to evaluate in"
        Console().print(f"run: {folder} (no report: {reason})", markup=False, highlight=False, soft_wrap=True)


def report(arguments: ReportArguments) -> None:
    """Find the runs, write the report and print its table."""
    if not arguments.runs:
        raise ConfigError("no run directory given; usage: steelyard report RUN... [--out DIR]")
    if arguments.out is None and len(arguments.runs) > 1:
        raise ConfigError("several directories given: say where the report goes with --out DIR")
    paths = [path for given in arguments.runs for path in find_runs(given)]
    if len(paths) == 1 and kind_of_run(paths[0]) == "hyre":
        heads.show(paths[0], arguments.out)
        return
    summary = summarize([read_run(path) for path in paths], arguments.reference)
    names = [f"{recipe.recipe} ({', '.join(case.label for case in recipe.cases)})" for recipe in summary.recipes]
    title = arguments.title if arguments.title is not None else "; ".join(names)
    console = Console()
    console.print(terminal_table(summary))
    page = write_report(paths, arguments.out or arguments.runs[0], title, reference=arguments.reference)
    console.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)
