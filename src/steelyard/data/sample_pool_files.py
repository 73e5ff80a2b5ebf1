"""Sample pools on disk: a folder that grows by whole pieces and survives a kill at any moment.

    POOL/pool.json                  format, source, checkpoints, and what made it
    POOL/piece-00000.safetensors    some prompts with all their samples, with a hash of its content
    POOL/piece-00001.safetensors    the next ones

A piece appears by a rename after its bytes have reached the disk, so whatever is there is whole; what a kill leaves is
a hidden file that the next piece overwrites. A piece knows the pool it belongs to; pieces of other settings are
refused.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.errors import DataError

FORMAT = "steelyard-sample-pool-1"
PIECE_PROMPTS = 256
"""Prompts of a piece when a whole pool is written."""
FLOATS = ("temperatures", "logps", "certainty", "scores")

Arrays = dict[str, npt.NDArray[Any]]


class PoolFolder:
    """A pool on disk.

    Attributes:
        path: the folder.
        head: `pool.json`.
        prompts: how many are there.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.head = path, head
        self._identity = _hash(json.dumps(head, sort_keys=True).encode())
        self._pieces = sorted(path.glob("piece-*.safetensors"))
        for number, piece in enumerate(self._pieces):
            if piece.name != _piece_name(number):
                raise DataError(f"{path}: expected {_piece_name(number)} next, found {piece.name}; a piece is missing")
        self.prompts = sum(self._counts(piece) for piece in self._pieces)

    @classmethod
    def open(cls, path: Path) -> PoolFolder:
        """Open a pool that exists.

        Raises:
            DataError: there is none, or it is damaged.
        """
        file = path / "pool.json"
        if not file.is_file():
            raise DataError(f"{path}: holds no sample pool (no pool.json in it)")
        try:
            head = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise DataError(f"{file}: not JSON; the pool was altered or damaged") from None
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            found = head.get("format") if isinstance(head, dict) else type(head).__name__
            raise DataError(f"{file}: expected format {FORMAT!r}, found {found!r}")
        checkpoints = head.get("checkpoints")
        if not isinstance(checkpoints, list) or not all(isinstance(k, int) and k > 0 for k in checkpoints):
            raise DataError(f"{file}: key 'checkpoints': expected a list of token counts, found {checkpoints!r:.60}")
        return cls(path, head)

    @classmethod
    def begin(
        cls, path: Path, made_by: Mapping[str, Any], source: str = "", checkpoints: Sequence[int] = ()
    ) -> PoolFolder:
        """Open a pool to go on with it, or begin it.

        Raises:
            DataError: what is there was made by other settings.
        """
        head = {"format": FORMAT, "source": source, "checkpoints": list(checkpoints), "made_by": dict(made_by)}
        head = json.loads(_json(head, "made_by"))
        if (path / "pool.json").is_file():
            found = cls.open(path)
            _require_same(path, found.head, head)
            return found
        if _occupied(path):
            raise DataError(f"{path}: already exists and is no sample pool; choose another path or remove it")
        path.mkdir(parents=True, exist_ok=True)
        _write_whole(path / "pool.json", (json.dumps(head, indent=2, ensure_ascii=False) + "\n").encode())
        return cls(path, head)

    def append(self, items: Sequence[PromptSamples]) -> None:
        """Add prompts as one piece; when this returns, they are on the disk.

        Raises:
            DataError: another process writes to this pool as well, or an item does not fit it.
        """
        if not items:
            return
        arrays = _encode(items, len(self.head["checkpoints"]))
        target = self.path / _piece_name(len(self._pieces))
        if target.exists():
            raise DataError(f"{target}: appeared meanwhile; another process writes to the same pool")
        metadata = {"pool": self._identity, "sha256": _hash_arrays(arrays), "prompts": str(len(items))}
        _write_whole(target, safetensors.numpy.save(arrays, metadata))
        self._pieces.append(target)
        self.prompts += len(items)

    def read(self, prompts: int | None = None) -> SamplePool:
        """Return the pool, or its first `prompts` prompts."""
        items: list[PromptSamples] = []
        k = len(self.head["checkpoints"])
        for piece in self._pieces:
            if prompts is not None and len(items) >= prompts:
                break
            arrays = self._arrays(piece)
            try:
                items += _decode(arrays, k)
            except (KeyError, IndexError, ValueError, TypeError, RecursionError) as error:
                raise DataError(f"{piece}: not a piece of a sample pool: {error}") from None
        return SamplePool(tuple(items[:prompts]), tuple(self.head["checkpoints"]), str(self.head.get("source", "")))

    def _counts(self, piece: Path) -> int:
        with _opened(piece) as file:
            metadata = file.metadata() or {}
        if metadata.get("pool") != self._identity:
            raise DataError(f"{piece}: belongs to another pool, or pool.json was changed after it was written")
        return int(metadata["prompts"]) if metadata.get("prompts", "").isdigit() else 0

    def _arrays(self, piece: Path) -> Arrays:
        with _opened(piece) as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            expected = (file.metadata() or {}).get("sha256")
        if _hash_arrays(arrays) != expected:
            raise DataError(f"{piece}: damaged; its content does not match its hash")
        return arrays


