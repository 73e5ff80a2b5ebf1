"""One self-contained HTML report: inline style and pictures, no script, no request to anywhere."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steelyard import __version__
from steelyard.bench.rows import Run, read_run
from steelyard.bench.stats import Estimate
from steelyard.errors import DataError
from steelyard.report import markdown, plots
from steelyard.report.numbers import RecipeSummary, summarize
from steelyard.report.plots import Picture
from steelyard.report.summary import notes, sentence
from steelyard.report.tables import (
    Cell,
    Table,
    aggregate_table,
    claim_table,
    provenance_tables,
    read_claim,
    recipe_tables,
)

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5c6670; --line: #d9dee3; --page: #ffffff; --tint: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7eb; --soft: #9aa5b0; --line: #363d45; --page: #14181c; --tint: #1d2329; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.1rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .8rem; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 2rem 0 .3rem; }
p, li { max-width: 46rem; }
.lead { font-size: 1.12rem; }
.caption, figcaption, .notes { color: var(--soft); font-size: .88rem; line-height: 1.45; }
.notes { padding-left: 1.1rem; }
dl { display: grid; grid-template-columns: minmax(6rem, auto) 1fr; gap: .15rem 1rem; max-width: 46rem;
  margin: .8rem 0 0; color: var(--soft); font-size: .85rem; line-height: 1.4; }
dt { font-weight: 600; }
dd { margin: 0; }
@media (max-width: 36rem) { dl { display: block; } dd { margin-bottom: .45rem; } }
.wide { overflow-x: auto; margin: .6rem 0 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .42rem .9rem .42rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); font-size: .82rem; vertical-align: bottom; }
td { min-width: 4.5rem; max-width: 26rem; overflow-wrap: break-word; }
td.number { white-space: nowrap; }
td small { display: block; color: var(--soft); }
figure { margin: 1rem 0; }
figure.curve { overflow-x: auto; }
figure.curve svg { width: 100%; min-width: 22rem; max-width: 44rem; height: auto; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15.5rem), 1fr)); gap: 1rem 1.4rem;
  margin-top: 1.2rem; }
.panels figure { margin: 0; }
.panels svg { width: 100%; max-width: 20rem; height: auto; }
.panels.metrics figcaption { order: -1; }
.panels.metrics figure { display: flex; flex-direction: column; }
svg text { font-family: inherit !important; }
img { max-width: 100%; height: auto; display: block; border-radius: 3px; }
img.moving { margin-top: .6rem; }
.key span { margin-right: 1.2rem; font-size: .9rem; white-space: nowrap; }
.key { margin: .4rem 0; }
.key i { display: inline-block; width: 1.7rem; margin-right: .4rem; vertical-align: .25rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media print { body { max-width: none; } .wide, figure.curve { overflow: visible; } }
"""


def write_report(
    run_dirs: Sequence[Path],
    out_dir: Path,
    title: str,
    claim: dict[str, Any] | None = None,
    reference: str | None = None,
) -> Path:
    """Write report.html and report.md from run directories.

    Args:
        run_dirs: run directories; the first case among them is the reference unless `reference` names one.
        out_dir: where to write; created if needed.
        title: heading of the report.
        claim: {"source": text, "rows": [{"claim", "differs", and "case" + "quantity" (+ "against") or "measured"}]}:
            see `tables.ClaimRow`.
        reference: case that the others are compared with.

    Returns:
        The path of report.html.

    Raises:
        DataError: a run directory is missing, malformed or still running.
        ConfigError: a claim that cannot be read or answered.
        MissingExtraError: matplotlib or pillow is not installed.
    """
    summary = summarize([read_run(path) for path in run_dirs], reference)
    claims = [claim_table(read_claim(claim), summary)] if claim is not None else []
    provenance = provenance_tables(summary, out_dir)
    across = [aggregate_table(summary)] if summary.aggregates else []

    sections: list[tuple[str, Sequence[str], Sequence[Table]]] = []
    if claims or across:
        sections.append(("", (), claims + across))
    body = ["".join(map(render_table, claims + across))]
    for recipe in summary.recipes:
        tables = recipe_tables(recipe)
        heading = recipe.recipe if len(summary.recipes) > 1 else "Results"
        sections.append((heading, notes(recipe), tables))
        body.append(_recipe(heading, recipe, tables))
    sections.append(("Where the numbers come from", (), provenance))
    body.append("<h2>Where the numbers come from</h2>" + "".join(map(render_table, provenance)))

    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "report.md").write_text(markdown.render(title, sentence(summary), sections), encoding="utf-8")
    page = out_dir / "report.html"
    text = document(title, sentence(summary), "".join(body), "from the rows listed above.")
    page.write_text(text, encoding="utf-8")
    return page


