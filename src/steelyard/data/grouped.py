"""Transitions of which each says which group (dynamics, goal, demonstrator) it comes from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steelyard.data.batch import TransitionBatch
from steelyard.data.sampler import Indices
from steelyard.data.source import OfflineSource
from steelyard.data.store import Store
from steelyard.errors import DataError
from steelyard.rng import numpy_generator


@dataclass(frozen=True)
class GroupedTransitions(TransitionBatch):
    """Transitions with their groups.

    Attributes:
        groups: int64 [B], from 0.
    """

    groups: Tensor | None = None


def joined(stores: Sequence[Store]) -> tuple[Store, Indices]:
    """Return one store in memory with the episodes of all, in order, and the group of every step: its store's number.

    Raises:
        DataError: no store, or specs that do not fit each other.
    """
    if not stores:
        raise DataError("grouped data need at least one group")
    for number, store in enumerate(stores):
        stores[0].spec.require_match(store.spec, "group 0", f"group {number}")
    episodes = itertools.chain.from_iterable(store.episodes() for store in stores)
    whole = Store.from_episodes(episodes, spec=stores[0].spec)
    return whole, np.repeat(np.arange(len(stores)), [store.num_steps for store in stores])


class GroupedSource:
    """Batches with equally many transitions of every group. Stateless.

    Args:
        source: of all groups' steps.
        groups: int64 [num_steps], from 0 without a gap.
        group_batch: rows of each group in a batch.
        seed: of the draws.
    """

    def __init__(self, source: OfflineSource, groups: Indices, group_batch: int, seed: int) -> None:
        self.source, self.groups, self.group_batch, self.seed = source, groups, group_batch, seed
        counts = np.bincount(groups)
        if len(groups) != source.store.num_steps or not counts.all():
            raise DataError(f"expected a group of every one of {source.store.num_steps} steps, and none without steps")
        self.num_groups = len(counts)
        self._rows, self._counts = np.argsort(groups, kind="stable"), counts
        self._first = np.cumsum(counts) - counts

    def batch(self, step: int) -> GroupedTransitions:
        """Return the batch of update `step`: a pure function of (seed, step); rows of a group stand together."""
        drawn = numpy_generator(self.seed, "batch/grouped", step).random((self.num_groups, self.group_batch))
        inside = (drawn * self._counts[:, None]).astype(np.int64)
        rows = self._rows[(self._first[:, None] + inside).ravel()]
        found = self.source.gather(rows).tensors()
        return GroupedTransitions(**found, groups=torch.from_numpy(self.groups[rows]))

    def counters(self) -> dict[str, Any]:
        """Return {"env_step": 0}: no environment is involved."""
        return {"env_step": 0}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return nothing: the step says it all."""
        return {}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""
