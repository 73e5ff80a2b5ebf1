"""Plots of a report as inline SVG or PNG text; matplotlib only here, never its global state.

Text and axes are drawn in one marker colour that becomes `currentColor`, so the page's stylesheet decides and light
and dark pages both work. Colours of cases are those of Okabe and Ito, which colour-blind readers can tell apart; line
styles differ too. Names of cases never pass through matplotlib, which would read some of them as formulas.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from steelyard.bench.rows import Floats, Phase
from steelyard.errors import require
from steelyard.report.numbers import CalibrationSummary, CaseSummary, RecipeSummary

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = {"-": "solid", "--": "dashed", ":": "dotted"}  # of matplotlib and of the stylesheet
INK = "#010203"  # replaced by currentColor
POINTS = 200  # a metric's curve is thinned to block means of at most this many points
PANELS = 12


@dataclass(frozen=True)
class Picture:
    """Markup of one picture with the words that replace it for those who cannot see it."""

    markup: str
    caption: str


def colour(index: int) -> str:
    """Return the colour of the case with this position."""
    return COLOURS[index % len(COLOURS)]


def _style(index: int) -> str:
    return list(STYLES)[(index + index // len(COLOURS)) % len(STYLES)]  # no pair of colour and style comes twice in 18


def learning_curve(recipe: RecipeSummary) -> Picture:
    """Plot score against environment steps, offline training left of zero; thin lines are runs, bands are 95%."""
    order: tuple[Phase, Phase] = ("offline", "online")
    phases = [phase for phase in order if any(phase in case.curves for case in recipe.cases)]
    figure = _figure(5.6, 3.2)
    widths = [1.0, 2.2] if len(phases) == 2 else [1.0]
    axes = figure.subplots(1, len(phases), sharey=True, squeeze=False, width_ratios=widths)[0]
    for phase, axis in zip(phases, axes, strict=True):
        for index, case in enumerate(recipe.cases):
            if phase in case.curves:
                _curve(axis, case, phase, index)
        _dress(axis, "offline updates" if phase == "offline" else "online environment steps", "")
        _short_ticks(axis)
    axes[0].set_ylabel(f"mean {recipe.metric} (0 to 1)")
    lows = [curve.runs.min() for case in recipe.cases for curve in case.curves.values()]
    highs = [curve.runs.max() for case in recipe.cases for curve in case.curves.values()]
    axes[0].set_ylim(min(-0.03, min(lows) - 0.03), max(1.03, max(highs) + 0.03))
    if len(phases) == 2:
        axes[1].tick_params(left=False)
        axes[1].axvline(0, color=INK, linewidth=0.8, alpha=0.5)
    words = "; ".join(
        f"{case.label} from {case.estimates['before'].text()} to {case.estimates['after'].text()}"
        if "before" in case.estimates
        else f"{case.label} ends at {case.estimates['after'].text()}"
        for case in recipe.cases
    )
    caption = (
        f"Evaluation {recipe.metric}: mean over runs with its pointwise 95% bootstrap band; thin lines are runs. "
        "A cross marks where a failed run stopped (score 0 from there)."
    )
    return Picture(legend(recipe.cases) + _svg(figure, f"curve/{recipe.recipe}", f"Learning curves. {words}."), caption)


def _curve(axis: Any, case: CaseSummary, phase: Phase, index: int) -> None:
    curve, tone = case.curves[phase], colour(index)
    if len(curve.runs) > 1:
        axis.fill_between(curve.step, curve.low, curve.high, color=tone, alpha=0.18, linewidth=0)
        axis.plot(curve.step, curve.runs.T, color=tone, alpha=0.3, linewidth=0.8)
    marker = "o" if len(curve.step) == 1 else ""
    axis.plot(
        curve.step,
        curve.runs.mean(0),
        _style(index),
        color=tone,
        linewidth=2,
        marker=marker,
    )
    for run, scores, reached in zip(case.runs, curve.runs, curve.reached, strict=True):
        stopped = np.flatnonzero(curve.step > reached)
        if run.status == "failed" and len(stopped):
            axis.plot(curve.step[stopped[0]], scores[stopped[0]], "x", color=tone, markersize=7, markeredgewidth=2)


def calibration(case: CaseSummary, part: CalibrationSummary, index: int) -> Picture:
    """Plot Q against the Monte-Carlo return-to-go, with the diagonal where both agree."""
    figure = _figure(3.2, 3.0)
    axis = figure.subplots()
    both = np.concatenate([part.q, part.returns_to_go])
    margin = 0.05 * (np.ptp(both) or 1.0)
    limits = (both.min() - margin, both.max() + margin)
    axis.plot(limits, limits, color=INK, linewidth=0.8, alpha=0.6)
    axis.plot(
        part.returns_to_go,
        part.q,
        "o",
        color=colour(index),
        markersize=3,
        markeredgewidth=0,
        alpha=0.35,
        rasterized=True,
    )
    axis.set(xlim=limits, ylim=limits)
    _dress(axis, "return-to-go G (reward units)", "Q (reward units)")
    words = f"bias {part.bias.text()}, share of Q below G {part.below.text()}"
    caption = f"{case.label}, after the {part.phase} phase: {words}."
    label = f"Scatter of {part.samples} learned values against returns, {caption}"
    return Picture(_svg(figure, f"calibration/{case.case}/{part.phase}", label), caption)


def metrics(cases: Sequence[CaseSummary]) -> tuple[list[Picture], list[str]]:
    """Plot the most telling training metrics as small multiples; also return the names left out."""
    names = sorted({name for case in cases for run in case.runs for name in run.metrics}, key=_telling)
    firsts = (case.runs[0].evaluations for case in cases)
    beginnings = sorted({int(rows.update_step[rows.online].min()) for rows in firsts if rows.online.any()})
    pictures = []
    for name in names[:PANELS]:
        figure = _figure(2.9, 1.9)
        axis = figure.subplots()
        for index, case in enumerate(cases):
            for run in case.runs:
                if name in run.metrics:
                    series = run.metrics[name]
                    x, y = thin(series.update_step.astype(np.float64), series.value)
                    axis.plot(x, y, _style(index), color=colour(index), linewidth=1, alpha=0.75)
        for begin in beginnings:
            axis.axvline(begin, color=INK, linewidth=0.8, alpha=0.5)
        _dress(axis, "updates", "")
        _short_ticks(axis)
        pictures.append(Picture(_svg(figure, f"metric/{name}", f"{name} against updates, one line a run"), name))
    return pictures, names[PANELS:]


def _telling(name: str) -> tuple[int, str]:
    """Order metrics: losses and values first, then multipliers and temperature, then the rest by name."""
    patterns = (r"^loss/(td|.*critic)", r"^critic/q", "cql", "^loss/", "temperature|entropy", "^(critic|actor)/")
    rank = next((i for i, pattern in enumerate(patterns) if re.search(pattern, name)), len(patterns))
    if name.startswith(("time/", "eval/")):
        rank = len(patterns) + 1
    return rank, name


def thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return means of equal blocks, at most `POINTS` of them: averaging keeps what picking points would lose."""
    if len(x) <= POINTS:
        return x, y
    blocks = np.array_split(np.arange(len(x)), POINTS)
    return np.array([x[b].mean() for b in blocks]), np.array([y[b].mean() for b in blocks])


