"""A report page put together by hand: sections of text, tables, figures and samples, as HTML and as Markdown.

`write_report` (html.py) knows runs of control tasks; a study with other rows builds its page here:

    page = Page("Preference study", "What was found, in one sentence.")
    section = page.section("Bandits")
    section.text("What was done.").table(table).figure(plots.lines(series, frame))
    write_page(page, folder)

Figures come from `plots.lines`, `plots.dots` and `plots.bars` (with intervals), small multiples from
`Section.panels`, texts side by side from `Section.samples`. Everything but a picture's own markup is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from steelyard.report import markdown
from steelyard.report.html import document, render_figure, render_panels, render_table
from steelyard.report.plots import Picture
from steelyard.report.tables import Table

_STYLE = """
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .6rem 1rem;
  margin: .3rem 0 1rem; }
.samples > div { background: var(--tint); border-radius: 4px; padding: .5rem .7rem; font-size: .88rem; }
.samples b { display: block; color: var(--soft); font-size: .8rem; }
.samples p { margin: .2rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { margin: 1rem 0 0; font-size: .92rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Sample:
    """One prompt and what several models, or one before and after, wrote for it.

    Attributes:
        prompt: the prompt.
        texts: (label, completion), side by side; say the reward in the label.
    """

    prompt: str
    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Panels:
    pictures: tuple[Picture, ...]


Part = str | tuple[str, ...] | Table | Picture | _Panels | Sample
"""Of a section: a paragraph, a list of notes, a table, a figure, small multiples, or texts side by side."""


@dataclass
class Section:
    """One heading and what stands below it, in the order of the calls; every method returns the section."""

    heading: str
    parts: list[Part] = field(default_factory=list)

    def text(self, *paragraphs: str) -> Self:
        """Add paragraphs."""
        self.parts += paragraphs
        return self

    def notes(self, notes: Sequence[str]) -> Self:
        """Add a list of short notes; nothing if there are none."""
        if notes:
            self.parts.append(tuple(notes))
        return self

    def table(self, *tables: Table) -> Self:
        """Add tables."""
        self.parts += tables
        return self

    def figure(self, *pictures: Picture) -> Self:
        """Add figures of the text's width, one below the other."""
        self.parts += pictures
        return self

    def panels(self, pictures: Sequence[Picture]) -> Self:
        """Add small multiples: figures drawn with `Frame(small=True)`, side by side."""
        self.parts.append(_Panels(tuple(pictures)))
        return self

    def samples(self, *samples: Sample) -> Self:
        """Add texts side by side."""
        self.parts += samples
        return self


@dataclass
class Page:
    """A title, the result in a sentence or two, and sections.

    Attributes:
        title: heading of the page.
        lead: the result in words.
        sections: in order; `section` adds one.
        footer: where the numbers come from, after "Written by steelyard 0.1.0".
    """

    title: str
    lead: str
    sections: list[Section] = field(default_factory=list)
    footer: str = "from the rows beside this page."

    def section(self, heading: str) -> Section:
        """Begin a section and return it."""
        self.sections.append(Section(heading))
        return self.sections[-1]


def write_page(page: Page, out_dir: Path, name: str = "report") -> Path:
    """Write NAME.html (self-contained, no script) and its twin NAME.md; return the path of the former."""
    out_dir.mkdir(parents=True, exist_ok=True)
    body = "".join(
        f"<h2>{html.escape(section.heading)}</h2>" + "".join(map(_html, section.parts)) for section in page.sections
    )
    path = out_dir / f"{name}.html"
    path.write_text(document(page.title, page.lead, body, page.footer, _STYLE), encoding="utf-8")
    parts = [f"# {markdown.escape(page.title)}", markdown.escape(page.lead)]
    for section in page.sections:
        parts += [f"## {markdown.escape(section.heading)}", *map(_markdown, section.parts)]
    (out_dir / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _html(part: Part) -> str:
    match part:
        case str():
            return f"<p>{html.escape(part)}</p>"
        case Table():
            return render_table(part)
        case Picture():
            return render_figure(part, "curve")
        case _Panels():
            return render_panels(part.pictures)
        case Sample():
            texts = "".join(f"<div><b>{html.escape(a)}</b><p>{html.escape(b)}</p></div>" for a, b in part.texts)
            return f'<p class="prompt">{html.escape(part.prompt)}</p><div class="samples">{texts}</div>'
        case _:
            return f'<ul class="notes">{"".join(f"<li>{html.escape(note)}</li>" for note in part)}</ul>'


def _markdown(part: Part) -> str:
    match part:
        case str():
            return markdown.escape(part)
        case Table():
            return markdown.render_table(part)
        case Picture():
            return f"Figure (in the HTML page): {markdown.escape(part.caption)}"
        case _Panels():
            return "\n\n".join(_markdown(picture) for picture in part.pictures)
        case Sample():
            texts = "\n".join(f"- {markdown.escape(label)}: {markdown.escape(text)}" for label, text in part.texts)
            return f"> {markdown.escape(part.prompt)}\n\n{texts}"
        case _:
            return "\n".join(f"- {markdown.escape(note)}" for note in part)
