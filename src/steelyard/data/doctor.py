"""The data doctor: what is wrong or odd with a data set, found before it costs a training run.

`diagnose` streams over the store in chunks of whole episodes (bounded memory). Its findings are "fault" (training on
this is wrong), "warning" (look before you train) and "note" (worth knowing). Every finding names where it was found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from steelyard.data.episode import Array, ArraySpec
from steelyard.data.store import Store

Severity = Literal["fault", "warning", "note"]
Floats = npt.NDArray[np.float64]

CHUNK_ROWS = 1 << 15
CHUNK_BYTES = 1 << 24
SAMPLE_ROWS = 1 << 14
NEAR_CONSTANT = 1e-3  # the floor of `Normalizer.fit`
EXPLODING = 50.0  # largest value against the 99 % quantile ...
LARGE = 100.0  # ... or against 1, whichever is larger
TELEPORT = 8.0  # length of a step against the 95 % quantile of all steps ...
TELEPORT_MIN = 0.25  # ... and at least this, in standard deviations (root mean square over dimensions)
MOVING = 0.05  # share of steps in which a dimension must change to be judged for teleports: goals and flags do not
NEARLY_ALL = 0.2  # share of actions beyond [-1, 1] up to which [-1, 1] still looks like the bounds
MAX_DIMENSIONS = 256  # larger arrays are images: checked for NaN and repetition only


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        code: short name of the kind of finding, stable for scripts.
        severity: "fault", "warning" or "note".
        sentence: what and where.
    """

    code: str
    severity: Severity
    sentence: str


@dataclass(frozen=True)
class Summary:
    """Counts and distributions. Quantiles are (minimum, 25 %, median, 75 %, maximum).

    Attributes:
        num_episodes, num_steps: E and N.
        num_terminated, num_truncated: episodes that ended so.
        lengths, returns: quantiles over episodes.
        length_edges, length_counts: histogram of the lengths.
        positive_share: share of episodes with any reward above 0.
        repeated_share: share of steps whose next observation is identical.
    """

    num_episodes: int
    num_steps: int
    num_terminated: int
    num_truncated: int
    lengths: tuple[float, ...]
    returns: tuple[float, ...]
    length_edges: tuple[float, ...]
    length_counts: tuple[int, ...]
    positive_share: float
    repeated_share: float


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print findings as a table, and how many of each severity there are."""
    table = Table(show_header=True, header_style="bold")
    for column in ("severity", "code", "finding"):
        table.add_column(column, overflow="fold")
    colour = {"fault": "red", "warning": "yellow", "note": "cyan"}
    for finding in findings:
        table.add_row(f"[{colour[finding.severity]}]{finding.severity}[/]", finding.code, _plain(finding.sentence))
    if findings:
        console.print(table)
    counts = {s: sum(f.severity == s for f in findings) for s in ("fault", "warning", "note")}
    console.print(", ".join(f"{count} {name}{'s' if count != 1 else ''}" for name, count in counts.items()))


@dataclass(frozen=True)
class Report:
    """The doctor's findings, worst first, and a summary."""

    findings: tuple[Finding, ...]
    summary: Summary

    @property
    def faults(self) -> tuple[Finding, ...]:
        """The findings that make training on this data wrong."""
        return tuple(finding for finding in self.findings if finding.severity == "fault")

    def to_json(self) -> str:
        """Return the report as indented JSON; a value that is not finite becomes null."""
        plain = asdict(self)
        for key in ("returns", "lengths"):
            plain["summary"][key] = [x if np.isfinite(x) else None for x in plain["summary"][key]]
        return json.dumps(plain, indent=2, allow_nan=False)

    def print(self, console: Console | None = None) -> None:
        """Print a table of findings, quantiles and a histogram of lengths."""
        console = console or Console()
        print_findings(self.findings, console)
        s = self.summary
        console.print(
            f"{s.num_episodes} episodes, {s.num_steps} steps; {s.num_terminated} terminated, "
            f"{s.num_truncated} truncated; {s.positive_share:.1%} of the episodes have a positive reward"
        )
        for name, values in (("length", s.lengths), ("return", s.returns)):
            console.print(f"{name}: minimum, quartiles, maximum = " + ", ".join(f"{value:.6g}" for value in values))
        console.print("lengths")
        most = max(s.length_counts)
        for low, high, count in zip(s.length_edges, s.length_edges[1:], s.length_counts, strict=False):
            console.print(f"{low:>9.0f} to {high:<9.0f} {'█' * round(30 * count / most)} {count}", highlight=False)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