def render_table(table: Table) -> str:
    """Return one table as HTML; every cell is escaped."""
    parts = [f"<h3>{html.escape(table.title)}</h3>", f'<p class="caption">{html.escape(table.caption)}</p>']
    if table.rows:
        head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.header)
        rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
        parts.append(
            f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        )
    if table.definitions:
        terms = "".join(f"<dt>{html.escape(word)}</dt><dd>{html.escape(text)}</dd>" for word, text in table.definitions)
        parts.append(f"<dl>{terms}</dl>")
    return "".join(parts)


def _cell(cell: Cell) -> str:
    if isinstance(cell, Estimate):
        value, interval = cell.text().split(" ", 1)
        return f'<td class="number">{html.escape(value)} <small>{html.escape(interval)}</small></td>'
    return f"<td>{html.escape(cell)}</td>"


def document(title: str, lead: str, body: str, footer: str, style: str = "") -> str:
    """Return a whole page around the markup of its body; the other texts are escaped here."""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # the browser itself enforces that nothing is fetched and nothing runs
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head><body>"
        f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>{body}'
        f"<footer>Written by steelyard {html.escape(__version__)} {html.escape(footer)}</footer></body></html>\n"
    )


def _recipe(heading: str, recipe: RecipeSummary, tables: Sequence[Table]) -> str:
    """Return curves, tables, values, episodes and metrics of one recipe."""
    parts = [f"<h2>{html.escape(heading)}</h2>", render_figure(plots.learning_curve(recipe), "curve")]
    cautions = notes(recipe)
    if cautions:
        items = "".join(f"<li>{html.escape(note)}</li>" for note in cautions)
        parts.append(f'<ul class="notes">{items}</ul>')
    parts += map(render_table, tables)
    panels = [
        plots.calibration(case, part, index) for index, case in enumerate(recipe.cases) for part in case.calibration
    ]
    if panels:
        parts.append(render_panels(panels))
    episodes = [picture for case in recipe.cases for picture in _episodes(case.runs)]
    parts.append("<h3>One episode of each case</h3>" + render_panels(episodes))
    pictures, left_out = plots.metrics(recipe.cases)
    if pictures:
        words = "One line per run, thinned to block means; a vertical line marks where fine-tuning begins."
        if left_out:
            words += f" Also in metrics.jsonl: {', '.join(left_out)}."
        parts.append(f'<h3>Training</h3><p class="caption">{html.escape(words)}</p>{plots.legend(recipe.cases)}')
        parts.append(render_panels(pictures, "metrics"))
    return "".join(parts)


def render_figure(picture: Picture, kind: str = "") -> str:
    """Return a picture with its caption as HTML."""
    name = f' class="{kind}"' if kind else ""
    return f"<figure{name}>{picture.markup}<figcaption>{html.escape(picture.caption)}</figcaption></figure>"


def render_panels(pictures: Sequence[Picture], kind: str = "") -> str:
    """Return small pictures side by side as HTML."""
    return f'<div class="panels {kind}">{"".join(map(render_figure, pictures))}</div>'


def _episodes(runs: Sequence[Run]) -> list[Picture]:
    """Return pictures of one episode of a case: frames, or the reason why there are none, and the path."""
    for run in runs:
        label = f"{run.label}, seed {run.seed}"
        pictures = []
        if (run.path / "frames.npz").is_file():
            pictures.append(plots.episode_frames(_read_frames(run.path / "frames.npz"), label))
        elif (run.path / "render_error.txt").is_file():
            reason = (run.path / "render_error.txt").read_text(encoding="utf-8", errors="replace").strip()
            pictures.append(Picture("", f"{label}: not rendered: {reason}"))
        if (run.path / "trajectory.json").is_file():
            pictures.append(plots.maze_path(_read_trajectory(run.path / "trajectory.json"), label))
        if pictures:
            return pictures
    return [Picture("", f"{runs[0].label}: no picture, for no run has a frames.npz or a trajectory.json.")]


def _read_frames(path: Path) -> npt.NDArray[np.uint8]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            frames: npt.NDArray[np.uint8] = archive["frames"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise DataError(f"{path}: expected frames uint8 [F, H, W, 3], found {frames.dtype} {list(frames.shape)}")
    return frames


def _read_trajectory(path: Path) -> dict[str, Any]:
    try:
        trajectory: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        observations = np.asarray(trajectory["observations"], np.float64)
        if observations.ndim != 2 or len(observations) < 1 or observations.shape[1] < 2:
            raise ValueError(f"expected observations [T, at least 2], found {list(observations.shape)}")
        if trajectory["success"] not in (True, False, None):
            raise ValueError("expected success to be true, false or null")
        if trajectory.get("maze") is not None and np.asarray(trajectory["maze"], np.float64).ndim != 2:
            raise ValueError("expected maze to be rows of 0 and 1")
        if trajectory.get("goal") is not None and len(np.asarray(trajectory["goal"], np.float64)) < 2:
            raise ValueError("expected goal [x, y]")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return trajectory
