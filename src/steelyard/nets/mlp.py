"""Multi-layer perceptrons and ensembles of them evaluated as one batched product."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def orthogonal_(weight: Tensor, gain: float, generator: torch.Generator) -> None:
    """Fill a matrix [in, out] (or a stack [E, in, out]) with independent orthogonal matrices times `gain`."""
    with torch.no_grad():
        for matrix in weight if weight.ndim == 3 else (weight,):
            nn.init.orthogonal_(matrix, gain, generator=generator)


class EnsembleLinear(nn.Module):
    """E independent linear layers. Weight [E, in, out], bias [E, 1, out]; x [E, B, in] or [B, in] -> [E, B, out]."""

    def __init__(self, members: int, inputs: int, outputs: int, gain: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))
        orthogonal_(self.weight, gain, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight + bias for every member."""
        if x.ndim == 2:
            x = x.expand(len(self.weight), -1, -1)
        return torch.baddbmm(self.bias, x, self.weight)


class MLP(nn.Module):
    """Linear, [LayerNorm,] ReLU, ..., Linear; orthogonal weights (gain sqrt 2, `last_gain` at the end), zero bias."""

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        generator: torch.Generator,
        last_gain: float = 0.01,
        layer_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = [inputs, *hidden]
        layers: list[nn.Module] = []
        for size, following in itertools.pairwise(sizes):
            layers.append(_linear(size, following, math.sqrt(2), generator))
            if dropout:
                layers.append(nn.Dropout(dropout))
            if layer_norm:
                layers.append(nn.LayerNorm(following))
            layers.append(nn.ReLU())
        layers.append(_linear(sizes[-1], outputs, last_gain, generator))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]; the output layer runs in float32 under autocast."""
        *hidden, output = self.layers
        for layer in hidden:
            x = layer(x)
        with torch.autocast(x.device.type, enabled=False):
            result: Tensor = output(x.float())
        return result


def _linear(inputs: int, outputs: int, gain: float, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")  # leaves the global generator alone
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