@dataclass(frozen=True)
class _Chunk:
    """Whole episodes `first` ... `last` - 1, as rows of the store's records."""

    first: int
    last: int
    row: int
    records: npt.NDArray[np.void]
    is_last: npt.NDArray[np.bool_]
    """[rows], true at the record after an episode's last action."""
    episode_of: npt.NDArray[np.int64]
    """[rows]."""
    step_of: npt.NDArray[np.int64]
    """[rows], step within the episode."""

    def where(self, row: int) -> str:
        return f"episode {self.episode_of[row]}, step {self.step_of[row]}"


def _chunks(store: Store) -> Iterator[_Chunk]:
    rows = store.starts + np.arange(store.num_episodes + 1)
    size = max(1, min(CHUNK_ROWS, CHUNK_BYTES // store.records.itemsize))
    first = 0
    while first < store.num_episodes:
        last = max(first + 1, int(np.searchsorted(rows, rows[first] + size, side="right")) - 1)
        lengths = np.diff(rows[first : last + 1])
        begin, end = int(rows[first]), int(rows[last])
        is_last = np.zeros(end - begin, bool)
        is_last[rows[first + 1 : last + 1] - 1 - begin] = True
        yield _Chunk(
            first,
            last,
            begin,
            store.records[begin:end],
            is_last,
            np.repeat(np.arange(first, last), lengths),
            np.arange(end - begin) - np.repeat(rows[first:last] - begin, lengths),
        )
        first = last


class _Column:
    """Running statistics of one array, dimension by dimension, over finite values."""

    def __init__(self, name: str, size: int, detailed: bool) -> None:
        self.name, self.detailed = name, detailed and size <= MAX_DIMENSIONS
        self.count, self.changes = np.zeros(size), np.zeros(size)
        self.mean, self.squares = np.zeros(size), np.zeros(size)
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)
        self.bad = 0
        self.bad_at = ""
        self.sample: list[Floats] = []

    def add(self, values: Floats, chunk: _Chunk, rows: npt.NDArray[np.int64], stride: int) -> None:
        """Add [n, D] values found in the chunk's `rows`."""
        finite = np.isfinite(values)
        if not finite.all():
            row, dimension = np.argwhere(~finite)[0]
            if not self.bad:
                self.bad_at = f"dimension {dimension}, {chunk.where(int(rows[row]))}"
            self.bad += int((~finite).sum())
        if not self.detailed or not len(values):
            return
        count = finite.sum(0)
        zeroed = np.where(finite, values, 0.0)
        mean = zeroed.sum(0) / np.maximum(count, 1)
        total = np.maximum(self.count + count, 1)
        delta = mean - self.mean
        spread = np.where(finite, values - mean, 0.0)
        self.squares += (spread**2).sum(0) + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count += count
        self.low = np.minimum(self.low, np.where(finite, values, np.inf).min(0))
        self.high = np.maximum(self.high, np.where(finite, values, -np.inf).max(0))
        self.sample.append(zeroed[::stride])

    @property
    def std(self) -> Floats:
        return np.sqrt(self.squares / np.maximum(self.count, 1))

    def findings(self) -> Iterator[Finding]:
        if self.bad:
            yield Finding(
                "not-finite", "fault", f"{self.name}: {self.bad} NaN or infinite values, the first at {self.bad_at}"
            )
        if not self.detailed or not self.count.any():
            return
        std = self.std
        constant = self.low == self.high
        near = ~constant & (std <= NEAR_CONSTANT * np.maximum(1.0, np.abs(self.mean)))
        for code, chosen, word in (("constant", constant, "constant"), ("near-constant", near, "nearly constant")):
            if chosen.any():
                yield Finding(code, "warning", f"{self.name}: {_listed(np.flatnonzero(chosen))} {word}")
        largest = np.maximum(np.abs(self.low), np.abs(self.high))
        usual = np.quantile(np.abs(np.concatenate(self.sample)), 0.99, axis=0)
        exploding = np.isfinite(largest) & (largest > np.maximum(LARGE, EXPLODING * np.maximum(usual, 1.0)))
        if exploding.any():
            worst = int(np.argmax(np.where(exploding, largest, 0)))
            yield Finding(
                "exploding",
                "warning",
                f"{self.name}: {_listed(np.flatnonzero(exploding))} far beyond the usual; dimension {worst} reaches "
                f"{largest[worst]:.4g}, its 99 % quantile is {usual[worst]:.4g}",
            )


def _listed(dimensions: npt.NDArray[np.int64]) -> str:
    shown = ", ".join(str(d) for d in dimensions[:8])
    more = f" and {len(dimensions) - 8} more" if len(dimensions) > 8 else ""
    return f"dimension {shown} is" if len(dimensions) == 1 else f"dimensions {shown}{more} are"


def _flat(values: Array) -> Floats:
    return values.reshape(len(values), -1).astype(np.float64)


def diagnose(
    store: Store, spec_bounds: ArraySpec | None = None, progress: Callable[[float], None] | None = None
) -> Report:
    """Examine a store.

    Args:
        store: the data.
        spec_bounds: action bounds to judge by; default is what the store's spec states.
        progress: called with the share done, 0 to 1.
    """
    bounds = spec_bounds or store.spec.actions
    stride = max(1, (store.num_steps + store.num_episodes) // SAMPLE_ROWS)
    columns = {
        key: _Column(f"observation {key!r}", int(np.prod(item.shape)), item.dtype != "uint8")
        for key, item in store.spec.observations.items()
    }
    actions = _Column("actions", int(np.prod(store.spec.actions.shape)), store.spec.num_actions is None)
    rewards = _Column("rewards", 1, detailed=True)
    judge = _ActionJudge(bounds, store.spec.num_actions)
    positive, repeated, total = 0, 0, store.num_steps + store.num_episodes
    seen: dict[bytes, int] = {}
    twins: list[tuple[int, int]] = []

    for chunk in _chunks(store):
        rows, steps = np.arange(len(chunk.records)), np.flatnonzero(~chunk.is_last)
        same = np.ones(len(steps), bool)
        for key, column in columns.items():
            values = chunk.records[f"observations.{key}"]
            if column.detailed or values.dtype.kind == "f":
                column.add(_flat(values), chunk, rows, stride)
            flat = values.reshape(len(values), -1)
            equal = flat[steps] == flat[steps + 1]
            column.changes += (~equal).sum(0)
            same &= equal.all(1)
        repeated += int(same.sum())
        acted = _flat(chunk.records["actions"][steps])
        actions.add(acted, chunk, steps, stride)
        judge.add(acted, chunk, steps)
        given = chunk.records["rewards"]
        rewards.add(given[steps, None], chunk, steps, stride)
        starts = np.flatnonzero(chunk.step_of == 0)
        positive += int((np.maximum.reduceat(given, starts) > 0).sum())
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(given)], strict=True), chunk.first):
            digest = hashlib.blake2b(
                np.ascontiguousarray(chunk.records[start:stop]).view(np.uint8).data, digest_size=16
            ).digest()
            if seen.setdefault(digest, number) != number:
                twins.append((seen[digest], number))
        if progress:
            progress(0.5 * (chunk.row + len(rows)) / total)

    # a dimension that is no part of the motion gets scale infinity: it never counts as a step
    scales = {
        key: np.where((column.std > 0) & (column.changes >= MOVING * store.num_steps), column.std, np.inf)
        for key, column in columns.items()
        if column.detailed
    }
    scales = {key: scale for key, scale in scales.items() if np.isfinite(scale).any()}
    joins: list[tuple[int, float]] = []
    jumps: list[tuple[float, str, str]] = []
    distances: dict[str, list[Floats]] = {key: [] for key in scales}
    for chunk in _chunks(store):
        inside = np.flatnonzero(~chunk.is_last)
        for key in scales:
            distances[key].append(_distances(chunk, key, scales[key], inside)[::stride])
    usual = {key: float(np.quantile(np.concatenate(parts), 0.95)) for key, parts in distances.items()}
    previous: dict[str, Floats] = {}
    for chunk in _chunks(store):
        inside = np.flatnonzero(~chunk.is_last)
        for key in scales:
            far = _distances(chunk, key, scales[key], inside)
            for i in np.flatnonzero(far > max(TELEPORT_MIN, TELEPORT * usual[key])):
                jumps.append((float(far[i]), key, chunk.where(int(inside[i]))))
        joins += _joins(store, chunk, scales, previous)
        if progress:
            progress(0.5 + 0.5 * (chunk.row + len(chunk.records)) / total)

    findings = [f for column in (*columns.values(), actions, rewards) for f in column.findings()]
    # equal rewards are a note, below
    findings = [f for f in findings if not (f.sentence.startswith("rewards") and "constant" in f.code)]
    findings += judge.findings()
    findings += _boundaries(store, jumps, joins, usual)
    if twins:
        a, b = twins[0]
        findings.append(
            Finding(
                "duplicate-episodes",
                "warning",
                f"{len(twins)} episodes repeat an earlier one exactly, the first is episode {b}, equal to episode {a}",
            )
        )
    share = repeated / store.num_steps
    if share > 0.01:
        findings.append(
            Finding("repeated-frames", "warning", f"{share:.1%} of the steps leave every observation unchanged")
        )
    if rewards.low[0] == rewards.high[0]:
        findings.append(Finding("constant-reward", "note", f"every reward is {rewards.low[0]:g}"))
    findings += [Finding("reader", "note", sentence) for sentence in store.notes]
    order = {"fault": 0, "warning": 1, "note": 2}
    findings.sort(key=lambda finding: order[finding.severity])

    counts, edges = np.histogram(store.lengths, bins=min(10, max(1, len(np.unique(store.lengths)))))
    quantiles = (0, 0.25, 0.5, 0.75, 1)
    return Report(
        tuple(findings),
        Summary(
            num_episodes=store.num_episodes,
            num_steps=store.num_steps,
            num_terminated=int(store.terminated.sum()),
            num_truncated=int(store.truncated.sum()),
            lengths=tuple(np.quantile(store.lengths, quantiles).tolist()),
            returns=tuple(np.quantile(store.episode_returns(), quantiles).tolist()),
            length_edges=tuple(edges.tolist()),
            length_counts=tuple(counts.tolist()),
            positive_share=positive / store.num_episodes,
            repeated_share=share,
        ),
    )


