"""Jobs of the HyRe studies: each leaves a file of rows, so that a stopped study goes on with what is missing."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from steelyard.bench.executors import LocalExecutor, work_off
from steelyard.config import Config, to_json
from steelyard.errors import ConfigError
from steelyard.train.progress import ProgressLine

Row = dict[str, Any]


class Job(Protocol):
    """One part of a study.

    Attributes:
        name: shown while it runs, and of its file.
    """

    @property
    def name(self) -> str:
        """What the progress line says."""
        ...


J = TypeVar("J", bound=Job)


def begin(out: Path, config: Config) -> None:
    """Make the folder of a study, or check that what is in it has the same settings.

    Raises:
        ConfigError: it has others.
    """
    out.mkdir(parents=True, exist_ok=True)
    recorded, identity = out / "study.json", to_json(config)
    if recorded.exists() and recorded.read_text() != identity:
        raise ConfigError(f"{out}: holds runs with other settings (see {recorded}); choose another --out")
    recorded.write_text(identity)


def carry_out(jobs: Sequence[J], work: Callable[[J], list[Row]], out: Path, label: str, workers: int = 1) -> list[Row]:
    """Carry out the jobs that have no result in `out`/jobs yet, and return the rows of all of them in their order.

    Args:
        jobs: with names of their own.
        work: a function of a module, for other processes must find it.
        out: folder of the study.
        label: of the progress line.
        workers: processes; 1: here.

    Raises:
        Interrupted: ctrl-C.
        SteelyardError: a worker process died.
    """
    folder = out / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    todo = [job for job in jobs if not _result(folder, job).exists()]
    done = len(jobs) - len(todo)

    def ended(job: J, _: str | None) -> None:
        nonlocal done
        done += 1
        progress.advance_to(done, job.name)

    with ProgressLine(label, len(jobs), done) as progress:
        pool = LocalExecutor(workers) if workers > 1 and len(todo) > 1 else None
        work_off(todo, functools.partial(_keep, work, folder), pool, ended)
    return [row for job in jobs for row in json.loads(_result(folder, job).read_text())]


def _keep(work: Callable[[J], list[Row]], folder: Path, job: J) -> None:
    """Carry out one job and write its rows."""
    file = _result(folder, job)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(work(job)))
    unfinished.replace(file)


def _result(folder: Path, job: Job) -> Path:
    return folder / f"{job.name.replace(' ', '_').replace('/', '-')}.json"
