"""Flat arrays of all steps in one .npz or .hdf5 file: the layouts of D4RL and of OGBench.

Dialect "d4rl", one row per step: `observations, actions, rewards, terminals, timeouts`, optional `next_observations`.

* A trajectory ends where `terminals` (termination) or `timeouts` (truncation) is set, and, where the file has
  `next_observations`, also between two rows whose observations do not join: |next_observations[t] - observations[t+1]|
  > 1e-6. The last row of the file ends a trajectory in any case; a cut without a flag counts as a truncation.
* With `next_observations` nothing is lost. Without, the observation after a trajectory's last action is unknown: a
  trajectory that did not terminate loses its last step, a terminated one repeats its last observation (no value is
  taken beyond a termination). Both are counted in the notes.

Dialect "ogbench", one row per observation: `observations, actions, terminals`; a trajectory of T steps has T + 1 rows,
the last of which has `terminals` set and an action without meaning. Its end is a truncation.

Actions are returned as they are, also beyond their bounds. Several observation arrays are `observations/<key>`.
Arrays are read in pieces: memory holds one trajectory (and one byte per step), never the file.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from steelyard.data.episode import Array, Episode
from steelyard.data.formats.source import (
    MANIFEST,
    SEAL_BYTES,
    EndCounter,
    Manifest,
    MissingRewards,
    Source,
    dataset,
    flags,
    is_sealed,
    leaf_names,
    open_hdf5,
    plain_or_dict,
    reading,
    replacing,
    require_file,
    require_lengths,
    require_seal,
    rewards_by_rule,
    seal,
    seal_hdf5,
    write_manifest,
)
from steelyard.data.store import Store
from steelyard.errors import DataError, require

Dialect = Literal["auto", "d4rl", "ogbench"]

JUMP = 1e-6
_CHUNK = 1 << 16  # rows


Column = tuple[tuple[int, ...], np.dtype[Any], Callable[[Episode], Array]]
"""Shape of a row, type, and how an episode gives its rows."""


class _Npz:
    """Named arrays of an .npz file, each read from its front in pieces. Nothing is unpickled."""

    def __init__(self, path: Path) -> None:
        require_file(path)
        self.path = path
        sealed = is_sealed(path)
        with reading(path):
            self.archive = zipfile.ZipFile(path)
            self.names = [name.removesuffix(".npy") for name in self.archive.namelist()]
        if not sealed and MANIFEST in self.names:
            require_seal(path)

    def open(self, name: str) -> tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]:
        with reading(self.path):
            stream = self.archive.open(f"{name}.npy")
            version = np.lib.format.read_magic(stream)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(stream)
        if dtype.kind not in "fiub":
            raise DataError(f"{self.path}: {name!r} has type {dtype}, expected numbers")
        if fortran and len(shape) > 1:
            raise DataError(
                f"{self.path}: {name!r} is stored in Fortran order; save it again with np.ascontiguousarray"
            )
        return stream, shape, dtype

    def shape(self, name: str) -> tuple[int, ...]:
        stream, shape, _ = self.open(name)
        stream.close()
        return shape

    def reader(self, name: str) -> Callable[[int], Array]:
        """Return a function that gives the next `count` rows."""
        stream, shape, dtype = self.open(name)
        row = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))

        def take(count: int) -> Array:
            with reading(self.path):
                raw = stream.read(count * row)
                if len(raw) != count * row:
                    raise EOFError(f"{name!r} ends early")
                return np.frombuffer(raw, dtype).reshape(count, *shape[1:])

        return take

    def manifest(self) -> bytes | None:
        if MANIFEST not in self.names:
            return None
        return self.reader(MANIFEST)(self.shape(MANIFEST)[0]).tobytes()

    def close(self) -> None:
        self.archive.close()


class _Hdf5:
    """The same for the root of an HDF5 file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = open_hdf5(path)
        with reading(path):
            self.names = leaf_names(self.file)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(dataset(self.file, name, self.path).shape)

    def reader(self, name: str) -> Callable[[int], Array]:
        item = dataset(self.file, name, self.path)
        position = 0

        def take(count: int) -> Array:
            nonlocal position
            with reading(self.path):
                values: Array = item[position : position + count]
                if len(values) != count:
                    raise EOFError(f"{name!r} ends early")
            position += count
            return values

        return take

    def manifest(self) -> bytes | None:
        return bytes(dataset(self.file, MANIFEST, self.path)[()]) if MANIFEST in self.names else None

    def close(self) -> None:
        self.file.close()


