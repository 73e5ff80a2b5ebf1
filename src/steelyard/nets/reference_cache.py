"""Reference log-probs of a data set, computed once and kept on disk.

The reference never changes, so its log-probs of fixed data are a function of (data, reference, temperature): they are
computed when first asked for and read from a file afterwards, in this run and in later ones.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from steelyard.data.experience import ExperienceBatch
from steelyard.data.sampler import Indices
from steelyard.errors import DataError


class ReferencedData:
    """Tokenised data whose batches carry `reference_token_logps`; all else is asked of the data themselves.

    Args:
        data: `data.preferences.TokenizedData`, or anything with its `batch`, `row_offsets` and `len`.
        token_logps: float32 [scored tokens of all completions, one after another].
        starts: int64 [completions + 1], where each completion's begin.
    """

    def __init__(self, data: Any, token_logps: Tensor, starts: Tensor) -> None:
        self.data, self._token_logps, self._starts = data, token_logps, starts

    def __len__(self) -> int:
        return len(self.data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def batch(self, indices: Indices) -> ExperienceBatch:
        """Return rows as a batch, with their reference log-probs."""
        batch: ExperienceBatch = self.data.batch(indices)
        offsets = np.asarray(self.data.row_offsets)
        rows = np.asarray(indices, np.int64)
        numbers = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
        places = self._starts[torch.from_numpy(numbers)]
        scored = batch.scored_mask > 0
        offset = scored.long().cumsum(1) - 1
        found = self._token_logps[(places[:, None] + offset).clamp(min=0, max=len(self._token_logps) - 1)]
        return replace(batch, reference_token_logps=found * scored)


def with_reference(
    data: Any, model: Any, folder: str | Path, *, temperature: float = 1.0, batch_size: int = 8
) -> ReferencedData:
    """Return the data with reference log-probs in their batches, from a file in `folder` if it is there.

    Args:
        data: tokenised data with a `content_hash`.
        model: has `reference_token_logps` and `reference_state`.
        folder: where files are kept; several runs may share it.
        temperature: divides the logits.
        batch_size: rows computed at a time.

    Raises:
        DataError: the file does not belong to the data.
    """
    digest = hashlib.sha256(f"{data.content_hash}/{temperature!r}".encode())
    for name, value in sorted(model.reference_state().items()):
        digest.update(f"{name}/{value.dtype}/{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    path = Path(folder) / f"reference-{digest.hexdigest()[:32]}.safetensors"
    if not path.is_file():
        _write(path, data, model, temperature, batch_size)
    found = safetensors.torch.load_file(path)
    starts, token_logps = found["starts"], found["token_logps"]
    if len(starts) != int(data.row_offsets[-1]) + 1 or int(starts[-1]) != len(token_logps):
        raise DataError(f"{path}: does not belong to these data; delete it")
    return ReferencedData(data, token_logps, starts)


def _write(path: Path, data: Any, model: Any, temperature: float, batch_size: int) -> None:
    pieces, lengths = [], [torch.zeros(1, dtype=torch.int64)]
    device = next(model.parameters()).device
    for first in range(0, len(data), batch_size):
        batch = data.batch(np.arange(first, min(first + batch_size, len(data)))).to(device)
        scored = batch.scored_mask > 0
        pieces.append(model.reference_token_logps(batch, temperature=temperature)[scored].float().cpu())
        lengths.append(scored.sum(1).cpu())
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}")
    safetensors.torch.save_file({"token_logps": torch.cat(pieces), "starts": torch.cat(lengths).cumsum(0)}, work)
    os.replace(work, path)
