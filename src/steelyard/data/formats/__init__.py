"""File formats: one module each, listed in one table. Readers yield episodes one at a time; writers take a store."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steelyard.data.formats import flat, minari, robomimic
from steelyard.data.formats.source import Source, reading
from steelyard.data.store import Store
from steelyard.errors import DataError, require


@dataclass(frozen=True)
class Format:
    """How one format is recognised, read and written."""

    description: str
    detect: Callable[[Path], bool]
    read: Callable[..., Source]
    write: Callable[..., None]


def _read_native(path: Path, *, verify: bool = True) -> Source:
    store = Store.open(path, verify=verify)
    return Source(store.episodes(), store.spec, list(store.notes))


def _write_native(store: Store, path: Path) -> None:
    Store.from_episodes(store.episodes(), path, spec=store.spec, notes=store.notes)


def _is_minari(path: Path) -> bool:
    return any((folder / "main_data.hdf5").is_file() for folder in (path, path / "data"))


def _hdf5_has(path: Path, name: str) -> bool:
    if not path.is_file() or path.suffix not in (".hdf5", ".h5", ".hdf"):
        return False
    h5py = require("h5py", "data")
    with reading(path), h5py.File(path, "r") as file:
        return name in file


FORMATS: dict[str, Format] = {
    "steelyard": Format(
        "native store, a directory with store.json",
        lambda path: (path / "store.json").is_file(),
        _read_native,
        _write_native,
    ),
    "minari": Format("Minari data set in HDF5, a directory", _is_minari, minari.read, minari.write),
    "flat": Format(
        "flat arrays as in D4RL and OGBench, .npz or .hdf5",
        lambda path: path.suffix == ".npz" or _hdf5_has(path, "observations"),
        flat.read,
        flat.write,
    ),
    "robomimic": Format(
        "robomimic-style HDF5 with data/demo_<i>",
        lambda path: _hdf5_has(path, "data"),
        robomimic.read,
        robomimic.write,
    ),
}


def detect(path: str | Path) -> str:
    """Return the name of the format that `path` is in.

    Raises:
        DataError: nothing there, or no format recognises it.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    for name, item in FORMATS.items():
        if item.detect(path):
            return name
    raise DataError(f"{path}: format not recognised; known formats: {_listing()}")


def episodes_from(path: str | Path, format: str = "auto", **options: Any) -> Source:
    """Read episodes one at a time, whatever the format.

    Args:
        path: file or directory.
        format: a name in `FORMATS`, or "auto".
        options: the format's own, see its `read`.

    Raises:
        DataError: not recognised, missing or damaged.
    """
    name = detect(path) if format == "auto" else format
    reader = _format(name).read
    known = [option for option in inspect.signature(reader).parameters if option != "path"]
    for option in options:
        if option not in known:
            raise DataError(f"{path}: format {name!r} has no option {option!r}; it knows: {', '.join(known)}")
    return reader(Path(path), **options)


def open_dataset(path: str | Path, format: str = "auto", cache: str | Path | None = None, **options: Any) -> Store:
    """Open a data set of any format as a store.

    Args:
        path: file or directory.
        format: a name in `FORMATS`, or "auto".
        cache: directory to write as a native store and open memory-mapped, for data larger than RAM; the store is in
            memory without it. A native store is always opened in place.
        options: the format's own, see its `read`.

    Raises:
        DataError: not recognised, missing, damaged, or `cache` exists.
    """
    name = detect(path) if format == "auto" else format
    if name == "steelyard" and options.keys() <= {"verify"}:
        return Store.open(path, **options)
    source = episodes_from(path, name, **options)
    return Store.from_episodes(source, cache, spec=source.spec, notes=source.notes)


def write_dataset(store: Store, path: str | Path, format: str = "steelyard", **options: Any) -> None:
    """Write a store in any format; `path` must not exist.

    Raises:
        DataError: unknown format, `path` exists, or the format cannot hold the data.
    """
    _format(format).write(store, Path(path), **options)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise DataError(f"unknown format {name!r}; known formats: {_listing()}")
    return FORMATS[name]


def _listing() -> str:
    return "; ".join(f"{name} ({item.description})" for name, item in FORMATS.items())
