r"""What a fresh draw of a policy would be worth: the distribution of Q(s, a), a ~ \pi(.|s), read off a state.

The self-evaluation of adaptive best-of-N for actions. A critic values every candidate anyway; what is missing is how
good the *next* one would be. A small network predicts quantiles q_u(s) of Q(s, a) over the policy's own actions, by
quantile regression (Koenker and Bassett, "Regression Quantiles", 1978):

    L = E_s E_{a ~ \pi(.|s)} [ \sum_u \rho_u(Q(s, a) - q_u(s)) ],    \rho_u(x) = x (u - 1(x < 0))

From the quantiles follow both numbers that a stop rule reads, b being the best value so far:

    P(no fresh draw is better) = F_s(b)                          the score of `StopRule`
    E[ (Q' - b)^+ ] = \int_b^\infty (1 - F_s(x)) dx              the expected gain (Weitzman, "Optimal Search for the
                                                                 Best Alternative", 1979)

F_s is linear between quantiles and exponential beyond the first and the last, so both are exact functions of them.

Shapes: B states, O observation, M numbers read off a state, k values of candidates so far.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from steelyard.config import Config, from_json, require_positive, to_json
from steelyard.data.normalize import Normalizer
from steelyard.errors import CheckpointError, DataError
from steelyard.nets.mlp import MLP
from steelyard.rng import torch_generator

LEVELS = (0.02, 0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
"""u of the quantiles: dense where the best of several draws lies."""
FORMAT = "steelyard-action-values-1"
_NARROWEST = 1e-6  # of a tail, in units of the values' own spread

Values = Callable[[Tensor, torch.Generator, int], Tensor]
"""Raw observations [B, O], generator, K -> values [B, K] of K fresh draws."""


class Judge(Protocol):
    """Says what a fresh draw would bring."""

    def read(self, observations: Tensor) -> Tensor:
        """Return what is known of states before anything is drawn, [B, M], for raw observations [B, O]."""
        ...

    def judge(self, known: Tensor, values: Tensor, coins: Tensor) -> tuple[Tensor, Tensor]:
        """Return P(no fresh draw is better than the best) [B] and the expected gain of one [B], in units of the value.

        Args:
            known: [B, M], from `read`.
            values: [B, k] of the candidates so far.
            coins: [B, k], uniform in (0, 1), one a candidate, for rules that stop by chance.
        """
        ...


class Coins:
    """Knows nothing: a score is a uniform random number, so `threshold` stops by chance (the baseline)."""

    def read(self, observations: Tensor) -> Tensor:
        """Return nothing, [B, 0]."""
        return observations.new_zeros(len(observations), 0)

    def judge(self, known: Tensor, values: Tensor, coins: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best coin and 1 minus it."""
        best = coins.amax(1)
        return best, 1 - best


class DrawnValues:
    """Draws `count` further candidates in every state to know the distribution: a bound, not a method."""

    def __init__(self, values: Values, count: int = 256, seed: int = 0) -> None:
        self.values, self.count, self.seed = values, count, seed

    def read(self, observations: Tensor) -> Tensor:
        """Return values of fresh draws [B, count]."""
        return self.values(observations, torch_generator(self.seed, "known values"), self.count)

    def judge(self, known: Tensor, values: Tensor, coins: Tensor) -> tuple[Tensor, Tensor]:
        """Return the share of fresh draws that are no better and their mean gain."""
        over = known - values.amax(1, keepdim=True)
        return (over <= 0).float().mean(1), over.clamp(min=0).mean(1)


