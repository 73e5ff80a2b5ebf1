"""The data doctor for text: what is wrong or odd with prompts and completions, found before it costs a training run.

`diagnose_text` tokenises rows as training would and adds what training does not ask: is the chosen answer simply the
longer one, do prompts leak into the held-out file, do two people contradict each other. A "fault" makes training wrong
or wastes rows, a "warning" wants a look, a "note" is worth knowing. Every finding names a row.
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
from steelyard.data.tokenizer import REPAIRS, Text, Tokenizer, plain, record_of
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
    context: int | None = None,
    held_out: TextData | None = None,
    unreadable: Sequence[DataError] = (),
) -> TextReport:
    """Examine text data.

    Args:
        data: the rows.
        tokenizer: what lengths and masks are judged by.
        context: tokens of a prompt and a completion together; None: not judged.
        held_out: rows for evaluation: no prompt of theirs may be among `data`.
        unreadable: errors of rows that could not be read (`on_error` of `read_text_data`).
    """
    found = _Found()
    seen: dict[str, str] = {}
    preferred: dict[tuple[str, str, str], str] = {}
    keys: dict[str, str] = {}
    for row in data.rows:
        _examine(row, data.kind, found)
        key = prompt_key(row)
        texts = [_normal(completion) for completion in row.completions]
        whole = json.dumps([key, texts, row.pairs, row.labels])
        if seen.setdefault(whole, row.where) != row.where:
            found.add("duplicates", f"{row.where}, equal to {seen[whole]}")
        elif keys.setdefault(key, row.where) != row.where:
            found.add("repeated-prompts", f"{row.where}, as {keys[key]}")
        for chosen, rejected in row.pairs:
            if (key, texts[rejected], texts[chosen]) in preferred and texts[chosen] != texts[rejected]:
                earlier = preferred[key, texts[rejected], texts[chosen]]
                found.add("contradictions", f"{row.where}, against {earlier}")
            preferred.setdefault((key, texts[chosen], texts[rejected]), row.where)

    tokens = encode_rows(data, tokenizer, UNLIMITED, UNLIMITED, "error")
    ends = np.repeat(tokens.prompt_lengths, np.diff(tokens.row_offsets)) + tokens.completion_lengths
    row_of = np.repeat(np.arange(len(tokens)), np.diff(tokens.row_offsets))
    for number in np.flatnonzero(ends > (context or UNLIMITED)):
        if tokens.prompt_lengths[row_of[number]] < (context or UNLIMITED):
            found.add("over-context", tokens.data.rows[row_of[number]].where)
    for number in np.flatnonzero(tokens.prompt_lengths >= (context or UNLIMITED)):
        found.add("fully-truncated", tokens.data.rows[number].where)

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
        leaked = [row for row in held_out.rows if prompt_key(row) in keys]
        if leaked:
            sentence = (
                f"{len(leaked)} of {len(held_out)} held-out rows have a prompt that is also in {data.source}, the "
                f"first at {leaked[0].where} of {held_out.source}"
            )
            findings.append(Finding("leak", "fault", sentence))
    summary = _summary(data, tokens, len(keys))
    findings += _judged(data, summary)
    order = {"fault": 0, "warning": 1, "note": 2}
    findings.sort(key=lambda finding: order[finding.severity])
    return TextReport(tuple(findings), summary, _example(tokens))


def _examine(row: TextRow, kind: Kind, found: _Found) -> None:
    """Add what is wrong with one row by itself."""
    texts = [plain(completion) for completion in row.completions]
    for text in texts:
        if not text.strip():
            found.add("empty-completion", row.where)
    for (chosen, rejected), margin in zip(row.pairs, row.margins(), strict=True):
        if texts[chosen] == texts[rejected]:
            found.add("identical", row.where)
        elif margin == 0:
            found.add("ties", row.where)
        elif margin < 0:
            found.add("negative-margin", row.where)
    contents = [row.prompt] if isinstance(row.prompt, str) else [message["content"] for message in row.prompt]
    if kind != "text" and not any(content.strip() for content in contents):
        found.add("empty-prompt", row.where)
    everything = "".join([*contents, *texts])
    if "\ufffd" in everything:
        found.add("replacement-characters", row.where)
    # category Cc: C0 and C1 controls; line breaks and tabs are what text is made of
    if not everything.isprintable() and any(
        unicodedata.category(letter) == "Cc" and letter not in "\n\r\t" for letter in set(everything)
    ):
        found.add("control-characters", row.where)
    if not isinstance(row.prompt, str):
        roles = [message["role"] for message in row.prompt]
        turns = roles[1:] if roles[0] == "system" else roles
        if "tool" not in turns and turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
            found.add("role-order", f"{row.where} ({', '.join(roles)})")


def _normal(completion: Text) -> str:
    return " ".join(plain(completion).split()).casefold()


def _summary(data: TextData, tokens: TokenizedData, prompts: int) -> TextSummary:
    lengths = tokens.completion_lengths
    columns = {"prompt": tokens.prompt_lengths}
    longer = correlation = desirable = None
    labels = [label for row in tokens.data.rows for label in row.labels or ()]
    if data.kind == "preference":
        bases = tokens.row_offsets
        chosen, rejected = (
            lengths[[bases[number] + pair[side] for number, row in enumerate(tokens.data.rows) for pair in row.pairs]]
            for side in (0, 1)
        )
        columns |= {"chosen": chosen, "rejected": rejected}
        different = int((chosen != rejected).sum())
        longer = _share(int((chosen > rejected).sum()), different)
        margins = np.array([margin for row in tokens.data.rows for margin in row.margins()])
        correlation = _correlation(chosen - rejected, margins)
    elif len(lengths):
        columns["completion"] = lengths
        rewards = [reward for row in tokens.data.rows for reward in row.rewards or ()]
        for values in (rewards, labels):
            if len(values) == len(lengths):
                correlation = correlation or _correlation(lengths, np.array(values))
        if labels:
            desirable = _share(round(sum(labels)), len(labels))
    return TextSummary(
        kind=data.kind,
        rows=len(data),
        prompts=prompts,
        completions=sum(len(row.completions) for row in data.rows),
        pairs=sum(len(row.pairs) for row in data.rows),
        tokenizer=record_of(tokens.tokenizer),
        quantiles={name: np.quantile(values, QUANTILES).tolist() for name, values in columns.items() if len(values)},
        longer_chosen=longer,
        length_correlation=correlation,
        desirable=desirable,
        content_hash=data.content_hash,
    )


def _share(count: int, total: int) -> Share | None:
    """Return count / total with Wilson's interval."""
    if not total:
        return None
    z2 = 1.96**2
    share, widened = count / total, 1 + z2 / total
    centre = (share + z2 / (2 * total)) / widened
    half = math.sqrt(z2 * (share * (1 - share) / total + z2 / (4 * total**2))) / widened
    return Share(share, max(0.0, centre - half), min(1.0, centre + half), total)