class Labelled(Protocol):
    """What has a name in a legend."""

    @property
    def label(self) -> str:
        """The name."""
        ...


def legend(cases: Sequence[Labelled], indices: Sequence[int] | None = None) -> str:
    """Return the key of colours and line styles as markup; `indices` are the cases' colours, by default in order."""
    spans = (
        f'<span><i style="border-top:3px {STYLES[_style(index)]} {colour(index)}"></i>{html.escape(case.label)}</span>'
        for index, case in zip(indices or range(len(cases)), cases, strict=True)
    )
    return f'<p class="key">{"".join(spans)}</p>'


@dataclass(frozen=True)
class Series:
    """One line, or one set of dots or bars, of a plot.

    Attributes:
        label: for the legend.
        y: values [P]; NaN leaves a gap.
        low: lower ends of their intervals [P], or None.
        high: upper ends.
        x: where they stand [P]; None in `dots` and `bars`, where the groups say so.
        index: of its colour and line style; None: its position. Give it to keep one colour for one method on a page.
    """

    label: str
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    x: Sequence[float] | None = None
    index: int | None = None


@dataclass(frozen=True)
class Frame:
    """What a plot says besides its series.

    Attributes:
        name: unique on the page.
        caption: printed below; says what the bands are.
        xlabel: with its unit.
        ylabel: with its unit.
        log_x: logarithmic axis.
        ylim: limits of the y axis (of the value axis in `dots`); None: from the data.
        level: a horizontal line (in `dots` a vertical one) drawn for comparison, for example at the start's reward.
        symlog: values on a logarithmic axis beyond -1 and 1, for numbers of either sign and many sizes.
        small: for a panel among others, rather than the width of the text.
        legend: draw the key above; off in panels that share one.
    """

    name: str
    caption: str
    xlabel: str = ""
    ylabel: str = ""
    log_x: bool = False
    ylim: tuple[float, float] | None = None
    level: float | None = None
    symlog: bool = False
    small: bool = False
    legend: bool = True


