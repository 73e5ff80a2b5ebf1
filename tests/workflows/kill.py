"""Runs in forked children that are killed, and everything of a finished run that must not depend on the kills."""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 - the first optimiser of a process imports it for seconds: before the fork, not after

from steelyard.data.source import OfflineSource
from steelyard.train import checkpoint, loop
from steelyard.train.online import OnlineSource
from steelyard.train.rundir import LOGS
from steelyard.workflows import control

PLACES = ("starting", "offline update", "online update", "collecting", "checkpoint", "evaluation")
PLACE, STAGE, SAVED = 0, 1, 2  # bytes of the shared page: where the child is, if its stage is online, checkpoints


class Life:
    """One process that starts or resumes a run, and says in shared memory what it is doing at each moment."""

    def __init__(self, config: control.ControlRun, folder: Path) -> None:
        self.shared = mmap.mmap(-1, 3)
        self.log = folder.with_name(folder.name + ".traceback")
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                self._mark()
                if (folder / "config.json").exists():
                    control.resume(folder, quiet=True)
                else:
                    control.start(config, folder, quiet=True)
                code = 0
            except BaseException:
                self.log.write_text(traceback.format_exc())
            finally:
                os._exit(code)  # never back into the test runner

    def _mark(self) -> None:
        """Wrap, in the child only, what a kill should hit."""

        @contextmanager
        def at(place: str) -> Iterator[None]:
            before = self.shared[PLACE]
            self.shared[PLACE] = PLACES.index(place)
            try:
                yield
            finally:
                self.shared[PLACE] = before

        def wrap(owner: Any, name: str, place: str) -> None:
            inner = getattr(owner, name)

            def outer(*args: Any, **kwargs: Any) -> Any:
                with at(place):
                    return inner(*args, **kwargs)

            setattr(owner, name, outer)

        wrap(checkpoint, "save", "checkpoint")
        wrap(control, "evaluate", "evaluation")
        wrap(OnlineSource, "collect", "collecting")
        for source, place in ((OfflineSource, "offline update"), (OnlineSource, "online update")):
            inner = source.batch

            def batch(this: Any, step: int, inner: Any = inner, place: str = place) -> Any:
                self.shared[PLACE] = PLACES.index(place)  # until something else begins: batch, then the update
                return inner(this, step)

            source.batch = batch  # type: ignore[method-assign]
        save = checkpoint.save

        def counted(*args: Any, **kwargs: Any) -> Path:
            path = save(*args, **kwargs)
            self.shared[SAVED] = min(self.shared[SAVED] + 1, 255)
            return path

        checkpoint.save = counted
        fit = loop.fit

        def staged(learner: Any, source: Any, optimizers: Any, stage: Any, *args: Any, **kwargs: Any) -> None:
            self.shared[STAGE] = stage.name == "online"
            fit(learner, source, optimizers, stage, *args, **kwargs)

        control.fit = staged  # type: ignore[assignment]

    def killed_after(self, seconds: float) -> tuple[str, bool] | None:
        """Kill -9 after so long. Return (place, online) of the kill, or None if the run had ended by itself."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._ended():
                return None
            time.sleep(min(left, 0.01))
        return self.kill()

    def killed_at(self, place: str, seconds: float, saved: int = 0) -> tuple[str, bool] | None:
        """Kill -9 so long after the run first is at `place` with at least `saved` checkpoints written in this life."""
        while self.shared[PLACE] != PLACES.index(place) or self.shared[SAVED] < saved:
            if self._ended():
                return None
            time.sleep(0.0005)
        time.sleep(seconds)
        return self.kill()

    def kill(self) -> tuple[str, bool] | None:
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        if os.WIFEXITED(status):
            self._check(os.WEXITSTATUS(status))
            return None
        return PLACES[self.shared[PLACE]], bool(self.shared[STAGE])

    def finish(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        self._check(os.waitstatus_to_exitcode(status))

    def _ended(self) -> bool:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return False
        self._check(os.waitstatus_to_exitcode(status))
        return True

    def _check(self, code: int) -> None:
        assert code == 0, self.log.read_text() if self.log.exists() else f"exit code {code}"


def undisturbed(config: control.ControlRun, folder: Path) -> float:
    """Carry out a run in a child of its own and return the seconds it took."""
    begin = time.monotonic()
    Life(config, folder).finish()
    return time.monotonic() - begin


def valid_checkpoint_or_none(folder: Path, had_one: bool) -> bool:
    """Verify the last checkpoint of a killed run; once there was one there must always be one."""
    found = checkpoint.steps(folder / "checkpoints")
    assert found or not had_one, f"{folder}: the kill left no checkpoint"
    for path in found:
        checkpoint.load(path)
    return bool(found)


def kill_until_done(
    config: control.ControlRun, folder: Path, rng: random.Random, seconds: float, most: int
) -> Counter[tuple[str, bool]]:
    """Start, kill, resume, kill ... at most `most` times, then let the run finish. Return where the kills hit.

    Half of the kills come at a random time, half at a place that is drawn: many places are visited only briefly.
    """
    hits: Counter[tuple[str, bool]] = Counter()
    had_one = False
    while sum(hits.values()) < most:
        life = Life(config, folder)
        if rng.random() < 0.5:
            hit = life.killed_after(rng.uniform(0.03, 0.6 * seconds))
        else:
            hit = life.killed_at(rng.choice(PLACES[1:]), rng.choice([0.0, rng.uniform(0, 0.1 * seconds)]))
        if hit is None:
            return hits
        hits[hit] += 1
        had_one = valid_checkpoint_or_none(folder, had_one)
    Life(config, folder).finish()
    return hits


def everything(folder: Path) -> dict[str, Any]:
    """Return all bits that a finished run leaves, but for times: tensors, logs, checkpoints kept and the last path."""
    result: dict[str, Any] = {
        "checkpoints": [(p.name, checkpoint.load(p).score) for p in checkpoint.steps(folder / "checkpoints")]
    }
    last = checkpoint.load(checkpoint.last(folder / "checkpoints"))
    for part in ("model", "optimizers", "source"):
        for name, value in getattr(last, part).items():
            result[f"{part} {name}"] = (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    sizes = {name: size for name, size in last.state["logs"].items() if name != "metrics.jsonl"}  # its rows hold times
    result["state"] = last.state | {"logs": sizes}
    for name in LOGS:
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        result[name] = [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]
    path = folder / "trajectory.json"  # mazes have one
    result["trajectory"] = path.read_text() if path.exists() else None
    result["status"] = json.loads((folder / "status.json").read_text())["status"]
    return result


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Return the names of all parts that differ."""
    return sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))
