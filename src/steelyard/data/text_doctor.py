"""The data doctor for text: what is wrong or odd with prompts and completions, found before it costs a training run.

`diagnose_text` reads rows as training would and adds what training does not ask: is the chosen answer simply the longer
one, do prompts leak into the held-out file, do two people contradict each other. A "fault" makes training wrong or wastes
rows, a "warning" wants a look, a "note" is worth knowing. Every finding names a row.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from steelyard.data.doctor import Finding, Severity, print_findings
from steelyard.data.preferences import Kind, TextData, TextRow, TokenizedData, encode_rows, prompt_key
from steelyard.data.tokenizer import REPAIRS, Text, Tokenizer, plain
from steelyard.errors import DataError

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BIASED = 0.6  # share of longer chosen completions from which length alone predicts the label well
ONE_SIDED = 0.8  # share of one label from which labels are unbalanced
UNLIMITED = 1 << 30
SEVERITIES: dict[str, Severity] = {
    "bos_doubled": "fault",
    "eos_inside": "fault",
    "eos_added": "warning",
    "template": "warning",
    "boundary": "note",
    "start_added": "note",
}
"""How bad the repairs of a tokenizer are."""


@dataclass(frozen=True)
class Share:
    """A share or a correlation with its 95 % interval, from `count` cases."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        """Return e.g. "0.62 [0.57, 0.67]"."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class TextSummary:
    """Counts and distributions.

    Attributes:
        kind: kind of the rows.
        rows, prompts, completions, pairs: counts; prompts are different ones.
        tokenizer: its record.
        quantiles: {what: tokens at `QUANTILES`}; completions with their EOS.
        longer_chosen: share of pairs whose chosen completion has more tokens, among those of different length.
        length_correlation: between difference of length and margin (pairs), or length and reward or label.
        desirable: share of desirable labels, in unpaired data.
        content_hash: of the rows.
    """

    kind: Kind
    rows: int
    prompts: int
    completions: int
    pairs: int
    tokenizer: dict[str, Any]
    quantiles: dict[str, list[float]]
    longer_chosen: Share | None
    length_correlation: Share | None
    desirable: Share | None
    content_hash: str


@dataclass(frozen=True)
class TextReport:
    """The doctor's findings, worst first, a summary, and one row as tokens: (text, id, scored)."""

    findings: tuple[Finding, ...]
    summary: TextSummary
    example: tuple[tuple[str, int, bool], ...]

    @property
    def faults(self) -> tuple[Finding, ...]:
        """The findings that make training on this data wrong."""
        return tuple(finding for finding in self.findings if finding.severity == "fault")

    def to_json(self) -> str:
        """Return the report as indented JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False)

    def print(self, console: Console | None = None) -> None:
        """Print findings, token lengths and the example with its mask."""
        console = console or Console()
        print_findings(self.findings, console)
        s = self.summary
        name = s.tokenizer.get("name", "?")
        console.print(
            f"{s.kind} data: {s.rows} rows, {s.prompts} different prompts, {s.completions} completions, {s.pairs} "
            f"pairs; tokens of {escape(str(name))}",
            highlight=False,
        )
        table = Table("tokens", *(f"{q:.0%}" for q in QUANTILES), box=None)
        for what, values in s.quantiles.items():
            table.add_row(what, *(f"{value:.0f}" for value in values))
        console.print(table)
        for words, share in (
            ("share of pairs whose chosen completion is longer", s.longer_chosen),
            ("correlation of length and preference", s.length_correlation),
            ("share of desirable completions", s.desirable),
        ):
            if share is not None:
                console.print(f"{words}: {share} of {share.count}, 95 % interval", markup=False, highlight=False)
        console.print(f"content hash: {s.content_hash}", highlight=False)
        if self.example:
            console.print("one row as tokens; only scored tokens are trained on")
            shown = Table("token", "id", "scored", box=None)
            for text, token, scored in self.example:
                shown.add_row(escape(text), str(token) if token >= 0 else "", "yes" if scored else "")
            console.print(shown)


class _Found:
    """Counts findings by code and remembers the first place of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, code: str, where: str) -> None:
        self.counts[code] += 1
        self.first.setdefault(code, where)


