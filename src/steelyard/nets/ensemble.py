r"""Ensembles at the price of one model: many heads over one backbone's features.

    f_k(x) = h_k(\phi(x)) + \beta p_k(x),      k = 1..K

h_k is trained, p_k is a frozen random function (Osband et al., "Randomized Prior Functions for Deep Reinforcement
Learning", NeurIPS 2018): where the data say nothing the priors go on disagreeing. \beta is the diversity knob.

| `kind` | h_k |
|---|---|
| linear | W_k \phi + b_k, all heads in one product |
| mlp | one hidden layer per head |
| epinet | \mu(\phi) + s([\phi, z_k]) . z_k with K fixed random indices (Osband et al., "Epistemic Neural Networks", 2021) |
| pca, uniform, gaussian | fixed directions, not trained: +- eigenvectors of feature differences, or random ones |

Member 0 is the pooled head where `pooled`: the single model, which re-weighting can always fall back to.

Shapes: B examples, D features, H members, C outputs.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from steelyard.config import Config, require_positive, require_range
from steelyard.errors import ConfigError


@dataclass(frozen=True)
class HeadsConfig(Config):
    """How many heads, of which kind, and what makes them differ."""

    num_heads: int = 100
    """K; user heads and cluster heads have as many as there are users or clusters."""
    kind: Literal["linear", "mlp", "epinet", "pca", "uniform", "gaussian"] = "linear"
    """What a head is; pca, uniform and gaussian are directions that are not trained."""
    hidden: int = 16
    """Units of the hidden layer of mlp heads and epinets."""
    index_size: int = 8
    """Size of an epinet's index."""
    prior: Literal["none", "linear", "mlp"] = "none"
    """Frozen random function added to every head."""
    prior_scale: float = 1.0
    """beta: of the prior, in units of its own standard deviation at random features of unit variance."""
    prior_hidden: int = 16
    """Units of the hidden layer of mlp priors."""
    pooled: bool = True
    """Member 0 is one head trained on everything, without a prior."""

    def __post_init__(self) -> None:
        """Check ranges, and that directions are not given priors."""
        require_positive(self, "num_heads", "hidden", "index_size", "prior_hidden")
        require_range(self, 0, math.inf, "prior_scale")
        if self.fixed and self.prior != "none":
            raise ConfigError(f"heads of kind {self.kind!r} are not trained and take no prior; found {self.prior!r}")

    @property
    def fixed(self) -> bool:
        """Whether the heads are not trained."""
        return self.kind in ("pca", "uniform", "gaussian")


class EnsembleHead(nn.Module):
    """Many heads over the same features.

    Args:
        config: of the heads.
        features: D.
        outputs: C.
        generator: draws initial weights, priors and epinet indices.

    Attributes:
        num_members: H: `num_heads`, and the pooled head.
        scale: [H], what standardised members are divided by; ones until `fit_scale`.
    """

    scale: Tensor

    def __init__(self, config: HeadsConfig, features: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        raise NotImplementedError

    def forward(self, features: Tensor) -> Tensor:
        """Return members [B, H, C] of features [B, D], as they are trained."""
        raise NotImplementedError

    def fit_scale(self, members: Tensor) -> None:
        """Set `scale` to the standard deviation of members [N, H, C] over examples and outputs (margins, for pairs).

        A member that says nothing (standard deviation 0) keeps scale 1.
        """
        raise NotImplementedError

    def standardise(self, members: Tensor) -> Tensor:
        """Return members [B, H, C] divided by `scale`: none weighs more only because its numbers are larger."""
        return members / self.scale[:, None]

    def linear(self) -> tuple[Tensor, Tensor] | None:
        """Return (weight [H, C, D], bias [H, C]) of the standardised members where they are linear, else None."""
        raise NotImplementedError

    def set_directions(self, differences: Tensor) -> None:
        """Set the directions of kinds pca, uniform and gaussian: those of differences [N, D] for pca."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return "sha256:..." of the config and every number: two head sets with the same one are the same."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + repr(tuple(value.shape)).encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"
