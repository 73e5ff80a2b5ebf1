"""Multi-layer perceptrons, and the stacked weights of ensembles."""

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
    """The weights of E independent linear layers: weight [E, in, out], bias [E, 1, out]."""

    def __init__(self, members: int, inputs: int, outputs: int, gain: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))
        orthogonal_(self.weight, gain, generator)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """Map each member's own input [rows, in] to [rows, out].

        Members in turn: on a CPU plain products are faster than one batched product, forward and backward (measured).
        """
        parts = zip(self.bias.unbind(0), x, self.weight.unbind(0), strict=True)
        return [torch.addmm(bias, rows, weight) for bias, rows, weight in parts]


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
            if layer_norm:
                layers.append(nn.LayerNorm(following))
            layers.append(nn.ReLU())
        layers.append(_linear(sizes[-1], outputs, last_gain, generator))
        self.layers = nn.Sequential(*layers)
        self.dropout = dropout

    def forward(self, x: Tensor, dropout: torch.Generator | None = None) -> Tensor:
        """Map [..., inputs] to [..., outputs]; the output layer runs in float32 under autocast.

        Dropout after each linear layer is applied only where a generator for it is given.
        """
        *hidden, output = self.layers
        for layer in hidden:
            x = layer(x)
            if self.dropout and dropout is not None and isinstance(layer, nn.Linear):
                kept = torch.rand(x.shape, generator=dropout, device=x.device) >= self.dropout
                x = x * kept / (1 - self.dropout)
        with torch.autocast(x.device.type, enabled=False):
            result: Tensor = output(x.to(next(output.parameters()).dtype))
        return result


def _linear(inputs: int, outputs: int, gain: float, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")  # leaves the global generator alone
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
