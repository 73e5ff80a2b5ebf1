"""Rewards in, pairs out: which completions of a prompt are compared with which.

Pure functions of rewards. Completions of one prompt form a group; a pair never crosses groups, and without label noise
its first completion has the strictly higher reward. Equal rewards say nothing about which is better, so such pairs are
dropped and counted, never broken by position. A NaN reward marks a completion that could not be scored; it joins no
pair.

| rule | pairs of a group of n completions ranked by reward |
|---|---|
| `all` | every one with every lower one, n (n - 1) / 2 |
| `best_worst` | the best with the worst, 1 |
| `adjacent` | each with the next lower one, n - 1 |
| `best_rest` | the best with each other one, n - 1 |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from steelyard.errors import ConfigError, DataError

PairingRule = Literal["all", "best_worst", "adjacent", "best_rest"]
RULES: tuple[PairingRule, ...] = get_args(PairingRule)


@dataclass(frozen=True)
class Pairing:
    """Pairs, and what was left out of them.

    Attributes:
        pairs: int64 [K, 2], rows (chosen, rejected) of completions; by prompt, then by rank.
        margins: float32 [K], reward of the chosen less that of the rejected; negative where noise flipped the label.
        ties: pairs of the rule dropped because both rewards are equal.
        too_close: pairs dropped because the rewards differ by less than `min_gap`.
        unscorable: completions without a reward (NaN).
        flipped: pairs whose label the noise turned round.
    """

    pairs: Tensor
    margins: Tensor
    ties: int
    too_close: int
    unscorable: int
    flipped: int

    def __len__(self) -> int:
        """Return the number of pairs K."""
        return len(self.pairs)


def pairs_from_rewards(
    rewards: Tensor,
    prompt_of: Tensor,
    rule: PairingRule,
    min_gap: float = 0.0,
    generator: torch.Generator | None = None,
    noise: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (pairs int64 [K, 2], margins float32 [K]); `pair_up` says what was left out too."""
    found = pair_up(rewards, prompt_of, rule, min_gap, generator, noise)
    return found.pairs, found.margins


@torch.no_grad()
def pair_up(
    rewards: Tensor,
    prompt_of: Tensor,
    rule: PairingRule,
    min_gap: float = 0.0,
    generator: torch.Generator | None = None,
    noise: float | None = None,
) -> Pairing:
    r"""Return the pairs that a rule makes of rewards.

    Args:
        rewards: [N]; NaN where a completion could not be scored.
        prompt_of: int64 [N], the group of each completion, in any order.
        rule: see the module docstring; among equal rewards the earlier completion ranks higher.
        min_gap: keep pairs whose rewards differ by at least this much.
        generator: draws the labels, on the rewards' device; needed with `noise` only.
        noise: the Bradley-Terry scale \tau: a pair keeps its label with probability \sigma((r_w - r_l) / \tau). None
            or 0: labels follow the rewards.

    Raises:
        ConfigError: an unknown rule, a negative gap or scale, or noise without a generator.
        DataError: shapes differ, or a reward is infinite.
    """
    _check(rewards, prompt_of, rule, min_gap, generator, noise)
    scored = torch.nonzero(~rewards.isnan()).flatten()
    # two stable sorts: by falling reward within a prompt, completions with equal rewards in their own order
    by_reward = scored[torch.sort(rewards[scored], descending=True, stable=True).indices]
    order = by_reward[torch.sort(prompt_of[by_reward], stable=True).indices]
    sizes = torch.unique_consecutive(prompt_of[order], return_counts=True)[1]
    first, second = _ranks(rule, sizes)
    values = rewards.double()  # so that a gap between float32 rewards is not rounded
    chosen, rejected = order[first], order[second]
    gaps = values[chosen] - values[rejected]
    tied, close = gaps == 0, (gaps > 0) & (gaps < min_gap)
    kept = ~(tied | close)
    pairs, gaps = torch.stack([chosen, rejected], 1)[kept], gaps[kept]
    flipped = 0
    if noise:
        draws = torch.rand(len(gaps), generator=generator, device=gaps.device, dtype=torch.float64)
        flips = draws >= torch.sigmoid(gaps / noise)
        pairs = torch.where(flips[:, None], pairs.flip(1), pairs)
        gaps = torch.where(flips, -gaps, gaps)
        flipped = int(flips.sum())
    return Pairing(pairs, gaps.float(), int(tied.sum()), int(close.sum()), len(rewards) - len(scored), flipped)


def _ranks(rule: PairingRule, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions (winner, loser) [K] in a list of groups, one after the other, each ranked from the best."""
    starts = sizes.cumsum(0) - sizes
    if rule == "best_worst":
        several = sizes >= 2
        return starts[several], (starts + sizes - 1)[several]
    positions = torch.arange(int(sizes.sum()), device=sizes.device)
    start = starts.repeat_interleave(sizes)
    if rule == "best_rest":
        rest = positions > start
        return start[rest], positions[rest]
    below = (starts + sizes).repeat_interleave(sizes) - positions - 1  # how many of its group rank lower
    if rule == "adjacent":
        upper = positions[below > 0]
        return upper, upper + 1
    first = positions.repeat_interleave(below)
    before = (below.cumsum(0) - below).repeat_interleave(below)
    return first, first + 1 + torch.arange(len(first), device=sizes.device) - before


def _check(
    rewards: Tensor,
    prompt_of: Tensor,
    rule: str,
    min_gap: float,
    generator: torch.Generator | None,
    noise: float | None,
) -> None:
    if rule not in RULES:
        raise ConfigError(f"pairing rule: expected one of {', '.join(RULES)}, found {rule!r}")
    if not (math.isfinite(min_gap) and min_gap >= 0):
        raise ConfigError(f"min_gap must be at least 0, found {min_gap}")
    if noise is not None and not (math.isfinite(noise) and noise >= 0):
        raise ConfigError(f"label noise must be at least 0, found {noise}")
    if noise and generator is None:
        raise ConfigError("label noise needs a generator")
    if rewards.shape != prompt_of.shape or rewards.ndim != 1:
        raise DataError(
            f"rewards and prompt_of: expected one number per completion, found {list(rewards.shape)} and "
            f"{list(prompt_of.shape)}"
        )
    if bool(rewards.isinf().any()):
        row = int(rewards.isinf().nonzero()[0])
        raise DataError(f"reward of completion {row}: expected a finite number or NaN, found {float(rewards[row])}")
