"""Runs many cases in worker processes: one thread each, progress over all, resumable after any stop."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from steelyard.config import read_config, to_json
from steelyard.errors import ConfigError, SteelyardError
from steelyard.train.loop import Interrupted
from steelyard.train.progress import ProgressLine
from steelyard.train.rundir import RunDir
from steelyard.workflows import control
from steelyard.workflows.common import Case

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """One case with one seed, and where it goes."""

    config: control.ControlRun
    case: Case
    folder: Path

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return self.config.offline_steps + (self.config.online.updates if self.config.env else 0)


def run_jobs(jobs: Sequence[Job], workers: int, label: str) -> list[Path]:
    """Carry out all jobs that are not done yet, `workers` at a time. Return their run directories.

    A job whose directory holds a stopped run is resumed; one that failed is left as it is and stays in the averages.

    Raises:
        ConfigError: a directory holds a run with another config.
        Interrupted: ctrl-C; every running job wrote a checkpoint first.
    """
    for job in jobs:
        _require_same(job)
    todo = [job for job in jobs if RunDir(job.folder).read_status() not in ("done", "failed")]
    if not todo:
        return [job.folder for job in jobs]
    total = sum(job.updates for job in jobs)
    context = multiprocessing.get_context("spawn")
    with ProgressLine(label, total, _updates_done(jobs)) as progress, ProcessPoolExecutor(workers, context) as pool:
        waiting: set[Future[str | None]] = {pool.submit(_work, job) for job in todo}
        try:
            while waiting:
                done, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    failure = future.result()
                    if failure is not None:
                        progress.console.print(f"failed: {failure}", markup=False)
                finished = sum(RunDir(job.folder).read_status() in ("done", "failed") for job in jobs)
                progress.advance_to(_updates_done(jobs), f"{finished} of {len(jobs)} runs finished")
        except (KeyboardInterrupt, Interrupted):
            for future in waiting:
                future.cancel()
            raise Interrupted from None
    return [job.folder for job in jobs]


def _work(job: Job) -> str | None:
    """Start or resume one job; return the sentence of a failure."""
    try:
        if RunDir(job.folder).read_status() is None:
            control.start(job.config, job.folder, job.case, quiet=True)
        else:
            control.resume(job.folder, quiet=True)
    except SteelyardError as error:
        if RunDir(job.folder).read_status() == "failed":
            return f"{job.folder}: {error}"  # a run that failed is a result; one that could not begin is not
        raise
    return None


def _require_same(job: Job) -> None:
    file = job.folder / "config.json"
    if file.is_file() and to_json(read_config(control.ControlRun, file)) != to_json(job.config):
        raise ConfigError(f"{job.folder}: holds a run with another config; choose another --out or remove it")


def _updates_done(jobs: Sequence[Job]) -> int:
    return sum(_last_update(job.folder / "metrics.jsonl") for job in jobs)


def _last_update(file: Path) -> int:
    """Return the update step of the last complete row of a growing log."""
    if not file.is_file():
        return 0
    with file.open("rb") as log:
        log.seek(max(0, file.stat().st_size - 8192))
        lines = log.read().split(b"\n")[:-1]
    for line in reversed(lines):
        try:
            return int(json.loads(line)["update_step"])
        except (ValueError, KeyError):
            continue
    return 0
