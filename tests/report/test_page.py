"""The page builder: self-contained, escaped, the same words in Markdown."""

from __future__ import annotations

import math

import pytest

from steelyard.bench.stats import Estimate
from steelyard.report.page import Page, Sample, write_page
from steelyard.report.tables import Table

pytest.importorskip("matplotlib")

from steelyard.report import plots
from steelyard.report.plots import Frame, Series

EVIL = "<script>alert(1)</script> $x_{1}$ [a](http://b) | *b*"


def series() -> list[Series]:
    return [
        Series(f"{EVIL} {i}", [0.1 * i, 0.5, math.nan], [0.0, 0.4, 0.1], [0.2, 0.6, 0.9], x=[1, 10, 100])
        for i in range(8)
    ]


@pytest.fixture
def page(tmp_path):
    built = Page(EVIL, EVIL)
    section = built.section(EVIL)
    section.text(EVIL).notes([EVIL]).notes([]).table(Table(EVIL, EVIL, (EVIL,), ((EVIL,), (Estimate(1, 0, 2, 4),))))
    groups = [f"<b> $x_{i}$" for i in range(3)]
    section.figure(plots.lines(series(), Frame("lines", EVIL, EVIL[:5], "reward", log_x=True, level=0.3)))
    section.figure(plots.dots(groups, series(), Frame("dots", EVIL, "reward", ylim=(0, 1), level=0.2)))
    section.panels([plots.bars(groups, series(), Frame("bars", EVIL, "", "n", small=True, legend=False))])
    section.samples(Sample(EVIL, (("before", EVIL), ("after", "one\ntwo"))))
    path = write_page(built, tmp_path / "new" / "folder")
    return path.read_text(encoding="utf-8"), path.with_suffix(".md").read_text(encoding="utf-8")


def test_nothing_on_the_page_acts_or_is_fetched(page):
    html, markdown = page
    assert "<script" not in html
    assert "<script" not in markdown
    assert "http://b" not in html.replace("[a](http://b)", "")  # only as text
    assert 'src="http' not in html
    assert 'href="http' not in html
    assert "](http" not in markdown
    assert "default-src 'none'" in html


def test_both_twins_hold_every_part(page):
    html, markdown = page
    assert html.count("<svg") == 3
    assert html.count("<h2>") == markdown.count("\n## ") == 1
    assert "1.00 <small>[0.00, 2.00]</small>" in html
    assert "1.00 [0.00, 2.00]" in markdown
    assert html.count("alert(1)") >= 9
    assert markdown.count("Figure (in the HTML page)") == 3
    assert "one\ntwo" in html


def test_one_colour_and_line_for_one_method():
    """18 series differ in colour or line; a fixed index keeps its colour whatever its position."""
    looks = {(plots.colour(i), plots._style(i)) for i in range(18)}
    assert len(looks) == 18
    one = plots.lines([Series("a", [1, 2], x=[0, 1], index=4), Series("b", [1, 2], x=[0, 1])], Frame("n", "c"))
    assert plots.colour(4) in one.markup
    assert plots.colour(1) in one.markup
    assert plots.colour(0) not in one.markup


def test_numbers_of_many_sizes_and_either_sign_are_told_apart():
    wide = [Series("a", [-1000.0, 0.0, 1000.0], [-2000, -1, 900], [-500, 1, 1100], x=[0, 1, 2])]
    for picture in (
        plots.dots(["one", "two", "three"], wide, Frame("wide", "c", "nats", symlog=True)),
        plots.lines(wide, Frame("tall", "c", "x", "nats", symlog=True)),
    ):
        assert "-1000" in picture.markup  # plain numbers, no formulas
        assert "-10<" in picture.markup


def test_the_same_figure_twice_is_the_same_text():
    frame = Frame("same", "caption", "x", "y")
    assert plots.lines(series(), frame) == plots.lines(series(), frame)
