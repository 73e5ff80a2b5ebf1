r"""Ensembles at the price of one model: many heads over one backbone's features.

    f_k(x) = h_k(\phi(x)) + \beta p_k(x),      k = 1..K

h_k is trained, p_k is a frozen random function (Osband et al., "Randomized Prior Functions for Deep Reinforcement
Learning", NeurIPS 2018): where the data say nothing the priors go on disagreeing. \beta is the diversity knob.

| `kind` | h_k |
|---|---|
| linear | W_k \phi + b_k, all heads in one product |
| mlp | one hidden layer per head |
| epinet | \mu(\phi) + s([\phi, z_k]) . z_k, K fixed random indices (Osband et al., "Epistemic Neural Networks", 2021) |
| vanilla | an MLP of its own for every member: the ensemble that costs K models, as a reference |
| pca, uniform, gaussian | fixed directions, not trained: +- eigenvectors of feature differences, or random ones |

Member 0 is the pooled head where `pooled`: the single model, which re-weighting can always fall back to.

Differences from the papers: priors are scaled to standard deviation 1 at random features of unit variance, head by
head, so that \beta means the same for all of them. The directions of Decomposed Reward Models (Luo et al., arXiv
2502.13131) are those of second moments about 0, not about the mean: which side of a pair comes first changes nothing.

Shapes: B examples, D features, H members, C outputs, Z index.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.config import Config, require_positive, require_range, to_json
from steelyard.errors import ConfigError, DataError

PROBES = 512
"""Random features at which priors that are not linear are scaled to standard deviation 1."""


@dataclass(frozen=True)
class HeadsConfig(Config):
    """How many heads, of which kind, and what makes them differ."""

    num_heads: int = 100
    """K; user heads and cluster heads have as many as there are users or clusters."""
    kind: Literal["linear", "mlp", "epinet", "vanilla", "pca", "uniform", "gaussian"] = "linear"
    """What a head is; pca, uniform and gaussian are directions that are not trained, each with both signs."""
    hidden: int = 16
    """Units of the hidden layer of mlp heads and epinets."""
    trunk: tuple[int, ...] = (64, 64)
    """Hidden layers of each member of a vanilla ensemble."""
    index_size: int = 8
    """Size of an epinet's index."""
    init_scale: float = 1.0
    """Of the initial output weights, in units of 1 / sqrt(inputs); 0 suits heads that see few examples each."""
    prior: Literal["none", "linear", "mlp"] = "none"
    """Frozen random function added to every head; of an epinet, mlp is a frozen epinet with the same indices."""
    prior_scale: float = 1.0
    """beta: of the prior, in units of its own standard deviation at random features of unit variance."""
    prior_hidden: int = 16
    """Units of the hidden layer of mlp priors."""
    pooled: bool = True
    """Member 0 is one head trained on everything, without a prior."""

    def __post_init__(self) -> None:
        """Check ranges, that directions have no priors, and that they come in twos."""
        require_positive(self, "num_heads", "hidden", "trunk", "index_size", "prior_hidden")
        require_range(self, 0, math.inf, "prior_scale", "init_scale")
        if self.fixed and self.prior != "none":
            raise ConfigError(f"heads of kind {self.kind!r} are not trained and take no prior; found {self.prior!r}")
        if self.fixed and self.num_heads % 2:
            raise ConfigError(
                f"heads of kind {self.kind!r} come with both signs, so num_heads must be even; found {self.num_heads}"
            )

    @property
    def fixed(self) -> bool:
        """Whether the heads are not trained."""
        return self.kind in ("pca", "uniform", "gaussian")

    @property
    def num_members(self) -> int:
        """H: the heads, and the pooled one."""
        return self.num_heads + self.pooled


