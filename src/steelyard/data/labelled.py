"""Labelled examples as arrays: features (or token rows) in, targets out, with the group each example is from.

A group is whoever or whatever an example comes from: a user, an annotator, a source, a cluster. Heads that see
different groups learn to disagree where users do.

Shapes: N examples in the data, B in a batch, D features, L tokens, G groups.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steelyard.data.batch import Batch
from steelyard.data.sampler import EpochSampler
from steelyard.errors import DataError

PAD = -1
"""Fills token rows at their end."""


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """Examples to learn from.

    Attributes:
        inputs: float32 [B, D], or int64 [B, 1 + L] of `token_rows`; of the first of a pair.
        targets: float32 [B]: P(first is preferred), a number, or the number of a class.
        other: as inputs, of the second of a pair; None where an example is no pair.
        groups: int64 [B], 0..G-1.
        weights: float32 [B], how much each example counts; all 1 where None.
        numbers: int64 [B], the examples' row numbers in the data: who sees an example must not change between epochs.
    """

    inputs: Tensor
    targets: Tensor
    other: Tensor | None = None
    groups: Tensor | None = None
    weights: Tensor | None = None
    numbers: Tensor | None = None


@dataclass(frozen=True)
class LabelledData:
    """A whole data set in memory; fields as in `LabelledBatch`, with N for B.

    Raises:
        DataError: lengths that differ, a number that is not finite, or groups that are not 0..G-1.
    """

    inputs: npt.NDArray[Any]
    targets: npt.NDArray[Any]
    other: npt.NDArray[Any] | None = None
    groups: npt.NDArray[np.int64] | None = None
    weights: npt.NDArray[Any] | None = None

    def __post_init__(self) -> None:
        for name, value in self._arrays().items():
            whole = name == "groups" or (name in ("inputs", "other") and np.issubdtype(value.dtype, np.integer))
            value = np.ascontiguousarray(value, np.int64 if whole else np.float32)
            object.__setattr__(self, name, value)
            if value.ndim != (2 if name in ("inputs", "other") else 1) or len(value) != len(self.inputs):
                raise DataError(
                    f"labelled data: {name} has shape {value.shape}, and there are {len(self.inputs)} inputs"
                )
            if not whole and not np.isfinite(value).all():
                row = int(np.argwhere(~np.isfinite(value))[0][0])
                raise DataError(f"labelled data: {name} of row {row} is not finite")
        if len(self.inputs) == 0:
            raise DataError("labelled data: no rows")
        if self.other is not None and (
            self.other.dtype != self.inputs.dtype or (not self.is_text and self.other.shape != self.inputs.shape)
        ):
            raise DataError(f"labelled data: pairs of {self.inputs.shape[1]} and {self.other.shape[1]} features")
        if self.groups is not None and self.groups.min() < 0:
            raise DataError("labelled data: groups are numbers from 0")

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def is_text(self) -> bool:
        """Whether inputs are token rows."""
        return bool(np.issubdtype(self.inputs.dtype, np.integer))

    @property
    def num_groups(self) -> int:
        """G, the largest group and one; 0 without groups."""
        return 0 if self.groups is None else int(self.groups.max()) + 1

    @property
    def group_counts(self) -> Tensor | None:
        """Examples of each group, int64 [G]."""
        return None if self.groups is None else torch.from_numpy(np.bincount(self.groups, minlength=self.num_groups))

    @property
    def content_hash(self) -> str:
        """SHA-256 of all numbers."""
        digest = hashlib.sha256()
        for name, value in self._arrays().items():
            digest.update(f"{name} {value.shape} {value.dtype}".encode() + value.tobytes())
        return digest.hexdigest()

    def take(self, rows: npt.ArrayLike) -> LabelledData:
        """Return the given examples (numbers or a mask [N]) as a data set of their own."""
        chosen = np.asarray(rows)
        return LabelledData(**{name: value[chosen] for name, value in self._arrays().items()})

    def with_groups(self, groups: npt.NDArray[np.int64]) -> LabelledData:
        """Return the examples with other groups [N]."""
        return dataclasses.replace(self, groups=groups)

    def batch(self, rows: npt.ArrayLike | None = None) -> LabelledBatch:
        """Return the given examples as a batch; all where None. Token rows are cut to the longest of them."""
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows)
        tensors = {name: torch.from_numpy(value[chosen]) for name, value in self._arrays().items()}
        if self.is_text:
            for name in ("inputs", "other"):
                if name in tensors:
                    length = int((tensors[name] != PAD).sum(1).max())
                    tensors[name] = tensors[name][:, :length]
        return LabelledBatch(**tensors, numbers=torch.from_numpy(chosen.astype(np.int64)))

    def batches(self, batch_size: int = 1024) -> list[LabelledBatch]:
        """Return all examples, in order."""
        return [self.batch(np.arange(i, min(i + batch_size, len(self)))) for i in range(0, len(self), batch_size)]

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: np.asarray(value) for name, value in values.items() if value is not None}


class LabelledSource:
    """Batches of a data set, every row once per epoch; a pure function of (seed, step)."""

    def __init__(self, data: LabelledData, batch_size: int, seed: int, stream: str = "labelled/rows") -> None:
        self.data = data
        self.sampler = EpochSampler(len(data), batch_size, seed, stream)

    def batch(self, step: int) -> LabelledBatch:
        """Return the batch of update `step`."""
        return self.data.batch(self.sampler.indices(step))

    def counters(self) -> dict[str, Any]:
        """Return nothing: the update step says it all."""
        return {}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return nothing: the step says it all."""
        return {}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""


def token_rows(rows: Sequence[tuple[list[int], int]]) -> npt.NDArray[np.int64]:
    """Return rows of (token ids, where the completion begins) as int64 [N, 1 + L]: begin, ids, padding.

    What `Encoder.tokens` returns; `nets.backbones.EncoderBackbone` reads it.
    """
    filled = np.full((len(rows), 1 + max(len(ids) for ids, _ in rows)), PAD, np.int64)
    for row, (ids, begin) in enumerate(rows):
        filled[row, 0] = begin
        filled[row, 1 : 1 + len(ids)] = ids
    return filled
