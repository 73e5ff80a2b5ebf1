"""What every reader returns (`Source`) and what readers and writers share: checks, seals, manifests.

Files that this library writes carry a seal: their last bytes are the SHA-256 of everything before them. HDF5 and zip
both allow trailing bytes (zip as its archive comment), so other programs read sealed files as usual. A manifest inside
the file says that it must be sealed, and keeps what the format has no place for: spec, instructions, provenance.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from steelyard.data.episode import Array, Episode, Spec
from steelyard.data.store import Store, spec_from_plain, spec_to_plain
from steelyard.errors import DataError, require

MANIFEST = "steelyard"
"""Name of the manifest inside files that this library writes."""

MissingRewards = Literal["error", "zero", "final"]
"""What a file without rewards means: an error, 0 at every step, or 1 at the last step of each episode and 0 before."""

_SEAL = b"steelyard sha256 "
SEAL_BYTES = len(_SEAL) + 64

# what h5py, zipfile, numpy and json raise on damaged files
_DAMAGE = (
    OSError, EOFError, KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError,
    MemoryError, AssertionError, SyntaxError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Episodes that are read one at a time, with what is known about all of them.

    Attributes:
        episodes: iterated once.
        spec: spec with bounds where the file states them; None where only the arrays tell.
        notes: sentences about what the reader dropped or assumed; complete after the last episode.
    """

    episodes: Iterator[Episode]
    spec: Spec | None = None
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Episode]:
        """Yield the episodes."""
        return self.episodes


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes its library raise into one sentence that names the file.

    Raises:
        DataError: always instead of the library's own error.
    """
    try:
        yield
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read, damaged or not in the expected layout ({reason:.160})") from error


def require_file(path: Path) -> None:
    """Raise `DataError` unless `path` is a file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; it takes its final name only if the block succeeds.

    Raises:
        DataError: `path` exists.
    """
    if path.exists():
        raise DataError(f"{path}: already exists; choose another path or remove it")
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _hash_but_seal(path: Path) -> bytes:
    digest, left = hashlib.sha256(), path.stat().st_size - SEAL_BYTES
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return _SEAL + digest.hexdigest().encode()


def seal(path: Path) -> None:
    """Write the seal over the last `SEAL_BYTES` bytes, which the caller has reserved."""
    line = _hash_but_seal(path)
    with path.open("r+b") as file:
        file.seek(-SEAL_BYTES, os.SEEK_END)
        file.write(line)


def is_sealed(path: Path) -> bool:
    """Return whether the file ends in a seal that fits its content.

    Raises:
        DataError: there is a seal, but the content is not what was sealed.
    """
    if path.stat().st_size < SEAL_BYTES:
        return False
    with path.open("rb") as file:
        file.seek(-SEAL_BYTES, os.SEEK_END)
        found = file.read()
    if not found.startswith(_SEAL):
        return False
    if found != _hash_but_seal(path):
        raise DataError(f"{path}: content does not match the SHA-256 at its end; altered or damaged")
    return True


def require_seal(path: Path) -> None:
    """Raise `DataError` if a file with our manifest is not sealed."""
    if not is_sealed(path):
        raise DataError(f"{path}: was written by steelyard but its SHA-256 is gone; truncated, altered or damaged")


@dataclass(frozen=True)
class Manifest:
    """What a file of ours knows beyond its format. One row an episode: instruction, provenance, truncated."""

    spec: Spec
    episodes: list[dict[str, Any]]
    notes: list[str]

    @classmethod
    def of(cls, store: Store) -> Manifest:
        """Describe a store."""
        rows = [
            {"instruction": row["instruction"], "provenance": row["provenance"], "truncated": bool(truncated)}
            for row, truncated in zip(store.episode_table, store.truncated, strict=True)
        ]
        return cls(store.spec, rows, list(store.notes))

    def to_json(self) -> str:
        """Serialise."""
        return json.dumps({"spec": spec_to_plain(self.spec), "episodes": self.episodes, "notes": self.notes})

    @classmethod
    def from_json(cls, text: str | bytes, path: Path) -> Manifest:
        """Read back; `path` names the file in errors."""
        with reading(path):
            plain = json.loads(text)
            return cls(spec_from_plain(plain["spec"], path), plain["episodes"], plain["notes"])

    def expect(self, episodes: int, path: Path) -> None:
        """Raise `DataError` unless the manifest lists as many episodes as the file has."""
        if len(self.episodes) != episodes:
            raise DataError(f"{path}: holds {episodes} episodes, expected {len(self.episodes)} as its manifest says")


def open_hdf5(path: Path) -> Any:
    """Open an HDF5 file for reading, after its seal (if it has one) was checked; close it after use."""
    h5py = require("h5py", "data")
    require_file(path)
    sealed = is_sealed(path)  # before the HDF5 library parses anything
    with reading(path):
        file = h5py.File(path, "r")
    if not sealed and (MANIFEST in file or MANIFEST in file.attrs):
        file.close()
        require_seal(path)
    return file


def seal_hdf5(path: Path) -> None:
    """Append a seal to a closed HDF5 file."""
    with path.open("ab") as file:
        file.write(bytes(SEAL_BYTES))
    seal(path)


def write_manifest(file: Any, manifest: Manifest) -> None:
    """Put the manifest into an open HDF5 file, as bytes."""
    file.create_dataset(MANIFEST, data=np.frombuffer(manifest.to_json().encode(), np.uint8))


def read_manifest(file: Any, path: Path) -> Manifest | None:
    """Return the manifest of an open HDF5 file; None if the file is not ours."""
    if MANIFEST not in file:
        return None
    with reading(path):
        return Manifest.from_json(bytes(file[MANIFEST][()]), path)


def dataset(group: Any, name: str, path: Path) -> Any:
    """Return a numeric HDF5 dataset of this very file.

    Raises:
        DataError: absent, not a dataset, not numeric (nothing is ever unpickled), or a link to another file.
    """
    h5py = require("h5py", "data")
    link = group.get(name, getlink=True)
    where = f"{group.name.rstrip('/')}/{name}"
    if link is None:
        raise DataError(f"{path}: {where!r} is missing; found {sorted(group)}")
    if isinstance(link, h5py.ExternalLink):
        raise DataError(f"{path}: {where!r} links to another file, {link.filename!r}; that is not followed")
    item = group[name]
    if not isinstance(item, h5py.Dataset):
        raise DataError(f"{path}: {where!r} is a group, expected an array")
    if item.dtype.kind not in "fiub":
        raise DataError(f"{path}: {where!r} has type {item.dtype}, expected numbers")
    if item.external or item.is_virtual:
        raise DataError(f"{path}: {where!r} keeps its data in another file; that is not followed")
    return item


def leaf_names(group: Any, prefix: str = "") -> list[str]:
    """Return the paths ("a/b/c") of all datasets below an HDF5 group, sorted."""
    h5py = require("h5py", "data")
    names = []
    for name in sorted(group):
        if isinstance(group.get(name, getlink=True), h5py.HardLink) and isinstance(group[name], h5py.Group):
            names += leaf_names(group[name], f"{prefix}{name}/")
        else:
            names.append(prefix + name)
    return names


def numbered(group: Any, prefix: str, path: Path) -> list[str]:
    """Return the members "PREFIX<number>" of an HDF5 group in the order of their numbers."""
    names = [name for name in group if name.startswith(prefix) and name[len(prefix) :].isdigit()]
    if not names:
        raise DataError(f"{path}: no group {prefix}0, {prefix}1, ... in {group.name!r}; found {sorted(group)[:10]}")
    return sorted(names, key=lambda name: int(name[len(prefix) :]))


def plain_or_dict(observations: dict[str, Array]) -> Array | dict[str, Array]:
    """Return the array itself where its only key is "observation"."""
    return observations["observation"] if list(observations) == ["observation"] else observations


def flags(values: Array, path: Path, name: str) -> npt.NDArray[np.bool_]:
    """Return an array of 0 and 1 as booleans.

    Raises:
        DataError: another value was found, or more than one column.
    """
    flat = values.reshape(len(values), -1)
    if flat.shape[1] != 1 or not np.isin(flat, (0, 1)).all():
        raise DataError(f"{path}: {name!r} must hold one flag, 0 or 1, per step")
    return np.asarray(flat[:, 0] != 0)


def rewards_by_rule(steps: int, rule: MissingRewards, path: Path) -> npt.NDArray[np.float64]:
    """Return the rewards [steps] of an episode whose file has none.

    Raises:
        DataError: the rule is "error".
    """
    if rule == "error":
        raise DataError(
            f"{path}: has no 'rewards'; say what they are with the option missing_rewards: "
            "'final' (1 at the last step of each episode, else 0) or 'zero'"
        )
    rewards = np.zeros(steps)
    if rule == "final":
        rewards[-1] = 1.0
    return rewards


class EndCounter:
    """Completes episodes whose source has no observation after the last action, and counts what that took."""

    def __init__(self, notes: list[str]) -> None:
        self.notes, self.dropped, self.emptied, self.repeated = notes, 0, 0, 0

    def episode(
        self,
        observations: dict[str, Array],
        actions: Array,
        rewards: npt.NDArray[np.floating],
        terminated: bool,
        truncated: bool,
        provenance: str,
    ) -> Episode | None:
        """Build the episode of T observations and T actions; None if nothing is left of it.

        A terminated episode repeats its last observation: no value is ever taken beyond a termination. Any other
        episode loses its last step, because the value of the unknown next observation would be needed.
        """
        if terminated:
            self.repeated += 1
            observations = {key: np.concatenate([values, values[-1:]]) for key, values in observations.items()}
        else:
            self.dropped += 1
            if len(actions) == 1:
                self.emptied += 1
                return None
            actions, rewards = actions[:-1], rewards[:-1]
        return Episode(plain_or_dict(observations), actions, rewards, terminated, truncated, provenance=provenance)

    def close(self) -> None:
        """Write the notes."""
        if self.dropped:
            empty = f"; {self.emptied} of these had no other step" if self.emptied else ""
            self.notes.append(
                f"dropped the last step of {self.dropped} episodes that did not terminate: the file has no observation "
                f"after it{empty}"
            )
        if self.repeated:
            self.notes.append(
                f"repeated the last observation of {self.repeated} terminated episodes: the file has none after it"
            )


def require_lengths(lengths: dict[str, int], path: Path) -> int:
    """Return the common number of rows; raise `DataError` if they differ or are 0."""
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise DataError(f"{path}: arrays must have equally many rows and at least one, found {lengths}")
    return next(iter(lengths.values()))


def select_keys(found: Sequence[str], wanted: Sequence[str] | None, path: Path) -> list[str]:
    """Return the observation keys to read, all by default.

    Raises:
        DataError: a wanted key is not in the file.
    """
    for key in wanted or ():
        if key not in found:
            raise DataError(f"{path}: no observation {key!r}; found {sorted(found)}")
    return list(found if wanted is None else wanted)
