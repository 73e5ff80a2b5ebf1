"""What studies of several parts share: one page, and a sentence in place of a part that lacks an extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from steelyard import runtime
from steelyard.config import Config, flatten, plain, to_json
from steelyard.errors import MissingExtraError
from steelyard.recipes.preference_findings import Finding, claims_table, tally
from steelyard.report.page import Page, Section, write_page
from steelyard.report.tables import Table


def write_parts(
    title: str,
    command: str,
    note: str,
    config: Config,
    parts: Sequence[str],
    run_part: Callable[[str], tuple[list[Section], list[Finding]]],
    out: Path,
    console: Console,
) -> Path:
    """Carry out the parts, or go on with them, and write report.html and report.md. Return the former's path.

    Args:
        title: of the page.
        command: that wrote it.
        note: where its numbers come from.
        config: of the study; kept beside the page.
        parts: names, in the order of the page.
        run_part: carries one out.
        out: directory of the page.
        console: for what was left out, the verdicts and the path.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.json").write_text(to_json(config), encoding="utf-8")
    sections: list[Section] = []
    claims: list[Finding] = []
    for part in parts:
        try:
            more, says = run_part(part)
        except MissingExtraError as error:
            console.print(f"{part}: left out: {error}", markup=False, highlight=False)
            more, says = [Section(f"Left out: {part}").text(str(error))], []
        sections += more
        claims += says
    lead = f"Parts on this page: {', '.join(parts)}."
    page = Page(title, f"Of {len(claims)} claims, {tally(claims)}. {lead}" if claims else lead)
    if claims:
        section = page.section("The claims")
        section.notes([f"Does not hold here: {one.claim}" for one in claims if one.verdict == "does not hold"])
        section.table(claims_table(claims))
    page.sections += [*sections, _provenance(command, note, config)]
    path = write_page(page, out)
    for one in claims:
        console.print(f"{one.verdict}: {one.claim}: {one.measured}", markup=False, highlight=False)
    console.print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)
    return path


def _provenance(command: str, note: str, config: Config) -> Section:
    """Return where the numbers come from: files, settings and machine."""
    settings = tuple((key, str(value)) for key, value in flatten(plain(config)).items())
    machine = tuple((key, str(value)) for key, value in flatten(runtime.describe()).items())
    section = Section("Where the numbers come from").text(f"{command}. {note}")
    return section.table(
        Table("Settings", "The whole config of this call.", ("key", "value"), settings),
        Table("Environment", "Where the page was written.", ("key", "value"), machine),
    )
