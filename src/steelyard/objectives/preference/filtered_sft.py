r"""Filtered supervised fine-tuning: maximum likelihood of completions that are good enough.

Tajwar et al., "Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data" (ICML 2024), whose released
code weighs by a threshold or a sigmoid; ReST (Gulcehre et al., "Reinforced Self-Training (ReST) for Language Modeling",
2023), eq. 2, filters by a threshold.

Idea: imitate what the reward calls good, whatever else the prompt's group holds.

    L = - E[ w(r) \log \pi(y | x) ],   w = 1(r >= c)  or  w = \sigma((r - c) / \tau)

| symbol | code |
|---|---|
| w(r) | `filtered_sft_complete`: `advantages` [N, T] |
| c | `config.threshold` |
| \tau | `config.tau` |

Differences from the paper: the mean is over all completions, the filtered ones included, so that a buffer with few good
ones takes a small step. Completions without a reward have weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from steelyard.config import require_positive, require_range
from steelyard.data.experience import ExperienceBatch
from steelyard.objectives.preference.advantages import spread
from steelyard.objectives.preference.base import Memory
from steelyard.objectives.preference.weighted import WeightedConfig

_LARGE = 1e30


@dataclass(frozen=True)
class FilteredSFTConfig(WeightedConfig):
    """Settings of filtered supervised fine-tuning."""

    kind: Literal["filtered_sft"] = "filtered_sft"
    """Name of the objective."""
    filter: Literal["threshold", "sigmoid"] = "threshold"
    """Weights: 1 at and above the threshold and 0 below, or a sigmoid around it."""
    threshold: float = 0.0
    """c: the reward that is good enough."""
    tau: float = 1.0
    """Width of the sigmoid, in rewards."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require_range(self, -_LARGE, _LARGE, "threshold")
        require_positive(self, "tau")


def filtered_sft_complete(
    batch: ExperienceBatch, config: FilteredSFTConfig, memory: Memory
) -> tuple[ExperienceBatch, Memory]:
    """Return the batch with the weight of each completion."""
    assert batch.rewards is not None
    above = batch.rewards - config.threshold
    weights = (above >= 0).to(above) if config.filter == "threshold" else (above / config.tau).sigmoid()
    weights = torch.where(above.isnan(), torch.zeros_like(weights), weights)
    return replace(batch, advantages=spread(weights, batch)), dict(memory)
