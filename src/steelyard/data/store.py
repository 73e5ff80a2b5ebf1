"""`Store`: flat columns with episode offsets, memory-mapped, larger than RAM.

Layout of a store on disk (a directory):

    store.json             spec, counts, size and SHA-256 of every column, content hash
    observations.KEY.npy   [N + E, ...]: each episode has one observation more than steps
    actions.npy            [N, ...]
    rewards.npy            [N] float64, raw
    episode_index.npy      [N] int32: which episode a step belongs to
    starts.npy             [E + 1] int64: first step of each episode, and N
    terminated.npy, truncated.npy   [E] bool
    episodes.json          instruction and provenance of each episode

Step i of episode e has its observation in row i + e and its next observation in row i + e + 1, so nothing is stored
twice and a gather costs the same at 10^5 and 10^8 steps.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic

from steelyard.data.episode import Array, Episode, Spec
from steelyard.errors import DataError

FORMAT = "steelyard-store-1"
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Steps:
    """Steps gathered from a store, as numpy arrays in the order asked for.

    Attributes:
        observations: {key: [B, ...]}.
        actions: [B, ...].
        rewards: float64 [B], raw.
        next_observations: {key: [B, ...]}.
        terminated: bool [B]; true only at the last step of an episode that ended its task.
    """

    observations: dict[str, Array]
    actions: Array
    rewards: npt.NDArray[np.float64]
    next_observations: dict[str, Array]
    terminated: npt.NDArray[np.bool_]


class Store:
    """Recorded behaviour as flat columns. Build with `from_episodes` or `open`.

    Attributes:
        spec: shapes, types, bounds and meaning.
        num_steps, num_episodes: N and E.
        content_hash: SHA-256 over the columns' hashes: the identity of the data.
    """

    def __init__(
        self, spec: Spec, columns: dict[str, Array], episodes: list[dict[str, str | None]], content_hash: str
    ) -> None:
        self.spec = spec
        self.columns = columns
        self.content_hash = content_hash
        self._episodes = episodes
        self.observations = {key: columns[f"observations.{key}"] for key in spec.observations}
        self.actions = columns["actions"]
        self.rewards = columns["rewards"]
        self.episode_index = columns["episode_index"]
        self.starts = columns["starts"]
        self.terminated = columns["terminated"]
        self.truncated = columns["truncated"]
        self.num_steps = len(self.actions)
        self.num_episodes = len(self.terminated)
        ends = np.asarray(self.starts[1:]) - 1
        terminal = np.zeros(self.num_steps, bool)
        terminal[ends[np.asarray(self.terminated)]] = True
        self._terminal_steps = terminal

    def __len__(self) -> int:
        """Return the number of steps N."""
        return self.num_steps

    @classmethod
    def from_episodes(cls, episodes: Iterable[Episode], path: str | Path | None = None, spec: Spec | None = None) -> Store:
        """Build a store from episodes, one at a time: in memory, or on disk at `path` with bounded memory.

        Args:
            episodes: at least one episode; all must fit the first one's spec.
            path: directory to write; it must not exist.
            spec: spec to record (with bounds and meaning); default is what the arrays show.
        """
        if path is None:
            writer: _MemoryWriter | _DiskWriter = _MemoryWriter()
        else:
            writer = _DiskWriter(Path(path))
        try:
            for episode in episodes:
                writer.add(episode, spec)
            return writer.close()
        except BaseException:
            writer.abort()
            raise

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Store:
        """Open a store on disk, memory-mapped.

        Args:
            path: the store's directory.
            verify: compare every column with its SHA-256. Only sizes are compared otherwise.

        Raises:
            DataError: a file is missing, truncated or altered.
        """
        path = Path(path)
        header = _read_header(path)
        columns: dict[str, Array] = {}
        for name, entry in header["columns"].items():
            file = path / f"{name}.npy"
            if not file.is_file():
                raise DataError(f"{file}: missing; the store lists it")
            if file.stat().st_size != entry["bytes"]:
                raise DataError(f"{file}: has {file.stat().st_size} bytes, expected {entry['bytes']}; truncated or altered")
            if verify and _file_hash(file) != entry["sha256"]:
                raise DataError(f"{file}: content does not match its SHA-256; altered or damaged")
            columns[name] = np.load(file, mmap_mode="r", allow_pickle=False)
        table = path / "episodes.json"
        if not table.is_file() or _file_hash(table) != header["episodes_sha256"]:
            raise DataError(f"{table}: missing, altered or damaged")
        spec = _spec_from_plain(header["spec"], path)
        # small per-episode and per-step index columns are read into memory: they are touched by every gather
        for name in ("starts", "terminated", "truncated"):
            columns[name] = np.array(columns[name])
        return cls(spec, columns, json.loads(table.read_text()), header["content_hash"])

    def gather(self, indices: Indices) -> Steps:
        """Return the steps at `indices` [B] (0 <= index < num_steps)."""
        rows = indices + self.episode_index[indices]
        return Steps(
            observations={key: column[rows] for key, column in self.observations.items()},
            actions=self.actions[indices],
            rewards=self.rewards[indices],
            next_observations={key: column[rows + 1] for key, column in self.observations.items()},
            terminated=self._terminal_steps[indices],
        )

    def episode(self, number: int) -> Episode:
        """Return episode `number` (copied into memory)."""
        start, stop = int(self.starts[number]), int(self.starts[number + 1])
        observations = {
            key: np.array(column[start + number : stop + number + 1]) for key, column in self.observations.items()
        }
        plain = list(observations) == ["observation"]
        return Episode(
            observations=observations["observation"] if plain else observations,
            actions=np.array(self.actions[start:stop]),
            rewards=np.array(self.rewards[start:stop]),
            terminated=bool(self.terminated[number]),
            truncated=bool(self.truncated[number]),
            instruction=self._episodes[number]["instruction"],
            provenance=self._episodes[number]["provenance"] or "",
        )

    def episodes(self) -> Iterator[Episode]:
        """Yield every episode in order."""
        for number in range(self.num_episodes):
            yield self.episode(number)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of steps of each episode, [E]."""
        return np.diff(self.starts)

    def episode_returns(self) -> npt.NDArray[np.float64]:
        """Undiscounted sum of raw rewards of each episode, [E]."""
        return np.add.reduceat(np.asarray(self.rewards), np.asarray(self.starts[:-1]))


