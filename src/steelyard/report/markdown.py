"""The report as Markdown: the same sentence and tables as the HTML one, without the plots."""

from __future__ import annotations

import html
from collections.abc import Sequence

from steelyard.bench.stats import Estimate
from steelyard.report.tables import Cell, Table


def render(title: str, sentence: str, sections: Sequence[tuple[str, Sequence[str], Sequence[Table]]]) -> str:
    """Return the Markdown text.

    Args:
        title: heading of the report.
        sentence: the result in words.
        sections: (heading or "", notes, tables) in order.
    """
    parts = [f"# {escape(title)}", escape(sentence)]
    for heading, notes, tables in sections:
        if heading:
            parts.append(f"## {escape(heading)}")
        if notes:
            parts.append("\n".join(f"- {escape(note)}" for note in notes))
        parts += [render_table(table) for table in tables]
    return "\n\n".join(parts) + "\n"


def render_table(table: Table) -> str:
    """Return one table with its title and caption."""
    parts = [f"### {escape(table.title)}", escape(table.caption)]
    if table.rows:
        lines = [_line(table.header), "|" + " --- |" * len(table.header), *(_line(row) for row in table.rows)]
        parts.append("\n".join(lines))
    if table.definitions:
        parts.append("\n".join(f"- {escape(word)}: {escape(meaning)}" for word, meaning in table.definitions))
    return "\n\n".join(parts)


def _line(cells: Sequence[Cell]) -> str:
    texts = (escape(cell.text() if isinstance(cell, Estimate) else cell) for cell in cells)
    return "| " + " | ".join(texts) + " |"


def escape(text: str) -> str:
    """Return the text so that it cannot act as Markdown or HTML: labels and messages come from files."""
    text = html.escape(" ".join(text.split()), quote=False).replace("\\", "\\\\")
    for mark in "`*|":
        text = text.replace(mark, "\\" + mark)
    return text.replace("](", "]\\(")  # intervals in brackets stay readable, links and images do not form
