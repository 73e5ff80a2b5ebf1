"""What the loop needs of an objective, and what an objective may rely on.

A `Learner` is an `nn.Module` that declares

- `groups`: name -> (parameters, learning rate). One Adam per group.
- `plan`: phases, carried out in order at every update. A phase applies the sum of its losses to its groups. Phases are
  sequential: a later phase sees the parameters that earlier phases of the same update have changed.
- `loss_NAME(batch, generator) -> (scalar, metrics)` for each loss named in the plan. Gradients reach only the
  parameters of the phase's groups, whatever else the loss touches.
- `prepare(batch)`: normalisation, once per batch, with statistics that are buffers of the learner.
- `after_update(step)`: target networks.
- `policy()`: the thing that acts, sharing the learner's weights.

The loop knows no algorithm; an objective knows no loop, no files and no environment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Metrics = dict[str, Tensor]
Loss = Callable[[Any, torch.Generator], tuple[Tensor, Metrics]]


@dataclass(frozen=True)
class Group:
    """Parameters that share an optimiser."""

    parameters: tuple[nn.Parameter, ...]
    learning_rate: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Phase:
    """Losses applied together to groups.

    Attributes:
        losses: NAMEs of `loss_NAME` methods; their sum is differentiated.
        groups: the only groups that receive gradients.
        every: carry the phase out at every k-th update only (delayed policy updates; many critic updates per actor
            update, as in RLPD).
    """

    losses: tuple[str, ...]
    groups: tuple[str, ...]
    every: int = 1


class Policy(Protocol):
    """Acts on raw observations; its normalisers are inside it."""

    def act(self, observations: Tensor, generator: torch.Generator, mode: Literal["mean", "sample"]) -> Tensor:
        """Return actions [B, A] in the environment's own units for raw observations [B, O]."""
        ...

    def reset(self) -> None:
        """Forget what belongs to the current episode (chunks, recurrent state)."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Values inputs: critics, reward models and self-evaluations alike."""

    def score(self, batch: Any, /) -> Tensor:
        """Return one value per row, [B]."""
        ...


class Learner(nn.Module):
    """Base of all objectives: an `nn.Module` with groups, a plan and losses (see the module docstring)."""

    groups: dict[str, Group]
    plan: tuple[Phase, ...]

    def prepare(self, batch: Any) -> Any:
        """Return the batch in the learner's own units (normalised observations, actions in [-1, 1])."""
        return batch

    def loss(self, name: str) -> Loss:
        """Return the method `loss_NAME`."""
        method: Loss = getattr(self, f"loss_{name}")
        return method

    def after_update(self, step: int) -> None:
        """Move target networks after update `step` (counted from 0)."""

    def policy(self) -> Policy:
        """Return the policy; it shares this learner's weights."""
        raise NotImplementedError(f"{type(self).__name__} has no policy")