_ROW_FINDINGS: dict[str, tuple[Severity, str]] = {
    "identical": ("fault", "pairs have the same chosen and rejected completion"),
    "empty-completion": ("fault", "completions are empty or blank"),
    "role-order": ("warning", "conversations do not alternate user and assistant after an optional system message"),
    "control-characters": ("warning", "texts hold control characters, which no reader sees and a tokenizer does"),
    "replacement-characters": ("warning", "texts hold U+FFFD, the mark of an earlier decoding error"),
    "empty-prompt": ("warning", "prompts are empty or blank"),
    "ties": ("warning", "pairs are ties (equal scores); training drops them"),
    "negative-margin": ("warning", "pairs score the rejected completion higher"),
    "contradictions": ("warning", "pairs prefer what an earlier pair rejects"),
    "duplicates": ("warning", "rows repeat an earlier one up to case and blanks"),
    "repeated-prompts": ("note", "rows have the prompt of an earlier one up to case and blanks"),
    "over-context": ("warning", "completions end beyond the context; what lies beyond is cut, and EOS with it"),
    "fully-truncated": ("fault", "prompts fill the context, so that nothing of a completion is left"),
}


def diagnose_text(
    data: TextData,
    tokenizer: Tokenizer,
    context: int = 1024,
    held_out: TextData | None = None,
    unreadable: Sequence[DataError] = (),
) -> TextReport:
    """Examine text data.

    Args:
        data: the rows.
        tokenizer: what lengths and masks are judged by.
        context: tokens of a prompt and a completion together.
        held_out: rows for evaluation: no prompt of theirs may be among `data`.
        unreadable: errors of rows that could not be read (`on_error` of `read_text_data`).
    """
    found = _Found()
    seen: dict[str, str] = {}
    preferred: dict[tuple[str, str, str], str] = {}
    prompts: dict[str, str] = {}
    for row in data.rows:
        _examine(row, data.kind, found)
        key = prompt_key(row)
        texts = [_normal(completion) for completion in row.completions]
        whole = json.dumps([key, texts, row.pairs, row.labels])
        if seen.setdefault(whole, row.where) != row.where:
            found.add("duplicates", f"{row.where}, equal to {seen[whole]}")
        elif data.kind != "text" and prompts.setdefault(key, row.where) != row.where:
            found.add("repeated-prompts", f"{row.where}, as {prompts[key]}")
        for chosen, rejected in row.pairs:
            if (key, texts[rejected], texts[chosen]) in preferred and texts[chosen] != texts[rejected]:
                earlier = preferred[key, texts[rejected], texts[chosen]]
                found.add("contradictions", f"{row.where}, against {earlier}")
            preferred.setdefault((key, texts[chosen], texts[rejected]), row.where)

    tokens = encode_rows(data, tokenizer, UNLIMITED, UNLIMITED, "error")
    ends = np.repeat(tokens.prompt_lengths, np.diff(tokens.row_offsets)) + tokens.completion_lengths
    row_of = np.repeat(np.arange(len(tokens)), np.diff(tokens.row_offsets))
    for number in np.flatnonzero(ends > context):
        row = tokens.data.rows[row_of[number]]
        full = tokens.prompt_lengths[row_of[number]] >= context
        found.add("fully-truncated" if full else "over-context", row.where)

    findings = [
        Finding(code, severity, f"{found.counts[code]} {words}, the first at {found.first[code]}"
                + (f" (context {context} tokens)" if code in ("over-context", "fully-truncated") else ""))
        for code, (severity, words) in _ROW_FINDINGS.items()
        if found.counts[code]
    ]  # fmt: skip
    findings += [
        Finding(code.replace("_", "-"), SEVERITIES[code], f"{count} {REPAIRS[code]}")
        for code, count in tokens.report.repairs.items()
        if count
    ]
    if unreadable:
        findings.append(
            Finding("unreadable", "fault", f"{len(unreadable)} rows cannot be read, the first: {unreadable[0]}")
        )
    findings += [Finding("left-out", "warning", note) for note in data.notes]
    if held_out is not None:
        leaked = [row for row in held_out.rows if prompt_key(row) in prompts or data.kind == "text"
                  and prompt_key(row) in {prompt_key(other) for other in data.rows}]  # fmt: skip
        if leaked:
            findings.append(
                Finding("leak", "fault", f"{len(leaked)} of {len(held_out)} held-out rows have a prompt that is also in "
                        f"{data.source}, the first at {leaked[0].where} of {held_out.source}")
            )  # fmt: skip
    summary = _summary(data, tokens, prompts)
    findings += _judged(data, summary)
    order = {"fault": 0, "warning": 1, "note": 2}
    findings.sort(key=lambda finding: order[finding.severity])
    return TextReport(tuple(findings), summary, _example(tokens))
