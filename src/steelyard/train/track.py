"""Adapters from a run's logs to experiment trackers. They read metrics.jsonl and eval.jsonl, after or during a run.

Training knows nothing of them, so a tracker that is absent, slow or broken cannot disturb a run.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steelyard.errors import DataError, require

Point = tuple[int, dict[str, float]]
"""Update step and {`group/name`: value}."""

_SUFFIX = ".steelyard"  # of the event files that are ours to replace


def points(run_dir: str | Path) -> list[Point]:
    """Return the logged points of a run in the order of their update steps.

    An evaluation's episodes become the means `eval/return`, `eval/length`, `eval/success` and `eval/score`; where the
    end of one phase and the beginning of the next were both evaluated, the later one counts. Values that were not
    finite, and a last line that is still being written, are left out.

    Raises:
        DataError: there is no run, or a line is damaged.
    """
    run = Path(run_dir)
    if not (run / "metrics.jsonl").is_file():
        raise DataError(f"{run}: holds no run (no metrics.jsonl in it)")
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for row in _rows(run / "metrics.jsonl"):
        step = row.pop("update_step")
        found[step] |= {name: float(value) for name, value in row.items() if _finite(value)}
    episodes: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in _rows(run / "eval.jsonl"):
        episodes[row["phase"], row["update_step"]].append(row)
    for (_, step), rows in episodes.items():
        for name in ("return", "length", "success", "score"):
            values = [float(row[name]) for row in rows if _finite(row.get(name))]
            if len(values) == len(rows):
                found[step][f"eval/{name}"] = sum(values) / len(values)
    return sorted(found.items())


def to_tensorboard(run_dir: str | Path, log_dir: str | Path | None = None) -> Path:
    """Write a run's points as TensorBoard events and return their folder; `tensorboard --logdir FOLDER` shows them.

    Calling it again replaces what it wrote before.

    Args:
        run_dir: run directory.
        log_dir: folder of the events; default: `tensorboard` in the run directory.

    Raises:
        MissingExtraError: tensorboard is not installed.
        DataError: there is no run, or a line is damaged.
    """
    require("tensorboard", "track")
    from torch.utils.tensorboard.writer import SummaryWriter  # only now: it imports tensorboard

    logged = points(run_dir)
    folder = Path(run_dir) / "tensorboard" if log_dir is None else Path(log_dir)
    for old in folder.glob(f"events.out.tfevents.*{_SUFFIX}"):
        old.unlink()
    with SummaryWriter(str(folder), filename_suffix=_SUFFIX) as writer:
        for step, values in logged:
            for name, value in sorted(values.items()):
                writer.add_scalar(name, value, step)
    return folder


def to_trackio(run_dir: str | Path, project: str) -> str:
    """Log a run's points to a Trackio project, with its config, and return the name of the run there.

    Trackio only adds: call this once, when the run is done. A second call makes a second run.

    Raises:
        MissingExtraError: trackio is not installed.
        DataError: there is no run, or a line is damaged.
    """
    trackio = require("trackio", "track")
    logged = points(run_dir)
    run = Path(run_dir).resolve()
    trackio.init(project=project, name=run.name, config=json.loads((run / "config.json").read_text()))
    try:
        for step, values in logged:
            trackio.log(values, step=step)
    finally:
        trackio.finish()
    return run.name


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    for number, line in enumerate(file.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            return  # the run is writing it
        try:
            row = json.loads(line)
            row["update_step"] = int(row["update_step"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file}, line {number}: expected a JSON object with an update_step, found {error}"
            ) from None
        yield row


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