def _columns_of(episode: Episode) -> dict[str, Array]:
    columns = {f"observations.{key}": values for key, values in episode.observation_dict.items()}
    return columns | {"actions": episode.actions, "rewards": np.asarray(episode.rewards, np.float64)}


class _Writer:
    """Shared bookkeeping of the two writers."""

    def __init__(self) -> None:
        self.spec: Spec | None = None
        self.lengths: list[int] = []
        self.terminated: list[bool] = []
        self.truncated: list[bool] = []
        self.table: list[dict[str, str | None]] = []

    def add(self, episode: Episode, spec: Spec | None) -> None:
        if self.spec is None:
            self.spec = spec or episode.spec
        self.spec.require_match(episode.spec if spec is None else _with_bounds(episode.spec, spec),
                                "the data set", f"episode {episode.provenance or len(self.lengths)}")
        self.append({name: self._cast(name, values) for name, values in _columns_of(episode).items()})
        self.lengths.append(len(episode))
        self.terminated.append(episode.terminated)
        self.truncated.append(episode.truncated)
        self.table.append({"instruction": episode.instruction, "provenance": episode.provenance})

    def _cast(self, name: str, values: Array) -> Array:
        assert self.spec is not None
        if name == "rewards":
            return values
        entry = self.spec.actions if name == "actions" else self.spec.observations[name.removeprefix("observations.")]
        return np.ascontiguousarray(values, dtype=entry.dtype)

    def append(self, columns: dict[str, Array]) -> None:
        raise NotImplementedError

    def index_columns(self) -> dict[str, Array]:
        if not self.lengths:
            raise DataError("no episodes: a store needs at least one")
        starts = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        return {
            "episode_index": np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.lengths),
            "starts": starts,
            "terminated": np.array(self.terminated),
            "truncated": np.array(self.truncated),
        }


def _with_bounds(found: Spec, given: Spec) -> Spec:
    """Discrete actions seen in one episode need not reach the highest one: compare shapes and types only."""
    import dataclasses

    return dataclasses.replace(found, num_actions=given.num_actions)