def lines(series: Sequence[Series], frame: Frame) -> Picture:
    """Plot lines with their bands; a series of one point shows as a dot."""
    figure = _figure(*((3.2, 2.4) if frame.small else (5.6, 3.2)))
    axis = figure.subplots()
    for position, one in enumerate(series):
        assert one.x is not None
        index = position if one.index is None else one.index
        if one.low is not None and one.high is not None:
            axis.fill_between(one.x, one.low, one.high, color=colour(index), alpha=0.16, linewidth=0)
        few = len(one.x) <= 12
        axis.plot(
            one.x, one.y, _style(index), color=colour(index), linewidth=1.8, marker="o" if few else "", markersize=4
        )
    if frame.level is not None:
        axis.axhline(frame.level, color=INK, linewidth=0.8, alpha=0.5)
    _dress(axis, frame.xlabel, frame.ylabel)
    if frame.symlog:
        _symlog(axis, "y")
    if frame.log_x:
        ticks = sorted({float(x) for one in series for x in one.x or ()})
        axis.set_xscale("log")
        if len(ticks) <= 10:
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        else:
            ticker = require("matplotlib.ticker", "report")
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
        axis.minorticks_off()
    if frame.ylim is not None:
        axis.set_ylim(*frame.ylim)
    return _finished(figure, series, frame)


def dots(groups: Sequence[str], series: Sequence[Series], frame: Frame) -> Picture:
    """Plot one row a group, the first on top, with a dot and its interval for each series."""
    figure = _figure(3.2 if frame.small else 5.6, 0.8 + len(groups) * max(0.26, 0.13 * len(series)))
    axis = figure.subplots()
    for position, one in enumerate(series):
        index = position if one.index is None else one.index
        rows = np.arange(len(groups)) + 0.6 * ((position + 0.5) / len(series) - 0.5)
        if one.low is not None and one.high is not None:
            axis.hlines(rows, one.low, one.high, color=colour(index), linewidth=2, alpha=0.55)
        axis.plot(one.y, rows, "osD^vP"[index % 6], color=colour(index), markersize=5)
    if frame.level is not None:
        axis.axvline(frame.level, color=INK, linewidth=0.8, alpha=0.5)
    _dress(axis, frame.xlabel, frame.ylabel)
    if frame.symlog:
        _symlog(axis, "x")
    axis.set_yticks(range(len(groups)), groups, parse_math=False)
    axis.set_ylim(len(groups) - 0.4, -0.6)
    if frame.ylim is not None:
        axis.set_xlim(*frame.ylim)
    return _finished(figure, series, frame)