@dataclass(frozen=True)
class ValueQuantilesConfig(Config):
    """How the distribution of a policy's values is learned."""

    hidden: tuple[int, ...] = (64, 64)
    """Widths of the network's hidden layers."""
    draws: int = 32
    """Actions that are drawn and valued in each training state, once."""
    updates: int = 1_000
    """Adam's updates."""
    batch_size: int = 128
    """States of an update."""
    learning_rate: float = 1e-3
    """Of Adam, decayed to 0 along a cosine."""
    held_out: float = 0.1
    """Share of the states on which calibration is measured instead."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "hidden", "draws", "updates", "batch_size", "learning_rate", "held_out")


class ValueQuantiles(nn.Module):
    """Quantiles of Q over a policy's own actions, read off the state; see the module docstring.

    Attributes:
        config: how it was, or is to be, trained.
        offset, scale: of the values, so that the network sees numbers about 1.
    """

    offset: Tensor
    scale: Tensor
    levels: Tensor

    def __init__(self, observation_size: int, config: ValueQuantilesConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.normalizer = Normalizer.identity(observation_size)
        self.net = MLP(observation_size, config.hidden, len(LEVELS), generator)
        self.register_buffer("offset", torch.tensor(0.0))
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("levels", torch.tensor(LEVELS), persistent=False)

    @torch.no_grad()
    def read(self, observations: Tensor) -> Tensor:
        """Return the quantiles [B, M] of raw observations [B, O], in order."""
        standardised: Tensor = self(observations.to(self.offset.device))
        return standardised.sort(-1).values * self.scale + self.offset

    def forward(self, observations: Tensor) -> Tensor:
        """Return standardised quantiles [B, M], not yet sorted."""
        quantiles: Tensor = self.net(self.normalizer(observations))
        return quantiles

    def judge(self, known: Tensor, values: Tensor, coins: Tensor) -> tuple[Tensor, Tensor]:
        """Return F(b) [B] and the expected gain over b [B], b being the best value."""
        better, gain = above(known, self.levels, values.amax(1), _NARROWEST * float(self.scale))
        return 1 - better, gain


def above(quantiles: Tensor, levels: Tensor, best: Tensor, narrowest: float) -> tuple[Tensor, Tensor]:
    """Return P(X > b) [B] and E[(X - b)^+] [B] of the distribution with these quantiles.

    Args:
        quantiles: [B, M], in order.
        levels: [M], in order, within (0, 1).
        best: b, [B].
        narrowest: least scale of a tail.
    """
    b, first, last = best[:, None], quantiles[:, :1], quantiles[:, -1:]
    low, high = float(levels[0]), 1 - float(levels[-1])
    # exponential tails through the two outer quantiles of each side
    left = ((quantiles[:, 1:2] - first) / math.log(float(levels[1]) / low)).clamp(min=narrowest)
    right = ((last - quantiles[:, -2:-1]) / math.log((1 - float(levels[-2])) / high)).clamp(min=narrowest)
    survival = 1 - levels
    width = (quantiles[:, 1:] - quantiles[:, :-1]).clamp(min=narrowest)
    # which part of each piece lies below b; one that b has passed counts in full, also where it has no width (ties)
    share = torch.where(b >= quantiles[:, 1:], 1.0, ((b - quantiles[:, :-1]) / width).clamp(0, 1))
    there = survival[:-1] + share * (survival[1:] - survival[:-1])  # P(X > x) where b, or the piece, begins
    middle = ((quantiles[:, 1:] - quantiles[:, :-1]) * (1 - share) * (there + survival[1:]) / 2).sum(1, keepdim=True)
    below, beyond = (first - b).clamp(min=0), (b - last).clamp(min=0)
    rise, fall = torch.exp(-below / left), torch.exp(-beyond / right)
    gain = below - low * left * (1 - rise) + middle + high * right * fall
    inner = 1 - low * rise - (share * (levels[1:] - levels[:-1])).sum(1, keepdim=True)
    better = torch.where(b >= last, high * fall, inner)
    return better.squeeze(1), gain.squeeze(1)


@dataclass(frozen=True)
class Calibration:
    """How well the quantiles hold in states that were not trained on.

    Attributes:
        levels: asked for.
        shares: of fresh values at or below each quantile.
        error: mean |share - level|.
        spread: share of the values' variance that lies within states, not between them.
        states: how many.
    """

    levels: tuple[float, ...]
    shares: tuple[float, ...]
    error: float
    spread: float
    states: int


def fit_value_quantiles(
    values: Values, observations: Tensor, config: ValueQuantilesConfig, seed: int
) -> tuple[ValueQuantiles, Calibration]:
    """Learn the distribution of a policy's values.

    Args:
        values: draws actions and values them.
        observations: raw states [N, O], best those that the policy itself meets.
        config: sizes.
        seed: of draws, weights and batches.

    Raises:
        DataError: fewer than 10 states, or values that are not finite.
    """
    if len(observations) < 10:
        raise DataError(f"the distribution of values needs at least 10 states to learn from, found {len(observations)}")
    pool = torch.cat(
        [
            values(part, torch_generator(seed, "action values/draws", number), config.draws)
            for number, part in enumerate(torch.split(observations, 512))
        ]
    )
    if not bool(torch.isfinite(pool).all()):
        raise DataError("the critic's values of the policy's own actions are not all finite")
    net = ValueQuantiles(observations.shape[1], config, torch_generator(seed, "action values/weights"))
    order = torch.randperm(len(pool), generator=torch_generator(seed, "action values/split"))
    held = order[: max(1, round(config.held_out * len(pool)))]
    kept = order[len(held) :]
    net.normalizer = Normalizer.fit([observations[kept].numpy()])
    net.offset.copy_(pool[kept].mean())
    net.scale.copy_(pool[kept].std().clamp(min=1e-8))
    targets = (pool - net.offset) / net.scale
    optimizer = torch.optim.Adam(net.net.parameters(), config.learning_rate)
    for step in range(config.updates):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 + math.cos(math.pi * step / config.updates)) / 2
        generator = torch_generator(seed, "action values/batch", step)
        rows = kept[torch.randint(len(kept), (min(config.batch_size, len(kept)),), generator=generator)]
        loss = pinball(net(observations[rows]), targets[rows], net.levels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return net.eval(), _calibration(net, observations[held], pool[held])


def pinball(quantiles: Tensor, values: Tensor, levels: Tensor) -> Tensor:
    """Return the mean of rho_u(value - q_u) over states, draws and levels.

    Args:
        quantiles: [B, M].
        values: [B, K].
        levels: [M].
    """
    error = values[:, :, None] - quantiles[:, None]
    return torch.maximum(levels * error, (levels - 1) * error).mean()


def _calibration(net: ValueQuantiles, observations: Tensor, pool: Tensor) -> Calibration:
    shares = (pool[:, :, None] <= net.read(observations)[:, None]).float().mean((0, 1))
    error = float((shares - net.levels).abs().mean())
    total = float(pool.var(correction=0))
    within = float(pool.var(1, correction=0).mean()) / total if total else 0.0
    return Calibration(LEVELS, tuple(map(float, shares)), error, within, len(pool))


def save_value_quantiles(net: ValueQuantiles, path: str | Path) -> None:
    """Write the network to one safetensors file that names its format and sizes."""
    notes = {"format": FORMAT, "config": to_json(net.config), "observations": str(net.normalizer.mean.numel())}
    tensors = {name: value.detach().contiguous() for name, value in net.state_dict().items()}
    safetensors.torch.save_file(tensors, Path(path), {"steelyard": json.dumps(notes)})


def load_value_quantiles(path: str | Path) -> ValueQuantiles:
    """Read what `save_value_quantiles` wrote.

    Raises:
        CheckpointError: it is no such file.
    """
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            notes = json.loads((file.metadata() or {}).get("steelyard", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (OSError, safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as quantiles of action values: {error}") from None
    if notes.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT!r}, found {notes.get('format')!r}")
    config = from_json(ValueQuantilesConfig, notes["config"], where=str(path))
    net = ValueQuantiles(int(notes["observations"]), config, torch_generator(0, "load"))
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: weights do not fit: {str(error).splitlines()[-1].strip()}") from None
    return net.eval()
