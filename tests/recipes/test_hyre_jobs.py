"""Jobs of the HyRe studies: results are kept, a stopped study goes on, other settings are refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from steelyard.config import Config
from steelyard.errors import ConfigError
from steelyard.recipes.hyre_jobs import begin, carry_out


@dataclass(frozen=True)
class Job:
    number: int

    @property
    def name(self) -> str:
        return f"job {self.number}/x"


@dataclass(frozen=True)
class Study(Config):
    size: int = 1


def work(job: Job) -> list[dict[str, Any]]:
    if job.number == 13:
        raise ConfigError("stopped")
    return [{"number": job.number}, {"number": -job.number}]


def test_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stopped"):
        carry_out([Job(1), Job(13), Job(2)], work, tmp_path, "test")
    assert [file.name for file in (tmp_path / "jobs").iterdir()] == ["job_1-x.json"]

    def only(job: Job) -> list[dict[str, Any]]:
        assert job.number != 1, "done already"
        return work(job)

    rows = carry_out([Job(2), Job(1)], only, tmp_path, "test")
    assert [row["number"] for row in rows] == [2, -2, 1, -1], "in the order of the jobs"


def test_worker_processes_give_the_same(tmp_path: Path) -> None:
    jobs = [Job(1), Job(2), Job(3)]
    assert carry_out(jobs, work, tmp_path / "a", "test", workers=2) == carry_out(jobs, work, tmp_path / "b", "test")


def test_other_settings_are_refused(tmp_path: Path) -> None:
    begin(tmp_path, Study(1))
    begin(tmp_path, Study(1))
    with pytest.raises(ConfigError, match="other settings"):
        begin(tmp_path, Study(2))
