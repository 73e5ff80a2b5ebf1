"""What heads stand on: modules that turn the inputs of labelled examples into features.

A backbone has `width`, the number of its features D. One that has `inputs`, too, reads numbers [B, inputs], which its
learner centres and scales; of one without, the features are centred and scaled.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steelyard.data.experience import ExperienceBatch
from steelyard.data.labelled import PAD
from steelyard.nets.completions import plain_rows
from steelyard.nets.encoder import Encoder
from steelyard.nets.mlp import MLP
from steelyard.nets.transformer import Transformer


class Features(nn.Module):
    """No backbone: the inputs are the features. For those that were computed once, and for linear models of tables."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inputs = self.width = size

    def forward(self, inputs: Tensor) -> Tensor:
        """Return what was given."""
        return inputs


class Trunk(nn.Module):
    """An MLP without an output layer: Linear, GELU, Linear, GELU, ...; orthogonal weights."""

    def __init__(self, inputs: int, hidden: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self.inputs, self.width = inputs, hidden[-1]
        sizes = [inputs, *hidden]
        self.layers = nn.ModuleList(MLP(a, (), b, generator, last_gain=2**0.5) for a, b in itertools.pairwise(sizes))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [B, inputs] to [B, width]."""
        for layer in self.layers:
            inputs = nn.functional.gelu(layer(inputs))
        return inputs


class EncoderBackbone(nn.Module):
    """A text encoder on token rows (`data.labelled.token_rows` of `Encoder.tokens`)."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.width = encoder, encoder.width

    def forward(self, inputs: Tensor) -> Tensor:
        """Map int64 [B, 1 + L] to [B, width]."""
        rows = [([token for token in ids if token != PAD], begin) for begin, *ids in inputs.tolist()]
        return self.encoder.states(rows)


def width_of(backbone: nn.Module) -> int:
    """Return the number of features of a backbone, or of a language model."""
    return backbone.config.width if isinstance(backbone, Transformer) else int(backbone.width)  # type: ignore[arg-type]


def reads_completions(backbone: nn.Module) -> bool:
    """Whether a backbone is a language model, which reads an `ExperienceBatch`."""
    return isinstance(backbone, Transformer) or hasattr(backbone, "final_states")


def final_states(backbone: nn.Module, batch: ExperienceBatch) -> Tensor:
    """Return a language model's hidden states [N, W] at the completions' last scored tokens."""
    if isinstance(backbone, Transformer):
        rows = plain_rows(batch)
        return backbone.features(rows.tokens).flatten(0, 1)[rows.ends]
    states: Tensor = backbone.final_states(batch)  # type: ignore[operator]
    return states


def trainable_of(backbone: nn.Module) -> tuple[nn.Parameter, ...]:
    """Return what of a backbone learns: a language model's adapters or weights, else all that is not frozen."""
    if reads_completions(backbone) and not isinstance(backbone, Transformer):
        groups: dict[str, tuple[nn.Parameter, ...]] = backbone.trainable()  # type: ignore[operator]
        return groups.get("policy", ())
    # an encoder's pooler comes after the states that are read here: it gets no gradient
    named = backbone.named_parameters()
    return tuple(value for name, value in named if value.requires_grad and "pooler" not in name.split("."))