def _scaled(chunk: _Chunk, key: str, scale: Floats) -> Floats:
    """Return the moving dimensions of an observation array in standard deviations, [rows, D']."""
    moving = np.isfinite(scale)
    return np.asarray(_flat(chunk.records[f"observations.{key}"])[:, moving] / scale[moving], np.float64)


def _distances(chunk: _Chunk, key: str, scale: Floats, rows: npt.NDArray[np.int64]) -> Floats:
    """Return the root mean square step, in standard deviations, from each row to the next; NaN counts as no step.

    Each dimension counts at most 3 standard deviations, so that one spiking sensor is no teleport.
    """
    values = _scaled(chunk, key, scale)
    steps = np.nan_to_num(values[rows + 1] - values[rows], nan=0.0)
    return np.asarray(np.sqrt(np.mean(np.clip(steps, -3, 3) ** 2, axis=1)))


def _joins(
    store: Store, chunk: _Chunk, scales: dict[str, Floats], previous: dict[str, Floats]
) -> list[tuple[int, float]]:
    """Return (episode, distance) from the end of each episode that did not terminate to the start of the next.

    `previous` carries the last observation from chunk to chunk.
    """
    starts, ends = np.flatnonzero(chunk.step_of == 0), np.flatnonzero(chunk.is_last)
    worst = np.zeros(len(starts))
    for key, scale in scales.items():
        values = _scaled(chunk, key, scale)
        before = values[np.concatenate([[0], ends[:-1]])]
        before[0] = previous.get(key, np.full(values.shape[1], np.inf))
        worst = np.fmax(worst, np.sqrt(np.mean((values[starts] - before) ** 2, axis=1)))
        previous[key] = values[-1]
    numbers = np.arange(chunk.first, chunk.last)
    cut = (numbers > 0) & ~store.terminated[numbers - 1]
    return [(int(n) - 1, float(d)) for n, d in zip(numbers[cut], worst[cut], strict=True)]


