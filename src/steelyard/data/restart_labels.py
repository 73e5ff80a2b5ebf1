r"""Labels of self-evaluation: would an independent sample of the same prompt be better than this one?

Manvi, Singh, Ermon (arXiv 2410.02725) compare pairs of samples of one prompt; a tie is no reason to start over. Here
all pairs are used at once:

    \hat q_i = #{j \ne i : r_j > r_i + \delta} / (N - 1)

is the mean label of sample i against every other one, so cross-entropy against it has the same optimum as the loss of
random pairs and less noise. N samples are few: with c successes among N the label of a failure is c / (N - 1), that of
a success 0.

Any prefix of a sample has the sample's label, which makes the classifier's optimum at a prefix the mean over the
completions that the policy gives it (a Monte Carlo value); the empty prefix has the mean label of the prompt.

Shapes: P prompts, N samples of each, K prefixes of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from steelyard.config import Config, require_range
from steelyard.errors import ConfigError, DataError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RestartLabelConfig(Config):
    """When another sample counts as better."""

    margin: float = 0.0
    """delta: rewards that differ by no more than this are a tie; 0 suits rewards of 0 and 1."""
    margin_kind: Literal["absolute", "quantile"] = "absolute"
    """absolute: in units of the reward; quantile: delta is this quantile of |r_i - r_j| over the pairs of each prompt
    in the training pool, for rewards whose unit says nothing (reward models)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_range(self, 0, math.inf, "margin")
        if self.margin_kind == "quantile" and self.margin >= 1:
            raise ConfigError(f"margin must be below 1 where it is a quantile, found {self.margin}")


def margin_of(rewards: Sequence[Floats], config: RestartLabelConfig) -> float:
    """Return delta in units of the reward.

    Args:
        rewards: [N] of each prompt.
        config: as an absolute number or as a quantile.

    Raises:
        DataError: a quantile is asked for and no prompt has two rewards.
    """
    if config.margin_kind == "absolute":
        return config.margin
    gaps = []
    for of_prompt in rewards:
        known = of_prompt[~np.isnan(of_prompt)]
        first, second = np.triu_indices(len(known), 1)
        gaps.append(np.abs(known[first] - known[second]))
    every = np.concatenate(gaps) if gaps else np.zeros(0)
    if not len(every):
        raise DataError(
            "margin: expected a prompt with two rewards to take a quantile of their differences, found none"
        )
    return float(np.quantile(every, config.margin))


def soft_labels(rewards: Floats, margin: float = 0.0) -> Floats:
    """Return P(another sample is better) [..., N] for rewards [..., N]; NaN where it cannot be told.

    Args:
        rewards: of the samples of a prompt along the last axis; NaN: unknown, compared with nothing.
        margin: differences up to this are ties.
    """
    rewards = np.asarray(rewards, np.float64)
    known = ~np.isnan(rewards)
    better = (rewards[..., None, :] > rewards[..., :, None] + margin).sum(-1)  # j better than i; false for NaN
    others = known.sum(-1, keepdims=True) - 1
    return np.where(known & (others > 0), better / np.maximum(others, 1), np.nan)


def cuts(ends: Ints, count: int, prompt_only: bool, generator: np.random.Generator) -> Ints:
    """Return where to read samples, int64 [n, 1 + count + 1]: after all their tokens, after random ones, after none.

    Random prefixes are uniform in 1..end - 1 tokens. -1: nowhere; so where a sample is too short to be cut, and at
    the last entry but where `prompt_only` is set, which is for the first sample only, for all share the prompt.

    Args:
        ends: int64 [n], tokens of samples of one prompt, EOS not counted.
        count: random prefixes of each.
        prompt_only: also read the prompt alone.
        generator: draws the prefixes.
    """
    found = np.full((len(ends), count + 2), -1, np.int64)
    found[:, 0] = ends
    random = 1 + (generator.random((len(ends), count)) * (ends[:, None] - 1)).astype(np.int64)
    found[:, 1:-1] = np.where(ends[:, None] > 1, random, -1)
    if prompt_only and len(ends):
        found[0, -1] = 0
    return found
