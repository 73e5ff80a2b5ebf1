"""Progress with rate and time left: a rich bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 15.0


class ProgressLine:
    """Shows how far a loop is: `with ProgressLine("offline", total) as line: line.advance_to(done, "success 0.4")`."""

    def __init__(self, label: str, total: int, start: int = 0, quiet: bool = False) -> None:
        self.label, self.total, self.start = label, total, start
        self.console = Console(stderr=True)
        self.plain = not self.console.is_terminal
        self.quiet = quiet
        self._began = self._shown = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if not self.quiet and not self.plain:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.start, rate="", note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance_to(self, done: int, note: str = "") -> None:
        """Show that `done` of `total` are finished."""
        if self.quiet:
            return
        now = time.monotonic()
        # a run that was killed begins again at its last checkpoint: less is done than there was
        rate = max(0, done - self.start) / max(now - self._began, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=pace(rate), note=note)
        elif now - self._shown >= PLAIN_SECONDS or done == self.total:
            self._shown = now
            left = f", {(self.total - done) / rate:.0f} s left" if rate > 0 else ""
            tail = f", {note}" if note else ""
            print(f"{self.label}: {done}/{self.total}, {pace(rate)}{left}{tail}", file=sys.stderr, flush=True)


def pace(rate: float) -> str:
    """Return a rate per second for people: "120/s", "2.4/s", or "31 s each" where one takes longer than a second."""
    if rate >= 10 or rate == 0:
        return f"{rate:.0f}/s"
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.0f} s each"