class _ActionJudge:
    """Actions against bounds that are stated, or against [-1, 1], which most simulators use."""

    def __init__(self, bounds: ArraySpec, num_actions: int | None) -> None:
        self.num_actions = num_actions
        self.known = bounds.low is not None and bounds.high is not None
        self.low = np.asarray(bounds.low if bounds.low is not None else -1.0, np.float64)
        self.high = np.asarray(bounds.high if bounds.high is not None else 1.0, np.float64)
        if num_actions is not None:
            self.known, self.low, self.high = True, np.zeros(1), np.full(1, num_actions - 1.0)
        self.total = self.outside = self.at_bound = 0
        self.first, self.largest = "", 0.0

    def add(self, values: Floats, chunk: _Chunk, rows: npt.NDArray[np.int64]) -> None:
        slack = 1e-6 * np.maximum(1.0, np.maximum(np.abs(self.low), np.abs(self.high)))  # float32 rounding
        outside = np.isfinite(values) & ((values < self.low - slack) | (values > self.high + slack))
        if outside.any() and not self.outside:
            row, dimension = np.argwhere(outside)[0]
            self.first = f"{values[row, dimension]:.4g} in dimension {dimension}, {chunk.where(int(rows[row]))}"
        self.total += values.size
        self.outside += int(outside.sum())
        self.at_bound += int(((values == self.low) | (values == self.high)).sum())
        finite = np.abs(values[np.isfinite(values)])
        self.largest = max(self.largest, float(finite.max(initial=0.0)))

    def findings(self) -> Iterator[Finding]:
        share = self.outside / self.total
        if self.known and self.outside:
            yield Finding(
                "action-bounds",
                "fault",
                f"actions: {share:.2%} lie outside the stated bounds, the first is {self.first}",
            )
        elif self.outside and share < NEARLY_ALL:
            yield Finding(
                "action-range",
                "warning",
                f"actions: no bounds are stated and {1 - share:.2%} lie in [-1, 1], "
                f"but some reach {self.largest:.4g} (first: {self.first}); clip them if the environment "
                "does",
            )
        edge = self.at_bound / self.total
        if self.num_actions is None and edge > 0.2 and (self.known or not self.outside):
            yield Finding("saturated-actions", "note", f"actions: {edge:.1%} lie exactly at a bound")


