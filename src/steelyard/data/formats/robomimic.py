"""robomimic-style HDF5: `data/demo_<i>/{obs/<key>, next_obs/<key>, actions, rewards, dones}` and `mask/<name>`.

`next_obs` gives the observation after the last action. Where it is absent, a terminated demonstration repeats its last
observation and any other loses its last step (counted in the notes).

Only the last flag of `dones` is used. In these files it may mean success or merely "last row", so the reader has an
option; by default a set flag is a termination and an unset one a truncation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from steelyard.data.episode import Episode
from steelyard.data.formats.source import (
    EndCounter,
    Manifest,
    MissingRewards,
    Source,
    dataset,
    flags,
    leaf_names,
    numbered,
    open_hdf5,
    plain_or_dict,
    read_manifest,
    reading,
    replacing,
    require_lengths,
    rewards_by_rule,
    seal_hdf5,
    select_keys,
    write_manifest,
)
from steelyard.data.store import Store
from steelyard.errors import DataError, require

Dones = Literal["terminated", "truncated"]


def read(
    path: str | Path,
    *,
    observation_keys: Sequence[str] | None = None,
    mask: str | None = None,
    missing_rewards: MissingRewards = "error",
    dones: Dones = "terminated",
) -> Source:
    """Read a robomimic-style file.

    Args:
        path: HDF5 file.
        observation_keys: keys below `obs` to read; all by default.
        mask: read only the demonstrations that `mask/<name>` lists.
        missing_rewards: rewards of a file that has none.
        dones: meaning of a flag at a demonstration's last step.

    Raises:
        DataError: missing, damaged, not numeric, or without rewards and a rule for them.
    """
    path = Path(path)
    file = open_hdf5(path)
    notes: list[str] = []
    manifest = read_manifest(file, path)
    with reading(path):
        if "data" not in file:
            raise DataError(f"{path}: group 'data' is missing; found {sorted(file)}")
        names = numbered(file["data"], "demo_", path)
        rows = {} if manifest is None else dict(zip(names, manifest.episodes, strict=False))
        if manifest is not None:
            manifest.expect(len(names), path)
            notes += manifest.notes
        if mask is not None:
            names = _masked(file, mask, names, path)
        first = file["data"][names[0]]
        if "obs" not in first:
            raise DataError(
                f"{path}: '{first.name}/obs' is missing; found {sorted(first)} (extract observations first)"
            )
        found = [name.replace("/", ".") for name in leaf_names(first["obs"])]
        keys = select_keys(found, observation_keys, path)

    def episodes() -> Iterator[Episode]:
        ends = EndCounter(notes)
        with file:
            for name in names:
                with reading(path):
                    episode = _episode(file["data"][name], keys, ends, missing_rewards, dones, rows.get(name), path)
                if episode is not None:
                    yield episode
        ends.close()

    return Source(episodes(), None if manifest is None else manifest.spec, notes)


def _masked(file: Any, mask: str, names: list[str], path: Path) -> list[str]:
    if "mask" not in file or mask not in file["mask"]:
        raise DataError(f"{path}: no mask {mask!r}; found {sorted(file['mask']) if 'mask' in file else 'no masks'}")
    item = file["mask"][mask]
    if item.dtype.kind != "S" and require("h5py", "data").check_string_dtype(item.dtype) is None:
        raise DataError(f"{path}: mask {mask!r} has type {item.dtype}, expected names of demonstrations")
    wanted = [name.decode() if isinstance(name, bytes) else str(name) for name in item[()]]
    unknown = sorted(set(wanted) - set(names))
    if unknown or not wanted:
        raise DataError(f"{path}: mask {mask!r} lists {unknown or 'nothing'}, expected demonstrations of the file")
    return sorted(wanted, key=names.index)


def _episode(
    group: Any,
    keys: list[str],
    ends: EndCounter,
    rule: MissingRewards,
    dones: Dones,
    row: dict[str, Any] | None,
    path: Path,
) -> Episode | None:
    actions = dataset(group, "actions", path)[()]
    observations = {key: dataset(group, "obs/" + key.replace(".", "/"), path)[()] for key in keys}
    steps = require_lengths({"actions": len(actions)} | {f"obs/{key}": len(v) for key, v in observations.items()}, path)
    stated = group.attrs.get("num_samples")
    if stated is not None and int(stated) != steps:
        raise DataError(f"{path}: {group.name!r} has {steps} rows, expected {stated} as its num_samples says")
    rewards = rewards_by_rule(steps, rule, path) if "rewards" not in group else dataset(group, "rewards", path)[()]
    done = (
        bool(flags(dataset(group, "dones", path)[()], path, f"{group.name}/dones")[-1]) if "dones" in group else False
    )
    terminated = done and dones == "terminated"
    provenance = f"{path.name}#{group.name.rsplit('_', 1)[-1]}"
    if "next_obs" not in group:
        return ends.episode(observations, actions, rewards, terminated, not terminated, provenance)
    for key in keys:
        last = dataset(group, "next_obs/" + key.replace(".", "/"), path)[-1:]
        observations[key] = np.concatenate([observations[key], last])
    if row is None:
        return Episode(plain_or_dict(observations), actions, rewards, terminated, not terminated, None, provenance)
    return Episode(plain_or_dict(observations), actions, rewards, terminated, row["truncated"], row["instruction"],
                   row["provenance"])  # fmt: skip


def write(store: Store, path: str | Path, *, env_args: str = "{}") -> None:
    """Write a store as one robomimic-style file.

    Args:
        store: what to write; keys with "." become nested groups.
        path: file to create.
        env_args: JSON text for the attribute of that name, which robomimic reads to build its environment.

    Raises:
        DataError: `path` exists or `env_args` is not JSON.
    """
    h5py = require("h5py", "data")
    path = Path(path)
    try:
        json.loads(env_args)
    except ValueError as error:
        raise DataError(f"env_args must be JSON text, found {env_args!r:.80} ({error})") from None
    with replacing(path) as partial:
        with h5py.File(partial, "w") as file:
            data = file.create_group("data")
            data.attrs["total"], data.attrs["env_args"] = store.num_steps, env_args
            for number, episode in enumerate(store.episodes()):
                group = data.create_group(f"demo_{number}")
                group.attrs["num_samples"] = len(episode)
                for key, values in episode.observation_dict.items():
                    name = key.replace(".", "/")
                    group[f"obs/{name}"], group[f"next_obs/{name}"] = values[:-1], values[1:]
                group["actions"], group["rewards"] = episode.actions, episode.rewards
                last = np.arange(len(episode)) == len(episode) - 1
                group["dones"] = (last & episode.terminated).astype(np.int64)
            write_manifest(file, Manifest.of(store))
        seal_hdf5(partial)