def _correlation(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> Share | None:
    """Return Pearson's correlation with Fisher's interval; None where it is not defined."""
    known = np.isfinite(second)
    first, second = first[known].astype(np.float64), second[known].astype(np.float64)
    if len(first) < 4 or first.std() == 0 or second.std() == 0:
        return None
    value = float(np.clip(np.corrcoef(first, second)[0, 1], -1, 1))
    if abs(value) > 1 - 1e-12:
        return Share(value, value, value, len(first))
    centre, half = math.atanh(value), 1.96 / math.sqrt(len(first) - 3)
    return Share(value, math.tanh(centre - half), math.tanh(centre + half), len(first))


def _judged(data: TextData, summary: TextSummary) -> list[Finding]:
    """Return findings about the whole."""
    findings = []
    longer, desirable = summary.longer_chosen, summary.desirable
    if longer is not None and not longer.low <= 0.5 <= longer.high:
        word, share = "longer", longer
        if longer.value < 0.5:
            word, share = "shorter", Share(1 - longer.value, 1 - longer.high, 1 - longer.low, longer.count)
        sentence = (
            f"the chosen completion is the {word} one in a share of {share} of {share.count} pairs; whoever prefers "
            f"the {word} one is right that often"
        )
        findings.append(Finding("length-bias", "warning" if share.value >= BIASED else "note", sentence))
    if desirable is not None and not 1 - ONE_SIDED <= desirable.value <= ONE_SIDED:
        findings.append(
            Finding("label-imbalance", "warning", f"{desirable.value:.1%} of {desirable.count} labels are desirable; "
                    "weigh the rarer ones (KTO's weights)")
        )  # fmt: skip
    rewards = [row.rewards for row in data.rows if row.rewards]
    flat = {reward for row in rewards for reward in row}
    if len(flat) == 1 and len(rewards) > 1:
        findings.append(Finding("constant-reward", "warning", f"every reward is {flat.pop():g}"))
    groups = [row for row in rewards if len(row) > 1]
    level = sum(len(set(row)) == 1 for row in groups)
    if data.kind == "completion" and level:
        findings.append(
            Finding("level-groups", "note", f"{level} of {len(groups)} prompts have equal rewards on all completions, "
                    "which teach a group baseline nothing")
        )  # fmt: skip
    return findings


def _example(tokens: TokenizedData) -> tuple[tuple[str, int, bool], ...]:
    """Return the end of the first prompt and the beginning and end of its first completion, as (text, id, scored)."""
    if not len(tokens):
        return ()
    prompts, mask = tokens.prompts([0])
    prompt = prompts[0][mask[0] > 0].tolist()
    completion = (tokens.completion_ids([0]) or [[]])[0]
    names = {tokens.tokenizer.eos: "EOS", getattr(tokens.tokenizer, "bos", None): "BOS"}

    def named(ids: list[int], scored: bool) -> list[tuple[str, int, bool]]:
        return [(names.get(token) or repr(tokens.tokenizer.decode([token]))[1:-1] or "special", token, scored)
                for token in ids]  # fmt: skip

    parts = [(prompt, 2, 8, False), (completion, 6, 4, True)]
    rows: list[tuple[str, int, bool]] = []
    for ids, head, tail, scored in parts:
        if len(ids) <= head + tail:
            rows += named(ids, scored)
        else:
            gap = (f"... {len(ids) - head - tail} more", -1, scored)
            rows += [*named(ids[:head], scored), gap, *named(ids[-tail:], scored)]
    return tuple(rows)