def _boundaries(
    store: Store, jumps: list[tuple[float, str, str]], joins: list[tuple[int, float]], usual: dict[str, float]
) -> Iterator[Finding]:
    """Yield findings about where episodes begin and end."""
    open_ended = np.flatnonzero(~store.terminated & ~store.truncated)
    if len(open_ended):
        yield Finding(
            "no-end",
            "fault",
            f"{len(open_ended)} episodes are neither terminated nor truncated, the first is episode {open_ended[0]}",
        )
    both = np.flatnonzero(store.terminated & store.truncated)
    if len(both):
        yield Finding(
            "both-ends",
            "warning",
            f"{len(both)} episodes are both terminated and truncated, the first is "
            f"episode {both[0]}; no value is taken beyond a termination, which is wrong if only the time was "
            "up",
        )
    if jumps:
        far, key, where = max(jumps)
        yield Finding(
            "teleport",
            "fault",
            f"observation {key!r}: {len(jumps)} steps jump as between two episodes, the "
            f"farthest after {where} ({far:.3g} standard deviations; 95 % of the steps stay below "
            f"{usual[key]:.3g})",
        )
    # where steps are as long as resets, nothing can be told
    if joins and 0 < max(usual.values(), default=0) < TELEPORT_MIN:
        limit = max(usual.values())
        joined = [number for number, distance in joins if distance <= limit]
        if joined and len(joined) * 2 >= len(joins):
            yield Finding(
                "joined-episodes",
                "note",
                f"{len(joined)} of {len(joins)} cuts look like one trajectory that "
                f"goes on in the next episode, the first after episode {joined[0]}",
            )
