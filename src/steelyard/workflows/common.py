"""What all runs share: beginning in a new directory, resuming exactly, and a status that tells how it ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from steelyard import runtime
from steelyard.config import config_hash, read_config, to_json
from steelyard.errors import CheckpointError, ConfigError, DataError, SteelyardError
from steelyard.train import checkpoint
from steelyard.train.loop import Interrupted
from steelyard.train.rundir import RunDir

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class Case:
    """Which comparison a run belongs to; only the report reads it."""

    recipe: str = "train"
    case: str = ""
    label: str = ""


def begin(run: RunDir, config: Any, case: Case, data_hash: str | None) -> None:
    """Make the run directory and write what never changes: case, environment, config."""
    run.create()
    kind = config.objective.kind
    run.write_json(
        "case.json",
        {
            "recipe": case.recipe,
            "case": case.case or kind,
            "label": case.label or kind,
            "seed": config.seed,
            "config_hash": config_hash(config),
            "data_hash": data_hash,
        },
    )
    run.write_json("environment.json", runtime.describe())
    run.status("running")
    run.write_json("config.json", to_json(config))  # last: a directory with a config.json holds a whole run


def kind_of_run(path: str | Path) -> str | None:
    """Return the kind of objective of a run directory, "preference" for any of those; None where there is no run."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    kind: str | None = "preference" if "experience" in found else found.get("objective", {}).get("kind")
    return kind


def read_run_config(run: RunDir, cls: type[ConfigT]) -> ConfigT:
    """Return the config of a run directory."""
    if not (run.path / "config.json").is_file():
        raise CheckpointError(f"{run.path}: holds no run (no config.json in it)")
    config = read_config(cls, run.path / "config.json")
    recorded = json.loads((run.path / "case.json").read_text())["config_hash"]
    if config_hash(config) != recorded:
        raise ConfigError(f"{run.path / 'config.json'}: changed since the run began; start a new run instead")
    return config


def rewind(run: RunDir, data: str | None, data_hash: str | None) -> checkpoint.Checkpoint | None:
    """Load the last checkpoint (None if there is none yet) and cut the logs back to what it had seen.

    Raises:
        DataError: the data are not those that the run began with.
    """
    recorded = json.loads((run.path / "case.json").read_text())["data_hash"]
    if recorded != data_hash:
        raise DataError(f"{data}: not the data that {run.path} began with; its content hash has changed")
    checkpoint.prune(run.checkpoints)
    found = checkpoint.load(checkpoint.last(run.checkpoints)) if checkpoint.steps(run.checkpoints) else None
    run.truncate_logs(found.state["logs"] if found else dict.fromkeys(run.log_sizes(), 0))
    run.event(f"resumed at update {found.step if found else 0}")
    return found


def carry_out(run: RunDir, work: Callable[[], None]) -> Path:
    """Do the work and record how it ended. Return the run directory."""
    run.status("running")
    try:
        work()
    except Interrupted:
        run.status("interrupted", "ctrl-C")
        run.event("interrupted; a checkpoint was written")
        raise Interrupted(str(run.path)) from None
    except SteelyardError as error:
        run.status("failed", str(error))
        run.event(f"failed: {error}")
        raise
    run.status("done")
    return run.path
