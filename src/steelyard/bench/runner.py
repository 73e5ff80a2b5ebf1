"""Runs many cases in worker processes: one thread each, progress over all, resumable after any stop."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from steelyard.bench.executors import ExecutorName, LocalExecutor, RayExecutor, work_off
from steelyard.config import read_config, to_json
from steelyard.errors import ConfigError, SteelyardError
from steelyard.train.progress import ProgressLine
from steelyard.train.rundir import RunDir
from steelyard.workflows import control
from steelyard.workflows.common import Case


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

    @property
    def ended(self) -> bool:
        """Whether the run has come to its end, well or not."""
        return RunDir(self.folder).read_status() in ("done", "failed")


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    label: str,
    executor: ExecutorName = "local",
    ray_address: str | None = None,
    on_end: Callable[[Job], None] | None = None,
) -> list[Path]:
    """Carry out all jobs that are not done yet, `workers` at a time. Return their run directories.

    A job whose directory holds a stopped run is resumed; one that failed is left as it is and stays in the averages.

    Args:
        jobs: what to do; no two share a directory.
        workers: jobs at a time on this machine.
        label: of the progress line.
        executor: worker processes of this machine, or Ray tasks.
        ray_address: of a Ray cluster; default is the variable RAY_ADDRESS, else a local Ray of `workers` CPUs.
        on_end: called in this process for each job that has ended, also for those that had ended before.

    Raises:
        ConfigError: a directory holds a run with another config.
        SteelyardError: a job could not begin, or its process was lost; the others wrote a checkpoint first.
        Interrupted: ctrl-C; every running job wrote a checkpoint first.
    """
    for job in jobs:
        _require_same(job)
    todo = [job for job in jobs if not job.ended]
    if on_end is not None:
        for job in jobs:
            if job.ended:
                on_end(job)
    if not todo:
        return [job.folder for job in jobs]
    total = sum(job.updates for job in jobs)
    pool: LocalExecutor | RayExecutor
    pool = LocalExecutor(workers) if executor == "local" else RayExecutor(workers, ray_address, todo[0].folder.parent)

    def ended(job: Job, failure: str | None) -> None:
        if failure is not None:
            progress.console.print(f"failed: {failure}", markup=False)
        if on_end is not None:
            on_end(job)

    def show() -> None:
        progress.advance_to(_updates_done(jobs), f"{sum(job.ended for job in jobs)} of {len(jobs)} runs ended")

    with ProgressLine(label, total, _updates_done(jobs)) as progress:
        work_off(todo, _work, pool, ended, show)
    return [job.folder for job in jobs]


def _work(job: Job) -> str | None:
    """Start or resume one job; return the sentence of a failure."""
    try:
        if (job.folder / "config.json").is_file():
            if not job.ended:
                control.resume(job.folder, quiet=True)
        else:  # a run that was killed before its config was written has not begun
            control.start(job.config, job.folder, job.case, quiet=True)
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