def save_pool(pool: SamplePool, path: Path, made_by: Mapping[str, Any]) -> Path:
    """Write a whole pool to a new folder and return it.

    Raises:
        DataError: the folder exists.
    """
    if _occupied(path):
        raise DataError(f"{path}: already exists; choose another path or remove it")
    folder = PoolFolder.begin(path, made_by, pool.source, pool.checkpoints)
    for first in range(0, len(pool), PIECE_PROMPTS):
        folder.append(pool.items[first : first + PIECE_PROMPTS])
    return path


def load_pool(path: Path, prompts: int | None = None) -> SamplePool:
    """Read a pool, or its first prompts."""
    return PoolFolder.open(path).read(prompts)


def is_pool(path: Path) -> bool:
    """Return whether a folder holds a sample pool."""
    return (path / "pool.json").is_file()


def _occupied(path: Path) -> bool:
    """Return whether something is there that is not the beginning of a pool which a kill left."""
    if not path.is_dir():
        return path.exists()
    return any(child.name != _partial(path / "pool.json").name for child in path.iterdir())


def _encode(items: Sequence[PromptSamples], k: int) -> Arrays:
    """Return a piece's arrays: numbers of all samples one after another, texts as bytes with their lengths."""
    counts = np.array([len(item.rewards) for item in items], np.int64)
    arrays: Arrays = {
        "counts": counts,
        "rewards": np.concatenate([np.asarray(item.rewards, np.float64) for item in items]),
        "lengths": np.concatenate([np.asarray(item.lengths, np.int64) for item in items]),
    }
    if len(arrays["lengths"]) != counts.sum():
        raise DataError(f"samples of a prompt: expected one length each, found {len(arrays['lengths'])}")
    for name, dtype, shape in (
        *((name, np.float64, (-1,)) for name in FLOATS),
        ("checkpoint_scores", np.float64, (-1, k)),
        ("finished", np.uint8, (-1,)),
    ):
        values = [getattr(item, name) for item in items]
        there = [value is not None and len(value) > 0 for value in values]
        parts = [np.asarray(value, dtype) for value, has in zip(values, there, strict=True) if has]
        if any(part.shape[1:] != shape[1:] for part in parts):
            raise DataError(f"samples of a prompt: expected {k} checkpoint scores each, found shape {parts[0].shape}")
        arrays[name] = np.concatenate(parts) if parts else np.zeros((0, *shape[1:]), dtype)
        arrays[f"{name}.there"] = np.array(there, np.uint8)
    for name in ("texts", "answers"):
        arrays |= _packed(name, [text for item in items for text in getattr(item, name)])
        arrays[f"{name}.there"] = np.array([len(getattr(item, name)) > 0 for item in items], np.uint8)
    arrays |= _packed("prompt", [item.prompt for item in items])
    arrays |= _packed("stratum", [item.stratum for item in items])
    arrays |= _packed("columns", [_json(item.columns, "columns") for item in items])
    for name, rows in (
        ("tokens", [ids for item in items for ids in item.tokens]),
        ("prompt_tokens", [item.prompt_tokens for item in items]),
    ):
        arrays[f"{name}.sizes"] = np.array([len(ids) for ids in rows], np.int64)
        arrays[name] = np.array([token for ids in rows for token in ids], np.int32)
    arrays["tokens.there"] = np.array([len(item.tokens) > 0 for item in items], np.uint8)
    return arrays