def read(path: str | Path, *, dialect: Dialect = "auto", missing_rewards: MissingRewards = "error") -> Source:
    """Read flat arrays.

    Args:
        path: .npz or HDF5 file.
        dialect: "d4rl" or "ogbench"; "auto" decides only where the arrays leave no doubt.
        missing_rewards: rewards of a file that has none.

    Raises:
        DataError: missing, damaged, not numeric, dialect in doubt, or without rewards and a rule for them.
    """
    path = Path(path)
    arrays: _Npz | _Hdf5 = _Npz(path) if path.suffix == ".npz" else _Hdf5(path)
    keys = _keys(arrays.names, "observations")
    for name, present in (("observations", bool(keys)), ("actions", "actions" in arrays.names)):
        if not present:
            raise DataError(f"{path}: array {name!r} is missing; found {sorted(arrays.names)}")
    if dialect == "auto":
        dialect = _detect(arrays.names, path)
    if "rewards" not in arrays.names:
        rewards_by_rule(1, missing_rewards, path)  # fails before anything is read
    per_step = [*keys.values(), "actions", *(n for n in ("rewards", "terminals", "timeouts") if n in arrays.names)]
    rows = require_lengths({name: (arrays.shape(name) or (0,))[0] for name in per_step}, path)
    source = _read_ogbench if dialect == "ogbench" else _read_d4rl
    return source(arrays, path, keys, rows, missing_rewards)


def _keys(names: list[str], stem: str) -> dict[str, str]:
    """Return {observation key: array name}."""
    if stem in names:
        return {"observation": stem}
    return {name.removeprefix(f"{stem}/").replace("/", "."): name for name in names if name.startswith(f"{stem}/")}


def _detect(names: list[str], path: Path) -> Literal["d4rl", "ogbench"]:
    if "timeouts" in names or _keys(names, "next_observations"):
        return "d4rl"
    if "terminals" in names and "rewards" not in names:
        return "ogbench"
    raise DataError(
        f"{path}: the arrays {sorted(names)} do not tell whether 'terminals' marks terminations or ends of recordings; "
        "say so with the option dialect: 'd4rl' or 'ogbench'"
    )


def _whole(arrays: _Npz | _Hdf5, name: str, rows: int, path: Path) -> npt.NDArray[np.bool_]:
    if name not in arrays.names:
        return np.zeros(rows, bool)
    take = arrays.reader(name)
    parts = [flags(take(min(_CHUNK, rows - start)), path, name) for start in range(0, rows, _CHUNK)]
    return np.concatenate(parts)


def _jumps(arrays: _Npz | _Hdf5, keys: dict[str, str], then: dict[str, str], rows: int) -> npt.NDArray[np.bool_]:
    """Mark rows whose next observation is not the observation of the row after it."""
    squares = np.zeros(rows)
    for key in keys:
        take, take_next = arrays.reader(keys[key]), arrays.reader(then[key])
        previous: Array | None = None
        for start in range(0, rows, _CHUNK):
            count = min(_CHUNK, rows - start)
            here = np.asarray(take(count), np.float64).reshape(count, -1)
            there = np.asarray(take_next(count), np.float64).reshape(count, -1)
            if previous is not None:
                squares[start - 1] += np.sum((previous - here[0]) ** 2)
            squares[start : start + count - 1] += np.sum((there[:-1] - here[1:]) ** 2, axis=1)
            previous = there[-1]
    return squares > JUMP**2  # NaN compares false: damaged values are for the doctor, not a boundary