class _MemoryWriter(_Writer):
    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, list[Array]] = {}

    def append(self, columns: dict[str, Array]) -> None:
        for name, values in columns.items():
            self.parts.setdefault(name, []).append(values)

    def close(self) -> Store:
        columns = self.index_columns() | {name: np.concatenate(parts) for name, parts in self.parts.items()}
        assert self.spec is not None
        hashes = {name: hashlib.sha256(np.ascontiguousarray(values)).hexdigest() for name, values in columns.items()}
        return Store(self.spec, columns, self.table, _content_hash(hashes, self.table))

    def abort(self) -> None:
        self.parts.clear()


class _DiskWriter(_Writer):
    """Streams raw columns to a staging directory, then puts the .npy headers in front and renames."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        if path.exists():
            raise DataError(f"{path}: already exists; choose another path or remove it")
        self.path = path
        self.staging = path.with_name(path.name + ".partial")
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)
        self.files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        self.rows: dict[str, int] = {}
        self.hashes: dict[str, Any] = {}

    def append(self, columns: dict[str, Array]) -> None:
        for name, values in columns.items():
            if name not in self.files:
                self.files[name] = (self.staging / f"{name}.raw").open("wb")
                self.shapes[name] = (values.shape[1:], values.dtype)
                self.rows[name] = 0
                self.hashes[name] = hashlib.sha256()
            self.files[name].write(values.data if values.ndim else values.tobytes())
            self.hashes[name].update(values.data)
            self.rows[name] += len(values)

    def close(self) -> Store:
        assert self.spec is not None or not self.lengths
        data_hashes: dict[str, str] = {}
        entries: dict[str, dict[str, Any]] = {}
        index = self.index_columns()
        for name, values in index.items():
            np.save(self.staging / f"{name}.npy", values, allow_pickle=False)
            data_hashes[name] = hashlib.sha256(np.ascontiguousarray(values)).hexdigest()
        for name, raw in self.files.items():
            raw.close()
            shape, dtype = self.shapes[name]
            target = self.staging / f"{name}.npy"
            with target.open("wb") as out, (self.staging / f"{name}.raw").open("rb") as source:
                np.lib.format.write_array_header_1_0(
                    out,
                    {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False,
                     "shape": (self.rows[name], *shape)},
                )
                shutil.copyfileobj(source, out, 1 << 24)
            (self.staging / f"{name}.raw").unlink()
            data_hashes[name] = self.hashes[name].hexdigest()
        for name in (*index, *self.files):
            file = self.staging / f"{name}.npy"
            entries[name] = {"bytes": file.stat().st_size, "sha256": _file_hash(file)}
        table = self.staging / "episodes.json"
        table.write_text(json.dumps(self.table))
        assert self.spec is not None
        header = {
            "format": FORMAT,
            "spec": pydantic.TypeAdapter(Spec).dump_python(self.spec, mode="json"),
            "columns": entries,
            "episodes_sha256": _file_hash(table),
            "content_hash": _content_hash(data_hashes, self.table),
        }
        header["header_sha256"] = _plain_hash(header)
        (self.staging / "store.json").write_text(json.dumps(header, indent=2, sort_keys=True))
        os.replace(self.staging, self.path)
        return Store.open(self.path, verify=False)

    def abort(self) -> None:
        for raw in self.files.values():
            raw.close()
        shutil.rmtree(self.staging, ignore_errors=True)


def _read_header(path: Path) -> dict[str, Any]:
    file = path / "store.json"
    if not file.is_file():
        raise DataError(f"{path}: not a store (no store.json in it)")
    try:
        header: dict[str, Any] = json.loads(file.read_text())
        format_name, expected = header["format"], header.pop("header_sha256")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DataError(f"{file}: not a store header; altered or damaged") from None
    if format_name != FORMAT:
        raise DataError(f"{file}: format is {format_name!r}, expected {FORMAT!r}")
    if _plain_hash(header) != expected:
        raise DataError(f"{file}: header does not match its SHA-256; altered or damaged")
    return header


def _spec_from_plain(plain: Any, path: Path) -> Spec:
    try:
        return pydantic.TypeAdapter(Spec).validate_json(json.dumps(plain))
    except pydantic.ValidationError as error:
        raise DataError(f"{path / 'store.json'}: bad spec: {error.errors()[0]['msg']}") from None


def _plain_hash(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _content_hash(column_hashes: dict[str, str], table: list[dict[str, str | None]]) -> str:
    return _plain_hash({"columns": column_hashes, "episodes": table})


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
