"""Minari data sets (HDF5), read and written with h5py alone: no environment named in the metadata is ever imported.

A data set is a directory with `data/main_data.hdf5` and `data/metadata.json`. Its alignment is ours (T + 1
observations, T actions), so nothing is dropped. Nested observation spaces become keys joined with ".".
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steelyard.data.episode import Array, ArraySpec, Episode, Spec
from steelyard.data.formats.source import (
    MANIFEST,
    Manifest,
    Source,
    dataset,
    flags,
    leaf_names,
    numbered,
    open_hdf5,
    plain_or_dict,
    reading,
    require_lengths,
    require_seal,
    seal_hdf5,
    select_keys,
)
from steelyard.data.store import Store, plain_hash
from steelyard.errors import DataError, require

_DIGEST = "steelyard_sha256"


def read(path: str | Path, *, observation_keys: Sequence[str] | None = None) -> Source:
    """Read a Minari data set.

    Args:
        path: the data set's directory, or the `data` directory in it.
        observation_keys: keys to read (nested ones joined with "."); all by default.

    Raises:
        DataError: missing, damaged, not numeric, or a termination or truncation before an episode's last step.
    """
    folder = _folder(Path(path))
    metadata, manifest = _read_metadata(folder)
    spaces = _spaces(metadata, folder / "metadata.json")
    data = folder / "main_data.hdf5"
    if manifest is not None:
        require_seal(data)
    file = open_hdf5(data)
    with reading(data):
        names = numbered(file, "episode_", data)
        first = file[names[0]]
        keys = select_keys(_keys(first, data), observation_keys, data)
        images = {key for key in keys if _is_jpeg(first, key, metadata, spaces)}
        total = metadata.get("total_episodes")
    if total is not None and total != len(names):
        raise DataError(f"{data}: holds {len(names)} episodes, expected {total} as its metadata says")
    notes: list[str] = []
    if manifest is not None:
        manifest.expect(len(names), data)
        notes += manifest.notes
    with reading(data):
        spec = manifest.spec if manifest is not None else _spec(first, keys, images, spaces, data)

    def episodes() -> Iterator[Episode]:
        with file:
            for number, name in enumerate(names):
                row = manifest.episodes[number] if manifest else {}
                with reading(data):
                    episode = _episode(file[name], keys, images, data, row.get("instruction"),
                                       row.get("provenance", f"{folder.parent.name}#{name[8:]}"))  # fmt: skip
                yield episode

    return Source(episodes(), spec, notes)


def write(store: Store, path: str | Path, *, dataset_id: str = "steelyard/data-v0") -> None:
    """Write a store as a Minari data set that the `minari` package loads.

    Args:
        store: what to write; keys with "." become nested dict spaces.
        path: directory to create.
        dataset_id: Minari's name for the data set, like "name/word-v0".

    Raises:
        DataError: `path` exists, or the observation keys cannot be nested.
    """
    h5py = require("h5py", "data")
    path = Path(path)
    if path.exists():
        raise DataError(f"{path}: already exists; choose another path or remove it")
    space = _observation_space(store.spec, path)
    staging = path.with_name(path.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "data").mkdir(parents=True)
    try:
        with h5py.File(staging / "data" / "main_data.hdf5", "w", track_order=True) as file:
            file.attrs[MANIFEST] = 1
            for number, episode in enumerate(store.episodes()):
                group = file.create_group(f"episode_{number}")
                group.attrs["id"], group.attrs["total_steps"] = number, len(episode)
                for key, values in episode.observation_dict.items():
                    name = "observations" if space["type"] != "Dict" else "observations/" + key.replace(".", "/")
                    group[name] = values
                group["actions"], group["rewards"] = episode.actions, episode.rewards
                last = np.arange(len(episode)) == len(episode) - 1
                group["terminations"] = last & episode.terminated
                group["truncations"] = last & episode.truncated
        seal_hdf5(staging / "data" / "main_data.hdf5")
        metadata = {
            "total_episodes": store.num_episodes,
            "total_steps": store.num_steps,
            "data_format": "hdf5",
            "jpeg_encoding": False,
            "observation_space": json.dumps(space),
            "action_space": json.dumps(_space(store.spec.actions, store.spec.num_actions)),
            "dataset_id": dataset_id,
            "minari_version": "0.5.4",
            "dataset_size": round((staging / "data" / "main_data.hdf5").stat().st_size / 1e6, 1),
            MANIFEST: Manifest.of(store).to_json(),
        }
        metadata[_DIGEST] = plain_hash(metadata)
        (staging / "data" / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _folder(path: Path) -> Path:
    for folder in (path / "data", path):
        if (folder / "main_data.hdf5").is_file():
            return folder
    for folder in (path / "data", path):
        if (folder / "metadata.json").is_file():
            raise DataError(f"{folder}: no main_data.hdf5; only Minari data sets in HDF5 format can be read")
    raise DataError(f"{path}: not a Minari data set (no data/main_data.hdf5 in it)")


def _read_metadata(folder: Path) -> tuple[dict[str, Any], Manifest | None]:
    file = folder / "metadata.json"
    if not file.is_file():
        raise DataError(f"{file}: missing; a Minari data set needs it")
    with reading(file):
        metadata = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(metadata, dict):
            raise ValueError("expected a JSON object")
    if MANIFEST not in metadata and _DIGEST not in metadata:
        return metadata, None
    if metadata.pop(_DIGEST, None) != plain_hash(metadata):
        raise DataError(f"{file}: does not match its SHA-256; altered or damaged")
    return metadata, Manifest.from_json(metadata[MANIFEST], file)


def _spaces(metadata: dict[str, Any], file: Path) -> dict[str, dict[str, Any]]:
    """Return the leaf spaces: "actions", and observations under their joined key."""
    spaces: dict[str, dict[str, Any]] = {}

    def collect(space: dict[str, Any], key: str) -> None:
        if space["type"] == "Dict":
            for name, inner in space["subspaces"].items():
                collect(inner, f"{key}.{name}")
        elif space["type"] == "Tuple":
            for number, inner in enumerate(space["subspaces"]):
                collect(inner, f"{key}._index_{number}")
        else:
            spaces[key] = space

    with reading(file):
        for name, key in (("observation_space", "observations"), ("action_space", "actions")):
            if name in metadata:
                collect(json.loads(metadata[name]), key)
    return spaces


def _keys(group: Any, path: Path) -> list[str]:
    if "observations" not in group:
        raise DataError(f"{path}: '{group.name}/observations' is missing; found {sorted(group)}")
    if not hasattr(group["observations"], "keys"):
        return ["observation"]
    return [name.replace("/", ".") for name in leaf_names(group["observations"])]


def _place(group: Any, key: str) -> str:
    return "observations" if not hasattr(group["observations"], "keys") else "observations/" + key.replace(".", "/")


def _is_jpeg(group: Any, key: str, metadata: dict[str, Any], spaces: dict[str, dict[str, Any]]) -> bool:
    """Tell whether frames are stored as JPEG streams (Minari's default for images): one or two axes instead of four."""
    space = spaces.get("observations" if key == "observation" else f"observations.{key}", {})
    shape = space.get("shape", ())
    image = space.get("dtype") == "uint8" and len(shape) == 3
    return image and bool(metadata.get("jpeg_encoding", True)) and group[_place(group, key)].ndim < 4


def _decode(streams: Any) -> Array:
    image = require("PIL.Image", "data")
    return np.stack([np.asarray(image.open(io.BytesIO(bytes(stream)), formats=("JPEG",))) for stream in streams])


def _episode(
    group: Any, keys: list[str], images: set[str], path: Path, instruction: str | None, provenance: str
) -> Episode:
    observations = {
        key: _decode(group[_place(group, key)]) if key in images else dataset(group, _place(group, key), path)[()]
        for key in keys
    }
    actions = dataset(group, "actions", path)[()]
    rewards = np.asarray(dataset(group, "rewards", path)[()], np.float64)
    ends = {name: flags(dataset(group, name, path)[()], path, name) for name in ("terminations", "truncations")}
    steps = require_lengths(
        {"actions": len(actions), "rewards": len(rewards)} | {k: len(v) for k, v in ends.items()}, path
    )
    for name, values in ends.items():
        early = np.flatnonzero(values[:-1])
        if len(early):
            raise DataError(
                f"{path}: '{group.name}/{name}' is set at step {early[0]} of {steps}, expected at the last step only"
            )
    return Episode(
        plain_or_dict(observations), actions, rewards, bool(ends["terminations"][-1]), bool(ends["truncations"][-1]),
        instruction, provenance,
    )  # fmt: skip


def _spec(group: Any, keys: list[str], images: set[str], spaces: dict[str, dict[str, Any]], path: Path) -> Spec:
    """Types and shapes as stored, bounds as the metadata's spaces say."""

    def described(place: str, key: str, encoded: bool = False) -> ArraySpec:
        space = spaces.get(key, {})
        if encoded:
            return ArraySpec(tuple(space["shape"]), "uint8")
        item = dataset(group, place, path)
        bounds = (_bound(space, "low", item.shape[1:]), _bound(space, "high", item.shape[1:]))
        known = item.dtype.kind == "f" and None not in bounds
        return ArraySpec(item.shape[1:], item.dtype.newbyteorder("=").name, *(bounds if known else (None, None)))

    single = keys == ["observation"] and not hasattr(group["observations"], "keys")
    action_space = spaces.get("actions", {})
    discrete = action_space.get("type") == "Discrete"
    return Spec(
        observations={
            key: described(_place(group, key), "observations" if single else f"observations.{key}", key in images)
            for key in keys
        },
        actions=described("actions", "actions"),
        num_actions=int(action_space.get("start", 0)) + int(action_space["n"]) if discrete else None,
    )


def _bound(space: dict[str, Any], side: str, shape: tuple[int, ...]) -> tuple[float, ...] | None:
    """Return one side's bounds, flattened; None unless all are finite."""
    values = np.asarray(space.get(side, math.inf), np.float64).reshape(-1)
    return tuple(values.tolist()) if np.isfinite(values).all() and values.size == math.prod(shape) else None


def _space(item: ArraySpec, num_actions: int | None = None) -> dict[str, Any]:
    """Return the serialised Gymnasium space of one array."""
    if num_actions is not None:
        return {"type": "Discrete", "dtype": "int64", "start": 0, "n": num_actions}
    dtype = np.dtype(item.dtype)
    low: float | int = -math.inf
    high: float | int = math.inf
    if dtype.kind in "iu":
        low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    elif dtype.kind == "b":
        low, high = 0, 1
    sides = {
        side: np.full(item.shape, default).tolist() if bound is None else np.reshape(bound, item.shape).tolist()
        for side, bound, default in (("low", item.low, low), ("high", item.high, high))
    }
    return {"type": "Box", "dtype": dtype.name, "shape": list(item.shape), **sides}


def _observation_space(spec: Spec, path: Path) -> dict[str, Any]:
    if list(spec.observations) == ["observation"]:
        return _space(spec.observations["observation"])
    root: dict[str, Any] = {"type": "Dict", "subspaces": {}}
    for key, item in spec.observations.items():
        node, *rest = root, *key.split(".")
        for name in rest[:-1]:
            node = node["subspaces"].setdefault(name, {"type": "Dict", "subspaces": {}})
        if node["type"] != "Dict" or rest[-1] in node["subspaces"] or "/" in key:
            raise DataError(f"{path}: observation {key!r} cannot be nested beside {sorted(spec.observations)}")
        node["subspaces"][rest[-1]] = _space(item)
    return root