def _read_d4rl(
    arrays: _Npz | _Hdf5, path: Path, keys: dict[str, str], rows: int, missing_rewards: MissingRewards
) -> Source:
    terminals, timeouts = (_whole(arrays, name, rows, path) for name in ("terminals", "timeouts"))
    then = _keys(arrays.names, "next_observations")
    notes: list[str] = []
    ends = terminals | timeouts
    if then:
        if then.keys() != keys.keys():
            raise DataError(f"{path}: next_observations hold {sorted(then)}, expected {sorted(keys)} like observations")
        for key, name in then.items():
            if arrays.shape(name) != arrays.shape(keys[key]):
                raise DataError(
                    f"{path}: {name!r} has shape {arrays.shape(name)}, expected {arrays.shape(keys[key])} "
                    f"like {keys[key]!r}"
                )
        jumps = _jumps(arrays, keys, then, rows) & ~ends
        ends = ends | jumps
        if jumps.any():
            notes.append(f"split {int(jumps.sum())} times where observations do not join although no flag is set")
    elif not ends.any():
        raise DataError(
            f"{path}: 'terminals' and 'timeouts' are absent or never set and there are no 'next_observations', so that "
            "episodes cannot be told apart"
        )
    unfinished = not ends[-1]
    ends[-1] = True
    stops = np.flatnonzero(ends) + 1
    manifest = _manifest(arrays, path, len(stops), notes)
    if unfinished and manifest is None:
        notes.append("the last trajectory of the file has no end flag; it counts as truncated")

    def episodes() -> Iterator[Episode]:
        counter = EndCounter(notes)
        take = {name: arrays.reader(name) for name in [*keys.values(), *then.values(), "actions"]}
        take_rewards = arrays.reader("rewards") if "rewards" in arrays.names else None
        start = 0
        for number, stop in enumerate(stops.tolist()):
            count = stop - start
            observations = {key: take[name](count) for key, name in keys.items()}
            actions = take["actions"](count)
            rewards = take_rewards(count) if take_rewards else rewards_by_rule(count, missing_rewards, path)
            terminated = bool(terminals[stop - 1])
            truncated = bool(timeouts[stop - 1]) or not terminated
            rewards = np.asarray(rewards, np.float64).reshape(count)
            if not then:
                episode = counter.episode(
                    observations, actions, rewards, terminated, truncated, f"{path.name}#{number}"
                )
                if episode is not None:
                    yield episode
            else:
                for key, name in then.items():
                    observations[key] = np.concatenate([observations[key], take[name](count)[-1:]])
                row = {} if manifest is None else manifest.episodes[number]
                yield Episode(
                    plain_or_dict(observations), actions, rewards, terminated, row.get("truncated", truncated),
                    row.get("instruction"), row.get("provenance", f"{path.name}#{number}"),
                )  # fmt: skip
            start = stop
        counter.close()
        arrays.close()

    return Source(episodes(), None if manifest is None else manifest.spec, notes)


def _manifest(arrays: _Npz | _Hdf5, path: Path, episodes: int, notes: list[str]) -> Manifest | None:
    text = arrays.manifest()
    if text is None:
        return None
    manifest = Manifest.from_json(text, path)
    manifest.expect(episodes, path)
    notes[:] = manifest.notes
    return manifest


