"""Features of texts on disk: what a frozen backbone says is computed once, in pieces, and resumed where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

PIECE = 1024
"""Items in one file; a computation that is stopped loses at most the features of one."""

Compute = Callable[[Sequence[tuple[str, str]]], npt.NDArray[np.float32]]


def cached_features(
    folder: str | Path,
    key: str,
    texts: Sequence[tuple[str, str]],
    compute: Compute,
    on_progress: Callable[[int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """Return features [N, D] of (prompt, completion) texts, from the cache where they are in it.

    Args:
        folder: of the cache; made where it is missing.
        key: names everything else that decides the features (model, pooling, limits).
        texts: N items.
        compute: features of some items; what it returns is stored as float16, and what is returned here always went
            through float16, so that a cached run equals the first one.
        on_progress: told how many items are done.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in range(0, len(texts), PIECE):
        piece = texts[start : start + PIECE]
        digest = hashlib.sha256(key.encode())
        for pair in piece:
            for text in pair:
                data = text.encode("utf-8", "surrogatepass")
                digest.update(len(data).to_bytes(8, "little") + data)
        file = folder / f"{digest.hexdigest()[:32]}.safetensors"
        features = _read(file, len(piece))
        if features is None:
            features = compute(piece).astype(np.float16)
            unfinished = file.with_suffix(".writing")
            safetensors.numpy.save_file({"features": features}, unfinished)
            unfinished.rename(file)
        parts.append(features.astype(np.float32))
        if on_progress is not None:
            on_progress(start + len(piece))
    return np.concatenate(parts)


def _read(file: Path, rows: int) -> npt.NDArray[np.float16] | None:
    """Return the features of a piece, or None where there are none or the file is damaged."""
    if not file.is_file():
        return None
    try:
        features: npt.NDArray[np.float16] = safetensors.numpy.load_file(file)["features"]
    except (safetensors.SafetensorError, KeyError, OSError):
        return None
    return features if features.ndim == 2 and len(features) == rows else None
