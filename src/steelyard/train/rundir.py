"""The run directory: plain text and safetensors, nothing else.

config.json          the whole config, written before step 0
case.json            which case of which recipe, seed, config hash, data hash
environment.json     versions, threads, matmul precision, commit
status.json          running | done | failed | interrupted, and why
metrics.jsonl        one row per log point
eval.jsonl           one row per evaluation episode
train_episodes.jsonl one row per episode of online training
calibration.jsonl    Q against return-to-go samples
pairs.jsonl          held-out pairs of a preference run
samples.jsonl        texts that its policy wrote
events.log           what happened, in words
checkpoints/         see checkpoint.py
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from steelyard.errors import CheckpointError

LOGS = ("metrics.jsonl", "eval.jsonl", "train_episodes.jsonl", "calibration.jsonl")


class RunDir:
    """Writes a run's files. Logs only grow; a resume first cuts them back to what its checkpoint had seen."""

    def __init__(self, path: str | Path, more_logs: tuple[str, ...] = ()) -> None:
        self.path, self.logs = Path(path), (*LOGS, *more_logs)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def create(self) -> None:
        """Make the directory; it must not hold a run already."""
        if (self.path / "config.json").exists():
            raise CheckpointError(f"{self.path}: holds a run already; resume it, or choose another directory")
        self.path.mkdir(parents=True, exist_ok=True)
        for name in self.logs:
            (self.path / name).touch()

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file whole: first beside it, then renamed."""
        text = content if isinstance(content, str) else json.dumps(content, indent=2, sort_keys=True) + "\n"
        partial = self.path / f".{name}.partial"
        partial.write_text(text)
        os.replace(partial, self.path / name)

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Append rows to a log in one write."""
        if rows:
            with (self.path / name).open("a") as file:
                file.write("".join(json.dumps(_plain(row)) + "\n" for row in rows))

    def event(self, sentence: str) -> None:
        """Append a sentence with the time to events.log."""
        with (self.path / "events.log").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}\n")

    def status(self, status: str, message: str = "") -> None:
        """Write status.json."""
        self.write_json("status.json", {"status": status, "message": message})

    def read_status(self) -> str | None:
        """Return the word in status.json, or None before the run has begun."""
        file = self.path / "status.json"
        return str(json.loads(file.read_text())["status"]) if file.is_file() else None

    def log_sizes(self) -> dict[str, int]:
        """Return the length of each log in bytes, for the checkpoint."""
        return {name: (self.path / name).stat().st_size for name in self.logs}

    def sync_logs(self) -> None:
        """Wait until the logs have reached the disk."""
        for name in self.logs:
            with (self.path / name).open("rb") as file:
                os.fsync(file.fileno())

    def truncate_logs(self, sizes: dict[str, int]) -> None:
        """Cut the logs back to what a checkpoint had seen, so that a resumed run writes no row twice."""
        for name, size in sizes.items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size < size:
                raise CheckpointError(
                    f"{file}: shorter than the checkpoint remembers ({size} bytes); altered or damaged"
                )
            os.truncate(file, size)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
