"""The page of a head set's run: whether its heads differ where users do, and what a few labels of a new user bring."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from steelyard.bench import stats
from steelyard.bench.rows import read_lines
from steelyard.bench.stats import Estimate
from steelyard.errors import DataError, MissingExtraError
from steelyard.report import plots
from steelyard.report.page import Page, write_page
from steelyard.report.plots import Frame, Picture, Series
from steelyard.report.tables import MISSING, Cell, Table
from steelyard.rng import numpy_generator

Rows = list[dict[str, Any]]
METHODS = {
    "single": "single model",
    "uniform": "uniform mean",
    "best": "best head",
    "hyre": "HyRe",
    "gaussian": "Gaussian over heads",
}
CURVES = ("loss/heads", "loss/pooled", "adapt/spread", "grad/heads")


def last_rows(run: Path) -> Rows:
    """Return the rows of the last evaluation."""
    rows = read_lines(run / "eval.jsonl")
    last = max((row["update_step"] for row in rows), default=0)
    return [row for row in rows if row["update_step"] == last]


def estimates(rows: Rows, method: str) -> dict[int, Estimate]:
    """Return {labels: mean over groups with its interval} of a method."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["method"] == method:
            found.setdefault(row["n"], []).append(row["value"])
    return {
        n: stats.mean_estimate(np.array(values), numpy_generator(0, f"report/{method}", n))
        for n, values in sorted(found.items())
    }


def gains(rows: Rows, method: str, over: str) -> dict[int, Estimate]:
    """Return {labels: mean over groups of how much better a method is than another}, paired by group."""
    values = {(row["method"], row["n"], row["episode"]): row["return"] for row in rows}
    found: dict[int, list[float]] = {}
    for (name, n, group), value in sorted(values.items()):
        if name == method and (over, n, group) in values:
            found.setdefault(n, []).append(value - values[over, n, group])
    return {
        n: stats.mean_estimate(np.array(numbers), numpy_generator(0, f"report/{method}/{over}", n))
        for n, numbers in sorted(found.items())
    }


def tables_of(run: Path) -> list[Table]:
    """Return the tables of a run: scores after n labels, gains, diversity."""
    rows, found = last_rows(run), []
    if rows:
        numbers = sorted({row["n"] for row in rows})
        lower = rows[0]["measure"] == "rmse"
        groups = len({row["episode"] for row in rows})
        known = {words: estimates(rows, method) for method, words in METHODS.items()}
        caption = (
            f"{'Root mean squared error (lower is better)' if lower else 'Accuracy'} on examples that were not drawn, "
            f"mean over {groups} held-out groups with its 95% bootstrap interval. Groups with few examples are missing "
            "at many labels. HyRe and the Gaussian have settings that were chosen on other groups."
        )
        found.append(_table("Held-out groups", caption, known, numbers))
        better = {
            f"{METHODS[method]} over {METHODS[over]}": gains(rows, method, over)
            for method in ("hyre", "gaussian")
            for over in ("single", "uniform")
        }
        if any(better.values()):
            caption = f"How much {'lower the error' if lower else 'higher the accuracy'} is, paired by group."
            found.append(_table("Gains", caption, better, [n for n in numbers if n]))
    diversity = _json(run / "diversity.json")
    if diversity:
        cells: list[tuple[Cell, ...]] = [
            (name.replace("_", " "), f"{value:.4g}" if isinstance(value, int | float) else str(value))
            for name, value in diversity.items()
            if name != "sentence" and not isinstance(value, list | dict) and value is not None
        ]
        found.append(
            Table("Diversity of the heads", str(diversity.get("sentence", "")), ("measure", "value"), tuple(cells))
        )
    return found


def _table(title: str, caption: str, columns: dict[str, dict[int, Estimate]], numbers: Sequence[int]) -> Table:
    """Return one row for each number of labels."""
    columns = {words: known for words, known in columns.items() if known}
    cells: list[tuple[Cell, ...]] = [(str(n), *(known.get(n, MISSING) for known in columns.values())) for n in numbers]
    return Table(title, caption, ("labels", *columns), tuple(cells))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        raise DataError(f"{path}: not JSON") from None
    return found