def _read_ogbench(
    arrays: _Npz | _Hdf5, path: Path, keys: dict[str, str], rows: int, missing_rewards: MissingRewards
) -> Source:
    ends = _whole(arrays, "terminals", rows, path)
    if not ends[-1]:
        raise DataError(f"{path}: the last row has no 'terminals' flag, expected one at the end of every trajectory")
    notes: list[str] = []

    def episodes() -> Iterator[Episode]:
        take = {name: arrays.reader(name) for name in [*keys.values(), "actions"]}
        take_rewards = arrays.reader("rewards") if "rewards" in arrays.names else None
        start = empty = 0
        for number, stop in enumerate((np.flatnonzero(ends) + 1).tolist()):
            count = stop - start
            observations = {key: take[name](count) for key, name in keys.items()}
            actions = take["actions"](count)[:-1]
            rewards = np.asarray(take_rewards(count), np.float64).reshape(count)[:-1] if take_rewards else None
            start = stop
            if count == 1:
                empty += 1
                continue
            if rewards is None:
                rewards = rewards_by_rule(count - 1, missing_rewards, path)
            yield Episode(plain_or_dict(observations), actions, rewards, False, True, None, f"{path.name}#{number}")
        if empty:
            notes.append(f"left out {empty} trajectories of a single row: they have no step")
        arrays.close()

    return Source(episodes(), None, notes)


def write(store: Store, path: str | Path) -> None:
    """Write a store in the "d4rl" dialect with `next_observations`, as .npz or (.hdf5, .h5) HDF5 by the file's name.

    Raises:
        DataError: `path` exists or has another suffix.
    """
    path = Path(path)
    if path.suffix not in (".npz", ".hdf5", ".h5"):
        raise DataError(f"{path}: suffix is {path.suffix!r}, expected .npz, .hdf5 or .h5")
    with replacing(path) as temporary:
        if path.suffix == ".npz":
            _write_npz(store, temporary)
        else:
            _write_hdf5(store, temporary)


def _columns(store: Store) -> dict[str, Column]:
    """Return {array name: (shape of a row, type, how an episode gives its rows)}."""
    spec = store.spec
    columns: dict[str, Column] = {}
    for key, item in spec.observations.items():
        suffix = "" if list(spec.observations) == ["observation"] else "/" + key.replace(".", "/")
        dtype = store.observations[key].dtype
        columns[f"observations{suffix}"] = (item.shape, dtype, partial(_rows, key, slice(None, -1)))
        columns[f"next_observations{suffix}"] = (item.shape, dtype, partial(_rows, key, slice(1, None)))
    columns["actions"] = (spec.actions.shape, np.dtype(spec.actions.dtype), lambda e: e.actions)
    columns["rewards"] = ((), np.dtype(np.float64), lambda e: e.rewards)
    columns["terminals"] = ((), np.dtype(bool), lambda e: _at_end(len(e), e.terminated))
    # an episode without any flag still needs a mark; the manifest keeps what it was
    columns["timeouts"] = ((), np.dtype(bool), lambda e: _at_end(len(e), e.truncated or not e.terminated))
    return columns


def _rows(key: str, rows: slice, episode: Episode) -> Array:
    return episode.observation_dict[key][rows]


def _at_end(steps: int, value: bool) -> npt.NDArray[np.bool_]:
    return np.asarray((np.arange(steps) == steps - 1) & value)


def _write_npz(store: Store, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, (shape, dtype, rows_of) in _columns(store).items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                header = {
                    "descr": np.lib.format.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": (store.num_steps, *shape),
                }
                np.lib.format.write_array_header_1_0(stream, header)
                for episode in store.episodes():
                    stream.write(np.ascontiguousarray(rows_of(episode), dtype).tobytes())
        with archive.open(f"{MANIFEST}.npy", "w") as stream:
            np.lib.format.write_array(stream, np.frombuffer(Manifest.of(store).to_json().encode(), np.uint8))
        archive.comment = bytes(SEAL_BYTES)
    seal(path)


def _write_hdf5(store: Store, path: Path) -> None:
    h5py = require("h5py", "data")
    with h5py.File(path, "w") as file:
        columns = _columns(store)
        for name, (shape, dtype, _) in columns.items():
            file.create_dataset(name, (store.num_steps, *shape), dtype)
        start = 0
        for episode in store.episodes():
            for name, (_, _, rows_of) in columns.items():
                file[name][start : start + len(episode)] = rows_of(episode)
            start += len(episode)
        write_manifest(file, Manifest.of(store))
    seal_hdf5(path)
