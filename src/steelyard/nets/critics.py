"""Critics: an ensemble of Q(s, a) as one module, and V(s)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steelyard.nets.mlp import MLP, EnsembleLinear


class Critic(nn.Module):
    """E state-action value functions evaluated together as batched matrix products."""

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden: Sequence[int],
        num_critics: int,
        generator: torch.Generator,
        layer_norm: bool = False,
        last_gain: float = 0.01,
    ) -> None:
        super().__init__()
        sizes = [observation_size + action_size, *hidden]
        self.num_critics = num_critics
        self.hidden = nn.ModuleList(
            EnsembleLinear(num_critics, a, b, math.sqrt(2), generator) for a, b in itertools.pairwise(sizes)
        )
        self.norms = nn.ModuleList(_EnsembleNorm(num_critics, size) for size in hidden) if layer_norm else None
        self.output = EnsembleLinear(num_critics, sizes[-1], 1, last_gain, generator)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return Q.

        Args:
            observations: [B, O].
            actions: [B, A] for one action a state; [B, K, A] for K; [E, B, K, A] for K of each member's own.

        Returns:
            [E, B] for actions [B, A], else [E, B, K]; float32 also under autocast.
        """
        if actions.ndim > 2:
            observations = observations.unsqueeze(-2).expand(*actions.shape[:-1], -1)
        # splitting the first layer into a state and an action part saves little and slows the backward pass: measured
        x = torch.cat([observations, actions], dim=-1)
        shape = x.shape[-3:-1] if actions.ndim > 2 else x.shape[:1]
        x = x.flatten(-3, -2) if actions.ndim > 2 else x
        for index, layer in enumerate(self.hidden):
            x = layer(x)
            if self.norms is not None:
                x = self.norms[index](x)
            x = torch.relu_(x)
        with torch.autocast(x.device.type, enabled=False):
            q: Tensor = self.output(x.float())
        return q.view(self.num_critics, *shape)


class _EnsembleNorm(nn.Module):
    """Layer norm with own scale and shift for each member: [E, B, H] -> [E, B, H]."""

    def __init__(self, members: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, 1, size))
        self.bias = nn.Parameter(torch.zeros(members, 1, size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


class Value(nn.Module):
    """State value V(s): [B, O] -> [B]."""

    def __init__(
        self,
        observation_size: int,
        hidden: Sequence[int],
        generator: torch.Generator,
        layer_norm: bool = False,
        last_gain: float = 0.01,
    ) -> None:
        super().__init__()
        self.net = MLP(observation_size, hidden, 1, generator, last_gain=last_gain, layer_norm=layer_norm)

    def forward(self, observations: Tensor) -> Tensor:
        """Return V [B]."""
        value: Tensor = self.net(observations)
        return value.squeeze(-1)


@torch.no_grad()
def polyak_update(source: nn.Module, target: nn.Module, rate: float) -> None:
    """Target <- (1 - rate) * target + rate * source, for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)
