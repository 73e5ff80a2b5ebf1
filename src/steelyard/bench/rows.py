"""Rows of finished runs: what statistics and reports read, and nothing else.

A run directory holds plain JSON and JSON lines. `read_run` turns one into a `Run` of numpy columns, line by line
checked; `group_runs` puts the seeds of one (recipe, case) together. Keys of a row that are not named here are ignored.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from steelyard.errors import DataError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Phase = Literal["offline", "online"]
Status = Literal["done", "failed", "running", "interrupted"]


@dataclass(frozen=True)
class Evaluations:
    """Columns of eval.jsonl: N evaluation episodes."""

    online: Bools
    """[N] False for the offline phase."""
    update_step: Ints
    env_step: Ints
    """[N] environment steps taken online so far; 0 before the first."""
    episode: Ints
    episode_seed: Ints
    returns: Floats
    """[N] undiscounted return of the episode, in the task's reward units."""
    length: Ints
    success: Floats
    """[N] 0 or 1; NaN where the task has no success."""
    score: Floats
    """[N] normalised: 0 is worst (or random), 1 is success (or expert)."""


@dataclass(frozen=True)
class TrainingEpisodes:
    """Columns of train_episodes.jsonl: M finished online training episodes."""

    env_step: Ints
    update_step: Ints
    returns: Floats
    length: Ints
    success: Floats
    score: Floats


@dataclass(frozen=True)
class Calibration:
    """Columns of calibration.jsonl: S sampled data actions."""

    online: Bools
    q: Floats
    """[S] learned value Q(s, a)."""
    returns_to_go: Floats
    """[S] Monte-Carlo return from (s, a) on, in the same reward units."""


@dataclass(frozen=True)
class Series:
    """One logged metric."""

    update_step: Ints
    value: Floats


@dataclass(frozen=True)
class Points:
    """The evaluations of one phase, P of them: every episode belongs to one point."""

    step: Ints
    """[P] environment steps (online) or update steps (offline), in training order."""
    score: Floats
    """[P] mean score of the episodes of the point."""
    episodes: tuple[Ints, ...]
    """P arrays of row numbers in `Evaluations`."""


@dataclass(frozen=True)
class Run:
    """One case trained with one seed."""

    path: Path
    recipe: str
    case: str
    label: str
    seed: int
    config_hash: str
    data_hash: str | None
    """None for a run without prior data."""
    config: dict[str, Any]
    environment: dict[str, Any]
    status: Status
    message: str
    evaluations: Evaluations
    training: TrainingEpisodes
    metrics: dict[str, Series]
    calibration: Calibration

    def points(self, phase: Phase) -> Points:
        """Return the evaluation points of a phase, in order of their step."""
        rows = self.evaluations
        chosen = np.flatnonzero(rows.online == (phase == "online"))
        steps = rows.env_step if phase == "online" else rows.update_step
        # the update step tells evaluations apart; two may fall on one environment step where many updates share it
        updates = rows.update_step[chosen]
        episodes = tuple(chosen[updates == update] for update in np.unique(updates))
        return Points(
            np.array([steps[index[0]] for index in episodes], np.int64),
            np.array([rows.score[index].mean() for index in episodes], np.float64),
            episodes,
        )


def read_run(path: str | Path) -> Run:
    """Read and check one run directory.

    A run that is not done may lack eval.jsonl and metrics.jsonl (it stopped before the first row). train_episodes.jsonl
    may be absent without an online phase, calibration.jsonl always (a method without a critic has none).

    Raises:
        DataError: a file is missing or malformed; names the file and the line.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such run directory")
    case, status = _read_object(path / "case.json"), _read_object(path / "status.json")
    state = _field(status, "status", _text, path / "status.json")
    if state not in get_args(Status):
        expected = ", ".join(get_args(Status))
        raise DataError(f"{path / 'status.json'}: key 'status': expected one of {expected}, found {state!r}")
    done = state == "done"

    evaluations = _evaluations(path / "eval.jsonl", required=done)
    went_online = bool(np.any(evaluations.env_step > 0))
    training = _columns(path / "train_episodes.jsonl", _TRAINING, required=done and went_online)
    calibration = _columns(path / "calibration.jsonl", _CALIBRATION, required=False)
    where = path / "case.json"
    return Run(
        path=path,
        recipe=_field(case, "recipe", _text, where),
        case=_field(case, "case", _text, where),
        label=_field(case, "label", _text, where),
        seed=_field(case, "seed", _integer, where),
        config_hash=_field(case, "config_hash", _text, where),
        data_hash=_field(case, "data_hash", _text_or_none, where),
        config=_read_object(path / "config.json"),
        environment=_read_object(path / "environment.json"),
        status=state,
        message=str(status.get("message") or ""),
        evaluations=evaluations,
        training=TrainingEpisodes(
            env_step=training["env_step"],
            update_step=training["update_step"],
            returns=training["return"],
            length=training["length"],
            success=training["success"],
            score=training["score"],
        ),
        metrics=_read_metrics(path / "metrics.jsonl", required=done),
        calibration=Calibration(calibration["phase"], calibration["q"], calibration["return_to_go"]),
    )


def find_runs(path: str | Path) -> list[Path]:
    """Return `path` itself if it is a run directory, else all run directories below it, sorted by name.

    Raises:
        DataError: there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such directory")
    if (path / "case.json").is_file():
        return [path]
    found = sorted(case.parent for case in path.rglob("case.json"))
    if not found:
        raise DataError(f"{path}: no run directory here or below; a run directory holds a case.json")
    return found