def show(folder: Path, out: Path | None = None) -> None:
    """Print the tables of a run and write its page, into its own directory where `out` is None."""
    console = Console(soft_wrap=True, markup=False, highlight=False)
    for table in tables_of(folder):
        printed = RichTable(*table.header, title=table.title, title_justify="left")
        for row in table.rows:
            printed.add_row(*(cell.text(2) if isinstance(cell, Estimate) else str(cell) for cell in row))
        console.print(printed)
    try:
        console.print(f"report: {write_heads_report(folder, out)}")
    except MissingExtraError as error:  # the run itself is fine
        print(f"run: {folder} (no report page: {error})", file=sys.stderr)


def write_heads_report(run: Path, out: Path | None = None) -> Path:
    """Write report.html and report.md of a head set's run. Return the path of the former.

    Raises:
        MissingExtraError: matplotlib is not installed.
        DataError: a log is damaged.
    """
    config, case = _json(run / "config.json"), _json(run / "case.json")
    rows = last_rows(run)
    page = Page(f"{case['label']}, seed {case['seed']}", lead(run, rows))
    results = page.section("Results")
    results.notes(["One training run: the intervals are over held-out groups and say nothing about other seeds."])
    tables = tables_of(run)
    results.table(*tables)
    figure = curve(rows)
    if figure is not None:
        results.figure(figure)
    chosen = _json(run / "adaptation.json")
    if chosen:
        page.section("How it is adapted").notes(chosen["sentences"])
    pictures = training(run)
    if pictures:
        page.section("Training").text("One value per log point, of one run.").panels(pictures)
    environment = _json(run / "environment.json")
    settings: list[tuple[Cell, ...]] = [("run", run.name), ("config hash", case["config_hash"])]
    settings += [("data hash", str(case["data_hash"])), ("data", str(config["data"]["path"]))]
    settings += [(key, json.dumps(config[key])) for key in ("backbone", "trained", "trunk", "objective", "adaptation")]
    settings += [("steelyard", str(environment.get("steelyard"))), ("commit", str(environment.get("commit")))]
    page.section("Where the numbers come from").table(
        Table("Settings", "config.json has them all.", ("what", "value"), tuple(settings))
    )
    page.footer = "from eval.jsonl, diversity.json, adaptation.json and metrics.jsonl beside this page."
    return write_page(page, out or run)


def lead(run: Path, rows: Rows) -> str:
    """Return the result in words: what the diversity meter says, then what labels brought."""
    words = [str(_json(run / "diversity.json").get("sentence", ""))]
    numbers = sorted({row["n"] for row in rows if row["method"] == "hyre" and row["n"] <= 5})
    if numbers:
        gain = gains(rows, "hyre", "single")[numbers[-1]]
        clear = "" if gain.excludes_zero() else "; the interval holds 0"
        words.append(f"HyRe with {numbers[-1]} labels over the single model: {gain.text(3)}{clear}.")
    else:
        words.append("No held-out group is large enough to adapt to.")
    return " ".join(filter(None, words))


def curve(rows: Rows) -> Picture | None:
    """Return scores over the number of labels, one line for each way of adapting."""
    series = []
    for method, words in METHODS.items():
        known = {n: one for n, one in estimates(rows, method).items() if n}
        if len(known) > 1:
            values = list(known.values())
            low = [one.value if one.low is None else one.low for one in values]
            high = [one.value if one.high is None else one.high for one in values]
            series.append(Series(words, [one.value for one in values], low, high, x=[float(n) for n in known]))
    if not series:
        return None
    label = "error" if rows[0]["measure"] == "rmse" else "accuracy"
    caption = f"{label.capitalize()} on held-out groups after so many labels; bands are 95% over groups."
    return plots.lines(series, Frame("adaptation", caption, "labels", label))


def training(run: Path) -> Sequence[Picture]:
    """Return small curves of the training log."""
    metrics, pictures = read_lines(run / "metrics.jsonl"), []
    for name in CURVES:
        points = [(row["update_step"], row[name]) for row in metrics if row.get(name) is not None]
        if len(points) > 1:
            x, y = plots.thin(*(np.array(column, np.float64) for column in zip(*points, strict=True)))
            frame = Frame(f"training/{name}", name, "updates", name, small=True, legend=False)
            pictures.append(plots.lines([Series(name, y.tolist(), x=x.tolist(), index=0)], frame))
    return pictures