def bars(groups: Sequence[str], series: Sequence[Series], frame: Frame) -> Picture:
    """Plot bars side by side, one group of them a position, with their intervals."""
    figure = _figure(*((3.2, 2.4) if frame.small else (5.6, 3.2)))
    axis = figure.subplots()
    width = 0.8 / len(series)
    for position, one in enumerate(series):
        index = position if one.index is None else one.index
        places = np.arange(len(groups)) + width * (position + 0.5) - 0.4
        axis.bar(places, one.y, width, color=colour(index), alpha=0.75)
        if one.low is not None and one.high is not None:
            axis.vlines(places, one.low, one.high, color=INK, linewidth=1)
    if frame.level is not None:
        axis.axhline(frame.level, color=INK, linewidth=0.8, alpha=0.5)
    _dress(axis, frame.xlabel, frame.ylabel)
    shown = range(0, len(groups), max(1, len(groups) // 12))
    axis.set_xticks(list(shown), [groups[i] for i in shown], parse_math=False)
    if frame.ylim is not None:
        axis.set_ylim(*frame.ylim)
    return _finished(figure, series, frame)


def scatter(labels: Sequence[str], x: Sequence[float], y: Sequence[float], frame: Frame) -> Picture:
    """Plot one numbered dot a label; the key names the numbers, so that names never collide in the picture."""
    figure = _figure(5.6, 3.4)
    axis = figure.subplots()
    axis.plot(x, y, "o", color=colour(0), markersize=6, alpha=0.8)
    for number, place in enumerate(zip(x, y, strict=True), 1):
        axis.annotate(str(number), place, (5, 4), textcoords="offset points", color=INK, fontsize=8)
    if frame.level is not None:
        axis.axhline(frame.level, color=INK, linewidth=0.8, alpha=0.5)
    _dress(axis, frame.xlabel, frame.ylabel)
    if frame.ylim is not None:
        axis.set_ylim(*frame.ylim)
    named = " ".join(f"<span>{number} {html.escape(label)}</span>" for number, label in enumerate(labels, 1))
    return Picture(f'<p class="key">{named}</p>' + _svg(figure, frame.name, frame.caption), frame.caption)


def _symlog(axis: Any, which: str) -> None:
    """Make one axis logarithmic beyond -1 and 1, with plain numbers at its ticks."""
    scale, of_axis = (axis.set_xscale, axis.xaxis) if which == "x" else (axis.set_yscale, axis.yaxis)
    scale("symlog", linthresh=1)
    of_axis.set_major_formatter(require("matplotlib.ticker", "report").FuncFormatter(lambda x, _: f"{x:g}"))


def _finished(figure: Any, series: Sequence[Series], frame: Frame) -> Picture:
    """Return the picture with its key; the last value of each series is its alternative text."""
    indices = [position if one.index is None else one.index for position, one in enumerate(series)]
    words = "; ".join(f"{one.label}: {one.y[-1]:.3g}" for one in series if len(one.y))
    label = f"{frame.ylabel or frame.xlabel} of {words}" if len(words) < 400 else frame.caption
    named = len(series) > 1 or series[0].x is not None  # one set of dots or bars is named by its axis
    key = legend(series, indices) if frame.legend and named else ""
    return Picture(key + _svg(figure, frame.name, label), frame.caption)


def maze_path(trajectory: dict[str, Any], label: str) -> Picture:
    """Draw the path of one episode from above.

    The maze is centred on the origin, its first row has the largest y, one cell is `cell_size` wide (the convention of
    the Gymnasium point and ant mazes); positions are the first two observation entries. Without a maze these two need
    not be positions, and the picture says no more than it knows.

    Args:
        trajectory: checked content of trajectory.json.
        label: whose episode it is.
    """
    path = np.asarray(trajectory["observations"], np.float64)[:, :2]
    figure = _figure(3.6, 3.4)
    axis = figure.subplots()
    walls = trajectory.get("maze")
    if walls is not None:
        grid = np.asarray(walls)
        size = float(trajectory.get("cell_size", 1.0))
        half_y, half_x = grid.shape[0] * size / 2, grid.shape[1] * size / 2
        rectangle = require("matplotlib.patches", "report").Rectangle
        for row, column in np.argwhere(grid == 1):
            corner = (column * size - half_x, half_y - (row + 1) * size)
            axis.add_patch(rectangle(corner, size, size, color=INK, alpha=0.25, linewidth=0))
        axis.set(xlim=(-half_x, half_x), ylim=(-half_y, half_y))
    axis.plot(path[:, 0], path[:, 1], color=COLOURS[0], linewidth=1.5)
    axis.plot(*path[0], "o", color=COLOURS[2], markersize=7, label="start")
    axis.plot(*path[-1], "s", color=COLOURS[0], markersize=6, label="end")
    if trajectory.get("goal") is not None:
        axis.plot(*trajectory["goal"][:2], "*", color=COLOURS[1], markersize=12, label="goal")
    if walls is not None:
        axis.set_aspect("equal")
    names = ("x (length units of the task)", "y") if walls is not None else ("observation 0", "observation 1")
    _dress(axis, *names)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, labelcolor=INK, fontsize=9)
    outcome = {True: "succeeds", False: "fails"}.get(trajectory["success"], "ends")
    view = "seen from above" if walls is not None else "its first two observation entries"
    words = f"{label}: one evaluation episode of {len(path) - 1} steps, {view}; it {outcome}."
    return Picture(_svg(figure, f"path/{label}", words), words)


def episode_frames(frames: npt.NDArray[np.uint8], label: str) -> Picture:
    """Embed a rendered episode: a strip of six frames and an animation, which stands still for reduced-motion readers.

    Args:
        frames: uint8 [F, H, W, 3].
        label: whose episode it is.
    """
    image = require("PIL.Image", "report")
    count, height, width, _ = frames.shape
    scale = min(1.0, 240 / width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))

    def shrunk(indices: npt.NDArray[np.int64]) -> list[Any]:
        return [image.fromarray(frames[i]).resize(size) for i in indices]

    moments = np.unique(np.linspace(0, count - 1, 6).round().astype(np.int64))
    strip = image.new("RGB", (size[0] * len(moments), size[1]))
    for position, frame in enumerate(shrunk(moments)):
        strip.paste(frame, (position * size[0], 0))
    still = io.BytesIO()
    strip.save(still, "PNG", optimize=True)

    played = shrunk(np.unique(np.linspace(0, count - 1, min(count, 60)).round().astype(np.int64)))
    first, moving = io.BytesIO(), io.BytesIO()
    played[0].save(first, "PNG", optimize=True)
    played[0].save(moving, "GIF", save_all=True, append_images=played[1:], duration=80, loop=0)
    words = html.escape(f"{label}: {count} frames of one evaluation episode")
    markup = (
        f'<img class="strip" alt="{words}, {len(moments)} of them side by side" src="{_data(still, "png")}">'
        f'<picture><source media="(prefers-reduced-motion: reduce)" srcset="{_data(first, "png")}">'
        f'<img class="moving" alt="{words}, animated" src="{_data(moving, "gif")}"></picture>'
    )
    return Picture(markup, f"{label}: one evaluation episode, {count} frames.")


def _data(buffer: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(width: float, height: float) -> Any:
    """Return an empty figure; sizes in inches of 72 SVG points."""
    return require("matplotlib.figure", "report").Figure(figsize=(width, height), layout="constrained")


def _dress(axis: Any, xlabel: str, ylabel: str) -> None:
    axis.set_xlabel(xlabel, color=INK)
    axis.set_ylabel(ylabel, color=INK)
    axis.tick_params(colors=INK, labelsize=9)
    axis.yaxis.label.set_color(INK)
    axis.grid(True, color=INK, alpha=0.12, linewidth=0.6)
    axis.patch.set_alpha(0)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
        spine.set_alpha(0.5)


def _short_ticks(axis: Any) -> None:
    """Write 20k instead of 20000."""
    ticker = require("matplotlib.ticker", "report")
    axis.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
    axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))


def _svg(figure: Any, name: str, alt: str) -> str:
    """Return the figure as an inline SVG element with alternative text and without foreign references."""
    matplotlib = require("matplotlib", "report")
    buffer = io.StringIO()
    # a salt per figure keeps ids of several figures on one page apart and the output reproducible
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, dpi=150)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = text.replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1).strip()