def group_runs(runs: Iterable[Run]) -> dict[str, dict[str, list[Run]]]:
    """Return {recipe: {case: runs sorted by seed}}; recipes and cases keep the order in which they first appear.

    Raises:
        DataError: two runs of one case share a seed, or two labels claim one case.
    """
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        same = groups.setdefault(run.recipe, {}).setdefault(run.case, [])
        for other in same:
            if other.seed == run.seed:
                raise DataError(
                    f"{run.path}: case {run.case!r} seed {run.seed} is also in {other.path}; each seed counts once"
                )
            if other.label != run.label:
                raise DataError(
                    f"{run.path}: case {run.case!r} is labelled {run.label!r}, but {other.label!r} in {other.path}"
                )
        same.append(run)
    for cases in groups.values():
        for same in cases.values():
            same.sort(key=lambda run: run.seed)
    return groups


def paired(left: Sequence[Run], right: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Return the runs of two cases that share a seed, sorted by seed; other runs have no partner and are left out."""
    partners = {run.seed: run for run in right}
    return [(run, partners[run.seed]) for run in sorted(left, key=lambda run: run.seed) if run.seed in partners]


# Checks of single values: each returns the value as stored in a column, or raises ValueError with what was expected.


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("an integer")
    if not -(2**63) <= value < 2**63:
        raise ValueError("an integer of 64 bits")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("a finite number")
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def _text_or_none(value: object) -> str | None:
    return None if value is None else _text(value)


def _score(value: object) -> float:
    if value is None:
        raise ValueError("a number (a task without a success rule needs a score range)")
    return _number(value)


def _success(value: object) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, bool):
        raise ValueError("true, false or null")
    return float(value)


def _is_online(value: object) -> bool:
    if value not in ("offline", "online"):
        raise ValueError("'offline' or 'online'")
    return value == "online"


_EPISODE: dict[str, Any] = {
    "env_step": _integer,
    "update_step": _integer,
    "return": _number,
    "length": _integer,
    "success": _success,
    "score": _score,
}
_TRAINING = _EPISODE
_EVALUATION = _EPISODE | {"phase": _is_online, "episode": _integer, "episode_seed": _integer}
_CALIBRATION: dict[str, Any] = {"phase": _is_online, "q": _number, "return_to_go": _number}
_DTYPES: dict[Any, Any] = {
    _integer: np.int64,
    _number: np.float64,
    _score: np.float64,
    _success: np.float64,
    _is_online: np.bool_,
}


def _field(row: dict[str, Any], key: str, check: Any, where: Path | str) -> Any:
    """Return the checked value of a key, or raise a sentence that names file (and line), key and what was found."""
    if key not in row:
        raise DataError(f"{where}: key {key!r} is missing")
    try:
        return check(row[key])
    except ValueError as error:
        raise DataError(f"{where}: key {key!r}: expected {error}, found {row[key]!r:.80}") from None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: missing; every run directory holds one")
    return _parse(path.read_text(encoding="utf-8"), path)


def _parse(text: str, where: Path | str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _lines(path: Path, required: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and line for error messages, row) of a JSON lines file; nothing if it may be and is absent."""
    if not path.is_file():
        if required:
            raise DataError(f"{path}: missing, although the run is done")
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            yield where, _parse(line, where)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON lines file, whatever their keys; none if it is not there.

    Raises:
        DataError: a line is no JSON object.
    """
    return [row for _, row in _lines(path, required=False)]


def _columns(path: Path, checks: dict[str, Any], required: bool) -> dict[str, Any]:
    values: dict[str, list[Any]] = {key: [] for key in checks}
    for where, row in _lines(path, required):
        for key, check in checks.items():
            values[key].append(_field(row, key, check, where))
    return {key: np.array(values[key], _DTYPES[check]) for key, check in checks.items()}


def _evaluations(path: Path, required: bool) -> Evaluations:
    columns = _columns(path, _EVALUATION, required)
    seen: dict[tuple[bool, int, int, int], int] = {}
    keys = zip(columns["phase"], columns["update_step"], columns["env_step"], columns["episode"], strict=True)
    for line, key in enumerate(keys, start=1):
        # a repeated row would count an episode twice, for example after a resume that wrote it again
        if key in seen:
            raise DataError(f"{path}, line {line}: repeats the phase, steps and episode of line {seen[key]}")
        seen[key] = line
    if required and not seen:
        raise DataError(f"{path}: no evaluation episode, although the run is done; a report is made of evaluations")
    online = columns["phase"]
    if required and online.any() and not np.any(columns["env_step"][online] == 0):
        raise DataError(f"{path}: no online evaluation at env_step 0, which is the score before fine-tuning")
    return Evaluations(
        online=online,
        update_step=columns["update_step"],
        env_step=columns["env_step"],
        episode=columns["episode"],
        episode_seed=columns["episode_seed"],
        returns=columns["return"],
        length=columns["length"],
        success=columns["success"],
        score=columns["score"],
    )


def _read_metrics(path: Path, required: bool) -> dict[str, Series]:
    """Read every `group/name` of metrics.jsonl; null stands for a value that was not finite and becomes NaN."""
    steps: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    for where, row in _lines(path, required):
        step = _field(row, "update_step", _integer, where)
        for name, value in row.items():
            if "/" not in name:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                raise DataError(f"{where}: key {name!r}: expected a number or null, found {value!r:.80}")
            steps.setdefault(name, []).append(step)
            values.setdefault(name, []).append(math.nan if value is None else float(value))
    return {name: Series(np.array(steps[name], np.int64), np.array(values[name], np.float64)) for name in steps}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], names: Sequence[str] | None = None) -> None:
    """Write rows as CSV; a column that a row lacks is empty.

    Args:
        path: where to.
        rows: one mapping a line.
        names: of the columns; None: all that occur, in the order of their first occurrence.
    """
    rows = list(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names or list(dict.fromkeys(name for row in rows for name in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