class Stack(nn.Module):
    """MLPs side by side on the same input, ReLU between layers; without hidden sizes they are linear.

    Args:
        members: H.
        sizes: D, hidden sizes, C.
        generator: draws the weights.
        init_scale: of the output layer's weights.
        frozen: weights are buffers, and hidden biases are drawn too.

    Attributes:
        weights: `weight{i}` [H, out, in] and `bias{i}` [H, out] of every layer i.
    """

    def __init__(
        self,
        members: int,
        sizes: Sequence[int],
        generator: torch.Generator,
        init_scale: float = 1,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.depth = len(sizes) - 1
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            last = layer == self.depth - 1
            weight = _randn(generator, members, outputs, inputs) * math.sqrt((1 if last else 2) / inputs)
            bias = _randn(generator, members, outputs) if frozen and not last else torch.zeros(members, outputs)
            for name, value in ((f"weight{layer}", weight * init_scale if last else weight), (f"bias{layer}", bias)):
                _register(self, name, value, frozen)

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Return (weight [H, out, in], bias [H, out]) of a layer."""
        return getattr(self, f"weight{number}"), getattr(self, f"bias{number}")

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, H, C] for inputs [B, D]: one product for all members, then one batched product a layer."""
        weight, bias = self.layer(0)
        outputs = functional.linear(x, weight.flatten(0, 1), bias.flatten()).view(-1, *bias.shape)
        for number in range(1, self.depth):
            weight, bias = self.layer(number)
            hidden = torch.relu(outputs).transpose(0, 1)
            outputs = torch.baddbmm(bias[:, None], hidden, weight.mT).transpose(0, 1)
        return outputs

    def squares(self) -> Tensor:
        """Return the sum of the squares of all weights; biases do not count."""
        return torch.stack([self.layer(number)[0].square().sum() for number in range(self.depth)]).sum()


class Epinet(nn.Module):
    r"""s([\phi, z]) . z for fixed indices z: one hidden layer, whose output [C, Z] is multiplied with the index.

    Args:
        indices: [K, Z].
        sizes: D, hidden units, C.
        generator: draws the weights.
        init_scale: of the output layer's weights.
        frozen: weights are buffers.
    """

    of_features: Tensor
    of_index: Tensor
    bias: Tensor
    output: Tensor
    indices: Tensor
    output_scale: Tensor

    def __init__(
        self,
        indices: Tensor,
        sizes: tuple[int, int, int],
        generator: torch.Generator,
        init_scale: float = 1,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        features, hidden, outputs = sizes
        size = indices.shape[1]
        first, scale = math.sqrt(2 / (features + size)), init_scale / math.sqrt(hidden * size)
        _register(self, "of_features", _randn(generator, hidden, features) * first, frozen)
        _register(self, "of_index", _randn(generator, hidden, size) * first, frozen)
        _register(self, "bias", torch.zeros(hidden), frozen)
        _register(self, "output", _randn(generator, hidden, outputs, size) * scale, frozen)
        self.register_buffer("indices", indices.clone())
        self.register_buffer("output_scale", torch.ones(len(indices)))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, K, C] for features [B, D]; the features' part of the hidden layer is computed once for all z."""
        common = functional.linear(x, self.of_features, self.bias)
        hidden = torch.relu(common[:, None] + self.indices @ self.of_index.T)
        output = torch.einsum("gcz,kz->kgc", self.output, self.indices) * self.output_scale[:, None, None]
        return torch.bmm(hidden.transpose(0, 1), output).transpose(0, 1)

    def squares(self) -> Tensor:
        """Return the sum of the squares of all weights; biases do not count."""
        return torch.stack([w.square().sum() for w in (self.of_features, self.of_index, self.output)]).sum()


class EnsembleHead(nn.Module):
    """Many heads over the same features.

    Args:
        config: of the heads.
        features: D.
        outputs: C.
        generator: draws initial weights, then indices or directions, then priors: a prior changes no initial weight.

    Attributes:
        num_members: H: `num_heads`, and the pooled head.
        trained_members: how many of them, from the first, are trained: all, or the pooled one beside fixed directions.
        scale: [H], what standardised members are divided by; ones until `fit_scale`.
        variance: [H], mean square of the members' residuals on held-out data; ones until `fit_variance`.
    """

    scale: Tensor
    variance: Tensor
    directions: Tensor

    def __init__(self, config: HeadsConfig, features: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.config, self.outputs = config, outputs
        self.num_members = config.num_members
        self.trained_members = int(config.pooled) if config.fixed else self.num_members
        self.trained: Stack | None = None
        self.epinet: Epinet | None = None
        sizes = {"mlp": (config.hidden,), "vanilla": config.trunk}.get(config.kind, ())
        count = int(config.pooled) + 1 if config.kind == "epinet" else self.trained_members
        if count:  # of an epinet: the pooled head, and mu
            self.trained = Stack(count, (features, *sizes, outputs), generator, config.init_scale)
        if config.kind == "epinet":
            indices = _randn(generator, config.num_heads, config.index_size)
            own = (features, config.hidden, outputs)
            self.epinet = Epinet(indices, own, generator, config.init_scale)
        if config.fixed:
            if outputs != 1:
                raise ConfigError(f"heads of kind {config.kind!r} have one output, found {outputs}")
            self.register_buffer("directions", self._draw_directions(features, generator))
        self.prior: Stack | Epinet | None = None
        if config.prior != "none":
            self.prior = self._draw_prior(features, generator)
        self.register_buffer("scale", torch.ones(self.num_members))
        self.register_buffer("variance", torch.ones(self.num_members))

    def forward(self, features: Tensor) -> Tensor:
        """Return members [B, H, C] of features [B, D], as they are trained; float32 also under autocast."""
        members = self.trained_only(features)
        if not self.config.fixed:
            return members
        with torch.autocast(features.device.type, enabled=False):
            fixed = functional.linear(features.to(self.directions.dtype), self._fixed())
        return torch.cat([members, fixed[:, :, None]], 1)

    def parts(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the trained members' [B, trained_members, C] trained part, and priors (times beta), which are fixed.

        The epinet and all priors see the features without a gradient to whatever made them.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.scale.dtype)
            if self.trained is None:
                trained = features.new_zeros(len(features), 0, self.outputs)
            else:
                trained = self.trained(features)
            if self.epinet is not None:
                heads = trained[:, -1:] + self.epinet(features.detach())
                trained = torch.cat([trained[:, :-1], heads], 1)
            return trained, self._prior(features)

    def trained_only(self, features: Tensor) -> Tensor:
        """Return the trained members [B, trained_members, C], priors included: what a training loss is taken of."""
        trained, prior = self.parts(features)
        return trained if prior is None else trained + prior

    def squares(self) -> Tensor:
        """Return the sum of the squares of all trained weights but biases."""
        parts = [part.squares() for part in (self.trained, self.epinet) if part is not None]
        return torch.stack(parts).sum()

    def fit_scale(self, members: Tensor) -> None:
        """Set `scale` to the root mean square of members [N, H, C] over examples and outputs (margins, for pairs).

        About 0, not about the mean: which side of a pair comes first changes nothing. Several outputs are logits, whose
        common level means nothing and is taken off first. A member that says nothing keeps scale 1.
        """
        self._check(members)
        if members.shape[2] > 1:
            members = members - members.mean(2, keepdim=True)
        scale = members.detach().double().square().mean((0, 2)).sqrt()
        self.scale.copy_(torch.where(scale > 0, scale, 1.0))

    def fit_variance(self, members: Tensor, targets: Tensor) -> None:
        """Set `variance` to the mean square of the residuals of members [N, H, 1] at held-out targets [N]."""
        self._check(members)
        residuals = members[:, :, 0].detach().double() - targets[:, None]
        self.variance.copy_(residuals.square().mean(0).clamp(min=torch.finfo(torch.float32).tiny))

    def standardise(self, members: Tensor) -> Tensor:
        """Return members [B, H, C] divided by `scale`: none weighs more only because its numbers are larger."""
        return members / self.scale[:, None]

    def linear(self) -> tuple[Tensor, Tensor] | None:
        """Return (weight [H, C, D], bias [H, C]) of the standardised members where they are linear, else None."""
        if self.config.kind in ("mlp", "epinet", "vanilla") or self.config.prior == "mlp":
            return None
        weights, biases = [], []
        if self.trained is not None:
            weight, bias = (value.detach() for value in self.trained.layer(0))
            if isinstance(self.prior, Stack):
                weight = weight + self.config.prior_scale * self.prior.layer(0)[0]
            weights.append(weight)
            biases.append(bias)
        if self.config.fixed:
            weights.append(self._fixed()[:, None])
            biases.append(self.directions.new_zeros(len(weights[-1]), 1))
        return torch.cat(weights) / self.scale[:, None, None], torch.cat(biases) / self.scale[:, None]

    @torch.no_grad()
    def set_directions(self, differences: Tensor) -> None:
        """Set the directions of kind pca to those of differences [N, D]; random directions stay as they were drawn.

        Raises:
            ConfigError: the heads are trained, or there are fewer than K / 2 directions to take.
        """
        if not self.config.fixed:
            raise ConfigError(f"heads of kind {self.config.kind!r} are trained and have no fixed directions")
        if self.config.kind != "pca":
            return
        half = self.config.num_heads // 2
        moments = differences.double().T @ differences.double() / len(differences)
        values, vectors = torch.linalg.eigh(moments)
        if half > int((values > values[-1] * 1e-10).sum()):
            raise ConfigError(
                f"{len(differences)} differences of {differences.shape[1]} features have fewer than {half} directions; "
                f"lower num_heads, found {self.config.num_heads}"
            )
        found = vectors.flip(1).T[:half]  # the largest first
        # an eigenvector has no sign of its own: its largest entry is made positive, so that every machine agrees
        largest = found.gather(1, found.abs().argmax(1, keepdim=True))
        found = found * largest.sign()
        self.directions.copy_(torch.cat([found, -found]))

    def fingerprint(self) -> str:
        """Return "sha256:..." of the config and every number: two head sets with the same one are the same."""
        digest = hashlib.sha256(to_json(self.config).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + repr(tuple(value.shape)).encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    @torch.no_grad()
    def _prior(self, features: Tensor) -> Tensor | None:
        """Return beta p_k [B, H, C]; 0 for the pooled head. Frozen, and without a gradient to the features."""
        if self.prior is None:
            return None
        outputs: Tensor = self.prior(features)
        if isinstance(self.prior, Epinet) and self.config.pooled:
            outputs = functional.pad(outputs, (0, 0, 1, 0))
        return self.config.prior_scale * outputs

    @torch.no_grad()
    def _draw_prior(self, features: int, generator: torch.Generator) -> Stack | Epinet:
        config = self.config
        if self.epinet is not None and config.prior == "mlp":
            sizes = (features, config.prior_hidden, self.outputs)
            twin = Epinet(self.epinet.indices, sizes, generator, frozen=True)
            twin.output_scale.copy_(1 / _spread(twin, features, generator))
            return twin
        hidden = () if config.prior == "linear" else (config.prior_hidden,)
        prior = Stack(self.num_members, (features, *hidden, self.outputs), generator, frozen=True)
        weight, _ = prior.layer(prior.depth - 1)
        spread = _spread(prior, features, generator) if hidden else weight.square().sum(2).mean(1).sqrt()
        weight /= spread[:, None, None]
        if config.pooled:
            weight[0] = 0
        return prior

    def _draw_directions(self, features: int, generator: torch.Generator) -> Tensor:
        half = self.config.num_heads // 2
        if self.config.kind == "pca":
            return torch.full((2 * half, features), math.nan)
        drawn = _randn(generator, half, features)
        if self.config.kind == "uniform":
            drawn = 2 * torch.rand(half, features, generator=generator, device=generator.device).cpu() - 1
        drawn = functional.normalize(drawn, dim=1)
        return torch.cat([drawn, -drawn])

    def _fixed(self) -> Tensor:
        if bool(self.directions[0, 0].isnan()):
            raise ConfigError(
                "heads of kind 'pca' have no directions yet: call set_directions with feature differences"
            )
        return self.directions

    def _check(self, members: Tensor) -> None:
        if members.ndim != 3 or members.shape[1] != self.num_members or len(members) == 0:
            raise DataError(f"expected members [N, {self.num_members}, C], found {tuple(members.shape)}")


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).cpu()


def _register(module: nn.Module, name: str, value: Tensor, frozen: bool) -> None:
    if frozen:
        module.register_buffer(name, value)
    else:
        module.register_parameter(name, nn.Parameter(value))


def _spread(prior: nn.Module, features: int, generator: torch.Generator) -> Tensor:
    """Return the standard deviation [H] of a prior's outputs at random features."""
    outputs: Tensor = prior(_randn(generator, PROBES, features))
    return outputs.std(0).square().mean(1).sqrt().clamp(min=1e-6)