def _decode(arrays: Arrays, k: int) -> list[PromptSamples]:
    counts = arrays["counts"].tolist()
    split: dict[str, list[Any]] = {
        "rewards": _split(arrays["rewards"], counts),
        "lengths": _split(arrays["lengths"], counts),
        "prompt": _unpacked(arrays, "prompt"),
        "stratum": _unpacked(arrays, "stratum"),
        "columns": [json.loads(text) for text in _unpacked(arrays, "columns")],
        "prompt_tokens": _ids(arrays, "prompt_tokens"),
    }
    for name in (*FLOATS, "checkpoint_scores", "finished", "texts", "answers", "tokens"):
        there = arrays[f"{name}.there"].tolist()
        values: Any
        if name in ("texts", "answers"):
            values = _unpacked(arrays, name)
        elif name == "tokens":
            values = _ids(arrays, name)
        else:
            values = arrays[name].astype(bool) if name == "finished" else arrays[name]
        parts = iter(_split(values, [n for n, has in zip(counts, there, strict=True) if has]))
        is_array = isinstance(values, np.ndarray)
        empty: Any = None if is_array else ()
        split[name] = [(next(parts) if is_array else tuple(next(parts))) if has else empty for has in there]
    if arrays["checkpoint_scores"].shape[1:] != (k,):
        raise ValueError(f"expected {k} checkpoints, found {arrays['checkpoint_scores'].shape[1:]}")
    return [PromptSamples(**{name: split[name][row] for name in split}) for row in range(len(counts))]


def _packed(name: str, texts: Sequence[str]) -> Arrays:
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    return {
        name: np.frombuffer(b"".join(encoded), np.uint8),
        f"{name}.sizes": np.array([len(text) for text in encoded], np.int64),
    }


def _unpacked(arrays: Arrays, name: str) -> list[str]:
    whole = arrays[name].tobytes()
    ends = [0, *arrays[f"{name}.sizes"].cumsum().tolist()]
    if (arrays[f"{name}.sizes"] < 0).any() or ends[-1] != len(whole):
        raise ValueError(f"sizes of {name} do not add up to its {len(whole)} bytes")
    return [whole[start:end].decode("utf-8", "surrogatepass") for start, end in itertools.pairwise(ends)]


def _ids(arrays: Arrays, name: str) -> list[tuple[int, ...]]:
    return [tuple(ids.tolist()) for ids in _split(arrays[name], arrays[f"{name}.sizes"].tolist())]


def _split(values: Any, sizes: Sequence[int]) -> list[Any]:
    if any(size < 0 for size in sizes) or sum(sizes) != len(values):
        raise ValueError(f"expected {sum(sizes)} entries, found {len(values)}")
    ends = np.cumsum([0, *sizes]).tolist()
    return [values[start:end] for start, end in itertools.pairwise(ends)]


def _opened(piece: Path) -> Any:
    try:
        return safetensors.safe_open(str(piece), "numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise DataError(f"{piece}: not a readable safetensors file: {error}") from None


def _hash_arrays(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"sample pool: {what} must hold finite JSON values: {error}") from None


def _piece_name(number: int) -> str:
    return f"piece-{number:05d}.safetensors"


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _write_whole(path: Path, content: bytes) -> None:
    partial = _partial(path)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, survives a power cut
    finally:
        os.close(folder)


def _require_same(
    path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], inside: Literal["", "made_by."] = ""
) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        a, b = found.get(name), wanted.get(name)
        if a == b:
            continue
        if name == "made_by" and isinstance(a, dict) and isinstance(b, dict):
            _require_same(path, a, b, "made_by.")
        raise DataError(
            f"{path}: holds samples of other settings ({inside}{name} was {a!r:.80}, now {b!r:.80}); choose another "
            "path or remove it"
        )
