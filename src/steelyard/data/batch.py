"""Typed batches: what objectives receive. Frozen, with shapes in the docstring."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Base of all batches: a set of tensors that share their first axis."""

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on `device`."""
        return type(self)(**{name: value.to(device, non_blocking=True) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return {field name: tensor} of the fields that are there."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def part(self, number: int, parts: int) -> Self:
        """Return part `number` of `parts`: the rows number, number + parts, ..."""
        return dataclasses.replace(self, **{name: value[number::parts] for name, value in self.tensors().items()})

    def __len__(self) -> int:
        """Return the number of rows B."""
        return len(next(iter(self.tensors().values())))


@dataclass(frozen=True)
class TransitionBatch(Batch):
    """Steps of behaviour. Optional fields are there where the objective's `needs` ask for them.

    Attributes:
        observations: float32 [B, O]; uint8 [B, O] where all observations are bytes (images, flattened).
        actions: float32 [B, A]; int64 [B] where actions are discrete.
        rewards: float32 [B], scaled and biased as the run's config says.
        next_observations: as observations.
        masks: float32 [B], 1 - terminated: 1 where the value goes on beyond this step.
        returns_to_go: float32 [B], discounted sum of rewards from this step to the end of its trajectory.
        is_offline: float32 [B], 1 for prior data, 0 for data collected online.
        next_actions: as actions, what the data did at the next step; zeros where there is none.
        has_next_action: float32 [B], 0 at the last step of a trajectory.
        n_step_returns: float32 [B], discounted sum of the next n rewards (fewer at a trajectory's end).
        n_step_discounts: float32 [B], weight of the value after them: discount^n, 0 after a termination.
        n_step_observations: as observations, where that value is taken.
        chunk_actions: [B, n, A] (int64 [B, n] where discrete), actions of the next n steps; zeros beyond the end.
        chunk_valid: float32 [B, n], 1 while the trajectory lasts.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    masks: Tensor
    returns_to_go: Tensor
    is_offline: Tensor
    next_actions: Tensor | None = None
    has_next_action: Tensor | None = None
    n_step_returns: Tensor | None = None
    n_step_discounts: Tensor | None = None
    n_step_observations: Tensor | None = None
    chunk_actions: Tensor | None = None
    chunk_valid: Tensor | None = None


@dataclass(frozen=True)
class TokenBatch(Batch):
    """Rows of text.

    Attributes:
        tokens: int64 [B, L].
        scored_mask: float32 [B, L]; 1 where the token is a target, 0 for prompt, padding and the first token.
    """

    tokens: Tensor
    scored_mask: Tensor
