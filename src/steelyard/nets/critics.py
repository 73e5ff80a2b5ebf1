"""Critics: an ensemble of Q(s, a) as one module, and V(s)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steelyard.nets.mlp import MLP, EnsembleLinear


class Critic(nn.Module):
    """E state-action value functions with stacked weights, evaluated together."""

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
        inputs = torch.cat([observations, actions], dim=-1)
        shape = actions.shape[-3:-1] if actions.ndim > 2 else actions.shape[:1]
        flat = inputs.reshape(-1, *shape, inputs.shape[-1]).flatten(1, -2)  # [1 or E, rows, O + A]
        x = list(flat) if len(flat) == self.num_critics else [flat[0]] * self.num_critics
        for index, layer in enumerate(self.hidden):
            x = layer(x)
            if self.norms is not None:
                x = self.norms[index](x)
            x = [torch.relu_(h) for h in x]
        with torch.autocast(inputs.device.type, enabled=False):
            weights, biases = self.output.weight.unbind(0), self.output.bias.unbind(0)
            q = [torch.mv(h.to(w.dtype), w[:, 0]) + b[0] for h, w, b in zip(x, weights, biases, strict=True)]
        return torch.stack(q).view(self.num_critics, *shape)


class _EnsembleNorm(nn.Module):
    """Layer norm with own scale and shift for each member: E times [rows, H] -> E times [rows, H]."""

    def __init__(self, members: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, 1, size))
        self.bias = nn.Parameter(torch.zeros(members, 1, size))

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        parts = zip(x, self.weight.unbind(0), self.bias.unbind(0), strict=True)
        return [torch.nn.functional.layer_norm(h, h.shape[-1:], w[0], b[0]) for h, w, b in parts]


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
    """Move every target parameter: target <- (1 - rate) * target + rate * source."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)
